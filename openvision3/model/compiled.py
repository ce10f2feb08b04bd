"""The encoder compiled for inference."""

from typing import Any

import torch

from openvision3.config import OpenVisionError
from openvision3.model.encoder import VisionEncoder
from openvision3.model.openvision3 import OpenVision3


def compile_encoder(model: OpenVision3) -> None:
    """Compiles the encoder in place by `torch.compile`; on CUDA with its CUDA graphs, one for each shape.

    On the CPU block by block, so that one short compilation serves all. The first batch of each shape takes a minute or
    so: for many pictures of one size, in batches of one size. Raises `OpenVisionError` for another library's encoder.
    """
    encoder: Any = model.encoder
    if not isinstance(encoder, VisionEncoder):
        raise OpenVisionError(f"model {model.config.name!r} reads another library's encoder: it is not compiled")
    if model.device.type == "cuda":
        encoder.forward = torch.compile(encoder.forward, mode="reduce-overhead", dynamic=False)
        return
    for block in encoder.transformer.blocks:
        block.forward = torch.compile(block.forward, dynamic=False)  # type: ignore[method-assign]
