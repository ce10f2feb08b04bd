"""OpenVision 3, open implementation: one visual encoder that both understands and reconstructs pictures.

>>> import openvision3 as ov3
>>> model = ov3.load("demo")
>>> tokens = model.encode(ov3.preprocess(ov3.load_image("picture.jpg"), 128)[None])

Importing this module loads neither torch nor anything else that is large; the names below are imported on first use.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["OpenVision3", "OpenVisionError", "crop_back", "load", "load_image", "preprocess", "__version__"]

if TYPE_CHECKING:
    from openvision3.config import OpenVisionError
    from openvision3.data.transforms import crop_back, load_image, preprocess
    from openvision3.hub.load import load
    from openvision3.model.openvision3 import OpenVision3

_HOMES = {
    "OpenVision3": "openvision3.model.openvision3",
    "OpenVisionError": "openvision3.config",
    "crop_back": "openvision3.data.transforms",
    "load": "openvision3.hub.load",
    "load_image": "openvision3.data.transforms",
    "preprocess": "openvision3.data.transforms",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'openvision3' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
