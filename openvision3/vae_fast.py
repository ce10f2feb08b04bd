"""The arithmetic of diffusers' AutoencoderKL (FLUX.1's VAE, Stable Diffusion's), made cheap for frozen weights.

The same function as the module's own, beyond rounding, for less time and memory:

- Weights are converted once to the type that is computed in and laid out channels last, not at every call.
- Doubling a picture's side (nearest neighbour) before a 3 x 3 convolution is one transposed convolution of 4 x 4 with
  stride 2 on the small picture: each output pixel sees 2 x 2 different inputs, so 4/9 of the multiplications are left
  (sub-pixel convolution: Shi et al., arXiv 1609.07009, section 3).
- Only gradients by the input are ever made: a convolution keeps nothing for its backward pass, and a group norm with
  its SiLU its input alone, where autograd keeps four pictures (`vae_norm.py`, which PyTorch compiles if asked).

Pictures and latents come back channels last.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from openvision3.model.blocks import attend
from openvision3.vae_norm import GroupNorm, channel_rows, picture

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FastAutoencoder:
    """Both directions of an AutoencoderKL as plain functions of pictures and latents, in the autoencoder's units.

    Whatever comes in, results lie channels last.
    """

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

    None where it is no AutoencoderKL, or one with parts that are not known here, such as layers with LoRA. `compiled`:
    PyTorch compiles group norm with SiLU; the first calls are slow. The copies serve gradients also where they are made
    in inference mode.
    """
    if type(autoencoder).__name__ != "AutoencoderKL":
        return None
    try:
        build = _Builder(dtype, compiled)
        with torch.inference_mode(False), torch.no_grad():
            return FastAutoencoder(tuple(build.encoder(autoencoder)), tuple(build.decoder(autoencoder)), dtype)
    except _UnknownPart:
        return None


class _UnknownPart(Exception):
    """A part of an autoencoder that has no fast form."""


def _require(condition: bool) -> None:
    if not condition:
        raise _UnknownPart


def _require_conv(layer: Any, kernel: int, stride: int, padding: int) -> None:
    """A convolution as PyTorch's own class does it, with nothing added to its class or by hooks."""
    _require(type(layer) is nn.Conv2d and _unhooked(layer))
    found = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    _require(found == tuple((side, side) for side in (kernel, stride, padding, 1)))
    _require(layer.groups == 1 and layer.padding_mode == "zeros")


def _require_linear(layer: Any) -> None:
    """The same of a linear layer with a bias."""
    _require(type(layer) is nn.Linear and layer.bias is not None and _unhooked(layer))


def _unhooked(layer: nn.Module) -> bool:
    # weight norm and pruning by hooks or parametrisations (which change the class) make the weight at each call
    return not (layer._forward_hooks or layer._forward_pre_hooks)


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
        """By the input: the adjoint map; in its own type, whatever autocast the backward pass is called under."""
        convolve = F.conv2d if self.transposed else F.conv_transpose2d
        with torch.autocast(gradient.device.type, enabled=False):
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
    """Group norm, then self-attention of all places of a picture to one another.

    At 1,024 places of 512 channels and one head on one CPU core, the products of "auto" take up to 7 % longer than
    "sdpa" without gradients, and less with them: 67 against 72 ms in fp32, 99 against 116 ms in bf16.
    """

    norm: GroupNorm
    heads: int
    qkv_weight: Tensor
    qkv_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape"""
        batch, channels, height, width = x.shape
        rows = channel_rows(self.norm(x))
        qkv = F.linear(rows, self.qkv_weight, self.qkv_bias).view(batch, height * width, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = attend(query, key, value, None, "auto").transpose(1, 2).reshape(batch, height * width, channels)
        return picture(F.linear(mixed, self.out_weight, self.out_bias), x)


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
        yield self.norm(part.conv_norm_out)
        yield self.convolution(part.conv_out)

    def convolution(self, layer: Any) -> Convolution:
        padding = int(layer.padding[0]) if type(layer) is nn.Conv2d else 0
        _require_conv(layer, 2 * padding + 1, 1, padding)
        return Convolution(self.weight(layer.weight), self.bias(layer.bias), 1, padding)

    def downsampling(self, layer: Any) -> Convolution:
        _require(type(layer).__name__ == "Downsample2D" and layer.norm is None and layer.padding == 0)
        _require_conv(layer.conv, 3, 2, 0)
        return Convolution(self.weight(layer.conv.weight), self.bias(layer.conv.bias), stride=2, pad_end=True)

    def upsampling(self, layer: Any) -> Convolution:
        _require(
            type(layer).__name__ == "Upsample2D"
            and layer.norm is None
            and layer.interpolate
            and not layer.use_conv_transpose
        )
        _require_conv(layer.conv, 3, 1, 1)
        weight, bias = layer.conv.weight, layer.conv.bias
        kernel = upsampling_kernel(weight.to(torch.promote_types(weight.dtype, torch.float32)))
        return Convolution(self.weight(kernel), self.bias(bias), stride=2, padding=1, transposed=True)

    def residual(self, block: Any) -> Residual:
        _require(
            type(block).__name__ == "ResnetBlock2D"
            and isinstance(block.nonlinearity, nn.SiLU)
            and block.time_emb_proj is block.upsample is block.downsample is None
            and block.time_embedding_norm in ("default", "group")  # the same where there is no time
            and block.output_scale_factor == 1.0
        )
        layers = (
            self.norm(block.norm1),
            self.convolution(block.conv1),
            self.norm(block.norm2),
            self.convolution(block.conv2),
        )
        return Residual(layers, None if block.conv_shortcut is None else self.convolution(block.conv_shortcut))

    def norm(self, norm: Any, silu: bool = True) -> GroupNorm:
        _require(type(norm) is nn.GroupNorm and norm.affine)
        full = torch.promote_types(self.dtype, torch.float32)  # what statistics are taken in
        weight, bias = _copy(norm.weight, full), _copy(norm.bias, full)
        return GroupNorm(norm.num_groups, weight, bias, norm.eps, silu, self.compiled)

    def attention(self, layer: Any) -> Residual:
        _require(
            type(layer).__name__ == "Attention"
            and layer.residual_connection
            and layer.rescale_output_factor == 1.0
            and layer.spatial_norm is layer.norm_q is layer.norm_k is None
        )
        projections, out = (layer.to_q, layer.to_k, layer.to_v), layer.to_out[0]
        for projection in (*projections, out):
            _require_linear(projection)
        weight, bias = (torch.cat([getattr(each, name) for each in projections]) for name in ("weight", "bias"))
        norm = self.norm(layer.group_norm, silu=False)
        own = (weight, bias, out.weight, out.bias)
        return Residual((PixelAttention(norm, layer.heads, *(_copy(tensor, self.dtype) for tensor in own)),))

    def weight(self, tensor: Tensor) -> Tensor:
        return _copy(tensor, self.dtype).contiguous(memory_format=torch.channels_last)

    def bias(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else _copy(tensor, self.dtype)


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Of its own memory where the weights were made in inference mode: such a tensor serves no gradient."""
    return tensor.detach().to(dtype, copy=tensor.is_inference())
