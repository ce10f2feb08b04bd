"""Reader rate on demo tars against webdataset's reader on the same tars in the same run.

    pip install webdataset
    ov3 data make-demo --out TARS --samples 10000
    python benchmarks/reader_rate.py TARS [--workers 2] [--size 128] [--rounds 3] [--json FILE]

Both decode every picture with Pillow, resize it to `size` (bilinear, as the training crop does), read its alt text and
json, and give batches of 64 uint8 pictures from worker processes; both shuffle. webdataset shuffles shards and a buffer
of 1,000 samples; ours all samples of a window of 64 shards. Rounds alternate, so that a noisy machine is noisy for
both; the figure is each reader's best round, and the median is printed beside it.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from openvision3.config import DataConfig
from openvision3.data.batches import BatchStream
from openvision3.data.shards import open_source

BATCH = 64


def main() -> int:
    """Prints both rates; the exit code is 1 where ours is the lower."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tars", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rates: dict[str, list[float]] = {"openvision3": [], "webdataset": []}
    for _ in range(options.rounds):
        rates["openvision3"].append(rate(ours(options.tars, options.size, options.workers)))
        rates["webdataset"].append(rate(theirs(options.tars, options.size, options.workers)))
    figures: dict[str, Any] = {"workers": options.workers, "size": options.size, "rates": rates}
    for name, values in rates.items():
        figures[f"{name}_best"], figures[f"{name}_median"] = max(values), statistics.median(values)
    print(json.dumps(figures, indent=2))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if figures["openvision3_best"] >= figures["webdataset_best"] else 1


def rate(batches: Iterator[torch.Tensor]) -> float:
    """Pictures a second, after the first batch."""
    next(batches)
    begin, count = time.perf_counter(), 0
    for images in batches:
        count += len(images)
    return count / (time.perf_counter() - begin)


def ours(tars: Path, size: int, workers: int) -> Iterator[torch.Tensor]:
    source = open_source(DataConfig(source=str(tars)), "train", size)
    total = source.size or 0
    stream = BatchStream(
        source, None, size, BATCH, 0, total, contrastive_length=0, caption_length=0, num_workers=workers
    )
    for batch in stream:
        yield batch.images


def theirs(tars: Path, size: int, workers: int) -> Iterator[torch.Tensor]:
    import webdataset

    def crop(image: Image.Image) -> np.ndarray:
        return np.array(image.resize((size, size), Image.Resampling.BILINEAR))

    paths = [str(path) for path in sorted(tars.glob("*.tar"))]
    pipeline = (
        webdataset.WebDataset(paths, shardshuffle=len(paths), workersplitter=webdataset.split_by_worker)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg;png;webp", "txt", "json")
        .map_tuple(crop)
    )
    loader = torch.utils.data.DataLoader(
        pipeline.batched(BATCH, collation_fn=collate), batch_size=None, num_workers=workers, worker_init_fn=one_thread
    )
    for images, _texts, _meta in loader:
        yield images


def collate(samples: list[Any]) -> tuple[torch.Tensor, list[str], list[Any]]:
    images, texts, meta = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), list(texts), list(meta)


def one_thread(_worker: int) -> None:
    torch.set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main())
