"""Answers of a vision-language model: batches, streams, `ov3 vlm chat`; and `scenes-vqa`, judged by hand."""

import io
import json
import sys
import types
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vlm_models
from PIL import Image
from transformers import LlamaForCausalLM

from openvision3 import cli
from openvision3.commands import vlm_chat
from openvision3.config import OpenVisionError, SceneConfig
from openvision3.data import demo, grammar
from openvision3.vlm import scenes_questions, scenes_vqa
from openvision3.vlm.answering import answer, grey_picture, picture_side, question, stream
from openvision3.vlm.assemble import assemble, open_tower
from openvision3.vlm.folder import VLM

QUESTIONS = ["Is there a panda in the picture?", "a lion", "How many apples are there?", "Where is this?", "the panda"]


def build(folder: Path, kind: str = "llava") -> VLM:
    """A tiny LLaVA whose answers depend on the picture: its language model's weights are large."""
    tower, language_model = vlm_models.save_tower(folder / "tower"), vlm_models.save_language_model(folder / "lm")
    model = LlamaForCausalLM.from_pretrained(language_model)
    found = assemble(open_tower(str(tower)), model, vlm_models.tokenizer(), kind, ((1, 2), (2, 1)))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in found.model.model.language_model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    found.model.eval()
    return found


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    return build(tmp_path_factory.mktemp("answers"))


@pytest.fixture(scope="module")
def saved(vlm: VLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    vlm.model.save_pretrained(folder)
    vlm.processor.save_pretrained(folder)
    return folder


def pictures(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)) for _ in range(count)]


def alone(vlm: VLM, picture: Image.Image | None, text: str, new_tokens: int) -> str:
    """The greedy answer by whole forward passes of one row without padding, token by token."""
    content = ("<image>\n" if picture else "") + text
    prompt = f"[BOS]user : {content}[EOS][BOS]assistant : "
    inputs = dict(vlm.processor(images=picture, text=prompt, add_special_tokens=False, return_tensors="pt"))
    ids, new = inputs.pop("input_ids"), []
    inputs.pop("attention_mask")
    for _ in range(new_tokens):
        with torch.no_grad():
            new.append(int(vlm.model(input_ids=ids, **inputs, use_cache=False).logits[0, -1].argmax()))
        if new[-1] == vlm.tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, torch.tensor([new[-1:]])], dim=1)
    return vlm.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_answers_are_those_of_each_row_alone(vlm: VLM) -> None:
    shown: list = pictures(5)
    shown[2] = None
    expected = [alone(vlm, picture, text, 6) for picture, text in zip(shown, QUESTIONS, strict=True)]
    assert len(set(expected)) == 5 and alone(vlm, grey_picture(40), QUESTIONS[0], 6) != expected[0]
    done: list[int] = []
    for batch_size in (1, 2, 5):
        assert answer(vlm, shown, QUESTIONS, 6, batch_size, done.append) == expected
    assert done == [1, 2, 3, 4, 5, 2, 4, 5, 5]
    assert "".join(stream(vlm, [question(QUESTIONS[0])], shown[:1], 6)).strip() == expected[0]


def test_tiles_and_several_pictures_of_a_question(tmp_path: Path) -> None:
    vlm = build(tmp_path, "llava_next")
    shown = pictures(3)
    rows = [shown[0].resize((30, 80)), shown[1:], None]
    whole = answer(vlm, rows, QUESTIONS[:3], 6, 3)
    assert whole == answer(vlm, rows, QUESTIONS[:3], 6, 1) and len(set(whole)) == 3
    assert picture_side(vlm) == vlm_models.SIDE


def test_a_folder_that_samples_is_asked_greedily(vlm: VLM) -> None:
    expected = answer(vlm, [None], QUESTIONS[:1], 12)
    before = vlm.model.generation_config
    try:
        vlm.model.generation_config = type(before)(do_sample=True, temperature=9.0, repetition_penalty=3.0, num_beams=2)
        assert answer(vlm, [None], QUESTIONS[:1], 12) == expected
    finally:
        vlm.model.generation_config = before


def test_what_cannot_be_asked(vlm: VLM) -> None:
    with pytest.raises(OpenVisionError, match="<image>, which stands for a picture"):
        answer(vlm, pictures(1), ["what <image>"])
    with pytest.raises(OpenVisionError, match="the language model reads 2048"):
        answer(vlm, [None], ["panda " * 2040])
    with pytest.raises(OpenVisionError, match="batch size is 0"):
        answer(vlm, [None], ["a"], batch_size=0)
    with pytest.raises(ValueError, match="2 pictures, but 1 questions"):
        answer(vlm, [None, None], ["a"])


def test_a_stream_ends_when_its_model_fails_or_its_reader_leaves(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: Any = stream(vlm, [question("a panda", 0)], [], 2000)
    assert isinstance(next(pieces), str)
    pieces.close()  # returns only once the model has stopped

    def broken(**_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(vlm.model, "generate", broken)
    with pytest.raises(RuntimeError, match="no memory"):
        list(stream(vlm, [question("a panda", 0)], []))


NUM = 8


@pytest.fixture(scope="module")
def asked() -> list[scenes_questions.Question]:
    return scenes_questions.ask_all(NUM)


def test_questions_are_true_balanced_and_of_unseen_landscapes(asked: list[scenes_questions.Question]) -> None:
    of = {kind: [q for q in asked if q.kind == kind] for kind in scenes_vqa.KINDS}
    assert len(asked) == scenes_questions.PER_SCENE * NUM
    assert Counter(q.group for q in of["presence"]) == dict.fromkeys(["positive", *scenes_questions.NEGATIVES], NUM)
    assert Counter(q.truth for q in of["count"]) == dict.fromkeys(grammar.NUMBERS, NUM // 4)
    assert Counter(q.truth for q in of["relation"]) == {"yes": NUM // 2, "no": NUM // 2}
    assert len(of["scene"]) == len(of["caption"]) == NUM
    groups = {item["name"]: item["group"] for item in demo.manifest()["sprites"]}
    popular = scenes_questions.popular_names()
    assert len(set(popular)) == scenes_questions.POPULAR
    unseen = {"", *demo.landscapes(held_out=True)}
    for q in asked:
        names = Counter(thing.name for thing in q.scene.things)
        assert q.scene.background in unseen and "train" not in q.scene.key
        if q.kind == "presence":
            (name,) = [name for name in groups if grammar.presence_question(name) == q.text]
            assert (name in names) == (q.truth == "yes") == (q.group == "positive")
            assert q.group != "popular" or name in popular
            assert q.group != "adversarial" or groups[name] in {groups[other] for other in names}
        if q.kind == "count":
            (name,) = [name for name in names if grammar.count_question(name) == q.text]
            assert grammar.NUMBERS[names[name] - 1] == q.truth
        if q.kind == "relation":
            stated = [
                (a, r, b) for a in names for b in names for r in grammar.RELATIONS
                if a != b and grammar.relation_question(a, r, b) == q.text
            ]  # fmt: skip
            assert [grammar.relation_holds(q.scene, *s) for s in stated] == [q.truth == "yes"]
        if q.kind == "caption":
            assert grammar.parse(q.truth).things == names
    assert scenes_questions.ask_all(NUM) == asked


def test_what_questions_refuse() -> None:
    for num, names, split, expected in (
        (3, 494, "vqa-test", "num is 3"),
        (4, 0, "vqa-test", "num_names is 0"),
        (4, 494, "train", "split is 'train'"),
        (4, 1, "vqa-test", "0 of 4 questions"),
    ):
        with pytest.raises(OpenVisionError, match=expected):
            scenes_questions.ask_all(num, SceneConfig(num_names=names), split)


@pytest.mark.parametrize(
    ("read", "text", "expected"),
    [
        (scenes_vqa.read_yes_no, "Yes, there is.", "yes"),
        (scenes_vqa.read_yes_no, "no", "no"),
        (scenes_vqa.read_yes_no, "There is no panda.", ""),
        (scenes_vqa.read_yes_no, "nothing", ""),
        (scenes_vqa.read_yes_no, "", ""),
        (scenes_vqa.read_count, "There are 2 apples", "two"),
        (scenes_vqa.read_count, "Three.", "three"),
        (scenes_vqa.read_count, "12", "12"),
        (scenes_vqa.read_count, "some apples", ""),
        (scenes_vqa.read_scene, "In the City.", "in the city"),
        (scenes_vqa.read_scene, "in the city by the water", ""),
        (scenes_vqa.read_scene, "here", ""),
        (scenes_vqa.read_caption, "two lions", "two lions"),
        (scenes_vqa.read_caption, "something", ""),
    ],
)
def test_how_answers_are_read(read, text: str, expected: str) -> None:
    assert read(text) == expected


def test_figures_equal_a_count_by_hand(asked: list[scenes_questions.Question]) -> None:
    perfect = scenes_vqa.summary([scenes_vqa.judged(q, q.truth) for q in asked])
    for part in (*perfect["presence"].values(), *(perfect[kind] for kind in ("count", "relation", "scene", "caption"))):
        assert part["accuracy"] == 1 and part["errors"] == 0
    found = perfect["presence"]["random"]
    assert [found[name] for name in ("precision", "recall", "f1", "yes_rate", "n")] == [1, 1, 1, 0.5, 2 * NUM]
    assert perfect["caption"]["precision"] == perfect["caption"]["recall"] == perfect["caption"]["valid"] == 1

    # 8 positives: 6 yes, 1 no, 1 empty; of 8 random negatives: 2 yes, 5 no, 1 evades
    given = iter(["yes"] * 6 + ["no", ""])
    denied = iter(["Yes.", "yes"] + ["No"] * 5 + ["I can't see"])
    results = []
    for q in asked:
        text = next(given) if q.group == "positive" else next(denied) if q.group == "random" else "two lions and a"
        results.append(scenes_vqa.judged(q, text))
    figures = scenes_vqa.summary(results)
    found = figures["presence"]["random"]
    assert found["accuracy"] == 11 / 16 and found["errors"] == 2 and found["yes_rate"] == 8 / 16
    assert found["precision"] == 6 / 8 and found["recall"] == 6 / 8 and found["f1"] == 0.75
    assert found["interval"] == pytest.approx((0.4440, 0.8583), abs=1e-4)
    assert figures["presence"]["popular"]["errors"] == 1 + NUM and figures["relation"]["accuracy"] == 0
    assert figures["relation"]["precision"] is None
    assert figures["count"]["accuracy"] == 0.25 and figures["count"]["two"] == 1
    assert figures["scene"]["errors"] == NUM and figures["caption"]["errors"] == 0
    # errors: of presence 2 and all of two kinds of negatives; all relations; all scenes
    assert figures["errors"]["number"] == 2 + 4 * NUM
    assert {example["answer"] for example in figures["errors"]["examples"]} == {"", "I can't see", "two lions and a"}


def test_things_of_captions_are_counted_one_by_one(asked: list[scenes_questions.Question]) -> None:
    scene = demo.Scene(
        "by-hand",
        (demo.Thing("lion", 0.2, 0.5, 0.3, 0, False), demo.Thing("lion", 0.5, 0.5, 0.3, 0, False))
        + (demo.Thing("panda", 0.8, 0.5, 0.3, 0, False),),
        "",
        (0.0, 0.0, 1.0, False),
        ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0), 0.0),
    )
    caption = replace(asked[-1], scene=scene)
    texts = ["a lion to the left of a panda", "two lions and a panda on a plain background", "a mess"]
    figures = scenes_vqa.summary([scenes_vqa.judged(caption, text) for text in texts])["caption"]
    assert figures["accuracy"] == 1 / 3 and figures["errors"] == 1 and figures["set"] == 2 / 3
    assert figures["recall"] == 5 / 9 and figures["precision"] == 1
    assert figures["relation"] == 1 and figures["relation_n"] == 1 and figures["scene_n"] == 1


def test_eval_from_the_command_line(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["vlm", "eval", str(saved), "--num", "4", "--device", "cpu"]
    found = {}
    for name, options in {"a": ["--batch-size", "3"], "b": [], "blind": ["--blind"]}.items():
        assert cli.main([*common, *options, "--json", str(tmp_path / name)]) == 0
        out, err = capsys.readouterr()
        assert "presence, adversarial" in out and "answers could not be read, and count as wrong" in err
        found[name] = json.loads((tmp_path / name).read_text())
    assert found["a"] | {"batch_size": 8} == found["b"]
    assert len(found["b"]["questions"]) == 8 * 4 and found["b"]["errors"]["of"] == 8 * 4
    counted = sum(q["error"] for q in found["b"]["questions"])
    assert counted == found["b"]["errors"]["number"] > 0
    captions = {name: {q["answer"] for q in f["questions"] if q["kind"] == "caption"} for name, f in found.items()}
    assert len(captions["blind"]) == 1 < len(captions["b"])  # blind: the same picture, the same question

    for arguments, expected in (
        ([*common, "--json", str(tmp_path / "a")], "exists; pass --overwrite"),
        ([*common[:3], "--num", "2"], "num is 2"),
        (["vlm", "eval", str(tmp_path)], "holds no vision-language model"),
        ([*common, "--suite", "pope", "--blind"], "--blind is for scenes-vqa alone"),
        ([*common, "--data", "c"], "--data is for lmms-eval's suites"),
    ):
        assert cli.main(arguments) == 2
        err = capsys.readouterr().err
        assert expected in err and err.count("\n") == 1


def test_other_suites_go_to_lmms_eval(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called: list[tuple] = []
    lmms: Any = types.ModuleType("openvision3.vlm.lmms")
    lmms.run_lmms = lambda *given: called.append(given) or 1
    monkeypatch.setitem(sys.modules, lmms.__name__, lmms)
    assert cli.main(["vlm", "eval", "a", "--suite", "pope", "--num", "5", "--json", str(tmp_path / "b")]) == 1
    assert cli.main(["vlm", "eval", "--suite", "mme", "--data", "c", "--batch-size", "2", "--device", "cpu"]) == 1
    first = ("pope", "a", 5, tmp_path / "b", None, 8, "auto", "fp32")
    assert called == [first, ("mme", "demo", None, None, Path("c"), 2, "cpu", "fp32")]


def test_chat_answers_and_ends(
    vlm: VLM, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (picture,) = pictures(1)
    picture.save(tmp_path / "a.png")
    (expected,) = answer(vlm, [picture], QUESTIONS[:1], 8)
    common = ["vlm", "chat", "--image", str(tmp_path / "a.png"), "--model", str(saved), "--device", "cpu"]
    common += ["--max-new-tokens", "8"]
    assert cli.main([*common, "--question", QUESTIONS[0]]) == 0
    assert capsys.readouterr().out.strip() == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO(QUESTIONS[0] + "\n"))
    assert cli.main(common) == 0
    assert capsys.readouterr().out.strip() == expected
    for arguments, text, said in (
        (common, "", "there is no question"),
        ([*common, "--question", "<image> a"], "", "leave it out"),
        ([*common, "--max-new-tokens", "0"], "a", "--max-new-tokens 0"),
        (["vlm", "chat", "--image", str(tmp_path / "none.png")], "a", "none.png: no such file"),
    ):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        assert cli.main(arguments) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1 and "Traceback" not in err


def test_chat_in_a_terminal(
    vlm: VLM, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (first,), second, text = pictures(1), grey_picture(40), QUESTIONS[0]
    second.save(tmp_path / "b.png")
    lines = iter([text, "where", "<image>", "/reset", text, f"/image {tmp_path / 'b.png'}", text])
    lines = iter([*lines, "/image none.png", "/help", ""])

    def read(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    vlm_chat._loop(vlm_chat.Conversation(vlm, first, 8))
    out, err = capsys.readouterr()
    said = [line.strip() for line in out.splitlines()]
    one, two = (answer(vlm, [picture], [text], 8)[0] for picture in (first, second))
    assert said[0] == said[2] == one != said[1] and said[3] == two != one
    history = [question(text), {"role": "assistant", "content": one}, question("where", 0)]
    assert said[1] == "".join(stream(vlm, history, [first], 8)).strip()
    assert ["leave it out" in err, "none.png: no such file" in err, "there is no /help" in err] == [True] * 3
    assert err.count("\n") == 3
