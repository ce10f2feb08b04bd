"""Demo data: endless captioned scenes made of 494 cut-out things on 171 landscapes.

A scene is a pure function of (distribution, split, seed, index); rendering it at any size is another. The cut-outs are
Fluent Emoji (MIT), the landscapes are in the public domain: see `assets/LICENSES.md`.
"""

import functools
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from openvision3.config import SceneConfig

ASSETS = Path(__file__).parent / "assets"
BENCHMARK = "scenes-v1"
BENCHMARK_SEED = 1000
BENCHMARK_SAMPLES = 1000

_MASK_SIDE = 96  # side of the canvas on which visibility is measured, in pixels
_TRIES = 24
_PICKS = 1000


@dataclass(frozen=True)
class Thing:
    """One cut-out: centre and longest side as fractions of the picture's side, y downwards, angle in degrees."""

    name: str
    x: float
    y: float
    size: float
    angle: float
    flip: bool


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn. `things` are ordered from back to front."""

    key: str
    things: tuple[Thing, ...]
    background: str  # file stem of a landscape; empty: a gradient
    crop: tuple[float, float, float, bool]  # left, top and side as fractions of the landscape's height; mirrored
    gradient: tuple[tuple[float, float, float], tuple[float, float, float], float]  # two colours in [0, 1], angle


@functools.cache
def manifest() -> dict[str, list[dict[str, Any]]]:
    """Names, groups and sources of the embedded pictures."""
    return json.loads((ASSETS / "manifest.json").read_text())


@functools.cache
def scene_names() -> tuple[str, ...]:
    """The names of all 494 things, in the manifest's order."""
    return tuple(item["name"] for item in manifest()["sprites"])


@functools.cache
def groups() -> dict[str, str]:
    """The group ("mammal", "fruit") of each thing name."""
    return {item["name"]: item["group"] for item in manifest()["sprites"]}


@functools.cache
def names(num: int) -> tuple[str, ...]:
    """A fixed subset of `num` thing names, spread evenly over the groups."""
    every = scene_names()
    if not 1 <= num <= len(every):
        raise ValueError(f"num_names is {num}, but must be between 1 and {len(every)}")
    return tuple(every[i * len(every) // num] for i in range(num))


@functools.cache
def landscapes(held_out: bool) -> tuple[str, ...]:
    """File stems of the 137 training landscapes, or of the 34 that no training sees: every fifth of the sorted list."""
    stems = sorted(Path(item["file"]).stem for item in manifest()["backgrounds"])
    return tuple(stem for i, stem in enumerate(stems) if (i % 5 == 2) == held_out)


def pair_held_out(a: str, b: str) -> bool:
    """Whether two different things never meet in a training picture (a tenth of all pairs)."""
    return zlib.crc32("\n".join(sorted((a, b))).encode()) % 10 == 0


def scene(config: SceneConfig, split: str, seed: int, index: int) -> Scene:
    """The scene at `index` of a split: "train", or any other name, which then uses held-out landscapes and all pairs.

    Two splits never share a scene. Only `Generator.random` is drawn from, whose stream numpy keeps stable.
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([zlib.crc32(split.encode()), seed, index])))
    training = split == "train"
    chosen = _choose_names(config, rng, training)
    things = _place(config, rng, chosen)
    background = ""
    if rng.random() >= config.gradient_probability:
        files = landscapes(held_out=not training)
        background = files[int(rng.random() * len(files))]
    side = 0.6 + 0.4 * rng.random()
    crop = (rng.random() * (2 - side), rng.random() * (1 - side), side, rng.random() < 0.5)
    low, high = tuple(tuple(float(rng.random()) for _ in range(3)) for _ in range(2))
    gradient = (low, high, float(rng.random() * 2 * math.pi))
    return Scene(f"{split}-{seed}-{index:09d}", things, background, crop, gradient)  # type: ignore[arg-type]


def _choose_names(config: SceneConfig, rng: np.random.Generator, training: bool) -> list[str]:
    available = names(config.num_names)

    def pick() -> str:
        return available[int(rng.random() * len(available))]

    count = 1 + int(np.searchsorted(np.cumsum(config.count_weights), rng.random() * sum(config.count_weights)))
    chosen = [pick()]
    repeats = count > 1 and rng.random() < config.repeat_probability
    if repeats:  # two or more of one thing, then perhaps others
        chosen += [chosen[0]] * (1 + int(rng.random() * (count - 1)))
    for _ in range(_PICKS):  # of few names, all that are left may be held-out partners: then there are fewer things
        if len(chosen) == count:
            break
        name = pick()
        if name in chosen or (training and any(pair_held_out(name, other) for other in chosen)):
            continue
        chosen.append(name)
    order = np.argsort([rng.random() for _ in chosen])
    return [chosen[i] for i in order]


def _place(config: SceneConfig, rng: np.random.Generator, chosen: list[str]) -> tuple[Thing, ...]:
    """Sizes and places for the things, drawn again until each one is visible enough."""
    while True:
        placed: list[Thing] = []
        masks: list[tuple[np.ndarray, float]] = []  # what is still seen of each thing, and its whole area
        for name in chosen:
            for _ in range(_TRIES):
                size = config.size_min + (config.size_max - config.size_min) * rng.random()
                margin = 0.4 * size
                x, y = (margin + (1 - 2 * margin) * rng.random() for _ in range(2))
                angle = config.max_rotation * (2 * rng.random() - 1)
                thing = Thing(name, x, y, size, angle, rng.random() < 0.5)
                mask, area = _mask(thing)
                if mask.sum() < config.min_visible * area:
                    continue
                left = [seen & ~mask for seen, _ in masks]
                if all(now.sum() >= config.min_visible * whole for now, (_, whole) in zip(left, masks, strict=True)):
                    masks = [(now, whole) for now, (_, whole) in zip(left, masks, strict=True)] + [(mask, area)]
                    placed.append(thing)
                    break
            else:
                break
        if len(placed) == len(chosen):
            return tuple(placed)


@functools.cache
def _sprite(name: str) -> Image.Image:
    file = next(item["file"] for item in manifest()["sprites"] if item["name"] == name)
    return Image.open(ASSETS / file).convert("RGBA")


@functools.cache
def _alpha(name: str) -> Image.Image:
    return _sprite(name).getchannel("A")


@functools.cache
def landscape(stem: str) -> Image.Image:
    """The landscape's whole picture, RGB (576 x 288 pixels)."""
    return Image.open(ASSETS / "backgrounds" / f"{stem}.webp").convert("RGB")


def _transformed(image: Image.Image, thing: Thing, side: int) -> tuple[Image.Image, int, int]:
    """The cut-out (or its alpha) scaled, flipped and turned for a canvas of `side`, and its left upper corner there."""
    scale = thing.size * side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    if thing.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.rotate(thing.angle, Image.Resampling.BICUBIC, expand=True)
    return image, round(thing.x * side - image.width / 2), round(thing.y * side - image.height / 2)


def _mask(thing: Thing) -> tuple[np.ndarray, float]:
    """Where the thing covers a canvas of `_MASK_SIDE` (bool), and its area in pixels, whether inside or not."""
    alpha, left, top = _transformed(_alpha(thing.name), thing, _MASK_SIDE)
    opaque = np.asarray(alpha) > 127
    canvas = np.zeros((_MASK_SIDE, _MASK_SIDE), dtype=bool)
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + alpha.width, _MASK_SIDE), min(top + alpha.height, _MASK_SIDE)
    canvas[y0:y1, x0:x1] = opaque[y0 - top : y1 - top, x0 - left : x1 - left]
    return canvas, float(opaque.sum())


def render(scene: Scene, size: int) -> np.ndarray:
    """Draws the scene: uint8 (size, size, 3), RGB."""
    canvas = _background(scene, size)
    for thing in scene.things:
        sprite, left, top = _transformed(_sprite(thing.name), thing, size)
        canvas.paste(sprite, (left, top), sprite)
    return np.array(canvas)


def _background(scene: Scene, size: int) -> Image.Image:
    if not scene.background:
        return Image.fromarray(_gradient(scene, size))
    image = landscape(scene.background)
    left, top, side, mirrored = scene.crop
    height = image.height
    left *= min(1.0, (image.width / height - side) / (2 - side))  # landscapes narrower than 2:1 keep the crop inside
    box = (left * height, top * height, (left + side) * height, (top + side) * height)
    canvas = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return canvas.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else canvas


def _gradient(scene: Scene, size: int) -> np.ndarray:
    low, high, angle = scene.gradient
    axis = (np.arange(size) + 0.5) / size - 0.5
    ramp = 0.5 + (axis[None, :] * math.cos(angle) + axis[:, None] * math.sin(angle)) / math.sqrt(2)
    colours = np.asarray(low) + (np.asarray(high) - np.asarray(low)) * ramp[..., None]
    return np.round(colours * 255).astype(np.uint8)


def landscape_crops(size: int = 128) -> Iterator[tuple[str, np.ndarray]]:
    """The 34 held-out landscapes, three fixed square crops of full height each: (key, uint8 (size, size, 3))."""
    for stem in landscapes(held_out=True):
        image = landscape(stem)
        for i in range(3):
            left = i * (image.width - image.height) / 2
            box = (left, 0, left + image.height, image.height)
            yield f"{stem}-{i}", np.array(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
