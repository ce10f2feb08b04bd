"""A linear probe: how much of the label a linear map reads out of the frozen tokens."""

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from openvision3.config import OpenVisionError
from openvision3.evaluation.samples import (
    EncodedBatch,
    SampleSet,
    encode_batches,
    evaluating,
    one_thing,
    scene_samples,
)

TRAIN_SEED = 2000  # scenes for the probe's training: the training landscapes, and a seed that no recipe uses
PER_LABEL = 16
C = 0.1  # inverse strength of the L2 penalty
PROTOCOL = (
    "multinomial logistic regression (scikit-learn, lbfgs, L2, C = {c}) on the mean of the frozen encoder's tokens z_u "
    "(before norm and projection), standardised by the training pictures; {split}; chance: 1 / number of labels"
)


class FeatureMeter:
    """Gathers the mean token (before norm and projection) of every labelled picture."""

    def __init__(self) -> None:
        self.features: list[torch.Tensor] = []
        self.labels: list[int] = []

    def update(self, batch: EncodedBatch) -> None:
        labelled = [i for i, sample in enumerate(batch.samples) if sample.label >= 0]
        self.features.append(batch.tokens.float().mean(dim=1).cpu()[labelled])
        self.labels += [batch.samples[i].label for i in labelled]

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Features (n, D) in float64 and labels (n,); raises `OpenVisionError` where they are empty or not finite."""
        if not self.labels:
            raise OpenVisionError("a linear probe needs labels, and no picture of this data has one")
        features = torch.cat(self.features).double().numpy()
        if not np.isfinite(features).all():
            raise OpenVisionError("the model's tokens are not finite: its weights are broken")
        return features, np.asarray(self.labels)


def fit_and_score(
    train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], c: float = C
) -> dict[str, float]:
    """Top-1 on training and test features (n, D) with labels (n,), of a logistic regression on the training ones."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(train[1])) < 2:
        raise OpenVisionError("a linear probe needs pictures of at least two labels to train on")
    centre, spread = train[0].mean(axis=0), train[0].std(axis=0) + 1e-6
    probe = LogisticRegression(C=c, max_iter=300)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the last digits of the fit don't matter here
        probe.fit((train[0] - centre) / spread, train[1])
    figures = {}
    for name, (features, labels) in (("top1", test), ("train_top1", train)):
        figures[name] = float(np.mean(probe.predict((features - centre) / spread) == labels))
    return figures


def held_out(labels: np.ndarray) -> np.ndarray:
    """Which pictures (n,) of a labelled folder are the probe's test: every fourth of each label, in their order."""
    seen: Counter[int] = Counter()
    chosen = []
    for label in labels.tolist():
        seen[label] += 1
        chosen.append(seen[label] % 4 == 0)
    return np.asarray(chosen)


class ProbeMeter(FeatureMeter):
    """A `FeatureMeter` over the test pictures that also knows where the training pictures come from."""

    def __init__(self, model: Any, samples: SampleSet, batch_size: int, per_label: int = PER_LABEL) -> None:
        super().__init__()
        if not samples.labels:
            raise OpenVisionError(
                "a linear probe needs labels: demo scenes, or a folder with one sub-folder of pictures a label"
            )
        self.model = model
        self.samples = samples
        self.batch_size = batch_size
        self.per_label = per_label

    def result(self) -> dict[str, Any]:
        """Top-1 on the test pictures, with counts."""
        scenes = self.samples.scenes
        if scenes is not None:
            count = self.per_label * len(self.samples.labels)
            train_set = scene_samples(count, self.samples.size, one_thing(scenes), "train", TRAIN_SEED)
            meter = FeatureMeter()
            for batch in encode_batches(self.model, train_set, self.batch_size):
                meter.update(batch)
            train, test = meter.arrays(), self.arrays()
            where = (
                f"trained on {count} scenes of one thing (split train, seed {TRAIN_SEED}), tested on those of "
                f"{self.samples.name}"
            )
        else:
            features, labels = self.arrays()
            chosen = held_out(labels)
            if not chosen.any():
                raise OpenVisionError("a linear probe needs labels with at least four pictures")
            train, test = (features[~chosen], labels[~chosen]), (features[chosen], labels[chosen])
            where = "tested on every fourth picture of each label, trained on the others"
        figures: dict[str, Any] = fit_and_score(train, test)
        count = len(self.samples.labels)
        figures |= {"chance_top1": 1 / count, "n": len(test[1]), "n_train": len(train[1]), "labels": count}
        return figures | {"protocol": PROTOCOL.format(c=C, split=where)}


def probe(
    model: Any,
    samples: SampleSet,
    batch_size: int = 32,
    per_label: int = PER_LABEL,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Top-1 of a linear probe for which thing (or label) a picture shows.

    Raises `OpenVisionError` for data without labels.
    """
    with evaluating(model):
        meter = ProbeMeter(model, samples, batch_size, per_label)
        for batch in encode_batches(model, samples, batch_size, progress):
            meter.update(batch)
        return meter.result()
