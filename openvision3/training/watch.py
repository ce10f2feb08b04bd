"""Stops a run at the first loss that is not finite, and leaves the batch's ids on disk."""

import json
from pathlib import Path

import torch
from torch import Tensor

from openvision3.config import OpenVisionError
from openvision3.data.batches import Batch


class FiniteWatch:
    """Collects each step's losses on the device, and looks at all of them when asked: one wait for many steps.

    Weights may be spoilt by then, so look before saving or evaluating anything.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._steps: list[tuple[int, list[int], list[str], dict[str, Tensor]]] = []

    def add(self, step: int, batch: Batch, losses: dict[str, Tensor]) -> None:
        """Remembers a step's batch and losses (scalars on the device)."""
        self._steps.append((step, batch.positions, batch.keys, losses))

    def check(self) -> None:
        """Raises `OpenVisionError` where a loss was not finite, with `bad_batch.json` written; else forgets them."""
        if not self._steps:
            return
        table = torch.stack([torch.stack([value.float() for value in losses.values()]) for *_, losses in self._steps])
        finite = table.isfinite().all(dim=1).tolist()
        if not all(finite):
            self._report(*self._steps[finite.index(False)])
        self._steps.clear()

    def _report(self, step: int, positions: list[int], keys: list[str], losses: dict[str, Tensor]) -> None:
        numbers = {name: float(value) for name, value in losses.items()}
        wrong = [name for name, value in losses.items() if not value.isfinite()]
        record = {
            "step": step,
            "losses": {name: value if name not in wrong else str(value) for name, value in numbers.items()},
            "positions": positions,
            "keys": keys,
        }
        path = self.folder / "bad_batch.json"
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(record, indent=2) + "\n")
        temporary.replace(path)
        raise OpenVisionError(
            f"step {step}: {', '.join(wrong)} not finite; the batch's samples are in {path}. "
            "Look at them, or lower the peak learning rate; the last checkpoint is from before"
        )
