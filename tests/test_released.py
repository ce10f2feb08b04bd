"""The released format: a golden checkpoint, its key names, and everything that does not fit it."""

import hashlib
import json
import shutil
import tempfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import openvision3
from openvision3.config import OpenVisionError, VAEConfig, to_dict
from openvision3.hub.encoders import weights_sha256
from openvision3.hub.released import download, load_released
from openvision3.model.blocks import sincos_positions
from openvision3.model.openvision3 import OpenVision3

GOLDEN = Path(__file__).parent / "golden" / "released-format-tiny"
BIN = "open_clip_pytorch_model.bin"


@pytest.fixture
def folder(tmp_path):
    for name in ("open_clip_config.json", BIN):
        shutil.copy(GOLDEN / name, tmp_path)
        (tmp_path / name).chmod(0o644)
    return tmp_path


def change_weights(folder, change):
    state = torch.load(folder / BIN, weights_only=True)
    torch.save(change(state) or state, folder / BIN)


def change_config(folder, **changes):
    path = folder / "open_clip_config.json"
    data = json.loads(path.read_text())
    data["model_cfg"]["vision_cfg"].update(changes)
    path.write_text(json.dumps(data))


def change_vae(folder, **changes):
    path = folder / "open_clip_config.json"
    data = json.loads(path.read_text()) | {"openvision3": {"vae": to_dict(VAEConfig()) | changes}}
    path.write_text(json.dumps(data))


@torch.no_grad()
def outputs(model, latents):
    tokens = model.encode_latents(latents)
    return tokens, model.pool(tokens, normalize=False)


def test_golden_outputs():
    expected = load_file(GOLDEN / "expected.safetensors")
    model = openvision3.load(GOLDEN, vae=None, device="cpu")
    tokens, pooled = outputs(model, expected["latents"])
    assert (tokens - expected["tokens"]).abs().max() <= 1e-5
    assert (pooled - expected["pooled"]).abs().max() <= 1e-5
    assert model.config.image_size == 64 and model.config.vae.latent_scale == 0.3611
    assert model.config.vae.latent_shift == 0.0  # the trap: diffusers' convention subtracts 0.1159


def test_prefixed_safetensors_are_the_same(folder):
    state = torch.load(folder / BIN, weights_only=True)
    text = {"text.token_embedding": torch.zeros(2), "logit_scale": torch.zeros(())}
    save_file({f"visual.{name}": t for name, t in state.items()} | text, folder / "open_clip_model.safetensors")
    (folder / BIN).unlink()
    expected = load_file(GOLDEN / "expected.safetensors")
    tokens, _ = outputs(load_released(folder, vae=None), expected["latents"])
    assert (tokens - expected["tokens"]).abs().max() <= 1e-5


def test_a_table_that_the_formula_gives_is_not_kept(folder):
    table = torch.cat([torch.zeros(1, 64), sincos_positions((4, 4), 64)])
    change_weights(folder, lambda state: state.update(positional_embedding=table))
    model = load_released(folder, vae=None)
    assert not model.config.stored_positions and "encoder.positions" not in model.state_dict()
    table[5, 7] += 0.01
    change_weights(folder, lambda state: state.update(positional_embedding=table))
    assert load_released(folder, vae=None).config.stored_positions


def test_it_can_be_saved_as_a_model_folder(folder, tmp_path):
    latents = torch.randn(1, 16, 8, 12)
    model = load_released(folder, vae=None)
    model.save(tmp_path / "ours")
    again = OpenVision3.load(tmp_path / "ours", vae=None)
    assert again.config == model.config
    for ours, theirs in zip(outputs(again, latents), outputs(model, latents), strict=True):
        assert torch.equal(ours, theirs)


def test_what_it_lacks_is_named():
    model = load_released(GOLDEN, vae=None)
    with pytest.raises(OpenVisionError, match="no decoder.*`ov3 train attach_decoder --init MODEL`"):
        model.decode_latents(torch.zeros(1, 16, 64))
    with pytest.raises(OpenVisionError, match="no text encoder.*`ov3 train attach_text --init MODEL`"):
        model.embed_text(["a panda"])


TRACE = Path(tempfile.gettempdir()) / "ov3-test-pickle-ran"  # what the pickle would leave behind


class Malicious:
    def __reduce__(self):
        return (TRACE.touch, ())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / BIN).unlink(), "no weights"),
        (lambda f: (f / BIN).write_bytes(b"rubbish"), "can't be read"),
        (lambda f: (f / BIN).write_bytes((f / BIN).read_bytes()[:1000]), "can't be read"),
        (lambda f: torch.save({"conv1.weight": Malicious()}, f / BIN), "can't be read"),
        (lambda f: torch.save([torch.zeros(1)], f / BIN), "table of tensors"),
        (lambda f: change_weights(f, lambda s: {k: v for k, v in s.items() if k != "proj"}), "lack proj"),
        (lambda f: change_weights(f, lambda s: s.update(extra=torch.zeros(1))), "hold extra"),
        (lambda f: change_weights(f, lambda s: s.update(class_embedding=torch.zeros(3))), r"class_token.*\(3,\)"),
        (lambda f: change_weights(f, lambda s: s.update(proj=torch.zeros(3))), r"projection.*\(3,\)"),
        (
            lambda f: change_weights(f, lambda s: s.update(positional_embedding=torch.zeros(9, 64))),
            r"positions.*\(9, 64\)",
        ),
        (lambda f: change_config(f, layers=3), r"lack transformer.resblocks.2"),
        (lambda f: change_config(f, no_ln_pre=False), "no_ln_pre"),
        (lambda f: change_config(f, pool_type="tok"), "pool_type"),
        (lambda f: change_config(f, width="wide"), "does not describe"),
        (lambda f: change_config(f, head_width=0), "positive"),
        (lambda f: change_config(f, image_size=7), "multiple"),
        (lambda f: (f / "open_clip_config.json").write_text("{}"), "does not describe"),
        (lambda f: (f / "open_clip_config.json").write_text("no"), "not valid JSON"),
        (lambda f: (f / "open_clip_config.json").write_text("[]"), "expected a table"),
        (lambda f: (f / "open_clip_config.json").write_text('{"model_cfg": []}'), "does not describe"),
        (lambda f: (f / "open_clip_config.json").write_text("{" + " " * 2_000_000 + "}"), "larger than"),
        (lambda f: change_config(f, layers=10**12), "open_clip_config.json: depth 1000000000000"),
        (lambda f: change_config(f, image_size=10**6), "image_size is 8000000"),
        (lambda f: change_vae(f, factor=0), "factor is 0"),
        (lambda f: change_vae(f, latent_scale=0.0), "latent_scale .* 0"),
        (lambda f: change_weights(f, lambda s: s.update(proj=torch.zeros(()).expand(2**19, 2**18))), "numbers of proj"),
        (lambda f: change_weights(f, lambda s: s.update(proj=torch.eye(3).to_sparse())), "numbers of proj"),
    ],
)
def test_what_does_not_fit_gives_one_clear_line(folder, damage, words):
    TRACE.unlink(missing_ok=True)
    damage(folder)
    with pytest.raises(OpenVisionError, match=words) as caught:
        load_released(folder, vae=None)
    assert "\n" not in str(caught.value)
    assert not TRACE.exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no/such/folder", "does not exist"),
        ("nonsense", "does not exist"),
        ("./missing", "does not exist"),
        ("bad name/with spaces", "hub id"),
        (str(GOLDEN / BIN), "is a file"),
        ("UCSC-VLAA/openvision3-vit-base-patch2-32", "hub"),
    ],
)
def test_names_that_lead_nowhere(name, words, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nonexistent")
    with pytest.raises(OpenVisionError, match=words):
        openvision3.load(name)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["open_clip_config.json", "open_clip_model.safetensors", BIN], "open_clip_model.safetensors"),
        (["open_clip_config.json", BIN], BIN),
        (["open_clip_config.json", BIN, "config.json", "model.safetensors", "pytorch_model.bin"], BIN),
        (["open_clip_config.json", "model.safetensors"], "model.safetensors"),
        (["config.json", "model.safetensors", "pytorch_model.bin"], "model.safetensors"),
        (["config.json", "pytorch_model.bin"], "pytorch_model.bin"),
    ],
)
def test_one_copy_of_the_weights_is_fetched_and_hashed(files, expected, monkeypatch, tmp_path):
    """That which the folder's kind reads; open_clip reads no weights of transformers where it has its own."""

    def snapshot_download(repo_id, allow_patterns):
        for name in files:
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (tmp_path / name).write_text(name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert download("someone/encoder") == tmp_path
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".json"} == {expected}
    for name in files:
        (tmp_path / name).write_text(name)
    assert weights_sha256(tmp_path) == hashlib.sha256(expected.encode()).hexdigest()


def test_importing_the_package_is_light():
    import subprocess
    import sys

    code = "import sys, openvision3; assert openvision3.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(openvision3.__file__).parents[1]).returncode == 0
