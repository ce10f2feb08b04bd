"""What a batch is generated from: class labels, or the embedding and tokens of a text."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from openvision3.config import OpenVisionError
from openvision3.generation.config import GeneratorConfig


@dataclass(frozen=True)
class Condition:
    """The conditions of a batch: `labels`, or `pooled` with or without `tokens` and `mask`.

    Where `null` is true, all else of that sample is ignored: the network sees its null condition.
    """

    labels: Tensor | None = None  # (B,) int64; num_classes is the null class
    pooled: Tensor | None = None  # (B, E): pooled text embedding
    tokens: Tensor | None = None  # (B, L, W): features of text tokens
    mask: Tensor | None = None  # (B, L) bool: true where there is a text token, false for padding
    null: Tensor | None = None  # (B,) bool; None: false for all

    @property
    def given(self) -> Tensor:
        """The labels, or the pooled embeddings: whichever there is."""
        present = self.labels if self.labels is not None else self.pooled
        assert present is not None, "a condition needs labels or pooled embeddings"
        return present

    @property
    def size(self) -> int:
        """Samples of the batch."""
        return self.given.shape[0]

    @property
    def is_null(self) -> Tensor:
        """(B,) bool, as `null` says."""
        if self.null is not None:
            return self.null
        return torch.zeros(self.size, dtype=torch.bool, device=self.given.device)

    def rows(self, index: slice | Tensor) -> "Condition":
        """Those samples of the batch."""
        return Condition(**{name: value[index] for name, value in self._tensors().items()})

    def to(self, device: torch.device | str) -> "Condition":
        """The same on a device."""
        return Condition(**{name: value.to(device, non_blocking=True) for name, value in self._tensors().items()})

    def nulled(self, where: Tensor) -> "Condition":
        """The same, null in the samples where `where` (B,) is true."""
        return Condition(**self._tensors() | {"null": self.is_null | where})

    def repeated(self, times: int) -> "Condition":
        """Each sample `times` times in a row."""
        return Condition(**{name: value.repeat_interleave(times, dim=0) for name, value in self._tensors().items()})

    def as_null(self) -> "Condition":
        """The null condition of as many samples, with tensors of the same shapes."""
        return Condition(**self._tensors() | {"null": torch.ones_like(self.is_null)})

    def _tensors(self) -> dict[str, Tensor]:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def concatenate(conditions: Sequence[Condition]) -> Condition:
    """The conditions of several batches as one; all must hold the same tensors, of the same text length."""
    whole = [condition._tensors() | {"null": condition.is_null} for condition in conditions]
    return Condition(**{name: torch.cat([part[name] for part in whole]) for name in whole[0]})


def check_condition(config: GeneratorConfig, condition: Condition, batch: int) -> None:
    """Raises `OpenVisionError` where a condition does not fit a generator of this config, or a batch of that size."""
    if config.condition == "class":
        if condition.labels is None:
            raise OpenVisionError("this generator takes class labels: Condition(labels=...)")
        expected: dict[str, tuple[int, ...]] = {"labels": (batch,)}
    else:
        if condition.pooled is None or (config.text_width and (condition.tokens is None or condition.mask is None)):
            parts = "pooled=..., tokens=..., mask=..." if config.text_width else "pooled=..."
            raise OpenVisionError(f"this generator takes texts: Condition({parts})")
        expected = {"pooled": (batch, config.text_embed_dim)}
        if config.text_width:
            assert condition.tokens is not None
            length = condition.tokens.shape[1]
            expected |= {"tokens": (batch, length, config.text_width), "mask": (batch, length)}
    if condition.null is not None:
        expected["null"] = (batch,)
    for name, shape in expected.items():
        if tuple(getattr(condition, name).shape) != shape:
            raise OpenVisionError(f"condition: {name} must be {shape}, got {tuple(getattr(condition, name).shape)}")
