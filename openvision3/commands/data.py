"""`ov3 data ...`: write the demo's scenes as tars, index tars, and check every sample of them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import tyro

from openvision3.commands.batching import OutputOptions
from openvision3.commands.common import Progress, fail, print_table, refuse_existing, write_json
from openvision3.config import DataConfig, OpenVisionError, SceneConfig

MAX_SIZE = 1024  # pixels; the cut-outs have 128

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


def index(paths: Paths, output: Output = OutputOptions()) -> int:
    """Writes an index file beside each tar, so that samples can be read by position.

    Args:
        paths: tars: files, brace lists, globs or folders
    """
    from openvision3.data.shards import expand
    from openvision3.data.tar_index import save_index, scan

    refuse_existing(output.json, output.overwrite)
    rows, failed = [], 0
    tars = expand(paths)
    with Progress(len(tars), "tars") as progress:
        for path in tars:
            try:
                found = scan(path)
                save_index(found)
            except (OpenVisionError, OSError) as error:
                fail(str(error))
                failed += 1
            else:
                rows.append((str(path), len(found.entries), found.broken or "whole"))
                if found.broken:
                    fail(f"{path}: {found.broken}")
                    failed += 1
            progress.advance(1)
    print_table("Indexed", ("tar", "samples", "state"), rows)
    write_json(
        output.json, [dict(zip(("tar", "samples", "state"), row, strict=True)) for row in rows], output.overwrite
    )
    return 1 if failed else 0


def check(
    paths: Paths,
    alt_key: str = DataConfig.alt_key,
    caption_field: str = DataConfig.caption_field,
    output: Output = OutputOptions(),
) -> int:
    """Reads and decodes every sample of tars, and names each one that training would skip.

    Args:
        paths: tars: files, brace lists, globs or folders
        alt_key: the member that holds the alt text
        caption_field: the field of the json member that holds the synthetic caption
    """
    from openvision3.data.samples import BadSample
    from openvision3.data.shards import TarSource

    refuse_existing(output.json, output.overwrite)
    source = TarSource(paths, DataConfig(alt_key=alt_key, caption_field=caption_field), shuffle=False)
    for path, reason in source.broken:
        fail(f"{path}: {reason}")
    bad: list[tuple[str, str]] = []
    with Progress(len(source), "samples") as progress:
        for number in range(len(source)):
            try:
                source.read_number(number)
            except BadSample as error:
                bad.append((str(source.tar_of(number).parent / error.key), error.reason))
                fail(": ".join(bad[-1]))
            progress.advance(1)
    share = len(bad) / len(source)
    print(
        f"{len(source)} samples in {len(source.indexes)} tars, {len(bad)} unusable ({share:.2%}), {progress.rate:.0f}/s"
    )
    figures = {
        "samples": len(source),
        "tars": len(source.indexes),
        "bad": bad,
        "broken": [list(map(str, b)) for b in source.broken],
    }
    write_json(output.json, figures, output.overwrite)
    return 1 if bad or source.broken else 0
