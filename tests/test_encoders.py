"""Frozen encoders of four kinds behind one protocol: their own library's tokens, and folders that are of no kind."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoder_folders import OPEN_CLIP_VIT, SIGLIP_VIT, save_open_clip, save_released, save_transformers
from PIL import Image
from torch import Tensor

import openvision3
from openvision3.config import ExternalEncoderConfig, ModelConfig, OpenVisionError, TransformerConfig
from openvision3.hub.encoders import (
    ForeignEncoder,
    TokenEncoder,
    encoder_kind,
    load_external,
    load_token_encoder,
    weights_sha256,
)
from openvision3.model.openvision3 import OpenVision3
from openvision3.vae import load_vae

TRANSFORMERS = ("clip", "clip_vision_model", "siglip", "siglip_vision_model")


def picture(side: int) -> tuple[Image.Image, Tensor]:
    """A random picture, and its pixels (1, 3, S, S) in [-1, 1]."""
    values = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(values), torch.from_numpy(values).permute(2, 0, 1)[None].float() / 127.5 - 1


def close(found: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.05  # else all tokens are as good as one
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", TRANSFORMERS)
@torch.no_grad()
def test_transformers_tokens_are_the_librarys(kind: str, tmp_path: Path) -> None:
    import transformers

    folder = save_transformers(tmp_path / kind, kind)
    siglip = kind.startswith("siglip")
    image, pixels = picture(28)
    mean, std = ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]) if kind == "clip" else (None, None)  # else the library's own
    size = {"height": 28, "width": 28} if siglip else {"shortest_edge": 28}
    own = {} if mean is None else {"image_mean": mean, "image_std": std}
    crop = {} if siglip else {"crop_size": {"height": 28, "width": 28}}
    cls: Any = transformers.SiglipImageProcessor if siglip else transformers.CLIPImageProcessor
    processor = cls(size=size, **own, **crop)
    if own:
        processor.save_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    prepared = processor(images=image, return_tensors="pt")["pixel_values"]
    hidden = getattr(model, "vision_model", model)(prepared).last_hidden_state

    encoder = load_token_encoder(folder)
    assert encoder_kind(folder) == "transformers" and encoder.name == kind
    assert (encoder.width, encoder.native_size, encoder.grid(28, 28)) == (32, 28, (2, 2))
    assert (encoder.size.depth, encoder.size.num_heads, encoder.size.mlp_width) == (2, 2, 64)
    close(encoder(pixels), hidden if siglip else hidden[:, 1:])


@torch.no_grad()
def test_open_clip_tokens_are_the_librarys(tmp_path: Path) -> None:
    from open_clip.model import CLIPVisionCfg, _build_vision_tower
    from safetensors.torch import load_file

    means, stds = [0.4, 0.5, 0.6], [0.3, 0.2, 0.1]
    folder = save_open_clip(tmp_path / "vit", OPEN_CLIP_VIT, mean=means, std=stds)
    state = {n[7:]: t for n, t in load_file(folder / "open_clip_model.safetensors").items() if n.startswith("visual.")}
    tower: Any = _build_vision_tower(24, CLIPVisionCfg(**OPEN_CLIP_VIT, output_tokens=True)).eval()
    tower.load_state_dict(state)
    _, pixels = picture(28)
    prepared = ((pixels + 1) / 2 - torch.tensor(means).view(3, 1, 1)) / torch.tensor(stds).view(3, 1, 1)
    encoder = load_token_encoder(folder)
    assert (encoder.width, encoder.native_size, encoder.grid(28, 28)) == (32, 28, (2, 2))
    assert (encoder.size.depth, encoder.size.num_heads, encoder.size.mlp_width) == (2, 2, 128)
    close(tower.ln_post(encoder(pixels)), tower(prepared)[1])  # the library normalises them

    folder = save_open_clip(tmp_path / "siglip", SIGLIP_VIT)  # a tower of timm's
    state = {n[7:]: t for n, t in load_file(folder / "open_clip_model.safetensors").items() if n.startswith("visual.")}
    tower = _build_vision_tower(24, CLIPVisionCfg(**SIGLIP_VIT)).eval()
    tower.load_state_dict(state)
    _, pixels = picture(160)
    encoder = load_token_encoder(folder)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    assert encoder.grid(160, 160) == (10, 10) and encoder.size.depth == len(tower.trunk.blocks)
    close(encoder(pixels), tower.trunk.forward_features(((pixels + 1) / 2 - mean) / std)[:, -100:])


@torch.no_grad()
def test_ours_and_the_released_format(tiny_model: Path, tmp_path: Path) -> None:
    pixels = picture(64)[1]
    encoder: TokenEncoder = load_token_encoder(tiny_model)
    model = openvision3.load(tiny_model, device="cpu")
    assert (encoder.width, encoder.native_size, encoder.grid(64, 96)) == (32, None, (4, 6))
    assert torch.equal(encoder(pixels), model.encode(pixels))
    released = save_released(tmp_path / "released")
    vae = load_vae("tiny")
    encoder = load_token_encoder(released, vae=vae)
    assert encoder_kind(released) == "openvision3" and encoder.width == 64
    expected = openvision3.load(released, vae=None, device="cpu").encode_latents(vae.encode(pixels))
    close(encoder(pixels), expected)
    clip = save_transformers(tmp_path / "clip", "clip_vision_model")
    torch.manual_seed(0)
    external = ModelConfig(
        image_size=32,
        encoder=TransformerConfig(32, 2, 2),
        decoder=None,
        text_encoder=None,
        text_decoder=None,
        external=ExternalEncoderConfig(str(clip)),
    )
    OpenVision3(external).save(tmp_path / "on_clip")
    encoder = load_token_encoder(tmp_path / "on_clip")
    assert (encoder.native_size, encoder.grid(32, 32)) == (32, (2, 2))  # pictures of no other size


def test_frozen_whatever_is_asked_for(tmp_path: Path) -> None:
    encoder = load_token_encoder(save_transformers(tmp_path / "clip", "clip", attention_dropout=0.5))
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    pixels = picture(28)[1].requires_grad_()
    tokens = encoder(pixels)
    assert not tokens.requires_grad and torch.equal(tokens, encoder(pixels))
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert load_token_encoder(tmp_path / "clip", dtype=torch.bfloat16)(pixels).dtype == torch.bfloat16


def test_other_sizes_are_resized_and_other_shapes_refused(tmp_path: Path) -> None:
    encoder = load_token_encoder(save_transformers(tmp_path / "clip", "clip"))
    pixels = picture(32)[1]
    resized = torch.nn.functional.interpolate(pixels, (28, 28), mode="bicubic", antialias=True).clamp(-1, 1)
    close(encoder(pixels), encoder(resized))
    for shape in ((1, 3, 28, 42), (1, 1, 28, 28), (3, 28, 28)):
        with pytest.raises(ValueError, match="expected square pictures"):
            encoder(torch.zeros(shape))


def test_weights_are_known_by_their_hash(tmp_path: Path) -> None:
    folder = save_transformers(tmp_path / "clip", "clip_vision_model")
    config = ExternalEncoderConfig(str(folder), weights_sha256(folder))
    assert load_external(config, "cpu", torch.float32).width == 32
    save_transformers(folder, "clip_vision_model", hidden_act="gelu", num_hidden_layers=1)
    with pytest.raises(OpenVisionError, match="sha256 is .* expected .*external.source"):
        load_external(config, "cpu", torch.float32)
    with pytest.raises(OpenVisionError, match="does not exist.*external.source"):
        load_external(ExternalEncoderConfig(str(tmp_path / "moved")), "cpu", torch.float32)


def write(folder: Path, name: str, data: object) -> None:
    (folder / name).write_text(data if isinstance(data, str) else json.dumps(data))


def lose_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    del tensors[next(name for name in tensors if "ln_post.bias" in name or "post_layernorm.bias" in name)]
    save_file(tensors, path)


class Malicious:
    def __reduce__(self) -> tuple:
        return (print, ("ran",))


def be_a_pickle(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()
    name = "open_clip_pytorch_model.bin" if (folder / "open_clip_config.json").exists() else "pytorch_model.bin"
    torch.save({"a": Malicious()}, folder / name)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "config.json").unlink(), "neither config.json nor open_clip_config.json"),
        (lambda f: write(f, "config.json", "no"), "not valid JSON"),
        (lambda f: write(f, "config.json", []), "holds list, expected a table"),
        (lambda f: write(f, "config.json", {"model_type": "bert"}), "'bert' is no encoder known here"),
        (lambda f: write(f, "preprocessor_config.json", {"image_mean": 3}), "image_mean must be three numbers.* got 3"),
        (lambda f: write(f, "preprocessor_config.json", '{"image_mean": [0, 0, NaN]}'), "image_mean must be three"),
        (lambda f: write(f, "preprocessor_config.json", {"image_mean": [0, 0, True]}), "image_mean must be three"),
        (lambda f: write(f, "preprocessor_config.json", {"image_std": [1, 1, 0]}), "image_std must be three"),
        (lambda f: write(f, "preprocessor_config.json", {"image_std": [1, 1, 10**400]}), "image_std must be three"),
        (lambda f: write(f, "preprocessor_config.json", []), "holds list, expected a table"),
        (lambda f: write(f, "config.json", "{" + " " * 2_000_000 + "}"), "larger than"),
        (lambda f: (f / "model.safetensors").unlink(), "can't be loaded"),
        (lambda f: (f / "model.safetensors").write_bytes(b"rubbish"), "can't be loaded"),
        (lose_a_tensor, "lack .*post_layernorm.bias"),
        (be_a_pickle, "can't be loaded.*[Ww]eights.only"),
    ],
)
def test_broken_transformers_folders(damage, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_transformers(tmp_path / "clip", "clip_vision_model")
    damage(folder)
    capsys.readouterr()
    with pytest.raises(OpenVisionError, match=words) as caught:
        load_token_encoder(folder)
    assert "\n" not in str(caught.value) and "ran" not in capsys.readouterr().out.split()


RESNET = {"model_cfg": {"embed_dim": 24, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}}}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: write(f, "open_clip_config.json", {}), "no vision transformer"),
        (lambda f: write(f, "open_clip_config.json", {"model_cfg": []}), "no vision transformer"),
        (lambda f: write(f, "open_clip_config.json", {"model_cfg": {"vision_cfg": None}}), "no vision transformer"),
        (lambda f: write(f, "open_clip_config.json", "null"), "holds NoneType, expected a table"),
        (lambda f: write(f, "open_clip_config.json", RESNET), "no vision transformer"),
        (lambda f: write(f, "open_clip_config.json", {"model_cfg": {"embed_dim": 1, "vision_cfg": {"a": 1}}}), "'a'"),
        (lambda f: (f / "open_clip_model.safetensors").unlink(), "no weights"),
        (lose_a_tensor, "do not fit.*ln_post.bias"),
        (be_a_pickle, "can't be read"),
    ],
)
def test_broken_open_clip_folders(damage, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_open_clip(tmp_path / "clip", OPEN_CLIP_VIT)
    damage(folder)
    with pytest.raises(OpenVisionError, match=words) as caught:
        load_token_encoder(folder)
    assert "\n" not in str(caught.value) and "ran" not in capsys.readouterr().out.split()


def test_a_config_without_normalisation_has_clips(tmp_path: Path) -> None:
    folder = save_open_clip(tmp_path / "clip", OPEN_CLIP_VIT)
    config = json.loads((folder / "open_clip_config.json").read_text())
    write(folder, "open_clip_config.json", config | {"preprocess_cfg": None})
    encoder = load_token_encoder(folder)
    assert isinstance(encoder, ForeignEncoder) and encoder.mean.flatten().tolist()[0] == pytest.approx(0.48145466)


def test_a_missing_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = save_transformers(tmp_path / "clip", "clip_vision_model")
    vit = save_open_clip(tmp_path / "vit", OPEN_CLIP_VIT)
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "open_clip.model", None)
    with pytest.raises(OpenVisionError, match=r"transformers.*pip install 'openvision3\[vlm\]'"):
        load_token_encoder(clip)
    with pytest.raises(OpenVisionError, match=r"open_clip_torch.*pip install 'openvision3\[eval\]'"):
        load_token_encoder(vit)
