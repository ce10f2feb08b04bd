"""An exponential moving average of a run's weights, sharded as they are."""

from collections.abc import Collection

import torch
from torch import Tensor

from openvision3.config import ModelPart
from openvision3.model.openvision3 import OpenVision3
from openvision3.training.frozen import part_of

WARM_UP = 10  # steps: the average of the first ones weighs them alike, or the initial weights would stay in it for long


class Average:
    """Averages of the trained parameters, by name; `decay` is per step."""

    def __init__(self, model: OpenVision3, decay: float, frozen: Collection[ModelPart]) -> None:
        self.decay = decay
        self.parameters = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and part_of(name) not in frozen
        }
        self.tensors = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the averages towards the weights after optimizer step `step`, counted from 1."""
        decay = min(self.decay, step / (step + WARM_UP))
        for name, average in self.tensors.items():
            average.lerp_(self.parameters[name], 1 - decay)

    def values(self) -> dict[str, Tensor]:
        """The averages by the parameters' names, as they are sharded."""
        return self.tensors
