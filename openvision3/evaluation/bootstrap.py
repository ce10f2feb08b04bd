"""The kernel distance of two whole sets of pictures, with an interval: how far their choice moves it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from openvision3.config import OpenVisionError

MOST = 10_000  # pictures of a set; of larger ones a seeded choice
REPLICATES = 1000
_BLOCK = 2000  # rows of the kernel matrix held at once


@dataclass(frozen=True)
class KernelEstimate:
    """Unbiased kernel distance of n and m pictures, and the ends of its bootstrap interval."""

    value: float
    low: float
    high: float
    n: int
    m: int


def kernel_estimate(
    a: Tensor, b: Tensor, level: float = 0.95, replicates: int = REPLICATES, most: int = MOST, seed: int = 0
) -> KernelEstimate:
    """Kernel distance of features (N, D) and (M, D), the unbiased squared MMD of the cubic kernel, over all pairs.

    The interval is the percentile bootstrap's: each replicate draws as many pictures of either set, with repetition; a
    picture is never paired with itself, so that replicates are centred on the value. Slightly negative values are in
    order: it is unbiased. Computed in float64, on at most `most` pictures a set. Raises `OpenVisionError` below 2.
    Source: Binkowski et al., 2018 (https://arxiv.org/abs/1801.01401), Eq. 4.
    """
    if min(len(a), len(b)) < 2:
        raise OpenVisionError(f"a kernel distance needs at least 2 pictures of either set, got {len(a)} and {len(b)}")
    generator = torch.Generator().manual_seed(seed)
    a, b = (_chosen(features, most, generator).double() for features in (a, b))
    # column 0: each picture once, which gives the value itself
    weights_a, weights_b = (_weights(len(features), replicates, generator) for features in (a, b))
    within = _mean_of_pairs(a, weights_a) + _mean_of_pairs(b, weights_b)
    values = within - 2 * _weighted_sums(a, weights_a, b, weights_b) / (len(a) * len(b))
    tail = (1 - level) / 2
    ends = values[1:].quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return KernelEstimate(float(values[0]), float(ends[0]), float(ends[1]), len(a), len(b))


def _chosen(features: Tensor, most: int, generator: torch.Generator) -> Tensor:
    if len(features) <= most:
        return features
    return features[torch.randperm(len(features), generator=generator)[:most]]


def _weights(count: int, replicates: int, generator: torch.Generator) -> Tensor:
    """How often each picture is drawn (count, 1 + replicates); in the first column, once."""
    drawn = torch.randint(count, (replicates, count), generator=generator)
    counts = torch.stack([torch.bincount(row, minlength=count) for row in drawn])
    return torch.cat([torch.ones(1, count), counts]).double().T.contiguous()


def _mean_of_pairs(x: Tensor, weights: Tensor) -> Tensor:
    """Mean kernel of the pairs of different pictures (R,), each pair as often as it was drawn."""
    own = (x.square().sum(dim=1) / x.shape[1] + 1) ** 3
    squares = weights.square()
    sums = _weighted_sums(x, weights, x, weights) - own @ squares
    return sums / (weights.sum(dim=0).square() - squares.sum(dim=0)).clamp(min=1)


def _weighted_sums(x: Tensor, weights_x: Tensor, y: Tensor, weights_y: Tensor) -> Tensor:
    """Sums of the weighted kernel matrix (R,), a block of its rows at a time."""
    sums = torch.zeros(weights_x.shape[1], dtype=torch.float64)
    for start in range(0, len(x), _BLOCK):
        rows = slice(start, start + _BLOCK)
        kernel = (x[rows] @ y.T / x.shape[1] + 1) ** 3
        sums += (weights_x[rows] * (kernel @ weights_y)).sum(dim=0)
    return sums
