"""Tokens of many pictures as a folder of safetensors shards, which several processes fill and which survives kills.

    FOLDER/encoding.json                    what all shards share: fingerprint of the model, preparation, dtype
    FOLDER/tokens-RRRR-NNNNNN.safetensors   shard N of process R, written whole; its header lists the pictures' keys
                                            and their files' lengths
    FOLDER/index.json                       {"shards": [name, ...], "pictures": {key: [shard, row, bytes]}}

A shard holds `tokens` (n, N, D), or (sum of N, D) where pictures keep their sizes, those of row i being
`offsets[i]:offsets[i + 1]`; `embedding` (n, E), pooled, projected and L2-normalised, fp32; `grid` (n, 2), rows and
columns of tokens; `size` (n, 2), height and width of the picture before it was padded. The shards are what counts: the
index is merged from their headers by whoever reads, and only saves opening them.
"""

import fcntl
import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from openvision3.config import OpenVisionError, differences, load_json, to_dict
from openvision3.files import save_tensors, whole_file

ENCODING, INDEX = "encoding.json", "index.json"
_SHARD = re.compile(r"tokens-(\d{4,})-(\d{6,})\.safetensors")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Encoding:
    """What all pictures of a folder of shards have in common."""

    fingerprint: str  # of the model: see model/fingerprint.py
    width: int  # D
    embed_dim: int  # E
    pixels_per_token: int  # each side
    size: int | None  # side of the square that each picture is resized and cropped to, pixels; None: it keeps its size
    max_side: int | None  # longest side of pictures that keep their size, pixels
    dtype: Literal["fp32", "bf16"]  # of the tokens


class Encoded(NamedTuple):
    """One picture's row."""

    tokens: Tensor  # (h * w, D)
    embedding: Tensor  # (E,)
    grid: tuple[int, int]  # h, w
    size: tuple[int, int]  # height and width in pixels before padding: what to crop a decoded picture to


class Place(NamedTuple):
    """Where a picture's row is, and what it was made of."""

    shard: str
    row: int
    file_bytes: int  # length of the picture's file when it was encoded


class TokenFolder:
    """Reads a folder of shards: a mapping from keys to `Encoded`, of what is there when it is opened.

    Raises `OpenVisionError` where it is none, or a shard is broken.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.encoding = load_json(Encoding, self.folder / ENCODING)
        self.pictures = read_index(self.folder)

    def __len__(self) -> int:
        return len(self.pictures)

    def __iter__(self) -> Iterator[str]:
        return iter(self.pictures)

    def __contains__(self, key: object) -> bool:
        return key in self.pictures

    def __getitem__(self, key: str) -> Encoded:
        shard, row, _ = self.pictures[key]
        try:
            with safe_open(self.folder / shard, "pt") as file:
                tokens = file.get_slice("tokens")
                if self.encoding.size is None:
                    start, stop = file.get_slice("offsets")[row : row + 2].tolist()
                    of_picture = tokens[start:stop]
                else:
                    of_picture = tokens[row : row + 1][0]
                grid, size = (tuple(file.get_slice(name)[row : row + 1][0].tolist()) for name in ("grid", "size"))
                return Encoded(of_picture, file.get_slice("embedding")[row : row + 1][0], grid, size)
        except (SafetensorError, OSError) as error:
            raise _broken(self.folder / shard, error) from None


@contextmanager
def open_for_writing(folder: Path, encoding: Encoding, rank: int, world: int) -> Iterator[None]:
    """Makes the folder, or enters it again, as process `rank`, and holds it against another process of that rank.

    Removes what a killed process of this rank left half written. Raises `OpenVisionError` for a folder that holds
    something else or another encoding, or that is in use.
    """
    if folder.exists() and not folder.is_dir():
        raise OpenVisionError(f"{folder} is no folder of tokens; choose another --out")
    # listed first: another process may begin meanwhile
    others = folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir())
    if others and not (folder / ENCODING).exists():
        raise OpenVisionError(f"{folder} holds something that is no folder of tokens; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".lock-{rank}").open("a") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise OpenVisionError(f"{folder} is in use by another process (of rank {rank})") from None
        for leftover in folder.glob(".*.tmp.*" if world == 1 else f".tokens-{rank:04d}-*.tmp.*"):
            leftover.unlink(missing_ok=True)
        if not set(_read_index_file(folder)[0]) <= set(_names(folder)):
            (folder / INDEX).unlink(missing_ok=True)  # of a shard that was taken away: its name will come again
        if not (folder / ENCODING).exists() or not _names(folder):
            _write_json(folder / ENCODING, to_dict(encoding))
        changes = [f"{name} {old!r}, not {new!r}" for name, old, new, _ in differences(_described(folder), encoding)]
        if changes:
            raise OpenVisionError(f"{folder} holds tokens with {', '.join(changes)}; choose another --out")
        yield


def _described(folder: Path) -> Encoding:
    return load_json(Encoding, folder / ENCODING)


class ShardWriter:
    """Collects encoded pictures and writes them as shards of at most `shard_bytes` of tensors (or of one picture).

    A shard is also written when its first picture has waited for `shard_seconds`, so that a kill costs no more work.
    """

    def __init__(self, folder: Path, encoding: Encoding, rank: int, shard_bytes: int, shard_seconds: float) -> None:
        self.folder, self.encoding, self.rank = folder, encoding, rank
        self.shard_bytes, self.shard_seconds = shard_bytes, shard_seconds
        own = [int(match[2]) for match in map(_SHARD.fullmatch, _names(folder)) if match and int(match[1]) == rank]
        self._number = max(own, default=-1) + 1
        self._waiting: dict[str, Encoded] = {}
        self._file_bytes: list[int] = []  # of those that wait
        self._bytes, self._since = 0, 0.0

    def add(
        self,
        keys: Sequence[str],
        tokens: Tensor,
        embeddings: Tensor,
        grid: tuple[int, int],
        sizes: Sequence[tuple[int, int]],
        file_bytes: Sequence[int],
    ) -> None:
        """Takes a batch: tokens (B, N, D), embeddings (B, E), on any device, in any dtype; lengths of their files."""
        tokens = tokens.to("cpu", _DTYPES[self.encoding.dtype])
        embeddings = embeddings.to("cpu", torch.float32)
        of_one = tokens[0].nbytes + embeddings[0].nbytes
        for i, key in enumerate(keys):
            if self._waiting and self._bytes + of_one > self.shard_bytes:
                self.flush()
            if not self._waiting:
                self._since = time.monotonic()
            self._waiting[key] = Encoded(tokens[i], embeddings[i], grid, sizes[i])
            self._file_bytes.append(file_bytes[i])
            self._bytes += of_one
        if time.monotonic() - self._since > self.shard_seconds:
            self.flush()

    def flush(self) -> None:
        """Writes what waits as a shard, where anything does."""
        if not self._waiting:
            return
        rows = list(self._waiting.values())
        tensors = {
            "embedding": torch.stack([row.embedding for row in rows]),
            "grid": torch.tensor([row.grid for row in rows]),
            "size": torch.tensor([row.size for row in rows]),
        }
        if self.encoding.size is None:
            counts = torch.tensor([0, *(len(row.tokens) for row in rows)])
            tensors |= {"tokens": torch.cat([row.tokens for row in rows]), "offsets": counts.cumsum(0)}
        else:
            tensors["tokens"] = torch.stack([row.tokens for row in rows])
        with whole_file(self.folder / f"tokens-{self.rank:04d}-{self._number:06d}.safetensors") as temporary:
            lists = {"keys": json.dumps(list(self._waiting)), "file_bytes": json.dumps(self._file_bytes)}
            save_tensors(temporary, tensors, {"format": "pt", **lists})
        self._number += 1
        self._waiting, self._file_bytes, self._bytes = {}, [], 0


def read_index(folder: Path) -> dict[str, Place]:
    """Where each picture is, by its key. From `index.json` as far as it goes, then from shards' headers."""
    names = _names(folder)
    listed, places = _read_index_file(folder)
    if not set(listed) <= set(names):  # a shard was taken away
        listed, places = [], {}
    found = {key: Place(listed[number], row, length) for key, (number, row, length) in places.items()}
    for name in names:
        if name not in listed:
            for row, (key, length) in enumerate(_keys(folder / name)):
                found.setdefault(key, Place(name, row, length))
    return found


def write_index(folder: Path) -> None:
    """Merges `index.json` from all shards that are there; several processes may do so at once.

    What another one finishes meanwhile is merged too: the last to write has seen all shards.
    """
    while True:
        names = _names(folder)
        numbers = {name: number for number, name in enumerate(names)}
        index = read_index(folder)
        places = {key: [numbers[shard], *place] for key, (shard, *place) in index.items() if shard in numbers}
        _write_json(folder / INDEX, {"shards": names, "pictures": places})
        if _names(folder) == names:
            return


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if _SHARD.fullmatch(path.name))


def _read_index_file(folder: Path) -> tuple[list[str], dict[str, tuple[int, int, int]]]:
    """Shards and places of `index.json`; nothing where it is missing or not as `write_index` writes it."""
    try:
        index = json.loads((folder / INDEX).read_text())
        places = {key: (int(number), int(row), int(n)) for key, (number, row, n) in index["pictures"].items()}
        return list(index["shards"]), places
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [], {}


def _keys(shard: Path) -> list[tuple[str, int]]:
    """The pictures' keys and their files' lengths, row by row."""
    try:
        with safe_open(shard, "pt") as file:
            metadata = file.metadata()
        return list(zip(json.loads(metadata["keys"]), json.loads(metadata["file_bytes"]), strict=True))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise _broken(shard, error) from None


def _broken(shard: Path, error: Exception) -> OpenVisionError:
    return OpenVisionError(f"{shard} is not a readable shard of tokens ({error}); remove it and encode again")


def _write_json(path: Path, data: object) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(data) + "\n")
