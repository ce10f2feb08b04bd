"""Statistics of a data set's tokens: made by one process or many, a shard at a time, stopped and resumed, merged."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from openvision3 import files
from openvision3.config import OpenVisionError
from openvision3.data.batches import Batch
from openvision3.generation.space import PictureSpace
from openvision3.generation.statistics import TokenStatistics

_RECORD = "openvision3.statistics"  # in the file's header


def add_batch(statistics: TokenStatistics, space: PictureSpace, batch: Batch) -> None:
    """Counts a batch's tokens in; fp32 tokens, float64 sums."""
    device = space.model.device
    latents = None if batch.latents is None else batch.latents.to(device)
    pixels = None if latents is not None else batch.images.to(device)
    statistics.update(space.encode(pixels, latents).cpu())


def gather(space: PictureSpace, batches: Iterable[Batch]) -> TokenStatistics:
    """The statistics of all batches."""
    statistics = TokenStatistics()
    for batch in batches:
        add_batch(statistics, space, batch)
    return statistics


def save_statistics(path: Path, statistics: TokenStatistics, record: dict[str, object]) -> None:
    """Writes statistics with a record of what they are of, whole or not at all."""
    tensors = {name: tensor.contiguous() for name, tensor in statistics.state().items()}
    with files.whole_file(path) as temporary:
        files.save_tensors(temporary, tensors, {_RECORD: json.dumps(record)})


def load_statistics(path: Path) -> tuple[TokenStatistics, dict[str, object]]:
    """What `save_statistics` wrote. Raises `OpenVisionError` for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {}).get(_RECORD, "null"))
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if not isinstance(record, dict):
            raise ValueError("it has no record of statistics")
        return TokenStatistics.from_state(tensors), record
    except FileNotFoundError:
        raise OpenVisionError(f"{path} does not exist; `ov3 generate stats` makes it") from None
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise OpenVisionError(f"{path} holds no token statistics: {' '.join(str(error).split())[:200]}") from None


def merged(parts: Sequence[TokenStatistics]) -> TokenStatistics:
    """All parts' statistics together."""
    total = TokenStatistics.from_state({name: tensor.clone() for name, tensor in parts[0].state().items()})
    for part in parts[1:]:
        total.merge(part)
    return total


def check_fits(path: Path, record: dict[str, object], space: PictureSpace) -> None:
    """Raises `OpenVisionError` where statistics are of another space than the generator's."""
    wanted = {"space": space.kind, "resolution": space.resolution, "fingerprint": space.fingerprint}
    for name, value in wanted.items():
        if record.get(name) != value:
            raise OpenVisionError(f"{path} holds statistics with {name} {record.get(name)!r}, expected {value!r}")


def describe(space: PictureSpace, **more: object) -> dict[str, object]:
    """The record of statistics in `space`."""
    return {"space": space.kind, "resolution": space.resolution, "fingerprint": space.fingerprint, **more}


def enough(statistics: TokenStatistics, where: str) -> None:
    """Raises `OpenVisionError` for statistics without spread."""
    if int(statistics.count) < 2 or not bool(torch.isfinite(statistics.std).all()):
        raise OpenVisionError(f"{where} has statistics of {int(statistics.count)} samples: at least 2 are needed")
