"""`ov3 eval ...`: figures of a model on demo scenes, a folder of pictures or tars, each with its protocol."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from openvision3.commands import common
from openvision3.commands.batching import OutputOptions
from openvision3.commands.common import ModelOptions
from openvision3.config import OpenVisionError, SceneConfig

if TYPE_CHECKING:
    from openvision3.evaluation.fidelity import FeatureNetwork
    from openvision3.evaluation.samples import SampleSet

SIZE = 128  # pixels, where the model has no size of its own
ALL = ("reconstruction", "zeroshot", "retrieval", "captioning", "probe")


@dataclass(frozen=True)
class EvalOptions:
    """What is measured on, and how."""

    data: str = "scenes-v1"  # the demo's benchmark, or "landscapes", a folder (sub-folders are labels), tars
    samples: int = 0  # pictures used; 0: all (scenes-v1 has 1000)
    size: int = 0  # side of the square pictures, pixels; 0: the model's own
    batch_size: int = 32
    num_names: int = 494  # scenes-v1 with things of this many names alone, for an encoder that was trained on no more
    labels: Path | None = None  # for a folder: a file with one label a line, in the order of its sub-folders
    captions: Path | None = None  # for a folder: COCO's file of its captions, such as captions_val2017.json
    num_beams: int = 1  # of captions; 1 is greedy
    fidelity: bool = True  # distances of the two sets of pictures, on Inception's features if there, else EffNetLite0's
    inception: str = ""  # file of Inception's weights, for rFID
    html: Path | None = None  # also write the figures as a page


Model = Annotated[ModelOptions, tyro.conf.arg(name="")]
Options = Annotated[EvalOptions, tyro.conf.arg(name="")]
Output = Annotated[OutputOptions, tyro.conf.arg(name=""), tyro.conf.FlagCreatePairsOff]


def reconstruction(
    model: Model = ModelOptions(), options: Options = EvalOptions(), output: Output = OutputOptions()
) -> int:
    """PSNR, SSIM, LPIPS and set distances of the model and of its VAE alone (the ceiling)."""
    return _evaluate(("reconstruction",), model, options, output)


def zeroshot(model: Model = ModelOptions(), options: Options = EvalOptions(), output: Output = OutputOptions()) -> int:
    """Zero-shot top-1 and top-5 with the bare prompt and with averaged prompts."""
    return _evaluate(("zeroshot",), model, options, output)


def retrieval(model: Model = ModelOptions(), options: Options = EvalOptions(), output: Output = OutputOptions()) -> int:
    """R@1, R@5 and R@10 from pictures to texts and back."""
    return _evaluate(("retrieval",), model, options, output)


def captioning(
    model: Model = ModelOptions(), options: Options = EvalOptions(), output: Output = OutputOptions()
) -> int:
    """Exactness of captions (things, counts, relations, scene) and CIDEr-D."""
    return _evaluate(("captioning",), model, options, output)


def probe(model: Model = ModelOptions(), options: Options = EvalOptions(), output: Output = OutputOptions()) -> int:
    """A linear probe on pooled embeddings."""
    return _evaluate(("probe",), model, options, output)


def everything(
    model: Model = ModelOptions(), options: Options = EvalOptions(), output: Output = OutputOptions()
) -> int:
    """All parts in one pass over the pictures; parts that the model or the data lack are left out, with the reason."""
    return _evaluate(ALL, model, options, output)


def vae(
    source: Annotated[str, tyro.conf.arg(name="vae")] = "tiny",
    device: str = "auto",
    options: Options = EvalOptions(),
    output: Output = OutputOptions(),
) -> int:
    """PSNR, SSIM, LPIPS and set distances of a frozen VAE alone, the ceiling of any model on its latents.

    vae: "tiny", or a diffusers autoencoder's folder or hub id.
    """
    common.refuse_existing(output.json, output.overwrite)
    common.refuse_existing(options.html, output.overwrite)
    from openvision3.evaluation.vae_alone import VAEAlone
    from openvision3.training.precision import resolve_device
    from openvision3.vae import load_vae

    return _measure(VAEAlone(load_vae(source, resolve_device(device))), source, ("reconstruction",), options, output)


def _evaluate(parts: Sequence[str], model: ModelOptions, options: EvalOptions, output: OutputOptions) -> int:
    common.refuse_existing(output.json, output.overwrite)
    common.refuse_existing(options.html, output.overwrite)
    return _measure(common.load_model(model), model.model, parts, options, output)


def _measure(loaded: Any, name: str, parts: Sequence[str], options: EvalOptions, output: OutputOptions) -> int:
    """Measures a loaded model, prints the figures and writes what was asked for; returns the exit code."""
    from openvision3.data.demo import BENCHMARK, BENCHMARK_SAMPLES
    from openvision3.evaluation.evaluate import evaluate_all
    from openvision3.evaluation.samples import open_samples

    scenes = SceneConfig(num_names=options.num_names)
    size = options.size or getattr(loaded.config, "image_size", SIZE)
    data = open_samples(options.data, size, options.samples, scenes, options.labels, options.captions)
    network = _feature_network(options, loaded) if "reconstruction" in parts and options.fidelity else None
    total = options.samples or (BENCHMARK_SAMPLES if options.data == BENCHMARK else None)
    with common.Progress(total, "pictures") as progress:
        figures = evaluate_all(
            loaded,
            data,
            parts,
            batch_size=options.batch_size,
            num_beams=options.num_beams,
            network=network,
            progress=lambda done: progress.advance(done - progress.done),
        )
    _print(figures, parts)
    common.write_json(output.json, figures, output.overwrite)
    if options.html is not None:
        from openvision3.evaluation.gallery import gallery
        from openvision3.evaluation.report import Report, write_report
        from openvision3.model.openvision3 import OpenVision3

        pictures = gallery(loaded, data) if isinstance(loaded, OpenVision3) else []
        write_report(Report(title=f"{name} on {options.data}", figures=figures, gallery=pictures), options.html)
    return _failures(data)


def _feature_network(options: EvalOptions, model: Any) -> "FeatureNetwork | None":
    """Inception where its weights are, else EfficientNet-Lite0; None, with a line on stderr, without either."""
    from openvision3.evaluation.fidelity import inception_path, load_effnet_lite0, load_inception

    if inception_path(options.inception) is not None:
        return load_inception(options.inception, model.device)
    try:
        return load_effnet_lite0(model.device)
    except OpenVisionError as error:
        common.fail(f"distances of the sets are left out: {error}")
        return None


def _print(figures: dict[str, Any], parts: Sequence[str]) -> None:
    data = figures["data"]
    print(f"{figures['model']['name']} on {data['n']} pictures: {data['protocol']}")
    for part in [part for name in parts for part in (name, f"{name}_landscapes") if part in figures]:
        rows = [(name, value) for name, value in figures[part].items() if isinstance(value, int | float)]
        common.print_table(part.replace("_", " on "), ("figure", "value"), rows)
        print(f"({figures[part]['protocol']})")
    for part, reason in figures.get("left_out", {}).items():
        print(f"left out: {part}: {reason}", file=sys.stderr)


def _failures(data: "SampleSet") -> int:
    for name, reason in data.failed:
        common.fail(reason if name in reason else f"{name}: {reason}")
    return 1 if data.failed else 0
