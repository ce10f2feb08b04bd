"""The small grammar of the demo captions: writes captions and questions for scenes, and reads captions back.

A caption lists the things of a scene ("a panda and two apples"), or relates two of them ("a panda to the left of a
small apple", or after a list ", with the panda above the key"), and may end with the scene ("in the desert"). `parse`
inverts it, and makes the best of sentences that break the grammar, such as a half-trained model's.
"""

import functools
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from openvision3.data import demo
from openvision3.data.demo import Scene, Thing
from openvision3.data.nouns import plural, singular, with_article

RELATIONS = ("left", "right", "above", "below")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
RELATION_PHRASES = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
PLAIN = "plain"  # scene word of a colour gradient
SCENE_PHRASES = {
    "desert": "in the desert",
    "city": "in the city",
    "mountains": "in the mountains",
    "water": "by the water",
    "fields": "in the fields",
    PLAIN: "on a plain background",
}
NUMBERS = ("one", "two", "three", "four")
SIZES = ("small", "big")
SMALL_BELOW, BIG_ABOVE = 0.33, 0.47  # of the picture's side
MIN_DISTANCE = 0.15  # between centres, for a relation on that axis
MIN_SEEN = 0.2  # of the picture's height: what the scene word names must reach at least so far up

RELATION_OF_TWO, RELATION_OF_MORE, SIZE_WORD, SCENE_PHRASE = 0.85, 0.5, 0.25, 0.5  # how often each is said
MAX_WORDS = 28  # words, hyphens and commas of a caption, which leaves room for the two ends in 30 tokens


@dataclass(frozen=True)
class Captions:
    """The two texts of a picture: `alt` names the things, `caption` says more."""

    alt: str
    caption: str


@dataclass(frozen=True)
class ParsedCaption:
    """What a caption says; where it breaks the grammar, `valid` is False and the rest is what could be made out."""

    things: Counter[str]
    relations: tuple[tuple[str, str, str], ...]  # (a, relation, b): a is `relation` of b
    scene: str | None  # a key of SCENE_PHRASES
    sizes: tuple[tuple[str, str], ...]  # (name, "small" or "big")
    valid: bool


def noun_phrase(name: str, size: str | None = None, count: int = 1) -> str:
    """A thing as captions name it: "an apple", "a small apple", "two apples"; `size` ("small", "big") for one only.

    The size is left out where it would make another name ("small airplane"), or where the name itself begins with one.
    """
    if count > 1:
        return f"{NUMBERS[count - 1]} {plural(name)}"
    sized = f"{size} {singular(name)}"
    plain = size is None or sized in demo.scene_names() or name.split()[0] in SIZES
    return with_article(singular(name) if plain else sized)


def scene_phrases() -> list[str]:
    """Every phrase that a caption may end with."""
    return list(SCENE_PHRASES.values())


def scene_word(scene: Scene) -> str | None:
    """What the picture's background is: a key of SCENE_PHRASES, or None where a look at it would not settle it.

    A landscape's word was checked by eye, as was how far down what it names begins; crops with too little of it get
    none.
    """
    if not scene.background:
        return PLAIN
    word, begins = _landscape_words()[scene.background]
    _, top, side, _ = scene.crop
    return word if word and top + side - begins >= MIN_SEEN * side else None


@functools.cache
def _landscape_words() -> dict[str, tuple[str | None, float]]:
    """Word of each landscape, and the height where what it names begins, as a fraction of the landscape's."""
    files = demo.manifest()["backgrounds"]
    return {item["file"].split("/")[-1].split(".")[0]: (item["word"], item.get("word_from", 1.0)) for item in files}


def size_word(thing: Thing) -> str | None:
    """ "small", "big", or None for a thing of middling size."""
    if thing.size < SMALL_BELOW:
        return "small"
    return "big" if thing.size > BIG_ABOVE else None


def relation_holds(scene: Scene, a: str, relation: str, b: str) -> bool:
    """Whether some thing `a` is on that side of some thing `b`: their centres differ by 0.15 of the side on the axis.

    False where the picture lacks one of them. Raises `ValueError` for a relation that is not one of RELATIONS.
    """
    if relation not in RELATIONS:
        raise ValueError(f"relation is {relation!r}, expected one of {', '.join(RELATIONS)}")
    firsts, seconds = ([thing for thing in scene.things if thing.name == name] for name in (a, b))
    return any(_distance(x, relation, y) >= MIN_DISTANCE for x in firsts for y in seconds if x is not y)


def _distance(a: Thing, relation: str, b: Thing) -> float:
    """How far `a` lies beyond `b` in the relation's direction, in fractions of the picture's side."""
    return {"left": b.x - a.x, "right": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}[relation]


def _statable(singles: Sequence[Thing]) -> list[tuple[Thing, str, Thing]]:
    """For each ordered pair of things the relation on the axis where they are farther apart, if they are far enough."""
    found = []
    for a in singles:
        for b in singles:
            if a is not b:
                distance, relation = max((_distance(a, r, b), r) for r in RELATIONS)
                if distance >= MIN_DISTANCE:
                    found.append((a, relation, b))
    return found


def captions(scene: Scene) -> Captions:
    """Alt text and caption of a scene: a pure function of the scene, its key being the seed of every choice."""
    rng = random.Random(f"captions {scene.key}")
    groups = Counter(thing.name for thing in scene.things)
    alt = _listing([noun_phrase(name, count=groups[name]) for name in _shuffled(groups, rng)])
    order = _shuffled(groups, rng)
    singles = [thing for thing in scene.things if groups[thing.name] == 1]
    sizes = {thing.name: size_word(thing) if rng.random() < SIZE_WORD else None for thing in singles}
    phrases = {name: noun_phrase(name, sizes.get(name), groups[name]) for name in order}
    statable = _statable(singles)
    said = rng.random() < (RELATION_OF_TWO if len(groups) == len(scene.things) == 2 else RELATION_OF_MORE)
    text = _listing([phrases[name] for name in order])
    if statable and said:
        a, relation, b = statable[int(rng.random() * len(statable))]
        phrase = RELATION_PHRASES[relation]
        if len(groups) == 2:
            text = f"{phrases[a.name]} {phrase} {phrases[b.name]}"
        else:
            longer = f"{text}, with the {singular(a.name)} {phrase} the {singular(b.name)}"
            text = longer if _length(longer) <= MAX_WORDS else text
    word = scene_word(scene)
    if word and rng.random() < SCENE_PHRASE:
        longer = f"{text} {SCENE_PHRASES[word]}"
        text = longer if _length(longer) <= MAX_WORDS else text
    return Captions(alt, text)


def _shuffled(names: Iterable[str], rng: random.Random) -> list[str]:
    return [name for _, name in sorted((rng.random(), name) for name in names)]


def _listing(phrases: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)


def _length(text: str) -> int:
    """Words, hyphens and commas: an upper bound on the caption's WordPiece tokens but for plural endings."""
    return len(re.findall(r"[a-z]+|[-,]", text)) + sum(text.count(f"{number} ") for number in NUMBERS[1:])


SCENE_QUESTION = "Where is this?"
CAPTION_QUESTION = "Describe the picture."


def presence_question(name: str) -> str:
    """Asks whether the picture shows that thing."""
    return f"Is there {noun_phrase(name)} in the picture?"


def count_question(name: str) -> str:
    """Asks how many of that thing the picture shows."""
    return f"How many {plural(name)} are in the picture?"


def relation_question(a: str, relation: str, b: str) -> str:
    """Asks whether the one thing `a` is on that side of the one thing `b`; `relation` is one of RELATIONS."""
    return f"Is the {singular(a)} {RELATION_PHRASES[relation]} the {singular(b)}?"


def statable_relations(scene: Scene) -> list[tuple[str, str, str]]:
    """Each (a, relation, b) that a question may ask: things that are there once, far enough apart on that axis."""
    groups = Counter(thing.name for thing in scene.things)
    singles = [thing for thing in scene.things if groups[thing.name] == 1]
    return [(a.name, relation, b.name) for a, relation, b in _statable(singles)]


def questions(scene: Scene, names: Sequence[str] | None = None) -> list[dict[str, str]]:
    """Questions with answers: {type: presence | count | relation | scene, question, answer}.

    A pure function of the scene and `names`: the things to ask about in vain (default: all that the demo has).
    """
    rng = random.Random(f"questions {scene.key}")
    groups = Counter(thing.name for thing in scene.things)
    present = _shuffled(groups, rng)
    every = names or demo.scene_names()
    asked = []

    def ask(kind: str, question: str, answer: str) -> None:
        asked.append({"type": kind, "question": question, "answer": answer})

    ask("presence", presence_question(present[0]), "yes")
    absent = every[int(rng.random() * len(every))]
    if absent not in groups:
        ask("presence", presence_question(absent), "no")
    counted = present[-1]
    ask("count", count_question(counted), NUMBERS[groups[counted] - 1])
    statable = statable_relations(scene)
    if statable:
        a, relation, b = statable[int(rng.random() * len(statable))]
        right = rng.random() < 0.5
        question = relation_question(a, relation if right else OPPOSITE[relation], b)
        ask("relation", question, "yes" if right else "no")
    if word := scene_word(scene):
        ask("scene", SCENE_QUESTION, SCENE_PHRASES[word])
    return asked


@dataclass(frozen=True)
class _Item:
    """A piece of a caption: `kind` is T (a thing), t (a thing in wrong number or bare), D (the thing), R (a relation),
    S (a scene), W (with), & (and), a comma, or ? (anything else)."""

    kind: str
    name: str = ""  # of the thing, relation or scene
    count: int = 1
    size: str = ""


_VALID = re.compile(r"(T|T&T|T(,T)+&T|TRT|TR&T)(,WDRD)?S?")


def parse(caption: str) -> ParsedCaption:
    """Reads a caption back: the exact inverse of `captions` on what it writes, the best effort on anything else.

    Case and all punctuation but commas and hyphens are ignored.
    """
    items = _items(re.findall(r"[^\W_]+(?:[-'][^\W_]+)*|,", caption.lower()))
    things: Counter[str] = Counter()
    for item in items:
        if item.kind in "Tt":
            things[item.name] += item.count
    for item in items:
        if item.kind == "D" and item.name not in things:
            things[item.name] = 1
    relations = tuple(
        (before.name, item.name, after.name)
        for before, item, after in zip(items, items[1:], items[2:], strict=False)
        if item.kind == "R" and before.kind in "TtD" and after.kind in "TtD"
    )
    scenes = [item.name for item in items if item.kind == "S"]
    sizes = tuple((item.name, item.size) for item in items if item.size)
    valid = _VALID.fullmatch("".join(item.kind for item in items)) is not None
    return ParsedCaption(things, relations, scenes[0] if scenes else None, sizes, valid)


def _items(words: list[str]) -> list[_Item]:
    items, at = [], 0
    while at < len(words):
        found = _phrase_at(words, at) or _thing_at(words, at)
        if found is None:
            kind = {",": ",", "and": "&", "with": "W"}.get(words[at], "?")
            found = _Item(kind), 1
        items.append(found[0])
        at += found[1]
    return items


def _phrase_at(words: list[str], at: int) -> tuple[_Item, int] | None:
    """The relation or scene phrase that begins at a word, and its length."""
    for kind, phrases in (("R", RELATION_PHRASES), ("S", SCENE_PHRASES)):
        for name, phrase in phrases.items():
            parts = phrase.split()
            if words[at : at + len(parts)] == parts:
                return _Item(kind, name), len(parts)
    return None


def _thing_at(words: list[str], at: int) -> tuple[_Item, int] | None:
    """The thing that begins at a word, with its article or number and size, and how many words that is."""
    start, first = at, words[at]
    definite = first == "the"
    indefinite = first in ("a", "an")
    count = NUMBERS.index(first) + 1 if first in NUMBERS else 1
    if definite or indefinite or first in NUMBERS:
        at += 1
    noun, size = _noun_at(words, at), ""  # a name first: "small airplane" is one
    if noun is None and words[at : at + 1] in ([SIZES[0]], [SIZES[1]]):
        size = words[at]
        at += 1
        noun = _noun_at(words, at)
    if noun is None:
        return None
    (name, is_singular, is_plural), length = noun
    agrees = (indefinite and is_singular) or (count > 1 and is_plural and not size)
    kind = "D" if definite else "T" if agrees else "t"
    return _Item(kind, name, count, size), at + length - start


@functools.cache
def _nouns() -> tuple[dict[tuple[str, ...], tuple[str, bool, bool]], int]:
    """Every surface of a name as words: (name, is a singular, is a plural); and the longest one's number of words."""
    surfaces: dict[tuple[str, ...], tuple[str, bool, bool]] = {}
    for name in demo.scene_names():
        one, many = tuple(singular(name).split()), tuple(plural(name).split())
        for words in {tuple(name.split()), one, many}:
            known = surfaces.get(words)
            assert known is None or known[0] == name, f"{words} could be {name} or {known}"
            surfaces[words] = (name, words == one, words == many)
    return surfaces, max(map(len, surfaces))


def _noun_at(words: list[str], at: int) -> tuple[tuple[str, bool, bool], int] | None:
    """The longest name that begins at a word, and its number of words."""
    surfaces, longest = _nouns()
    for length in range(min(longest, len(words) - at), 0, -1):
        if found := surfaces.get(tuple(words[at : at + length])):
            return found, length
    return None


def vocabulary() -> set[str]:
    """Every word that captions and zero-shot prompts can hold, without plural endings `s` and `es` where regular."""
    bases = {word for name in demo.scene_names() for word in singular(name).split()}
    plurals = {word for name in demo.scene_names() for word in plural(name).split()}
    regular = {base + ending for base in bases for ending in ("s", "es")}
    phrases = [*RELATION_PHRASES.values(), *SCENE_PHRASES.values(), "a an the and with", *NUMBERS, *SIZES]
    return bases | (plurals - regular) | {word for phrase in phrases for word in phrase.split()}


def describe(scene: Scene, names: Sequence[str] | None = None) -> dict[str, Any]:
    """What is known of a scene, as JSON holds it: caption, things, scene word, questions."""
    fields = ("name", "x", "y", "size", "angle", "flip")
    return {
        "key": scene.key,
        "caption": captions(scene).caption,
        "things": [{name: getattr(thing, name) for name in fields} for thing in scene.things],
        "background": scene.background,
        "scene": scene_word(scene),
        "questions": questions(scene, names),
    }
