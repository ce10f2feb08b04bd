"""What the commands share: the model's options, writing files whole or not at all, tables, progress."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from openvision3 import files
from openvision3.config import OpenVisionError

if TYPE_CHECKING:
    from openvision3.model.openvision3 import OpenVision3

DEMO_KNOWS = (
    "the demo model was trained on this package's rendered scenes alone (named things such as fruit, animals and tools "
    "on landscapes, {size} px); it knows no other words and few other sights"
)


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and where it runs."""

    model: str = "demo"  # "demo", a model folder, or a hub id such as UCSC-VLAA/openvision3-vit-base-patch2-32
    vae: str = "auto"  # auto: the model's own; or a fast front's folder (distill_vae_encoder), another VAE's, a hub id
    device: str = "auto"  # auto: cuda, then mps, then cpu; or cpu, cuda, cuda:1, mps
    dtype: Literal["fp32", "bf16"] = "fp32"  # of weights and arithmetic


def load_model(options: ModelOptions, with_vae: bool = True) -> "OpenVision3":
    """Loads the model on its device, in evaluation mode, and says on stderr what the demo model knows.

    Without `with_vae` it comes without its autoencoder: latents in, tokens out.
    Raises `OpenVisionError` for a model that is missing or broken, or a device that isn't there.
    """
    import torch

    import openvision3
    from openvision3.training.precision import resolve_device

    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    vae = options.vae if with_vae else None
    model = openvision3.load(options.model, vae=vae, device=resolve_device(options.device), dtype=dtype)
    if options.model == "demo":
        print(DEMO_KNOWS.format(size=model.config.image_size), file=sys.stderr)
    return model


def refuse_existing(path: Path | None, overwrite: bool) -> None:
    """Raises `OpenVisionError` where `path` exists and may not be replaced: said before the work, not after it."""
    if path is not None and path.exists() and not overwrite:
        raise OpenVisionError(f"{path} exists; pass --overwrite to replace it")


@contextlib.contextmanager
def whole_file(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Gives a temporary path beside `path` and renames it to `path` when the block ends without an error.

    Raises `OpenVisionError` where `path` exists and `overwrite` is off.
    """
    refuse_existing(path, overwrite)
    with files.whole_file(path) as temporary:
        yield temporary


def write_json(path: Path | None, figures: Any, overwrite: bool = False) -> None:
    """Writes the figures that were printed as JSON, whole or not at all; nothing where `path` is None."""
    if path is not None:
        with whole_file(path, overwrite) as temporary:
            text = json.dumps(figures, indent=2, ensure_ascii=False) + "\n"
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # of file names that are no UTF-8


def printable(text: str) -> str:
    """The text, with what is no UTF-8 in a file's name written as `\\udcff`, which can be printed and drawn."""
    return text.encode("utf-8", "backslashreplace").decode()


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a small table on stdout: the first column left, the others right; floats with four digits."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(printable(title)), title_justify="left", show_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    for row in rows:
        cells = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in row)
        table.add_row(*(escape(printable(cell)) for cell in cells))
    # where nobody looks at a terminal, lines are as long as they need to be
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def fail(line: str) -> None:
    """Names one failed input on stderr, as one line."""
    print("ov3: " + " ".join(line.split()), file=sys.stderr)


class Progress:
    """A bar with rate and time left where stderr is a terminal; plain lines now and then otherwise.

    `total` None: it is not known how many there will be.
    """

    def __init__(self, total: int | None, what: str, seconds_between_lines: float = 10.0):
        self.total, self.what, self.between = total, what, seconds_between_lines
        self.done, self.started = 0, time.monotonic()
        self.last_line = self.started
        self.bar: Any = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self.bar = progress.Progress(
                progress.TextColumn(self.what),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[rate]}"),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
                redirect_stdout=True,
                redirect_stderr=True,
                transient=True,
            )
            self.bar.start()
            self.task = self.bar.add_task(self.what, total=self.total, rate="")
        return self

    def advance(self, count: int) -> None:
        """Counts `count` more as done."""
        self.done += count
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, advance=count, rate=f"{self.rate:.1f}/s")
        elif now - self.last_line >= self.between and self.done != self.total:
            self.last_line = now
            of = f" of {self.total}" if self.total else ""
            left = f", {(self.total - self.done) / self.rate:.0f} s left" if self.total else ""
            print(f"{self.done}{of} {self.what}, {self.rate:.1f}/s{left}", file=sys.stderr)

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return max(time.monotonic() - self.started, 1e-9)

    @property
    def rate(self) -> float:
        """Done a second since the start."""
        return self.done / self.seconds

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
