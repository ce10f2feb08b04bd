"""Exact statistics of unified tokens over a data set, and the normalisation by them."""

import hashlib

import torch
from torch import Tensor, nn

from openvision3.config import OpenVisionError


class TokenStatistics:
    """Mean and variance of each element of token grids (N, D), accumulated in fp64.

    Batches and parts are merged by the formula of Chan, Golub and LeVeque (1979), so the result does not depend on how
    the data is cut, beyond rounding. The variance is the population's.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None  # (N, D)
        self._squares: Tensor | None = None  # (N, D): sum of squared differences from the mean

    @torch.no_grad()
    def update(self, tokens: Tensor) -> None:
        """Adds tokens (B, N, D); raises `OpenVisionError` where their shape differs or one is not finite."""
        if tokens.ndim != 3:
            raise OpenVisionError(f"expected tokens (B, N, D), got {tuple(tokens.shape)}")
        if not len(tokens):
            return
        values = (tokens.cpu() if tokens.device.type == "mps" else tokens).double()  # MPS has no fp64
        mean = values.mean(dim=0)
        squares = (values - mean).square().sum(dim=0)
        if not (squares.isfinite() & mean.isfinite()).all():
            raise OpenVisionError("tokens that are not finite: statistics of them would be worthless")
        self._add(len(values), mean, squares)

    def merge(self, other: "TokenStatistics") -> None:
        """Adds what another part has seen."""
        if other._mean is not None and other._squares is not None:
            self._add(other.count, other._mean, other._squares)

    def _add(self, count: int, mean: Tensor, squares: Tensor) -> None:
        if self._mean is None or self._squares is None:
            self.count, self._mean, self._squares = count, mean.clone(), squares.clone()
            return
        if mean.shape != self._mean.shape:
            raise OpenVisionError(
                f"token grids {tuple(mean.shape)} among others of {tuple(self._mean.shape)}: statistics are of one size"
            )
        total = self.count + count
        difference = mean.to(self._mean.device) - self._mean
        self._mean += difference * (count / total)
        self._squares += squares.to(self._mean.device) + difference.square() * (self.count * (count / total))
        self.count = total

    @property
    def mean(self) -> Tensor:
        """(N, D) in fp64; raises `OpenVisionError` where nothing was seen."""
        return self._seen()[0].clone()

    @property
    def std(self) -> Tensor:
        """(N, D) in fp64, of the population; raises `OpenVisionError` where nothing was seen."""
        return (self._seen()[1] / self.count).sqrt()

    def state(self) -> dict[str, Tensor]:
        """All there is, as tensors on the CPU that safetensors can hold."""
        mean, squares = self._seen()
        return {
            "count": torch.tensor([self.count], dtype=torch.int64),
            "mean": mean.cpu().clone(),
            "squares": squares.cpu().clone(),
        }

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> "TokenStatistics":
        """The inverse of `state`; raises `OpenVisionError` for anything else."""
        if set(state) != {"count", "mean", "squares"}:
            raise OpenVisionError(f"expected count, mean and squares, got {', '.join(sorted(state)) or 'nothing'}")
        mean, squares, count = state["mean"], state["squares"], state["count"]
        if mean.ndim != 2 or mean.shape != squares.shape or count.numel() != 1 or count.item() < 1:
            raise OpenVisionError(
                f"statistics of shapes {tuple(mean.shape)} and {tuple(squares.shape)}, count {count.tolist()}: "
                "expected two equal (N, D) and a positive count"
            )
        statistics = cls()
        statistics._add(int(count.item()), mean.double(), squares.double())
        return statistics

    def _seen(self) -> tuple[Tensor, Tensor]:
        if self._mean is None or self._squares is None:
            raise OpenVisionError("no tokens were seen, so there are no statistics")
        return self._mean, self._squares


class Normalizer(nn.Module):
    """Tokens in units of their standard deviation around their mean, element by element; buffers `mean` and `std`."""

    def __init__(self, mean: Tensor, std: Tensor, eps: float = 1e-5):
        """`mean` and `std` (N, D); deviations below `eps` count as `eps`, so that constant elements stay finite."""
        super().__init__()
        if mean.ndim != 2 or mean.shape != std.shape:
            raise OpenVisionError(f"mean {tuple(mean.shape)} and std {tuple(std.shape)} must be two equal (N, D)")
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", mean.detach().float().clone())
        self.register_buffer("std", std.detach().clamp(min=eps).float().clone())

    @classmethod
    def of(cls, statistics: TokenStatistics, eps: float = 1e-5) -> "Normalizer":
        """The normaliser of a data set's tokens."""
        return cls(statistics.mean.cpu(), statistics.std.cpu(), eps)

    def fingerprint(self) -> str:
        """sha256 (hex) of mean and standard deviation."""
        both = torch.stack([self.mean, self.std]).cpu().numpy()
        return hashlib.sha256(both.tobytes()).hexdigest()

    def normalize(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, D) -> the same, normalised, in fp32; raises `OpenVisionError` for another grid."""
        return (self._fitting(tokens).float() - self.mean) / self.std

    def denormalize(self, tokens: Tensor) -> Tensor:
        """Normalised tokens (B, N, D) -> tokens, in fp32; raises `OpenVisionError` for another grid."""
        return torch.addcmul(self.mean, self._fitting(tokens).float(), self.std)

    def _fitting(self, tokens: Tensor) -> Tensor:
        if tokens.shape[-2:] != self.mean.shape:
            raise OpenVisionError(f"tokens {tuple(tokens.shape)}, but the statistics are of {tuple(self.mean.shape)}")
        return tokens
