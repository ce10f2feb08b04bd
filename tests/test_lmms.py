"""lmms-eval (make test-lmms): one of its tasks on a small local copy, scored as counted by hand; our plug-in."""

# pyright: reportMissingImports=false

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import vlm_models
from PIL import Image
from transformers import LlamaForCausalLM

from openvision3.config import OpenVisionError
from openvision3.vlm.answering import question
from openvision3.vlm.assemble import assemble, open_tower
from openvision3.vlm.folder import VLM
from openvision3.vlm.lmms import run_lmms

PICTURES = {color: Image.new("RGB", (vlm_models.SIDE, vlm_models.SIDE), color) for color in ("black", "white", "grey")}
SAID = {"black": "yes", "white": "no", "grey": ""}
ASKED = "Is there a panda in the image?"
PROMPT = f"{ASKED}\nAnswer the question using a single word or phrase."  # as lmms-eval's POPE asks


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    """A tiny random LLaVA that learns to say "yes" to black, "no" to white, and nothing to grey."""
    folder = tmp_path_factory.mktemp("vlm")
    language_model: Any = LlamaForCausalLM.from_pretrained(vlm_models.save_language_model(folder / "lm"))
    words = vlm_models.tokenizer()
    words.add_tokens(["yes", "no"])
    language_model.resize_token_embeddings(len(words))
    torch.manual_seed(0)
    made = assemble(open_tower(str(vlm_models.save_tower(folder / "tower"))), language_model, words)
    prompt = made.processor.apply_chat_template([question(PROMPT)], tokenize=False, add_generation_prompt=True)
    batch = made.processor(
        images=list(PICTURES.values()),
        text=[f"{prompt}{said}[EOS]" for said in SAID.values()],
        padding=True,
        padding_side="left",
        add_special_tokens=False,
        return_tensors="pt",
    )
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -1:] = batch["input_ids"][:, -1:]
    labels[:2, -2:] = batch["input_ids"][:2, -2:]
    made.model.model.vision_tower.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in made.model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(200):
        loss = made.model(**batch, labels=labels).loss
        if loss < 0.02:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02
    made.model.eval()
    return made


def save_pope(folder: Path, rows: list[tuple[str, str]]) -> None:
    """A copy of the hub's POPE, of (picture, answer)."""
    from datasets import Dataset, Features, Value
    from datasets import Image as Picture

    features = Features(
        {name: Value("string") for name in ("id", "question_id", "question", "answer", "image_source", "category")}
        | {"image": Picture()}
    )
    columns = {
        "id": [str(n) for n in range(len(rows))],
        "question_id": [str(n) for n in range(len(rows))],
        "question": [ASKED] * len(rows),
        "answer": [answer for _, answer in rows],
        "image_source": [color for color, _ in rows],
        "category": ["random"] * len(rows),
        "image": [PICTURES[color] for color, _ in rows],
    }
    (folder / "data").mkdir(parents=True)
    Dataset.from_dict(columns, features=features).to_parquet(folder / "data" / "test-00000-of-00001.parquet")


@pytest.mark.lmms
def test_pope_of_a_local_copy_is_scored_as_by_hand(vlm: VLM, tmp_path: Path) -> None:
    vlm.model.save_pretrained(tmp_path / "model")
    vlm.processor.save_pretrained(tmp_path / "model")
    rows = [("black", "yes"), ("black", "no"), ("white", "no"), ("white", "yes"), ("black", "yes"), ("black", "no")]
    save_pope(tmp_path / "data" / "POPE", [*rows, ("grey", "no")])
    code = (
        "import sys; from pathlib import Path; from openvision3.vlm.lmms import run_lmms;"
        "sys.exit(run_lmms('pope', 'model', out=Path('scores.json'), data=Path('data'), batch_size=3, device='cpu'))"
    )
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | offline, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr  # one of the answers is empty
    assert "1 of 7 answers are empty or failed" in done.stderr and "pope 6: the answer is empty" in done.stderr
    figures = json.loads((tmp_path / "scores.json").read_text())
    true_yes, false_yes, false_no, true_no = 2, 2, 1, 1  # and one without an answer
    assert figures["scores"] == {
        "pope_accuracy": pytest.approx((true_yes + true_no) / 7),
        "pope_precision": pytest.approx(true_yes / (true_yes + false_yes)),
        "pope_recall": pytest.approx(true_yes / (true_yes + false_no)),
        "pope_f1_score": pytest.approx(4 / 7),
        "pope_yes_ratio": pytest.approx(3 / 7),  # of the true answers
    }
    assert figures["asked"] == 7
    assert figures["errors"] == [{"task": "pope", "sample": 6, "reason": "the answer is empty"}]
    assert "pope_f1_score                0.5714" in done.stdout
    assert not (tmp_path / "submissions").exists()


def request(context: str, second: Any, sample: int, visual: Any = None) -> Any:
    from lmms_eval.api.instance import Instance

    def shown(document: dict[str, Any]) -> list[Any]:
        return document["pictures"]

    arguments = (context, second, visual or shown, sample, "task", "test")
    return Instance("generate_until", arguments, sample, {"task": "task", "doc_id": sample, "repeats": 1})


@pytest.fixture
def plugin(vlm: VLM) -> Any:
    models = pytest.importorskip("lmms_eval.models", reason="make test-lmms")
    found = models.get_model("openvision3")(vlm, device="cpu", batch_size=2)  # by the entry point
    documents = [{"pictures": [PICTURES[color]]} for color in SAID] + [{"pictures": []}, {"pictures": ["a.mp4"]}]
    found.task_dict = {"task": {"test": documents}}
    return found


@pytest.mark.lmms
def test_answers_come_in_order_and_no_failure_is_silent(plugin: Any) -> None:
    once = {"max_new_tokens": 4, "temperature": 0, "do_sample": False, "num_beams": 1}
    requests = [
        request(PROMPT, {"max_new_tokens": 3}, 1),
        request(f"<image> {PROMPT}", once, 0),  # can't be asked
        request(PROMPT, once, 0),
        request(PROMPT, once, 2),  # says nothing
        request(PROMPT, once, 4),  # a video
        request(PROMPT, once | {"until": ["\n", "es"]}, 0),
        request(PROMPT, once | {"until": "y"}, 0),
    ]
    assert plugin.generate_until(requests) == ["no", "", "yes", "", "", "y", "yes"]
    assert plugin.asked == 7
    assert [(error.task, error.sample) for error in plugin.errors] == [("task", 0), ("task", 2), ("task", 4)]
    first, empty, video = (error.reason for error in plugin.errors)
    assert "stands for a picture" in first and "empty" in empty and "something else than pictures" in video
    with pytest.raises(OpenVisionError, match="ours are greedy"):
        plugin.generate_until([request(PROMPT, {"temperature": 0.7}, 0)])


@pytest.mark.lmms
def test_likelihoods(plugin: Any, vlm: VLM) -> None:
    requests = [request(PROMPT, text, 0) for text in (" yes", "no")]
    requests += [request(PROMPT, lambda document: "no yes", 1), request("who are you", "yes", 3)]
    (yes, greedy), (no, other), (both, _), (textual, _) = plugin.loglikelihood(requests)
    assert greedy and not other
    assert yes < 0.1 < no  # lmms-eval takes the smallest
    assert textual > 0
    prompt = vlm.processor.apply_chat_template([question(PROMPT)], tokenize=False, add_generation_prompt=True)
    batch = vlm.processor(
        images=[PICTURES["white"]], text=[f"{prompt}no yes"], add_special_tokens=False, return_tensors="pt"
    )
    labels = batch["input_ids"].clone()
    labels[:, :-2] = -100
    assert both == pytest.approx(2 * vlm.model(**batch, labels=labels).loss.item(), abs=1e-4)
    with pytest.raises(OpenVisionError, match="has no token"):
        plugin.loglikelihood([request(PROMPT, " ", 0)])


@pytest.mark.lmms
def test_data_that_is_not_there(vlm: VLM, tmp_path: Path) -> None:
    vlm.model.save_pretrained(tmp_path / "model")
    vlm.processor.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    with pytest.raises(OpenVisionError, match="POPE does not exist: expected a copy of the hub's data set lmms-lab"):
        run_lmms("pope", str(tmp_path / "model"), data=tmp_path / "data", device="cpu")


def test_without_lmms_eval_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "lmms_eval.evaluator", None)
    with pytest.raises(OpenVisionError, match="pope needs lmms-eval") as caught:
        run_lmms("pope", "demo")
    assert "\n" not in str(caught.value)
    with pytest.raises(OpenVisionError, match="there is no suite 'vqa': expected one of pope, mme"):
        run_lmms("vqa", "demo")
    with pytest.raises(OpenVisionError, match="no folder of data sets"):
        run_lmms("pope", "demo", data=tmp_path / "none")
