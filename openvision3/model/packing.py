"""Texts without their padding: rows of real tokens alone go through all that works on one token at a time.

Most of a text tower's work (projections, MLPs, norms, the output layer) treats each token by itself, and texts are
mostly padding. A `Packing` says which positions of padded texts (B, L) are rows of a packed matrix (T, W); attention,
which needs whole texts, gets them unpacked (zeros at the padding, which is masked or later than all real tokens).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Which tokens of texts (B, L) are packed: T positions, text by text."""

    source: Tensor  # (T,) int64: b * L + l of each packed token in the ids
    columns: Tensor  # (T,) int64: l of each
    index: Tensor  # (T,) int64: b * L' + l' in the texts as unpacked, without columns that no text uses
    used: Tensor  # bool (B, L'): positions that are real tokens

    @classmethod
    def of(cls, used: Tensor, multiple: int = 1) -> "Packing":
        """Of the positions that are true in `used`, bool (B, L), on the CPU: elsewhere this would wait for the device.

        The numbers of rows and of columns are rounded up to a multiple, with padding, so that a device meets few
        different shapes.
        """
        keep = _some(used.any(dim=0), multiple)
        columns = keep.nonzero()[:, 0]
        trimmed = used[:, columns]
        rows = _some(trimmed.flatten(), multiple)
        index = rows.nonzero()[:, 0]
        text, column = index // len(columns), columns[index % len(columns)]
        return cls(text * used.shape[1] + column, column, index, trimmed)

    def to(self, device: torch.device) -> "Packing":
        """On another device, without waiting for the copies."""

        def moved(tensor: Tensor) -> Tensor:
            return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

        return Packing(moved(self.source), moved(self.columns), moved(self.index), moved(self.used))

    def pack(self, x: Tensor) -> Tensor:
        """(B, L', ...) -> (T, ...)"""
        return x.flatten(0, 1).index_select(0, self.index)

    def unpack(self, x: Tensor) -> Tensor:
        """(T, W) -> (B, L', W), zeros elsewhere."""
        batch, length = self.used.shape
        return x.new_zeros(batch * length, x.shape[1]).index_copy(0, self.index, x).view(batch, length, -1)

    def take(self, values: Tensor) -> Tensor:
        """The packed tokens' entries of `values` (B, L), such as the ids: (T,)."""
        return values.flatten().index_select(0, self.source)

    def after(self, prefix: int) -> "Packing":
        """The packing of the same texts, each behind `prefix` tokens that are all used; for `pack` and `unpack`."""
        batch, length = self.used.shape
        used = torch.cat([self.used.new_ones(batch, prefix), self.used], dim=1)
        total = prefix + length
        starts = torch.arange(batch, device=used.device)[:, None] * total
        ahead = (starts + torch.arange(prefix, device=used.device)).flatten()
        behind = self.index + (self.index // length + 1) * prefix
        return replace(self, index=torch.cat([ahead, behind]), used=used)


def up_to_last(used: Tensor) -> Tensor:
    """bool (B, L), true up to each row's last true position: a pad id inside a text is one of its tokens."""
    return used.flip(1).cummax(dim=1).values.flip(1)


def _some(used: Tensor, multiple: int) -> Tensor:
    """`used` (N,) with its first unused entries set, up to a multiple of as many (at most all, at least one)."""
    count = int(used.sum())
    wanted = min(len(used), -(-max(count, 1) // multiple) * multiple)
    return used | ((~used).cumsum(0) <= wanted - count)
