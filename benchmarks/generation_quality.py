"""Measures generators of the demo's one-thing scenes and prints the table of docs/GENERATION.md, in Markdown.

    python benchmarks/generation_quality.py WORK GENERATOR... [--num 1000] [--seeds 0] [--json FILE]

GENERATOR is "demo", or a folder of `ov3 generate train`, whose name the table shows; all read the same prompts: the
captions of held-out scenes, whose landscapes nothing was trained on. Beside the samples stand two sets of real
pictures: the reconstructions of the held-out scenes by the generator's own model (the floor of its decoder), and
training scenes (the floor of anything that learns their landscapes). Distances are FID's where Inception's weights are
at hand, else EfficientNet-Lite0's under its own names. The classifier is trained first where WORK has none: minutes.
WORK keeps all pictures; the same command goes on where it was stopped.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from openvision3 import cli, files
from openvision3.commands.common import Progress
from openvision3.data import demo, grammar
from openvision3.evaluation.class_accuracy import classifier_accuracy, read_intended, zeroshot_accuracy
from openvision3.evaluation.fidelity import inception_path, load_effnet_lite0, load_inception
from openvision3.evaluation.generated import evaluate_generated
from openvision3.evaluation.inception import GenerationInception
from openvision3.evaluation.picture_sets import open_generated, open_reference
from openvision3.evaluation.samples import to_uint8
from openvision3.evaluation.scene_classifier import (
    load_scene_classifier,
    save_scene_classifier,
    train_scene_classifier,
)
from openvision3.generation.generator import Generator, load_generator
from openvision3.generation.recipes import demo_generator

SPLIT, SEED = "generator-test", 5000  # held-out landscapes
TRAINING_SEED = 6000  # training landscapes, on scenes that no recipe trains on
BATCH = 50


def main() -> None:
    """Makes what is missing, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("generators", nargs="+")
    parser.add_argument("--num", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--guidance", type=float, nargs="+", default=[0.0], help="0: the generator's own")
    parser.add_argument("--classifier-samples", type=int, default=100_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    work: Path = options.work

    first = load_generator(options.generators[0])
    real_pictures(work / "held-out", SPLIT, SEED, options.num, first.space.resolution)
    real_pictures(work / "training", "train", TRAINING_SEED, options.num, first.space.resolution)
    classifier = scene_classifier(work / "classifier", options.classifier_samples)
    network: Any = load_effnet_lite0()
    if inception_path() is not None:
        network = GenerationInception(load_inception())
    reference = work / "held-out"
    intended = read_intended(reference)

    def measured(folder: Path, labelled: bool = True) -> dict[str, Any]:
        pictures = open_generated(folder)
        found = evaluate_generated(pictures, open_reference(reference, pictures.size), network)
        if labelled:
            pictures = open_generated(folder)
            found["classifier"] = classifier_accuracy(classifier, pictures, intended)
            found["zeroshot"] = zeroshot_accuracy(first.space.model, pictures, intended, classifier.names)
        return found

    figures: dict[str, Any] = {"training scenes": measured(work / "training", labelled=False)}
    figures["held-out scenes themselves"] = measured(reference)
    for name in options.generators:
        generator = load_generator(name)
        label = Path(name).name
        reconstructions(work / f"reconstructions-{label}", reference, generator, options.num)
        figures[f"reconstructions, {label}"] = measured(work / f"reconstructions-{label}")
        for guidance in options.guidance:
            for seed in options.seeds:
                kind = f"{label}-{options.steps}-{guidance:g}-{seed}"
                draw(name, work / f"samples-{kind}", reference / "prompts.jsonl", seed, options.steps, guidance)
                title = f"samples, {label}, guidance {guidance or generator.description.guidance:g}, seed {seed}"
                figures[title] = measured(work / f"samples-{kind}")
    print(table(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def draw(generator: str, out: Path, prompts: Path, seed: int, steps: int, guidance: float) -> None:
    """The command's own samples, one for each prompt."""
    arguments = ["--generator", generator, "--prompts", str(prompts), "--out", str(out), "--seed", str(seed)]
    arguments += ["--batch-size", str(BATCH), "--steps", str(steps), "--guidance", str(guidance)]
    if (code := cli.main(["generate", "sample", *arguments])) != 0:
        raise SystemExit(code)


def real_pictures(folder: Path, split: str, seed: int, num: int, size: int) -> None:
    """Scenes of one thing as the demo generator learns them, with their captions and names."""
    scenes = [demo.scene(demo_generator().data.scenes, split, seed, index) for index in range(num)]

    def pixels(start: int, stop: int) -> Iterator[np.ndarray]:
        return (demo.render(scene, size) for scene in scenes[start:stop])

    write_pictures(folder, num, pixels)
    rows = [
        {"file": f"{index:06d}.png", "class": scene.things[0].name, "prompt": grammar.describe(scene)["caption"]}
        for index, scene in enumerate(scenes)
    ]
    for name in ("samples.jsonl", "prompts.jsonl"):
        with files.whole_file(folder / name) as path:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def reconstructions(folder: Path, reference: Path, generator: Generator, num: int) -> None:
    """The reference through the generator's model and back."""

    def pixels(start: int, stop: int) -> Iterator[np.ndarray]:
        images = [np.asarray(Image.open(reference / f"{index:06d}.png")) for index in range(start, stop)]
        batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(generator.space.model.device)
        decoded: Tensor = generator.space.decode(generator.space.encode(batch))
        yield from to_uint8(decoded).permute(0, 2, 3, 1).cpu().numpy()

    write_pictures(folder, num, pixels)


def write_pictures(folder: Path, num: int, pixels: Callable[[int, int], Iterator[np.ndarray]]) -> None:
    """Writes those pictures that are not there yet."""
    for start in range(0, num, BATCH):
        stop = min(num, start + BATCH)
        if all((folder / f"{index:06d}.png").exists() for index in range(start, stop)):
            continue
        for index, picture in zip(range(start, stop), pixels(start, stop), strict=True):
            with files.whole_file(folder / f"{index:06d}.png") as path:
                Image.fromarray(picture).save(path, format="PNG")


def scene_classifier(folder: Path, samples: int) -> Any:
    """The classifier of the demo generator's names, trained where it is not there yet."""
    if not (folder / "classifier.json").exists():
        names = demo.names(demo_generator().data.scenes.num_names)
        with Progress(samples, "scenes for the classifier") as progress:
            trained = train_scene_classifier(
                names, samples, progress=lambda seen: progress.advance(seen - progress.done)
            )
        save_scene_classifier(trained, folder)
    return load_scene_classifier(folder)


def table(figures: dict[str, Any]) -> str:
    """A line a set of pictures."""
    kernel = next(name for name in figures["training scenes"]["figures"] if name.startswith("KID"))
    distance = next(name for name in figures["training scenes"]["figures"] if name in ("gFID", "FD-EffNetLite0"))
    lines = [
        f"| against held-out scenes | {kernel} x 1000 (95 % interval) | {distance} | precision | recall | classifier "
        "top-1 | zero-shot top-1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in figures.items():
        row = found["figures"]
        low, high = (row[f"{kernel}, {end} end of 95 %"] for end in ("low", "high"))
        precision, recall = (
            next((value for key, value in row.items() if key.startswith(what)), float("nan"))
            for what in ("precision", "recall")
        )
        judged: Sequence[str] = ["", ""]
        if "classifier" in found:
            judged = [f"{100 * found['classifier']['top1']:.1f} %", f"{100 * found['zeroshot']['bare_top1']:.1f} %"]
        lines.append(
            f"| {name} | {1000 * row[kernel]:.2f} ({1000 * low:.2f} to {1000 * high:.2f}) | {row[distance]:.2f} | "
            f"{precision:.2f} | {recall:.2f} | {judged[0]} | {judged[1]} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
