"""The processes that share a global batch, and what they exchange for its losses."""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


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


ALONE = World()  # one process, which holds the whole batch
