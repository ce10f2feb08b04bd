"""An exponential moving average of a run's weights, sharded as they are."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

WARM_UP = 10  # steps: the average of the first ones weighs them alike, or the initial weights would stay in it for long


class Average:
    """Averages of the trained ones among `parameters`, by name; `decay` is per step."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.parameters = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        self.tensors = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.dtypes = {tensor.dtype for tensor in self.tensors.values()}

    @torch.no_grad()
    def update(self, step: int, skip: Tensor) -> None:
        """Moves the averages towards the weights after optimizer step `step`, counted from 1.

        Where `skip` (fp32 scalar on the weights' device) is 1 they stay as they are; nothing waits for it.
        """
        rate = 1 - min(self.decay, step / (step + WARM_UP))
        rates = {dtype: torch.full_like(skip, rate, dtype=dtype) * (1 - skip) for dtype in self.dtypes}
        for name, average in self.tensors.items():
            average.lerp_(self.parameters[name], rates[average.dtype])

    def values(self) -> dict[str, Tensor]:
        """The averages by the parameters' names, as they are sharded."""
        return self.tensors

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The averages in the place of the weights, in the same tensors, so that whatever holds those sees them.

        A copy of the model would not do: its compiled forward can go on with the weights that it was compiled for.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self.tensors.items():
            weight = self.parameters[name].detach().clone()
            self.parameters[name].copy_(average)
            average.copy_(weight)
