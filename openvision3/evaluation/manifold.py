"""Precision and recall of generated pictures: how many lie where the other set's pictures lie.

Source: Kynkäänniemi et al., 2019 (https://arxiv.org/abs/1904.06991), Eqs. 1-2, on Inception's pooled features as in
ADM's evaluator, where the paper has VGG16's.
"""

import torch
from torch import Tensor

from openvision3.config import OpenVisionError

K = 3
BLOCK = 2048  # pictures on either side whose distances are held at once: 34 MB
_ROUNDING = 1e-12  # of |a|^2 + |b|^2: less than what fp32 features resolve, more than the error of float64 products


def precision_recall(
    reference: Tensor, samples: Tensor, k: int = K, block: int = BLOCK, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """Precision and recall of `samples` (M, D) against `reference` (N, D), both in [0, 1].

    Precision is the share of samples within the ball of any reference picture, whose radius is the distance to its k-th
    nearest other one; recall is the share of reference pictures within any sample's ball. Exact, in float64, in blocks
    of `block` by `block` distances. Raises `OpenVisionError` where a set has no more than `k` pictures.
    """
    if min(len(reference), len(samples)) <= k:
        raise OpenVisionError(
            f"precision and recall with {k} neighbours need more than {k} pictures of either set, "
            f"got {len(reference)} and {len(samples)}"
        )
    reference_radii = _radii(reference, k, block, device)
    sample_radii = _radii(samples, k, block, device)
    in_reference = torch.zeros(len(samples), dtype=torch.bool)
    in_samples = torch.zeros(len(reference), dtype=torch.bool)
    for i in range(0, len(reference), block):
        for j in range(0, len(samples), block):
            distances = _squared_distances(reference[i : i + block], samples[j : j + block], device)
            near = distances <= reference_radii[i : i + block, None]
            in_reference[j : j + block] |= near.any(dim=0).cpu()
            near = distances <= sample_radii[None, j : j + block]
            in_samples[i : i + block] |= near.any(dim=1).cpu()
    return float(in_reference.double().mean()), float(in_samples.double().mean())


def _radii(features: Tensor, k: int, block: int, device: torch.device | str) -> Tensor:
    """Squared distance (N,) of each picture to its k-th nearest other one."""
    radii = []
    for i in range(0, len(features), block):
        nearest: Tensor | None = None  # the k + 1 smallest so far: the picture itself, at 0, is one of them
        for j in range(0, len(features), block):
            found = _squared_distances(features[i : i + block], features[j : j + block], device)
            found = found if nearest is None else torch.cat([nearest, found], dim=1)
            nearest = found.topk(min(k + 1, found.shape[1]), largest=False).values
        assert nearest is not None
        radii.append(nearest.max(dim=1).values)
    return torch.cat(radii)


def _squared_distances(a: Tensor, b: Tensor, device: torch.device | str) -> Tensor:
    """Squared Euclidean distances (N, M) of rows (N, D) and (M, D) in float64; those of equal rows are exactly 0."""
    a, b = a.to(device).double(), b.to(device).double()
    norms = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)[None]
    distances = norms - 2 * a @ b.T
    return torch.where(distances < _ROUNDING * norms, 0.0, distances)
