"""Group norm, with or without SiLU behind it, of frozen weights on pictures that lie channels last.

Statistics are taken about a value near each channel's mean, in fp32 at least: PyTorch's own kernel for such pictures
subtracts E[x]^2 from E[x^2] on a CPU, and rounds both to bf16 in bf16, which costs digits where the mean is large
against the standard deviation. The backward pass keeps the input alone, where autograd keeps the normed picture too.

Each direction is two passes over the picture: as PyTorch compiles them (`compiled`), or else on a CPU by its kernels of
batch norm, which map each channel by given statistics.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements that are worked on at once where PyTorch does not compile: on a CPU a few fp32 copies of them fit its cache,
# elsewhere they bound the memory.
_CPU_BLOCK, _DEVICE_BLOCK = 2**18, 2**26

_MOMENT_PIXELS = 2048  # of which PyTorch sums up the moments at once: fewer cost time, more cost digits
_PIVOT_PIXELS = 64  # whose mean is the value that sums are taken about


@dataclass(frozen=True)
class GroupNorm:
    """A group norm with frozen weights, fp32 at least, and SiLU behind it where `silu` is set."""

    groups: int
    weight: Tensor  # (C,)
    bias: Tensor  # (C,)
    eps: float
    silu: bool
    compiled: bool  # by PyTorch: the first calls are slow

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape and type, channels last."""
        return _Norm.apply(x, self)


class _Norm(torch.autograd.Function):
    """Keeps its input and each channel's statistics; what SiLU's gradient needs is computed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: GroupNorm) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        moments = _map_moments(x, layer) if _uses_maps(x, layer) else _row_moments(channel_rows(x), layer)
        mean, rstd = _statistics(*moments, layer)
        ctx.layer = layer
        ctx.save_for_backward(x, mean, rstd)
        scale = rstd * layer.weight
        if _uses_maps(x, layer):
            normed = _map_channels(x, mean, scale, layer.bias.expand_as(scale))
            return F.silu(normed, inplace=True) if layer.silu else normed
        return picture(_passes(_normed, (channel_rows(x),), (mean, scale, layer.bias), layer), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        layer, gradient = ctx.layer, gradients[0].contiguous(memory_format=torch.channels_last)
        x, mean, rstd = ctx.saved_tensors
        scale, maps = rstd * layer.weight, _uses_maps(x, layer)
        rows = channel_rows(gradient), channel_rows(x)
        if maps:
            if layer.silu:
                normed = _map_channels(x, mean, scale, layer.bias.expand_as(scale))
                gradient = torch.ops.aten.silu_backward(gradient, normed)
            total, with_normed = _map_sums(gradient, x, mean, rstd)
        else:
            total, with_normed = _sums(_gradient_sums, rows, (mean, scale, layer.bias), layer)
            with_normed = with_normed * rstd
        # dx = rstd * (g w - mean(g w) - normed * mean(g w normed)), means over a group's channels and pixels
        pixels = rows[1].shape[1]
        slope = -rstd * rstd * _over_group(with_normed * layer.weight, layer.groups) / pixels
        offset = -rstd * _over_group(total * layer.weight, layer.groups) / pixels
        if maps:
            zeros = torch.zeros_like(mean)
            return _map_channels(gradient, zeros, scale, offset).add_(_map_channels(x, mean, slope, zeros)), None
        return picture(_passes(_gradient_pass, rows, (mean, scale, layer.bias, slope, offset), layer), x), None


def _uses_maps(x: Tensor, layer: GroupNorm) -> bool:
    return x.device.type == "cpu" and not layer.compiled


def _map_channels(x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """(x - mean) * scale + bias with values (B, C): what batch norm makes of given statistics."""
    ones = torch.ones_like(mean[0])
    samples = zip(x.split(1), mean, scale, bias, strict=True)
    found = [F.batch_norm(part, at, ones, factor, shift, eps=0.0) for part, at, factor, shift in samples]
    return found[0] if len(found) == 1 else torch.cat(found)


def _map_sums(gradient: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over pixels of the gradient, and of its product with (x - mean) * rstd, (B, C) each.

    They are batch norm's gradients by its bias and its weight.
    """
    ones, backward = torch.ones_like(mean[0]), torch.ops.aten.native_batch_norm_backward
    samples = zip(gradient.split(1), x.split(1), mean, rstd, strict=True)
    found = [
        backward(of_normed, part, ones, None, None, at, factor, True, 0.0, [False, True, True])
        for of_normed, part, at, factor in samples
    ]
    return torch.stack([total for _, _, total in found]), torch.stack([product for _, product, _ in found])


def _map_moments(x: Tensor, layer: GroupNorm) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel's pixels, (B, C) each, from batch norm's statistics of a few rows at a time.

    Its sums are plain ones, and lose digits over many pixels; those of parts are put together in fp64.
    """
    samples, _, height, width = x.shape
    dtype = layer.weight.dtype
    zeros, ones = torch.zeros_like(layer.weight), torch.ones_like(layer.weight)  # fp32, so that the results are too
    parts = x.split(max(1, _MOMENT_PIXELS // width), dim=2)
    found = [[torch.batch_norm_update_stats(one, zeros, ones, 0.0) for one in part.split(1)] for part in parts]
    means = torch.stack([torch.stack([mean for mean, _ in part]) for part in found]).double()
    variances = torch.stack([torch.stack([variance for _, variance in part]) for part in found]).double()
    shares = torch.tensor([part.shape[2] / height for part in parts], dtype=torch.float64)[:, None, None]
    mean = (means * shares).sum(dim=0)
    variance = ((variances + (means - mean).square()) * shares).sum(dim=0)
    assert len(mean) == samples
    return mean.to(dtype), variance.to(dtype)


def _row_moments(rows: Tensor, layer: GroupNorm) -> tuple[Tensor, Tensor]:
    """The same of rows (B, N, C), from sums about a value near the mean."""
    pixels = rows.shape[1]
    pivot = rows[:, :: max(1, pixels // _PIVOT_PIXELS)].to(layer.weight.dtype).mean(dim=1)
    total, squares = _sums(_moments, (rows,), (pivot,), layer)
    beyond = total / pixels
    return pivot + beyond, (squares / pixels - beyond.square()).clamp(min=0)


def _statistics(of_channel: Tensor, within: Tensor, layer: GroupNorm) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal standard deviation of each channel's group, (B, C), from its channels' own moments."""
    mean = _over_group(of_channel, layer.groups)
    variance = _over_group(within + (of_channel - mean).square(), layer.groups)
    return mean, (variance + layer.eps).rsqrt()


def _over_group(values: Tensor, groups: int) -> Tensor:
    """(B, C) -> each channel's mean over its group, (B, C)."""
    grouped = values.view(len(values), groups, -1)
    return grouped.mean(dim=2, keepdim=True).expand_as(grouped).reshape(values.shape)


def channel_rows(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C), the same memory where x lies channels last."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, x.shape[1])


def picture(rows: Tensor, like: Tensor) -> Tensor:
    """`channel_rows` undone: (B, H * W, C) -> (B, C, H, W) of the shape of `like`, channels last."""
    batch, channels, height, width = like.shape
    return rows.reshape(batch, height, width, channels).permute(0, 3, 1, 2)


# Functions of rows (B, N, C) and of values of each channel, (B, C); compiled, or called block by block.


def _centred(rows: Tensor, mean: Tensor) -> Tensor:
    if rows.device.type == "cpu" and rows.dtype != mean.dtype:  # operations on two types are slow there
        return rows.to(mean.dtype).sub_(mean[:, None])
    return rows - mean[:, None]


def _moments(rows: Tensor, pivot: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    values = _centred(rows, pivot)
    return values.sum(dim=1), values.square_().sum(dim=1)


def _normed(rows: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, silu: bool) -> Tensor:
    values = _centred(rows, mean).mul_(scale[:, None]).add_(bias)
    return (F.silu(values, inplace=True) if silu else values).to(rows.dtype)


def _of_normed(gradient: Tensor, centred: Tensor, scale: Tensor, bias: Tensor, silu: bool) -> Tensor:
    """The gradient by the normed picture."""
    gradient = gradient.to(centred.dtype)
    if not silu:
        return gradient
    return torch.ops.aten.silu_backward(gradient, (centred * scale[:, None]).add_(bias))


def _gradient_sums(
    gradient: Tensor, rows: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, silu: bool
) -> tuple[Tensor, Tensor]:
    centred = _centred(rows, mean)
    of_normed = _of_normed(gradient, centred, scale, bias, silu)
    return of_normed.sum(dim=1), centred.mul_(of_normed).sum(dim=1)


def _gradient_pass(
    gradient: Tensor,
    rows: Tensor,
    mean: Tensor,
    scale: Tensor,
    bias: Tensor,
    slope: Tensor,
    offset: Tensor,
    silu: bool,
) -> Tensor:
    centred = _centred(rows, mean)
    of_normed = _of_normed(gradient, centred, scale, bias, silu)
    return centred.mul_(slope[:, None]).add_(of_normed * scale[:, None]).add_(offset[:, None]).to(rows.dtype)


def _sums(
    function: Callable[..., tuple[Tensor, Tensor]],
    rows: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
    layer: GroupNorm,
) -> tuple[Tensor, Tensor]:
    """Two sums over the pixels, (B, C) each."""
    if layer.compiled:
        return _compiled(function)(*rows, *values, layer.silu)
    found = [function(*block, *values, layer.silu) for block in _blocks(rows)]
    first, second = (torch.stack(sums).sum(dim=0) for sums in zip(*found, strict=True))
    return first, second


def _passes(
    function: Callable[..., Tensor], rows: tuple[Tensor, ...], values: tuple[Tensor, ...], layer: GroupNorm
) -> Tensor:
    """New rows, (B, N, C)."""
    if layer.compiled:
        return _compiled(function)(*rows, *values, layer.silu)
    result = torch.empty_like(rows[0])
    for *block, place in _blocks((*rows, result)):
        place.copy_(function(*block, *values, layer.silu))
    return result


def _blocks(rows: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """The same pixels of each, some at a time."""
    batch, _, channels = rows[0].shape
    elements = _CPU_BLOCK if rows[0].device.type == "cpu" else _DEVICE_BLOCK
    return zip(*(each.split(max(1, elements // (batch * channels)), dim=1) for each in rows), strict=True)


_COMPILED: dict[Callable[..., Any], Callable[..., Any]] = {}


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    if function not in _COMPILED:
        _COMPILED[function] = torch.compile(function, dynamic=True)
    return _COMPILED[function]
