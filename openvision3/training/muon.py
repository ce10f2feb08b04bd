"""Muon for weight matrices and AdamW for the rest, as one optimizer (an alternative to the paper's AdamW).

Muon replaces a matrix's momentum by the nearest semi-orthogonal matrix, so that all directions move alike. Source:
K. Jordan et al., https://kellerjordan.github.io/posts/muon (2024); the scale that lets it share AdamW's learning rate
is Moonlight's, arXiv 2502.16982, section 2.2.
"""

from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from openvision3.training.parallel import sharded_like, whole_tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration: steepest at zero
_STEPS = 5
_RMS = 0.2  # of an entry's update, AdamW's typical one


class MuonWithAdamW(torch.optim.Optimizer):
    """Groups with `matrices` true hold weight matrices, stepped by Muon (Nesterov momentum); the others by AdamW.

    A matrix may stack several maps, as queries, keys and values do: a group's `parts` says how many.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], betas: tuple[float, float], eps: float, momentum: float = 0.95
    ):
        defaults = {"lr": 0.0, "betas": betas, "eps": eps, "momentum": momentum, "weight_decay": 0.0}
        super().__init__(groups, defaults | {"matrices": False, "parts": 1})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            (self._muon if group["matrices"] else self._adamw)(group, parameters)

    def _muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for shape in sorted({tuple(parameter.shape) for parameter in parameters}):
            same = [parameter for parameter in parameters if tuple(parameter.shape) == shape]
            updates = []
            for parameter in same:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                assert parameter.grad is not None
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                updates.append(whole_tensor(parameter.grad.lerp(state["momentum"], group["momentum"])))
            stacked = torch.stack(updates).reshape(len(same) * group["parts"], -1, shape[1])
            directions = orthogonalise(stacked).reshape(len(same), *shape)
            scale = _RMS * max(stacked.shape[1:]) ** 0.5
            for parameter, direction in zip(same, directions, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                direction = sharded_like(direction.to(parameter.dtype), parameter)
                parameter.add_(direction, alpha=-group["lr"] * scale)

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        if not parameters:
            return
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=False,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


@cache
def _amx() -> bool:
    """Whether the processor has tiles for products in bf16 (Linux)."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False


def orthogonalise(matrices: Tensor) -> Tensor:
    """(N, m, n) -> near the nearest semi-orthogonal matrix of each, singular values within about [0.7, 1.2].

    In bf16, as its source; in fp32 on CPUs without AMX, whose products in bf16 are slower.
    """
    a, b, c = _COEFFICIENTS
    x = matrices.to(torch.float32 if matrices.is_cpu and not _amx() else torch.bfloat16)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
