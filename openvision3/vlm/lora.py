"""Low-rank updates of a LLaVA's language model, and the small file that holds them with the projector."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openvision3.config import OpenVisionError, from_dict, to_dict
from openvision3.files import save_tensors, whole_file
from openvision3.vlm.config import LoRAConfig, VLMTrainConfig
from openvision3.vlm.folder import VLM

WEIGHTS, DESCRIPTION = "adapter.safetensors", "adapter.json"
_WITH = ("model.multi_modal_projector.", "model.image_newline")  # what learns beside the updates


class Adapter:
    """peft's LoRA on linear layers of the language model's blocks, in place; the output matrix stays."""

    def __init__(self, model: Any, config: LoRAConfig):
        try:
            from peft import LoraConfig, LoraModel
        except ImportError:
            raise OpenVisionError("LoRA needs peft: pip install 'openvision3[vlm]'") from None
        self.model, self.config = model, config
        settings = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]
            lora_dropout=config.dropout,
            target_modules=list(config.layers),
        )
        self.tuner: Any = LoraModel(model.model.language_model, {"default": settings}, "default")

    def merge(self) -> None:
        """Adds the updates to the weights: the model is a plain LLaVA again."""
        self.model.model.language_model = self.tuner.merge_and_unload()

    def tensors(self) -> dict[str, Tensor]:
        """The updates, the projector and LLaVA-NeXT's end of a row, under the model's names."""
        return {
            name: weight.detach()
            for name, weight in self.model.named_parameters()
            if "lora_" in name or name.startswith(_WITH)
        }

    def save(self, folder: Path, config: VLMTrainConfig) -> None:
        """Writes fp16 weights and what they belong to; folders by their absolute paths."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.half().cpu().contiguous() for name, tensor in self.tensors().items()}
        save_tensors(folder / WEIGHTS, tensors, {})
        described = {
            "tower": _absolute(config.tower),
            "language_model": _absolute(config.language_model),
            "kind": config.kind,
            "tiles": config.tiles,
            "resolution": config.resolution,
            "lora": to_dict(self.config),
        }
        with whole_file(folder / DESCRIPTION) as path:
            path.write_text(json.dumps(described, indent=2) + "\n")


def _absolute(name: str) -> str:
    """A folder's absolute path; other names as they are."""
    return str(Path(name).expanduser().resolve()) if Path(name).expanduser().is_dir() else name


def load_adapter(folder: Path) -> VLM:
    """The VLM that an adapter's folder describes: tower and language model are opened, the updates merged in.

    Raises `OpenVisionError` for a folder that holds none, or whose weights do not fit.
    """
    from openvision3.vlm.assemble import assemble, open_tower
    from openvision3.vlm.language_model import open_language_model

    try:
        described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        tower, language_model = str(described["tower"]), str(described["language_model"])
        kind, tiles = str(described["kind"]), tuple((int(rows), int(columns)) for rows, columns in described["tiles"])
        resolution, lora = int(described["resolution"]), from_dict(LoRAConfig, described["lora"], "lora")
    except (OSError, ValueError, KeyError, TypeError):
        raise OpenVisionError(f"{folder} holds no adapter of a VLM") from None
    vlm = assemble(open_tower(tower, resolution), *open_language_model(language_model, torch.float32), kind, tiles)
    adapter = Adapter(vlm.model, lora)
    _load_tensors(adapter, folder / WEIGHTS)
    adapter.merge()
    return vlm


def _load_tensors(adapter: Adapter, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise OpenVisionError(f"can't read {path}: {error}") from None
    places = adapter.tensors()
    if {name: t.shape for name, t in found.items()} != {name: t.shape for name, t in places.items()}:
        raise OpenVisionError(f"{path} does not fit the language model that it names")
    for name, place in places.items():
        place.copy_(found[name])
