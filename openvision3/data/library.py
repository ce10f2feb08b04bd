"""The indexes of many shards: taken from beside the tars, from a cache folder, or made by reading the tars.

Nothing here grows with the number of samples: a count is kept for each shard, and the indexes of the shards last used.
A cache folder is shared by all processes of a run, and by its next start: each index is made by one of them while the
others make other ones, and counts are written to one file of 8 bytes a shard.
"""

import contextlib
import hashlib
import logging
import os
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from openvision3.config import OpenVisionError
from openvision3.data.catalogue import CATALOGUE, read_catalogue
from openvision3.data.filters import Filter
from openvision3.data.samples import MAX_MEMBER_BYTES, BadSample, parse_json
from openvision3.data.store import ForwardReader, Location, Store, name_of, sibling
from openvision3.data.tar_index import NotATar, TarIndex, load_index, save_index, scan

log = logging.getLogger(__name__)

LOCKS = 64  # lock files of a cache folder
POLL, LONGEST_POLL = 0.2, 2.0  # seconds


class Library:
    """Indexes and sample counts of shards; with a filter, of the samples that it keeps alone.

    `counts` has the samples of each shard, -1 where they are not yet known. Without a `cache` folder what is found out
    stays in memory; of indexes that can be loaded again, the last `keep` do. An unreadable shard raises
    `OpenVisionError`; with `lenient`, one that is no tar has no samples.
    """

    def __init__(
        self,
        shards: Sequence[Location],
        store: Store,
        condition: Filter | None = None,
        condition_text: str = "",
        cache: Path | None = None,
        keep: int = 128,
        lenient: bool = False,
    ):
        self.shards, self.store, self.keep, self.lenient = shards, store, keep, lenient
        self.condition, self.condition_text = condition, condition_text
        self.cache = cache / _fingerprint(shards, condition_text) if cache else None
        self.broken: dict[int, str] = {}  # shards that are cut short, or no tars, as far as met
        self._stored = self._open_stored()
        self.counts = self._stored[:] - 1
        if condition is None and (self.counts < 0).any():
            self._read_catalogues()
        self._indexes: OrderedDict[int, TarIndex] = OrderedDict()
        self._unindexed: set[int] = set()  # shards without an index beside them, as long as one is waited for
        self._made: dict[int, TarIndex] = {}  # without a cache folder: what could not be loaded again
        self._lock, self._pid = threading.RLock(), os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_indexes": OrderedDict(), "_lock": None, "_stored": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock, self._pid = threading.RLock(), os.getpid()
        self._stored = self._open_stored()

    def count(self, numbers: np.ndarray) -> None:
        """Fills in the counts of these shards, making the indexes that are missing."""
        pause = POLL
        while True:
            self.counts[numbers] = np.maximum(self.counts[numbers], self._stored[numbers] - 1)  # by other processes too
            waiting = [int(number) for number in numbers if self.counts[number] < 0]
            if not waiting:
                return
            if self.cache:  # each process begins elsewhere
                turn = random.Random(f"{os.getpid()} {time.monotonic_ns()}").randrange(len(waiting))
                waiting = waiting[turn:] + waiting[:turn]
            for number in waiting:
                if not self._stored[number]:
                    self._index(number, wait=False)
            if (self.counts[waiting] < 0).all() and not self._stored[waiting].any():
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_POLL)

    def all_counted(self) -> bool:
        """Whether this and the other processes together have counted all shards; then `counts` has them."""
        if self._stored.all():
            self.counts[:] = np.maximum(self.counts, self._stored - 1)
        return bool((self.counts >= 0).all())

    def index(self, number: int) -> TarIndex:
        """The index of a shard. Raises `OpenVisionError` where its samples are not as many as they were counted."""
        index = self._index(number, wait=True)
        assert index is not None
        return index

    def _index(self, number: int, wait: bool) -> TarIndex | None:
        """The index of a shard, or None where another process is making it and `wait` is off."""
        if self._pid != os.getpid():  # forked, perhaps while another thread held the lock
            self._lock, self._pid = threading.RLock(), os.getpid()
        with self._lock:
            if number in self._indexes:
                self._indexes.move_to_end(number)
                return self._indexes[number]
            if number in self._made:
                return self._made[number]
        index = self._load(number, wait)
        if index is None:
            return None
        with self._lock:
            known = int(self.counts[number])
            if 0 <= known != len(index):
                raise OpenVisionError(
                    f"{self.shards[number]}: has {len(index)} samples, but had {known} when it was counted; if it was "
                    f"meant to change, index its folder anew (ov3 data index), and begin a new run"
                )
            self.counts[number], self._stored[number] = len(index), len(index) + 1
            if index.broken and number not in self.broken:
                self.broken[number] = index.broken
                log.warning("%s: %s; its complete samples are used", self.shards[number], index.broken)
            self._indexes[number] = index
            if len(self._indexes) > self.keep:
                self._indexes.popitem(last=False)
        return index

    def _load(self, number: int, wait: bool) -> TarIndex | None:
        shard = self.shards[number]
        if self.cache is None:
            index = load_index(shard, self.store)
            if index is None or self.condition is not None:
                index = self._made[number] = self._filtered(self._scan(number) if index is None else index)
            return index
        place = self.cache / f"{number // 1000:05d}" / f"{number}.idx.json"
        index = load_index(shard, self.store, at=place)
        if index is None and self.condition is None:
            index = self._beside(number)
        if index is not None:
            return index
        try:
            with FileLock(self.cache / "locks" / f"{number % LOCKS}.lock", timeout=-1 if wait else 0):
                index = load_index(shard, self.store, at=place)  # another process may have made it meanwhile
                if index is None:
                    beside = None if self.condition is None else self._beside(number)
                    index = self._filtered(self._scan(number) if beside is None else beside)
                    place.parent.mkdir(exist_ok=True)
                    save_index(index, self.store, to=place)
        except Timeout:
            return None
        self._unindexed.discard(number)
        return index

    def _beside(self, number: int) -> TarIndex | None:
        """The index beside a tar. Where there is none, the store is not asked again while another process makes one."""
        if number in self._unindexed:
            return None
        index = load_index(self.shards[number], self.store)
        if index is None:
            self._unindexed.add(number)
        return index

    def _scan(self, number: int) -> TarIndex:
        shard = self.shards[number]
        try:
            return scan(shard, self.store)
        except NotATar as error:
            if not self.lenient:
                raise
            nothing, reason = np.zeros(0, np.int64), str(error).removeprefix(f"{shard}: ")
            return TarIndex(shard, self.store.size(shard), [], [], nothing, nothing, nothing, f"{reason}: no samples")

    def _filtered(self, index: TarIndex) -> TarIndex:
        """The index with only the samples that the filter keeps; one whose json is broken or missing has no fields."""
        if self.condition is None:
            return index
        reader, kept = ForwardReader(self.store, index.path), []
        with contextlib.closing(reader):
            for number in range(len(index)):
                offset, size = index.entry(number).members.get("json", (0, 0))
                meta: dict[str, Any] = {}
                if 0 < size <= MAX_MEMBER_BYTES["text"]:
                    with contextlib.suppress(BadSample):  # reading the sample will say so, should the filter keep it
                        meta = parse_json("", reader.read(offset, size))
                if self.condition(meta):
                    kept.append(number)
        return index.select(kept)

    def _open_stored(self) -> np.ndarray:
        """One more than each count, so that 0, which is also what a lost page of a file reads as, is an unknown one.

        With a cache folder it is a file that all processes write to.
        """
        size = len(self.shards)
        if self.cache is None:
            return np.zeros(size, np.int64)
        path = self.cache / "counts"
        (self.cache / "locks").mkdir(parents=True, exist_ok=True)
        with FileLock(self.cache / "locks" / "counts.lock"):
            # looked at first: a mapped file that is too short would be made longer
            if not (path.is_file() and path.stat().st_size == 8 * size and (np.fromfile(path, "<i8") >= 0).all()):
                temporary = path.with_name("counts.tmp")
                temporary.write_bytes(bytes(8 * size))
                temporary.replace(path)
            return np.memmap(path, "<i8", "r+")

    def _read_catalogues(self) -> None:
        """Takes counts from the catalogues that `ov3 data index` wrote, where the tars have the sizes of then."""
        catalogues: dict[Location, dict[str, Any]] = {}
        for number, shard in enumerate(self.shards):
            place = sibling(shard, CATALOGUE)
            if place not in catalogues:
                catalogues[place] = read_catalogue(place, self.store)
            known = catalogues[place].get(name_of(shard))
            if known and (not isinstance(shard, Path) or self.store.size(shard) == known[0]):
                self.counts[number] = known[1]


def _fingerprint(shards: Sequence[Location], condition: str) -> str:
    digest = hashlib.sha256(condition.encode())
    for shard in shards:
        digest.update(b"\n" + str(shard).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]
