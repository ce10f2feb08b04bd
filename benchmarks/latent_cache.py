"""The demo recipe, cut short, on the same tars of scenes: crops encoded on the fly, or cached with K views a sample.

    python benchmarks/latent_cache.py OUT [--scenes 4000] [--stage1 12032] [--stage2 4032] [--views 1 4] [--seed 0]

Writes the tars, and a cache a K and stage, and trains each arm from the same seed on the same number of samples in the
same order, two stages of 64 and 128 px. Prints for each arm the seconds of caching and of training, by the clock and of
all processors together (which other work on the machine disturbs less), and figures on scenes that nobody trained on.

The scenes of the demo recipe never come twice, so here they are written as tars: what a cache is for is data that are
gone through several times. Arms that are done are not done again.
"""

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import openvision3
from openvision3.cli import main as ov3
from openvision3.config import SceneConfig, TrainConfig
from openvision3.evaluation.evaluate import evaluate_all
from openvision3.recipes import demo
from openvision3.training.loop import train
from openvision3.training.monitor import read_records

SHOWN = (
    ("reconstruction", "psnr"),
    ("reconstruction", "lpips"),
    ("retrieval", "image_to_text_r1"),
    ("zeroshot", "bare_top1"),
    ("captioning", "one_set"),
)


def recipe(options: argparse.Namespace) -> TrainConfig:
    """The demo recipe on the tars, with crops, at the lengths that were asked for."""
    config = demo()
    data = replace(
        config.data, source=str(options.out / "tars"), crop_min_area=options.crop_min_area, seed=options.seed
    )
    stages = {
        name: replace(getattr(config, name), samples=length, warmup_samples=length // 10, scenes=None)
        for name, length in (("stage1", options.stage1), ("stage2", options.stage2))
    }
    # one precision for all arms: "auto" times a step of each, and may choose otherwise
    rarely = {"eval_samples": 0, "eval_every": 0, "checkpoint_every": 0}
    return replace(config, data=data, seed=options.seed, precision=options.precision, **rarely, **stages)


def clocks() -> np.ndarray:
    """Seconds by the clock, and of the processors that this process and its ended children have used."""
    used = os.times()
    return np.array([time.perf_counter(), used.user + used.system + used.children_user + used.children_system])


def command(*args: object) -> np.ndarray:
    """Runs an `ov3` command; returns what it took on both clocks."""
    begin = clocks()
    if ov3([str(arg) for arg in args]):
        raise SystemExit(f"ov3 {' '.join(map(str, args))} failed")
    return clocks() - begin


def cached(config: TrainConfig, options: argparse.Namespace, views: int) -> tuple[TrainConfig, np.ndarray]:
    """The config with each stage's latents read from a cache of K views, and what it took to fill."""
    seconds, stages = np.zeros(2), {}
    for name in ("stage1", "stage2"):
        stage, folder = getattr(config, name), options.out / f"latents-{views}-{name}"
        seconds += command(
            "data", "cache-latents", config.data.source, "--out", folder, "--resolution", stage.resolution, "--views",
            views, "--crop-min-area", options.crop_min_area, "--seed", options.seed, "--device", "cpu", "--workers", 1,
        )  # fmt: skip
        stages[name] = replace(stage, latents=str(folder))
    return replace(config, **stages), seconds


def arm(name: str, config: TrainConfig, caching: np.ndarray, options: argparse.Namespace) -> dict[str, float | str]:
    """Trains and measures an arm."""
    folder = options.out / f"run-{name}"
    begin = clocks()
    train(replace(config, out=str(folder)), "cpu")
    found: dict[str, float | str] = {"arm": name}
    for what, (clock, used) in (("caching", caching), ("training", clocks() - begin)):
        found |= {f"{what}_s": float(clock), f"{what}_cpu_s": float(used)}
    rows = read_records(folder / "metrics.jsonl", "train")
    for number, last in ((1, config.stage1.samples), (2, config.stage1.samples + config.stage2.samples)):
        rates = [row["samples_per_second"] for row in rows if row["samples_seen"] <= last][-3:]
        found[f"stage{number}_samples_per_s"] = sorted(rates)[len(rates) // 2]
    model = openvision3.load(folder / "model", device="cpu")
    parts = tuple(dict.fromkeys(part for part, _ in SHOWN))
    scenes = SceneConfig(num_names=options.num_names)
    figures = evaluate_all(model, parts=parts, samples=options.eval_samples, scenes=scenes, landscapes=False)
    return found | {f"{part}/{figure}": figures[part][figure] for part, figure in SHOWN}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--scenes", type=int, default=4000)
    parser.add_argument("--num-names", type=int, default=SceneConfig.num_names)
    parser.add_argument("--stage1", type=int, default=12_032, help="samples")
    parser.add_argument("--stage2", type=int, default=4_032, help="samples")
    parser.add_argument("--views", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--crop-min-area", type=float, default=0.4)
    parser.add_argument("--eval-samples", type=int, default=500)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    if not (options.out / "tars").exists():
        command("data", "make-demo", "--out", options.out / "tars", "--samples", options.scenes, "--num-names",
                options.num_names, "--seed", options.seed)  # fmt: skip
    config, results = recipe(options), options.out / "results.json"
    done: list[dict[str, float | str]] = json.loads(results.read_text()) if results.exists() else []
    for views in (0, *options.views):
        name = f"K={views}" if views else "on the fly"
        if any(row["arm"] == name for row in done):
            continue
        ready, seconds = cached(config, options, views) if views else (config, np.zeros(2))
        done.append(arm(name, ready, seconds, options))
        results.write_text(json.dumps(done, indent=2) + "\n")
    columns = list(done[0])
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in done:
        print("| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()) + " |")


if __name__ == "__main__":
    main()
