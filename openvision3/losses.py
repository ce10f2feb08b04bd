"""The losses of OpenVision 3, Eqs. 3-6, as pure functions.

Sums are divided by an explicit count, not by the size of what is passed in: the losses (and gradients) of the
micro-batches of one global batch, and of the processes that share it, add up to those of the whole batch. The
contrastive loss, which compares all with all, is in `contrastive.py`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from openvision3.chunked import LinearCrossEntropy, at_least_fp32


def add_noise(tokens: Tensor, sigma: Tensor, epsilon: Tensor, rms: Tensor | float = 1.0) -> Tensor:
    """Eq. 3: z + sigma * epsilon, one sigma per image, for the reconstruction branch.

    tokens and epsilon (B, N, D), epsilon ~ N(0, I); sigma (B,) ~ U[0, tau]. `rms`: unit of sigma. With the root mean
    square of the global batch's tokens (no gradient), the encoder cannot escape the noise by growing; 1 is Eq. 3 to
    the letter.
    """
    assert sigma.shape == tokens.shape[:1] and epsilon.shape == tokens.shape, (sigma.shape, epsilon.shape, tokens.shape)
    rms = rms.detach() if isinstance(rms, Tensor) else rms
    sigma = sigma.to(torch.promote_types(sigma.dtype, tokens.dtype))
    return tokens + (sigma * rms)[:, None, None].to(tokens.dtype) * epsilon.to(tokens.dtype)


def mean_square(tokens: Tensor) -> Tensor:
    """Mean square over all elements, a scalar without gradient."""
    return at_least_fp32(tokens.detach()).square().mean()


def pixel_l1(predicted: Tensor, images: Tensor, samples: int | float) -> Tensor:
    """First term of Eq. 4, l1(x, x̂): a picture's mean absolute difference, summed over pictures, by `samples`.

    Both (B, 3, H, W), in [-1, 1] (the prediction not clamped). `samples`: pictures of the global batch that are scored.
    """
    assert predicted.shape == images.shape, (predicted.shape, images.shape)
    return (at_least_fp32(predicted) - at_least_fp32(images)).abs().flatten(1).mean(dim=1).sum() / samples


def latent_l1(predicted: Tensor, latents: Tensor, samples: int | float) -> Tensor:
    """Second term of Eq. 4, l1(z_vae, ẑ_vae), in scaled latents (B, C, h, w); reduction as in `pixel_l1`."""
    return pixel_l1(predicted, latents, samples)


def perceptual_loss(
    metric: Callable[[Tensor, Tensor], Tensor], predicted: Tensor, images: Tensor, samples: int | float
) -> Tensor:
    """Third term of Eq. 4, LPIPS(x, x̂): `metric` takes two (B, 3, H, W) in [-1, 1] to (B,); then as `pixel_l1`."""
    return at_least_fp32(metric(predicted, images)).sum() / samples


def picture_loss(pixel: Tensor, lpips: Tensor | None, weight: float) -> Tensor:
    """Eq. 4's terms of pictures: l1(x, x̂) + lambda * LPIPS(x, x̂), lambda being `weight`; None: the first alone."""
    return pixel if lpips is None else pixel + weight * lpips


def reconstruction_loss(pictures: Tensor, latent: Tensor, beta: float) -> Tensor:
    """Eq. 4: pictures + beta * l1(z_vae, ẑ_vae), with `pictures` from `picture_loss`."""
    return pictures + beta * latent


def caption_loss(
    hidden: Tensor, output: Tensor, targets: Tensor, pad_id: int, normalizer: Tensor | int | float
) -> Tensor:
    """Cross-entropy of `hidden @ output.T` summed over the targets that are not padding, divided by `normalizer`.

    hidden (B, L, W), output matrix (V, W); targets (B, L): the token after each input. `normalizer`: number of targets
    that are not padding in the global batch (a mean of micro-batch means would weigh short captions more). The logits
    (B, L, V) are never all there: see `chunked.LinearCrossEntropy`.
    """
    assert hidden.shape[:-1] == targets.shape, (hidden.shape, targets.shape)
    total = LinearCrossEntropy.apply(hidden.flatten(0, -2), output, targets.flatten(), pad_id)
    return total / normalizer


def understanding_loss(caption: Tensor, contrastive: Tensor, alpha: float) -> Tensor:
    """Eq. 5: L_caption + alpha * L_contrastive."""
    return caption + alpha * contrastive


def total_loss(reconstruction: Tensor, understanding: Tensor, omega_rec: float, omega_und: float) -> Tensor:
    """Eq. 6: omega_rec * L_rec + omega_und * L_und."""
    return omega_rec * reconstruction + omega_und * understanding
