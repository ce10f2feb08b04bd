"""Image-text retrieval: which caption belongs to which picture, both ways, with the ceiling that duplicates set."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from openvision3.config import OpenVisionError
from openvision3.evaluation.samples import EncodedBatch, SampleSet, encode_batches, evaluating, mean

RECALLS = (1, 5, 10)
PROTOCOL = (
    "cosine similarity of pooled image and text embeddings; the full caption of each picture against all others of the "
    "set; only a picture's own pair counts; ties are counted as their expectation under random order; ceiling: that of "
    "a model that confuses identical captions only; chance: k / n"
)
SEVERAL = (
    "; pictures have several captions: a picture finds its own by any of them, each of them looks for its picture; "
    "ceiling and chance are those of text to image"
)
_CHUNK = 1024  # queries scored at once


def hit_probability(scores: Tensor, target: Tensor, k: int) -> Tensor:
    """Probability (Q,) that the target is among the `k` best of scores (Q, G) when equal scores are ordered at random.

    `target` (Q,) indexes the columns. A model that scores everything alike gets chance, not 1.
    """
    own = scores.gather(1, target[:, None])
    better = (scores > own).sum(dim=1).double()
    equal = (scores == own).sum(dim=1).double()
    return ((k - better) / equal).clamp(0, 1)


def any_hit_probability(scores: Tensor, own: Tensor, k: int) -> Tensor:
    """The same (Q,) where there are several targets, of which one is enough: `own` (Q, G) marks them, one at least."""
    best = scores.masked_fill(~own, -math.inf).amax(dim=1, keepdim=True)
    equal = scores == best
    counts = [(scores > best).sum(dim=1), equal.sum(dim=1), (equal & ~own).sum(dim=1)]
    found = []
    for better, alike, others in torch.stack(counts, dim=1).tolist():
        places = min(max(0, k - better), alike)  # that equal scores share among them
        ways = math.comb(alike, places)
        found.append((ways - math.comb(others, places)) / ways)
    return torch.tensor(found, dtype=torch.float64)


def check_finite(embeddings: Tensor, what: str) -> Tensor:
    """The embeddings, or `OpenVisionError` where they hold NaN or infinity (which no score could rank)."""
    if not bool(torch.isfinite(embeddings).all()):
        raise OpenVisionError(f"the model's {what} embeddings are not finite: its weights are broken")
    return embeddings


def embed_texts(model: Any, texts: list[str], batch_size: int = 64) -> Tensor:
    """Normalised embeddings (len(texts), D) in fp32 on the CPU."""
    parts = [model.embed_text(texts[i : i + batch_size]).float().cpu() for i in range(0, len(texts), batch_size)]
    return check_finite(torch.cat(parts), "text")


def pooled(model: Any, batch: EncodedBatch) -> Tensor:
    """Normalised image embeddings (B, D) in fp32 on the CPU."""
    return check_finite(model.pool(batch.tokens, normalize=True).float().cpu(), "image")


def require_text_encoder(model: Any, purpose: str) -> None:
    """Raises `OpenVisionError` that names the missing part of a vision-only model."""
    if model.config.text_encoder is None:
        raise OpenVisionError(
            f"{model.config.name} has no text encoder (part 'text_encoder'), which {purpose} needs; "
            "`ov3 train attach_text --init MODEL` gives it one"
        )


def recalls(images: Tensor, texts: Tensor, rows: Tensor, owners: Tensor | None = None) -> dict[str, float]:
    """R@1, R@5 and R@10 both ways, with ceiling and chance.

    `images` (n, D) and `texts` are normalised embeddings. Of each caption, `rows` (m,) is the row of its text, and
    `owners` (m,) the picture that it belongs to (None: the i-th to the i-th; every picture has one at least). Captions
    with the same text have the same row, so that their scores are equal to the last bit.
    """
    n, m = len(images), len(rows)
    owners = torch.arange(m) if owners is None else owners
    hits: dict[str, list[float]] = {f"{way}_r{k}": [] for way in ("image_to_text", "text_to_image") for k in RECALLS}
    for start in range(0, n, _CHUNK):
        scores = (images[start : start + _CHUNK] @ texts.T)[:, rows]
        own = owners == torch.arange(start, start + len(scores))[:, None]
        for k in RECALLS:
            hits[f"image_to_text_r{k}"] += any_hit_probability(scores, own, k).tolist()
    for start in range(0, m, _CHUNK):
        scores = texts[rows[start : start + _CHUNK]] @ images.T
        for k in RECALLS:
            hits[f"text_to_image_r{k}"] += hit_probability(scores, owners[start : start + _CHUNK], k).tolist()
    figures = {name: mean(values) for name, values in hits.items()}
    pairs = torch.stack([rows, owners], dim=1).unique(dim=0)
    shared = torch.bincount(pairs[:, 0])[rows].tolist()  # pictures with the same text, for each caption
    for k in RECALLS:
        figures[f"ceiling_r{k}"] = mean([min(k, group) / group for group in shared])
        figures[f"chance_r{k}"] = min(k, n) / n
    return figures


class RetrievalMeter:
    """Gathers embeddings batch by batch; samples without a caption are left out."""

    def __init__(self, model: Any) -> None:
        require_text_encoder(model, "retrieval")
        self.model = model
        self.images: list[Tensor] = []
        self.captions: list[tuple[str, ...]] = []  # of each picture

    def update(self, batch: EncodedBatch) -> None:
        with_caption = [i for i, sample in enumerate(batch.samples) if sample.references]
        self.images.append(pooled(self.model, batch)[with_caption])
        self.captions += [batch.samples[i].references for i in with_caption]

    def result(self) -> dict[str, Any]:
        """Recalls with ceiling and chance; raises `OpenVisionError` where no picture has a caption."""
        if not self.captions:
            raise OpenVisionError("retrieval needs captions, and no picture of this data has one")
        captions = [caption for texts in self.captions for caption in texts]
        owners = torch.tensor([picture for picture, texts in enumerate(self.captions) for _ in texts])
        distinct = list(dict.fromkeys(captions))
        row = {caption: i for i, caption in enumerate(distinct)}
        rows = torch.tensor([row[caption] for caption in captions])
        figures: dict[str, Any] = recalls(torch.cat(self.images), embed_texts(self.model, distinct), rows, owners)
        figures |= {"n": len(self.captions), "distinct_captions": len(distinct)}
        return figures | {"protocol": PROTOCOL + (SEVERAL if len(captions) > len(self.captions) else "")}


def retrieval(
    model: Any, samples: SampleSet, batch_size: int = 32, progress: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """R@1, R@5, R@10 of full captions, image to text and text to image, with ceiling and chance.

    Raises `OpenVisionError` for a model without a text encoder, or data without captions.
    """
    with evaluating(model):
        meter = RetrievalMeter(model)
        for batch in encode_batches(model, samples, batch_size, progress):
            meter.update(batch)
        return meter.result()
