"""Samples from indexed tars or rendered on the fly, read by position, and the writing of such tars.

A tar has members `{key}.webp` (or jpg, png), `{key}.txt` (alt text) and `{key}.json` (with the synthetic caption), the
layout of WebDataset and of Recap-DataComp-1B. Offsets come from an index, so that every sample can be read by itself.
"""

import functools
import glob
import io
import itertools
import json
import logging
import re
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from openvision3.config import DataConfig, OpenVisionError, SceneConfig
from openvision3.data import demo, grammar
from openvision3.data.tar_index import Entry, TarIndex, open_index, save_index, scan
from openvision3.data.transforms import decode_image

log = logging.getLogger(__name__)

MAX_TEXT = 10_000  # letters of a caption or alt text
MAX_MEMBER_BYTES = {"image": 256 * 2**20, "text": 2**20}
MAX_BRACES = 1_000_000  # paths that one brace list may stand for
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


@dataclass
class Sample:
    """A picture with its two texts. `meta` is the JSON that came with it."""

    key: str
    image: np.ndarray  # uint8 (H, W, 3), RGB
    alt: str
    caption: str
    meta: dict[str, Any] = field(default_factory=dict)


class BadSample(OpenVisionError):
    """A sample that can't be used: `key` ("000000.tar/000123") and `reason`."""

    def __init__(self, key: str, reason: str):
        super().__init__(f"{key}: {reason}")
        self.key = key
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return BadSample, (self.key, self.reason)


class Source(Protocol):
    """Samples by position. Positions go on past `size`: each turn is another order of the same samples."""

    size: int | None  # how many different samples there are; None: no end

    def read(self, position: int) -> Sample:
        """The sample at a position, always the same one. Raises `BadSample`."""
        ...


def open_source(config: DataConfig, split: str, resolution: int) -> Source:
    """The samples of a split: scenes rendered at `resolution`, or tars as they are.

    Only the split "train" of tars is shuffled, and that only with `config.shuffle`: without, training on tars of scenes
    equals training on the same scenes rendered on the fly.
    """
    if config.source == "demo":
        return DemoSource(config, split, resolution)
    return TarSource(config.source, config, shuffle=config.shuffle and split == "train")


class DemoSource:
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
        index = position if self.size is None else position % self.size
        scene = demo.scene(self.scenes, self.split, self.seed, index)
        texts = grammar.captions(scene)
        meta = grammar.describe(scene, demo.names(self.scenes.num_names))
        return Sample(scene.key, demo.render(scene, self.resolution), texts.alt, texts.caption, meta)


class TarSource:
    """Samples of tars: paths, brace lists ("{000..099}.tar"), globs or folders.

    Position p is in turn p // size; each turn goes through all samples once, in an order that is a function of (seed,
    turn), or in the tars' order with `shuffle` off. A tar that was cut short gives its complete samples, and `broken`
    names it.
    Raises `OpenVisionError` where there is no tar or no sample.
    """

    def __init__(
        self, paths: str | Path | Sequence[str | Path], config: DataConfig | None = None, shuffle: bool = True
    ):
        self.config = config or DataConfig()
        self.shuffle = shuffle
        self.indexes: list[TarIndex] = [open_index(path) for path in expand(paths)]
        self.broken = [(index.path, index.broken) for index in self.indexes if index.broken]
        for path, reason in self.broken:
            log.warning("%s: %s; its complete samples are used", path, reason)
        self.starts = np.cumsum([0, *(len(index.entries) for index in self.indexes)])
        self.size: int | None = len(self)
        if not len(self):
            raise OpenVisionError(f"{paths}: the tars hold no samples")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, position: int) -> Sample:
        """Reads and decodes a sample. Raises `BadSample` for one that lacks a picture or text, or has a broken one."""
        turn, place = divmod(position, len(self))
        number = int(_order(self.config.seed, turn, len(self))[place]) if self.shuffle else place
        return self.read_number(number)

    def read_number(self, number: int) -> Sample:
        """The sample that is `number` in the tars' own order."""
        which = self._which(number)
        index = self.indexes[which]
        entry = index.entries[number - int(self.starts[which])]
        try:
            return read_entry(index.path, entry, self.config)
        except BadSample as error:  # keys repeat from tar to tar
            raise BadSample(f"{index.path.name}/{error.key}", error.reason) from None
        except OSError as error:
            raise OpenVisionError(f"{index.path}: can't be read ({error.strerror or error})") from None

    def tar_of(self, number: int) -> Path:
        """The tar that holds the sample that is `number` in the tars' own order."""
        return self.indexes[self._which(number)].path

    def _which(self, number: int) -> int:
        return int(np.searchsorted(self.starts, number, side="right")) - 1


@functools.lru_cache(maxsize=2)
def _order(seed: int, turn: int, size: int) -> np.ndarray:
    """A permutation, from PCG64's raw stream: numpy promises that it stays the same."""
    return np.argsort(np.random.PCG64([seed, turn]).random_raw(size), kind="stable")


def read_entry(path: Path, entry: Entry, config: DataConfig) -> Sample:
    """Reads one sample of a tar; a text that is missing or empty is taken from the other. Raises `BadSample`."""
    extension = next((e for e in IMAGE_EXTENSIONS if e in entry.members), None)
    if extension is None:
        raise BadSample(entry.key, f"has no picture ({', '.join(IMAGE_EXTENSIONS)}) in {path.name}")

    def content(member: str, most: int) -> bytes:
        offset, size = entry.members[member]
        if size > most:
            raise BadSample(entry.key, f"its {member} has {size} bytes, more than {most}")
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            raise BadSample(entry.key, f"its {member} is cut short")
        return data

    most = MAX_MEMBER_BYTES["text"]
    meta = _parse_json(entry.key, content("json", most)) if "json" in entry.members else {}
    written = content(config.alt_key, most) if config.alt_key in entry.members else b""
    alt = _text(entry.key, config.alt_key, written)
    caption = _text(entry.key, config.caption_field, meta.get(config.caption_field) or "")
    if not (alt or caption):
        raise BadSample(entry.key, "has no caption")
    picture = content(extension, MAX_MEMBER_BYTES["image"])
    try:
        image = decode_image(io.BytesIO(picture), f"its {extension}")
    except OpenVisionError as error:
        raise BadSample(entry.key, str(error)) from None
    return Sample(entry.key, np.array(image), alt or caption, caption or alt, meta)


def _parse_json(key: str, data: bytes) -> dict[str, Any]:
    try:
        meta = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise BadSample(key, "its json is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise BadSample(key, f"its json is broken ({error})") from None
    if not isinstance(meta, dict):
        raise BadSample(key, "its json is not a table of fields")
    return meta


def _text(key: str, member: str, value: Any) -> str:
    """A text, with its white space made single spaces."""
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            raise BadSample(key, f"its {member} is not UTF-8") from None
    if not isinstance(value, str):
        raise BadSample(key, f"its {member} is {type(value).__name__}, not text")
    if len(value) > MAX_TEXT:
        raise BadSample(key, f"its {member} has {len(value)} letters, more than {MAX_TEXT}")
    return " ".join(value.split())


def expand(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """The tars that paths, brace lists, globs and folders stand for; raises `OpenVisionError` where one has none."""
    found: list[Path] = []
    patterns = [paths] if isinstance(paths, str | Path) else list(paths)
    if not patterns:
        raise OpenVisionError("no tars given: name files, brace lists, globs or folders")
    for pattern in patterns:
        for text in itertools.islice(_braces(str(pattern)), MAX_BRACES):
            path = Path(text)
            if path.is_dir():
                tars = sorted(path.glob("*.tar"))
            elif any(mark in text for mark in "*?["):
                tars = sorted(Path(match) for match in glob.glob(text))
            else:
                tars = [path]
            if not tars or not all(tar.is_file() for tar in tars):
                raise OpenVisionError(f"{text}: no such tar, nor a folder with tars")
            found += tars
    return found


def _braces(text: str) -> Iterator[str]:
    """Expands "{000..012}" (keeping leading zeros) and "{a,b}", from left to right."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", text)
    if match is None:
        yield text
        return
    first, last, words = match.groups()
    middles: Iterable[str] = (
        words.split(",") if words else (f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1))
    )
    for middle in middles:
        yield from _braces(text[: match.start()] + middle + text[match.end() :])


def write_shards(
    samples: Iterable[Sample],
    out: Path,
    *,
    image_format: Literal["webp", "jpg"] = "webp",
    samples_per_shard: int = 1000,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Writes samples as indexed tars `000000.tar`, ... into the folder `out` and returns how many there are.

    The folder appears when all of it is written; a run that was broken off leaves `OUT.partial`, which the next one
    replaces. webp is lossless, jpg of quality 95. `progress` is called with 1 after each sample. Raises
    `OpenVisionError` where `out` exists and `overwrite` is off, or holds other files than tars and their indexes.
    """
    out = Path(out)
    _refuse(out, overwrite)
    partial, replaced = (out.with_name(out.name + ending) for ending in (".partial", ".replaced"))
    for leftover in (partial, replaced):
        if leftover.exists():
            _refuse(leftover, overwrite=True)
            shutil.rmtree(leftover)
    partial.mkdir(parents=True)
    written, waiting = 0, iter(samples)
    for number in itertools.count():
        shard = itertools.islice(waiting, samples_per_shard)
        first = next(shard, None)
        if first is None:
            break
        path = partial / f"{number:06d}.tar"
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            for sample in itertools.chain([first], shard):
                _write_sample(tar, sample, image_format)
                written += 1
                if progress:
                    progress(1)
        save_index(scan(path))
    if out.exists():
        out.replace(replaced)
    partial.replace(out)
    if replaced.exists():
        shutil.rmtree(replaced)
    return written


def _refuse(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise OpenVisionError(f"{out} exists; pass --overwrite to replace it")
    if not out.is_dir() or any(not file.name.endswith((".tar", ".idx.json", ".tmp")) for file in out.iterdir()):
        raise OpenVisionError(f"{out} holds other files than tars and their indexes, so it is not replaced")


def _write_sample(tar: tarfile.TarFile, sample: Sample, image_format: str) -> None:
    buffer = io.BytesIO()
    image = Image.fromarray(sample.image)
    if image_format == "webp":
        image.save(buffer, "WEBP", lossless=True, quality=0, method=0)
    else:
        image.save(buffer, "JPEG", quality=95, subsampling=0)
    meta = {**sample.meta, "caption": sample.caption}
    members = {
        image_format: buffer.getvalue(),
        "txt": sample.alt.encode(),
        "json": json.dumps(meta, ensure_ascii=False).encode(),
    }
    for extension, content in members.items():
        info = tarfile.TarInfo(f"{sample.key}.{extension}")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
