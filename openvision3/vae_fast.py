"""The arithmetic of diffusers' AutoencoderKL (FLUX.1's VAE, Stable Diffusion's), made cheap for frozen weights.

The same function as the module's own, beyond rounding, for less time and memory:

- Weights are converted once to the type that is computed in and laid out channels last, not at every call.
- Doubling a picture's side (nearest neighbour) before a 3 x 3 convolution is one transposed convolution of 4 x 4 with
  stride 2 on the small picture: each output pixel sees 2 x 2 different inputs, so 4/9 of the multiplications are left
  (sub-pixel convolution: Shi et al., arXiv 1609.07009, section 3).
- Only gradients by the input are ever made: a convolution keeps nothing for its backward pass, and a group norm with
  its SiLU keeps its input alone, where autograd keeps four pictures.
- In bf16, group norm and SiLU are two passes over the picture, forward and back, where PyTorch compiles (`compiled`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from openvision3.model.blocks import attend

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FastAutoencoder:
    """Both directions of an AutoencoderKL as plain functions of pictures and latents, in the autoencoder's units."""

    encoder: tuple[Layer, ...]
    decoder: tuple[Layer, ...]
    dtype: torch.dtype

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> the posterior's mean (B, C, H/8, W/8), in `dtype`."""
        return self._run(self.encoder, images).chunk(2, dim=1)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, 8h, 8w), in `dtype`; gradients flow to the latents."""
        return self._run(self.decoder, latents)

    def _run(self, layers: tuple[Layer, ...], x: Tensor) -> Tensor:
        x = x.to(self.dtype, memory_format=torch.channels_last)
        with torch.autocast(x.device.type, enabled=False):
            for layer in layers:
                x = layer(x)
        return x


def fast_autoencoder(autoencoder: Any, dtype: torch.dtype, compiled: bool = False) -> FastAutoencoder | None:
    """The fast form of a diffusers autoencoder, computing in `dtype` with copies of its weights.

    None where it is no AutoencoderKL, or one with parts that are not known here. `compiled`: PyTorch compiles group
    norm with SiLU; the first calls are slow.
    """
    if type(autoencoder).__name__ != "AutoencoderKL" or autoencoder.use_tiling or autoencoder.use_slicing:
        return None
    try:
        build = _Builder(dtype, compiled)
        with torch.no_grad():
            return FastAutoencoder(
                tuple(build.encoder(autoencoder)), tuple(build.decoder(autoencoder)), dtype
            )
    except _UnknownPart:
        return None


class _UnknownPart(Exception):
    """A part of an autoencoder that has no fast form."""


def _require(condition: bool) -> None:
    if not condition:
        raise _UnknownPart


@dataclass(frozen=True)
class Convolution:
    """A convolution with frozen weights; `transposed` is that of an upsampling."""

    weight: Tensor
    bias: Tensor | None
    stride: int = 1
    padding: int = 0
    transposed: bool = False
    pad_end: bool = False  # one row and column of zeros at the bottom and the right first

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')"""
        if self.pad_end:
            x = F.pad(x, (0, 1, 0, 1))
        if x.requires_grad and torch.is_grad_enabled() and (self.stride == 1 or self.transposed):
            return _InputGradient.apply(x, self)
        return self.forward(x)

    def forward(self, x: Tensor) -> Tensor:
        """Without a graph of its own."""
        convolve = F.conv_transpose2d if self.transposed else F.conv2d
        return convolve(x, self.weight, self.bias, self.stride, self.padding)

    def backward(self, gradient: Tensor) -> Tensor:
        """By the input: the adjoint map."""
        convolve = F.conv2d if self.transposed else F.conv_transpose2d
        return convolve(gradient, self.weight, None, self.stride, self.padding)


class _InputGradient(torch.autograd.Function):
    """A convolution that keeps nothing: the gradient by its input needs the weights alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, convolution: Convolution) -> Tensor:
        ctx.convolution = convolution
        return convolution.forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return ctx.convolution.backward(gradient.contiguous(memory_format=torch.channels_last)), None


@dataclass(frozen=True)
class NormSiLU:
    """SiLU of a group norm with frozen scale and shift, fp32 each."""

    groups: int
    weight: Tensor
    bias: Tensor
    eps: float
    compiled: bool

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape"""
        if x.dtype != torch.bfloat16:
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.silu(F.group_norm(x, self.groups, weight, bias, self.eps))
        return (_CompiledNormSiLU if self.compiled else _RecomputedNormSiLU).apply(x, self)


class _RecomputedNormSiLU(torch.autograd.Function):
    """Keeps its input and each group's statistics; what SiLU's gradient needs is computed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: NormSiLU) -> Tensor:
        normed, mean, rstd = _group_norm(x, layer)
        ctx.layer = layer
        ctx.save_for_backward(x, mean, rstd)
        return F.silu(normed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,), layer = gradients, ctx.layer
        x, mean, rstd = ctx.saved_tensors
        normed, _, _ = _group_norm(x, layer)
        gradient = torch.ops.aten.silu_backward(gradient, normed)
        batch, channels, height, width = x.shape
        weight = layer.weight.to(x.dtype)
        dx, _, _ = torch.ops.aten.native_group_norm_backward(
            gradient, x, mean, rstd, weight, batch, channels, height * width, layer.groups, [True, False, False]
        )
        return dx, None


def _group_norm(x: Tensor, layer: NormSiLU) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, height, width = x.shape
    weight, bias = layer.weight.to(x.dtype), layer.bias.to(x.dtype)
    return torch.ops.aten.native_group_norm(
        x, weight, bias, batch, channels, height * width, layer.groups, layer.eps
    )


class _CompiledNormSiLU(torch.autograd.Function):
    """Group norm as one factor and one shift a channel: sums over the picture, then one pass, forward and back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: NormSiLU) -> Tensor:
        rows = _rows(x)
        total, squares = _compiled(_sums)(rows)
        mean, rstd = _statistics(total, squares, rows.shape[1], layer)
        scale = rstd * layer.weight
        shift = layer.bias - mean * scale
        ctx.layer = layer
        ctx.save_for_backward(x, mean, rstd, scale, shift)
        return _picture(_compiled(_scaled_silu)(rows, scale, shift), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        layer, (gradient,) = ctx.layer, gradients
        x, mean, rstd, scale, shift = ctx.saved_tensors
        rows = _rows(x)
        gradient_rows = _rows(gradient.contiguous(memory_format=torch.channels_last))
        total, with_input = _compiled(_gradient_sums)(gradient_rows, rows, scale, shift)
        # dx = rstd * (g w - mean(g w) - normed * mean(g w normed)), means over a group's channels and pixels
        count = rows.shape[1] * rows.shape[2] // layer.groups
        of_normed = (with_input - mean * total) * rstd
        first = _over_groups(total * layer.weight, layer.groups) / count
        second = _over_groups(of_normed * layer.weight, layer.groups) / count
        slope = -rstd * rstd * second
        offset = -rstd * first - slope * mean
        return _picture(_compiled(_gradient_pass)(gradient_rows, rows, scale, shift, slope, offset), x), None


def _statistics(total: Tensor, squares: Tensor, pixels: int, layer: NormSiLU) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal standard deviation of each channel's group, (B, C) fp32."""
    count = pixels * total.shape[1] // layer.groups
    mean = _over_groups(total, layer.groups) / count
    variance = (_over_groups(squares, layer.groups) / count - mean * mean).clamp(min=0)
    return mean, (variance + layer.eps).rsqrt()


def _over_groups(values: Tensor, groups: int) -> Tensor:
    """(B, C) -> each channel's sum over its group, (B, C)."""
    grouped = values.view(len(values), groups, -1)
    return grouped.sum(dim=2, keepdim=True).expand_as(grouped).reshape(values.shape)


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W), channels last -> (B, H * W, C), the same memory."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, x.shape[1])


def _picture(rows: Tensor, like: Tensor) -> Tensor:
    """`_rows` undone."""
    batch, channels, height, width = like.shape
    return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _sums(rows: Tensor) -> tuple[Tensor, Tensor]:
    values = rows.float()
    return values.sum(dim=1), (values * values).sum(dim=1)


def _scaled_silu(rows: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    values = rows.float() * scale[:, None] + shift[:, None]
    return (values * torch.sigmoid(values)).to(rows.dtype)


def _silu_gradient(gradient: Tensor, values: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    normed = values * scale[:, None] + shift[:, None]
    sigmoid = torch.sigmoid(normed)
    return gradient.float() * (sigmoid * (1 + normed * (1 - sigmoid)))


def _gradient_sums(gradient: Tensor, rows: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    values = rows.float()
    of_normed = _silu_gradient(gradient, values, scale, shift)
    return of_normed.sum(dim=1), (of_normed * values).sum(dim=1)


def _gradient_pass(
    gradient: Tensor, rows: Tensor, scale: Tensor, shift: Tensor, slope: Tensor, offset: Tensor
) -> Tensor:
    values = rows.float()
    of_normed = _silu_gradient(gradient, values, scale, shift)
    return (of_normed * scale[:, None] + values * slope[:, None] + offset[:, None]).to(rows.dtype)


_COMPILED: dict[Callable[..., Any], Callable[..., Any]] = {}


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    if function not in _COMPILED:
        _COMPILED[function] = torch.compile(function, dynamic=True)
    return _COMPILED[function]


@dataclass(frozen=True)
class Residual:
    """x (through `shortcut`, where there is one) plus the layers' result."""

    layers: tuple[Layer, ...]
    shortcut: Layer | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)"""
        y = x
        for layer in self.layers:
            y = layer(y)
        kept = x if self.shortcut is None else self.shortcut(x)
        return y + kept if y.requires_grad else y.add_(kept)


@dataclass(frozen=True)
class PixelAttention:
    """Group norm, then self-attention of all places of a picture to one another."""

    groups: int
    norm_weight: Tensor
    norm_bias: Tensor
    eps: float
    heads: int
    qkv_weight: Tensor
    qkv_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape"""
        batch, channels, height, width = x.shape
        rows = _rows(F.group_norm(x, self.groups, self.norm_weight, self.norm_bias, self.eps))
        qkv = F.linear(rows, self.qkv_weight, self.qkv_bias).view(batch, height * width, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = attend(query, key, value, None, "auto").transpose(1, 2).reshape(batch, height * width, channels)
        return _picture(F.linear(mixed, self.out_weight, self.out_bias), x)


def upsampling_kernel(weight: Tensor) -> Tensor:
    """The transposed convolution (stride 2, padding 1) that equals a nearest-neighbour doubling and `weight`.

    `weight` (O, I, 3, 3), of a convolution with padding 1, to (I, O, 4, 4): of each axis' three taps, those that fall
    on the same input pixel are added. Output 2i reads inputs i - 1 (tap 0) and i (taps 1, 2); output 2i + 1 reads i
    (taps 0, 1) and i + 1 (tap 2). In a transposed convolution, output o reads input i by tap o - 2i + 1.
    """
    # rows: tap of the transposed kernel; columns: taps of `weight`
    fold = weight.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
    return torch.einsum("pi,qj,ocij->copq", fold, fold, weight)


class _Builder:
    """Turns an autoencoder's modules into layers."""

    def __init__(self, dtype: torch.dtype, compiled: bool) -> None:
        self.dtype, self.compiled = dtype, compiled

    def encoder(self, autoencoder: Any) -> Iterator[Layer]:
        part = autoencoder.encoder
        yield self.convolution(part.conv_in)
        for block in part.down_blocks:
            _require(type(block).__name__ == "DownEncoderBlock2D")
            yield from map(self.residual, block.resnets)
            for layer in block.downsamplers or ():
                yield self.downsampling(layer)
        yield from self.middle(part.mid_block)
        yield from self.end(part)
        if autoencoder.quant_conv is not None:
            yield self.convolution(autoencoder.quant_conv)

    def decoder(self, autoencoder: Any) -> Iterator[Layer]:
        part = autoencoder.decoder
        if autoencoder.post_quant_conv is not None:
            yield self.convolution(autoencoder.post_quant_conv)
        yield self.convolution(part.conv_in)
        yield from self.middle(part.mid_block)
        for block in part.up_blocks:
            _require(type(block).__name__ == "UpDecoderBlock2D")
            yield from map(self.residual, block.resnets)
            for layer in block.upsamplers or ():
                yield self.upsampling(layer)
        yield from self.end(part)

    def middle(self, block: Any) -> Iterator[Layer]:
        _require(type(block).__name__ == "UNetMidBlock2D" and len(block.resnets) == len(block.attentions) + 1)
        yield self.residual(block.resnets[0])
        for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
            if attention is not None:
                yield self.attention(attention)
            yield self.residual(resnet)

    def end(self, part: Any) -> Iterator[Layer]:
        _require(isinstance(part.conv_act, nn.SiLU))
        yield self.norm_silu(part.conv_norm_out)
        yield self.convolution(part.conv_out)

    def convolution(self, layer: nn.Conv2d) -> Convolution:
        same = {layer.kernel_size, (2 * int(layer.padding[0]) + 1,) * 2}
        _require(
            type(layer) is nn.Conv2d
            and len(same) == 1
            and layer.stride == layer.dilation == (1, 1)
            and layer.groups == 1
            and layer.padding_mode == "zeros"
        )
        return Convolution(self.weight(layer.weight), self.bias(layer.bias), 1, int(layer.padding[0]))

    def downsampling(self, layer: Any) -> Convolution:
        conv = layer.conv
        _require(
            type(layer).__name__ == "Downsample2D"
            and layer.norm is None
            and isinstance(conv, nn.Conv2d)
            and (conv.kernel_size, conv.stride, layer.padding, conv.groups) == ((3, 3), (2, 2), 0, 1)
        )
        return Convolution(self.weight(conv.weight), self.bias(conv.bias), stride=2, pad_end=True)

    def upsampling(self, layer: Any) -> Convolution:
        conv = layer.conv
        _require(
            type(layer).__name__ == "Upsample2D"
            and layer.norm is None
            and layer.interpolate
            and not layer.use_conv_transpose
            and isinstance(conv, nn.Conv2d)
            and (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((3, 3), (1, 1), (1, 1), 1)
        )
        kernel = upsampling_kernel(conv.weight.to(torch.promote_types(conv.weight.dtype, torch.float32)))
        return Convolution(self.weight(kernel), self.bias(conv.bias), stride=2, padding=1, transposed=True)

    def residual(self, block: Any) -> Residual:
        _require(
            type(block).__name__ == "ResnetBlock2D"
            and isinstance(block.nonlinearity, nn.SiLU)
            and block.time_emb_proj is block.upsample is block.downsample is None
            and block.time_embedding_norm in ("default", "group")  # the same where there is no time
            and block.output_scale_factor == 1.0
        )
        layers = (
            self.norm_silu(block.norm1),
            self.convolution(block.conv1),
            self.norm_silu(block.norm2),
            self.convolution(block.conv2),
        )
        return Residual(layers, None if block.conv_shortcut is None else self.convolution(block.conv_shortcut))

    def norm_silu(self, norm: nn.GroupNorm) -> NormSiLU:
        _require(type(norm) is nn.GroupNorm and norm.affine)
        full = torch.promote_types(norm.weight.dtype, torch.float32)
        weight, bias = norm.weight.detach().to(full), norm.bias.detach().to(full)
        return NormSiLU(norm.num_groups, weight, bias, norm.eps, self.compiled)

    def attention(self, layer: Any) -> Residual:
        _require(
            type(layer).__name__ == "Attention"
            and isinstance(layer.group_norm, nn.GroupNorm)
            and layer.residual_connection
            and layer.rescale_output_factor == 1.0
            and layer.spatial_norm is layer.norm_q is layer.norm_k is None
            and all(projection.bias is not None for projection in (layer.to_q, layer.to_k, layer.to_v, layer.to_out[0]))
        )
        projections, norm = (layer.to_q, layer.to_k, layer.to_v), layer.group_norm
        return Residual(
            (
                PixelAttention(
                    norm.num_groups,
                    self.cast(norm.weight),
                    self.cast(norm.bias),
                    norm.eps,
                    layer.heads,
                    self.cast(torch.cat([projection.weight for projection in projections])),
                    self.cast(torch.cat([projection.bias for projection in projections])),
                    self.cast(layer.to_out[0].weight),
                    self.cast(layer.to_out[0].bias),
                ),
            )
        )

    def weight(self, tensor: Tensor) -> Tensor:
        return self.cast(tensor).contiguous(memory_format=torch.channels_last)

    def bias(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else self.cast(tensor)

    def cast(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.dtype)
