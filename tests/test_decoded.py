"""Losses of decoded pictures, some at a time, against all of them at once by plain autograd."""

import pytest
import torch
from torch import Tensor

from openvision3 import losses
from openvision3.training.decoded import DecodedLosses, encode_pixels, pictures_at_once, to_images
from openvision3.vae import load_vae


def metric(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean(dim=(1, 2, 3))


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("at_once", [1, 2, 8])
def test_equals_all_at_once(at_once: int, weight: float) -> None:
    vae = load_vae("tiny", dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(5, 16, 4, 6, generator=generator, dtype=torch.float64).requires_grad_()
    pixels = torch.randint(0, 256, (5, 3, 32, 48), generator=generator, dtype=torch.uint8)
    images, images_hat = to_images(pixels, torch.float64), vae.decode(latents)
    pixel = losses.pixel_l1(images_hat, images, 10)
    lpips = losses.perceptual_loss(metric, images_hat, images, 10)
    (expected,) = torch.autograd.grad(3 * (pixel + weight * lpips), latents)

    both, found_pixel, found_lpips = DecodedLosses.apply(
        latents, pixels, vae, metric if weight else None, weight, 10, at_once
    )
    (gradient,) = torch.autograd.grad(3 * both, latents)
    torch.testing.assert_close(both, pixel + weight * lpips)
    torch.testing.assert_close(found_pixel, pixel)
    torch.testing.assert_close(found_lpips, lpips if weight else torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(gradient, expected)
    assert not found_pixel.requires_grad and not found_lpips.requires_grad


def test_gradients_reach_what_made_the_latents() -> None:
    vae, layer = load_vae("tiny", dtype=torch.float64), torch.nn.Conv2d(4, 16, 1).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 4, 4, generator=generator, dtype=torch.float64)
    pixels = torch.randint(0, 256, (3, 3, 32, 32), generator=generator, dtype=torch.uint8)
    latents = layer(x)
    images, images_hat = to_images(pixels, torch.float64), vae.decode(latents)
    whole = losses.pixel_l1(images_hat, images, 3) + 0.5 * losses.perceptual_loss(metric, images_hat, images, 3)
    expected = torch.autograd.grad(whole + latents.square().sum(), list(layer.parameters()))
    # two graphs at once: each keeps its own gradient
    one, other = layer(x), layer(x.flip(0))
    parts = [
        DecodedLosses.apply(each, shown, vae, metric, 0.5, 3, 2)[0] for each, shown in ((one, pixels), (other, pixels))
    ]
    found = torch.autograd.grad(parts[0] + one.square().sum() + 0 * parts[1], list(layer.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_no_pictures() -> None:
    latents = torch.zeros(0, 16, 4, 4, requires_grad=True)
    both, pixel, _ = DecodedLosses.apply(
        latents, torch.zeros(0, 3, 32, 32, dtype=torch.uint8), load_vae(), None, 0.0, 4, 1
    )
    both.backward()
    assert float(both) == float(pixel) == 0


def test_only_some_pictures_are_kept_at_a_time() -> None:
    vae = load_vae("tiny")
    alive: list[int] = []

    def counting(a: Tensor, b: Tensor) -> Tensor:
        alive.append(len(a))
        return metric(a, b)

    latents, pixels = torch.randn(6, 16, 4, 4, requires_grad=True), torch.zeros(6, 3, 32, 32, dtype=torch.uint8)
    DecodedLosses.apply(latents, pixels, vae, counting, 1.0, 6, 4)[0].backward()
    assert alive == [4, 2]


def test_encoding_in_parts() -> None:
    vae = load_vae()
    pixels = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    whole = vae.encode(to_images(pixels, torch.float32))
    torch.testing.assert_close(encode_pixels(vae, pixels, torch.float32, 2), whole, atol=1e-5, rtol=1e-4)


def test_pictures_at_once() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert pictures_at_once(load_vae(), cpu, 128) == 16
    assert pictures_at_once(load_vae(), cpu, 1024) == 1
    assert pictures_at_once(load_vae(), cuda, 256) == 16
    assert pictures_at_once(load_vae(), cuda, 256, chosen=3) == 3
