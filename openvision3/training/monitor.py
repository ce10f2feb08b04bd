"""What a run tells the world: metrics.jsonl, TensorBoard, the console and sample pictures."""

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch
from einops import rearrange
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

Item = TypeVar("Item")
PLAIN_INTERVAL = 10.0  # seconds between lines where there is no terminal (metrics.jsonl has every record)


class Monitor:
    """Writes a run's records; a context manager.

    `total` and `samples_seen` count samples. `resume_step` is the step of the checkpoint that the run goes on from:
    records after it are cut from metrics.jsonl and hidden in TensorBoard, as those steps run again. With
    `shown` one chooses the metrics on the console (all go to the files).
    """

    def __init__(
        self,
        folder: Path,
        total: int,
        *,
        samples_seen: int = 0,
        resume_step: int = 0,
        shown: Sequence[str] = ("total",),
        stream: TextIO | None = None,
        tensorboard: bool = True,
    ) -> None:
        self.folder, self.total, self.shown = folder, total, shown
        self.stream = stream or sys.stderr
        truncate_records(folder / "metrics.jsonl", resume_step)
        self._records = (folder / "metrics.jsonl").open("a")
        self._writer = _tensorboard_writer(folder / "tensorboard", resume_step + 1) if tensorboard else None
        self._progress: Progress | None = None
        if self.stream.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), _Rate(), TimeRemainingColumn(compact=True))
            self._progress = Progress(*columns, console=Console(file=self.stream))
            self._task = self._progress.add_task("training", total=total, completed=samples_seen)
            self._progress.start()
        now = time.perf_counter()
        self._start_seen, self._busy = samples_seen, 0.0  # of this process: samples at its start, seconds of training
        self._rate_seen, self._rate_start = samples_seen, now
        self._waited = 0.0  # seconds for data, since the last record
        self._last_line = -math.inf

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def advance(self, samples_seen: int) -> None:
        """Moves the progress bar; call after each step."""
        if self._progress is not None:
            self._progress.update(self._task, completed=samples_seen)

    def waiting(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The batches; the time that they are waited for is counted."""
        waited = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(waited, None)
            self._waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def log(self, step: int, samples_seen: int, metrics: Mapping[str, Any]) -> None:
        """Records one step's numbers everywhere, with the rate since the last record as `samples_per_second`.

        `data_wait` is the share of that time in which there was no batch. Values that are not finite numbers are
        written as strings, as JSON has no name for them.
        """
        now = time.perf_counter()
        seconds, samples = now - self._rate_start, samples_seen - self._rate_seen
        self._busy += seconds
        self._rate_seen, self._rate_start = samples_seen, now
        rate = samples / seconds if seconds > 0 and samples > 0 else 0.0
        waited, self._waited = self._waited / seconds if seconds > 0 else 0.0, 0.0
        speed = {"samples_per_second": round(rate, 2), "data_wait": round(waited, 4)}
        self.record("train", step, samples_seen, {**metrics, **speed})
        self._show(samples_seen, metrics, rate)

    def record(self, kind: str, step: int, samples_seen: int, values: Mapping[str, Any]) -> None:
        """Appends a record of another kind (such as "eval") to metrics.jsonl and TensorBoard."""
        row = {"kind": kind, "step": step, "samples_seen": samples_seen, **{k: _plain(v) for k, v in values.items()}}
        self._records.write(json.dumps(row) + "\n")
        self._records.flush()
        if self._writer is not None:
            for name, value in row.items():
                if isinstance(value, int | float) and name not in ("step", "samples_seen"):
                    self._writer.add_scalar(f"{kind}/{name}", value, samples_seen)

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self.stream, flush=True)

    def save_pictures(self, name: str, columns: Sequence[Tensor]) -> Path:
        """Writes `samples/NAME.png`: a row a sample, a column for each of `columns` ((B, 3, H, W) in [-1, 1])."""
        path = self.folder / "samples" / f"{name}.png"
        save_picture_grid(path, columns)
        return path

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps the time of evaluations and checkpoints out of the training rate."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._rate_start += time.perf_counter() - start

    def flush(self) -> None:
        """Waits until the records are on disk; call before a checkpoint that counts on them."""
        self._records.flush()
        os.fsync(self._records.fileno())
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Closes the files and the progress bar."""
        if self._progress is not None:
            self._progress.stop()
        self._records.close()
        if self._writer is not None:
            self._writer.close()

    def _show(self, samples_seen: int, metrics: Mapping[str, Any], rate: float) -> None:
        numbers = "  ".join(f"{name} {float(metrics[name]):.4g}" for name in self.shown if name in metrics)
        if self._progress is not None:
            self._progress.update(self._task, completed=samples_seen, description=numbers)
            return
        now = time.perf_counter()
        if now - self._last_line < PLAIN_INTERVAL and samples_seen < self.total:
            return
        self._last_line = now
        average = (samples_seen - self._start_seen) / self._busy if self._busy > 0 else 0.0
        left = f"{_duration((self.total - samples_seen) / average)} left" if average > 0 else ""
        self.say(f"{samples_seen:,}/{self.total:,} samples  {numbers}  {rate:.1f} samples/s  {left}".rstrip())


class NoMonitor:
    """In the place of a `Monitor`, in the processes of a run that tell nothing."""

    def __enter__(self) -> "NoMonitor":
        return self

    def __exit__(self, *_: object) -> None: ...

    def advance(self, samples_seen: int) -> None:
        """Nothing, as all of these."""

    def waiting(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The batches."""
        return iter(batches)

    def log(self, step: int, samples_seen: int, metrics: Mapping[str, Any]) -> None: ...

    def record(self, kind: str, step: int, samples_seen: int, values: Mapping[str, Any]) -> None: ...

    def say(self, text: str) -> None: ...

    def save_pictures(self, name: str, columns: Sequence[Tensor]) -> None: ...

    def paused(self) -> AbstractContextManager[None]:
        """A context in which nothing is different."""
        return nullcontext()

    def flush(self) -> None: ...


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = f"{task.speed:.1f} samples/s" if task.speed else "- samples/s"
        return Text(f"{int(task.completed):,}/{int(task.total or 0):,}  {speed}")


def truncate_records(path: Path, step: int) -> None:
    """Drops from a metrics.jsonl every record after `step`, and a last line that was broken off.

    The rest stays byte for byte; the file is replaced whole.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if line.endswith(b"\n") and isinstance(record, dict) and record.get("step", 0) <= step:
            kept.append(line)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(b"".join(kept))
    temporary.replace(path)


def read_records(path: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The records of one kind in a metrics.jsonl, in order."""
    rows = (json.loads(line) for line in path.read_text().splitlines())
    return [row for row in rows if row["kind"] == kind]


def save_picture_grid(path: Path, columns: Sequence[Tensor], gap: int = 2) -> None:
    """Writes a PNG with a row a sample and a column for each of `columns`: (B, 3, H, W), all alike, in [-1, 1].

    Values are rounded to 8 bits, never truncated; values outside the range are clamped.
    """
    pictures = torch.stack([column.detach().float().cpu() for column in columns], dim=1)
    padded = torch.nn.functional.pad(pictures.clamp(-1, 1), (0, gap, 0, gap), value=1.0)
    grid = rearrange(padded, "row column c h w -> (row h) (column w) c")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    Image.fromarray(((grid + 1) * 127.5).round().to(torch.uint8).numpy()).save(temporary, format="PNG")
    temporary.replace(path)


def _tensorboard_writer(folder: Path, purge_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=purge_step)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.item()
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
