"""Fills a cache of latents (see `latent_cache.py`): any number of processes at once, each at any moment killed."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from openvision3.config import OpenVisionError, differences, to_dict
from openvision3.data.batches import begin_worker
from openvision3.data.latent_cache import (
    CACHE,
    FINGERPRINT,
    SCENES,
    Caching,
    load_caching,
    shard_path,
    shards_there,
)
from openvision3.data.samples import BadSample
from openvision3.data.shards import DemoSource, TarSource
from openvision3.data.transforms import Box
from openvision3.files import whole_file

POLL = 0.5  # seconds
Encode = Callable[[Tensor], Tensor]  # uint8 (B, 3, R, R) to scaled latents (B, C, h, w)
Told = Callable[[int, list[str]], None]  # samples more that are done, and a line for each of them that can't be used


def begin_cache(folder: Path, caching: Caching) -> None:
    """Makes the folder, or enters it again.

    Raises `OpenVisionError` for a folder that holds something else, or latents of other crops.
    """
    if folder.exists() and not folder.is_dir():
        raise OpenVisionError(f"{folder} is no folder; choose another --out")
    # listed first: another process may begin meanwhile
    others = folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir())
    if others and not (folder / CACHE).exists():
        raise OpenVisionError(f"{folder} holds something that is no cache of latents; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock-begin"):
        if not (folder / CACHE).exists():
            with whole_file(folder / CACHE) as temporary:
                temporary.write_text(json.dumps(to_dict(caching), indent=2) + "\n")
        changes = differences(load_caching(folder), caching)
        told = [f"{name} {old!r}, not {new!r}" for name, old, new, _ in changes if name != "vae_name"]
        if told:
            raise OpenVisionError(f"{folder} holds latents with {', '.join(told)}; choose another --out")


def fill_cache(
    folder: Path, caching: Caching, source: DemoSource | TarSource, encode: Encode, batch_size: int, workers: int,
    told: Told
) -> None:  # fmt: skip
    """Writes the shards that are missing, and returns when all are there, whichever process wrote them.

    A shard is one process's while it holds the shard's lock, which ends with the process. `batch_size` is in crops;
    `workers` processes read and crop pictures. An exception of `told` stops the filling, and loses no shard that is
    done.
    """
    waiting = sorted(set(range(caching.shards)) - shards_there(folder))
    while waiting:
        busy: list[int] = []
        for number in waiting:
            path, lock = shard_path(folder, number), folder / f".lock-{number:06d}"
            if path.exists():
                continue
            try:
                with FileLock(lock, timeout=0):
                    if not path.exists():
                        for leftover in folder.glob(f".{path.stem}.*.tmp.*"):  # of a process that was killed
                            leftover.unlink(missing_ok=True)
                        _fill_shard(path, caching, source, number, encode, batch_size, workers, told)
                    lock.unlink(missing_ok=True)  # whoever holds a lock file that is gone finds the shard written
            except Timeout:
                busy.append(number)
        if len(busy) == len(waiting):
            time.sleep(POLL)
        waiting = busy


def _fill_shard(
    path: Path, caching: Caching, source: DemoSource | TarSource, number: int, encode: Encode, batch_size: int,
    workers: int, told: Told
) -> None:  # fmt: skip
    crops = _Crops(source, caching, number, max(1, batch_size // caching.views))
    fingerprint = "0" if isinstance(source, DemoSource) else str(source.fingerprint(number))
    with whole_file(path) as temporary, _Writer(temporary, caching, crops.count, {FINGERPRINT: fingerprint}) as writer:
        loader = DataLoader(
            crops,
            batch_size=None,
            num_workers=min(workers, len(crops)),
            worker_init_fn=begin_worker,
            generator=torch.Generator(),
        )
        for views in loader:
            latents = encode(views.crops).to("cpu", torch.bfloat16)
            if not bool(latents.isfinite().all()):
                raise OpenVisionError(f"{path}: latents are not finite; another --dtype may help, or another VAE")
            writer.add(latents.unflatten(0, (-1, caching.views)), views.boxes, views.valid)
            told(len(views.valid), views.failures)


class Views(NamedTuple):
    """All views of consecutive samples of a shard."""

    crops: Tensor  # uint8 (n * K, 3, R, R); black where the picture can't be used
    boxes: Tensor  # int32 (n, K, 4)
    valid: Tensor  # bool (n,)
    failures: list[str]


class _Crops(Dataset[Views]):
    """Item i: the views of the i-th `together` samples of a shard."""

    def __init__(self, source: DemoSource | TarSource, caching: Caching, shard: int, together: int) -> None:
        self.source, self.caching, self.shard, self.together = source, caching, shard, together
        if isinstance(source, DemoSource):
            self.count = min(SCENES, caching.samples - shard * SCENES)
        else:
            self.count = len(source.library.index(shard))

    def __len__(self) -> int:
        return -(-self.count // self.together)

    def __getitem__(self, index: int) -> Views:
        numbers = range(index * self.together, min((index + 1) * self.together, self.count))
        side, views = self.caching.resolution, self.caching.views
        crops = np.zeros((len(numbers), views, side, side, 3), np.uint8)
        boxes, valid = np.zeros((len(numbers), views, 4), np.int32), np.ones(len(numbers), bool)
        failures: list[str] = []
        if isinstance(self.source, TarSource):
            self.source.prepare_members([(self.shard, number, "picture") for number in numbers])
        for row, number in enumerate(numbers):
            try:
                crops[row], boxes[row] = self._views(number)
            except BadSample as error:
                valid[row] = False
                failures.append(str(error))
        pixels = torch.from_numpy(crops).flatten(0, 1).permute(0, 3, 1, 2).contiguous()
        return Views(pixels, torch.from_numpy(boxes), torch.from_numpy(valid), failures)

    def _views(self, number: int) -> tuple[list[np.ndarray], list[Box]]:
        """A picture's crops and their boxes. Raises `BadSample`."""
        if isinstance(self.source, TarSource):
            sample = self.source.read_picture(self.shard, number)
        else:
            sample = self.source.read(self.caching.first_scene + self.shard * SCENES + number)
        chosen: list[Box] = []

        def boxes(width: int, height: int) -> list[Box]:
            for view in range(self.caching.views):
                chosen.append(self.caching.box(sample.shard, sample.number, view, (width, height)))
            return chosen

        return sample.crops(self.caching.resolution, boxes, self.caching.fast_decode), chosen


class _Writer:
    """Writes a shard as safetensors, rows as they come: it is never whole in memory."""

    def __init__(self, path: Path, caching: Caching, count: int, metadata: dict[str, str]) -> None:
        shapes = {
            "latents": ("BF16", 2, (count, caching.views, *caching.latent_shape)),
            "boxes": ("I32", 4, (count, caching.views, 4)),
            "valid": ("BOOL", 1, (count,)),
        }
        header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
        places: dict[str, tuple[int, int]] = {}
        end = 0
        for name, (kind, itemsize, shape) in shapes.items():
            begin, end = end, end + itemsize * int(np.prod(shape))
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": (begin, end)}
            places[name] = begin, end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            start = file.tell()
            file.truncate(start + end)
        self.file = path.open("r+b")
        self.starts = {name: start + begin for name, (begin, _) in places.items()}

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def add(self, latents: Tensor, boxes: Tensor, valid: Tensor) -> None:
        """Appends rows: latents (n, K, C, h, w) bf16, boxes (n, K, 4) int32, valid (n,) bool."""
        for name, tensor in (("latents", latents.view(torch.int16)), ("boxes", boxes), ("valid", valid)):
            data = tensor.contiguous().numpy().tobytes()
            self.file.seek(self.starts[name])
            self.file.write(data)
            self.starts[name] += len(data)
