"""Whether generated pictures show what they should: top-1 of a zero-shot head, and of a classifier of its own."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from openvision3.config import OpenVisionError
from openvision3.data import demo, grammar
from openvision3.data.transforms import preprocess
from openvision3.evaluation.fidelity import CHUNK
from openvision3.evaluation.picture_sets import sample_batches
from openvision3.evaluation.samples import EvalSample, SampleSet, mean, to_uint8
from openvision3.evaluation.scene_classifier import SceneClassifier
from openvision3.evaluation.zeroshot import demo_prompts, imagenet_prompts, zeroshot

INTENDED = "samples.jsonl"
_MAX_BYTES = 1 << 28  # of that file
_MAX_LINE = 1 << 16


def read_intended(folder: Path) -> dict[str, str]:
    """What each picture of a folder should show, by its path there: from the lines of `samples.jsonl`.

    A line has "file" and "class", a name, or "prompt", a caption of one thing. Prompts that name not exactly one demo
    thing are left out. Raises `OpenVisionError` where the file is missing, or names the line that is broken.
    """
    path = folder / INTENDED
    if not path.is_file():
        raise OpenVisionError(f'class accuracy needs {path}: one line {{"file": ..., "class": ...}} a picture')
    if path.stat().st_size > _MAX_BYTES:
        raise OpenVisionError(f"{path}: has more than {_MAX_BYTES >> 20} MiB")
    intended: dict[str, str] = {}
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(_MAX_LINE):
            number += 1
            if raw.strip():
                name, what = _line(raw, f"{path}, line {number}")
                if intended.setdefault(name, what) != what:
                    raise OpenVisionError(f"{path}, line {number}: {name} is named twice, as two different things")
    return {name: what for name, what in intended.items() if what}


def _line(raw: bytes, where: str) -> tuple[str, str]:
    """The picture's path and its class, "" where a prompt names not exactly one thing."""
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        raise OpenVisionError(f"{where}: is not one JSON object a line") from None
    name, what = (line.get("file"), line.get("class")) if isinstance(line, dict) else (None, None)
    prompt = line.get("prompt") if isinstance(line, dict) else None
    if not isinstance(name, str) or not isinstance(prompt if what is None else what, str):
        raise OpenVisionError(f'{where}: expected {{"file": TEXT, "class": TEXT}} or "prompt" in place of "class"')
    if isinstance(what, str):
        return name, what
    things = grammar.parse(str(prompt)).things
    return name, next(iter(things)) if list(things.values()) == [1] else ""


def labelled(samples: SampleSet, intended: dict[str, str], labels: Sequence[str], size: int) -> SampleSet:
    """The pictures whose intended class is among `labels`, resized to `size` pixels, with that label.

    Raises `OpenVisionError` where a class is not among the labels, which would leave its pictures out unsaid.
    """
    if unknown := sorted(set(intended.values()) - set(labels)):
        raise OpenVisionError(f"samples of {unknown[0]!r} (and {len(unknown) - 1} more) are not among the names known")
    index = {label: i for i, label in enumerate(labels)}

    def make(self: SampleSet) -> Iterator[EvalSample]:
        for sample in samples:
            if sample.key in intended:
                yield replace(sample, image=resized(sample.image, size), label=index[intended[sample.key]])
        self.failed += samples.failed

    return replace(samples, size=size, make=make, labels=tuple(labels), failed=[])


def resized(image: np.ndarray, size: int) -> np.ndarray:
    """A square picture, uint8 (S, S, 3), at `size` pixels: antialiased bicubic; itself where it has that size."""
    if image.shape[:2] == (size, size):
        return image
    return to_uint8(preprocess(Image.fromarray(image), size)).permute(1, 2, 0).numpy()


def zeroshot_accuracy(
    model: Any, samples: SampleSet, intended: dict[str, str], labels: Sequence[str], batch_size: int = 32
) -> dict[str, Any]:
    """Top-1 and top-5 of generated pictures by a model's zero-shot head over `labels`; see `evaluation.zeroshot`."""
    pictures = labelled(samples, intended, labels, model.config.image_size)
    write = demo_prompts if set(labels) <= set(demo.scene_names()) else imagenet_prompts
    return zeroshot(model, pictures, batch_size, [write(label) for label in labels])


def classifier_accuracy(
    classifier: SceneClassifier,
    samples: SampleSet,
    intended: dict[str, str],
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Top-1 of generated pictures by an independent classifier, beside its own top-1 on held-out real scenes."""
    pictures = labelled(samples, intended, classifier.names, classifier.size)
    hits: list[float] = []
    for batch, pixels in sample_batches(pictures, CHUNK):
        found = classifier.predict(pixels).tolist()
        hits += [float(name == sample.label) for name, sample in zip(found, batch, strict=True)]
        if progress:
            progress(len(hits))
    if not hits:
        raise OpenVisionError("no picture has an intended class")
    return {
        "top1": mean(hits),
        "real_top1": classifier.card.held_out_top1,
        "chance_top1": 1 / len(classifier.names),
        "n": len(hits),
        "labels": len(classifier.names),
        "sha256": classifier.sha256,
        "protocol": classifier.protocol,
    }


def intended_labels(intended: dict[str, str], num_names: int = 0) -> tuple[str, ...]:
    """The labels to choose among: the demo's `num_names` names, or (0) all classes that the samples have, sorted."""
    return demo.names(num_names) if num_names else tuple(sorted(set(intended.values())))
