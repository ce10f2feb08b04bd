"""Eq. 3's random draws, each a function of (seed, position) alone: the same in any batch, process or resumed run."""

from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def draw_noise(
    seed: int, positions: Sequence[int], shape: Sequence[int], tau: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Draws sigma ~ U[0, tau] (B,) and epsilon ~ N(0, I) (B, *shape), fp32, for the samples at `positions`.

    The numbers differ between kinds of device, whose generators differ. Source: OpenVision 3, Eq. 3.
    """
    generator = torch.Generator(device)
    sigma = torch.empty(len(positions), device=device)
    epsilon = torch.empty(len(positions), *shape, device=device)
    for row, position in enumerate(positions):
        generator.manual_seed(mixed_seed(seed, position))
        sigma[row].uniform_(0, tau, generator=generator)
        epsilon[row].normal_(generator=generator)
    return sigma, epsilon


def mixed_seed(seed: int, position: int) -> int:
    """A generator's seed (63 bits) from the pair; neighbours get unrelated streams (SplitMix64: Steele, 2014)."""
    value = seed & _MASK
    for word in (position, 1):
        value = (value + 0x9E3779B97F4A7C15 + word) & _MASK
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
        value ^= value >> 31
    return value >> 1
