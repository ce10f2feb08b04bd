"""A generator of a finished encoder's tokens, and the classifier that judges what it draws."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openvision3.data import demo
from openvision3.data.demo import Scene
from openvision3.data.grammar import noun_phrase
from openvision3.evaluation.bootstrap import kernel_estimate
from openvision3.evaluation.class_accuracy import resized
from openvision3.evaluation.fidelity import FeatureNetwork, extract_features, load_effnet_lite0
from openvision3.evaluation.samples import to_uint8
from openvision3.evaluation.scene_classifier import (
    SceneClassifier,
    load_scene_classifier,
    save_scene_classifier,
    train_scene_classifier,
)
from openvision3.generation.generator import Generator, load_generator
from openvision3.generation.train import train
from openvision3.reproduction.arm import median_rate
from openvision3.reproduction.arms import ClassifierRecipe, GenerationRecipe
from openvision3.training.monitor import save_picture_grid

SPLIT, SEED = "generator-test", 5000  # held-out landscapes
BATCH, SHOWN = 50, 12  # pictures at once, and on the sheet
SHEET = "generated.png"  # rows of a held-out scene, its reconstruction, and a picture drawn for the same class


def run_classifier(recipe: ClassifierRecipe, folder: Path) -> dict[str, Any]:
    """Trains the classifier; stopped, it begins anew (minutes)."""
    classifier = train_scene_classifier(recipe.names, recipe.samples, recipe.seed, held_out=recipe.held_out)
    save_scene_classifier(classifier, folder)
    return {"figures": {"classifier/top1": classifier.card.held_out_top1}}


def run_generation(recipe: GenerationRecipe, folder: Path, device: str) -> dict[str, Any]:
    """Trains a generator, draws pictures for the classes of held-out scenes, and measures them against those scenes."""
    if not (folder / "generator").exists():  # else it was stopped while it was measured
        train(recipe.train, device)
    generator = load_generator(folder, device=device)
    network = load_effnet_lite0(generator.space.model.device)
    classifier = load_scene_classifier(Path(recipe.classifier))
    figures = measure(recipe, generator, network, classifier, folder / SHEET)
    return {"figures": figures, "samples_per_second": median_rate(folder / "metrics.jsonl")}


def measure(
    recipe: GenerationRecipe, generator: Generator, network: FeatureNetwork, classifier: SceneClassifier, sheet: Path
) -> dict[str, Any]:
    """Kernel distance and classifier's top-1 of reconstructions, and of what each of the sampler's seeds draws.

    "generation/NAME" is the mean over the sampler's seeds, "generation/NAME, each" all of them.
    """
    scenes = [demo.scene(recipe.train.data.scenes, SPLIT, SEED, index) for index in range(recipe.pictures)]
    names = [scene.things[0].name for scene in scenes]
    real = rendered(scenes, generator.space.resolution)
    features = features_of(real, network)
    back = torch.cat(
        [to_uint8(generator.space.decode(generator.space.encode(part))).cpu() for part in on(generator, real)]
    )
    figures: dict[str, Any] = {"generation/real_top1": top1(real, names, classifier)}

    def judge(pictures: Tensor) -> tuple[float, float]:
        distance = kernel_estimate(features, features_of(pictures, network)).value
        return distance, top1(pictures, names, classifier)

    distance, right = judge(back)
    figures |= {f"generation/reconstructions KID-{network.name}": distance, "generation/reconstructions top1": right}
    drawn = [pictures_of(recipe, generator, names, seed) for seed in range(recipe.sampler_seeds)]
    judged = [judge(pictures) for pictures in drawn]
    for name, values in ((f"KID-{network.name}", [one for one, _ in judged]), ("top1", [two for _, two in judged])):
        figures |= {f"generation/{name}": float(np.mean(values)), f"generation/{name}, each": values}
    save_picture_grid(sheet, [part[:SHOWN].float() / 127.5 - 1 for part in (real, back, drawn[0])])
    return figures


def pictures_of(recipe: GenerationRecipe, generator: Generator, names: list[str], seed: int) -> Tensor:
    """A picture for each name: uint8 (N, 3, R, R), on the CPU."""
    texts = [noun_phrase(name) for name in names]
    precision = "bf16" if recipe.train.precision == "bf16" else "fp32"
    parts = [
        generator.images(
            texts[start : start + BATCH], range(start, min(start + BATCH, len(texts))), seed, recipe.sampler, precision
        )
        for start in range(0, len(texts), BATCH)
    ]
    return to_uint8(torch.cat(parts)).cpu()


def rendered(scenes: list[Scene], size: int) -> Tensor:
    """uint8 (N, 3, size, size)."""
    return torch.from_numpy(np.stack([demo.render(scene, size) for scene in scenes])).permute(0, 3, 1, 2)


def on(generator: Generator, pictures: Tensor) -> Iterator[Tensor]:
    """Parts of a set, on the generator's device."""
    return (part.to(generator.space.model.device) for part in pictures.split(BATCH))


def features_of(pictures: Tensor, network: FeatureNetwork) -> Tensor:
    """(N, D) of uint8 pictures (N, 3, R, R)."""
    return extract_features(pictures.split(BATCH), network)


def top1(pictures: Tensor, names: list[str], classifier: SceneClassifier) -> float:
    """How often the classifier says what a picture should show."""
    said: list[str] = []
    for part in pictures.split(BATCH):
        large = [resized(picture.permute(1, 2, 0).numpy(), classifier.size) for picture in part]
        found = classifier.predict(torch.from_numpy(np.stack(large)).permute(0, 3, 1, 2))
        said += [classifier.names[int(number)] for number in found]
    return float(np.mean([a == b for a, b in zip(said, names, strict=True)]))
