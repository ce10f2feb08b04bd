"""Captions against the truth of the picture: things, counts, relations, scene; and CIDEr-D against the reference."""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from openvision3.config import OpenVisionError
from openvision3.data import grammar
from openvision3.data.demo import Scene
from openvision3.evaluation.samples import EncodedBatch, SampleSet, encode_batches, evaluating, mean

KINDS = ("one", "different", "repeated")
CIDER_SIGMA = 6.0
PROTOCOL = (
    "{decoding}; captions are parsed by the scene grammar and compared with what the picture shows; set: the things "
    "named are exactly those in it; exact: their counts too; one: pictures of one thing, different: of several "
    "different things, repeated: with one thing twice or more, two: of two different things; two_relation: a relation "
    "is stated and right, of those of two that allow one; relation and scene: right among the captions that state "
    "one (relation_chance: a direction drawn at random; scene_commonest: always the commonest scene); CIDEr-D: all "
    "references of a picture, words in lower case without punctuation, document frequencies of the references, times 10"
)


def words(text: str) -> list[str]:
    """Lower-cased words, without punctuation."""
    return re.findall(r"\w+(?:[-']\w+)*", text.lower())


def _ngrams(text: str) -> Counter[tuple[str, ...]]:
    tokens = words(text)
    return Counter(tuple(tokens[i : i + n]) for n in range(1, 5) for i in range(len(tokens) - n + 1))


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each candidate against its references, in [0, 10]; document frequencies from the references.

    Equal to pycocoevalcap's `Cider` on the same words (whose length is counted in bigrams); without its Java tokenizer.
    Raises `ValueError` where the lengths differ. Source: Vedantam et al., 2015, section 5.
    """
    if len(candidates) != len(references):
        raise ValueError(f"{len(candidates)} candidates, but {len(references)} lists of references")
    cooked = [[_ngrams(text) for text in texts] for texts in references]
    frequency = Counter(gram for texts in cooked for gram in set().union(*texts))
    documents = math.log(len(references)) if references else 0.0

    def vector(grams: Counter[tuple[str, ...]]) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        weights: list[dict[tuple[str, ...], float]] = [{}, {}, {}, {}]
        for gram, count in grams.items():
            weights[len(gram) - 1][gram] = count * (documents - math.log(max(1, frequency[gram])))
        norms = [math.sqrt(sum(w * w for w in level.values())) for level in weights]
        return weights, norms, sum(count for gram, count in grams.items() if len(gram) == 2)

    scores = []
    for candidate, texts in zip(candidates, cooked, strict=True):
        ours, our_norms, our_length = vector(_ngrams(candidate))
        total = 0.0
        for reference in texts:
            theirs, their_norms, their_length = vector(reference)
            penalty = math.exp(-((our_length - their_length) ** 2) / (2 * CIDER_SIGMA**2))
            for level in range(4):
                reference_weights = theirs[level]
                shared = ((w, reference_weights[gram]) for gram, w in ours[level].items() if gram in reference_weights)
                dot = sum(min(w, other) * other for w, other in shared)
                norm = our_norms[level] * their_norms[level]
                total += penalty * (dot / norm if norm else dot)
        scores.append(10 * total / 4 / max(1, len(texts)))
    return scores


def kind_of(scene: Scene) -> str:
    """Which of `KINDS` a scene is."""
    counts = Counter(thing.name for thing in scene.things)
    if sum(counts.values()) == 1:
        return "one"
    return "repeated" if max(counts.values()) > 1 else "different"


def judge(scene: Scene, word: str | None, caption: str) -> dict[str, float]:
    """What a caption gets right about a scene, as 0 or 1 (`relation_chance` in between); `word` says where it is.

    Keys: valid, set, exact, states_relation, states_scene; relation, relation_chance and scene only where one is
    stated; `can_relate` where the picture has a relation to state.
    """
    parsed = grammar.parse(caption)
    truth = Counter(thing.name for thing in scene.things)
    verdict: dict[str, float] = {
        "valid": parsed.valid,
        "set": set(parsed.things) == set(truth),
        "exact": parsed.things == truth,
        "can_relate": can_relate(scene),
        "states_relation": bool(parsed.relations),
        "states_scene": parsed.scene is not None,
    }
    if parsed.relations:
        holds = [_holds(scene, a, relation, b) for a, relation, b in parsed.relations]
        verdict["relation"] = all(holds)
        chances = [mean([_holds(scene, a, r, b) for r in grammar.RELATIONS]) for a, _, b in parsed.relations]
        verdict["relation_chance"] = math.prod(chances)
    if parsed.scene is not None:
        verdict["scene"] = parsed.scene == word
    return {name: float(value) for name, value in verdict.items()}


def can_relate(scene: Scene) -> bool:
    """Whether some relation between two different things holds."""
    present = sorted({thing.name for thing in scene.things})
    return any(_holds(scene, a, r, b) for a in present for b in present if a != b for r in grammar.RELATIONS)


def _holds(scene: Scene, a: str, relation: str, b: str) -> bool:
    """A relation between things that the picture does not show is wrong, not an error."""
    present = {thing.name for thing in scene.things}
    return a in present and b in present and grammar.relation_holds(scene, a, relation, b)


class CaptionMeter:
    """Gathers captions batch by batch. Samples with neither a scene nor a reference caption are left out."""

    def __init__(self, model: Any, num_beams: int = 1) -> None:
        if model.config.text_decoder is None:
            raise OpenVisionError(
                f"{model.config.name} has no caption decoder (part 'text_decoder'), which captioning needs; "
                "`ov3 train attach_text --init MODEL` gives it one"
            )
        self.model = model
        self.num_beams = num_beams
        self.captions: list[str] = []
        self.references: list[tuple[str, ...]] = []
        self.scenes: list[tuple[Scene | None, str | None]] = []

    def update(self, batch: EncodedBatch) -> None:
        captions = self.model.caption(tokens=batch.tokens, num_beams=self.num_beams)
        for sample, caption in zip(batch.samples, captions, strict=True):
            if sample.references or sample.scene:
                self.captions.append(caption)
                self.references.append(sample.references)
                self.scenes.append((sample.scene, sample.scene_word))

    def result(self) -> dict[str, Any]:
        """Shares of right captions by kind of picture, and CIDEr-D; raises where there is nothing to compare with."""
        if not self.captions:
            raise OpenVisionError("captioning needs captions to compare with, and no picture of this data has one")
        scored = [(c, r) for c, r in zip(self.captions, self.references, strict=True) if r]
        figures: dict[str, Any] = {"cider_d": mean(cider_d([c for c, _ in scored], [r for _, r in scored]))}
        judged = [
            (scene, word, judge(scene, word, caption))
            for (scene, word), caption in zip(self.scenes, self.captions, strict=True)
            if scene is not None
        ]
        if judged:
            figures |= summary(judged)
        decoding = "greedy decoding" if self.num_beams == 1 else f"beam search, {self.num_beams} beams"
        figures |= {"n": len(self.captions), "distinct_captions": len(set(self.captions))}
        return figures | {"protocol": PROTOCOL.format(decoding=decoding)}


def summary(judged: Sequence[tuple[Scene, str | None, dict[str, float]]]) -> dict[str, float]:
    """Means over judged captions (scene, scene word, verdict).

    Of all pictures and of each kind, and of relations and scenes where one is stated.
    """

    def share(name: str, verdicts: list[dict[str, float]]) -> float:
        return mean([verdict[name] for verdict in verdicts if name in verdict])

    every = [verdict for _, _, verdict in judged]
    figures = {name: share(name, every) for name in ("set", "exact", "valid")}
    for kind in KINDS:
        verdicts = [verdict for scene, _, verdict in judged if kind_of(scene) == kind]
        figures |= {f"{kind}_set": share("set", verdicts), f"{kind}_exact": share("exact", verdicts)}
        figures[f"{kind}_n"] = len(verdicts)
    few = [verdict for scene, _, verdict in judged if len(scene.things) <= 3]
    two = [verdict for scene, _, verdict in judged if len(scene.things) == 2 and kind_of(scene) == "different"]
    figures |= {"one_to_three_set": share("set", few), "one_to_three_n": len(few)}
    figures |= {"two_set": share("set", two), "two_n": len(two)}
    related = [verdict.get("relation", 0.0) for verdict in two if verdict["can_relate"]]
    figures |= {"two_relation": mean(related), "two_relation_n": len(related)}
    relatable = [verdict for verdict in every if verdict["can_relate"]]
    figures["relation_stated"] = share("states_relation", relatable)
    figures["relation_statable_n"] = len(relatable)
    figures |= {"relation_right": share("relation", every), "relation_chance": share("relation_chance", every)}
    figures["relation_n"] = sum("relation" in verdict for verdict in every)
    figures |= {"scene_stated": share("states_scene", every), "scene_right": share("scene", every)}
    figures["scene_n"] = sum("scene" in verdict for verdict in every)
    stated = Counter(word for _, word, verdict in judged if "scene" in verdict and word)
    commonest = max(stated.values(), default=0)
    figures["scene_commonest"] = commonest / figures["scene_n"] if figures["scene_n"] else math.nan
    return figures


def captioning(
    model: Any,
    samples: SampleSet,
    batch_size: int = 32,
    num_beams: int = 1,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Exactness of captions on demo scenes, and CIDEr-D wherever there are reference captions.

    Raises `OpenVisionError` for a model without a caption decoder, or data with nothing to compare with.
    """
    with evaluating(model):
        meter = CaptionMeter(model, num_beams)
        for batch in encode_batches(model, samples, batch_size, progress):
            meter.update(batch)
        return meter.result()
