"""The questions of `scenes-vqa`, with known answers, about demo scenes on landscapes that no training sees.

The wording is the training's own (`grammar.presence_question` and its neighbours); nothing is added to a question. Of
each kind `num` scenes are asked about:

- presence, by POPE's protocol (arXiv 2305.10355): of a scene one thing that is there, and for each of three kinds of
  negatives one that is not. random: any name; popular: one of the `POPULAR` names that a fixed sample of training
  scenes shows most often; adversarial: a name of the same group ("mammal", "fruit") as the thing that is there. The
  demo draws all names alike, so that "popular" differs from "random" by the sample's chance alone: a large gap between
  the two would mean a bias to names. POPE's adversarial names are those that occur together with a thing most often;
  scenes have no such habit, so that kin takes its place.
- count: as many questions for each of one, two, three and four, on scenes of their own, where things repeat often.
- relation: half of them hold, half state the opposite.
- scene: where the picture is, if a look at it settles that.
- caption: read back by the grammar.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, TypeVar

from openvision3.config import OpenVisionError, SceneConfig
from openvision3.data import demo, grammar
from openvision3.data.demo import Scene

SCENES = SceneConfig(num_names=100)  # the things that the recipe `demo` learns of
SUITE, SPLIT, SEED = "scenes-vqa", "vqa-test", 1000
NEGATIVES = ("random", "popular", "adversarial")
PER_SCENE = 8  # questions for each of `num`: four of presence, one of each other kind
POPULAR, TRAINING_SAMPLE = 20, 500  # names, and the training scenes that they are counted in
MOST_TRIED = 100  # scenes looked at for each that is asked about

T = TypeVar("T")
Kind = Literal["presence", "count", "relation", "scene", "caption"]


@dataclass(frozen=True)
class Question:
    """A question about a scene, and its answer; a caption's answer is one of many that are right."""

    kind: Kind
    scene: Scene
    text: str
    truth: str
    group: str = ""  # of presence: "positive", or the kind of negative


def ask_all(num: int, config: SceneConfig = SCENES, split: str = SPLIT, seed: int = SEED) -> list[Question]:
    """The suite's questions: `num` scenes of each kind. A pure function of its arguments.

    Raises `OpenVisionError` where `num` is below 4, where `num_names` is out of range, where `split` is the training's,
    or where such scenes do not give that many questions.
    """
    if num < len(grammar.NUMBERS):
        raise OpenVisionError(f"num is {num}: expected at least {len(grammar.NUMBERS)}")
    if not 1 <= config.num_names <= len(demo.scene_names()):
        raise OpenVisionError(f"num_names is {config.num_names}: expected 1 to {len(demo.scene_names())}")
    if split == "train":
        raise OpenVisionError("split is 'train': expected one that no training sees")
    repeating = replace(config, count_weights=(0.1, 0.2, 0.3, 0.4), repeat_probability=1.0)

    def first(make: Callable[[Scene, int], list[Question]]) -> list[Question]:
        return _first(num, _scenes(config, split, seed, num), make)

    return [
        *first(lambda scene, _: _presence(scene, config)),
        *_counts(num, _scenes(repeating, f"{split}-count", seed, num)),
        *first(_relation),
        *first(_scene),
        *first(_caption),
    ]


def _scenes(config: SceneConfig, split: str, seed: int, num: int) -> Iterator[Scene]:
    for number in range(MOST_TRIED * num):
        yield _scene_at(config, split, seed, number)


@cache
def _scene_at(config: SceneConfig, split: str, seed: int, number: int) -> Scene:
    return demo.scene(config, split, seed, number)


def _first(num: int, scenes: Iterator[Scene], make: Callable[[Scene, int], list[Question]]) -> list[Question]:
    """The questions of the first `num` scenes that `make` has any for; it is given how many scenes had some before."""
    found, asked = 0, []
    for scene in scenes:
        if rows := make(scene, found):
            found, asked = found + 1, asked + rows
            if found == num:
                return asked
    raise OpenVisionError(f"such scenes give {found} of {num} questions: ask for fewer, or of more names")


def _rng(kind: str, scene: Scene) -> random.Random:
    return random.Random(f"{SUITE} {kind} {scene.key}")


def _pick(rng: random.Random, items: Sequence[T]) -> T:
    """By `random` alone, whose stream Python keeps stable."""
    return items[int(rng.random() * len(items))]


def _presence(scene: Scene, config: SceneConfig) -> list[Question]:
    rng = _rng("presence", scene)
    names = demo.names(config.num_names)
    there = sorted({thing.name for thing in scene.things})
    thing = _pick(rng, there)
    groups = demo.groups()
    offered: dict[str, Sequence[str]] = {
        "random": names,
        "popular": popular_names(config),
        "adversarial": [name for name in names if groups[name] == groups[thing]],
    }
    asked = [Question("presence", scene, grammar.presence_question(thing), "yes", "positive")]
    for kind in NEGATIVES:
        absent = [name for name in offered[kind] if name not in there]
        if not absent:
            return []
        asked.append(Question("presence", scene, grammar.presence_question(_pick(rng, absent)), "no", kind))
    return asked


@cache
def popular_names(config: SceneConfig = SCENES) -> tuple[str, ...]:
    """The names in most of the first 500 training scenes of seed 0; of equals the first by the alphabet."""
    seen: Counter[str] = Counter()
    for number in range(TRAINING_SAMPLE):
        seen.update({thing.name for thing in demo.scene(config, "train", 0, number).things})
    return tuple(sorted(seen, key=lambda name: (-seen[name], name))[:POPULAR])


def _counts(num: int, scenes: Iterator[Scene]) -> list[Question]:
    """As many questions for each number; a scene serves the largest number that is still wanted of those it shows."""
    wanted = {k: num // 4 + (k <= num % 4) for k in range(1, 5)}
    asked = []
    for scene in scenes:
        groups = Counter(thing.name for thing in scene.things)
        useful = [count for count in groups.values() if wanted.get(count)]
        if useful:
            count = max(useful)
            name = _pick(_rng("count", scene), sorted(name for name in groups if groups[name] == count))
            wanted[count] -= 1
            asked.append(Question("count", scene, grammar.count_question(name), grammar.NUMBERS[count - 1]))
            if len(asked) == num:
                return asked
    raise OpenVisionError(f"such scenes give {len(asked)} of {num} counts: ask for fewer")


def _relation(scene: Scene, before: int) -> list[Question]:
    statable = grammar.statable_relations(scene)
    if not statable:
        return []
    a, relation, b = _pick(_rng("relation", scene), statable)
    holds = before % 2 == 0
    text = grammar.relation_question(a, relation if holds else grammar.OPPOSITE[relation], b)
    return [Question("relation", scene, text, "yes" if holds else "no")]


def _scene(scene: Scene, _: int) -> list[Question]:
    word = grammar.scene_word(scene)
    return [Question("scene", scene, grammar.SCENE_QUESTION, grammar.SCENE_PHRASES[word])] if word else []


def _caption(scene: Scene, _: int) -> list[Question]:
    return [Question("caption", scene, grammar.CAPTION_QUESTION, grammar.captions(scene).caption)]
