"""The unified encoder with its decoders and text towers."""

from openvision3.model.openvision3 import OpenVision3

__all__ = ["OpenVision3"]
