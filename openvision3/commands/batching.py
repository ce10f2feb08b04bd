"""Runs a model over the pictures of a command: what exists is left alone, failures are named, the rate is shown."""

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openvision3.commands import common
from openvision3.commands.pictures import Found, Picture, batches, find_pictures, prepare
from openvision3.config import OpenVisionError

MOST_WORKERS = 8  # threads; a decoder of pictures leaves Python's lock alone for most of its time

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from openvision3.model.openvision3 import OpenVision3


@dataclass(frozen=True)
class BatchOptions:
    """How pictures are prepared and batched."""

    batch_size: int = 32  # pictures of 256 x 256 pixels at once; larger ones go in smaller batches, by their area
    size: int | None = None  # resize the short side to this and crop the centre square, pixels
    max_side: int = 1024  # where pictures keep their size: those with a longer side are reduced to it, pixels


@dataclass(frozen=True)
class OutputOptions:
    """Where results go."""

    json: Path | None = None  # also write the printed figures to this file
    overwrite: bool = False  # replace files that exist


def checked_size(model: "OpenVision3", size: int) -> int:
    """`size` itself; raises `OpenVisionError` where it is no multiple of the model's pixels per token."""
    side = model.config.downsampling
    if size < side or size % side:
        raise OpenVisionError(f"--size {size}: expected a multiple of {side} pixels")
    return size


def workers_for(device: "torch.device") -> int:
    """Threads that prepare pictures: beside a model on the CPU one, which then has all cores; for a GPU more."""
    return 1 if device.type == "cpu" else max(1, min(MOST_WORKERS, (os.cpu_count() or 2) - 1))


def check_options(model: "OpenVision3", batching: BatchOptions) -> None:
    """Raises `OpenVisionError` where the model can't read pictures that are prepared and batched so."""
    if batching.size is not None:
        checked_size(model, batching.size)
    if batching.batch_size < 1 or batching.max_side < model.config.downsampling:
        raise OpenVisionError(f"--batch-size must be at least 1 and --max-side {model.config.downsampling}")
    if model.config.external is not None and batching.size != model.config.image_size:
        side = model.config.image_size
        raise OpenVisionError(f"model {model.config.name!r} reads pictures of {side} x {side} pixels alone")


def square(model: "OpenVision3", batching: BatchOptions) -> BatchOptions:
    """The same options with the model's own square size where none is given."""
    return replace(batching, size=batching.size or model.config.image_size)


def find(images: Sequence[Path], output: OutputOptions, suffix: str = "", out: Path | None = None) -> Found:
    """Finds the inputs; outputs that exist already are left alone and count as failed, unless they may be replaced.

    Raises `OpenVisionError` where there is nothing to do at all, or the JSON file exists already.
    """
    common.refuse_existing(output.json, output.overwrite)
    found = find_pictures(images, suffix, out)
    existing = {picture.output for picture in found.pictures if picture.output and picture.output.exists()}
    if existing and not output.overwrite:
        first = min(path for path in existing if path)
        some = f"{first} exists" if len(existing) == 1 else f"{first} and {len(existing) - 1} more outputs exist"
        found.failures.append(f"{some}; left alone (--overwrite replaces)")
        found.failed += len(existing)
        found.pictures = [picture for picture in found.pictures if picture.output not in existing]
    if not found.pictures and not found.failed:
        raise OpenVisionError(f"no pictures in {', '.join(map(str, images))}")
    return found


@dataclass(frozen=True)
class Outcome:
    """How many pictures came through, and in what time."""

    done: int
    failed: int
    seconds: float

    def finish(self, output: OutputOptions, figures: dict[str, Any]) -> int:
        """Prints the summary on stderr, writes the JSON, and returns the exit code."""
        rate = self.done / self.seconds
        failed = f", {self.failed} failed" if self.failed else ""
        print(f"{self.done} pictures in {self.seconds:.1f} s ({rate:.1f} a second){failed}", file=sys.stderr)
        counts = {"done": self.done, "failed": self.failed, "pictures_per_second": rate}
        common.write_json(output.json, {**counts, **figures}, output.overwrite)
        return 1 if self.failed else 0


class Runner:
    """Feeds prepared batches to a function on the model's device, and counts. `read` takes `load_image`'s place."""

    def __init__(
        self,
        found: Found,
        model: "OpenVision3",
        batching: BatchOptions,
        read: "Callable[[Path], Image] | None" = None,
    ):
        check_options(model, batching)
        self.found, self.batching = found, batching
        self.load = partial(
            prepare, size=batching.size, max_side=batching.max_side, multiple=model.config.downsampling, read=read
        )
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.done, self.failed = 0, found.failed
        self.progress = common.Progress(len(found.pictures), "pictures")

    def run(self, work: "Callable[[list[Picture], Tensor], list[Callable[[], None]]]") -> Outcome:
        """Calls `work(pictures, images)` on each batch; threads run the writers that it returns, one a picture or none.

        Writing overlaps with the next batch; at most two batches of outputs are held.
        """
        import torch

        for line in self.found.failures:
            common.fail(line)
        with self.progress, ThreadPoolExecutor(2) as pool:
            writing: list[tuple[Picture, Future[None]]] = []
            size, workers = self.batching.batch_size, workers_for(self.device)
            for pictures, images in batches(self.found.pictures, self.load, size, self._fail, workers):
                with torch.inference_mode():
                    writers = work(pictures, images.to(self.device, self.dtype))
                self._settle(writing)
                if writers:
                    writing = [(p, pool.submit(write)) for p, write in zip(pictures, writers, strict=True)]
                else:
                    writing = []
                    self._count(len(pictures))
            self._settle(writing)
        return Outcome(self.done, self.failed, self.progress.seconds)

    def _settle(self, writing: list[tuple[Picture, Future[None]]]) -> None:
        for picture, future in writing:
            try:
                future.result()
                self._count(1)
            except OpenVisionError as error:
                self._fail(picture, f"{picture.path}: {error}")
            except OSError as error:
                self._fail(picture, f"{picture.path}: cannot write {picture.output}: {error.strerror or error}")

    def _count(self, pictures: int) -> None:
        self.done += pictures
        self.progress.advance(pictures)

    def _fail(self, picture: Picture, line: str) -> None:
        self.failed += 1
        self.progress.advance(1)
        common.fail(line)
