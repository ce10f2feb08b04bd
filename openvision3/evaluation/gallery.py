"""Pictures to look at: originals beside the VAE's and the model's reconstructions, token maps and captions."""

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openvision3.evaluation.captioning import judge
from openvision3.evaluation.reconstruction import psnr
from openvision3.evaluation.samples import EncodedBatch, SampleSet, encode_batches, evaluating, to_uint8


@dataclass
class GalleryRow:
    """One picture and what the model makes of it. Pictures are uint8 (H, W, 3); None where the model lacks the part."""

    key: str
    original: np.ndarray
    vae: np.ndarray | None = None
    vae_psnr: float | None = None
    model: np.ndarray | None = None
    model_psnr: float | None = None
    tokens: np.ndarray | None = None  # (H/16, W/16, 3): three principal components as red, green, blue
    caption: str = ""  # the reference
    model_caption: str | None = None
    verdict: dict[str, float] = field(default_factory=dict)  # see `captioning.judge`


def gallery(model: Any, samples: SampleSet, count: int = 12) -> list[GalleryRow]:
    """Rows for the first `count` samples (not chosen by hand), in one batch."""
    first = SampleSet(
        samples.name, samples.protocol, samples.size, samples.seed, lambda _: itertools.islice(iter(samples), count)
    )
    with evaluating(model):
        (batch,) = encode_batches(model, first, count)
        return _rows(model, batch)


def _rows(model: Any, batch: EncodedBatch) -> list[GalleryRow]:
    height, width = batch.images.shape[2:]
    grid = (height // model.config.downsampling, width // model.config.downsampling)
    rows = [
        GalleryRow(sample.key, sample.image, tokens=tokens, caption=sample.caption)
        for sample, tokens in zip(batch.samples, token_pictures(batch.tokens, grid), strict=True)
    ]
    if model.vae is not None:
        pixels = to_uint8(model.vae.decode(model.vae.encode(batch.images))).cpu()
        for row, picture, value in zip(rows, pixels, psnr(batch.pixels, pixels).tolist(), strict=True):
            row.vae, row.vae_psnr = picture.permute(1, 2, 0).numpy(), value
    if model.config.decoder is not None:
        pixels = to_uint8(model.decode(batch.tokens, grid=grid)).cpu()
        for row, picture, value in zip(rows, pixels, psnr(batch.pixels, pixels).tolist(), strict=True):
            row.model, row.model_psnr = picture.permute(1, 2, 0).numpy(), value
    if model.config.text_decoder is not None:
        for row, sample, caption in zip(rows, batch.samples, model.caption(tokens=batch.tokens), strict=True):
            row.model_caption = caption
            row.verdict = judge(sample.scene, sample.scene_word, caption) if sample.scene is not None else {}
    return rows


def token_pictures(tokens: Tensor, grid: tuple[int, int]) -> list[np.ndarray]:
    """The first three principal components of tokens (B, N, D) over the whole batch, as uint8 (h, w, 3) pictures.

    Each component is stretched from its 1st to its 99th percentile, with the sign that makes its largest weight
    positive, so that the same tokens give the same colours. Where there are fewer, the missing colours stay grey.
    """
    flat = tokens.double().cpu().flatten(0, 1)
    flat = flat - flat.mean(dim=0)
    axes = torch.linalg.svd(flat, full_matrices=False).Vh[:3].T
    signs = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    components = flat @ (axes * signs)
    bounds = torch.quantile(components, torch.tensor([0.01, 0.99], dtype=torch.float64), dim=0)
    spread = (bounds[1] - bounds[0]).clamp(min=1e-12)
    colours = ((components - bounds[0]) / spread).clamp(0, 1)
    colours = torch.nn.functional.pad(colours, (0, 3 - colours.shape[1]), value=0.5)
    pictures = (colours * 255).round().to(torch.uint8).reshape(len(tokens), *grid, 3)
    return list(pictures.numpy())
