"""`ov3 convert`: released checkpoints, and model folders whose weights are a pickle, to safe model folders."""

import pickle
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from openvision3.config import OpenVisionError

if TYPE_CHECKING:
    from torch import Tensor

PICKLES = ("*.bin", "*.pt", "*.pth")

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


def convert(
    source: tyro.conf.Positional[str],
    out: Path,
    dtype: Literal["as-is", "fp32", "bf16", "fp16"] = "as-is",
    overwrite: Flag = False,
) -> int:
    """Writes a model folder with weights in safetensors.

    A pickle is read by torch's loader that builds tensors and nothing else; one that holds more is refused.

    Args:
        source: a released checkpoint (folder or hub id), or a model folder, also one whose weights are a pickle.
        out: folder to write.
        dtype: of the weights on disk.
        overwrite: replace the model in `out`.
    """
    import torch

    import openvision3
    from openvision3.hub.released import is_released_folder
    from openvision3.model.folder import CONFIG, TOKENIZER, WEIGHTS

    folder = Path(source)
    with tempfile.TemporaryDirectory(prefix="ov3-convert-") as name:
        weights = pickled_weights(folder, WEIGHTS) if not is_released_folder(folder) else None
        if weights is not None:
            safe = Path(name)
            write_safetensors(read_state(weights), safe / WEIGHTS)
            for extra in (CONFIG, TOKENIZER):
                if (folder / extra).is_file():
                    shutil.copyfile(folder / extra, safe / extra)
            folder = safe
        # its own VAE, where it is inside, goes along; others are named in the config and need not be had
        model = openvision3.load(folder if weights else source, vae=_vae_inside(folder), device="cpu")
        kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        model.save(out, overwrite=overwrite, dtype=kinds.get(dtype))
    print(f"{out}: {', '.join(f'{part} {count:,}' for part, count in model.num_parameters().items())} parameters")
    return 0


def pickled_weights(folder: Path, weights: str) -> Path | None:
    """The file of a model folder's weights where that is a pickle: under the right name, or under a pickle's."""
    from openvision3.model.folder import is_pickle

    if not folder.is_dir():
        return None
    if (folder / weights).is_file():
        return folder / weights if is_pickle(folder / weights) else None
    return next((path for pattern in PICKLES for path in sorted(folder.glob(pattern))), None)


def read_state(path: Path) -> "dict[str, Tensor]":
    """The tensors of a pickled state dict, alone or under "state_dict" or "model".

    Raises `OpenVisionError` for a pickle that asks for anything but tensors and plain containers.
    """
    import torch

    try:
        with path.open("rb") as file:  # by its content: torch chooses the reader of a path by its name
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:120]
        raise OpenVisionError(f"{path} is refused: it is not a plain table of tensors ({reason})") from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise OpenVisionError(f"{path} is refused: it is not a plain table of tensors")
    return state


def write_safetensors(state: "dict[str, Tensor]", path: Path) -> None:
    """Writes tensors (shared memory is copied) as safetensors."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, path)


def _vae_inside(folder: Path) -> Literal["auto"] | None:
    from openvision3.model.folder import CONFIG, read_description

    return "auto" if (folder / CONFIG).is_file() and read_description(folder)[1] is not None else None
