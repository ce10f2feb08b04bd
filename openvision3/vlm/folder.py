"""A vision-language model's folder: what plain transformers loads, with `import openvision3.hub.hf` before."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import openvision3.hub.hf  # noqa: F401  transformers must know our towers
from openvision3.config import OpenVisionError

DEMO = "demo"


@dataclass
class VLM:
    """A LLaVA of transformers with its processor, whose chat template takes pictures."""

    model: Any  # LlavaForConditionalGeneration or LlavaNextForConditionalGeneration
    processor: Any
    name: str

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer


def load_vlm(name: str = DEMO, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> VLM:
    """Loads a folder of `ov3 vlm train` (or any LLaVA's), or "demo": the embedded projector and adapter.

    The demo's language model is fetched as an asset at the first use. Raises `OpenVisionError` for a folder that is
    none, or broken.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = Path(name).expanduser()
    if name == DEMO:
        raise OpenVisionError("there is no demo VLM yet")
    if not (folder / "config.json").is_file():
        raise OpenVisionError(f"{folder} holds no vision-language model: expected a folder of `ov3 vlm train`")
    try:
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise OpenVisionError(f"{folder}: {str(error).splitlines()[0]}") from None
    return VLM(model.to(device).eval(), processor, str(name))
