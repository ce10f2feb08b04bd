"""Layers of the generator: RMSNorm, 2-D RoPE, SwiGLU, attention, modulation, time embedding and fixed positions.

Mathematics of RAE's DiT-DH (arXiv 2510.11690), which follows LightningDiT (arXiv 2501.01423).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from openvision3.config import AttentionPath
from openvision3.generation.config import StackConfig
from openvision3.model.blocks import attend

NORM_EPS = 1e-6
ROPE_THETA = 10_000.0
TIME_FREQUENCIES = 256
EMBEDDING_STD = 0.02


def at_least_fp32(x: Tensor) -> Tensor:
    """The tensor in fp32, or as it is in fp64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def init_normal(tensor: Tensor, std: float = EMBEDDING_STD) -> None:
    """Draws a tensor anew from N(0, std^2); does nothing on the meta device, where PyTorch would first load sympy."""
    if not tensor.is_meta:
        nn.init.normal_(tensor, std=std)


def scaled_to_rms(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + 1e-6) over the last axis, fp32 or fp64.

    On a CPU PyTorch's own is a dozen passes over memory, forward and back, which cost more than the products around.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return F.rms_norm(x, x.shape[-1:], None, NORM_EPS)
    return _ScaledToRMS.apply(x)


class _ScaledToRMS(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        factor = norm.square_().mul_(1 / x.shape[-1]).add_(NORM_EPS).rsqrt_()
        result = x * factor
        ctx.save_for_backward(result, factor)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        result, factor = ctx.saved_tensors
        (gradient,) = gradients
        along = (gradient * result).sum(dim=-1, keepdim=True).mul_(-1 / result.shape[-1])
        return torch.addcmul(gradient, result, along).mul_(factor)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6) * weight over the last axis, in fp32 at least; the result stays in that precision."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., W) -> (..., W)"""
        x = at_least_fp32(x)
        return scaled_to_rms(x) * self.weight.to(x.dtype)

    def modulated(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """The norm of x (B, N, W), times 1 + `scale`, plus `shift`; these are (B, 1 or N, W)."""
        x = at_least_fp32(x)
        factor = (scale.to(x.dtype) + 1) * self.weight.to(x.dtype)
        return torch.addcmul(shift.to(x.dtype), scaled_to_rms(x), factor)


def rope_table(
    grid: tuple[int, int], head_width: int, prefix: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """Cosines and sines (prefix + h * w, head width / 2, 2) that turn each pair of a query's or key's numbers.

    The first half of the pairs turns with the row, the second with the column; frequencies 10000^(-2k / (head width /
    2)). The `prefix` tokens in front are not turned.
    """
    per_axis = head_width // 2
    exponent = torch.arange(0, per_axis, 2, dtype=torch.float32, device=device) / per_axis
    frequency = 1.0 / ROPE_THETA**exponent
    rows, columns = (torch.arange(n, dtype=torch.float32, device=device)[:, None] * frequency for n in grid)
    h, w = grid
    angles = torch.cat([rows[:, None].expand(h, w, -1), columns[None].expand(h, w, -1)], dim=-1)
    angles = F.pad(rearrange(angles, "h w k -> (h w) k"), (0, 0, prefix, 0))
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turns the interleaved pairs of x (B, N, ..., d), in fp32 at least, by a table that broadcasts to (..., d / 2, 2).

    As a product of complex numbers it is one pass over memory; a compiler fuses the real form better.
    """
    pairs = rearrange(x, "... (k two) -> ... k two", two=2)
    if torch.compiler.is_compiling():
        real, imaginary = pairs.unbind(-1)
        cos, sin = table.unbind(-1)
        turned = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    return rearrange(turned, "... k two -> ... (k two)")


def fixed_positions(grid: tuple[int, int], width: int, device: torch.device | str | None = None) -> Tensor:
    """Sine-cosine positions (h * w, width) in fp32; quarters are sin x, cos x, sin y, cos y of x * 10000^(-k / (W/4)).

    Source: MAE and DiT's `get_2d_sincos_pos_embed`, which RAE uses. (`model.blocks.sincos_positions` is big_vision's,
    with other frequencies.)
    """
    h, w = grid
    frequency = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float32, device=device) / (width / 4))
    y, x = (torch.arange(n, dtype=torch.float32, device=device)[:, None] * frequency for n in grid)
    x = torch.cat([x.sin(), x.cos()], dim=-1)[None].expand(h, w, -1)
    y = torch.cat([y.sin(), y.cos()], dim=-1)[:, None].expand(h, w, -1)
    return rearrange(torch.cat([x, y], dim=-1), "h w d -> (h w) d")


class SwiGLU(nn.Module):
    """w3(silu(gate) * value), with gate and value from one fused product `w12`."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, W) -> (B, N, W)"""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)

    def stacked_matrices(self) -> list[tuple[Tensor, int]]:
        """For Muon: each weight, and how many maps it stacks."""
        return [(self.w12.weight, 2), (self.w3.weight, 1)]


class Attention(nn.Module):
    """Multi-head self-attention with RoPE and, with `qk_norm`, an RMSNorm of each head's queries and keys."""

    def __init__(self, width: int, num_heads: int, qk_norm: bool, path: AttentionPath):
        super().__init__()
        self.num_heads = num_heads
        self.path: AttentionPath = path
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_query = RMSNorm(width // num_heads) if qk_norm else None
        self.norm_key = RMSNorm(width // num_heads) if qk_norm else None

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, W) -> (B, N, W); `rope` of `rope_table`, `mask` as for `attend`."""
        parts = rearrange(self.qkv(x), "b n (three h d) -> b n three h d", three=3, h=self.num_heads)
        pair, value = parts[:, :, :2], parts[:, :, 2]
        pair = at_least_fp32(pair)
        if self.norm_query is not None and self.norm_key is not None:
            # one pass for both: each has weights of its own
            weights = torch.stack([self.norm_query.weight, self.norm_key.weight])
            pair = scaled_to_rms(pair) * weights[:, None]
        pair = rotate(pair, rope[:, None, None]).to(value.dtype)
        query, key = rearrange(pair, "b n two h d -> two b h n d")
        mixed = attend(query, key, rearrange(value, "b n h d -> b h n d"), mask, self.path)
        return self.out(rearrange(mixed, "b h n d -> b n (h d)"))

    def stacked_matrices(self) -> list[tuple[Tensor, int]]:
        """For Muon: each weight, and how many maps it stacks."""
        return [(self.qkv.weight, 3), (self.out.weight, 1)]


class Modulation(nn.Module):
    """One linear layer from silu(condition) to `parts` vectors of the same width; starts at zero."""

    def __init__(self, width: int, parts: int):
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(width, parts * width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, active: Tensor) -> tuple[Tensor, ...]:
        """silu(condition) (B, 1 or N, W) -> `parts` tensors of the same shape."""
        return self.linear(active).chunk(self.parts, dim=-1)


class DiTBlock(nn.Module):
    """Attention and SwiGLU, each normalised, modulated, gated and added to the residual stream (adaLN-zero)."""

    def __init__(self, size: StackConfig, qk_norm: bool, path: AttentionPath):
        super().__init__()
        self.norm_1 = RMSNorm(size.width)
        self.attention = Attention(size.width, size.num_heads, qk_norm, path)
        self.norm_2 = RMSNorm(size.width)
        self.mlp = SwiGLU(size.width, size.hidden)
        self.modulation = Modulation(size.width, 6)

    def forward(self, x: Tensor, active: Tensor, rope: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, W) -> (B, N, W); `active` is silu(condition), (B, 1, W) or one for each token (B, N, W)."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(active)
        mixed = self.attention(self.norm_1.modulated(x, shift_1, scale_1), rope, mask)
        x = torch.addcmul(x, gate_1.to(x.dtype), mixed.to(x.dtype))
        hidden = self.mlp(self.norm_2.modulated(x, shift_2, scale_2))
        return torch.addcmul(x, gate_2.to(x.dtype), hidden.to(x.dtype))


class FinalLayer(nn.Module):
    """Norm, modulation of each token, and the linear layer to the velocity; starts at zero."""

    def __init__(self, width: int, token_width: int):
        super().__init__()
        self.norm = RMSNorm(width)
        self.modulation = Modulation(width, 2)
        self.out = nn.Linear(width, token_width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, active: Tensor) -> Tensor:
        """(B, N, W) -> (B, N, D); `active` as for `DiTBlock`."""
        shift, scale = self.modulation(active)
        return self.out(self.norm.modulated(x, shift, scale))


class TimeEmbedding(nn.Module):
    """Gaussian Fourier features of the time, then two linear layers with SiLU between.

    The features are the sines, then the cosines, of 2 pi W t with W ~ N(0, 1) drawn once: 256 numbers in a buffer.
    """

    def __init__(self, width: int):
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.empty(TIME_FREQUENCIES))
        init_normal(self.frequencies, std=1.0)
        self.up = nn.Linear(2 * TIME_FREQUENCIES, width)
        self.down = nn.Linear(width, width)
        init_normal(self.up.weight)
        init_normal(self.down.weight)

    def forward(self, times: Tensor) -> Tensor:
        """Times (B,) in [0, 1] -> (B, W)"""
        angles = times.to(self.frequencies.dtype)[:, None] * self.frequencies * (2 * math.pi)
        return self.down(F.silu(self.up(torch.cat([angles.sin(), angles.cos()], dim=-1))))
