"""The contrastive loss of Eq. 5 over a global batch that processes share, in blocks of logits.

A process compares its own images and texts, B of each, with all G of the global batch. No (B, G) matrix is kept: the
backward pass computes the logits again, a block of rows at a time. Nor are gradients exchanged. The gradient of the
whole loss by an image of this process needs, besides the features, one number for each text of the others (the
logarithm of the sum of its softmax), so these are gathered in the forward pass and the backward pass waits for nobody.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from openvision3.chunked import at_least_fp32, blocks
from openvision3.distributed import ALONE, World

BLOCK = 2**21  # elements of a block of logits: 8 MiB in fp32


class Everyone(NamedTuple):
    """Features of the global batch, (G, D) each, in the order of ranks."""

    images: Tensor
    texts: Tensor


def contrastive_loss(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    temperature: Tensor | float,
    world: World = ALONE,
    everyone: Everyone | None = None,
) -> Tensor:
    """This process's share of symmetric InfoNCE over the global batch of matching rows (CLIP, arXiv 2103.00020).

    Both (B, D), L2-normalised; `temperature` multiplies the cosines (`OpenVision3.temperature()`). `everyone`: the
    features gathered already, where several losses compare the same ones. Computed in fp32 (fp64 for fp64) under
    autocast too: at a temperature of 100, bf16 would round the logits to steps of a half.
    """
    with torch.autocast(image_embeddings.device.type, enabled=False):
        image, text, all_images, all_texts, factor = _prepare(
            image_embeddings, text_embeddings, temperature, world, everyone
        )
        return _Softmax.apply(image, text, all_images, all_texts, factor, world)


def sigmoid_loss(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    temperature: Tensor | float,
    bias: Tensor | float,
    world: World = ALONE,
    everyone: Everyone | None = None,
) -> Tensor:
    """This process's share of the pairwise sigmoid loss over the global batch (SigLIP, arXiv 2303.15343, Eq. 1).

    -log sigmoid(+-(temperature * cosine + bias)), plus for matching pairs, summed over all pairs, divided by G. The
    rest as for `contrastive_loss`.
    """
    with torch.autocast(image_embeddings.device.type, enabled=False):
        image, text, all_images, all_texts, factor = _prepare(
            image_embeddings, text_embeddings, temperature, world, everyone
        )
        bias = torch.as_tensor(bias, device=image.device).to(image.dtype)
        return _Sigmoid.apply(image, text, all_images, all_texts, factor, bias, world)


def _prepare(
    image: Tensor, text: Tensor, temperature: Tensor | float, world: World, everyone: Everyone | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    assert image.shape == text.shape, (image.shape, text.shape)
    image, text = at_least_fp32(image), at_least_fp32(text)
    if everyone is None:
        everyone = Everyone(world.all_gather(image), world.all_gather(text))
    assert all(len(features) == world.size * len(image) for features in everyone)
    factor = torch.as_tensor(temperature, device=image.device).to(image.dtype)
    return image, text, everyone.images, everyone.texts, factor


def _logits(rows: Tensor, columns: Tensor, factor: Tensor, first: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yields a slice of rows, their logits (R, G), and the view of those of matching pairs (R,).

    Row 0 matches column `first`.
    """
    for part in blocks(len(rows), max(1, BLOCK // len(columns))):
        logits = (factor * rows[part]) @ columns.T
        yield part, logits, logits.diagonal(first + part.start)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, all_images: Tensor, all_texts: Tensor, factor: Tensor, world: World
    ) -> Tensor:
        ctx.first = world.rank * len(image)
        total, sums = torch.zeros_like(factor), image.new_empty(len(image), 2)
        for column, (rows, others) in enumerate(((image, all_texts), (text, all_images))):
            for part, logits, pairs in _logits(rows, others, factor, ctx.first):
                sums[part, column] = logits.logsumexp(dim=1)
                total += (sums[part, column] - pairs).sum()
        ctx.save_for_backward(image, text, all_images, all_texts, factor, world.all_gather(sums))
        return total / (2 * len(all_images))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        image, text, all_images, all_texts, factor, sums = ctx.saved_tensors
        image_sums, text_sums = sums.unbind(dim=1)
        scale = gradients[0] / (2 * len(all_images))
        with torch.autocast(image.device.type, enabled=False):
            d_image = _Softmax.directions(image, all_texts, factor, image_sums, text_sums, ctx.first)
            d_text = _Softmax.directions(text, all_images, factor, text_sums, image_sums, ctx.first)
            # All pairs count here, those of the other processes' texts with these images too: by the sum over processes
            # each pair counts once in either softmax.
            d_factor = (image * d_image).sum() * scale
        return d_image.mul_(factor * scale), d_text.mul_(factor * scale), None, None, d_factor, None

    @staticmethod
    def directions(
        rows: Tensor, others: Tensor, factor: Tensor, row_sums: Tensor, other_sums: Tensor, first: int
    ) -> Tensor:
        """Sum over columns of (softmax over columns + softmax over rows - 2 where they match) * column, (B, D)."""
        found = torch.empty_like(rows)
        for part, logits, pairs in _logits(rows, others, factor, first):
            own = row_sums[first + part.start : first + part.stop, None]
            over_columns = (logits - own).exp_()
            logits.sub_(other_sums).exp_().add_(over_columns)
            pairs.sub_(2)
            torch.mm(logits, others, out=found[part])
        return found


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        all_images: Tensor,
        all_texts: Tensor,
        factor: Tensor,
        bias: Tensor,
        world: World,
    ) -> Tensor:
        ctx.first = world.rank * len(image)
        total = torch.zeros_like(factor)
        for _, logits, pairs in _logits(image, all_texts, factor, ctx.first):
            logits.add_(bias).neg_()
            pairs.neg_()
            total -= F.logsigmoid(logits).sum()
        ctx.save_for_backward(image, text, all_images, all_texts, factor, bias)
        return total / len(all_images)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        image, text, all_images, all_texts, factor, bias = ctx.saved_tensors
        scale = gradients[0] / len(all_images)
        with torch.autocast(image.device.type, enabled=False):
            d_image, excess = _Sigmoid.directions(image, all_texts, factor, bias, ctx.first)
            d_text, _ = _Sigmoid.directions(text, all_images, factor, bias, ctx.first)
            d_factor = (image * d_image).sum() * scale
        d_image.mul_(factor * scale)
        return d_image, d_text.mul_(factor * scale), None, None, d_factor, excess * scale, None

    @staticmethod
    def directions(rows: Tensor, others: Tensor, factor: Tensor, bias: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Sum over columns of (sigmoid - 1 where they match) * column, (B, D), and the sum of these weights."""
        found, excess = torch.empty_like(rows), torch.zeros_like(factor)
        for part, logits, pairs in _logits(rows, others, factor, first):
            matching = -torch.sigmoid(-(pairs + bias))  # sigmoid - 1 would lose the small ones
            logits.add_(bias).sigmoid_()
            pairs.copy_(matching)
            excess += logits.sum()
            torch.mm(logits, others, out=found[part])
        return found, excess
