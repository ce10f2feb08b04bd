"""The writing of samples as tars that can be read by position."""

import io
import itertools
import json
import shutil
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from PIL import Image

from openvision3.config import OpenVisionError
from openvision3.data.samples import Sample
from openvision3.data.tar_index import save_index, scan


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
