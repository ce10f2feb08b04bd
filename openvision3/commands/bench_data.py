"""`ov3 bench data`: samples a second from tars or rendered scenes, and how many cores feed one device."""

import dataclasses
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from openvision3.commands.batching import OutputOptions
from openvision3.commands.common import print_table, refuse_existing, write_json
from openvision3.commands.data import Paths
from openvision3.config import DataConfig, OpenVisionError, TrainConfig

if TYPE_CHECKING:
    from openvision3.bench.feeding import Demand, Feed

PICTURES = 256  # that are made where there is no source

Output = Annotated[OutputOptions, tyro.conf.arg(name=""), tyro.conf.FlagCreatePairsOff]


def bench_data(
    source: Paths = (),
    resolution: tuple[int, ...] = (128, 256),
    workers: tuple[int, ...] = (0, 1, 2),
    samples: int = 512,
    rounds: int = 3,
    recipe: str = "paper_b16",
    crop_min_area: float | None = None,
    fast_decode: bool | None = None,
    pixel_stride: int | None = None,
    device_rate: float | None = None,
    vocabulary: Literal["demo", "bert"] = "demo",
    output: Output = OutputOptions(),
) -> int:
    """Samples a second as a training reads them, where the time goes, and how many cores feed one device.

    Without a source, 256 JPEGs of 512 to 1,024 pixels, each side, are made in a temporary folder and read, and scenes
    of the demo rendered. A core's rate counts the processor time of all processes: other work on the machine lowers the
    rate by the clock alone.

    Args:
        source: tars: files, URLs, brace lists, globs or folders, with members as the recipe's --data fields name them
        resolution: pixels, each side of a crop
        workers: numbers of processes beside this one; 0: this one does the work
        samples: read in each round
        rounds: of which the median and the quartiles are told
        recipe: whose crops, decoding, texts and FLOPs are taken
        crop_min_area: least area of a crop, in place of the recipe's
        fast_decode: decode JPEGs at a fraction of their size, in place of the recipe's
        pixel_stride: the recipe's --loss.pixel-stride, for the FLOPs
        device_rate: samples a second that one device trains on, in place of what the recipe's FLOPs say of an H100
        vocabulary: of the tokenizer; bert fetches it
    """
    if not resolution or not workers or min(samples, rounds, *resolution) < 1 or min(workers) < 0:
        raise OpenVisionError("--samples, --rounds and --resolution must be at least 1, and --workers at least 0")
    config = _recipe(recipe, crop_min_area, fast_decode, pixel_stride)
    if device_rate is not None and device_rate <= 0:
        raise OpenVisionError(f"--device-rate is {device_rate}: expected more than 0")
    refuse_existing(output.json, output.overwrite)
    import torch

    from openvision3.bench.feeding import Demand, Feed, device_demand, make_pictures
    from openvision3.bench.timing import machine
    from openvision3.data.tokenizer import bert_tokenizer, demo_tokenizer

    tokenizer = demo_tokenizer() if vocabulary == "demo" else bert_tokenizer()
    text, caption = config.model.text_encoder, config.model.text_decoder
    lengths = (text.context_length if text else 0, caption.context_length if caption else 0)
    figures: dict[str, Any] = {"machine": machine(torch.device("cpu")), "recipe": recipe, "sources": []}
    print(figures["machine"])
    with tempfile.TemporaryDirectory(prefix="ov3-bench-") as folder:
        data = {path: replace(config.data, source=path) for path in source}
        if not source:
            make_pictures(Path(folder), PICTURES)
            own = replace(DataConfig(), source=folder, crop_min_area=config.data.crop_min_area)
            data[f"{PICTURES} JPEGs made here"] = replace(own, fast_decode=config.data.fast_decode)
            data["demo scenes"] = DataConfig()
        for size in resolution:
            demand = device_demand(config, size) if device_rate is None else Demand(device_rate, None)
            for name, part in data.items():
                feed = Feed(part, size, tokenizer, *lengths)
                figures["sources"].append(_measure(name, feed, workers, samples, rounds, demand))
    write_json(output.json, figures, output.overwrite)
    return 0


def _recipe(name: str, crop_min_area: float | None, fast_decode: bool | None, pixel_stride: int | None) -> TrainConfig:
    """The recipe with what the command puts in its place. Raises `OpenVisionError` for what can't be."""
    from openvision3.recipes import RECIPES

    config = RECIPES[name]() if name in RECIPES else None
    if not isinstance(config, TrainConfig):
        raise OpenVisionError(f"--recipe {name}: expected a recipe that trains an encoder (`ov3 train` lists them)")
    area = config.data.crop_min_area if crop_min_area is None else crop_min_area
    fast = config.data.fast_decode if fast_decode is None else fast_decode
    stride = config.loss.pixel_stride if pixel_stride is None else pixel_stride
    if not 0 < area <= 1 or stride < 1:
        raise OpenVisionError("--crop-min-area must be more than 0 and at most 1, and --pixel-stride at least 1")
    data = replace(config.data, mixture=(), weights=(), latents="", crop_min_area=area, fast_decode=fast)
    return replace(config, data=data, loss=replace(config.loss, pixel_stride=stride))


def _measure(
    name: str, feed: "Feed", workers: tuple[int, ...], samples: int, rounds: int, demand: "Demand"
) -> dict[str, Any]:
    """Measures and prints one source at one resolution; returns the figures."""
    from openvision3.bench.feeding import H100_PEAK, UTILISATION, sample_parts, stream_rates

    rates = stream_rates(feed, workers, samples, rounds)
    parts = sample_parts(feed, min(samples, PICTURES), rounds)
    rendered = feed.data.source == "demo"
    how = f", crops of {feed.data.crop_min_area:g} at least, fast_decode {'on' if feed.data.fast_decode else 'off'}"
    print(f"{name}, {feed.resolution} px" + ("" if rendered else how))
    print_table(
        "",
        ("workers", "samples/s", "samples/s a core"),
        [(rate.workers, str(rate.per_second), str(rate.per_core)) for rate in rates],
    )
    names = {"decode": "render"} if rendered else {}
    each = {field.name: getattr(parts, field.name) for field in dataclasses.fields(parts)}
    told = ", ".join(f"{names.get(part, part)} {spread.median:.2f}" for part, spread in each.items())
    per_core = rates[-1].per_core.median
    cores = demand.rate / per_core
    why = "as given"
    if demand.flops is not None:
        peak = f"{UTILISATION:.0%} of {H100_PEAK / 1e12:.0f} TFLOP/s"
        why = f"an H100 at {peak}, {demand.flops / 1e9:,.0f} GFLOPs a sample"
    print(f"milliseconds a sample: {told}")
    print(f"a device that trains on {demand.rate:,.0f} samples/s ({why}) needs {cores:.1f} such cores\n")
    return {
        "source": name,
        "resolution": feed.resolution,
        "crop_min_area": feed.data.crop_min_area,
        "fast_decode": feed.data.fast_decode,
        "rates": [dataclasses.asdict(rate) for rate in rates],
        "milliseconds": dataclasses.asdict(parts),
        "device_rate": demand.rate,
        "device_flops": demand.flops,
        "cores": cores,
    }
