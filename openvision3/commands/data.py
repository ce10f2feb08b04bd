"""`ov3 data ...`: write the demo's scenes as tars, index tars, and check every sample of them."""

import os
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from openvision3.commands.batching import OutputOptions
from openvision3.commands.common import Progress, fail, print_table, refuse_existing, write_json
from openvision3.config import DataConfig, OpenVisionError, SceneConfig

if TYPE_CHECKING:
    from openvision3.data.store import Location

MAX_SIZE = 1024  # pixels; the cut-outs have 128
SHOWN_TARS = 50  # in a table; of more, only the sum
CHECKED_TOGETHER = 64  # samples fetched together

Paths = tyro.conf.Positional[tuple[str, ...]]
Output = Annotated[OutputOptions, tyro.conf.arg(name=""), tyro.conf.FlagCreatePairsOff]


def make_demo(
    out: Path,
    samples: int = 1000,
    seed: int = 0,
    size: int = 128,
    split: str = "train",
    format: Literal["webp", "jpg"] = "webp",
    num_names: int = SceneConfig.num_names,
    output: Output = OutputOptions(),
) -> int:
    """Writes captioned scenes as indexed tars.

    Args:
        out: folder to write; it appears when all is done
        samples: how many scenes
        seed: of the scenes; the split scenes-v1 has its own
        size: pixels, each side
        split: train, or another name for scenes on held-out landscapes; scenes-v1 is the frozen benchmark
        format: webp is lossless; jpg is smaller and not
        num_names: how many of the 494 named things occur
    """
    from openvision3.data import demo
    from openvision3.data.samples import Sample
    from openvision3.data.shards import DemoSource
    from openvision3.data.writing import write_shards

    if samples < 1 or not 16 <= size <= MAX_SIZE or seed < 0:
        raise OpenVisionError(f"samples must be at least 1, seed at least 0, and size between 16 and {MAX_SIZE} pixels")
    every = len(demo.scene_names())
    if not 1 <= num_names <= every:
        raise OpenVisionError(f"num_names is {num_names}, but must be between 1 and {every}")
    refuse_existing(output.json, output.overwrite)
    source = DemoSource(DataConfig(seed=seed, scenes=SceneConfig(num_names=num_names)), split, size)
    if source.size is not None and samples > source.size:
        raise OpenVisionError(f"the split {split} has {source.size} scenes, not {samples}")

    def scenes() -> Iterator[Sample]:
        for position in range(samples):
            yield source.read(position)

    with Progress(samples, "scenes") as progress:
        write_shards(scenes(), out, image_format=format, overwrite=output.overwrite, progress=progress.advance)
    stored = sum(file.stat().st_size for file in out.iterdir())
    print(f"{out}: {samples} scenes of {size} px in {stored / 1e6:.1f} MB, {progress.rate:.0f}/s")
    write_json(
        output.json, {"samples": samples, "bytes": stored, "samples_per_second": progress.rate}, output.overwrite
    )
    return 0


def index(paths: Paths, workers: int = 0, output: Output = OutputOptions()) -> int:
    """Writes an index file beside each tar, and the number of samples of each to one file a folder.

    With it, training opens any number of tars at once and finds any position in them. Without, training makes its own
    index as it goes.

    Args:
        paths: tars: files, URLs, brace lists, globs or folders
        workers: processes that index; 0: one for each processor
    """
    from openvision3.data.catalogue import CATALOGUE, write_catalogue
    from openvision3.data.store import Store, expand, name_of, sibling

    refuse_existing(output.json, output.overwrite)
    tars, store = expand(paths), Store()
    rows, failed = [], 0
    folders: dict[Any, dict[str, tuple[int, int] | None]] = {}
    with Progress(len(tars), "tars") as progress:
        for tar, found in zip(tars, _indexed(tars, workers or os.cpu_count() or 1), strict=True):
            counts = folders.setdefault(sibling(tar, CATALOGUE), {})
            counts[name_of(tar)] = None  # one that is broken is looked at whenever it is opened
            if isinstance(found, str):
                fail(found)
                failed += 1
            else:
                size, samples, broken = found
                rows.append((str(tar), samples, broken or "whole"))
                if broken:
                    fail(f"{tar}: {broken}")
                    failed += 1
                else:
                    counts[name_of(tar)] = (size, samples)
            progress.advance(1)
    for place, counts in folders.items():
        write_catalogue(place, counts, store)
    if len(rows) <= SHOWN_TARS:
        print_table("Indexed", ("tar", "samples", "state"), rows)
    samples, broken = sum(row[1] for row in rows), sum(row[2] != "whole" for row in rows)
    print(f"{len(rows)} tars with {samples} samples indexed, {broken} of them broken, {progress.rate:.0f} tars/s")
    write_json(
        output.json, [dict(zip(("tar", "samples", "state"), row, strict=True)) for row in rows], output.overwrite
    )
    return 1 if failed else 0


def _indexed(tars: "Sequence[Location]", workers: int) -> Iterator[tuple[int, int, str] | str]:
    if min(workers, len(tars)) < 2:
        yield from map(_index_one, tars)
        return
    # Ctrl-C is this process's to answer
    with ProcessPoolExecutor(min(workers, len(tars)), None, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        yield from pool.map(_index_one, tars, chunksize=min(16, -(-len(tars) // workers)))


def _index_one(tar: "Location") -> tuple[int, int, str] | str:
    """Indexes a tar; returns its size, its number of samples and what is broken, or an error's message."""
    from openvision3.data.store import Store
    from openvision3.data.tar_index import save_index, scan

    try:
        store = Store()
        found = scan(tar, store)
        save_index(found, store)
    except (OpenVisionError, OSError) as error:
        return str(error)
    return found.size, len(found), found.broken


def check(
    paths: Paths,
    image_key: str = DataConfig.image_key,
    alt_key: str = DataConfig.alt_key,
    caption_field: str = DataConfig.caption_field,
    filter: str = DataConfig.filter,
    output: Output = OutputOptions(),
) -> int:
    """Reads and decodes every sample of tars; names each one that training would skip, counts those that lack a text.

    Args:
        paths: tars: files, URLs, brace lists, globs or folders
        image_key: the member that holds the picture; empty: the first of jpg, jpeg, png, webp
        alt_key: the member that holds the alt text, or json.FIELD
        caption_field: the field of the json member that holds the synthetic caption, or .MEMBER
        filter: check only the samples whose json fields meet it, such as 'width >= 256'
    """
    from openvision3.data.samples import BadSample
    from openvision3.data.shards import TarSource
    from openvision3.data.store import sibling

    refuse_existing(output.json, output.overwrite)
    config = DataConfig(image_key=image_key, alt_key=alt_key, caption_field=caption_field, filter=filter)
    source = TarSource(paths, config, shuffle=False, lenient=True)
    for path, reason in source.broken:
        fail(f"{path}: {reason}")
    bad: list[tuple[str, str]] = []
    missing: Counter[str] = Counter()
    total = len(source)
    with Progress(total, "samples") as progress:
        for number in range(total):
            if number % CHECKED_TOGETHER == 0:
                source.prepare(list(range(number, min(number + CHECKED_TOGETHER, total))))
            try:
                missing[source.read(number).missing] += 1
            except BadSample as error:
                bad.append((str(sibling(source.tar_of(number), error.key)), error.reason))
                fail(": ".join(bad[-1]))
            progress.advance(1)
    share = len(bad) / total
    print(f"{total} samples in {len(source.shards)} tars, {len(bad)} unusable ({share:.2%}), {progress.rate:.0f}/s")
    for text, flag, name in (("alt", "--alt-key", alt_key), ("caption", "--caption-field", caption_field)):
        if missing[text]:
            print(f"{missing[text]} have no {text} text ({flag} {name}): their other text stands in")
    figures = {
        "samples": total,
        "tars": len(source.shards),
        "without_alt": missing["alt"],
        "without_caption": missing["caption"],
        "bad": bad,
        "broken": [list(map(str, b)) for b in source.broken],
    }
    write_json(output.json, figures, output.overwrite)
    return 1 if bad or source.broken else 0
