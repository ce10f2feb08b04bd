"""Captions and questions of scenes, and reading captions back."""

import functools
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openvision3.config import SceneConfig
from openvision3.data import demo, grammar
from openvision3.data.demo import Scene, Thing
from openvision3.data.nouns import MEASURES, plural, singular, with_article


@functools.cache
def scenes() -> list[Scene]:
    return [demo.scene(SceneConfig(), split, 3, i) for split in ("train", "val") for i in range(700)]


def scene(*things: Thing, background: str = "", key: str = "k", crop: tuple[float, float] = (0.0, 1.0)) -> Scene:
    gradient = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 0.0)
    return Scene(key, things, background, (0.0, *crop, False), gradient)


def thing(name: str, x: float = 0.5, y: float = 0.5, size: float = 0.4) -> Thing:
    return Thing(name, x, y, size, 0.0, False)


def test_golden_captions() -> None:
    """Captions are part of the frozen benchmark: these must never change."""
    golden = {
        0: ("a burrito and a head of broccoli", "a burrito above a head of broccoli"),
        1: ("a cocktail glass", "a cocktail glass"),
        2: (
            "a notebook, a turkey, an elephant and a leopard",
            "a turkey, a small leopard, an elephant and a big notebook",
        ),
        3: ("a wine glass and a cat", "a small wine glass above a cat"),
        5: ("an olive, a t-rex and a safety pin", "an olive, a t-rex and a safety pin, with the olive below the t-rex"),
        8: (
            "a fox, a box of french fries and a trackball",
            "a trackball, a box of french fries and a fox, with the fox to the left of the trackball",
        ),
        13: ("a chicken", "a chicken"),
        21: ("a zebra and a pretzel", "a zebra and a pretzel"),
    }
    for index, (alt, caption) in golden.items():
        texts = grammar.captions(demo.scene(SceneConfig(), demo.BENCHMARK, demo.BENCHMARK_SEED, index))
        assert (texts.alt, texts.caption) == (alt, caption)


def test_parse_inverts_every_caption() -> None:
    for each in scenes():
        truth = Counter(t.name for t in each.things)
        texts = grammar.captions(each)
        alt, full = grammar.parse(texts.alt), grammar.parse(texts.caption)
        assert alt == grammar.ParsedCaption(truth, (), None, (), True), texts
        assert full.valid and full.things == truth, texts
        assert all(grammar.relation_holds(each, *relation) for relation in full.relations), texts
        assert full.scene in (None, grammar.scene_word(each)), texts
        for name, size in full.sizes:
            assert [grammar.size_word(t) for t in each.things if t.name == name] == [size], texts


def test_how_often_relations_sizes_and_scenes_are_said() -> None:
    two, more, sizes, words = [], [], [], []
    for each in scenes():
        counts = Counter(t.name for t in each.things)
        parsed = grammar.parse(grammar.captions(each).caption)
        singles = [name for name, count in counts.items() if count == 1]
        statable = any(
            grammar.relation_holds(each, a, r, b) for a in singles for b in singles for r in grammar.RELATIONS
        )
        if statable and len(singles) == len(each.things):
            (two if len(singles) == 2 else more).append(bool(parsed.relations))
        sizes += [
            name in dict(parsed.sizes) for name in singles for t in each.things if t.name == name and t.size > 0.47
        ]
        if grammar.scene_word(each):
            words.append(parsed.scene is not None)
    for said, expected in ((two, 0.85), (more, 0.5), (sizes, 0.25), (words, 0.5)):
        assert len(said) > 120
        assert sum(said) / len(said) == pytest.approx(expected, abs=0.08)


def test_captions_are_a_function_of_the_scene_alone() -> None:
    for each in scenes()[:50]:
        assert grammar.captions(each) == grammar.captions(each)
        assert grammar.questions(each) == grammar.questions(each)


def test_relations() -> None:
    """y grows downwards; below 0.15 of the side nothing is stated."""
    each = scene(thing("panda", 0.2, 0.3), thing("key", 0.36, 0.6), thing("egg", 0.3, 0.5))
    assert grammar.relation_holds(each, "panda", "left", "key") and grammar.relation_holds(
        each, "key", "right", "panda"
    )
    assert grammar.relation_holds(each, "panda", "above", "key") and grammar.relation_holds(
        each, "key", "below", "panda"
    )
    assert not grammar.relation_holds(each, "panda", "right", "key")
    assert not grammar.relation_holds(each, "panda", "below", "key")
    assert not grammar.relation_holds(each, "panda", "left", "egg")  # 0.1 apart
    assert not grammar.relation_holds(each, "panda", "left", "cow")
    with pytest.raises(ValueError, match="behind"):
        grammar.relation_holds(each, "panda", "behind", "key")


def test_the_relation_on_the_longer_axis_is_stated() -> None:
    said = set()
    for i in range(60):
        each = scene(thing("panda", 0.2, 0.3), thing("key", 0.4, 0.7), key=str(i))
        said |= set(grammar.parse(grammar.captions(each).caption).relations)
    assert said == {("panda", "above", "key"), ("key", "below", "panda")}


def test_near_things_get_no_relation() -> None:
    for i in range(40):
        each = scene(thing("panda", 0.45, 0.5), thing("key", 0.55, 0.5), key=str(i))
        assert grammar.parse(grammar.captions(each).caption).relations == ()


def test_sizes() -> None:
    words = set()
    for i in range(60):
        words.add(grammar.captions(scene(thing("owl", size=0.3), background="lava0", key=str(i))).caption)
    assert words == {"an owl", "a small owl"}
    assert [grammar.size_word(thing("owl", size=s)) for s in (0.329, 0.331, 0.469, 0.471)] == [
        "small",
        None,
        None,
        "big",
    ]


def test_scene_words_need_enough_of_the_scene() -> None:
    assert grammar.scene_word(scene(thing("owl"))) == "plain"
    assert grammar.scene_word(scene(thing("owl"), background="lava0")) is None  # ambiguous: never named
    assert grammar.scene_word(scene(thing("owl"), background="city10")) == "city"
    assert grammar.scene_word(scene(thing("owl"), background="city10", crop=(0.0, 0.6))) is None  # only sky
    assert grammar.scene_word(scene(thing("owl"), background="city10", crop=(0.4, 0.6))) == "city"


def test_every_landscape_has_a_word_or_null() -> None:
    words = Counter(item["word"] for item in demo.manifest()["backgrounds"])
    assert set(words) == {None, *grammar.SCENE_PHRASES} - {"plain"}
    for item in demo.manifest()["backgrounds"]:
        assert ("word_from" in item) == (item["word"] is not None)
        assert 0 < item.get("word_from", 0.5) < 0.9
        assert (demo.ASSETS / item["file"]).is_file() and Path(item["file"]).stem


def test_articles_and_plurals() -> None:
    phrases = {
        "apple": "an apple", "umbrella": "an umbrella", "unicorn": "a unicorn", "hourglass": "an hourglass",
        "house": "a house", "t-rex": "a t-rex",
    }  # fmt: skip
    assert {name: with_article(name) for name in phrases} == phrases
    plurals = {
        "panda": "pandas", "fox": "foxes", "couch": "couches", "strawberry": "strawberries", "toy": "toys",
        "wolf": "wolves", "computer mouse": "computer mice", "sheep": "sheep", "tropical fish": "tropical fish",
        "ear of rice": "ears of rice", "nest with eggs": "nests with eggs", "bow and arrow": "bows and arrows",
        "jeans": "pairs of jeans", "bread": "loaves of bread", "t-rex": "t-rexes", "die": "dice", "potato": "potatoes",
        "maple leaf": "maple leaves", "glass of milk": "glasses of milk", "snowman": "snowmen", "bus": "buses",
    }  # fmt: skip
    assert {name: plural(name) for name in plurals} == plurals
    assert set(MEASURES) <= set(demo.scene_names())


def test_every_name_can_be_read_back() -> None:
    """One to four of each of the 494 things, alone, with each size, and before each scene."""
    for name in demo.scene_names():
        for count in (1, 2, 3, 4):
            assert grammar.parse(grammar.noun_phrase(name, count=count)) == grammar.ParsedCaption(
                Counter({name: count}), (), None, (), True
            )
        for size in grammar.SIZES:
            parsed = grammar.parse(grammar.noun_phrase(name, size))
            assert parsed.valid and parsed.things == {name: 1} and parsed.sizes in (((name, size),), ())
        for word, phrase in grammar.SCENE_PHRASES.items():
            parsed = grammar.parse(f"{grammar.noun_phrase(name)} {phrase}")
            assert parsed.valid and parsed.scene == word and parsed.things == {name: 1}
    assert grammar.noun_phrase("airplane", "small") == "an airplane"  # else it would read as "small airplane"


def test_parse_by_hand() -> None:
    parsed = grammar.parse(
        "Two small airplanes, a bow and arrow and a big key, with the key above the bow and arrow in the city."
    )
    assert parsed == grammar.ParsedCaption(
        Counter({"small airplane": 2, "bow and arrow": 1, "key": 1}),
        (("key", "above", "bow and arrow"),),
        "city",
        (("key", "big"),),
        True,
    )


@pytest.mark.parametrize(
    ("caption", "things", "relations", "scene_word"),
    [
        ("", {}, (), None),
        ("nothing known here", {}, (), None),
        ("a panda and", {"panda": 1}, (), None),
        ("panda", {"panda": 1}, (), None),
        ("two panda", {"panda": 2}, (), None),
        ("a panda to the left of", {"panda": 1}, (), None),
        ("a panda a panda a key", {"panda": 2, "key": 1}, (), None),
        ("a purple panda above some key by the water by the water", {"panda": 1, "key": 1}, (), "water"),
        ("the panda below the key", {"panda": 1, "key": 1}, (("panda", "below", "key"),), None),
        ("in the desert a panda", {"panda": 1}, (), "desert"),
        ("a small", {}, (), None),
        ("two", {}, (), None),
    ],
)
def test_parse_makes_the_best_of_broken_captions(
    caption: str, things: dict[str, int], relations: tuple[tuple[str, str, str], ...], scene_word: str | None
) -> None:
    parsed = grammar.parse(caption)
    assert not parsed.valid
    assert (dict(parsed.things), parsed.relations, parsed.scene) == (things, relations, scene_word)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(sorted(grammar.vocabulary()) + [",", ".", "zzz", "Ω", ""]), max_size=20))
def test_parse_takes_any_words(words: list[str]) -> None:
    parsed = grammar.parse(" ".join(words))
    assert all(count > 0 for count in parsed.things.values())
    assert {a for a, _, _ in parsed.relations} | {b for _, _, b in parsed.relations} <= set(parsed.things)


def test_questions_have_right_answers() -> None:
    kinds: Counter[tuple[str, str]] = Counter()
    for each in scenes():
        counts = Counter(t.name for t in each.things)
        for item in grammar.questions(each):
            kinds[item["type"], item["answer"]] += 1
            parsed = grammar.parse(item["question"])
            if item["type"] == "presence":
                (name,) = parsed.things
                assert (counts[name] > 0) == (item["answer"] == "yes")
            elif item["type"] == "count":
                names = [name for name in counts if f"How many {plural(name)} are" in item["question"]]
                assert item["answer"] in {grammar.NUMBERS[counts[name] - 1] for name in names}
            elif item["type"] == "relation":
                (relation,) = parsed.relations
                assert grammar.relation_holds(each, *relation) == (item["answer"] == "yes")
            else:
                word = grammar.scene_word(each)
                assert word and item["answer"] == grammar.SCENE_PHRASES[word]
    assert kinds["relation", "yes"] / kinds["relation", "no"] == pytest.approx(1, abs=0.3)
    assert kinds["presence", "no"] > 1000 and kinds["count", "two"] > 40
    asked = {grammar.questions(each, ("cow",))[1]["question"] for each in scenes()[:20] if len(each.things) == 1}
    assert asked >= {"Is there a cow in the picture?"}


def test_singular_surfaces_are_distinct() -> None:
    names = demo.scene_names()
    assert len({singular(name) for name in names}) == len({plural(name) for name in names}) == len(names) == 494
