"""What goes wrong in a run: unusable samples, and steps whose losses or gradient are not finite."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from openvision3.config import OpenVisionError
from openvision3.data.batches import Bad, Batch
from openvision3.distributed import ALONE, World
from openvision3.training.checkpoint import Saver
from openvision3.training.monitor import Monitor, NoMonitor


@dataclass
class BadSamples:
    """The unusable samples that a run meets; `count` is of all processes, as far as they were reported."""

    world: World
    monitor: Monitor | NoMonitor
    count: int = 0
    waiting: list[Bad] = field(default_factory=list)  # this process's, not yet reported

    def report(self, step: int, samples_seen: int) -> None:
        """Counts and records those met since the last time; every process must ask."""
        for bad in self.world.gather_objects(self.waiting):
            for position, key, reason in bad:
                self.count += 1
                record = {"position": position, "key": key, "reason": reason}
                self.monitor.record("bad_sample", step, samples_seen, record)
        self.waiting = []


@dataclass(frozen=True)
class Seen:
    """A step that was seen, and is not yet counted."""

    step: int
    positions: list[int]
    keys: list[str]
    losses: dict[str, Tensor]
    skip: Tensor  # fp32 scalar on the host: 1 or 0, once `copied` has come
    copied: torch.cuda.Event | None


class FiniteWatch:
    """Tells which steps to skip; `skipped` counts them over the whole run.

    What is skipped is decided on the device, which nothing waits for: `see` gives the optimizer a flag, and `settle`,
    called once the next step is under way or something counts on this one, counts it. Losses and gradient norm are
    those of the global batch, so that all processes decide alike. After `limit` such steps in a row the weights, or the
    data, are past mending.
    """

    def __init__(self, folder: Path, limit: int, world: World = ALONE, skipped: int = 0) -> None:
        self.folder, self.limit, self.world, self.skipped = folder, limit, world, skipped
        self.in_a_row = 0  # steps skipped since the last that was not: the weights may be what is wrong
        self._seen: Seen | None = None

    def see(self, step: int, batch: Batch, losses: dict[str, Tensor]) -> Tensor:
        """An fp32 scalar on the device: 1 where some of the `losses` (scalars; the gradient's norm among them) is not
        finite, and the step is to change nothing, else 0. The step before must be settled.
        """
        assert self._seen is None
        skip = 1 - torch.stack([value.isfinite() for value in losses.values()]).all().float()
        copied, host = None, skip.to("cpu", non_blocking=True)
        if skip.device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
        self._seen = Seen(step, batch.positions, batch.keys, losses, host, copied)
        return skip

    def settle(self) -> str:
        """Counts the step that was seen last, and waits for its flag; a line to say about it, empty where it was fine.

        Raises `OpenVisionError` for the last step allowed, with the batch's samples written to `bad_batch.json`.
        """
        seen, self._seen = self._seen, None
        if seen is None:
            return ""
        if seen.copied is not None:
            seen.copied.synchronize()
        if not seen.skip:
            self.in_a_row = 0
            return ""
        self.skipped += 1
        self.in_a_row += 1
        wrong = [name for name, value in seen.losses.items() if not value.isfinite()]
        if self.in_a_row >= self.limit:
            self._report(seen, wrong)
        return f"step {seen.step} skipped: {', '.join(wrong)} not finite"

    def _report(self, seen: Seen, wrong: list[str]) -> None:
        parts = self.world.gather_objects((seen.positions, seen.keys))
        record = {
            "step": seen.step,
            "losses": {name: str(float(v)) if name in wrong else float(v) for name, v in seen.losses.items()},
            "positions": [position for positions, _ in parts for position in positions],
            "keys": [key for _, keys in parts for key in keys],
        }
        path = self.folder / "bad_batch.json"
        if self.world.rank == 0:
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_text(json.dumps(record, indent=2) + "\n")
            temporary.replace(path)
        error = OpenVisionError(
            f"step {seen.step}: {', '.join(wrong)} not finite, as in all of the last {self.in_a_row} steps "
            f"(max_skipped is {self.limit}); the batch's samples are in {path}. Look at them, or lower the peak "
            "learning rate; the last checkpoint is from before"
        )
        error.alike = True
        raise error


def settle(watch: FiniteWatch, monitor: Monitor | NoMonitor, saver: Saver) -> None:
    """Settles the step that `watch` saw last, and says what became of it; an error waits for the save under way."""
    try:
        told = watch.settle()
    except OpenVisionError:  # in all processes
        saver.finish()
        raise
    if told:
        monitor.say(told)
