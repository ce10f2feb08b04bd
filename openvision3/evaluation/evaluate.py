"""All figures of a model in one pass over the pictures, with protocol, counts and seed beside them."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from torch import nn

from openvision3.config import OpenVisionError, SceneConfig
from openvision3.data.demo import BENCHMARK
from openvision3.evaluation.captioning import CaptionMeter
from openvision3.evaluation.fidelity import FeatureNetwork
from openvision3.evaluation.perceptual import load_lpips
from openvision3.evaluation.probe import PER_LABEL, ProbeMeter
from openvision3.evaluation.reconstruction import ReconstructionMeter
from openvision3.evaluation.retrieval import RetrievalMeter
from openvision3.evaluation.samples import (
    EncodedBatch,
    SampleSet,
    encode_batches,
    evaluating,
    landscape_samples,
    open_samples,
)
from openvision3.evaluation.zeroshot import ZeroShotMeter, prompts_for

Part = Literal["reconstruction", "zeroshot", "retrieval", "captioning", "probe"]
PARTS: tuple[Part, ...] = ("reconstruction", "zeroshot", "retrieval", "captioning", "probe")


class Meter(Protocol):
    """Takes encoded batches and gives figures."""

    def update(self, batch: EncodedBatch) -> None: ...

    def result(self) -> dict[str, Any]: ...


def evaluate_all(
    model: Any,
    data: str | SampleSet = BENCHMARK,
    parts: Sequence[str] = PARTS,
    samples: int = 0,
    batch_size: int = 32,
    *,
    size: int = 0,
    scenes: SceneConfig | None = None,
    landscapes: bool = True,
    num_beams: int = 1,
    probe_per_label: int = PER_LABEL,
    perceptual: nn.Module | None = None,
    network: FeatureNetwork | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Measures the `parts` of a model on `data` (see `open_samples`), encoding each picture once.

    Returns `{"data": {...}, "model": {...}, "reconstruction": {...}, ..., "left_out": {part: reason}}`. On demo scenes,
    reconstruction is also measured on the held-out landscapes (`reconstruction_landscapes`). `size` 0 is the model's
    own. LPIPS is loaded where `perceptual` is None, and left out where its weights can't be had; `network` adds Fréchet
    and kernel distances. Nothing is drawn at
    random: the same call gives the same figures to the last digit. Parts that the model or the data lack are left out;
    where that leaves nothing, raises `OpenVisionError`.
    """
    for part in parts:
        if part not in PARTS:
            raise OpenVisionError(f"there is no part {part!r} to evaluate; it has {', '.join(PARTS)}")
    if isinstance(data, str):
        data = open_samples(data, size or model.config.image_size, samples, scenes)
    step = model.config.downsampling
    if data.size % step:
        raise OpenVisionError(f"size is {data.size}, but this model needs a multiple of {step} pixels")
    left_out: dict[str, str] = {}
    if "reconstruction" in parts and perceptual is None:
        perceptual = _lpips_or_reason(model, left_out)
    makers: dict[str, Callable[[], Meter]] = {
        "reconstruction": lambda: ReconstructionMeter(model, perceptual, network),
        "zeroshot": lambda: ZeroShotMeter(model, prompts_for(data)),
        "retrieval": lambda: RetrievalMeter(model),
        "captioning": lambda: CaptionMeter(model, num_beams),
        "probe": lambda: ProbeMeter(model, data, batch_size, probe_per_label),
    }
    meters = _meters({part: makers[part] for part in PARTS if part in parts}, left_out)
    figures: dict[str, Any] = {"data": {}, "model": describe_model(model)}
    with evaluating(model):
        done = 0
        for batch in encode_batches(model, data, batch_size, progress):
            done += len(batch.samples)
            for meter in meters.values():
                meter.update(batch)
        for part, meter in meters.items():
            try:
                figures[part] = meter.result()
            except OpenVisionError as error:
                left_out[part] = str(error)
        figures["data"] = describe_data(data, done, batch_size)
        if "reconstruction" in meters and data.scenes is not None and landscapes:
            figures["reconstruction_landscapes"] = _on_landscapes(model, data.size, batch_size, perceptual)
    if not any(part in figures for part in parts):
        raise OpenVisionError("; ".join(dict.fromkeys(left_out.values())))
    return _finite(figures | ({"left_out": left_out} if left_out else {}))


def _finite(value: Any) -> Any:
    """The same figures with None for NaN (a mean over nothing), which JSON has no name for."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _meters(makers: dict[str, Callable[[], Meter]], left_out: dict[str, str]) -> dict[str, Meter]:
    """The meters that model and data allow; the others' reasons go to `left_out`. Raises where there is none."""
    meters: dict[str, Meter] = {}
    for part, make in makers.items():
        try:
            meters[part] = make()
        except OpenVisionError as error:
            left_out[part] = str(error)
    if not meters:
        raise OpenVisionError("; ".join(dict.fromkeys(left_out.values())))
    return meters


def _lpips_or_reason(model: Any, left_out: dict[str, str]) -> nn.Module | None:
    if model.config.decoder is None:
        return None
    try:
        return load_lpips("alex").to(next(model.parameters()).device)
    except OpenVisionError as error:
        left_out["lpips"] = str(error)
        return None


def _on_landscapes(model: Any, size: int, batch_size: int, perceptual: nn.Module | None) -> dict[str, Any]:
    meter, samples = ReconstructionMeter(model, perceptual), landscape_samples(size)
    for batch in encode_batches(model, samples, batch_size):
        meter.update(batch)
    figures = meter.result()
    return figures | {"protocol": f"{samples.protocol}; {figures['protocol']}"}


def describe_data(data: SampleSet, done: int, batch_size: int) -> dict[str, Any]:
    """What was measured on, as it is printed and saved beside the figures."""
    return {
        "name": data.name,
        "protocol": data.protocol,
        "size": data.size,
        "seed": data.seed,
        "n": done,
        "failed": len(data.failed),
        "batch_size": batch_size,
    }


def describe_model(model: Any) -> dict[str, Any]:
    """The model's name, size by part, and the precision that it was measured in."""
    parameters = {part: int(count) for part, count in model.num_parameters().items()}
    return {"name": model.config.name, "parameters": parameters, "dtype": str(next(model.parameters()).dtype)[6:]}


def flat_figures(figures: dict[str, Any]) -> dict[str, float]:
    """The numbers of `evaluate_all` as `part/name`, for logs."""
    return {
        f"{part}/{name}": float(value)
        for part, values in figures.items()
        if part in PARTS or part == "reconstruction_landscapes"
        for name, value in values.items()
        if isinstance(value, int | float)
    }
