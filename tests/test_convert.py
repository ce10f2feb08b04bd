"""`ov3 convert`: the golden checkpoint and a tiny model through every form, what does not fit, damaged sources."""

import dataclasses
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_folders import GOLDEN, OPEN_CLIP_VIT, save_open_clip, save_released, save_transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoProcessor

import openvision3
from openvision3 import cli
from openvision3.commands import convert as command
from openvision3.config import ExternalEncoderConfig, ModelConfig, OpenVisionError, TransformerConfig, VAEConfig
from openvision3.hub import open_clip, released
from openvision3.hub.hf import convert as hf_convert
from openvision3.hub.hf import to_transformers
from openvision3.hub.onnx import OnnxEncoder
from openvision3.hub.verify import compare, encoder_outputs, random_inputs
from openvision3.model.blocks import SIZES
from openvision3.model.openvision3 import OpenVision3
from openvision3.vae_diffusers import flux_config, read_config

BIN, CONFIG = "open_clip_pytorch_model.bin", "open_clip_config.json"
PARTS: dict[str, Any] = {"decoder": None, "text_encoder": None, "text_decoder": None}
EXPECTED = load_file(GOLDEN / "expected.safetensors")


def ov3(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """Runs a command in this process: (exit code, stdout, stderr)."""
    code = cli.main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def refused(capsys: pytest.CaptureFixture[str], out: Path, *args: object) -> str:
    """The one line with which a conversion fails; nothing is at `out` or left beside it."""
    before = set(out.parent.iterdir())
    code, _, err = ov3(capsys, "convert", *args, "--out", out)
    assert code == 2 and err.count("\n") == 1, err
    assert set(out.parent.iterdir()) == before and not out.exists()
    return err


def golden_difference(found: dict[str, Tensor]) -> float:
    return max(float((found[name] - EXPECTED[name]).abs().max()) for name in ("tokens", "pooled"))


def encoder_model(folder: Path, **changes: Any) -> Path:
    """A folder with an encoder alone, 64 px, width 32, for latents of FLUX.1's VAE as released."""
    torch.manual_seed(0)
    config = ModelConfig("small", image_size=64, embed_dim=16, encoder=TransformerConfig(32, 2, 2), **PARTS)
    OpenVision3(dataclasses.replace(config, **{"vae": flux_config("released"), **changes})).save(folder)
    return folder


def test_the_golden_checkpoint_survives_every_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Released -> own -> released, each loaded by openvision3, and by open_clip's tower where that is its layout."""
    own, again = tmp_path / "own", tmp_path / "deep" / "again"
    code, out, err = ov3(capsys, "convert", GOLDEN, "--out", own)
    assert code == 0, err
    assert "through open_clip's tower, of the source" in out and "through openvision3" in out
    code, out, err = ov3(capsys, "convert", own, "--out", again, "--to", "released", "--bin")
    assert code == 0, err
    assert "30 tensors" in out and "bound" in out and "left out" not in out
    for folder in (GOLDEN, own, again):
        model = openvision3.load(folder, vae=None, device="cpu")
        assert golden_difference(encoder_outputs(model, EXPECTED["latents"])) <= 1e-5
    for folder in (GOLDEN, again):
        tower = open_clip.open_clip_tower(folder)
        assert tower is not None
        pooled, tokens = tower(EXPECTED["latents"])
        assert golden_difference({"tokens": tokens, "pooled": pooled}) <= 1e-5

    assert json.loads((again / CONFIG).read_text()) == json.loads((GOLDEN / CONFIG).read_text())
    original = torch.load(GOLDEN / BIN, weights_only=True)
    for state in (load_file(again / "open_clip_model.safetensors"), torch.load(again / BIN, weights_only=True)):
        assert state.keys() == original.keys()
        assert all(torch.equal(state[name], original[name]) for name in original)
    assert {path.stat().st_mode & 0o044 for path in again.iterdir()} == {(again / CONFIG).stat().st_mode & 0o044}


def test_the_golden_checkpoint_in_onnx(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = ov3(capsys, "convert", GOLDEN, "--out", tmp_path / "onnx", "--to", "onnx")
    assert code == 0, err
    assert "64 x 64 pixels alone" in out and "through onnxruntime" in out
    exported = OnnxEncoder(tmp_path / "onnx" / "model.onnx")
    assert golden_difference(exported(EXPECTED["latents"])) <= 1e-4
    assert not exported.any_size
    with pytest.raises(OpenVisionError, match="can't run"):
        exported(torch.zeros(1, 16, 12, 8))
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"rubbish")
    with pytest.raises(OpenVisionError, match="can't load"):
        OnnxEncoder(tmp_path / "onnx" / "model.onnx")


@pytest.mark.parametrize("to", ["transformers", "transformers-vision"])
def test_the_golden_checkpoint_in_transformers(capsys: pytest.CaptureFixture[str], tmp_path: Path, to: str) -> None:
    out = tmp_path / "out"
    code, said, err = ov3(capsys, "convert", GOLDEN, "--out", out, "--to", to)
    assert code == 0 and not err, err
    assert "OpenVision3VisionModel, reads latents" in said and "through transformers" in said
    model: Any = AutoModel.from_pretrained(out)
    with torch.no_grad():
        output = model(latents=EXPECTED["latents"])
    assert golden_difference({"tokens": output.last_hidden_state, "pooled": output.pooler_output}) <= 1e-5


def test_a_whole_model_in_transformers(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every part is there and compared; an own model folder is no transformers folder, nor the other way round."""
    out = tmp_path / "whole"
    code, said, err = ov3(capsys, "convert", tiny_model, "--out", out, "--to", "transformers")
    assert code == 0, err
    assert "OpenVision3Model, reads pictures" in said and "left out" not in said
    processor: Any = AutoProcessor.from_pretrained(out)
    assert processor.tokenizer.model_max_length == 16
    assert "no model of this form" in ov3(capsys, "convert", tiny_model, "--out", out, "--overwrite")[2]
    (out / "notes.txt").write_text("mine")
    vision = ["--to", "transformers-vision", "--overwrite"]
    code, said, err = ov3(capsys, "convert", tiny_model, "--out", out, *vision)
    assert code == 0 and "left out" in said, err
    assert (out / "notes.txt").is_file() and not (out / "tokenizer.json").exists()
    assert type(AutoModel.from_pretrained(out)).__name__ == "OpenVision3VisionModel"
    own = tmp_path / "own"
    shutil.copytree(tiny_model, own)
    assert "no model of this form" in ov3(capsys, "convert", tiny_model, "--out", own, *vision)[2]

    parts = {
        "decoder.output.weight": "decoder",
        "token_rms": "token rms",
        "text_model.projection.weight": "text encoder",
        "logit_scale": "temperature",
        "text_decoder.norm.weight": "text decoder",
        "vision_model.vae.decoder.linear.weight": "VAE pictures",
    }
    for name, output in parts.items():
        with monkeypatch.context() as patch:
            patch.setattr(hf_convert, "to_transformers", lambda *args, name=name: damaged(name, *args))
            assert f"({output})" in refused(capsys, tmp_path / "out", tiny_model, "--to", "transformers")
    with monkeypatch.context() as patch:  # the padding is attended to
        patch.setattr(hf_convert, "to_transformers", lambda *args: damaged("", *args))
        assert "(text encoder)" in refused(capsys, tmp_path / "out", tiny_model, "--to", "transformers")


def damaged(name: str, *args: Any) -> Any:
    """What `to_transformers` gives, with one tensor doubled, or else another padding."""
    result: Any = to_transformers(*args)
    if name:
        result.state_dict()[name].mul_(2)
    else:
        result.config.text_config.pad_token_id += 1
    return result


def test_a_vae_of_its_own_licence_is_asked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nonexistent")
    source = encoder_model(tmp_path / "source")
    assert "hub" in refused(capsys, tmp_path / "out", source, "--to", "transformers", "--include-vae")
    code, said, err = ov3(capsys, "convert", source, "--out", tmp_path / "out", "--to", "transformers")
    assert code == 0 and "reads latents: no VAE is inside" in said, err
    source = on_a_small_autoencoder(tmp_path)
    code, said, err = ov3(
        capsys, "convert", source, "--out", tmp_path / "with", "--to", "transformers", "--include-vae"
    )
    assert code == 0 and "reads pictures" in said, err


def test_the_embedded_vae_comes_along_from_a_released_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = encoder_model(tmp_path / "own", vae=VAEConfig())
    assert ov3(capsys, "convert", source, "--out", tmp_path / "released", "--to", "released")[0] == 0
    out = tmp_path / "transformers"
    code, said, err = ov3(capsys, "convert", tmp_path / "released", "--out", out, "--to", "transformers")
    assert code == 0 and "reads pictures" in said, err


def test_onnx_of_any_size_with_the_vae(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images in, other grids and batches than those of the export; the weights in a file of their own."""
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 0)  # as for 2 GB
    out_folder = tmp_path / "onnx"
    code, out, err = ov3(capsys, "convert", tiny_model, "--out", out_folder, "--to", "onnx-vae")
    assert code == 0, err
    assert "any size" in out and "decoder, text encoder, text decoder" in out and "VAE" not in out.split("left out")[1]
    assert {path.name for path in out_folder.iterdir()} == {"model.onnx", "model.onnx.data", "README.md"}
    model, exported = openvision3.load(tiny_model, device="cpu"), OnnxEncoder(out_folder / "model.onnx")
    for grid, batch in (((2, 7), 1), ((8, 8), 4)):
        images = random_inputs(model.config, grid, batch, images=True)
        compare(encoder_outputs(model, images, through_vae=True), exported(images), 1e-4, "onnxruntime")


@pytest.mark.slow
def test_onnx_of_scaled_positions_takes_any_size(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source = encoder_model(tmp_path / "scaled", positions="scaled")
    assert ov3(capsys, "convert", source, "--out", tmp_path / "onnx", "--to", "onnx")[0] == 0
    model, exported = openvision3.load(source, vae=None, device="cpu"), OnnxEncoder(tmp_path / "onnx" / "model.onnx")
    latents = random_inputs(model.config, (3, 8), 2)
    compare(encoder_outputs(model, latents), exported(latents), 1e-4, "onnxruntime")


@pytest.mark.slow
def test_onnx_with_an_autoencoder_of_diffusers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """With attention in its middle; the command compares a grid that is not square."""
    source = on_a_small_autoencoder(tmp_path)
    code, out, err = ov3(capsys, "convert", source, "--out", tmp_path / "onnx", "--to", "onnx-vae")
    assert code == 0, err
    assert "pictures of any size" in out and "left out" not in out


def on_a_small_autoencoder(tmp_path: Path) -> Path:
    """An encoder alone on an autoencoder of diffusers shaped like FLUX.1's, both in folders."""
    diffusers: Any = importlib.import_module("diffusers")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 16],
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).save_pretrained(tmp_path / "vae")
    vae = dataclasses.replace(read_config(str(tmp_path / "vae")), latent_shift=0.1159)
    return encoder_model(tmp_path / "own", vae=vae, in_channels=4, encoder=TransformerConfig(32, 1, 2))


def test_what_the_released_layout_has_no_place_for(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path
) -> None:
    """Parts are named; another VAE and scaled positions are kept where open_clip does not look."""
    model = openvision3.load(tiny_model, device="cpu")
    model.config = dataclasses.replace(model.config, positions="scaled")
    model.save(tmp_path / "scaled")
    code, out, err = ov3(capsys, "convert", tmp_path / "scaled", "--out", tmp_path / "there", "--to", "released")
    assert code == 0, err
    assert "left out" in out and "decoder, text encoder, text decoder, VAE" in out
    back = openvision3.load(tmp_path / "there", vae=None, device="cpu")
    assert back.config.positions == "scaled" and not back.config.stored_positions
    latents = random_inputs(back.config, (3, 8), 2)
    scaled = openvision3.load(tmp_path / "scaled", vae=None, device="cpu")
    compare(encoder_outputs(scaled, latents), encoder_outputs(back, latents), 1e-6, "")
    with pytest.raises(OpenVisionError, match="VAE of tiny"):  # not the package's own, which has other weights
        openvision3.load(tmp_path / "there", device="cpu")


@pytest.mark.parametrize(("dtype", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_lower_precision_keeps_the_positions_exact(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, dtype: str, kind: torch.dtype
) -> None:
    source = encoder_model(tmp_path / "own")
    code, out, err = ov3(capsys, "convert", source, "--out", tmp_path / "low", "--to", "released", "--dtype", dtype)
    assert code == 0, err
    state = load_file(tmp_path / "low" / "open_clip_model.safetensors")
    kinds = {name: tensor.dtype for name, tensor in state.items()}
    assert kinds.pop("positional_embedding") == torch.float32 and set(kinds.values()) == {kind}
    assert not openvision3.load(tmp_path / "low", vae=None, device="cpu").config.stored_positions


def test_gelu_by_tanh_is_open_clips_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source = encoder_model(tmp_path / "own", encoder=TransformerConfig(32, 2, 2, mlp_width=72, activation="gelu_tanh"))
    assert ov3(capsys, "convert", source, "--out", tmp_path / "there", "--to", "released")[0] == 0
    encoder = openvision3.load(tmp_path / "there", vae=None, device="cpu").config.encoder
    assert (encoder.activation, encoder.mlp_width) == ("gelu_tanh", 72)


@pytest.mark.parametrize(("name", "tensors"), [("B", 150), ("L", 294)])
def test_sizes_b_and_l_load_strict(name: str, tensors: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By name and shape, both ways: into open_clip's tower, and from a file of those tensors; no memory for weights."""
    with torch.device("meta"):
        model = OpenVision3(ModelConfig(name, encoder=SIZES[name], vae=flux_config("released"), **PARTS))
    state = open_clip.released_state(model)
    assert len(state) == tensors and state["proj"].shape == (SIZES[name].width, 768)
    (tmp_path / CONFIG).write_text(json.dumps(open_clip.released_config(model.config)))
    monkeypatch.setattr(open_clip, "read_state", lambda folder: state)
    tower = open_clip.open_clip_tower(tmp_path)
    assert tower is not None and {k: v.shape for k, v in tower.state_dict().items()} == {
        k: v.shape for k, v in state.items()
    }
    monkeypatch.setattr(open_clip, "read_state", lambda folder: state | {"ln_pre.weight": state["ln_post.weight"]})
    with pytest.raises(OpenVisionError, match="ln_pre"):
        open_clip.open_clip_tower(tmp_path)

    zeros = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in state.items()}
    monkeypatch.setattr(released, "read_state", lambda folder: zeros)
    loaded = released.load_released(tmp_path, vae=None)
    assert loaded.config.encoder == dataclasses.replace(SIZES[name], mlp_width=4 * SIZES[name].width)
    monkeypatch.setattr(released, "read_state", lambda folder: {k: v for k, v in zeros.items() if k != "proj"})
    with pytest.raises(OpenVisionError, match="lack proj"):
        released.load_released(tmp_path, vae=None)


@pytest.mark.parametrize("name", SIZES)
def test_every_size_is_described_exactly(name: str, tmp_path: Path) -> None:
    """So400m's MLP is no whole multiple of its width; open_clip rounds the product down."""
    size = SIZES[name]
    config = ModelConfig(tmp_path.name, encoder=size, vae=flux_config("released"), **PARTS)
    (tmp_path / CONFIG).write_text(json.dumps(open_clip.released_config(config)))
    mlp_width = size.mlp_width or 4 * size.width
    expected = dataclasses.replace(config, encoder=dataclasses.replace(size, mlp_width=mlp_width))
    assert released.read_released_config(tmp_path) == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"input": "pixels", "in_channels": 3, "patch_size": 16, "vae": VAEConfig()}, "pixels"),
        ({"encoder": TransformerConfig(32, 1, 2, activation="relu_squared")}, "relu_squared"),
    ],
)
def test_what_the_layout_cannot_express_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    source = encoder_model(tmp_path / "source", **changes)
    assert words in refused(capsys, tmp_path / "out", source, "--to", "released")
    if words == "pixels":
        assert "already takes images" in refused(capsys, tmp_path / "out", source, "--to", "onnx-vae")


def test_another_librarys_encoder_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    clip = save_transformers(tmp_path / "clip", "clip_vision_model")
    external = ExternalEncoderConfig(str(clip))
    source = encoder_model(tmp_path / "source", image_size=32, vae=VAEConfig(), external=external)
    capsys.readouterr()  # transformers' progress bar
    for form in ("folder", "released", "onnx", "onnx-vae", "transformers"):
        assert "another library's encoder" in refused(capsys, tmp_path / "out", source, "--to", form)
    with pytest.raises(OpenVisionError, match="another library's encoder"):
        open_clip.released_state(OpenVision3.load(source, vae=None))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--to", "onnx", "--dtype", "bf16"], "fp32"),
        (["--to", "transformers", "--dtype", "bf16"], "from_pretrained"),
        (["--to", "onnx", "--include-vae"], "--include-vae"),
        (["--to", "released", "--size", "64"], "--size"),
        (["--bin"], "--bin"),
        (["--to", "onnx", "--size", "40"], "multiple of 16"),
    ],
)
def test_options_that_do_not_fit_the_form(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: list[str], words: str
) -> None:
    assert words in refused(capsys, tmp_path / "out", GOLDEN, *options)


def test_a_wrong_conversion_leaves_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two norms exchanged by the writer; a reloaded folder that differs; an ONNX file above its bound."""
    names = dict(released.released_names(2))
    norms = [f"transformer.resblocks.0.{norm}.weight" for norm in ("ln_1", "ln_2")]
    names[norms[0]], names[norms[1]] = names[norms[1]], names[norms[0]]
    with monkeypatch.context() as patch:
        patch.setattr(open_clip, "released_names", lambda depth: names.items())
        assert "differ" in refused(capsys, tmp_path / "out", GOLDEN, "--to", "released")
    with monkeypatch.context() as patch:
        save = OpenVision3.save

        def damaged(model: OpenVision3, *args: Any, **options: Any) -> None:
            with torch.no_grad():
                model.encoder.projection.weight[0, 0] += 0.01
                save(model, *args, **options)
                model.encoder.projection.weight[0, 0] -= 0.01

        patch.setattr(OpenVision3, "save", damaged)
        assert "(pooled)" in refused(capsys, tmp_path / "out", GOLDEN)
    with monkeypatch.context() as patch:
        patch.setattr(command, "ONNX_TOLERANCE", 1e-12)
        assert "onnxruntime" in refused(capsys, tmp_path / "out", GOLDEN, "--to", "onnx")


def test_every_part_of_a_model_folder_is_compared(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {
        "decoder.output.weight": "decoder",
        "token_rms": "token rms",
        "text_encoder.projection.weight": "text encoder",
        "logit_scale": "temperature",
        "text_decoder.norm.weight": "text decoder",
        "vae.encoder.linear.weight": "VAE latents",
        "vae.decoder.linear.weight": "VAE pictures",
    }
    load = openvision3.load
    for name, output in parts.items():
        calls = []

        def load_damaged(*args: Any, name: str = name, calls: list[int] = calls, **options: Any) -> OpenVision3:
            model = load(*args, **options)
            calls.append(1)
            if len(calls) == 2:  # what was written
                model.state_dict()[name].mul_(2)
            return model

        monkeypatch.setattr(openvision3, "load", load_damaged)
        assert f"({output})" in refused(capsys, tmp_path / "out", tiny_model)


def test_nothing_of_value_is_overwritten(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert = ["convert", GOLDEN, "--out", out, "--to", "released"]
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    assert "holds something" in ov3(capsys, *convert, "--overwrite")[2]
    assert "exists already" in ov3(capsys, *convert)[2]
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    (out / "thesis.txt").unlink()
    assert ov3(capsys, *convert, "--bin")[0] == 0
    assert "exists already" in ov3(capsys, *convert)[2]
    assert "holds something" in ov3(capsys, "convert", GOLDEN, "--out", out, "--overwrite")[2]
    (out / "notes.txt").write_text("mine")
    assert ov3(capsys, *convert, "--overwrite")[0] == 0
    names = {path.name for path in out.iterdir()}
    assert names == {
        CONFIG,
        "open_clip_model.safetensors",
        "README.md",
        "notes.txt",
    }  # no stale .bin beside new weights
    (tmp_path / "file").touch()
    assert "is a file" in ov3(capsys, "convert", GOLDEN, "--out", tmp_path / "file" / "out")[2]


def test_another_librarys_folders_are_not_overwritten(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path
) -> None:
    """Nor a run's, nor a model of another form, whatever their files are called."""
    clip, own = save_transformers(tmp_path / "clip", "clip"), tmp_path / "own"
    open_clip_folder = save_open_clip(tmp_path / "open_clip", OPEN_CLIP_VIT)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"recipe": "demo"}')
    shutil.copytree(tiny_model, own)
    (own / "README.md").unlink()
    taken = [(clip, "folder"), (clip, "transformers"), (open_clip_folder, "released"), (run, "folder")]
    for out, to in [*taken, (own, "transformers")]:
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        line = ov3(capsys, "convert", tiny_model, "--out", out, "--to", to, "--overwrite")[2]
        assert "no model of this form" in line, (out, to)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_what_comes_during_the_work_is_not_overwritten(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, write = tmp_path / "out", command.write

    def write_slowly(*args: Any) -> str:
        out.mkdir()
        (out / "config.json").write_text("mine")
        return write(*args)

    monkeypatch.setattr(command, "write", write_slowly)
    assert "exists already" in ov3(capsys, "convert", tiny_model, "--out", out)[2]
    assert [path.name for path in out.iterdir()] == ["config.json"]


def test_no_file_that_was_written_is_left_behind(tmp_path: Path) -> None:
    stage = tmp_path / "stage"
    stage.mkdir()
    for name in ("README.md", "config.json", "merges.txt"):
        (stage / name).touch()
    with pytest.raises(AssertionError):
        command.install(stage, tmp_path / "out", command.FILES["transformers"])


def change_state(folder: Path, change: Any) -> None:
    state = torch.load(folder / BIN, weights_only=True)
    torch.save(change(state), folder / BIN)


def as_safetensors(folder: Path, cut: int) -> None:
    save_file(torch.load(folder / BIN, weights_only=True), folder / "open_clip_model.safetensors")
    content = (folder / "open_clip_model.safetensors").read_bytes()
    (folder / "open_clip_model.safetensors").write_bytes(content[:cut])


DAMAGES: dict[str, tuple[Any, str]] = {
    "random bytes": (lambda f: (f / BIN).write_bytes(bytes(range(256)) * 40), "can't be read"),
    "empty": (lambda f: (f / BIN).write_bytes(b""), "can't be read"),
    "truncated": (lambda f: as_safetensors(f, 5000), "can't be read"),
    "truncated header": (lambda f: as_safetensors(f, 20), "can't be read"),
    "no weights": (lambda f: (f / BIN).unlink(), "no weights"),
    "missing": (
        lambda f: change_state(f, lambda s: {k: v for k, v in s.items() if k != "ln_post.bias"}),
        "ln_post.bias",
    ),
    "extra": (lambda f: change_state(f, lambda s: s | {"ln_pre.weight": torch.ones(64)}), "ln_pre.weight"),
    "shape": (lambda f: change_state(f, lambda s: s | {"proj": torch.zeros(64, 47)}), "(47, 64)"),
    "integers": (lambda f: change_state(f, lambda s: s | {"proj": torch.zeros(64, 48).long()}), "torch.int64"),
    "not finite": (lambda f: change_state(f, lambda s: s | {"proj": torch.full((64, 48), torch.nan)}), "not finite"),
    "no JSON": (lambda f: (f / CONFIG).write_text('{"model_cfg": '), "not valid JSON"),
    "nested": (lambda f: (f / CONFIG).write_text("[" * 200_000), "not valid JSON"),
    "unbounded": (lambda f: change_state(f, lambda s: s | {"proj": torch.zeros(()).expand(2**19, 2**18)}), "proj"),
    "endless": (
        lambda f: (f / CONFIG).write_text((f / CONFIG).read_text().replace("64", "1e999")),
        "does not describe",
    ),
    "other": (lambda f: (f / CONFIG).write_text((f / CONFIG).read_text().replace("avg", "tok")), "pool_type"),
}


@pytest.mark.parametrize("to", ["folder", "released", "onnx", "transformers"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_released_sources(capsys: pytest.CaptureFixture[str], tmp_path: Path, damage: str, to: str) -> None:
    source = save_released(tmp_path / "source")
    change, words = DAMAGES[damage]
    change(source)
    assert words in refused(capsys, tmp_path / "out", source, "--to", to)


OWN_DAMAGES: dict[str, tuple[Any, str]] = {
    "truncated": (
        lambda f, s: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:999]),
        "safe",
    ),
    "random bytes": (lambda f, s: (f / "model.safetensors").write_bytes(bytes(range(256)) * 40), "model.safetensors"),
    "random pickle": (lambda f, s: pickled(f, None), "weights.bin is refused"),
    "missing": (lambda f, s: pickled(f, {k: v for k, v in s.items() if k != "logit_scale"}), "weights.bin lacks logit"),
    "extra": (lambda f, s: pickled(f, s | {"more": torch.ones(1)}), "weights.bin holds more"),
    "shape": (lambda f, s: pickled(f, s | {"encoder.class_token": torch.ones(31)}), "weights.bin: encoder.class_token"),
    "unbounded": (
        lambda f, s: pickled(f, s | {"logit_scale": torch.zeros(()).expand(2**19, 2**18)}),
        "does not hold all the numbers of logit_scale",
    ),
    "sparse": (lambda f, s: pickled(f, s | {"logit_scale": torch.eye(3).to_sparse()}), "weights.bin is refused"),
    "no JSON": (lambda f, s: (f / "config.json").write_text("{"), "config.json"),
    "misspelt": (lambda f, s: (f / "config.json").write_text('{"format_version": 1, "model": {"widht": 1}}'), "widht"),
}


def pickled(folder: Path, state: dict[str, Tensor] | None) -> None:
    (folder / "model.safetensors").unlink()
    if state is None:
        (folder / "weights.bin").write_bytes(bytes(range(256)) * 40)
    else:
        torch.save(state, folder / "weights.bin")


@pytest.mark.parametrize("to", ["folder", "released", "onnx-vae"])
@pytest.mark.parametrize("damage", OWN_DAMAGES)
def test_damaged_model_folders(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path, damage: str, to: str
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_model, source)
    change, words = OWN_DAMAGES[damage]
    change(source, load_file(source / "model.safetensors"))
    line = refused(capsys, tmp_path / "out", source, "--to", to)
    assert words in line and "ov3-convert-" not in line
