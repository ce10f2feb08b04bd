"""Losses of decoded pictures, and the frozen VAE's part of a step, a few pictures at a time.

What the frozen decoder and LPIPS keep for their backward pass is most of a step's memory: at 256 px FLUX's decoder
keeps several hundred megabytes a picture. Nothing behind them is trained, so that a picture's gradient by its latents
can be had as soon as it is decoded: each group of pictures goes forward and back at once, and leaves its latents'
gradient alone. Nothing is computed twice.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from openvision3 import losses
from openvision3.chunked import at_least_fp32
from openvision3.vae import FrozenVAE, TinyVAE

Metric = Callable[[Tensor, Tensor], Tensor]

# Pixels that go through a VAE at once. On a CPU few, so that they stay in its caches (benchmarks/vae_batches.py).
CPU_PIXELS, CPU_PIXELS_TINY, DEVICE_PIXELS = 2**15, 2**18, 2**20


def pictures_at_once(vae: FrozenVAE, device: torch.device, resolution: int, chosen: int = 0) -> int:
    """How many square pictures go through a VAE at once: those `chosen`, or for 0 as many as suit the device."""
    if chosen:
        return chosen
    on_cpu = CPU_PIXELS_TINY if isinstance(vae, TinyVAE) else CPU_PIXELS
    return max(1, (on_cpu if device.type == "cpu" else DEVICE_PIXELS) // resolution**2)


def to_images(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 pixels as images in [-1, 1]."""
    return pixels.to(dtype) / 127.5 - 1


@torch.no_grad()
def encode_pixels(vae: FrozenVAE, pixels: Tensor, dtype: torch.dtype, at_once: int) -> Tensor:
    """uint8 pixels (B, 3, H, W) to scaled latents (B, C, h, w), fp32 at least."""
    return torch.cat([at_least_fp32(vae.encode(to_images(part, dtype))) for part in pixels.split(at_once)])


class DecodedLosses(torch.autograd.Function):
    """Eq. 4's losses of decoded pictures: `pixel + weight * lpips`, and each alone without gradient.

    latents (P, C, h, w), scaled; pixels (P, 3, H, W) uint8 to compare with; each loss is summed over pictures and
    divided by `count` (see `losses.pixel_l1`). `metric` None: no LPIPS, and a 0 in its place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        latents: Tensor,
        pixels: Tensor,
        vae: FrozenVAE,
        metric: Metric | None,
        weight: float,
        count: int,
        at_once: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = at_least_fp32(latents.new_empty(())).dtype
        pixel, lpips = (torch.zeros((), dtype=dtype, device=latents.device) for _ in range(2))
        gradients: list[Tensor] = []
        for part, shown in _parts(latents, pixels, at_once):
            part = part.detach().requires_grad_(ctx.needs_input_grad[0])
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                images, images_hat = to_images(shown, dtype), vae.decode(part)
                of_pixels, of_lpips = losses.pixel_l1(images_hat, images, count), None
                if metric is not None:
                    of_lpips = losses.perceptual_loss(metric, images_hat, images, count)
                    lpips += of_lpips.detach()
                objective = losses.picture_loss(of_pixels, of_lpips, weight)
            pixel += of_pixels.detach()
            if ctx.needs_input_grad[0]:
                gradients += torch.autograd.grad(objective, part)
        ctx.save_for_backward(torch.cat(gradients) if gradients else None)
        ctx.mark_non_differentiable(pixel, lpips)
        return losses.picture_loss(pixel, lpips, weight), pixel, lpips

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (saved,) = ctx.saved_tensors
        return None if saved is None else saved * gradients[0], None, None, None, None, None, None


def _parts(latents: Tensor, pixels: Tensor, at_once: int) -> Iterator[tuple[Tensor, Tensor]]:
    assert len(latents) == len(pixels), (latents.shape, pixels.shape)
    if len(latents):
        yield from zip(latents.split(at_once), pixels.split(at_once), strict=True)
