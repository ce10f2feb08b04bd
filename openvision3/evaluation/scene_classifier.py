"""A small classifier of rendered one-thing scenes, to judge generated ones by: it shares nothing with any encoder.

A generator that works on an encoder's tokens could please that encoder's zero-shot head and still draw badly; this
network sees pixels alone, at 64 px a side, and was trained on real scenes alone.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from openvision3 import files
from openvision3.config import OpenVisionError, SceneConfig, from_dict, to_dict
from openvision3.data import demo
from openvision3.evaluation.samples import one_thing

CARD, WEIGHTS = "classifier.json", "classifier.safetensors"
FORMAT_VERSION = 1
HELD_OUT = "classifier-test"  # a split of its own: held-out landscapes, and no scene that anything trains on
HELD_OUT_SEED = 3000
TRAIN_SEED = 4000  # added to the caller's seed: no recipe trains on these scenes
RENDERED, SIDE = 128, 64  # pixels: scenes are rendered at the one and seen at the other
WIDTHS = (24, 48, 96, 192)
_MAX_BYTES = 1 << 26  # of the weights' file


@dataclass(frozen=True)
class ClassifierCard:
    """What a classifier was trained on, and how well it does on held-out real scenes."""

    names: tuple[str, ...]
    samples: int  # real scenes seen in training, each once
    seed: int
    held_out_top1: float
    held_out_samples: int


class _Residual(nn.Module):
    """Two 3 x 3 convolutions around which the input passes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = _convolution(width, width), _convolution(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(F.relu(self.first(x))))


def _convolution(width_in: int, width_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width_out))


class _Network(nn.Module):
    """Pictures (B, 3, 64, 64) in [-1, 1] to logits (B, names): 24 to 192 channels on 32 to 4 pixels a side.

    The things lie anywhere, so that each channel's greatest value counts and not the mean alone.
    """

    def __init__(self, names: int) -> None:
        super().__init__()
        stages: list[nn.Module] = [_convolution(3, WIDTHS[0], 2), nn.ReLU()]
        for before, width in zip(WIDTHS, WIDTHS[1:], strict=False):
            stages += [_convolution(before, width, 2), nn.ReLU(), _Residual(width)]
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(2 * WIDTHS[-1], names)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stages(images.contiguous(memory_format=torch.channels_last))
        return self.head(torch.cat([features.amax(dim=(2, 3)), features.mean(dim=(2, 3))], dim=1))


class SceneClassifier:
    """A trained network with the names it tells apart."""

    size = RENDERED  # pixels, of the pictures it is given

    def __init__(self, network: nn.Module, card: ClassifierCard, sha256: str = "") -> None:
        self.network = network.eval()
        self.card = card
        self.sha256 = sha256  # of the weights' file; "" before it is saved

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in the order of the logits."""
        return self.card.names

    @property
    def protocol(self) -> str:
        """How it judges, in words."""
        card = self.card
        return (
            f"a convolutional network on pixels ({SIDE} px), trained on {card.samples} rendered scenes of one of "
            f"{len(card.names)} names (seed {card.seed}), independent of any encoder; on {card.held_out_samples} "
            f"held-out real scenes ({HELD_OUT}, seed {HELD_OUT_SEED}) its top-1 is {card.held_out_top1:.4f}"
        )

    @torch.inference_mode()
    def predict(self, pixels: Tensor) -> Tensor:
        """Indices (B,) of the likeliest names for pictures (B, 3, 128, 128) in uint8, on the CPU."""
        with torch.autocast("cpu", enabled=False):
            return self.network(_seen(pixels)).argmax(dim=1).cpu()


def train_scene_classifier(
    names: Sequence[str],
    samples: int = 100_000,
    seed: int = 0,
    batch_size: int = 64,
    learning_rate: float = 4e-3,
    held_out: int = 1000,
    progress: Callable[[int], None] | None = None,
) -> SceneClassifier:
    """Trains a classifier of scenes of one thing, each scene rendered and seen once, and tests it on held-out ones.

    `names` are demo names, at least two and different; `progress` is called with the number of scenes seen. AdamW, one
    rise and cosine fall of the learning rate. Runs on the CPU; gives the same network for the same arguments.
    Raises `OpenVisionError` for names that the demo does not have, or fewer scenes than a batch.
    """
    names = tuple(names)
    if len(set(names)) != len(names) or len(names) < 2 or not set(names) <= set(demo.scene_names()):
        raise OpenVisionError("a scene classifier needs two or more different names of the demo's")
    if samples < batch_size or batch_size < 2 or held_out < 1:
        raise OpenVisionError(f"{samples} scenes are less than one batch of {batch_size}, or nothing is held out")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _Network(len(names)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=0.02)
    steps = samples // batch_size
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * _schedule(step, steps)
        pixels, labels = _scenes(names, "train", TRAIN_SEED + seed, range(step * batch_size, (step + 1) * batch_size))
        loss = F.cross_entropy(network(_seen(pixels)), labels, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if progress:
            progress((step + 1) * batch_size)
    trained = SceneClassifier(network, ClassifierCard(names, steps * batch_size, seed, math.nan, held_out))
    return SceneClassifier(network, replace(trained.card, held_out_top1=_held_out_top1(trained, held_out)))


def save_scene_classifier(classifier: SceneClassifier, folder: Path) -> None:
    """Writes `classifier.safetensors` and then `classifier.json` into a folder, each whole or not at all."""
    content = save({name: tensor.contiguous() for name, tensor in classifier.network.state_dict().items()})
    card = {"format_version": FORMAT_VERSION, "sha256": hashlib.sha256(content).hexdigest()} | to_dict(classifier.card)
    with files.whole_file(folder / WEIGHTS) as path:
        path.write_bytes(content)
    with files.whole_file(folder / CARD) as path:
        path.write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_scene_classifier(folder: Path) -> SceneClassifier:
    """Reads a folder that `save_scene_classifier` wrote; raises `OpenVisionError` where it is missing or broken."""
    try:
        description = json.loads((folder / CARD).read_text(encoding="utf-8"))
        if (size := (folder / WEIGHTS).stat().st_size) > _MAX_BYTES:
            raise OpenVisionError(f"{folder / WEIGHTS}: has {size} bytes, more than a scene classifier can")
        content = (folder / WEIGHTS).read_bytes()
    except (OSError, ValueError) as error:
        raise OpenVisionError(f"{folder}: holds no scene classifier ({error}); train one and save it there") from None
    if not isinstance(description, dict) or description.pop("format_version", None) != FORMAT_VERSION:
        raise OpenVisionError(f"{folder / CARD}: is no scene classifier's description of format {FORMAT_VERSION}")
    if (sha256 := hashlib.sha256(content).hexdigest()) != description.pop("sha256", None):
        raise OpenVisionError(f"{folder / WEIGHTS}: its sha256 is {sha256}, not the one in {CARD}")
    try:
        card = from_dict(ClassifierCard, description)
        network = _Network(len(card.names))
        network.load_state_dict(load(content))
    except (OpenVisionError, SafetensorError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OpenVisionError(f"{folder}: is a broken scene classifier ({reason})") from None
    return SceneClassifier(network.to(memory_format=torch.channels_last), card, sha256)  # type: ignore[call-overload]


def _held_out_top1(classifier: SceneClassifier, count: int) -> float:
    hits = 0
    for start in range(0, count, 50):
        indices = range(start, min(start + 50, count))
        pixels, labels = _scenes(classifier.names, HELD_OUT, HELD_OUT_SEED, indices)
        hits += int((classifier.predict(pixels) == labels).sum())
    return hits / count


def _scenes(names: Sequence[str], split: str, seed: int, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rendered scenes of one thing (B, 3, 128, 128) in uint8 and which name each shows (B,)."""
    rng = np.random.default_rng([seed, indices[0]])
    labels = rng.integers(len(names), size=len(indices))
    pictures = []
    for index, label in zip(indices, labels, strict=True):
        scene = demo.scene(one_thing(SceneConfig()), split, seed, index)
        scene = replace(scene, things=(replace(scene.things[0], name=names[label]),))  # at the same place and size
        pictures.append(demo.render(scene, RENDERED))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), torch.from_numpy(labels)


def _seen(pixels: Tensor) -> Tensor:
    """What the network sees of pictures in uint8: each square of 2 x 2 pixels averaged, in [-1, 1]."""
    return F.avg_pool2d(pixels.float(), RENDERED // SIDE) / 127.5 - 1


def _schedule(step: int, steps: int) -> float:
    """Rises over the first tenth, then falls as a cosine to 0."""
    done = (step + 0.5) / steps
    return done / 0.1 if done < 0.1 else 0.5 * (1 + math.cos(math.pi * (done - 0.1) / 0.9))
