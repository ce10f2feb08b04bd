"""`ov3 eval front`: what a fast front costs in quality, and what it saves."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from openvision3.commands import common
from openvision3.commands.batching import OutputOptions
from openvision3.commands.common import ModelOptions
from openvision3.commands.evaluation import EvalOptions, Model, Options, Output
from openvision3.config import SceneConfig

if TYPE_CHECKING:
    from openvision3.evaluation.samples import SampleSet


def front(model: Model = ModelOptions(), options: Options = EvalOptions(), output: Output = OutputOptions()) -> int:
    """Token cosine, change of zero-shot top-1 and of PSNR, GFLOPs and speed of a fast front (--vae FOLDER)."""
    common.refuse_existing(output.json, output.overwrite)
    loaded = common.load_model(model)
    from openvision3.evaluation.samples import open_samples

    size = options.size or loaded.config.image_size
    scenes = SceneConfig(num_names=options.num_names)
    data = open_samples(options.data, size, options.samples, scenes, options.labels, options.captions)
    figures = _compare(loaded, data, options.batch_size)
    common.write_json(output.json, figures, output.overwrite)
    for name, reason in data.failed:
        common.fail(reason if name in reason else f"{name}: {reason}")
    return 1 if data.failed else 0


def measure(model: str, folder: Path, device: str, source: str, size: int, json: Path) -> None:
    """Prints and writes the figures of the fast front in `folder` for a model; `size` 0 is the model's own."""
    from openvision3.evaluation.samples import open_samples

    loaded = common.load_model(ModelOptions(model=model, vae=str(folder), device=device))
    figures = _compare(loaded, open_samples(source, size or loaded.config.image_size))
    common.write_json(json, figures, overwrite=True)


def _compare(model: Any, data: "SampleSet", batch_size: int = 32) -> dict[str, Any]:
    from openvision3.evaluation.front import compare_front

    with common.Progress(None, "pictures") as progress:
        figures = compare_front(model, data, batch_size, progress=lambda done: progress.advance(done - progress.done))
    print_comparison(figures)
    return figures


def print_comparison(figures: dict[str, Any]) -> None:
    """Two tables: quality with and without the front, and cost."""
    from openvision3.evaluation.front import COMPARED

    rows: list[tuple[Any, ...]] = []
    for name, (part, figure) in COMPARED.items():
        values = [figures[side].get(part, {}).get(figure) for side in ("original", "front")]
        if None not in values:
            rows.append((name, *values, f"{values[1] - values[0]:+.4f}"))
    if rows:
        title = "the model, with the VAE's encoder and with the fast one"
        common.print_table(title, ("", "VAE", "fast", "change"), rows)
    rows = [(name.replace("_", " "), value) for name, value in figures["agreement"].items()]
    common.print_table("fast encoder against the VAE's", ("", "mean"), rows)
    speed = figures["speed"]
    rate, gflops = speed["pictures_per_second"], speed["gflops"]
    rows = [
        ("GFLOPs, pixels to latents", gflops["original"], gflops["front"], gflops["original"] / gflops["front"]),
        ("pictures a second, to latents", rate["original"], rate["front"], speed["latents_speedup"]["median"]),
        (
            "pictures a second, to tokens",
            rate["original to tokens"],
            rate["front to tokens"],
            speed["tokens_speedup"]["median"],
        ),
    ]
    common.print_table(f"{speed['size']} px, batch {speed['batch_size']}", ("", "VAE", "fast", "times"), rows)
    print(f"({figures['protocol']}; {figures['machine']})")
