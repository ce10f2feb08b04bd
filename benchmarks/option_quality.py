"""Prints what a training option costs in quality: runs with it against runs without, paired by seed.

    python benchmarks/option_quality.py --without runs/all_{0,1,2} --with runs/some_{0,1,2}
        [--samples 4000] [--parts zeroshot] [--json F]

Each run is a folder of `ov3 train` (or a model folder); the n-th of one list and of the other have the same seed. The
figures are those of held-out scenes of the benchmark's distribution, more of them than the benchmark has, so that
chance in the pictures matters less than chance in the training. The interval is Student's, two-sided, 90 %, over pairs.
"""

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openvision3
from openvision3.config import OpenVisionError
from openvision3.data.demo import BENCHMARK
from openvision3.evaluation.evaluate import evaluate_all

PARTS = ("reconstruction", "zeroshot", "retrieval")
FIGURES = {  # name: part, entry, factor, unit, allowed difference
    "PSNR": ("reconstruction", "psnr", 1.0, "dB", 0.2),
    "LPIPS": ("reconstruction", "lpips", 1.0, "", None),
    "zero-shot top-1": ("zeroshot", "bare_top1", 100.0, "%", 1.0),
    "zero-shot top-5": ("zeroshot", "bare_top5", 100.0, "%", None),
    "R@1, picture to caption": ("retrieval", "image_to_text_r1", 100.0, "%", None),
    "R@1, caption to picture": ("retrieval", "text_to_image_r1", 100.0, "%", None),
}


def main() -> None:
    """Evaluates all runs and prints the table, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without", nargs="+", type=Path, required=True)
    parser.add_argument("--with", nargs="+", type=Path, required=True, dest="with_option")
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if len(options.without) != len(options.with_option):
        raise OpenVisionError("--without and --with need the same number of runs, paired by seed")
    without, with_option = (
        [evaluate(path, options.samples, options.parts) for path in paths]
        for paths in (options.without, options.with_option)
    )
    print(table(without, with_option))
    if options.json:
        options.json.write_text(json.dumps({"without": without, "with": with_option}, indent=2) + "\n")


def evaluate(path: Path, samples: int, parts: Sequence[str] = PARTS) -> dict[str, float]:
    """The figures of one run."""
    model = openvision3.load(str(path / "model" if (path / "model").is_dir() else path))
    found: dict[str, Any] = evaluate_all(model, BENCHMARK, tuple(parts), samples, landscapes=False)
    return {name: factor * found[part][entry] for name, (part, entry, factor, _, _) in FIGURES.items() if part in parts}


def table(without: list[dict[str, float]], with_option: list[dict[str, float]]) -> str:
    """Means, and the mean difference with its interval."""
    lines = ["| | without | with | difference, 90 % interval | allowed |", "|---|---|---|---|---|"]
    for name, (_, _, _, unit, allowed) in FIGURES.items():
        if name not in without[0]:
            continue
        pairs = [(a[name], b[name]) for a, b in zip(without, with_option, strict=True)]
        means = [statistics.mean(values) for values in zip(*pairs, strict=True)]
        mean, half = interval([b - a for a, b in pairs])
        bounds = "" if math.isinf(half) else f" ({mean - half:+.3f} to {mean + half:+.3f})"
        lines.append(
            f"| {name} | {means[0]:.3f} {unit} | {means[1]:.3f} {unit} | {mean:+.3f}{bounds} | "
            f"{'' if allowed is None else f'within {allowed:g}'} |"
        )
    return "\n".join(lines)


def interval(differences: list[float]) -> tuple[float, float]:
    """The mean, and half the width of Student's 90 % interval (infinite for one difference)."""
    from scipy.stats import t

    mean, count = statistics.mean(differences), len(differences)
    if count == 1:
        return mean, math.inf
    return mean, float(t.ppf(0.95, count - 1)) * statistics.stdev(differences) / math.sqrt(count)


if __name__ == "__main__":
    main()
