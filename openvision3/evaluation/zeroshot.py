"""Zero-shot classification: which label's text is nearest to the picture."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openvision3.config import OpenVisionError
from openvision3.data import grammar
from openvision3.evaluation.retrieval import embed_texts, hit_probability, pooled, require_text_encoder
from openvision3.evaluation.samples import EncodedBatch, SampleSet, encode_batches, evaluating, mean

PROTOCOL = (
    "nearest label by cosine similarity of pooled image and text embeddings, on pictures with a label (demo scenes: "
    "those of one thing); bare: one prompt a label; templates: mean of the normalised embeddings of {templates} "
    "prompts a label; chance: k / number of labels"
)


def demo_prompts(name: str) -> list[str]:
    """Prompts for a demo thing, the bare one first: alone, in two sizes, and before every scene that has a word."""
    thing = grammar.noun_phrase(name)
    sized = [grammar.noun_phrase(name, size) for size in ("small", "big")]
    return [thing, *sized, *(f"{thing} {phrase}" for phrase in grammar.scene_phrases())]


def label_prompts(label: str) -> list[str]:
    """Prompts for a label that a user wrote: the demo's own for its things, else "a photo of a {}"."""
    from openvision3.data.demo import scene_names

    return demo_prompts(label) if label in scene_names() else [f"a photo of a {label}"]


def imagenet_prompts(name: str) -> list[str]:
    """The 80 prompts of CLIP for a label of photographs, after the bare "a photo of a {}"."""
    try:
        from open_clip import OPENAI_IMAGENET_TEMPLATES
    except ImportError:
        raise OpenVisionError("the prompt templates come with open_clip: pip install openvision3[eval]") from None
    return [f"a photo of a {name}.", *(template(name) for template in OPENAI_IMAGENET_TEMPLATES)]


def label_embeddings(model: Any, prompts: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
    """Normalised label embeddings (L, D): of each label's first prompt alone, and averaged over all its prompts."""
    flat = embed_texts(model, [prompt for label in prompts for prompt in label])
    groups = flat.split([len(label) for label in prompts])
    averaged = torch.stack([group.mean(dim=0) for group in groups])
    return torch.stack([group[0] for group in groups]), F.normalize(averaged, dim=-1)


class ZeroShotMeter:
    """Gathers embeddings of labelled pictures. `prompts` has a list of texts per label, the bare one first."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[str]]) -> None:
        require_text_encoder(model, "zero-shot classification")
        if not prompts:
            raise OpenVisionError(
                "zero-shot classification needs labels: demo scenes, or a folder with a sub-folder of pictures a label"
            )
        self.model = model
        self.prompts = prompts
        self.images: list[Tensor] = []
        self.labels: list[int] = []

    def update(self, batch: EncodedBatch) -> None:
        labelled = [i for i, sample in enumerate(batch.samples) if sample.label >= 0]
        self.images.append(pooled(self.model, batch)[labelled])
        self.labels += [batch.samples[i].label for i in labelled]

    def result(self) -> dict[str, Any]:
        """Top-1 and top-5 with the bare prompt and with averaged templates; raises where no picture has a label."""
        if not self.labels:
            raise OpenVisionError("zero-shot classification needs labels, and no picture of this data has one")
        bare, averaged = label_embeddings(self.model, self.prompts)
        images, target = torch.cat(self.images), torch.tensor(self.labels)
        figures: dict[str, Any] = {}
        for name, texts in (("bare", bare), ("templates", averaged)):
            scores = images @ texts.T
            for k in (1, 5):
                figures[f"{name}_top{k}"] = mean(hit_probability(scores, target, k).tolist())
        count = len(self.prompts)
        figures |= {f"chance_top{k}": min(k, count) / count for k in (1, 5)}
        templates = max(len(prompts) for prompts in self.prompts)
        figures |= {"n": len(self.labels), "labels": count, "templates": templates}
        return figures | {"protocol": PROTOCOL.format(templates=templates)}


def prompts_for(samples: SampleSet) -> list[list[str]]:
    """A set's prompts per label: the demo's for demo scenes, CLIP's for other pictures."""
    prompts = demo_prompts if samples.scenes is not None else imagenet_prompts
    return [prompts(label) for label in samples.labels]


def zeroshot(
    model: Any,
    samples: SampleSet,
    batch_size: int = 32,
    prompts: Sequence[Sequence[str]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Top-1 and top-5 accuracy over the set's labels, with the bare prompt and with averaged templates.

    Raises `OpenVisionError` for a model without a text encoder, or data without labels.
    """
    with evaluating(model):
        meter = ZeroShotMeter(model, prompts_for(samples) if prompts is None else prompts)
        for batch in encode_batches(model, samples, batch_size, progress):
            meter.update(batch)
        return meter.result()
