"""What limits a generator's samples: its decoder's patience with wrong tokens, or which part of the path errs.

    python benchmarks/generation_limits.py WORK GENERATOR [--num 250] [--steps 20] [--json FILE]

WORK is a folder of `generation_quality.py`, with its held-out scenes and classifier; GENERATOR is "demo" or a folder
with a text condition. Prints three tables, in Markdown, for the first `num` held-out scenes against all of them:

- the true tokens with white noise of several sizes, in units of their standard deviation, decoded;
- the true tokens noised to the time t, and the generator's path (Euler, without guidance) from there to 0, decoded:
  at t = 1 that would be a sample, at t = 0 a reconstruction;
- the velocity loss at each time, and the error of the tokens that one step from there would make.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from generation_quality import BATCH
from PIL import Image
from torch import Tensor

from openvision3.evaluation.fidelity import extract_features, kernel_distance, load_effnet_lite0
from openvision3.evaluation.samples import to_uint8
from openvision3.evaluation.scene_classifier import load_scene_classifier
from openvision3.generation.conditions import conditions
from openvision3.generation.flow import integrate, path, time_grid, token_shift
from openvision3.generation.generator import Generator, load_generator
from openvision3.generation.inference import evaluator
from openvision3.generation.sample import initial_noise

NOISES = (0.0, 0.1, 0.2, 0.4, 0.6, 0.8)
STARTS = (0.1, 0.2, 0.35, 0.5)
TIMES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("generator")
    parser.add_argument("--num", type=int, default=250)
    parser.add_argument("--steps", type=int, default=20, help="of the whole path")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder: Path = options.work / "held-out"
    if not (folder / "prompts.jsonl").is_file():
        raise SystemExit(f"{options.work} has no held-out scenes: run benchmarks/generation_quality.py first")
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    pictures = torch.stack([torch.from_numpy(np.array(Image.open(folder / row["file"]))) for row in rows])
    pictures = pictures.permute(0, 3, 1, 2)
    network, classifier = load_effnet_lite0(), load_scene_classifier(options.work / "classifier")
    reference = extract_features(pictures.split(BATCH), network)
    rows, pictures = rows[: options.num], pictures[: options.num]

    def judged(generator: Generator, tokens: Tensor) -> dict[str, float]:
        x = generator.normalizer.denormalize(tokens)
        images = torch.cat([to_uint8(generator.space.decode(part)).cpu() for part in x.split(BATCH)])
        found = torch.cat([classifier.predict(part) for part in images.split(BATCH)]).tolist()
        hits = [classifier.names[name] == row["class"] for name, row in zip(found, rows, strict=True)]
        kernel, _ = kernel_distance(extract_features(images.split(BATCH), network), reference)
        return {"kid_x_1000": 1000 * kernel, "top1": sum(hits) / len(hits)}

    figures = measure(
        load_generator(options.generator), pictures, [row["prompt"] for row in rows], options.steps, judged
    )
    for name, table in figures.items():
        print(f"\n{name}\n\n| " + " | ".join(table[0]) + " |\n" + "|---" * len(table[0]) + "|")
        for row in table:
            print("| " + " | ".join(f"{value:.3f}" for value in row.values()) + " |")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


@torch.no_grad()
def measure(
    generator: Generator, pictures: Tensor, texts: list[str], steps: int, judged: Any
) -> dict[str, list[dict[str, float]]]:
    """The three tables, row by row, of pictures (B, 3, R, R) in uint8 and their captions."""
    space, device = generator.space, generator.space.model.device
    parts = [space.encode(part.to(device)) for part in pictures.split(BATCH)]
    tokens = generator.normalizer.normalize(torch.cat(parts))
    white = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(0)).to(device)
    noise = initial_noise(0, range(len(tokens)), tokens.shape[1:]).to(device)
    condition = conditions(space.model, generator.description.generator, texts, generator.description.classes)
    model = evaluator(generator.dit)
    grid = time_grid(steps, token_shift(*tokens.shape[1:]))

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        starts = range(0, len(x), BATCH)
        return torch.cat(
            [model(x[s : s + BATCH], t[s : s + BATCH], condition.rows(slice(s, s + BATCH))) for s in starts]
        )

    def rms(x: Tensor) -> float:
        return float((x - tokens).square().mean().sqrt())

    noisy = [{"noise": size, **judged(generator, tokens + size * white)} for size in NOISES]
    ends = []
    for start in STARTS:
        times = torch.cat([torch.tensor([start], dtype=grid.dtype), grid[grid < start - 0.02]])
        x = integrate(velocity, path(tokens, noise, torch.full((len(tokens),), start, device=device))[0], times)
        ends.append({"from t": start, **judged(generator, x), "rms error": rms(x)})
    losses = []
    for time in TIMES:
        at = torch.full((len(tokens),), time, device=device)
        x, target = path(tokens, noise, at)
        found = velocity(x, at)
        loss = float((found - target).square().mean())
        losses.append({"t": time, "velocity loss": loss, "rms error of one step": rms(x - time * found)})
    return {"true tokens with noise": noisy, "paths from t": ends, "the generator at t": losses}


if __name__ == "__main__":
    main()
