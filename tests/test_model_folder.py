"""The whole model: its parts, its folder on disk, and what it says when something is missing or broken."""

import dataclasses
import json
import math
import pickle
import shutil
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from openvision3.config import (
    ModelConfig,
    OpenVisionError,
    TextDecoderConfig,
    TextEncoderConfig,
    TinyVAEConfig,
    TransformerConfig,
    VAEConfig,
)
from openvision3.data.tokenizer import demo_tokenizer
from openvision3.model.encoder import VisionEncoder
from openvision3.model.openvision3 import OpenVision3
from openvision3.vae import TinyVAE, load_tiny_vae

SIZE = TransformerConfig(32, 2, 2)


def make_config(image_input: Literal["prefix", "cross"] = "cross", **changes: Any) -> ModelConfig:
    vocab_size = demo_tokenizer().vocab_size
    config = ModelConfig(
        "small", image_size=64, embed_dim=24, encoder=SIZE, decoder=TransformerConfig(48, 2, 3, mlp_width=80),
        text_encoder=TextEncoderConfig(SIZE, vocab_size, 16),
        text_decoder=TextDecoderConfig(SIZE, vocab_size, 12, image_input=image_input, image_positions=1.0),
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def make_vae():
    architecture = TinyVAEConfig((8, 8, 8), (1, 1, 1), (8, 8, 8), (1, 1, 1))
    vae = TinyVAE(VAEConfig(licence="MIT"), architecture)
    vae.load_state_dict({name: t if "latent" in name else t.half().float() for name, t in vae.state_dict().items()})
    return vae.freeze()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = OpenVision3(make_config(), make_vae(), demo_tokenizer()).eval()
    model.token_rms.fill_(1.7)
    return model


@pytest.fixture
def folder(model, tmp_path):
    model.save(tmp_path / "model")
    return tmp_path / "model"


def test_encode_decode_embed_and_caption(model):
    images = torch.rand(2, 3, 32, 64) * 2 - 1
    tokens = model.encode(images)
    assert tokens.shape == (2, 2 * 4, 32)
    torch.testing.assert_close(tokens, model.encode_latents(model.vae.encode(images)))
    assert model.decode(tokens, grid=(2, 4)).shape == images.shape
    assert model.decode_latents(tokens, grid=(2, 4)).shape == (2, 16, 4, 8)
    for embedding in (model.embed_image(images), model.embed_text(["a panda", "two apples"])):
        torch.testing.assert_close(embedding.norm(dim=-1), torch.ones(2))
    pooled = model.pool(tokens, normalize=False)
    torch.testing.assert_close(torch.nn.functional.normalize(pooled, dim=-1), model.embed_image(images))
    for beams in (1, 2):
        captions = model.caption(images, num_beams=beams, max_length=5)
        assert captions == model.caption(tokens=tokens, grid=(2, 4), num_beams=beams, max_length=5)
        assert len(captions) == 2 and all(isinstance(caption, str) for caption in captions)
    with pytest.raises(OpenVisionError, match="grid="):
        model.decode(tokens)
    with pytest.raises(ValueError, match="multiples of 16"):
        model.encode(torch.zeros(1, 3, 32, 40))


def test_caption_logits_are_those_of_the_next_token(model):
    tokens = torch.randn(1, 16, 32)
    ids = torch.tensor([[2, 9, 8, 3, 0]])
    logits = model.caption_logits(tokens, ids)
    assert logits.shape == (1, 4, model.config.text_decoder.vocab_size)
    changed = model.caption_logits(tokens, torch.tensor([[2, 9, 7, 3, 0]]))
    assert torch.equal(logits[:, :2], changed[:, :2]) and not torch.equal(logits[:, 2], changed[:, 2])


def test_temperature_is_clamped_and_can_come_back(model):
    limited = OpenVision3(make_config())
    assert limited.temperature().item() == pytest.approx(1 / 0.07)
    limited.logit_scale.data.fill_(7.0)
    limited.temperature().backward()
    assert limited.temperature().item() == pytest.approx(100)
    assert limited.logit_scale.grad is not None and limited.logit_scale.grad.item() == pytest.approx(100)
    limited.clamp_logit_scale()
    assert limited.logit_scale.item() == pytest.approx(math.log(100))


def test_pixel_variant():
    config = make_config(input="pixels", in_channels=3, patch_size=16, text_encoder=None, text_decoder=None)
    model = OpenVision3(config)
    images = torch.randn(2, 3, 32, 48)
    tokens = model.encode(images)
    assert tokens.shape == (2, 6, 32) and model.decode(tokens, grid=(2, 3)).shape == images.shape
    assert model.num_parameters()["decoder"] > 0
    for call in (lambda: model.encode_latents(images), lambda: model.decode_latents(tokens, (2, 3))):
        with pytest.raises(OpenVisionError, match="pixels|no latents"):
            call()


def test_missing_parts_are_named():
    bare = OpenVision3(make_config(decoder=None, text_encoder=None, text_decoder=None))
    tokens = bare.encode_latents(torch.randn(1, 16, 8, 8))
    for call, part in (
        (lambda: bare.decode_latents(tokens), "decoder"),
        (lambda: bare.embed_text(["a panda"]), "text encoder"),
        (lambda: bare.caption(tokens=tokens), "text decoder"),
        (lambda: bare.encode(torch.zeros(1, 3, 64, 64)), "VAE"),
    ):
        with pytest.raises(OpenVisionError, match=part):
            call()
    with pytest.raises(OpenVisionError, match="tokenizer"):
        OpenVision3(make_config()).embed_text(["a panda"])


def test_parts_that_do_not_fit_are_refused():
    config = make_config(text_encoder=TextEncoderConfig(SIZE, 100, 16))
    with pytest.raises(OpenVisionError, match="vocabulary|entries"):
        OpenVision3(config, tokenizer=demo_tokenizer())
    with pytest.raises(OpenVisionError, match="channels"):
        OpenVision3(make_config(in_channels=4, vae=VAEConfig(channels=4)), make_vae())
    for broken in ({"image_size": 70}, {"input": "pixels"}, {"patch_size": 0}, {"noise_tau": -1.0}, {"embed_dim": 0}):
        with pytest.raises(OpenVisionError):
            OpenVision3(make_config(**broken))  # pyright: ignore[reportArgumentType]


def test_parameters_by_part_add_up(model):
    counts = model.num_parameters()
    assert set(counts) == {"encoder", "decoder", "text_encoder", "text_decoder", "vae", "temperature"}
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(counts.values()) - counts["vae"]


@pytest.mark.parametrize("image_input", ["cross", "prefix"])
def test_flops_equal_torchs_count(image_input: Literal["prefix", "cross"]):
    vae, matmul = make_vae(), {"attention": "matmul"}
    model = OpenVision3(make_config(image_input, **matmul), vae)
    latents = torch.randn(1, 16, 8, 8)
    tokens = model.encode_latents(latents)
    calls = {
        "encoder": lambda: model.pool(model.encode_latents(latents)),
        "decoder": lambda: model.decode_latents(tokens),
        "text_encoder": lambda: model.embed_text_ids(torch.ones(1, 16, dtype=torch.long)),
        "text_decoder": lambda: model.caption_logits(tokens, torch.ones(1, 12, dtype=torch.long)),
        "vae_encoder": lambda: vae.encode(torch.randn(1, 3, 64, 64)),
        "vae_decoder": lambda: vae.decode(latents),
    }
    counts = model.flops(64)
    assert set(counts) == set(calls)
    for part, call in calls.items():
        with FlopCounterMode(display=False) as counter:
            call()
        assert counts[part] == counter.get_total_flops(), part


def test_folder_round_trip(model, folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    loaded = OpenVision3.load(folder)
    assert loaded.config == dataclasses.replace(model.config, vae=model.vae.config) and not loaded.training
    for (name, old), (same, new) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == same and torch.equal(old, new) and new.dtype == torch.float32, name
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in loaded.named_parameters() if p.requires_grad
    }
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(loaded.decode(loaded.encode(images)), model.decode(model.encode(images)))
    torch.testing.assert_close(loaded.embed_text(["a panda"]), model.embed_text(["a panda"]))
    stored = load_file(folder / "model.safetensors")
    assert stored["vae.encoder.head.weight"].dtype == torch.float16  # nothing is lost in these


def test_half_precision_on_disk(model, tmp_path):
    model.save(tmp_path / "half", dtype=torch.float16)
    assert load_file(tmp_path / "half" / "model.safetensors")["encoder.patch_embed.weight"].dtype == torch.float16
    loaded = OpenVision3.load(tmp_path / "half")
    assert isinstance(model.encoder, VisionEncoder) and isinstance(loaded.encoder, VisionEncoder)
    weight = model.encoder.patch_embed.weight
    assert torch.equal(loaded.encoder.patch_embed.weight, weight.half().float())
    assert loaded.logit_scale.item() == model.logit_scale.item() and loaded.token_rms.item() == pytest.approx(1.7)
    huge = OpenVision3(make_config())
    assert isinstance(huge.encoder, VisionEncoder)
    huge.encoder.class_token.data.fill_(1e6)
    with pytest.raises(OpenVisionError, match="class_token"):
        huge.save(tmp_path / "huge", dtype=torch.float16)


def test_the_embedded_vae_may_be_named_instead_of_packed(model, tmp_path):
    model = OpenVision3(make_config(), load_tiny_vae(), demo_tokenizer())
    model.save(tmp_path / "named", pack_vae=False)
    model.save(tmp_path / "packed")
    assert not any(name.startswith("vae.") for name in load_file(tmp_path / "named" / "model.safetensors"))
    named, packed = (OpenVision3.load(tmp_path / name) for name in ("named", "packed"))
    images = torch.rand(1, 3, 32, 32)
    assert named.vae is not None and torch.equal(named.encode(images), packed.encode(images))


def test_load_without_vae_and_with_a_given_one(model, folder):
    bare = OpenVision3.load(folder, vae=None)
    assert bare.vae is None and bare.encode_latents(torch.randn(1, 16, 8, 8)).shape == (1, 16, 32)
    vae = make_vae()
    assert OpenVision3.load(folder, vae=vae).vae is vae


def test_loading_in_another_dtype(folder):
    loaded = OpenVision3.load(folder, dtype=torch.bfloat16)
    tokens = loaded.encode(torch.rand(1, 3, 64, 64).bfloat16())
    assert tokens.dtype == torch.bfloat16 and loaded.decode(tokens).dtype == torch.bfloat16


def test_nothing_is_overwritten_unasked(model, folder, tmp_path):
    with pytest.raises(OpenVisionError, match="exists already"):
        model.save(folder)
    model.save(folder, overwrite=True, model_card="# Mine\n")
    assert (folder / "README.md").read_text() == "# Mine\n"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(OpenVisionError, match="no model"):
        model.save(tmp_path / "other", overwrite=True)
    (tmp_path / "other" / "thesis.txt").rename(tmp_path / "other" / "model.safetensors")
    (tmp_path / "other" / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(OpenVisionError, match="no model"):
        model.save(tmp_path / "other", overwrite=True)
    assert (tmp_path / "other" / "model.safetensors").read_text() == "years of work"


def break_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, change):
    data = json.loads((folder / "config.json").read_text())
    change(data)
    (folder / "config.json").write_text(json.dumps(data))


def pickled_weights(folder):
    torch.save({"a": torch.zeros(2)}, folder / "model.safetensors")


def bare_pickle(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps({"a": 1}))


def pickle_beside(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_short(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "no weights"),
        (pickled_weights, "ov3 convert"),
        (bare_pickle, "ov3 convert"),
        (pickle_beside, "ov3 convert"),
        (cut_short, "not a readable safetensors"),
        (
            lambda f: break_weights(f, lambda t: t.update({"encoder.class_token": torch.zeros(3)})),
            r"class_token .*\(3,\)",
        ),
        (lambda f: break_weights(f, lambda t: t.pop("decoder.norm.weight")), "lacks decoder.norm.weight"),
        (lambda f: break_weights(f, lambda t: t.update({"extra": torch.zeros(1)})), "holds extra"),
        (lambda f: break_weights(f, lambda t: t.update({"encoder.class_token": torch.zeros(32).int()})), "int32"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "config.json").write_text("[1]"), "holds list, expected a table"),
        (lambda f: edit_config(f, lambda d: d["model"]["vae"].update(factor=0)), "factor is 0"),
        (lambda f: edit_config(f, lambda d: d["model"]["vae"].update(channels=10**9)), "channels is 1000000000"),
        (lambda f: edit_config(f, lambda d: d["model"]["vae"].update(latent_scale=0)), "latent_scale .* 0"),
        (lambda f: edit_config(f, lambda d: d["model"]["vae"].update(latent_scale=math.nan)), "latent_scale .* nan"),
        (lambda f: edit_config(f, lambda d: d.pop("format_version")), "format_version"),
        (lambda f: edit_config(f, lambda d: d.update(format_version=99)), "format_version 99"),
        (lambda f: edit_config(f, lambda d: d["model"].update(ecnoder={})), "ecnoder.*encoder"),
        (lambda f: edit_config(f, lambda d: d["model"]["encoder"].update(width=31)), "multiple of 4"),
        (lambda f: edit_config(f, lambda d: d["model"]["encoder"].update(depth=10**9)), "range"),
        (lambda f: edit_config(f, lambda d: d["model"]["text_decoder"].update(vocab_size=-1)), "vocab_size"),
        (
            lambda f: edit_config(f, lambda d: d["model"]["text_encoder"].update(context_length=10**15)),
            "context_length",
        ),
        (lambda f: edit_config(f, lambda d: d.update(model=None)), "table of fields"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer"),
        (shutil.rmtree, "not a folder"),
    ],
)
def test_broken_folders_give_one_clear_line(folder, damage, words):
    damage(folder)
    with pytest.raises(OpenVisionError, match=words) as caught:
        OpenVision3.load(folder)
    assert "\n" not in str(caught.value)


def test_a_broken_off_save_leaves_no_model(model, folder, monkeypatch):
    def fail(path):
        raise OSError("no space left on device")

    monkeypatch.setattr(model.tokenizer, "save", fail)
    with pytest.raises(OSError):
        model.save(folder, overwrite=True)
    with pytest.raises(OpenVisionError, match="no config.json"):
        OpenVision3.load(folder)
    monkeypatch.undo()
    model.save(folder, overwrite=True)
    OpenVision3.load(folder)
    monkeypatch.setattr("openvision3.model.folder.save_file", lambda tensors, path, **_: fail(path.write_text("half")))
    with pytest.raises(OSError):
        model.save(folder.parent / "fresh")
    monkeypatch.undo()
    model.save(folder.parent / "fresh")
    OpenVision3.load(folder.parent / "fresh")
