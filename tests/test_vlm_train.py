"""Training of a LLaVA: one process or two, DDP or FSDP, text alone on one of them, exact resume, the saved folder."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import vlm_models
from forks import Fork
from PIL import Image
from safetensors.torch import load_file
from test_shared_runs import start

from openvision3.config import OpenVisionError, VAEConfig, to_dict
from openvision3.vlm.config import LoRAConfig, VLMDataConfig, VLMStageConfig, VLMTrainConfig, WordsConfig
from openvision3.vlm.folder import load_vlm
from openvision3.vlm.train import train

STEPS = 3


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vlm")
    # batches of four: two with pictures are longer than two without
    entries = [(1, ["how many", "one key"]), (1, ["key", "two"]), (0, ["one", "two three"]), (0, ["two", "one"])]
    data = VLMDataConfig(
        source=str(vlm_models.save_data(folder / "data", entries)),
        images=str(folder / "data" / "pictures"),
        num_workers=0,
    )
    stage = VLMStageConfig(data=data, samples=4 * STEPS, batch_size=4, peak_lr=1e-2, warmup=0.0)
    return VLMTrainConfig(
        recipe="tiny",
        tower=str(vlm_models.save_tower(folder / "tower")),
        language_model=str(vlm_models.save_language_model(folder / "lm")),
        stage1=replace(stage, language_model=False),
        stage2=stage,
        max_length=128,
        precision="fp32",
        micro_batch=2,
        log_every=1,
    )


def run(config, out: Path, processes: int = 1, kill_after: int = 0, **changes):
    """In processes of its own, with what torchrun gives them; returns what they printed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.parent / f"{out.name}.json"
    path.write_text(json.dumps(to_dict(replace(config, out=str(out), **changes))))
    script = Path(__file__).parent / "vlm_run.py"
    arguments = [str(script), str(path), str(kill_after)]
    if processes > 1:
        forks = start(processes, out, VAEConfig(), 0, command=arguments)
    else:
        forks = [Fork(arguments, {**os.environ, "OMP_NUM_THREADS": "1"})]
    said = [fork.communicate(timeout=300) for fork in forks]
    assert not any(fork.returncode for fork in forks), said
    return "".join(out for out, _ in said)


def records(folder: Path):
    rows = []
    for stage in ("stage1", "stage2"):
        lines = (folder / stage / "metrics.jsonl").read_text().splitlines()
        rows += [row for row in map(json.loads, lines) if row["kind"] == "train"]
    return rows


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    return folder, run(config, folder)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes(config, alone, tmp_path, parallel):
    """Losses and gradient norms of each step are those of one process; one of the two sees text alone."""
    said = run(config, tmp_path / "run", processes=2, parallel=parallel)
    seen = {line for line in said.splitlines() if "pictures" in line}
    assert "rank 1 pictures False" in seen or "rank 0 pictures False" in seen
    ours, theirs = records(alone[0]), records(tmp_path / "run")
    assert len(ours) == len(theirs) == 2 * STEPS
    for a, b in zip(ours, theirs, strict=True):
        assert a["step"] == b["step"]
        for name in ("loss", "grad_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-4), (name, a["step"])
    for stage in ("stage1", "stage2"):
        x, y = (load_file(folder / stage / "trained.safetensors") for folder in (alone[0], tmp_path / "run"))
        assert x.keys() == y.keys()
        for name in x:
            torch.testing.assert_close(x[name], y[name], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_begins_with_words(config, tmp_path):
    """With words learned first, two processes train what one does, from the projector that the first wrote."""
    entries = [(1, ["what", f"a {('key', 'lion', 'panda')[n % 3]} and an apple"]) for n in range(24)]
    path = vlm_models.save_data(tmp_path / "data", entries)
    data = replace(config.stage1.data, source=str(path), images=str(tmp_path / "data" / "pictures"))
    words = WordsConfig(samples=24, epochs=2, batch_size=8, commonest=0.5, fewest=2)
    stage = replace(config.stage1, data=data, samples=4)
    changes = {"words": words, "stage1": stage, "stage2": replace(stage, language_model=True)}
    for name, processes in (("one", 1), ("two", 2)):
        run(config, tmp_path / name, processes=processes, **changes)
    for name in ("words/projector.safetensors", "stage1/trained.safetensors", "stage2/trained.safetensors"):
        x, y = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
        assert x.keys() == y.keys()
        for key in x:
            torch.testing.assert_close(x[key], y[key], atol=1e-4, rtol=1e-4)


def test_learns(alone):
    rows = records(alone[0])
    assert rows[-1]["loss"] < rows[STEPS]["loss"] < 1.2 * rows[0]["loss"]
    assert all(row["loss"] > 0 for row in rows)


def test_resumes_exactly(config, alone, tmp_path):
    """Stopped in each stage, and each time started again: the same weights, bit for bit."""
    for stage, kill_after in (("stage1", 3), ("stage2", 6)):  # of its own batches: two a step, those before are done
        said = run(config, tmp_path / "run", kill_after=kill_after)
        assert f"stopped in {stage} after" in said
        assert not (tmp_path / "run" / "model").exists()
        environment = (tmp_path / "run" / "environment.json").read_text()
        with pytest.raises(OpenVisionError, match="holds a run with another stage2.peak_lr"):
            train(replace(config, out=str(tmp_path / "run"), stage2=replace(config.stage2, peak_lr=1.0)), "cpu")
        assert (tmp_path / "run" / "environment.json").read_text() == environment
    run(config, tmp_path / "run")
    for name in ("stage1/trained.safetensors", "stage2/trained.safetensors", "model/model.safetensors"):
        x, y = load_file(alone[0] / name), load_file(tmp_path / "run" / name)
        assert x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x), name


@pytest.mark.slow
def test_resumes_with_shards(config, tmp_path):
    """Two FSDP processes, stopped in either stage: weights and losses are those of a run that was not."""
    for name, stops in (("whole", ()), ("stopped", (2, 2))):
        for kill_after in (*stops, 0):
            said = run(config, tmp_path / name, processes=2, kill_after=kill_after, parallel="fsdp")
            assert ("stopped in stage" in said) is bool(kill_after)
    for stage in ("stage1", "stage2"):
        x, y = (load_file(tmp_path / name / stage / "trained.safetensors") for name in ("whole", "stopped"))
        assert all(torch.equal(x[key], y[key]) for key in x)


ANSWERS = """
import json, sys
import openvision3.hub.hf
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, picture = sys.argv[1:]
model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many"}]}]
text = processor.apply_chat_template(said, add_generation_prompt=True)
inputs = processor(images=Image.open(picture), text=text, return_tensors="pt", add_special_tokens=False)
print(json.dumps([type(model).__name__, model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()]))
"""


def answered(vlm, picture: Path):
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many"}]}]
    text = vlm.processor.apply_chat_template(said, add_generation_prompt=True)
    inputs = vlm.processor(images=Image.open(picture), text=text, return_tensors="pt", add_special_tokens=False)
    return vlm.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()


def test_plain_transformers(config, alone):
    """In a process that knows nothing of `openvision3.vlm`: the same greedy answers."""
    picture = Path(config.stage1.data.images) / "0-0.png"
    vlm = load_vlm(str(alone[0] / "model"))
    command = [sys.executable, "-c", ANSWERS, str(alone[0] / "model"), str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    kind, ids = json.loads(done.stdout.splitlines()[-1])
    assert kind == "LlavaForConditionalGeneration" and ids == answered(vlm, picture)


def test_lora(config, tmp_path):
    """Only the updates and the projector learn; the adapter's folder makes the merged model again."""
    stage2 = replace(config.stage2, lora=LoRAConfig(rank=2, alpha=8.0))
    changed = replace(config, out=str(tmp_path / "run"), stage2=stage2)
    folder = train(changed, "cpu")
    trained = load_file(folder / "stage2" / "trained.safetensors")
    assert {"lora" if "lora_" in name else name.split(".")[1] for name in trained} == {"lora", "multi_modal_projector"}
    whole, again = load_vlm(str(folder / "model")), load_vlm(str(folder / "adapter"))
    source = load_file(Path(config.language_model) / "model.safetensors")
    changes = 0
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], weight, atol=2e-3, rtol=2e-3)
        key = name.replace("model.language_model.", "model.")
        changes += key in source and "_proj" in key and not torch.equal(source[key], weight)
    assert changes == 14  # seven layers in each of two blocks
    picture = Path(config.stage1.data.images) / "0-0.png"
    assert answered(whole, picture) == answered(again, picture)


def test_next_trains(config, tmp_path):
    """Its adapter's folder makes the same model again, tiles and the token that ends a row among it."""
    tiles = replace(config, kind="llava_next", tiles=((1, 2), (2, 1)), out=str(tmp_path / "run"))
    stage = replace(config.stage2, samples=4, lora=LoRAConfig(rank=2, alpha=8.0))
    stage1 = replace(stage, language_model=False, lora=LoRAConfig())
    folder = train(replace(tiles, stage1=stage1, stage2=stage), "cpu")
    vlm = load_vlm(str(folder / "model"))
    assert type(vlm.model).__name__ == "LlavaNextForConditionalGeneration"
    assert "model.image_newline" in load_file(folder / "stage1" / "trained.safetensors")
    again, picture = load_vlm(str(folder / "adapter")), Path(config.stage1.data.images) / "0-0.png"
    assert type(again.model) is type(vlm.model)
    newline = again.model.model.image_newline
    torch.testing.assert_close(newline, vlm.model.model.image_newline, atol=2e-3, rtol=2e-3)
    assert answered(vlm, picture) == answered(again, picture)


def test_refusals(config, tmp_path):
    for changes, said in (
        ({"max_length": 2}, "max_length is 2"),
        ({"stage1": replace(config.stage1, peak_lr=-1.0)}, "stage1.peak_lr"),
        ({"stage1": replace(config.stage1, batch_size=3)}, "can't be shared"),
        ({"stage1": replace(config.stage1, lora=LoRAConfig(rank=2))}, "leaves the language model as it is"),
        ({"stage1": replace(config.stage2, lora=LoRAConfig(rank=2))}, "stage2.lora must be the same"),
        ({"stage1": replace(config.stage1, data=replace(config.stage1.data, images="none"))}, "images is 'none'"),
        ({"language_model": str(tmp_path / "none")}, "none"),
    ):
        with pytest.raises(OpenVisionError, match=said):
            train(replace(config, out=str(tmp_path / "run"), **changes), "cpu")


def test_unusable_samples(config, tmp_path):
    """One of four is no conversation: it is named, and the next takes its place; too many end the run."""
    data = tmp_path / "data.json"
    entries = json.loads(Path(config.stage1.data.source).read_text())
    entries[2]["conversations"] = [{"from": "human", "value": "key"}]
    data.write_text(json.dumps(entries))
    few = replace(config.stage1, data=replace(config.stage1.data, source=str(data), max_bad_fraction=0.9), samples=4)
    folder = train(replace(config, stage1=few, stage2=few, out=str(tmp_path / "run")), "cpu")
    rows = [json.loads(line) for line in (folder / "stage1" / "metrics.jsonl").read_text().splitlines()]
    bad = [row for row in rows if row["kind"] == "bad_sample"]
    assert len(bad) == 1 and "entry 2" in bad[0]["reason"] and "no answer" in bad[0]["reason"]
    strict = replace(few, data=replace(few.data, max_bad_fraction=0.0), samples=16)
    with pytest.raises(OpenVisionError, match="can't be used, the last: data.json, entry 2"):
        train(replace(config, stage1=strict, out=str(tmp_path / "strict")), "cpu")
