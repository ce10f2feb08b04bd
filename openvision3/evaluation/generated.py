"""Scores of generated pictures: gFID, sFID, Inception Score, precision, recall and KID against a reference.

Where Inception's weights can't be had, the distances are those of EfficientNet-Lite0 under its own names, which compare
models with each other and never with published figures.
"""

import platform
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import openvision3
from openvision3.config import OpenVisionError
from openvision3.evaluation import bootstrap, manifold
from openvision3.evaluation.bootstrap import kernel_estimate
from openvision3.evaluation.fidelity import (
    CHUNK,
    INCEPTION_FILE,
    FeatureNetwork,
    Statistics,
    extract_features,
    frechet_distance,
    statistics,
)
from openvision3.evaluation.inception import GenerationInception, split_parts
from openvision3.evaluation.manifold import precision_recall
from openvision3.evaluation.picture_sets import Reference, sample_batches, sha256_of
from openvision3.evaluation.samples import SampleSet

SPLITS = 10
SHUFFLE_SEED = 2020  # torch-fidelity's
NO_INCEPTION = (
    f"without {INCEPTION_FILE} there are no gFID, sFID and Inception Score: distances are EfficientNet-Lite0's, under "
    "its name, and compare with nothing published"
)
_LIBRARIES = ("torch", "torch-fidelity", "timm", "numpy", "pillow")


def inception_score(logits: Tensor, splits: int = SPLITS, seed: int = SHUFFLE_SEED) -> tuple[float, float]:
    """Inception Score of logits (N, C): mean and (population) std over `splits` parts of the set.

    Pictures are shuffled by a fixed seed first: files ordered by class would put few classes into each part and deflate
    the score. Raises `OpenVisionError` where there are fewer pictures than parts.
    Source: Salimans et al., 2016 (https://arxiv.org/abs/1606.03498); splits and shuffling as torch-fidelity's.
    """
    count = len(logits)
    if count < splits:
        raise OpenVisionError(f"an Inception Score of {splits} parts needs as many pictures, got {count}")
    order = torch.from_numpy(np.random.RandomState(seed).permutation(count))  # the generator that torch-fidelity has
    log_p = logits[order].double().log_softmax(dim=1)
    scores = []
    for i in range(splits):
        part = log_p[i * count // splits : (i + 1) * count // splits]
        marginal = part.exp().mean(dim=0).log()
        scores.append(float((part.exp() * (part - marginal)).sum(dim=1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


def evaluate_generated(
    samples: SampleSet,
    reference: Reference,
    network: FeatureNetwork,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """All scores of `samples` that the network and the reference allow; what they don't is in `left_out`, with reasons.

    `network` is a `GenerationInception`, or EfficientNet-Lite0 in its place. `progress` is called with the number of
    pictures done, of both sets. Gives `figures` (name to value), `samples` and `reference` (count, side, sha256, what
    it is), `protocol`, and `versions`. Raises `OpenVisionError` where there is nothing to compare.
    """
    if reference.pictures is None and not isinstance(network, GenerationInception):
        raise OpenVisionError(f"{reference.name} has statistics of Inception's features alone: its weights are needed")
    done = 0

    def pixels(pictures: SampleSet) -> Iterator[Tensor]:
        nonlocal done
        for _, batch in sample_batches(pictures, CHUNK):
            yield batch
            done += len(batch)
            if progress:
                progress(done)

    features = extract_features(pixels(samples), network)
    real = None
    if reference.pictures is not None:
        real = extract_features(pixels(reference.pictures), network)
    left_out: dict[str, str] = {}
    device = next(network.parameters()).device
    if isinstance(network, GenerationInception):
        figures = _inception_figures(features, real, reference, left_out, device)
    else:
        assert real is not None
        figures = {f"FD-{network.name}": frechet_distance(statistics(real), statistics(features))}
        figures |= _set_figures(real, features, network.name, f"KID-{network.name}", left_out, device)
        left_out["gFID, sFID, Inception Score"] = NO_INCEPTION
    return {
        "figures": figures,
        "left_out": left_out,
        "samples": _describe(samples, len(features), sha256_of(Path(samples.name))),
        "reference": _describe(reference.pictures, 0 if real is None else len(real), reference.sha256)
        | {"stored_statistics": reference.pooled is not None and isinstance(network, GenerationInception)},
        "versions": versions(),
        "protocol": protocol(network),
    }


def _inception_figures(
    features: Tensor, real: Tensor | None, reference: Reference, left_out: dict[str, str], device: torch.device
) -> dict[str, float]:
    parts, real_parts = split_parts(features), None if real is None else split_parts(real)
    figures: dict[str, float] = {}
    stored: tuple[tuple[str, Statistics | None, int], ...] = (
        ("gFID", reference.pooled, 0),
        ("sFID", reference.spatial, 2),
    )
    for name, ready, part in stored:
        # a file with statistics of its own is compared with by these, as ADM's evaluator does, whatever else it has
        if ready is None and (real_parts is None or reference.pooled is not None):
            left_out[name] = "the reference has no statistics of these features"
            continue
        if ready is None:
            assert real_parts is not None
            ready = statistics(real_parts[part])
        figures[name] = frechet_distance(ready, statistics(parts[part]))
    try:
        figures["Inception Score"], figures["Inception Score, std of parts"] = inception_score(parts.logits)
    except OpenVisionError as error:
        left_out["Inception Score"] = str(error)
    if real_parts is None:
        left_out["precision, recall, KID"] = "the reference holds statistics alone, and these need its pictures"
        return figures
    return figures | _set_figures(real_parts.pooled, parts.pooled, "Inception", "KID", left_out, device)


def _set_figures(
    real: Tensor, features: Tensor, network: str, kernel: str, left_out: dict[str, str], device: torch.device
) -> dict[str, float]:
    """Precision, recall and the kernel distance with its interval, all on pooled features."""
    figures = {}
    try:
        precision, recall = precision_recall(real, features, device=device)
        figures = {f"precision ({network})": precision, f"recall ({network})": recall}
    except OpenVisionError as error:
        left_out["precision, recall"] = str(error)
    estimate = kernel_estimate(real, features)
    return figures | {
        kernel: estimate.value,
        f"{kernel}, low end of 95 %": estimate.low,
        f"{kernel}, high end of 95 %": estimate.high,
    }


def _describe(pictures: SampleSet | None, count: int, sha256: str) -> dict[str, Any]:
    if pictures is None:
        return {"what": "stored statistics alone", "n": 0, "sha256": sha256}
    return {"what": pictures.protocol, "n": count, "size": pictures.size, "sha256": sha256}


def protocol(network: FeatureNetwork) -> str:
    """How `evaluate_generated` measures, in words, to stand beside its figures."""
    lines = [
        network.protocol,
        "features in fp32, statistics and distances in float64, unbiased covariances",
        f"precision and recall: k = {manifold.K}, on the pooled features, exact",
        f"kernel distance: cubic kernel, unbiased, all pairs of at most {bootstrap.MOST} pictures a set (seed 0), with "
        f"the percentile bootstrap's 95 % interval over pictures of both sets, {bootstrap.REPLICATES} replicates",
    ]
    if isinstance(network, GenerationInception):
        lines.insert(2, "sFID: first 7 channels of the 17 x 17 map mixed_6/conv, 2023 values, as ADM's evaluator")
        lines.insert(
            3, f"Inception Score: logits without bias, {SPLITS} parts of the set shuffled by seed {SHUFFLE_SEED}"
        )
    return "; ".join(lines)


def versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that figures depend on."""
    found = {"openvision3": openvision3.__version__, "python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found
