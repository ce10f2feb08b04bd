"""Flow matching on normalised tokens: path, loss, time shift, solvers and guidance (RAE, arXiv 2510.11690).

Time 1 is noise, time 0 is tokens: x_t = (1 - t) x + t eps, with the velocity v = eps - x.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from openvision3.config import OpenVisionError
from openvision3.generation.condition import Condition, concatenate
from openvision3.generation.layers import at_least_fp32

Model = Callable[[Tensor, Tensor, Condition], Tensor]
"""Noisy tokens (B, N, D), times (B,), the condition -> velocity (B, N, D)."""

Velocity = Callable[[Tensor, Tensor], Tensor]
"""Noisy tokens (B, ...), times (B,) -> velocity (B, ...)."""

Solver = Literal["euler", "heun"]

SHIFT_BASE = 4096  # numbers of a picture for which the times are not shifted


def shift(t: Tensor, s: float) -> Tensor:
    """Times in [0, 1] moved towards noise: s t / (1 + (s - 1) t), which keeps 0 and 1 (SD3, arXiv 2403.03206, Eq. 23).

    Raises `OpenVisionError` for s that is not positive.
    """
    if not 0 < s < math.inf:
        raise OpenVisionError(f"time shift {s} must be positive")
    return s * t / (s * t + (1 - t))  # in this form 0 and 1 stay exactly themselves


def token_shift(tokens: int, width: int) -> float:
    """The shift s = sqrt(tokens * width / 4096) of that many numbers a picture: 6.93 for 16x16 tokens of 768."""
    return math.sqrt(tokens * width / SHIFT_BASE)


def training_times(normal: Tensor, s: float) -> Tensor:
    """Times in (0, 1) of normal draws: logit-normal(0, 1), then shifted."""
    return shift(normal.sigmoid(), s)


def path(tokens: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """The point x_t (B, N, D) at times (B,) between normalised tokens and noise, and its velocity eps - x."""
    t = times.to(tokens.dtype).view(-1, *[1] * (tokens.ndim - 1))
    return torch.lerp(tokens, noise, t), noise - tokens


def velocity_loss(model: Model, tokens: Tensor, noise: Tensor, times: Tensor, condition: Condition) -> Tensor:
    """Mean squared error of the velocity of each sample (B,), in fp32 at least, with the gradient.

    Tokens are normalised, (B, N, D). A batch's loss is the mean of these: parts of a batch sum theirs and divide by the
    whole batch's count.
    """
    noisy, target = path(at_least_fp32(tokens), at_least_fp32(noise), times)
    error = at_least_fp32(model(noisy, times, condition)) - target
    return error.square().flatten(1).mean(dim=1)


def time_grid(steps: int, s: float) -> Tensor:
    """The times of a sampler (steps + 1), fp64: equal steps from 1 to exactly 0, shifted.

    Raises `OpenVisionError` for fewer steps than one.
    """
    if steps < 1:
        raise OpenVisionError(f"sampling takes at least 1 step, got {steps}")
    return shift(torch.arange(steps, -1, -1, dtype=torch.float64) / steps, s)


@torch.no_grad()
def integrate(velocity: Velocity, noise: Tensor, times: Tensor, solver: Solver = "euler") -> Tensor:
    """Follows the velocity from noise (B, ...) at times[0] to times[-1], in fp32 at least.

    "euler" takes one evaluation a step and is of first order; "heun" takes two and is of second order to the end, since
    the velocity is finite at 0. Raises `OpenVisionError` for another solver.
    """
    if solver not in ("euler", "heun"):
        raise OpenVisionError(f"no solver {solver!r}: use euler or heun")
    x = at_least_fp32(noise)
    points: list[float] = times.tolist()

    def evaluate(state: Tensor, time: float) -> Tensor:
        at = torch.full((state.shape[0],), time, dtype=state.dtype, device=state.device)
        return velocity(state, at).to(state.dtype)

    for start, end in zip(points, points[1:], strict=False):
        slope = evaluate(x, start)
        ahead = x + (end - start) * slope
        x = ahead if solver == "euler" else x + (end - start) / 2 * (slope + evaluate(ahead, end))
    return x


@dataclass(frozen=True)
class Guidance:
    """How far the velocity is pushed away from a worse one; raises `OpenVisionError` for impossible values."""

    scale: float = 1.0  # 1: not at all
    interval: tuple[float, float] = (0.0, 1.0)  # times at which it is, both ends included (arXiv 2404.07724)
    kind: Literal["cfg", "auto"] = "cfg"  # the worse one: of the null condition, or of a weak model (arXiv 2406.02507)

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise OpenVisionError(f"guidance interval {self.interval} must be two rising times in [0, 1]")
        if not math.isfinite(self.scale):
            raise OpenVisionError(f"guidance scale {self.scale} must be finite")
        if self.kind not in ("cfg", "auto"):
            raise OpenVisionError(f"no guidance {self.kind!r}: use cfg or auto")

    def active(self, t: Tensor) -> bool:
        """Whether a batch's times (B,), which are all the same, lie in the interval."""
        if self.scale == 1:
            return False
        low, high = torch.tensor(self.interval, dtype=t.dtype).tolist()  # rounded as the times are
        return low <= t[0].item() <= high


def guided(model: Model, condition: Condition, guidance: Guidance, weak: Model | None = None) -> Velocity:
    """The guided velocity worse + scale * (model - worse) of a batch, for `integrate`.

    In the interval, "cfg" runs conditional and null samples as one batch of twice the size, and "auto" runs the `weak`
    model on the same condition; outside, the model runs alone. Raises `OpenVisionError` for "auto" without a weak one.
    """
    if guidance.kind == "auto" and guidance.scale != 1 and weak is None:
        raise OpenVisionError("autoguidance needs a weak model, such as a smaller one early in its training")
    cfg = guidance.kind == "cfg" and guidance.scale != 1
    both = concatenate([condition, condition.as_null()]) if cfg else condition

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        if not guidance.active(t):
            return model(x, t, condition)
        if guidance.kind == "cfg":
            good, worse = at_least_fp32(model(torch.cat([x, x]), torch.cat([t, t]), both)).chunk(2)
        else:
            assert weak is not None
            good, worse = at_least_fp32(model(x, t, condition)), at_least_fp32(weak(x, t, condition))
        return worse + guidance.scale * (good - worse)

    return velocity
