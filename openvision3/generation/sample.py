"""Drawing tokens from a generator: each sample's noise is a function of (seed, its index) alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from openvision3.config import OpenVisionError
from openvision3.generation.condition import Condition
from openvision3.generation.dit import DiT
from openvision3.generation.flow import Guidance, guided, integrate, time_grid, token_shift
from openvision3.generation.inference import evaluator
from openvision3.generation.statistics import Normalizer
from openvision3.training.noise import mixed_seed


@dataclass(frozen=True)
class SamplerConfig:
    """How the path from noise to tokens is followed."""

    steps: int = 50  # of the solver, to t = 0
    solver: Literal["euler", "heun"] = "euler"
    guidance: float = 1.0  # scale of classifier-free guidance, or of autoguidance with a weak generator; 1: none
    guidance_from: float = 0.0  # guided while t is in this interval (1 is noise)
    guidance_to: float = 1.0


def check_sampler(config: SamplerConfig) -> None:
    """Raises `OpenVisionError` for values without meaning."""
    if not 1 <= config.steps <= 100_000:
        raise OpenVisionError(f"steps is {config.steps}: expected 1 to 100,000")
    if not 0 <= config.guidance_from <= config.guidance_to <= 1:
        raise OpenVisionError(
            f"guidance_from is {config.guidance_from:g} and guidance_to {config.guidance_to:g}: "
            "expected 0 <= guidance_from <= guidance_to <= 1"
        )


def initial_noise(seed: int, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
    """N(0, I) (B, *shape), fp32, drawn on the CPU, so that no device changes the k-th picture of a seed."""
    generator = torch.Generator()
    noise = torch.empty(len(indices), *shape)
    for row, index in enumerate(indices):
        noise[row].normal_(generator=generator.manual_seed(mixed_seed(seed, index)))
    return noise


@torch.no_grad()
def sample(
    dit: DiT,
    normalizer: Normalizer,
    condition: Condition,
    indices: Sequence[int],
    seed: int,
    config: SamplerConfig = SamplerConfig(),
    weak: DiT | None = None,
) -> Tensor:
    """Tokens (B, N, D), fp32, not normalised, for `condition` and the samples `indices` of `seed`.

    `weak`: a weaker generator of the same tokens, for autoguidance (Karras et al., arXiv 2406.02507). Runs on the
    generator's device; the result depends on the batch by rounding alone.
    """
    check_sampler(config)
    grid, width = dit.config.grid, dit.config.token_width
    shape = (grid[0] * grid[1], width)
    device = normalizer.mean.device
    noise = initial_noise(seed, indices, shape).to(device)
    kind = "cfg" if weak is None else "auto"
    guidance = Guidance(config.guidance, (config.guidance_from, config.guidance_to), kind)
    velocity = guided(evaluator(dit), condition, guidance, None if weak is None else evaluator(weak))
    x = integrate(velocity, noise, time_grid(config.steps, token_shift(*shape)), config.solver)
    return normalizer.denormalize(x.float())
