"""A vision-language model's folder: what plain transformers loads, with `import openvision3.hub.hf` before."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import openvision3.hub.hf  # noqa: F401  transformers must know our towers
from openvision3.config import OpenVisionError, to_dict

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parents[1] / "weights" / "demo_vlm"


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
    if name == DEMO or (folder / "adapter.json").is_file():
        from openvision3.vlm.lora import load_adapter

        found = load_adapter(DEMO_FOLDER if name == DEMO else folder)
        return VLM(found.model.to(device, dtype).eval(), found.processor, str(name))
    if not (folder / "config.json").is_file():
        raise OpenVisionError(f"{folder} holds no vision-language model: expected a folder of `ov3 vlm train`")
    try:
        with quiet():
            model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
            processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise OpenVisionError(f"{folder}: {str(error).splitlines()[0]}") from None
    return VLM(model.to(device).eval(), processor, str(name))


def save_vlm(folder: Path, vlm: VLM, config: Any) -> None:
    """Writes a folder, not there yet, that transformers loads; it appears whole or not at all.

    `config`, a dataclass, says how it was trained, in `training.json`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    vlm.model.config.use_cache = True
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        whole = Path(temporary) / "model"
        with quiet():
            vlm.model.save_pretrained(whole)
            vlm.processor.save_pretrained(whole)
        (whole / "training.json").write_text(json.dumps(to_dict(config), indent=2) + "\n", encoding="utf-8")
        for path in whole.iterdir():
            shutil.copymode(whole / "training.json", path)  # safetensors' files may be read by their owner alone
        whole.replace(folder)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' warnings and progress bars."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
