"""The order of samples as a pure function of (seed, position): which shard and sample a position holds.

A turn goes once through all samples. Its shards are shuffled and cut into windows of `window` shards; inside a window,
blocks of `block` neighbouring samples are shuffled, so that reads are long where blocks are. With one window and blocks
of 1 every sample is shuffled with every other. All draws come from PCG64's raw stream, which numpy promises to keep.

A position is found from the shards' sample counts alone. While counts are unknown, positions can be told as far as the
windows before them are counted: the order does not depend on when that was.
"""

import bisect
import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

TURN, BLOCKS, MIXTURE = 1, 2, 3  # tags that keep draws for different ends apart


class NoSamples(ValueError):
    """All shards are counted, and there is no sample in them."""


def permutation(size: int, *key: int) -> np.ndarray:
    """A permutation of `size` things, a function of `key`."""
    return np.argsort(np.random.PCG64(list(key)).random_raw(size), kind="stable")


@dataclass(frozen=True)
class Window:
    """The samples of some shards in their order within a turn."""

    turn: int
    number: int
    shards: np.ndarray  # in ascending order
    starts: np.ndarray  # of each block, in places of the window; the last entry is the window's length
    block_shards: np.ndarray
    block_firsts: np.ndarray  # first sample of each block, within its shard

    def __len__(self) -> int:
        return int(self.starts[-1])

    def at(self, place: int) -> tuple[int, int]:
        """Shard, and sample within it, at a place of the window."""
        block = int(np.searchsorted(self.starts, place, side="right")) - 1
        return int(self.block_shards[block]), int(self.block_firsts[block]) + place - int(self.starts[block])


class ShardOrder:
    """Positions of shards whose sample counts are known, or become known window by window.

    `counts` holds the samples of each shard, -1 where they are unknown; `count` is called with the numbers of shards
    whose counts are needed, and fills them in.
    """

    def __init__(self, counts: np.ndarray, count: Callable[[np.ndarray], None], seed: int, window: int, block: int,
                 shuffle: bool):  # fmt: skip
        self.counts, self.count = counts, count
        self.seed, self.shuffle = seed, shuffle
        self.width, self.block = (window, block) if shuffle else (1, 1)
        self.total = int(counts.sum()) if (counts >= 0).all() else None  # samples of a turn; None: not yet known
        self._shards = functools.lru_cache(maxsize=2)(self._turn_shards)
        self._starts = functools.lru_cache(maxsize=2)(self._turn_starts)
        self._windows = functools.lru_cache(maxsize=4)(self._make_window)
        self._reached = [0]  # starts of turn 0's windows, as far as they are counted

    @property
    def num_windows(self) -> int:
        """Windows of a turn."""
        return -(-len(self.counts) // self.width)

    def window_shards(self, turn: int, number: int) -> np.ndarray:
        """The shards of a window, in ascending order: one window of all shards is a shuffle of all samples."""
        return np.sort(self._shards(turn)[number * self.width : (number + 1) * self.width])

    def find(self, position: int) -> tuple[Window, int]:
        """The window of a position and the place in it. Raises `NoSamples` where there is none at all."""
        if self.total is None and not self._reach(position):
            self.total = self._reached[-1]
        if self.total is None:
            turn, number = 0, bisect.bisect_right(self._reached, position) - 1
            return self._windows(turn, number), position - self._reached[number]
        if self.total == 0:
            raise NoSamples("no samples")
        turn, place = divmod(position, self.total)
        starts = self._starts(turn)
        number = int(np.searchsorted(starts, place, side="right")) - 1
        return self._windows(turn, number), place - int(starts[number])

    def count_all(self) -> int:
        """Counts what is not yet counted; returns the samples of a turn."""
        if self.total is None:
            unknown = np.flatnonzero(self.counts < 0)
            if len(unknown):
                self.count(unknown)
            self.total = int(self.counts.sum())
        return self.total

    def _reach(self, position: int) -> bool:
        """Counts windows of turn 0 until one holds the position; False where the turn ends before."""
        while position >= self._reached[-1]:
            number = len(self._reached) - 1
            if number == self.num_windows:
                return False
            shards = self.window_shards(0, number)
            if (self.counts[shards] < 0).any():
                self.count(shards)
            self._reached.append(self._reached[-1] + int(self.counts[shards].sum()))
        return True

    def _turn_shards(self, turn: int) -> np.ndarray:
        size = len(self.counts)
        return permutation(size, self.seed, turn, 0, TURN) if self.shuffle else np.arange(size)

    def _turn_starts(self, turn: int) -> np.ndarray:
        firsts = np.arange(0, len(self.counts), self.width)
        return _starts(np.add.reduceat(self.counts[self._shards(turn)], firsts))

    def _make_window(self, turn: int, number: int) -> Window:
        shards = self.window_shards(turn, number)
        counts = self.counts[shards]
        assert (counts >= 0).all()
        # the blocks begin elsewhere in each turn, so that the same samples do not always come together
        draw = np.random.PCG64([self.seed, turn, number, BLOCKS]).random_raw() if self.block > 1 else 0
        offset = int(draw) % self.block
        firsts = [_block_firsts(int(n), self.block, offset) for n in counts]
        lengths = [np.diff(first, append=n) for first, n in zip(firsts, counts, strict=True)]
        block_shards = np.repeat(shards, [len(first) for first in firsts])
        block_firsts, block_lengths = np.concatenate(firsts), np.concatenate(lengths)
        size = len(block_firsts)
        order = permutation(size, self.seed, turn, number) if self.shuffle else np.arange(size)
        starts = _starts(block_lengths[order])
        return Window(turn, number, shards, starts, block_shards[order], block_firsts[order])

    def __getstate__(self) -> tuple[object, ...]:
        return self.counts, self.count, self.seed, self.width, self.block, self.shuffle

    def __setstate__(self, state: tuple[object, ...]) -> None:
        self.__init__(*state)  # type: ignore[arg-type]


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _block_firsts(size: int, block: int, offset: int) -> np.ndarray:
    """Where the blocks of a shard of `size` samples begin, the second of them at `offset`."""
    firsts = np.arange(offset, size, block)
    return np.concatenate([[0], firsts]) if offset and size else firsts


MIXTURE_BLOCK = 10_000  # positions in which each part of a mixture has its exact share


class MixtureOrder:
    """Which part of a mixture a position belongs to, and its position within that part.

    In every 10,000 positions each part has its share, rounded; each part is gone through in its own order, without
    gaps. Weights need not add up to 1. Raises `ValueError` for one that is not positive, or whose share rounds to 0.
    """

    def __init__(self, weights: tuple[float, ...], seed: int):
        if not weights or not all(0 < weight < float("inf") for weight in weights):
            raise ValueError(f"the weights are {weights}: expected positive numbers")
        exact = np.array(weights) / sum(weights) * MIXTURE_BLOCK
        shares = np.floor(exact).astype(np.int64)
        # largest remainders first, ties in the order given
        missing = np.argsort(-(exact - shares), kind="stable")[: MIXTURE_BLOCK - shares.sum()]
        shares[missing] += 1
        if (shares == 0).any():
            raise ValueError(f"the weights are {weights}: the least is below 1/{MIXTURE_BLOCK} of their sum")
        self.shares, self.seed = shares, seed
        self._slots = np.repeat(np.arange(len(shares)), shares)
        self._block = functools.lru_cache(maxsize=4)(self._make_block)

    def find(self, position: int) -> tuple[int, int]:
        """Number of the part, and position within it."""
        block, place = divmod(position, MIXTURE_BLOCK)
        parts, earlier = self._block(block)
        part = int(parts[place])
        return part, block * int(self.shares[part]) + int(earlier[place])

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        parts = self._slots[permutation(MIXTURE_BLOCK, self.seed, block, 0, MIXTURE)]
        earlier = np.zeros(MIXTURE_BLOCK, np.int64)
        for part, share in enumerate(self.shares):
            earlier[parts == part] = np.arange(share)
        return parts, earlier

    def __getstate__(self) -> tuple[object, ...]:
        return self.shares, self.seed

    def __setstate__(self, state: tuple[object, ...]) -> None:
        shares, seed = state
        self.__init__(tuple(float(share) for share in shares), seed)  # type: ignore[arg-type, union-attr]
