"""The losses of OpenVision 3, Eqs. 3-6, as pure functions.

Sums are divided by an explicit count, not by the size of what is passed in: the losses (and gradients) of the
micro-batches of one global batch add up to those of the whole batch.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def add_noise(tokens: Tensor, sigma: Tensor, epsilon: Tensor, rms: Tensor | float = 1.0) -> Tensor:
    """Eq. 3: z + sigma * epsilon, one sigma per image, for the reconstruction branch.

    tokens and epsilon (B, N, D), epsilon ~ N(0, I); sigma (B,) ~ U[0, tau]. `rms`: unit of sigma. With the root mean
    square of the global batch's tokens (no gradient), the encoder cannot escape the noise by growing; 1 is Eq. 3 to
    the letter.
    """
    assert sigma.shape == tokens.shape[:1] and epsilon.shape == tokens.shape, (sigma.shape, epsilon.shape, tokens.shape)
    rms = rms.detach() if isinstance(rms, Tensor) else rms
    return tokens + (sigma * rms)[:, None, None].to(tokens.dtype) * epsilon.to(tokens.dtype)


def root_mean_square(tokens: Tensor) -> Tensor:
    """Root mean square over all elements, a scalar without gradient."""
    return tokens.detach().float().square().mean().sqrt()


def pixel_l1(predicted: Tensor, images: Tensor, samples: int | float) -> Tensor:
    """First term of Eq. 4, l1(x, x̂): a picture's mean absolute difference, summed over pictures, by `samples`.

    Both (B, 3, H, W), in [-1, 1] (the prediction not clamped). `samples`: pictures of the global batch that are scored.
    """
    assert predicted.shape == images.shape, (predicted.shape, images.shape)
    return (predicted.float() - images.float()).abs().flatten(1).mean(dim=1).sum() / samples


def latent_l1(predicted: Tensor, latents: Tensor, samples: int | float) -> Tensor:
    """Second term of Eq. 4, l1(z_vae, ẑ_vae), in scaled latents (B, C, h, w); reduction as in `pixel_l1`."""
    return pixel_l1(predicted, latents, samples)


def perceptual_loss(
    metric: Callable[[Tensor, Tensor], Tensor], predicted: Tensor, images: Tensor, samples: int | float
) -> Tensor:
    """Third term of Eq. 4, LPIPS(x, x̂): `metric` takes two (B, 3, H, W) in [-1, 1] to (B,); then as `pixel_l1`."""
    return metric(predicted, images).float().sum() / samples


def reconstruction_loss(
    pixel: Tensor, latent: Tensor, perceptual: Tensor | float, beta: float, lpips_weight: float
) -> Tensor:
    """Eq. 4: l1(x, x̂) + beta * l1(z_vae, ẑ_vae) + lambda * LPIPS(x, x̂)."""
    return pixel + beta * latent + lpips_weight * perceptual


def contrastive_loss(image_embeddings: Tensor, text_embeddings: Tensor, temperature: Tensor | float) -> Tensor:
    """Symmetric InfoNCE over a batch of matching rows (CLIP, arXiv 2103.00020).

    Both (B, D), L2-normalised; `temperature` multiplies the cosines (`OpenVision3.temperature()`). Computed in fp32
    under autocast too: at a temperature of 100, bf16 would round the logits to steps of a half.
    """
    assert image_embeddings.shape == text_embeddings.shape, (image_embeddings.shape, text_embeddings.shape)
    with torch.autocast(image_embeddings.device.type, enabled=False):
        logits = temperature * image_embeddings.float() @ text_embeddings.float().T
        labels = torch.arange(logits.shape[0], device=logits.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def caption_loss(logits: Tensor, targets: Tensor, pad_id: int, normalizer: Tensor | int | float) -> Tensor:
    """Cross-entropy summed over the targets that are not padding, divided by `normalizer`.

    logits (B, L, V); targets (B, L): the token after each input. `normalizer`: number of targets that are not padding
    in the global batch (a mean of micro-batch means would weigh short captions more).
    """
    flat = logits.flatten(0, 1).float()
    return F.cross_entropy(flat, targets.flatten(), ignore_index=pad_id, reduction="sum") / normalizer


def understanding_loss(caption: Tensor, contrastive: Tensor, alpha: float) -> Tensor:
    """Eq. 5: L_caption + alpha * L_contrastive."""
    return caption + alpha * contrastive


def total_loss(reconstruction: Tensor, understanding: Tensor, omega_rec: float, omega_und: float) -> Tensor:
    """Eq. 6: omega_rec * L_rec + omega_und * L_und."""
    return omega_rec * reconstruction + omega_und * understanding
