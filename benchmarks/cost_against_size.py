"""Time of a whole training step against its size, on four axes: resolution, width, length of texts, batch.

    python benchmarks/cost_against_size.py --json sizes.json --plot docs/cost_against_size.svg      # minutes
    python benchmarks/cost_against_size.py --axes text batch --rounds 3

A step is the losses of one batch, their gradient (`Objective.backward`), clipping and AdamW, in bf16 autocast, on noise
with texts that fill the context: the towers leave out columns that are padding in every row. At the reference the
encoder is S, pictures have 128 px, texts 32 tokens, and a batch 16 samples; reconstruction decoder and text towers have
4 blocks of S's width at every point, the VAE is the embedded one, and all pictures are decoded. A point is timed in
turns with the reference in a process of its own, and compared with it round by round. With one thread, the default,
times are the processor's, so that other work on the machine counts little; with several, the clock's. Floating-point
operations are `training_flops`: matrix products and convolutions, forward and backward. Norms, softmax,
activations and the optimizer are in the time and in no count. Memory is what one step takes at most above what is held
before it, as growth of the resident size (Linux): too little for points below the reference, whose memory they reuse.
"""

import argparse
import gc
import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from openvision3.bench.timing import (
    Spread,
    machine,
    peak_resident_bytes,
    ratio,
    reset_peak,
    resident_bytes,
)
from openvision3.config import ModelConfig, TextDecoderConfig, TextEncoderConfig, TrainConfig, TransformerConfig
from openvision3.data.tokenizer import demo_tokenizer
from openvision3.model.blocks import SIZES
from openvision3.model.openvision3 import OpenVision3
from openvision3.training.dryrun import training_flops
from openvision3.training.frozen import set_training
from openvision3.training.optimizer import build_optimizer, clip_gradients, set_learning_rate
from openvision3.training.setup import trial_batch
from openvision3.training.stages import Stage
from openvision3.training.step import Objective
from openvision3.vae import load_vae

CPU = torch.device("cpu")
BLOCKS = 4  # of the reconstruction decoder and of each text tower


@dataclass(frozen=True)
class Point:
    """Sizes of a step."""

    resolution: int = 128  # pixels
    encoder: str = "S"  # of `SIZES`
    text: int = 32  # tokens of each text
    batch: int = 16  # samples


REFERENCE = Point()
AXES: dict[str, list[Point]] = {
    "resolution": [replace(REFERENCE, resolution=side) for side in (192, 256, 512)],
    "width": [replace(REFERENCE, encoder=name) for name in ("Ti", "B", "L")],
    "text": [replace(REFERENCE, text=length) for length in (16, 64, 128)],
    "batch": [replace(REFERENCE, batch=size) for size in (1, 4, 64)],
}


@dataclass(frozen=True)
class Found:
    """What a point costs; ratios are to the reference, of the same rounds."""

    axis: str
    point: Point
    flops: float  # of the step
    peak: int  # bytes
    seconds: Spread
    time_ratio: Spread
    per_flop: Spread  # ratio of time per FLOP


def train_config(point: Point) -> TrainConfig:
    """The run whose step a point is."""
    vocabulary = demo_tokenizer().vocab_size

    def stack(size: TransformerConfig) -> TransformerConfig:
        return replace(size, activation="relu_squared")  # as the recipes for CPUs

    small = replace(stack(SIZES["S"]), depth=BLOCKS)
    model = ModelConfig(
        name="sizes",
        image_size=point.resolution,
        encoder=stack(SIZES[point.encoder]),
        decoder=small,
        text_encoder=TextEncoderConfig(small, vocabulary, point.text),
        text_decoder=TextDecoderConfig(small, vocabulary, point.text),
    )
    config = TrainConfig(recipe="sizes", model=model)
    return replace(
        config, stage1=replace(config.stage1, resolution=point.resolution, batch_size=point.batch, samples=point.batch)
    )


def step_flops(point: Point) -> float:
    """FLOPs of a step: matrix products and convolutions."""
    config = train_config(point)
    with torch.device("meta"):
        model = OpenVision3(config.model)
    model.attach_vae(load_vae())
    return point.batch * training_flops(config, model.flops(point.resolution), two_passes=False)


def build_step(point: Point) -> Callable[[], None]:
    """A training step, as the training loop does it."""
    config = train_config(point)
    torch.manual_seed(0)
    model = OpenVision3(config.model, load_vae())
    set_training(model, ())
    optimizer = build_optimizer(model, config.optimizer)
    set_learning_rate(optimizer, 1e-6)
    objective = Objective(model, config.loss, precision="bf16")
    batch = trial_batch(config, Stage(1, config.stage1, 0, 1))

    def step() -> None:
        objective.backward(batch)
        clip_gradients(model, config.optimizer.clip_norm)
        optimizer.step()
        model.clamp_logit_scale()
        optimizer.zero_grad()

    return step


def measure(axis: str, point: Point, rounds: int, threads: int) -> Found:
    """Times a point beside the reference; meant for a fresh process, whose memory nothing has touched."""
    torch.set_num_threads(threads)
    steps = {"point": build_step(point), "reference": build_step(REFERENCE)}
    seconds: dict[str, list[float]] = {}
    peak = held = 0
    clock = time.process_time if threads == 1 else time.perf_counter
    for number in range(-1, rounds):  # the first makes the optimizer's state, and does not count
        for name, step in steps.items():
            if number == 0 and name == "point":
                gc.collect()
                held = resident_bytes()
                reset_peak()
            start = clock()
            step()
            if number >= 0:
                seconds.setdefault(name, []).append(clock() - start)
            if number == 0 and name == "point":
                peak = peak_resident_bytes() - held
    times = {name: Spread.of(values) for name, values in seconds.items()}
    flops, relative = step_flops(point), ratio(times["point"], times["reference"])
    factor = step_flops(REFERENCE) / flops
    per_flop = Spread.of([value * factor for value in relative.values])
    return Found(axis, point, flops, peak, times["point"], relative, per_flop)


def size_of(found: Found) -> str:
    """The point's place on its axis."""
    point = found.point
    return {
        "resolution": f"{point.resolution} px",
        "width": f"{point.encoder}, {SIZES[point.encoder].width} wide",
        "text": f"{point.text} tokens",
        "batch": f"{point.batch} samples",
    }[found.axis]


def table(results: list[Found]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| size | GFLOPs a step | seconds | GFLOP/s | time, reference = 1 | time a FLOP, reference = 1 "
        "| memory of the step |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in results:
        rate, per = found.flops / found.seconds.median / 1e9, found.per_flop
        lines.append(
            f"| {size_of(found)} | {found.flops / 1e9:,.0f} | {found.seconds.median:.3g} | {rate:.0f} | "
            f"{found.time_ratio.median:.3g} | {per.median:.2f} ({per.low:.2f} to {per.high:.2f}) | "
            f"{found.peak / 2**30:.2f} GiB |"
        )
    return "\n".join(lines)


def plot(results: list[Found], path: Path) -> None:
    """Draws, for each axis, time and time per FLOP over FLOPs, all relative to the reference."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    reference = step_flops(REFERENCE)
    axes = list(dict.fromkeys(found.axis for found in results))
    figure, grid = plt.subplots(2, len(axes), figsize=(3.1 * len(axes), 5.6), sharex="col", sharey="row", squeeze=False)
    for (above, below), axis in zip(grid.T, axes, strict=True):
        here = [found for found in results if found.axis == axis]
        points = [(found.flops / reference, found.time_ratio, found.per_flop, size_of(found)) for found in here]
        one = Spread(1.0, 1.0, 1.0, (1.0,))
        points = sorted([*points, (1.0, one, one, "reference")], key=lambda entry: entry[0])
        x = [entry[0] for entry in points]
        times, per_flop = [time for _, time, _, _ in points], [per for _, _, per, _ in points]
        for drawn, spreads in ((above, times), (below, per_flop)):
            middle = [spread.median for spread in spreads]
            errors = [
                [m - spread.low for m, spread in zip(middle, spreads, strict=True)],
                [spread.high - m for m, spread in zip(middle, spreads, strict=True)],
            ]
            drawn.errorbar(x, middle, errors, marker="o", markersize=4, linewidth=1, capsize=2)
            drawn.set_xscale("log")
            drawn.grid(True, which="major", alpha=0.3)
        above.plot(x, x, linestyle=":", color="gray", linewidth=1)
        above.set_yscale("log")
        above.set_title(axis)
        for place, spread, _, label in points:
            above.annotate(label, (place, spread.median), textcoords="offset points", xytext=(5, -9), fontsize=6)
        below.axhline(1.2, linestyle="--", color="tab:red", linewidth=1)
        below.axhline(1.0, linestyle=":", color="gray", linewidth=1)
        below.set_yscale("log")
        below.set_yticks([0.7, 1, 1.2, 2, 3], labels=["0.7", "1", "1.2", "2", "3"])
        below.minorticks_off()
        below.set_xlabel("FLOPs of the step, reference = 1")
    grid[0, 0].set_ylabel("time of the step, reference = 1")
    grid[1, 0].set_ylabel("time a FLOP, reference = 1")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def load(path: Path) -> list[Found]:
    """Results that `--json` wrote."""

    def spread(values: list[float]) -> Spread:
        return Spread.of(values)

    return [
        Found(
            entry["axis"],
            Point(**entry["point"]),
            entry["flops"],
            entry["peak"],
            *(spread(entry[name]["values"]) for name in ("seconds", "time_ratio", "per_flop")),
        )
        for entry in json.loads(path.read_text())["results"]
    ]


def main() -> None:
    """Measures the chosen axes and prints the table, as Markdown; or draws what was measured before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--read", type=Path, help="results written before, in place of measuring")
    parser.add_argument("--plot", type=Path, help="draw the results here (SVG or PNG)")
    options = parser.parse_args()
    results: list[Found] = load(options.read) if options.read else []
    if not results:
        torch.set_num_threads(options.threads)
        print(f"{machine(CPU)}; median and quartiles of {options.rounds} rounds\n", flush=True)
        for axis in options.axes:
            for point in AXES[axis]:
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    results.append(pool.apply(measure, (axis, point, options.rounds, options.threads)))
                if options.json:
                    content = {"machine": machine(CPU), "results": [asdict(found) for found in results]}
                    options.json.write_text(json.dumps(content, indent=1) + "\n")
    print(table(results))
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
