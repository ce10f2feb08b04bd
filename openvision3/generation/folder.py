"""Generator folders: `config.json`, `generator.safetensors` and `README.md`.

`config.json` holds `format_version`, the `GeneratorConfig`, and which frozen model's tokens are made: its name, and
fingerprints, so that another model is never taken for it. `generator.safetensors` holds the DiT's weights (prefix
`dit.`) and the statistics of the tokens (`normalizer.mean`, `normalizer.std`).
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from openvision3.config import OpenVisionError, from_dict
from openvision3.files import save_tensors
from openvision3.generation.config import GeneratorConfig
from openvision3.generation.dit import DiT
from openvision3.generation.space import PictureSpace
from openvision3.generation.statistics import Normalizer
from openvision3.generation.train_config import Space
from openvision3.model.folder import read_json, read_tensors
from openvision3.model.openvision3 import OpenVision3
from openvision3.training.checkpoint import write_folder

FORMAT_VERSION = 1
CONFIG, WEIGHTS, CARD = "config.json", "generator.safetensors", "README.md"
_DIT, _NORMALIZER = "dit.", "normalizer."


@dataclass(frozen=True)
class Description:
    """What a generator folder's `config.json` says."""

    generator: GeneratorConfig
    model: str  # the frozen model: "demo", a folder, a hub id
    space: Space
    resolution: int  # pixels
    space_fingerprint: str  # of what turns pictures into tokens
    text_fingerprint: str = ""  # of the text tower; empty: prompts are not read
    classes: tuple[str, ...] = ()
    steps: int = 50  # of the sampler, unless asked otherwise
    guidance: float = 1.0  # of the sampler, unless asked otherwise; 1: none
    names: tuple[str, ...] = ()  # of the things in the scenes that it was trained on; empty: it was others' pictures
    format_version: int = FORMAT_VERSION


def text_fingerprint(model: OpenVision3) -> str:
    """sha256 (hex) of the text tower's weights and vocabulary; empty for a model without."""
    if model.text_encoder is None:
        return ""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.text_encoder.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_generator(
    folder: Path, dit: DiT, normalizer: Normalizer, description: Description, dtype: torch.dtype | None = None
) -> None:
    """Writes a generator folder whole or not at all, in the place of one of that name; `dtype`: of its weights."""

    def stored(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().cpu()
        return tensor.to(dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype).contiguous()

    tensors = {_DIT + name: stored(tensor) for name, tensor in dit.state_dict().items()}
    tensors |= {_NORMALIZER + name: t.detach().cpu().contiguous() for name, t in normalizer.state_dict().items()}

    def write(path: Path) -> None:
        save_tensors(path / WEIGHTS, tensors, {"format": "pt"})
        (path / CARD).write_text(
            f"# {description.generator.name}\n\nA generator of pictures on the tokens of the OpenVision 3 model "
            f"{description.model!r}; `ov3 generate sample --generator FOLDER` draws from it.\n"
        )
        (path / CONFIG).write_text(json.dumps(asdict(description), indent=2) + "\n")

    write_folder(folder, write)


def read_description(folder: Path) -> Description:
    """A generator folder's `config.json`. Raises `OpenVisionError` for anything else."""
    path = folder / CONFIG
    if not path.is_file():
        raise OpenVisionError(f"{folder} is no generator folder: it has no {CONFIG} (ov3 generate train makes one)")
    data = read_json(path)
    if data.get("format_version") != FORMAT_VERSION or "generator" not in data:
        raise OpenVisionError(
            f"{path} describes no generator that this version of openvision3 reads (format_version {FORMAT_VERSION})"
        )
    return from_dict(Description, data, str(path))


def load_weights(folder: Path, description: Description, space: PictureSpace) -> tuple[DiT, Normalizer]:
    """The DiT, fp32 and in evaluation mode, and the statistics, on the model's device.

    Raises `OpenVisionError` where tensors are missing or of another shape, or the model is not the one trained on.
    """
    config = description.generator
    tokens = space.grid[0] * space.grid[1]
    if (config.token_width, tuple(config.grid)) != (space.width, space.grid):
        raise OpenVisionError(
            f"{folder} makes {config.grid} tokens of {config.token_width}; model {space.model.config.name!r} has "
            f"{space.grid} of {space.width}"
        )
    if description.space_fingerprint != space.fingerprint:
        raise OpenVisionError(
            f"{folder} was trained on other tokens than model {space.model.config.name!r} makes (fingerprint "
            f"{description.space_fingerprint[:12]}, not {space.fingerprint[:12]}); name the right one with --model"
        )
    if description.text_fingerprint not in ("", text_fingerprint(space.model)):
        raise OpenVisionError(f"{folder} was trained with another text encoder than {space.model.config.name!r} has")
    with torch.device("meta"):
        dit = DiT(config)
    normalizer = Normalizer(torch.zeros(tokens, space.width), torch.ones(tokens, space.width))
    expected = {_DIT + name: tuple(tensor.shape) for name, tensor in dit.state_dict().items()}
    expected |= {_NORMALIZER + name: tuple(tensor.shape) for name, tensor in normalizer.state_dict().items()}
    device = space.model.device
    tensors = read_tensors(folder / WEIGHTS, expected, torch.float32, str(device))
    dit.load_state_dict({n.removeprefix(_DIT): t for n, t in tensors.items() if n.startswith(_DIT)}, assign=True)
    normalizer.load_state_dict(
        {n.removeprefix(_NORMALIZER): t for n, t in tensors.items() if n.startswith(_NORMALIZER)}
    )
    return dit.requires_grad_(False).eval(), normalizer.to(device)
