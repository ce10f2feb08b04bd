"""`scenes-vqa`: what a vision-language model answers about scenes, read, judged and summed up; offline."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from PIL import Image

from openvision3.config import OpenVisionError, SceneConfig
from openvision3.data import demo, grammar
from openvision3.data.demo import Scene
from openvision3.evaluation.captioning import judge
from openvision3.vlm.answering import answer, grey_picture, picture_side
from openvision3.vlm.folder import VLM
from openvision3.vlm.scenes_questions import NEGATIVES, SCENES, SEED, SPLIT, SUITE, Kind, Question, ask_all

KINDS: tuple[Kind, ...] = ("presence", "count", "relation", "scene", "caption")
EXAMPLES = 5  # of unreadable answers that are shown, all different
SHORT, CAPTION = 16, 64  # tokens of an answer, at most
PROTOCOL = (
    "greedy answers; yes and no are read from the answer's first word (POPE itself takes all that is not no for yes), "
    "a count from its first number, a scene from the one scene word in it, a caption's things by the scene grammar; "
    "what can't be read so, or is empty, is an error, and wrong; positive is yes; a caption is right where it names "
    "the things with their counts; intervals are Wilson's, 95 %; chance of a count: 25 %, of a relation: 50 %, of a "
    "scene: the commonest's share"
)
_ANSWERS = {"yes": "yes", "no": "no"}
_NUMBERS = ("zero", *grammar.NUMBERS, "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True)
class Judged:
    """A question with the answer that it got; `read` is what was made of it, empty for an error."""

    question: Question
    answer: str
    read: str
    right: bool


def read_yes_no(text: str) -> str:
    """ "yes" or "no" by the first word, whatever its case and punctuation; empty for all else."""
    return _ANSWERS.get(next(iter(_words(text)), ""), "")


def read_count(text: str) -> str:
    """The first number, as a word up to ten; empty where there is none."""
    for word in _words(text):
        if word in _NUMBERS:
            return word
        if word.isascii() and word.isdecimal():
            return _NUMBERS[int(word)] if len(word) < 3 and int(word) < len(_NUMBERS) else word
    return ""


def read_scene(text: str) -> str:
    """The phrase of the one scene word that the answer holds; empty for none or several."""
    words = set(_words(text))
    found = [phrase for word, phrase in grammar.SCENE_PHRASES.items() if word in words]
    return found[0] if len(found) == 1 else ""


def read_caption(text: str) -> str:
    """The caption itself where it names a thing that the demo has; else empty."""
    return text if grammar.parse(text).things else ""


def _words(text: str) -> list[str]:
    spaced = "".join(letter if letter.isalnum() else " " for letter in text.lower())
    return spaced.split()


_READERS: dict[Kind, Callable[[str], str]] = {
    "presence": read_yes_no,
    "count": read_count,
    "relation": read_yes_no,
    "scene": read_scene,
    "caption": read_caption,
}


def judged(question: Question, text: str) -> Judged:
    """The verdict on an answer. A caption is right where it names the things with their counts."""
    read = _READERS[question.kind](text)
    right = bool(read) and read == question.truth
    if question.kind == "caption" and read:
        right = grammar.parse(read).things == Counter(thing.name for thing in question.scene.things)
    return Judged(question, text, read, right)


def scenes_vqa(
    vlm: VLM,
    num: int = 300,
    blind: bool = False,
    batch_size: int = 8,
    config: SceneConfig = SCENES,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Asks a model the suite's questions; `blind` shows it grey in every picture's place.

    Returns the figures by kind, what was asked beside them, and under "questions" each one with its answer and verdict.
    The same call gives the same figures. `progress` is called with the number of questions done, of
    `PER_SCENE` times `num`. Raises as `ask_all` does.
    """
    if batch_size < 1:
        raise OpenVisionError(f"batch size is {batch_size}, but must be at least 1")
    side, asked = picture_side(vlm), ask_all(num, config)
    rows = [(None if blind else question.scene, question.text, question.kind == "caption") for question in asked]
    times = Counter(rows)  # a blind model is asked the same again and again: once will do
    given: dict[tuple[Scene | None, str, bool], str] = {}
    for longest, captions in ((SHORT, False), (CAPTION, True)):
        part = [row for row in times if row[2] is captions]
        for start in range(0, len(part), batch_size):
            chunk = part[start : start + batch_size]
            pictures = [_picture(scene, side) for scene, _, _ in chunk]
            answers = answer(vlm, pictures, [text for _, text, _ in chunk], longest, batch_size)
            given.update(zip(chunk, answers, strict=True))
            if progress:
                progress(sum(times[row] for row in given))
    results = [judged(question, given[row]) for question, row in zip(asked, rows, strict=True)]
    about = {
        "suite": SUITE,
        "model": vlm.name,
        "blind": blind,
        "num": num,
        "split": SPLIT,
        "seed": SEED,
        "num_names": config.num_names,
        "size": side,
        "batch_size": batch_size,
        "dtype": str(vlm.model.dtype)[6:],
        "protocol": PROTOCOL,
    }
    return about | summary(results) | {"questions": [_record(result) for result in results]}


@lru_cache(maxsize=64)
def _picture(scene: Scene | None, side: int) -> Image.Image:
    """The scene's picture; grey for None."""
    return grey_picture(side) if scene is None else Image.fromarray(demo.render(scene, side))


def _record(result: Judged) -> dict[str, Any]:
    asked = {name: value for name, value in asdict(result.question).items() if name != "scene"}
    verdict = {"answer": result.answer, "read": result.read, "error": not result.read, "right": result.right}
    return {"key": result.question.scene.key, **asked, **verdict}


def summary(results: Sequence[Judged]) -> dict[str, Any]:
    """Figures by kind: "presence" by kind of negative, then "count", "relation", "scene", "caption"; and "errors"."""
    of = {kind: [result for result in results if result.question.kind == kind] for kind in KINDS}
    positive = [result for result in of["presence"] if result.question.group == "positive"]
    figures: dict[str, Any] = {
        "presence": {
            kind: binary(positive + [result for result in of["presence"] if result.question.group == kind])
            for kind in NEGATIVES
        },
        "count": accuracy(of["count"]),
        "relation": binary(of["relation"]),
        "scene": accuracy(of["scene"]),
        "caption": _captions(of["caption"]),
    }
    for count in grammar.NUMBERS:
        figures["count"][count] = _share([r.right for r in of["count"] if r.question.truth == count])
    commonest = Counter(result.question.truth for result in of["scene"]).most_common(1)
    figures["scene"]["commonest"] = commonest[0][1] / len(of["scene"]) if commonest else None
    wrong = [result for result in results if not result.read]
    different = {result.answer: result.question.text for result in reversed(wrong)}  # the first question of each
    examples = [{"question": question, "answer": text} for text, question in reversed(different.items())]
    figures["errors"] = {"number": len(wrong), "of": len(results), "examples": examples[:EXAMPLES]}
    return figures


def accuracy(results: Sequence[Judged]) -> dict[str, Any]:
    """The share that is right with its interval, how many there are, and how many answers could not be read."""
    right, n = sum(result.right for result in results), len(results)
    errors = sum(not result.read for result in results)
    return {"accuracy": right / n if n else None, "interval": wilson(right, n), "n": n, "errors": errors}


def binary(results: Sequence[Judged]) -> dict[str, Any]:
    """POPE's figures; positive is "yes". None where one divides by nothing. An unreadable answer says neither."""
    said_yes = [result for result in results if result.read == "yes"]
    positive = [result for result in results if result.question.truth == "yes"]
    hits = sum(result.right for result in said_yes)
    precision = hits / len(said_yes) if said_yes else None
    recall = hits / len(positive) if positive else None
    return {
        **accuracy(results),
        "precision": precision,
        "recall": recall,
        "f1": 2 * hits / (len(said_yes) + len(positive)) if said_yes or positive else None,
        "yes_rate": len(said_yes) / len(results) if results else None,
    }


def _captions(results: Sequence[Judged]) -> dict[str, Any]:
    """Exactness as accuracy; recall and precision of all things, repeated ones each; relations and scenes if stated."""
    named = there = both = 0
    verdicts = []
    for result in results:
        said, truth = grammar.parse(result.read).things, Counter(thing.name for thing in result.question.scene.things)
        named, there, both = named + said.total(), there + truth.total(), both + (said & truth).total()
        verdicts.append(judge(result.question.scene, grammar.scene_word(result.question.scene), result.read))
    relations = [verdict["relation"] for verdict in verdicts if "relation" in verdict]
    scenes = [verdict["scene"] for verdict in verdicts if "scene" in verdict]
    return {
        **accuracy(results),
        "precision": both / named if named else None,
        "recall": both / there if there else None,
        "set": _share([verdict["set"] for verdict in verdicts]),
        "valid": _share([verdict["valid"] for verdict in verdicts]),
        "relation": _share(relations),
        "relation_n": len(relations),
        "relation_chance": _share([verdict["relation_chance"] for verdict in verdicts if "relation" in verdict]),
        "scene": _share(scenes),
        "scene_n": len(scenes),
    }


def _share(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def wilson(right: int, n: int) -> tuple[float, float] | None:
    """Wilson's 95 % interval of a share; None for a share of nothing."""
    if not n:
        return None
    z, share = 1.959964, right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)
