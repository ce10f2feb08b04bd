"""Captions judged against scenes, and CIDEr-D against the reference implementation's numbers."""

import math

import pytest
from evaluation_models import Oracle, random_model

from openvision3.config import OpenVisionError
from openvision3.data.demo import Scene, Thing
from openvision3.evaluation.captioning import captioning, cider_d, judge, kind_of, summary
from openvision3.evaluation.samples import SampleSet, landscape_samples, scene_of_meta, scene_samples


def scene(*things: tuple[str, float, float], background: str = "") -> Scene:
    placed = tuple(Thing(name, x, y, 0.4, 0.0, False) for name, x, y in things)
    return Scene("test", placed, background, (0, 0, 1, False), ((0, 0, 0), (0, 0, 0), 0))


PANDA = scene(("panda", 0.5, 0.5))
PAIR = scene(("panda", 0.2, 0.5), ("dog", 0.8, 0.5))
DOGS = scene(("dog", 0.2, 0.5), ("panda", 0.5, 0.5), ("dog", 0.8, 0.5))


def test_numbers_of_pycocoevalcap() -> None:
    # pycocoevalcap 1.2, CiderScorer(n=4, sigma=6.0), on these words split at spaces
    candidates = [
        "a panda in the desert",
        "two apples and a cat",
        "a dog is left of a red bus",
        "a cat",
        "the the the the the",
    ]
    references = [
        ["a panda in the desert"],
        ["two apples and a dog"],
        ["a bus is right of a dog", "a dog and a bus"],
        ["a cat"],
        ["a moon above the sea"],
    ]
    scores = cider_d(candidates, references)
    assert scores == pytest.approx([10.0, 6.83328403, 1.71580623, 5.0, 0.15613135], abs=1e-8)
    assert cider_d(["A cat, in THE desert."] * 2, [["a cat in the desert"], ["a dog"]])[0] == pytest.approx(10.0)


def test_cider_of_nothing() -> None:
    assert cider_d([], []) == []
    assert cider_d(["", "a cat"], [["a dog"], [""]]) == [0.0, 0.0]
    with pytest.raises(ValueError, match="2 candidates"):
        cider_d(["a", "b"], [["a"]])


@pytest.mark.parametrize(
    ("picture", "caption", "expected"),
    [
        (PANDA, "a panda", {"set": 1, "exact": 1, "valid": 1}),
        (PANDA, "two pandas", {"set": 1, "exact": 0}),
        (PANDA, "a dog", {"set": 0, "exact": 0}),
        (PANDA, "a panda and a dog", {"set": 0, "exact": 0}),
        (PANDA, "", {"set": 0, "exact": 0, "valid": 0}),
        (PAIR, "a dog and a panda", {"set": 1, "exact": 1, "states_relation": 0, "can_relate": 1}),
        (PAIR, "a panda to the left of a dog", {"exact": 1, "states_relation": 1, "relation": 1}),
        (PAIR, "a dog to the right of a panda", {"exact": 1, "states_relation": 1, "relation": 1}),
        (PAIR, "a dog to the left of a panda", {"exact": 1, "relation": 0, "relation_chance": 0.25}),
        (PAIR, "a panda above a dog", {"exact": 1, "relation": 0}),
        (PAIR, "a panda to the left of a cat", {"exact": 0, "relation": 0, "relation_chance": 0}),
        (DOGS, "two dogs and a panda", {"set": 1, "exact": 1}),
        (DOGS, "three dogs and a panda", {"set": 1, "exact": 0}),
        (DOGS, "a dog and a panda", {"set": 1, "exact": 0}),
    ],
)
def test_verdicts(picture: Scene, caption: str, expected: dict[str, float]) -> None:
    verdict = judge(picture, None, caption)
    assert {name: verdict[name] for name in expected} == expected


def test_scene_is_judged_where_stated() -> None:
    caption = "a panda in the desert"
    assert judge(PANDA, "desert", caption)["scene"] == 1
    assert judge(PANDA, "city", caption)["scene"] == 0
    assert judge(PANDA, None, caption)["scene"] == 0  # nobody could tell: stating one is wrong
    assert "scene" not in judge(PANDA, "desert", "a panda")


def test_kinds() -> None:
    assert [kind_of(picture) for picture in (PANDA, PAIR, DOGS)] == ["one", "different", "repeated"]


def test_summary_takes_kinds_apart() -> None:
    said = [
        (PANDA, "desert", "a panda in the desert"),
        (PANDA, "city", "a dog in the desert"),
        (PAIR, None, "a panda to the left of a dog"),
        (PAIR, "desert", "a panda and a dog"),
        (PAIR, None, "a dog to the left of a panda"),
        (DOGS, None, "three dogs and a panda"),
    ]
    figures = summary([(picture, word, judge(picture, word, caption)) for picture, word, caption in said])
    assert figures["exact"] == pytest.approx(4 / 6) and figures["set"] == pytest.approx(5 / 6)
    assert (figures["one_exact"], figures["one_n"]) == (0.5, 2)
    assert (figures["different_exact"], figures["different_n"]) == (1.0, 3)
    assert (figures["repeated_set"], figures["repeated_exact"], figures["repeated_n"]) == (1.0, 0.0, 1)
    assert (figures["relation_stated"], figures["relation_right"], figures["relation_n"]) == (0.5, 0.5, 2)
    assert figures["relation_chance"] == 0.25
    assert (figures["one_to_three_set"], figures["one_to_three_n"]) == (pytest.approx(5 / 6), 6)
    assert (figures["two_set"], figures["two_n"]) == (1.0, 3)
    # of the three, one states a relation that holds, one none, and one a wrong one
    assert (figures["two_relation"], figures["two_relation_n"]) == (pytest.approx(1 / 3), 3)
    assert (figures["scene_stated"], figures["scene_right"]) == (pytest.approx(2 / 6), 0.5)
    assert figures["scene_commonest"] == 0.5


def test_summary_of_no_relations_is_not_zero() -> None:
    figures = summary([(PANDA, None, judge(PANDA, None, "a panda"))])
    assert math.isnan(figures["relation_right"]) and math.isnan(figures["repeated_exact"])


def test_oracle_captions_are_all_right() -> None:
    samples = scene_samples(60, 32)
    figures = captioning(Oracle(samples), samples, batch_size=16)
    assert {figures[name] for name in ("set", "exact", "valid", "relation_right", "scene_right")} == {1.0}
    assert figures["one_exact"] == figures["different_exact"] == figures["repeated_exact"] == 1.0
    assert figures["one_n"] + figures["different_n"] + figures["repeated_n"] == figures["n"] == 60
    assert figures["relation_n"] > 5 and figures["relation_chance"] < 0.6 and figures["scene_commonest"] < 1
    assert 5 < figures["cider_d"] <= 10


def test_captions_go_with_their_pictures() -> None:
    """A model that says the caption of the next picture is wrong nearly everywhere."""
    samples = scene_samples(40, 32)
    oracle = Oracle(samples)
    known = oracle.known
    oracle.known = [*known[1:], known[0]]
    assert captioning(oracle, samples, batch_size=16)["exact"] < 0.1


def test_random_model_and_missing_part() -> None:
    figures = captioning(random_model(), scene_samples(6, 32), batch_size=4)
    assert figures["exact"] < 0.5 and figures["n"] == 6
    with pytest.raises(OpenVisionError, match="no caption decoder.*attach_text --init MODEL"):
        captioning(random_model(text_decoder=None), scene_samples(2, 32))
    with pytest.raises(OpenVisionError, match="needs captions"):
        captioning(random_model(), landscape_samples(32, 3))


def test_truth_comes_back_from_the_json_of_a_tar() -> None:
    from openvision3.data import grammar

    for sample in scene_samples(8, 16):
        assert sample.scene is not None
        scene, word = scene_of_meta(sample.key, grammar.describe(sample.scene))
        assert scene is not None and scene.things == sample.scene.things and word == sample.scene_word
        assert judge(scene, word, sample.caption) == judge(sample.scene, sample.scene_word, sample.caption)
    for other in ({}, {"things": []}, {"things": [{"name": "panda"}]}, {"things": 3, "scene": None}, None, "text"):
        assert scene_of_meta("key", other) == (None, None)


def test_pictures_with_captions_alone_get_cider() -> None:
    scenes = scene_samples(5, 32)

    def without_truth(_: SampleSet):  # noqa: ANN202
        from dataclasses import replace

        return (replace(sample, scene=None) for sample in scenes)

    samples = SampleSet("files", "files", 32, None, without_truth)
    figures = captioning(Oracle(scenes), samples)
    assert figures["cider_d"] > 5 and "exact" not in figures
