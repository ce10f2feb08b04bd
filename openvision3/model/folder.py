"""Model folders: `config.json`, `model.safetensors`, `tokenizer.json` and `README.md`.

`config.json` holds `format_version`, the `ModelConfig` under "model", and under "vae" the architecture of an embedded
tiny VAE, whose weights lie in `model.safetensors` under the prefix `vae.`. Other autoencoders are named, not packed. A
model with a fast front is saved with the VAE behind it.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from openvision3.config import ModelConfig, OpenVisionError, TinyVAEConfig, from_dict, to_dict
from openvision3.model.openvision3 import OpenVision3
from openvision3.vae import FrozenVAE, TinyVAE, load_vae
from openvision3.vae_distilled import DistilledVAE

FORMAT_VERSION = 1
CONFIG, WEIGHTS, TOKENIZER, CARD = "config.json", "model.safetensors", "tokenizer.json", "README.md"

_VAE_PREFIX = "vae."
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npz", ".msgpack")
_MAX_CONFIG_BYTES = 1_000_000


def save_folder(
    model: OpenVision3, folder: Path, *, overwrite: bool, model_card: str, dtype: torch.dtype | None, pack_vae: bool
) -> None:
    """Writes a model folder, each file whole or not at all, and `config.json` last: without it there is no model.

    `dtype`: of the weights on disk (None: as they are). The tiny VAE's weights are kept in fp16 where that loses
    nothing; without `pack_vae` it is only named in the config. Raises `OpenVisionError` for a folder that holds
    something, unless `overwrite` and it holds a model.
    """
    _check_free(folder, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)

    tensors = {name: _stored(name, tensor, dtype) for name, tensor in own_state(model).items()}
    description: dict[str, Any] = {"format_version": FORMAT_VERSION, "model": to_dict(model.config)}
    vae = model.vae.original if isinstance(model.vae, DistilledVAE) else model.vae
    if isinstance(vae, TinyVAE) and pack_vae:
        description["model"]["vae"] = to_dict(vae.config)
        description["vae"] = to_dict(vae.architecture)
        tensors |= {_VAE_PREFIX + name: _compact(tensor) for name, tensor in vae.state_dict().items()}
    _replace(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    if model.tokenizer is not None:
        model.tokenizer.save(folder / TOKENIZER)
    else:
        (folder / TOKENIZER).unlink(missing_ok=True)
    card = model_card or f"# {model.config.name}\n\nAn OpenVision 3 model; load it with `openvision3.load(folder)`.\n"
    _replace(folder / CARD, lambda path: path.write_text(card, encoding="utf-8"))
    _replace(folder / CONFIG, lambda path: path.write_text(json.dumps(description, indent=2) + "\n"))


def load_folder(
    folder: Path, vae: FrozenVAE | Literal["auto"] | None, device: torch.device | str, dtype: torch.dtype | None
) -> OpenVision3:
    """Reads a model folder, in eval mode. Weights become `dtype` (None: fp32).

    vae "auto": the one inside the folder, else the one that the config names; None: no VAE. Raises `OpenVisionError`
    with one line for whatever is missing, is of the wrong shape, or is a pickle (which `ov3 convert` turns into
    safetensors).
    """
    config, architecture = read_description(folder)
    dtype = dtype or torch.float32
    with torch.device("meta"):
        model = OpenVision3(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    inside = TinyVAE(config.vae, architecture) if architecture is not None and config.input == "latents" else None
    if inside is not None:
        expected |= {_VAE_PREFIX + name: tuple(tensor.shape) for name, tensor in inside.state_dict().items()}
    tensors = read_tensors(folder / WEIGHTS, expected, dtype, str(device))
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(_VAE_PREFIX)}
    model.load_state_dict(own, assign=True)

    if vae == "auto" and config.input == "latents":
        if inside is not None:
            inside.load_state_dict(
                {name.removeprefix(_VAE_PREFIX): t for name, t in tensors.items() if name not in own}
            )
            inside.to(device=device, dtype=dtype)
            inside.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            vae = inside.freeze()
        else:
            vae = load_vae(config.vae, device, dtype)
    if isinstance(vae, FrozenVAE):
        model.attach_vae(vae)
    if (folder / TOKENIZER).exists():
        from openvision3.data.tokenizer import CaptionTokenizer  # tokenizers need not be imported for vision alone

        model.attach_tokenizer(CaptionTokenizer.load(folder / TOKENIZER))
    return model.eval()


def own_state(model: OpenVision3) -> dict[str, Tensor]:
    """The model's parameters and buffers without its VAE's."""
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(_VAE_PREFIX)}


def read_description(folder: Path) -> tuple[ModelConfig, TinyVAEConfig | None]:
    """`config.json` of a model folder: the model, and the tiny VAE's architecture where it is inside."""
    path = folder / CONFIG
    if not folder.is_dir():
        raise OpenVisionError(f"{folder} is not a folder")
    if not path.is_file():
        raise OpenVisionError(f"{folder} has no {CONFIG}: it is not a model folder")
    data = read_json(path)
    version = data.get("format_version")
    if not isinstance(version, int):
        raise OpenVisionError(f"{path} has no format_version: it is not an OpenVision 3 model's config")
    if version != FORMAT_VERSION:
        raise OpenVisionError(
            f"{path} has format_version {version}, this version of openvision3 reads {FORMAT_VERSION}"
        )
    config = from_dict(ModelConfig, data.get("model"), f"{path}: model")
    architecture = data.get("vae")
    return config, None if architecture is None else from_dict(TinyVAEConfig, architecture, f"{path}: vae")


def read_json(path: Path) -> dict[str, Any]:
    """A table of fields from a model's JSON file; raises `OpenVisionError` for anything else, and for a huge file."""
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise OpenVisionError(f"{path} is larger than {_MAX_CONFIG_BYTES} bytes: it is not a model's config")
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise OpenVisionError(f"{path} is not valid JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(data, dict):
        raise OpenVisionError(f"{path} holds {type(data).__name__}, expected a table of fields")
    return data


def read_tensors(
    path: Path, expected: dict[str, tuple[int, ...]], dtype: torch.dtype, device: str = "cpu"
) -> dict[str, Tensor]:
    """Tensors of a safetensors file that must have exactly these names and shapes; checked before any is read."""
    if not path.is_file():
        pickles = sorted(p.name for p in path.parent.iterdir() if p.suffix in _PICKLES) if path.parent.is_dir() else []
        if pickles:
            raise OpenVisionError(
                f"{path.parent} has {pickles[0]} in place of {path.name}: pickles can run code and are refused; "
                "turn it into safetensors with `ov3 convert`"
            )
        raise OpenVisionError(f"{path} is missing: the model folder has no weights")
    try:
        with safe_open(path, framework="pt", device=device) as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            _check_shapes(path, found, expected)
            tensors = {name: file.get_tensor(name) for name in expected}
    except (SafetensorError, OSError) as error:
        if is_pickle(path):
            raise OpenVisionError(
                f"{path} is a pickle, not safetensors: pickles can run code and are refused; "
                "turn it into safetensors with `ov3 convert`"
            ) from None
        raise OpenVisionError(f"{path} is not a readable safetensors file: {error}") from None
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise OpenVisionError(f"{path}: {name} holds {tensor.dtype}, not floating-point numbers")
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def is_pickle(path: Path) -> bool:
    """Whether a file starts like a pickle or like a zip archive as `torch.save` writes it."""
    with path.open("rb") as file:
        start = file.read(9)
    is_safetensors = start[8:] == b"{"  # after the length of its header
    return start[:2] == b"PK" or (start[:1] == b"\x80" and not is_safetensors)


def _check_free(folder: Path, overwrite: bool) -> None:
    """Refuses a folder that holds anything but a broken-off save, unless it is a model to be overwritten."""
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir() if path.suffix != ".tmp"} if folder.is_dir() else {""}
    if names and not overwrite:
        raise OpenVisionError(f"{folder} exists already; choose another folder or pass overwrite")
    if names and not _is_model(folder) and not names <= {WEIGHTS, TOKENIZER, CARD}:
        raise OpenVisionError(f"{folder} holds something that is no model; choose another folder")


def _is_model(folder: Path) -> bool:
    try:
        read_description(folder)
    except (OpenVisionError, OSError):
        return False
    return True


def _check_shapes(path: Path, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    if missing := sorted(expected.keys() - found.keys()):
        raise OpenVisionError(f"{path} lacks {missing[0]}" + _more(missing))
    if surplus := sorted(found.keys() - expected.keys()):
        raise OpenVisionError(f"{path} holds {surplus[0]}{_more(surplus)}, which the config does not describe")
    for name, shape in expected.items():
        if found[name] != shape:
            raise OpenVisionError(f"{path}: {name} has shape {found[name]}, the config needs {shape}")


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _stored(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor ready for disk: on the CPU, contiguous, in `dtype` (scalars stay as they are: nothing is gained)."""
    tensor = tensor.detach().cpu()
    if dtype is not None and tensor.ndim:
        if not torch.isfinite(cast := tensor.to(dtype)).all() and torch.isfinite(tensor).all():
            raise OpenVisionError(f"{name} holds values that {dtype} cannot; save it in another dtype")
        tensor = cast
    return tensor.contiguous().clone()


def _compact(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu().contiguous()
    half = tensor.half()
    return half if torch.equal(half.to(tensor.dtype), tensor) else tensor


def _replace(path: Path, write: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    temporary.replace(path)
