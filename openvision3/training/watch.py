"""What goes wrong in a run: unusable samples, and steps whose losses or gradient are not finite."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from openvision3.config import OpenVisionError
from openvision3.data.batches import Bad, Batch
from openvision3.distributed import ALONE, World
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


class FiniteWatch:
    """Tells which steps to skip; `skipped` counts them over the whole run.

    Losses and gradient norm are those of the global batch, so that all processes decide alike. After `limit` such steps
    in a row the weights, or the data, are past mending.
    """

    def __init__(self, folder: Path, limit: int, world: World = ALONE, skipped: int = 0) -> None:
        self.folder, self.limit, self.world, self.skipped = folder, limit, world, skipped
        self.in_a_row = 0  # steps skipped since the last that was not: the weights may be what is wrong

    def skips(self, step: int, batch: Batch, losses: dict[str, Tensor]) -> bool:
        """Whether some of the `losses` (scalars; the gradient's norm among them) is not finite; waits for the device.

        Raises `OpenVisionError` at the last step allowed, with the batch's samples written to `bad_batch.json`.
        """
        if bool(torch.stack([value.isfinite() for value in losses.values()]).all()):
            self.in_a_row = 0
            return False
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= self.limit:
            self._report(step, batch, losses)
        return True

    def _report(self, step: int, batch: Batch, losses: dict[str, Tensor]) -> None:
        parts = self.world.gather_objects((batch.positions, batch.keys))
        wrong = [name for name, value in losses.items() if not value.isfinite()]
        record = {
            "step": step,
            "losses": {name: str(float(v)) if name in wrong else float(v) for name, v in losses.items()},
            "positions": [position for positions, _ in parts for position in positions],
            "keys": [key for _, keys in parts for key in keys],
        }
        path = self.folder / "bad_batch.json"
        if self.world.rank == 0:
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_text(json.dumps(record, indent=2) + "\n")
            temporary.replace(path)
        error = OpenVisionError(
            f"step {step}: {', '.join(wrong)} not finite, as in all of the last {self.in_a_row} steps (max_skipped is "
            f"{self.limit}); the batch's samples are in {path}. Look at them, or lower the peak learning rate; the "
            "last checkpoint is from before"
        )
        error.alike = True
        raise error
