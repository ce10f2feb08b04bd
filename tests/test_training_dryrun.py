"""What `--dry-run` says, and that what it says of memory and missing parts is so."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import make_vae, tiny_config

from openvision3.config import DataConfig, OpenVisionError, TextEncoderConfig, TransformerConfig, VAEConfig
from openvision3.data.tokenizer import demo_tokenizer
from openvision3.model.openvision3 import OpenVision3
from openvision3.recipes import RECIPES
from openvision3.training.dryrun import dry_run, missing_parts, training_flops
from openvision3.training.memory import activation_bytes
from openvision3.vae import load_vae

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> VAEConfig:
    return make_vae(tmp_path_factory.mktemp("vae"))


def test_text_names_sizes_steps_and_rates(tmp_path: Path, vae: VAEConfig) -> None:
    config = tiny_config(tmp_path / "run", vae, steps=6)
    text = dry_run(replace(config, micro_batch=2), "cpu")
    model = OpenVision3(config.model, load_vae(vae), demo_tokenizer())
    for part, count in model.num_parameters().items():
        assert any(line.split()[:2] == [part, f"{count:,}"] for line in text.splitlines()), part
    assert "stage 1: 32 px, 4 steps of 4 samples (2 at a time), 16 samples" in text
    assert "peak rate 0.00156 (base 0.1 x 4 / 256), warm-up over 4 samples, cosine to 0; lambda 0" in text
    assert "nothing is missing" in text and '"pixel_stride": 2' in text
    assert not (tmp_path / "run").exists()


def test_pixel_models_have_no_line_of_the_vae(tmp_path: Path, vae: VAEConfig) -> None:
    config = tiny_config(tmp_path / "run", vae, steps=6)
    assert "of the VAE's decoder)" in dry_run(config, "cpu")
    model = replace(config.model, input="pixels", in_channels=3, patch_size=16)
    assert "VAE's decoder" not in dry_run(replace(config, model=model), "cpu")


def test_missing_parts_are_named(tmp_path: Path, vae: VAEConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OV3_CACHE", str(tmp_path / "cache"))
    config = tiny_config(tmp_path / "run", vae, lpips=0.5, init=str(tmp_path / "init"))
    bert = TextEncoderConfig(TransformerConfig(16, 1, 2), context_length=8)
    config = replace(
        config,
        data=DataConfig(source=str(tmp_path / "tars")),
        model=replace(config.model, text_encoder=bert, text_decoder=None, vae=VAEConfig(source=str(tmp_path / "vae"))),
    )
    kinds = [line.partition(":")[0] for line in missing_parts(config)]
    assert kinds == ["data", "init", "VAE", "the tokenizer's vocabulary", "LPIPS weights"]
    text = dry_run(config, "cpu")
    assert text.count("\nmissing: ") == 5 and "without the VAE" in text
    with pytest.raises(OpenVisionError, match="nothing to train"):
        dry_run(replace(config, stage1=replace(config.stage1, samples=0), stage2=replace(config.stage2, samples=0)))


@pytest.mark.parametrize("recipe", ["demo_vae", "paper_b16"])
def test_recipes_can_be_described(recipe: str) -> None:
    assert f"recipe {recipe}" in dry_run(RECIPES[recipe](), "cpu")


def test_memory_is_what_a_real_pass_keeps(vae: VAEConfig) -> None:
    config = tiny_config(Path("unused"), vae)
    model = OpenVision3(config.model, load_vae(vae), demo_tokenizer())
    assert model.text_encoder is not None
    kept: dict[int, torch.UntypedStorage] = {}
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    def real(samples: int) -> int:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model.embed_text_ids(torch.ones(2 * samples, 16, dtype=torch.long))
        assert output.requires_grad
        return sum(storage.nbytes() for address, storage in kept.items() if address not in own)

    found = activation_bytes(config, 32, CPU, "fp32", model.vae)
    assert found["text_encoder"] == (real(3) - real(1)) / 2 > 0
    assert set(found) == {"encoder", "decoder", "text_encoder", "text_decoder", "vae_decoder"}
    recomputed = activation_bytes(replace(config, checkpoint_blocks=True), 32, CPU, "fp32", model.vae)
    assert 0 < recomputed["encoder"] < 0.5 * found["encoder"]
    assert recomputed["vae_decoder"] == found["vae_decoder"]


def test_flops_of_training_count_every_pass(vae: VAEConfig) -> None:
    config = tiny_config(Path("unused"), vae)  # pixels of every other sample
    forward = {"encoder": 1.0, "decoder": 10.0, "text_encoder": 100.0, "text_decoder": 1e3, "vae_encoder": 1e4}
    forward |= {"vae_decoder": 1e5}
    assert training_flops(config, forward, two_passes=False) == 3 + 30 + 600 + 3e3 + 1e4 + 1e5
    assert training_flops(config, forward, two_passes=True) == 4 + 30 + 800 + 3e3 + 1e4 + 1e5
