"""Ranks, ties, ceilings and chance of retrieval and zero-shot classification."""

import pytest
import torch
import torch.nn.functional as F
from evaluation_models import Oracle, random_model

from openvision3.config import OpenVisionError
from openvision3.data import demo, grammar
from openvision3.evaluation.retrieval import any_hit_probability, hit_probability, recalls, retrieval
from openvision3.evaluation.samples import scene_samples
from openvision3.evaluation.zeroshot import demo_prompts, imagenet_prompts, label_embeddings, zeroshot


def test_hits_with_ties_are_expectations() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.5], [0.9, 0.1, 0.5, 0.5], [0.2, 0.2, 0.2, 0.2]])
    target = torch.tensor([0, 2, 1])
    assert hit_probability(scores, target, 1).tolist() == [1.0, 0.0, 0.25]
    assert hit_probability(scores, target, 2).tolist() == [1.0, 0.5, 0.5]
    assert hit_probability(scores, target, 3).tolist() == [1.0, 1.0, 0.75]
    assert hit_probability(scores, target, 9).tolist() == [1.0, 1.0, 1.0]


def test_any_of_several_targets_is_enough() -> None:
    scores = torch.tensor([[0.9, 0.5, 0.5, 0.5, 0.1], [0.3, 0.3, 0.3, 0.3, 0.3]])
    own = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)
    assert any_hit_probability(scores, own, 1).tolist() == [0.0, 2 / 5]
    assert any_hit_probability(scores, own, 2).tolist() == [2 / 3, 1 - 3 / 10]  # of ten pairs three have neither
    assert any_hit_probability(scores, own, 4).tolist() == [1.0, 1.0]
    single = torch.nn.functional.one_hot(torch.tensor([2, 1]), 5).bool()
    for k in (1, 2, 3, 9):
        expected = hit_probability(scores, torch.tensor([2, 1]), k)
        assert any_hit_probability(scores, single, k).tolist() == pytest.approx(expected.tolist())


def test_pictures_with_several_captions() -> None:
    """Picture 0 has texts at 10 and 80 degrees, picture 1 (90 degrees) one at 85: the one at 80 finds the wrong one."""
    figures = recalls(directions(0, 90), directions(10, 80, 85), torch.arange(3), torch.tensor([0, 0, 1]))
    assert (figures["image_to_text_r1"], figures["text_to_image_r1"]) == (1.0, pytest.approx(2 / 3))
    assert (figures["ceiling_r1"], figures["chance_r1"]) == (1.0, 0.5)


def directions(*degrees: float) -> torch.Tensor:
    angles = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_recalls_both_ways() -> None:
    # each picture's own text is its nearest; text 2 (60 degrees) is nearer to picture 1 (37) than to its own (90)
    figures = recalls(directions(0, 37, 90), directions(0, 50, 60), torch.arange(3))
    assert (figures["image_to_text_r1"], figures["text_to_image_r1"]) == (1.0, pytest.approx(2 / 3))
    figures = recalls(directions(0, 50, 60), directions(0, 37, 90), torch.arange(3))
    assert (figures["image_to_text_r1"], figures["text_to_image_r1"]) == (pytest.approx(2 / 3), 1.0)
    assert figures["image_to_text_r5"] == figures["text_to_image_r10"] == 1.0
    assert (figures["ceiling_r1"], figures["chance_r1"], figures["chance_r5"]) == (1.0, pytest.approx(1 / 3), 1.0)


def test_duplicate_captions_set_the_ceiling_and_a_perfect_model_reaches_it() -> None:
    texts = torch.eye(3)
    rows = torch.tensor([0, 1, 1, 1, 2, 2])
    figures = recalls(texts[rows], texts, rows)
    expected = (1 + 3 * (1 / 3) + 2 * (1 / 2)) / 6
    for name in ("ceiling", "image_to_text", "text_to_image"):
        assert figures[f"{name}_r1"] == pytest.approx(expected), name
        assert figures[f"{name}_r5"] == 1.0


def test_a_model_that_scores_everything_alike_gets_chance() -> None:
    figures = recalls(torch.ones(8, 2), torch.ones(8, 2), torch.arange(8))
    for k in (1, 5):
        assert figures[f"image_to_text_r{k}"] == figures[f"text_to_image_r{k}"] == figures[f"chance_r{k}"] == k / 8


def test_many_queries_are_scored_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    images, texts = F.normalize(torch.randn(10, 3), dim=1), F.normalize(torch.randn(10, 3), dim=1)
    whole = recalls(images, texts, torch.arange(10))
    monkeypatch.setattr("openvision3.evaluation.retrieval._CHUNK", 3)
    assert recalls(images, texts, torch.arange(10)) == whole


def test_oracle_reaches_the_ceiling_on_scenes() -> None:
    samples = scene_samples(40, 32)
    figures = retrieval(Oracle(samples), samples, batch_size=16)
    assert figures["image_to_text_r1"] == pytest.approx(figures["ceiling_r1"])
    assert figures["text_to_image_r1"] == pytest.approx(figures["ceiling_r1"])
    assert figures["n"] == 40


def test_broken_weights_are_no_result() -> None:
    model = random_model()
    assert model.text_encoder is not None
    with torch.no_grad():
        next(model.text_encoder.parameters()).fill_(float("nan"))
    with pytest.raises(OpenVisionError, match="not finite"):
        retrieval(model, scene_samples(4, 32))


def test_missing_text_encoder_and_missing_captions() -> None:
    from openvision3.evaluation.samples import landscape_samples

    with pytest.raises(OpenVisionError, match="no text encoder.*attach_text --init MODEL"):
        retrieval(random_model(text_encoder=None), scene_samples(2, 32))
    with pytest.raises(OpenVisionError, match="needs captions"):
        retrieval(random_model(), landscape_samples(32, 3))
    with pytest.raises(OpenVisionError, match="needs labels"):
        zeroshot(random_model(), landscape_samples(32, 3))


def test_prompts_are_captions_of_the_grammar() -> None:
    for name in ("scissors", "panda", demo.scene_names()[-1]):
        prompts = demo_prompts(name)
        assert len(prompts) == len(set(prompts)) > 5
        for prompt in prompts:
            parsed = grammar.parse(prompt)
            assert parsed.valid and dict(parsed.things) == {name: 1}, prompt
    assert imagenet_prompts("tench")[:2] == ["a photo of a tench.", "a bad photo of a tench."]
    assert len(imagenet_prompts("tench")) == 81


def test_label_embeddings_are_means_of_normalised_prompts() -> None:
    model = random_model()
    prompts = [demo_prompts("scissors"), demo_prompts("panda")]
    with torch.no_grad():
        bare, averaged = label_embeddings(model, prompts)
        by_hand = torch.stack([F.normalize(model.embed_text(texts).mean(0), dim=0) for texts in prompts])
        assert torch.allclose(bare[1], model.embed_text(["a panda"])[0], atol=1e-6)
    assert torch.allclose(averaged, by_hand, atol=1e-6)


def test_zero_shot_takes_pictures_of_one_thing_and_counts_right() -> None:
    samples = scene_samples(30, 32)
    single = [sample for sample in samples if sample.label >= 0]
    assert 0 < len(single) < 30
    assert all(samples.labels[sample.label] == sample.scene.things[0].name for sample in single if sample.scene)
    oracle = Oracle(samples)
    captions = {samples.labels[sample.label]: sample.caption for sample in single}
    spare = next(sample.caption for sample in samples if sample.label < 0)
    # each label's prompt is the caption of one picture with it; labels without a picture get another picture's
    prompts = [[captions.get(name, spare)] for name in samples.labels]
    figures = zeroshot(oracle, samples, batch_size=7, prompts=prompts)
    right = sum(sample.caption == captions[samples.labels[sample.label]] for sample in single)
    assert figures["n"] == len(single) and figures["labels"] == 494
    assert figures["bare_top1"] == pytest.approx(right / len(single), abs=0.02)
    wrong = zeroshot(oracle, samples, batch_size=7, prompts=prompts[1:] + prompts[:1])
    assert wrong["bare_top1"] < 0.2


def test_random_model_is_near_chance() -> None:
    samples = scene_samples(60, 32)
    figures = zeroshot(random_model(), samples)
    assert figures["chance_top1"] == 1 / 494
    assert figures["templates_top1"] < 0.2 and figures["bare_top5"] < 0.4
