"""New parts on a frozen encoder: released weights, our own folders, another library's tower."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from encoder_folders import save_released, save_transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_run import make_vae, tiny_config, tiny_model
from torch import Tensor

import openvision3
from openvision3.cli import main
from openvision3.commands.train import resolve
from openvision3.config import (
    MODEL_PARTS,
    ExternalEncoderConfig,
    ModelConfig,
    ModelPart,
    OpenVisionError,
    TrainConfig,
    TransformerConfig,
)
from openvision3.data.tokenizer import demo_tokenizer
from openvision3.model.openvision3 import OpenVision3
from openvision3.recipes import attach_decoder, attach_text, demo
from openvision3.training import setup
from openvision3.training.attach import BERT_VOCABULARY, attached
from openvision3.training.checkpoint import checkpoints
from openvision3.training.dryrun import dry_run, training_flops
from openvision3.training.frozen import part_of, set_training, trained_losses
from openvision3.training.loop import train
from openvision3.training.monitor import read_records
from openvision3.training.optimizer import build_optimizer
from openvision3.training.stages import plan, validate
from openvision3.training.step import Objective
from openvision3.vae import load_vae
from openvision3.vae_diffusers import flux_config

TINY_VAE = ["--model.vae.kind", "tiny", "--model.vae.source", "embedded", "--model.vae.latent-scale", "1.0"]


def arguments(recipe: str, init: Path, out: Path, steps: int, *more: str) -> list[str]:
    """A run of `steps` batches of 8, without evaluation."""
    stage = ["--stage1.samples", str(8 * steps), "--stage1.warmup-samples", "8", "--stage1.batch-size", "8"]
    stage += ["--stage1.base-lr", "0.2", "--stage2.samples", "0", "--loss.pixel-stride", "2"]
    rest = ["--data.num-workers", "0", "--precision", "fp32", "--eval-samples", "0", "--log-every", "1"]
    return ["train", recipe, "--init", str(init), "--out", str(out), "--device", "cpu", *stage, *rest, *more]


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Eight pictures with captions: every batch is the same, in another order."""
    out = tmp_path_factory.mktemp("data") / "tars"
    assert main(["data", "make-demo", "--out", str(out), "--samples", "8", "--size", "64"]) == 0
    return ["--data.source", str(out)]


def lowered(run: Path, *names: str, to: float) -> None:
    """Each loss of the last step is below that fraction of the first step's."""
    rows = read_records(run / "metrics.jsonl")
    for name in names:
        assert rows[-1][name] < to * rows[0][name], (name, rows[0][name], rows[-1][name])


def tensors(folder: Path, parts: Sequence[str]) -> dict[str, Tensor]:
    return {name: t for name, t in load_file(folder / "model.safetensors").items() if part_of(name) in parts}


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    values = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_released_weights_learn_to_reconstruct_and_to_read(
    tmp_path: Path, tars: list[str], picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    released = save_released(tmp_path / "released")
    before = openvision3.load(released, vae=None, device="cpu")
    first = tmp_path / "first"
    assert main(arguments("attach_decoder", released, first, 30, *TINY_VAE, *tars)) == 0
    lowered(first, "latent_l1", to=0.9)
    lowered(first, "pixel_l1", to=0.7)
    row = read_records(first / "metrics.jsonl")[0]
    assert "contrastive" not in row and "caption" not in row

    model = openvision3.load(first / "model", device="cpu")
    assert model.config.stored_positions and model.config.image_size == 64 and model.config.embed_dim == 48
    for name, tensor in before.encoder.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], tensor), name
    assert model.token_rms == read_records(first / "metrics.jsonl")[-1]["token_rms"]
    assert main(["reconstruct", str(picture), "--model", str(first / "model"), "--device", "cpu"]) == 0
    assert (tmp_path / "picture.reconstructed.png").exists()

    second = tmp_path / "second"  # its VAE comes from the model's own folder
    assert main(arguments("attach_text", first / "model", second, 30, *tars)) == 0
    lowered(second, "contrastive", "caption", to=0.5)
    assert "latent_l1" not in read_records(second / "metrics.jsonl")[0]
    kept = ("encoder", "head", "decoder")
    old, new = tensors(first / "model", kept), tensors(second / "model", kept)
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    assert all(any(part_of(name) == part for name in old) for part in kept)
    capsys.readouterr()
    for command, *more in (["caption"], ["classify", "--labels", "panda,apple"]):
        assert main([command, str(picture), "--model", str(second / "model"), "--device", "cpu", *more]) == 0
    assert "panda" in capsys.readouterr().out


def test_clip_tokens_reconstruct_and_read(tmp_path: Path, tars: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    clip = save_transformers(tmp_path / "clip", "clip")  # 28 px, 2 x 2 tokens: pictures of 32 px
    run = tmp_path / "run"
    both = ["--attach", "decoder", "text_encoder", "text_decoder"]
    before = load_file(clip / "model.safetensors")
    assert main(arguments("attach_decoder", clip, run, 30, *both, *tars)) == 0
    lowered(run, "latent_l1", to=0.95)
    lowered(run, "pixel_l1", "contrastive", "caption", to=0.8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_file(clip / "model.safetensors").items())

    model = openvision3.load(run / "model", device="cpu")
    assert model.config.image_size == 32 and model.config.encoder.width == 32
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    tokens = model.encode(images)
    assert tokens.shape == (2, 4, 32) and not tokens.requires_grad
    assert model.decode(tokens).shape == images.shape and model.embed_image(images).shape == (2, 32)
    own = {name for name in load_file(run / "model" / "model.safetensors") if name.startswith("encoder.")}
    assert own == {"encoder.pool_norm.weight", "encoder.pool_norm.bias", "encoder.projection.weight"}
    tower = sum(tensor.numel() for name, tensor in before.items() if name.startswith("vision_model"))
    assert model.num_parameters()["encoder"] == tower + 32 * 32 + 2 * 32
    assert model.to(torch.bfloat16).encode(images.bfloat16()).dtype == torch.bfloat16  # the tower goes along

    with pytest.raises(OpenVisionError, match="pictures of 32 x 32 pixels alone.*--size 32"):
        model.encode(torch.zeros(1, 3, 48, 48))
    with pytest.raises(OpenVisionError, match="reads pixels, not latents"):
        model.encode_latents(torch.zeros(1, 16, 4, 4))
    with pytest.raises(OpenVisionError, match="without its encoder"):
        OpenVision3.load(run / "model").encode(images)
    assert not torch.equal(model.encoder.pool_norm.weight, torch.ones(32))  # the pooled embedding's head is ours
    again = attached(replace(attach_text(), init=str(run / "model")))
    assert again.frozen == ("encoder", "head", "decoder")  # trained by now
    clip.rename(tmp_path / "moved")
    with pytest.raises(OpenVisionError, match="does not exist.*external.source"):
        openvision3.load(run / "model")
    capsys.readouterr()
    assert main(["reconstruct", str(tmp_path), "--model", str(run / "model")]) == 2
    assert "external.source" in capsys.readouterr().err


def test_what_the_model_settles(tmp_path: Path, tiny_model: Path) -> None:
    released = str(save_released(tmp_path / "released"))
    config = attached(replace(attach_decoder(), init=released))
    model = config.model
    assert (model.image_size, model.embed_dim, model.encoder.width) == (64, 48, 64)
    assert model.vae == flux_config("released") and model.stored_positions
    assert config.stage1.resolution == config.stage2.resolution == 64
    assert model.decoder == replace(model.encoder) and model.text_encoder is None and model.text_decoder is None
    assert config.frozen == ("encoder", "head", "text_encoder", "text_decoder")
    wide = replace(attach_decoder(), model=ModelConfig(decoder=TransformerConfig(32, 3, 4)), init=released)
    assert attached(wide).model.decoder == TransformerConfig(32, 3, 4)  # narrower than the encoder: as the recipe says

    bert = attached(replace(attach_text(), init=released, vocabulary="bert")).model
    assert bert.text_encoder and (bert.text_encoder.vocab_size, bert.text_encoder.context_length) == (30522, 80)
    assert bert.text_decoder and (bert.text_decoder.vocab_size, bert.text_decoder.context_length) == (30522, 128)
    assert bert.text_encoder.vocab_size == BERT_VOCABULARY
    text = replace(attach_text(), init=str(tiny_model), attach=("text_decoder",))
    kept = attached(text).model
    assert kept.text_encoder and kept.text_encoder.context_length == 16  # the model's own
    assert kept.text_decoder and kept.text_decoder.vocab_size == demo_tokenizer().vocab_size
    with pytest.raises(OpenVisionError, match="keeps a text tower of another"):
        attached(replace(text, vocabulary="bert"))
    with pytest.raises(OpenVisionError, match="give its folder or hub id as --init MODEL"):
        attached(attach_text())

    clip = save_transformers(tmp_path / "clip", "clip", image_size=56)  # 4 x 4 tokens
    external = attached(replace(attach_text(), init=str(clip)))
    assert external.frozen == ("encoder", "decoder") and external.model.image_size == 64
    assert external.model.external and external.model.external.source == str(clip)


def small(init: Path, out: Path, vae: Path, **changes) -> TrainConfig:
    """Six steps at 32 px on the model of `tiny_run`, all frozen but a new decoder."""
    config = tiny_config(out, make_vae(vae), attach=("decoder",), freeze=MODEL_PARTS, init=str(init), **changes)
    return replace(attached(config), keep_checkpoints=9, stage1=replace(config.stage1, samples=16))


@pytest.fixture
def init(tmp_path: Path) -> Path:
    torch.manual_seed(5)
    vae = make_vae(tmp_path / "vae")
    OpenVision3(tiny_model(vae), load_vae(vae), demo_tokenizer()).save(tmp_path / "init")
    return tmp_path / "init"


def test_a_resumed_run_ends_the_same(tmp_path: Path, init: Path) -> None:
    config = small(init, tmp_path / "whole", tmp_path / "vae")
    train(config, "cpu")
    saved = checkpoints(tmp_path / "whole" / "checkpoints")
    assert [path.name for path in saved] == ["step_2", "step_4", "step_6"]
    stored = {n for n in load_file(next(saved[0].glob("*.safetensors"))) if not n.startswith("optimizer.")}
    assert stored == {n for n in stored if n.startswith("model.decoder.") or n == "model.token_rms"}
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "model")
    for path in saved[1:]:
        shutil.rmtree(tmp_path / "part" / "checkpoints" / path.name)
    resumed = replace(config, out=str(tmp_path / "part"))
    train(resumed, "cpu")
    whole, part = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "part"))
    assert whole.keys() == part.keys() and all(torch.equal(whole[name], part[name]) for name in whole)
    old = load_file(init / "model.safetensors")
    for name, tensor in whole.items():
        trained = part_of(name) == "decoder" or name == "token_rms"
        assert torch.equal(tensor, old[name]) != trained or tensor.std() == 0, name

    shutil.rmtree(tmp_path / "part" / "checkpoints" / "step_6")
    for name in ("encoder.class_token", "vae.encoder.linear.weight"):  # the VAE is in that folder too
        save_file(old | {name: old[name] + 1}, init / "model.safetensors")
        with pytest.raises(OpenVisionError, match="has other weights than when"):
            train(resumed, "cpu")


def test_a_run_on_clip_ends_the_same_after_a_resume(tmp_path: Path) -> None:
    clip = save_transformers(tmp_path / "clip", "clip")  # pictures of 32 px
    config = replace(small(clip, tmp_path / "whole", tmp_path / "vae"), checkpoint_every=8)
    train(config, "cpu")
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "model")
    for path in checkpoints(tmp_path / "part" / "checkpoints")[1:]:
        shutil.rmtree(path)
    resumed = replace(config, out=str(tmp_path / "part"))
    train(resumed, "cpu")
    whole, part = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "part"))
    assert whole.keys() == part.keys() and all(torch.equal(whole[name], part[name]) for name in whole)

    shutil.rmtree(tmp_path / "part" / "model")
    shutil.rmtree(checkpoints(tmp_path / "part" / "checkpoints")[-1])
    weights = load_file(clip / "model.safetensors")
    first = next(name for name in weights if name.startswith("vision_model"))
    save_file(weights | {first: weights[first] + 1}, clip / "model.safetensors", {"format": "pt"})
    with pytest.raises(OpenVisionError, match="sha256 is .* expected .*external.source"):
        train(resumed, "cpu")


def test_a_kept_text_tower_needs_its_tokenizer(tmp_path: Path, init: Path) -> None:
    config = small(init, tmp_path / "run", tmp_path / "vae")
    (init / "tokenizer.json").unlink()
    with pytest.raises(OpenVisionError, match="has no tokenizer.json.*--attach text_encoder text_decoder"):
        setup.build_model(config, torch.device("cpu"))


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_a_frozen_encoder_changes_no_other_gradient(tmp_path: Path, init: Path, micro_batch: int) -> None:
    config = replace(small(init, tmp_path / "run", tmp_path / "vae"), attach=MODEL_PARTS[1:], micro_batch=micro_batch)
    stage, _ = plan(config)
    batch = next(iter(setup.open_stream(config, stage, 0, demo_tokenizer())))

    def gradients(frozen: tuple[ModelPart, ...]) -> dict[str, Tensor]:
        model = openvision3.load(init, device="cpu")
        Objective(model, config.loss, seed=3, micro_batch=micro_batch, frozen=frozen).backward(batch)
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    free, frozen = gradients(()), gradients(("encoder",))
    assert {name for name in free if part_of(name) != "encoder"} == frozen.keys() < free.keys()
    assert any(part_of(name) == "head" for name in frozen)
    for name, gradient in frozen.items():
        torch.testing.assert_close(gradient, free[name], rtol=1e-4, atol=1e-6, msg=name)


def test_new_parts_are_random_and_alone_are_trained(tmp_path: Path, init: Path) -> None:
    config = small(init, tmp_path / "run", tmp_path / "vae")
    shutil.rmtree(tmp_path / "vae")  # the model's folder has its VAE inside
    old, model = openvision3.load(init, device="cpu"), setup.build_model(config, torch.device("cpu"))
    before, after = dict(old.named_parameters()), dict(model.named_parameters())
    for name, parameter in after.items():
        if part_of(name) == "decoder" and parameter.ndim == 2:
            assert not torch.equal(parameter, before[name]), name
        elif part_of(name) != "decoder":
            assert torch.equal(parameter, before[name]), name
    decoder = {id(parameter) for name, parameter in after.items() if part_of(name) == "decoder"}
    optimizer = build_optimizer(model, config.optimizer)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == decoder
    assert model.decoder is not None and all(module.training for module in model.decoder.modules())
    others = (model.encoder, model.text_encoder, model.text_decoder)
    assert not any(module.training for part in others if part is not None for module in part.modules())
    set_training(model, ("head",))
    assert not model.encoder.projection.training and model.encoder.training


def test_another_librarys_encoder_is_no_start_of_a_recipe_with_its_own(tmp_path: Path) -> None:
    clip = save_transformers(tmp_path / "clip", "clip")
    config = tiny_config(tmp_path / "run", make_vae(tmp_path / "vae"), init=str(clip))
    with pytest.raises(OpenVisionError, match="another library's encoder.*attach_decoder --init MODEL"):
        setup.build_model(config, torch.device("cpu"))


def test_losses_of_frozen_parts_alone_are_left_out() -> None:
    config = tiny_model(vae=ModelConfig().vae)
    table = [
        ((), {"reconstruction", "contrastive", "caption"}),
        (("encoder",), {"reconstruction", "contrastive", "caption"}),
        (("encoder", "decoder"), {"contrastive", "caption"}),
        (("encoder", "text_encoder"), {"reconstruction", "contrastive", "caption"}),  # the head learns
        (("encoder", "head", "text_encoder"), {"reconstruction", "caption"}),
        (("decoder", "text_encoder", "text_decoder"), {"reconstruction", "contrastive", "caption"}),
        (MODEL_PARTS, set()),
    ]
    for frozen, expected in table:
        assert trained_losses(config, frozen) == expected, frozen
    assert trained_losses(replace(config, decoder=None), ("encoder",)) == {"contrastive", "caption"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"init": ""}, "need a model to start from"),
        ({"attach": ()}, "all that the losses need is frozen.*nothing to train"),
        ({"attach": ("text_encoder",)}, "attach names text_encoder, but model.text_encoder is None"),
        ({"vocabulary": "bert"}, "none is attached"),
        ({"freeze": (), "external": True}, "freeze must name 'encoder'"),
        ({"external": True, "size": 48}, "resolution is 32: the encoder reads 48 alone"),
    ],
)
def test_impossible_recipes_are_refused(changes: dict, words: str, tmp_path: Path) -> None:
    model = replace(tiny_model(ModelConfig().vae), text_encoder=None, text_decoder=None)
    config = tiny_config(tmp_path, model.vae, model=model, attach=("decoder",), freeze=MODEL_PARTS, init="x")
    if changes.pop("external", False):
        external = ExternalEncoderConfig("clip")
        config = replace(config, model=replace(model, external=external, image_size=changes.pop("size", 32)))
    with pytest.raises(OpenVisionError, match=words):
        validate(replace(config, **changes))


def test_the_dry_run_counts_what_is_trained(tmp_path: Path, init: Path) -> None:
    config = small(init, tmp_path / "run", tmp_path / "vae")
    model = openvision3.load(init, vae=None, device="cpu")
    assert model.decoder is not None
    decoder = sum(p.numel() for p in model.decoder.parameters())
    text = dry_run(config, "cpu")
    assert f"{'trained':<14}{decoder:>14,}" in text and "encoder" not in text.split("memory a sample")[1].split("\n")[0]
    forward = {"encoder": 1.0, "decoder": 10.0, "text_encoder": 100.0, "vae_encoder": 1e4, "vae_decoder": 1e5}
    assert training_flops(config, forward, False, {"reconstruction"}) == 1 + 30 + 1e4 + 1e5
    assert training_flops(config, forward, True, {"reconstruction"}) == 2 + 30 + 1e4 + 1e5

    clip = save_transformers(tmp_path / "clip", "clip")
    args = arguments("attach_text", clip, tmp_path / "no", 2)[2:]
    run = resolve(attached(replace(attach_text(), init=str(clip))), args)
    assert "nothing is missing" in dry_run(run.config, "cpu")
    assert not (tmp_path / "no").exists()


def test_flags_go_on_top_of_what_the_model_settles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    released = save_released(tmp_path / "released")
    flags = [*TINY_VAE, "--model.decoder.depth", "1", "--stage1.resolution", "32", "--dry-run"]
    assert main(arguments("attach_decoder", released, tmp_path / "run", 2, *flags)) == 0
    config = json.loads(capsys.readouterr().out.partition("\n\n")[0])
    assert config["model"]["decoder"]["depth"] == 1 and config["model"]["decoder"]["width"] == 64
    assert config["stage1"]["resolution"] == 32 and config["stage2"]["resolution"] == 64
    assert config["model"]["vae"]["kind"] == "tiny" and config["attach"] == ["decoder"]
    assert main(["train", "attach_decoder"]) == 2
    assert "--init MODEL" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["train", "attach_decoder", "--init", str(tmp_path / "empty")]) == 2
    assert "holds no encoder" in capsys.readouterr().err
    assert demo().attach == () == demo().freeze
