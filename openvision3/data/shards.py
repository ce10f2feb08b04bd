"""Samples by position: scenes rendered on the fly, tars on disks and stores, mixtures of these.

A tar has members `{key}.webp` (or jpg, png), `{key}.txt` (alt text) and `{key}.json` (with the synthetic caption), the
layout of WebDataset and of Recap-DataComp-1B; `DataConfig` maps other names. Which sample a position holds is a pure
function of (seed, position): see `order.py`. Samples are read by the offsets of an index, which is found beside the
tars, or made: of all tars at once, or, with a cache folder, of a window of shards when the first position in it is
asked for. The order is the same either way.
"""

import contextlib
import functools
import os
import threading
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from openvision3.config import DataConfig, OpenVisionError, SceneConfig
from openvision3.data import demo, grammar
from openvision3.data.filters import parse_filter
from openvision3.data.library import Library
from openvision3.data.order import MixtureOrder, NoSamples, ShardOrder, Window
from openvision3.data.samples import (
    NO_PICTURE,
    BadSample,
    Needed,
    Part,
    Read,
    Sample,
    Source,
    make_sample,
    needed,
    picture_alone,
)
from openvision3.data.store import Location, Store, expand, name_of
from openvision3.data.tar_index import Entry

MAX_STRETCH = 16 * 2**20  # bytes of one planned read
MAX_AHEAD = 256 * 2**20  # bytes that one call of `prepare` plans to read: what is beyond is read when it is asked for
JOIN_GAP = 128 * 2**10  # bytes between two samples that are read over rather than asked for apart
INDEX_AHEAD = 0.5  # of a window: from there on the next one's index is made beside the reading


def open_source(config: DataConfig, split: str, resolution: int, cache: Path | None = None) -> Source:
    """The samples of a split: scenes rendered at `resolution`, or tars as they are, or a mixture.

    Only the split "train" of tars is shuffled, and that only with `config.shuffle`: without, training on tars of scenes
    equals training on the same scenes rendered on the fly. With a `cache` folder, tars are indexed when they are first
    reached, and what is found is kept there.
    """
    if config.mixture:
        if len(config.weights) != len(config.mixture):
            raise OpenVisionError(
                f"data.mixture has {len(config.mixture)} sources and data.weights {len(config.weights)}: expected one "
                "weight for each"
            )
        parts = [replace(config, source=source, mixture=(), weights=()) for source in config.mixture]
        return MixtureSource([open_source(part, split, resolution, cache) for part in parts], config)
    if config.weights:
        raise OpenVisionError(f"data.weights are {config.weights}, but there is no data.mixture")
    if config.source == "demo":
        return DemoSource(config, split, resolution)
    return TarSource(config.source, config, shuffle=config.shuffle and split == "train", cache=cache)


class DemoSource(Source):
    """Scenes rendered on the fly: position i is scene i of the split. Of "scenes-v1", 1,000 fixed ones."""

    def __init__(self, config: DataConfig, split: str, resolution: int):
        benchmark = split == demo.BENCHMARK
        self.scenes = SceneConfig() if benchmark else config.scenes
        self.seed = demo.BENCHMARK_SEED if benchmark else config.seed
        self.size = demo.BENCHMARK_SAMPLES if benchmark else None
        self.split = split
        self.resolution = resolution

    def read(self, position: int) -> Sample:
        """Renders and describes a scene."""
        return self._sample(position, render=True)

    def read_texts(self, position: int) -> Sample:
        """Describes a scene."""
        return self._sample(position, render=False)

    def _sample(self, position: int, render: bool) -> Sample:
        index = position if self.size is None else position % self.size
        scene = demo.scene(self.scenes, self.split, self.seed, index)
        texts = grammar.captions(scene)
        meta = grammar.describe(scene, demo.names(self.scenes.num_names))
        image = demo.render(scene, self.resolution) if render else NO_PICTURE
        return Sample(scene.key, image, texts.alt, texts.caption, meta, number=index)


@dataclass
class _Fetched:
    """A planned read of a stretch of a tar, perhaps still under way."""

    begin: int
    data: "Future[bytes]"
    call: int  # number of the call of `prepare` that began it


class TarSource(Source):
    """Samples of tars: paths, URLs, brace lists ("{000..099}.tar"), globs or folders.

    Each turn goes through all samples once, in an order that is a function of (seed, turn), or in the tars' order with
    `shuffle` off. A tar that was cut short gives its complete samples, and `broken` names it.

    Without a `cache` folder all tars are indexed at once; with one, as they are reached (one that is no tar then has no
    samples). `size` is None until all are counted. Raises `OpenVisionError` where there is no tar or no sample.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        config: DataConfig | None = None,
        shuffle: bool = True,
        cache: Path | None = None,
        lenient: bool | None = None,  # files that are no tars have no samples; None: with a cache folder
    ):
        self.config = config or DataConfig()
        self.paths, self.lazy = paths, cache is not None
        self.store = Store(self.config.store_attempts, self.config.store_timeout)
        self.shards: list[Location] = expand(paths, self.store)
        text = self.config.filter
        condition = parse_filter(text) if text.strip() else None
        window, block = self.config.shuffle_window, self.config.shuffle_block
        if window < 1 or block < 1:
            raise OpenVisionError(f"shuffle_window {window} and shuffle_block {block} must be at least 1")
        keep, lenient = 2 * window if shuffle else 16, self.lazy if lenient is None else lenient
        self.library = Library(self.shards, self.store, condition, text, cache, keep, lenient)
        self.order = ShardOrder(self.library.counts, self.library.count, self.config.seed, window, block, shuffle)
        self._fetched: dict[tuple[int, int, Part], _Fetched] = {}
        self._calls, self._pid = 0, os.getpid()
        self._ahead: set[int] = set()
        if not self.lazy and not len(self):
            raise self._nothing()

    def __getstate__(self) -> dict[str, Any]:
        emptied = {"order": None, "_order": self.order.__getstate__()[2:], "_fetched": {}, "_ahead": set()}
        return {**self.__dict__, **emptied}

    def __setstate__(self, state: dict[str, Any]) -> None:
        seed, window, block, shuffle = state.pop("_order")
        self.__dict__.update(state)
        self.order = ShardOrder(self.library.counts, self.library.count, seed, window, block, shuffle)

    def __len__(self) -> int:
        """Counts all samples, if they are not yet."""
        return self.order.count_all()

    @property
    def size(self) -> int | None:  # type: ignore[override]
        """Samples of a turn; None while they are not all counted, by this and the other processes of the run."""
        if self.order.total is None and self.library.all_counted():
            self.order.count_all()
        return self.order.total

    @property
    def broken(self) -> list[tuple[Location, str]]:
        """Tars that are cut short, as far as they were met, with the reason."""
        return [(self.shards[number], reason) for number, reason in sorted(self.library.broken.items())]

    def read(self, position: int) -> Sample:
        """Reads and decodes a sample. Raises `BadSample` for one that lacks a picture or text, or has a broken one."""
        return _decoded(self.read_encoded(position))

    def read_encoded(self, position: int) -> Sample:
        """Reads a sample. Raises `BadSample` for one that lacks a picture or text, or has a broken text."""
        window, place = self._find(position)
        return self._read(*window.at(place))

    def read_texts(self, position: int) -> Sample:
        """Reads a sample without its picture. Raises `BadSample`."""
        window, place = self._find(position)
        return self._read(*window.at(place), "texts")

    def read_picture(self, shard: int, number: int) -> Sample:
        """Reads a sample of a tar without its texts, its picture still encoded. Raises `BadSample`."""
        return self._read(shard, number, "picture")

    def fingerprint(self, shard: int) -> int:
        """A checksum of the tar's index: of its size, and the keys and places of the samples that the filter keeps."""
        return self.library.index(shard).checksum()

    def substitute(self, position: int, draw: float) -> Sample:
        """Another sample of the same window: its index is at hand, whatever else is known of the tars."""
        window, _ = self._find(position)
        return self._read(*window.at(int(draw * len(window))))

    def read_number(self, number: int) -> Sample:
        """The sample that is `number` in the tars' own order."""
        return _decoded(self._read(*self._numbered(number)))

    def tar_of(self, number: int) -> Location:
        """The tar that holds the sample that is `number` in the tars' own order."""
        return self.shards[self._numbered(number)[0]]

    def prepare(self, positions: list[int], texts_alone: Collection[int] = ()) -> None:
        """Starts to fetch the samples of these positions from a store, neighbours together. Local tars: nothing to do.

        What an earlier call fetched and nobody read is let go of at the second call after it.
        """
        self._here()
        found = [(position, *self._find(position)) for position in positions]
        self.prepare_members(
            [(*window.at(place), "texts" if position in texts_alone else "whole") for position, window, place in found]
        )

    def prepare_members(self, wanted: Sequence[tuple[int, int, Part]]) -> None:
        """`prepare` for parts of samples by their places: (shard, number within it, what is read of it)."""
        self._here()
        self._calls += 1
        room = MAX_AHEAD
        if self._fetched:
            self._fetched = {at: fetched for at, fetched in self._fetched.items() if fetched.call >= self._calls - 1}
        by_shard: dict[int, list[tuple[int, int, tuple[int, Part]]]] = {}  # begin, end, (number, part)
        for shard, number, part in wanted:
            if isinstance(self.shards[shard], Path) or (shard, number, part) in self._fetched:
                continue
            try:
                stretch = needed(self.library.index(shard).entry(number), self.config, part)
            except BadSample:
                continue  # reading it will say so
            if not (stretch.members and stretch.together):
                continue
            room -= stretch.end - stretch.begin
            if room < 0:
                break
            by_shard.setdefault(shard, []).append((stretch.begin, stretch.end, (number, part)))
        for shard, stretches in by_shard.items():
            for begin, end, members in _joined(sorted(stretches)):
                data = self.store.submit(self.shards[shard], begin, end - begin)
                fetched = _Fetched(begin, data, self._calls)
                self._fetched.update({(shard, number, part): fetched for number, part in members})

    def _here(self) -> None:
        """What a process has under way is not its forked child's."""
        if self._pid != os.getpid():
            self._fetched, self._ahead, self._pid = {}, set(), os.getpid()

    def _find(self, position: int) -> tuple[Window, int]:
        try:
            window, place = self.order.find(position)
        except NoSamples:
            raise self._nothing() from None
        if self.lazy and self.order.total is None and place >= INDEX_AHEAD * len(window):
            self._index_ahead(window.number + 1)
        return window, place

    def _index_ahead(self, number: int) -> None:
        if number in self._ahead or number >= self.order.num_windows:
            return
        self._ahead.add(number)
        shards = self.order.window_shards(0, number)
        if (self.library.counts[shards] < 0).any():
            threading.Thread(target=self._count_quietly, args=(shards,), daemon=True).start()

    def _count_quietly(self, shards: np.ndarray) -> None:
        # an error comes up again, and stops the run, when the window is reached
        with contextlib.suppress(OpenVisionError, OSError):
            self.library.count(shards)

    def _read(self, shard: int, number: int, part: Part = "whole") -> Sample:
        entry = self.library.index(shard).entry(number)
        try:
            stretch = needed(entry, self.config, part)
            read = self._reader(shard, number, entry, stretch, part)
            if part == "picture":
                sample = picture_alone(entry, stretch, read)
            else:
                sample = make_sample(entry, stretch, read, self.config)
        except BadSample as error:
            name = f"{name_of(self.shards[shard])}/{error.key}"  # keys repeat from tar to tar
            raise BadSample(name, error.reason) from None
        sample.tar, sample.shard, sample.number = name_of(self.shards[shard]), shard, number
        return sample

    def _reader(self, shard: int, number: int, entry: Entry, stretch: Needed, part: Part) -> Read:
        """How the bytes of a sample are had: out of what was fetched for it, or from its tar."""
        self._here()
        fetched = self._fetched.pop((shard, number, part), None)
        if fetched is None:
            location = self.shards[shard]
            return lambda offset, size: self.store.read(location, offset, size)
        data, begin = fetched.data.result(), fetched.begin
        return lambda offset, size: data[offset - begin : offset - begin + size]

    def _numbered(self, number: int) -> tuple[int, int]:
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, number - int(self._ends[shard] - self.library.counts[shard])

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.library.counts)

    def _nothing(self) -> OpenVisionError:
        kept = f" that {self.config.filter!r} keeps" if self.config.filter else ""
        return OpenVisionError(f"{self.paths}: the tars hold no samples{kept}")


def _decoded(sample: Sample) -> Sample:
    if sample.encoded is not None:
        try:
            sample.image, sample.encoded = sample.encoded.decode(), None
        except OpenVisionError as error:
            raise BadSample(sample.name, str(error)) from None
    return sample


Member = TypeVar("Member")


def _joined(stretches: list[tuple[int, int, Member]]) -> list[tuple[int, int, list[Member]]]:
    """Joins sorted stretches (begin, end, what for) of a tar that lie close to each other."""
    joined: list[tuple[int, int, list[Member]]] = []
    for begin, end, number in stretches:
        if joined and begin <= joined[-1][1] + JOIN_GAP and end - joined[-1][0] <= MAX_STRETCH:
            first, last, numbers = joined[-1]
            joined[-1] = (first, max(last, end), [*numbers, number])
        else:
            joined.append((begin, end, [number]))
    return joined


class MixtureSource(Source):
    """Several sources, each with its share of the positions and gone through in its own order: see `MixtureOrder`."""

    def __init__(self, sources: Sequence[Source], config: DataConfig):
        self.sources = list(sources)
        counts = [len(source.shards) if isinstance(source, TarSource) else 1 for source in self.sources]
        self.firsts = [sum(counts[:part]) for part in range(len(counts))]  # numbers of the parts' first tars
        self.size = None
        try:
            self.order = MixtureOrder(config.weights, config.seed)
        except ValueError as error:
            raise OpenVisionError(f"data.weights: {error}") from None

    def read(self, position: int) -> Sample:
        """The sample of the part that the position belongs to."""
        part, at = self.order.find(position)
        return self._of(part, self.sources[part].read(at))

    def read_encoded(self, position: int) -> Sample:
        """The same, its picture still encoded."""
        part, at = self.order.find(position)
        return self._of(part, self.sources[part].read_encoded(at))

    def read_texts(self, position: int) -> Sample:
        """The texts of the part that the position belongs to."""
        part, at = self.order.find(position)
        return self._of(part, self.sources[part].read_texts(at))

    def substitute(self, position: int, draw: float) -> Sample:
        """A sample of the same part."""
        part, at = self.order.find(position)
        return self._of(part, self.sources[part].substitute(at, draw))

    def prepare(self, positions: list[int], texts_alone: Collection[int] = ()) -> None:
        """Tells each part of its positions."""
        found = [(position, *self.order.find(position)) for position in positions]
        for part, source in enumerate(self.sources):
            own = [at for _, which, at in found if which == part]
            if own:
                source.prepare(own, {at for position, which, at in found if which == part and position in texts_alone})

    def fingerprint(self, shard: int) -> int:
        """The part's, of its own tar."""
        part = int(np.searchsorted(self.firsts, shard, side="right")) - 1
        return self.sources[part].fingerprint(shard - self.firsts[part])

    def _of(self, part: int, sample: Sample) -> Sample:
        sample.shard += self.firsts[part]
        return sample
