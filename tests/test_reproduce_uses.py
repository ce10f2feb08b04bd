"""`ov3 reproduce clip`: a generator and a language model on a finished encoder, trained, measured, and gone on with."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import vlm_models
from safetensors.torch import load_file
from tiny_run import make_vae, tiny_model

from openvision3.config import SceneConfig, load_json, save_json
from openvision3.data import demo
from openvision3.data.tokenizer import demo_tokenizer
from openvision3.generation.config import StackConfig
from openvision3.generation.sample import SamplerConfig
from openvision3.model.openvision3 import OpenVision3
from openvision3.reproduction import generation, questions
from openvision3.reproduction.arm import RECIPE, finished, run_arm
from openvision3.reproduction.arms import QUICK, ClassifierRecipe, GenerationRecipe, QuestionsRecipe, recipe
from openvision3.vae import load_vae
from openvision3.vlm.config import LoRAConfig


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("encoder")
    vae = make_vae(folder / "vae")
    model = OpenVision3(tiny_model(vae), load_vae(vae), demo_tokenizer())
    model.save(folder / "model")
    return str(folder / "model")


def never(*_: Any) -> None:
    raise AssertionError("trained again")


def begun(folder: Path, made: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_json(made, folder / RECIPE)
    return folder


def test_generation_is_trained_and_measured(encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = tuple(demo.names(30))
    judge = begun(tmp_path / "classifier", ClassifierRecipe(names, 128, str(tmp_path / "classifier"), held_out=64))
    run_arm(judge, "classifier")
    found = finished(judge)
    assert found is not None and 0 <= found["figures"]["classifier/top1"] <= 1

    planned = recipe("generation-unified", 0, QUICK, tmp_path)
    assert isinstance(planned, GenerationRecipe)
    scenes = SceneConfig(num_names=30, count_weights=(1.0, 0.0, 0.0, 0.0))
    train = replace(
        planned.train,
        model=encoder,
        resolution=32,
        generator=replace(
            planned.train.generator,
            token_width=16,
            backbone=StackConfig(16, 1, 2),
            head=StackConfig(16, 1, 2),
            grid=(2, 2),
        ),
        data=replace(planned.train.data, scenes=scenes),
        samples=96,
        out=str(tmp_path / "drawn"),
    )  # fmt: skip
    sampler = SamplerConfig(steps=2, guidance=2.0)
    made = GenerationRecipe(train, 6, sampler, 2, str(judge))
    folder = begun(tmp_path / "drawn", made)
    assert load_json(GenerationRecipe, folder / RECIPE) == made
    run_arm(folder, "generation")
    found = finished(folder)
    assert found is not None and not (folder / "checkpoints").exists() and (folder / generation.SHEET).exists()
    figures = found["figures"]
    each = figures["generation/KID-EffNetLite0, each"]
    assert len(each) == 2 and each[0] != each[1], "every seed of the sampler draws its own"
    assert figures["generation/KID-EffNetLite0"] == pytest.approx(sum(each) / 2)
    assert figures["generation/reconstructions KID-EffNetLite0"] > 0 and 0 <= figures["generation/top1"] <= 1
    (folder / "result.json").unlink()
    monkeypatch.setattr(generation, "train", never)
    run_arm(folder, "generation")
    assert finished(folder)["figures"] == figures, "measured again, the figures are the same"  # type: ignore[index]


def test_questions_are_trained_and_asked(encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = recipe("questions-unified", 0, QUICK, tmp_path)
    assert isinstance(planned, QuestionsRecipe)
    first, second = planned.train.stage1, planned.train.stage2
    train = replace(
        planned.train,
        tower=encoder,
        language_model=str(vlm_models.save_language_model(tmp_path / "lm")),
        resolution=32,
        words=replace(planned.train.words, samples=96, epochs=1, fewest=2, commonest=0.2),
        stage1=replace(first, samples=8, batch_size=4),
        stage2=replace(second, samples=8, batch_size=4, lora=LoRAConfig(rank=2, layers=("q_proj",))),
        max_length=1024,
        out=str(tmp_path / "asked"),
    )
    folder = begun(tmp_path / "asked", QuestionsRecipe(train, planned.scenes, 4))
    run_arm(folder, "questions")
    found = finished(folder)
    assert found is not None
    figures = found["figures"]
    seen = json.loads((folder / "answers.json").read_text())
    assert seen["num"] == 4 and not seen["blind"] and json.loads((folder / "blind.json").read_text())["blind"]
    assert figures["questions/presence, random"] == seen["presence"]["random"]["accuracy"]
    assert figures["questions/count, interval"] == list(seen["count"]["interval"]) and "blind/relation" in figures
    low, high = figures["questions/things, interval"]
    assert low <= figures["questions/things"] == seen["caption"]["recall"] <= high
    assert not (folder / "model").exists() and (folder / "adapter" / "adapter.json").exists()
    before = load_file(folder / "adapter" / "adapter.safetensors")

    (folder / "result.json").unlink()
    (folder / "blind.json").unlink()

    monkeypatch.setattr(questions, "train", never)
    run_arm(folder, "questions")
    again = finished(folder)
    assert again is not None and again["figures"] == figures
    assert all(
        value.equal(before[name]) for name, value in load_file(folder / "adapter" / "adapter.safetensors").items()
    )
