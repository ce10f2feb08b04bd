"""Embeddings of a folder's pictures in one file beside them, so that no picture is encoded twice.

A picture is known by the sha256 of its content: one that is moved, renamed or copied is not encoded again, one that is
changed is. A file's (size, modification time, inode) as of its last reading saves reading it; a file modified within
two seconds of that is read again, because a later change may have left no trace in them. Each model, and each way of
preparing pictures, has its own file (`fingerprint` in its name).
"""

import hashlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from openvision3.assets import cache_dir
from openvision3.files import save_tensors, whole_file

_SETTLED_NS = 2_000_000_000  # the coarsest modification times of file systems in use are two seconds apart
_SAVE_SECONDS = 30.0  # between saves while pictures are encoded


class Stamp(NamedTuple):
    """What says, without reading it, that a file is the one that was read."""

    size: int
    mtime_ns: int
    inode: int


class Match(NamedTuple):
    """A picture that fits a query: its paths inside the folder (copies of one content), and the cosine."""

    keys: list[str]
    score: float


class EmbeddingCache:
    """The embeddings (fp32, L2-normalised) of a folder's pictures by content, and which file has which content.

    `say` is told, in one line, where the file is when it can't be beside the pictures, or that it can't be written at
    all, or that it is broken.
    """

    def __init__(self, folder: Path, fingerprint: str, embed_dim: int, say: Callable[[str], None]) -> None:
        self.folder, self.fingerprint, self.say = folder, fingerprint, say
        name = f".ov3-search-{fingerprint[:12]}.safetensors"
        place = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
        self.beside, self.elsewhere = folder / name, cache_dir() / "search" / f"{place}{name}"
        self.files: dict[str, tuple[Stamp, str]] = {}  # path inside the folder -> stamp and content
        self.embeddings: dict[str, Tensor] = {}  # content -> (E,)
        self._embed_dim, self._changed = embed_dim, False
        self._save_at, self._told = time.monotonic() + _SAVE_SECONDS, False
        self._read()

    def __len__(self) -> int:
        """Number of files that have an embedding."""
        return sum(content in self.embeddings for _, content in self.files.values())

    def update(self, listed: dict[str, Stamp], progress: Callable[[int], None]) -> dict[str, str]:
        """Takes in what the folder holds now; reads the files whose stamps are new, telling `progress` of each.

        Returns a line for each file that can't be read, by its path inside the folder; it has no content then.
        """
        began = time.time_ns()  # what is modified after it may have been read before
        files = {key: known for key, known in self.files.items() if listed.get(key) == known[0]}
        new = [key for key in listed if key not in files]
        failures: dict[str, str] = {}
        with ThreadPoolExecutor(4) as pool:
            for key, content in zip(new, pool.map(lambda key: _content(self.folder / key), new), strict=True):
                if isinstance(content, OSError):
                    failures[key] = f"can't be read ({content.strerror or content})"
                else:
                    settled = listed[key].mtime_ns < began - _SETTLED_NS
                    files[key] = (listed[key] if settled else Stamp(-1, -1, -1), content)
                progress(1)
        before = self._kept()
        self.files = files
        self._changed |= self._kept() != before  # a broken picture has no place in the file
        return failures

    def missing(self) -> dict[str, list[str]]:
        """Contents without an embedding, and the files that have them."""
        keys: dict[str, list[str]] = defaultdict(list)
        for key, (_, content) in self.files.items():
            if content not in self.embeddings:
                keys[content].append(key)
        return dict(keys)

    def add(self, contents: Iterable[str], embeddings: Tensor) -> None:
        """Takes embeddings (B, E) in fp32 on the CPU; saves now and then."""
        self.embeddings |= dict(zip(contents, embeddings, strict=True))
        self._changed = True
        if time.monotonic() > self._save_at:
            self.save()

    def save(self) -> None:
        """Writes the file where anything changed: beside the pictures, or in the user's cache where that can't be.

        Where neither can be, says so: the embeddings are there for this search alone.
        """
        if not self._changed:
            return
        started = time.monotonic()
        try:
            self._write(self.beside)
        except OSError as error:
            reason = error.strerror or str(error)
            try:
                self._write(self.elsewhere)
                self._tell(f"which can't be written ({reason}), are kept in {self.elsewhere}")
            except OSError as error:
                reason = f"{reason}; {self.elsewhere}: {error.strerror or error}"
                self._tell(f"which can't be written, can't be kept ({reason}): the next search encodes them again")
        self._changed, now = False, time.monotonic()
        # of a large file, at most a twentieth of the time
        self._save_at = now + max(_SAVE_SECONDS, 20 * (now - started))

    def search(self, query: Tensor, count: int) -> list[Match]:
        """The `count` contents in the folder whose embeddings are nearest to `query` (E,), best first."""
        keys: dict[str, list[str]] = defaultdict(list)
        for key, (_, content) in self.files.items():
            if content in self.embeddings:
                keys[content].append(key)
        if not keys:
            return []
        scores = torch.stack([self.embeddings[content] for content in keys]) @ query
        best, order = scores.topk(min(count, len(keys)))
        of_row = list(keys.values())
        return [Match(of_row[row], score) for row, score in zip(order.tolist(), best.tolist(), strict=True)]

    def _kept(self) -> dict[str, tuple[Stamp, str]]:
        return {key: known for key, known in self.files.items() if known[1] in self.embeddings}

    def _write(self, path: Path) -> None:
        kept = self._kept()
        rows = {content: row for row, content in enumerate(dict.fromkeys(content for _, content in kept.values()))}
        stamps = [stamp for stamp, _ in kept.values()]
        tensors = {
            "embeddings": torch.stack([self.embeddings[content] for content in rows])
            if rows
            else torch.zeros(0, self._embed_dim),
            "contents": torch.from_numpy(
                np.frombuffer(bytearray.fromhex("".join(rows)), np.uint8).reshape(-1, 32).copy()
            ),
            "stamps": torch.tensor(stamps, dtype=torch.int64).reshape(-1, 3),
            "rows": torch.tensor([rows[content] for _, content in kept.values()], dtype=torch.int64),
        }
        with whole_file(path) as temporary:
            save_tensors(temporary, tensors, {"fingerprint": self.fingerprint, "files": json.dumps(list(kept))})

    def _read(self) -> None:
        """Reads the newer of the two files, where there is one."""
        there = [path for path in (self.beside, self.elsewhere) if path.is_file()]
        if not there:
            return
        path = max(there, key=lambda path: path.stat().st_mtime_ns)
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                embeddings, contents, stamps, rows = (
                    file.get_tensor(name) for name in ("embeddings", "contents", "stamps", "rows")
                )
            if metadata["fingerprint"] != self.fingerprint or embeddings.shape[1:] != (self._embed_dim,):
                raise ValueError("it is of another model")
            raw = contents.numpy().tobytes().hex()
            known = [raw[i : i + 64] for i in range(0, len(raw), 64)]
            self.embeddings = dict(zip(known, embeddings.unbind(), strict=True))
            self.files = {
                key: (Stamp(*stamp), known[row])
                for key, stamp, row in zip(json.loads(metadata["files"]), stamps.tolist(), rows.tolist(), strict=True)
            }
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, IndexError) as error:
            self.files, self.embeddings = {}, {}
            self.say(f"{path} is broken ({error}): all pictures are encoded again")
            self._changed = True
            return
        if path == self.elsewhere:
            self._tell(f"which can't be written, are kept in {self.elsewhere}")

    def _tell(self, what: str) -> None:
        if not self._told:
            self._told = True
            self.say(f"embeddings of {self.folder}, {what}")


def _content(path: Path) -> str | OSError:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return error
