"""The demo scenes: frozen benchmark, held-out splits, visibility, purity."""

import hashlib
import json

import numpy as np
import pytest

from openvision3.config import SceneConfig
from openvision3.data import demo, grammar

BENCHMARK_SHA256 = "83c3e6f6d42acb4b1a32989d25f587128d12d817a6e06a3c76a9cb864173d046"


def described(scene: demo.Scene) -> str:
    """A scene and its captions as text, numbers to six digits: equal wherever numpy's `random` stream is."""
    texts = grammar.captions(scene)
    things = [(t.name, *(round(v, 6) for v in (t.x, t.y, t.size, t.angle)), t.flip) for t in scene.things]
    rest = [scene.key, scene.background, [round(v, 6) for v in scene.crop[:3]], scene.crop[3], texts.alt, texts.caption]
    return json.dumps([things, rest])


def benchmark() -> list[demo.Scene]:
    return [demo.scene(SceneConfig(), demo.BENCHMARK, demo.BENCHMARK_SEED, i) for i in range(demo.BENCHMARK_SAMPLES)]


def test_benchmark_is_frozen():
    digest = hashlib.sha256("\n".join(map(described, benchmark())).encode()).hexdigest()
    assert digest == BENCHMARK_SHA256


def test_benchmark_has_the_stated_distribution():
    scenes = benchmark()
    shares = np.bincount([len(scene.things) for scene in scenes], minlength=5)[1:] / len(scenes)
    assert np.abs(shares - [0.40, 0.35, 0.20, 0.05]).max() < 0.04
    sizes = np.array([thing.size for scene in scenes for thing in scene.things])
    assert sizes.min() >= 0.25 and sizes.max() <= 0.55
    several = [scene for scene in scenes if len(scene.things) > 1]
    repeated = [scene for scene in several if len({thing.name for thing in scene.things}) < len(scene.things)]
    assert abs(len(repeated) / len(several) - 0.20) < 0.04
    assert abs(np.mean([not scene.background for scene in scenes]) - 0.12) < 0.03
    assert {scene.background for scene in scenes} - {""} <= set(demo.landscapes(held_out=True))


def test_splits_share_no_landscape_and_training_leaves_out_pairs():
    assert len(demo.landscapes(True)) == 34 and len(demo.landscapes(False)) == 137
    assert not set(demo.landscapes(True)) & set(demo.landscapes(False))
    config = SceneConfig(num_names=30)
    pairs = {split: 0 for split in ("train", "val")}
    for split in pairs:
        for i in range(300):
            scene = demo.scene(config, split, 0, i)
            names = sorted({thing.name for thing in scene.things})
            pairs[split] += sum(demo.pair_held_out(a, b) for a in names for b in names if a < b)
            assert not scene.background or scene.background in demo.landscapes(split != "train")
    assert pairs["train"] == 0 and pairs["val"] > 5


def test_few_names_that_may_not_meet_end_in_fewer_things():
    config = SceneConfig(num_names=5)
    assert 1 <= len(demo.scene(config, "train", 0, 43).things) <= 4


def test_every_thing_is_visible():
    config = SceneConfig(count_weights=(0, 0, 0, 1))
    for i in range(20):
        scene = demo.scene(config, "train", 3, i)
        covered = np.zeros((96, 96), dtype=bool)
        for thing in reversed(scene.things):  # front first
            mask, area = demo._mask(thing)
            assert (mask & ~covered).sum() >= config.min_visible * area
            covered |= mask


def test_rendering_is_pure_and_scales():
    scene = demo.scene(SceneConfig(), "val", 0, 1)
    assert scene == demo.scene(SceneConfig(), "val", 0, 1) != demo.scene(SceneConfig(), "val", 1, 1)
    small, large = demo.render(scene, 64), demo.render(scene, 256)
    assert small.shape == (64, 64, 3) and large.dtype == np.uint8
    assert np.array_equal(large, demo.render(scene, 256))
    reduced = large.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
    assert np.abs(reduced - small).mean() < 6  # the same picture


def test_landscape_crops_are_34_times_3():
    crops = list(demo.landscape_crops(32))
    assert len(crops) == 102 and crops[0][1].shape == (32, 32, 3)
    assert len({key for key, _ in crops}) == 102


def test_names_are_a_fixed_spread_subset():
    assert len(demo.scene_names()) == len(set(demo.scene_names())) == 494
    assert len(set(demo.names(100))) == 100 and set(demo.names(100)) <= set(demo.scene_names())
    with pytest.raises(ValueError, match="495"):
        demo.names(495)
