"""The processes that share a global batch, and what they exchange for its losses."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from openvision3.config import OpenVisionError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Processes that each hold an equal, consecutive share of every global batch, in the order of their ranks.

    A loss that is given a world returns this process's share of it: sums over its own samples, divided by counts of the
    global batch. The shares add up to the loss, and the parameters' gradients add up to its gradient: combine them over
    processes by a plain sum, not by the mean that DDP and FSDP take by default. Every process must ask for the same
    losses in the same order, and weigh them alike. `group` None is the default process group, or none where `size` is
    1; nothing is exchanged then.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    patient: dist.ProcessGroup | None = None  # the same processes, for `wait_for_first`

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size, (self.rank, self.size)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Tensors (B, ...) of all processes, of one shape, -> (size * B, ...), in the order of ranks; no gradient."""
        tensor = tensor.detach()
        if self.size == 1:
            return tensor
        gathered = tensor.new_empty(self.size * tensor.shape[0], *tensor.shape[1:])
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name since PyTorch 2.14
        gather(gathered, tensor.contiguous(), group=self.group)
        return gathered

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum of all processes' tensors, of one shape; no gradient. Equal to the last bit in every process."""
        tensor = tensor.detach()
        if self.size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total, op=dist.ReduceOp.SUM, group=self.group)
        return total

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers; every process must ask. No device is waited for."""
        if self.size == 1:
            return number
        numbers = torch.tensor([number])
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self.group)
        return int(numbers)

    def wait_for_first(self) -> None:
        """Waits, for a day at most, until the first process is here too."""
        if self.size > 1:
            dist.barrier(self.patient)

    def gather_objects(self, item: T) -> list[T]:
        """What every process has, in the order of ranks. Only for what this run's own processes made: it is pickled."""
        if self.size == 1:
            return [item]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, item, group=self.group)
        return gathered

    def agree(self, decide: Callable[[], T]) -> T:
        """What `decide` returns in the first process; an `OpenVisionError` there is raised in all of them."""
        if self.size == 1:
            return decide()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = decide()
            except OpenVisionError as error:
                outcome[1] = str(error)
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        if outcome[1] is not None:
            error = OpenVisionError(outcome[1])
            error.alike = True
            raise error
        return outcome[0]


ALONE = World()  # one process, which holds the whole batch
