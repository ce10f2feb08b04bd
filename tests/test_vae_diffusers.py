"""Autoencoders of diffusers behind the frozen interface, on randomly initialised folders that diffusers saved."""

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from openvision3.config import OpenVisionError, VAEConfig
from openvision3.vae_diffusers import FLUX_SHA256, flux_config, load_diffusers_vae, read_config, taef1_config

diffusers: Any = importlib.import_module("diffusers")  # its lazy exports are unknown to type checkers


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a small AutoencoderKL shaped like FLUX.1's (no quant convolutions) and of a small AutoencoderTiny."""
    root = tmp_path_factory.mktemp("autoencoders")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[8, 8, 16],
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).save_pretrained(root / "kl")
    diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
        latent_channels=6,
    ).save_pretrained(root / "tiny")
    return {"kl": root / "kl", "tiny": root / "tiny"}


def pictures(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_read_config(folders: dict[str, Path]) -> None:
    kl, tiny = read_config(str(folders["kl"])), read_config(str(folders["tiny"]))
    assert (kl.kind, kl.channels, kl.factor, kl.latent_scale, kl.latent_shift) == ("diffusers", 4, 4, 0.3611, 0.1159)
    assert (tiny.channels, tiny.factor, tiny.latent_scale, tiny.latent_shift) == (6, 8, 1.0, 0.0)
    assert len(kl.sha256) == 64 and kl.sha256 != tiny.sha256
    assert load_diffusers_vae(str(folders["kl"])).config == kl


def test_null_shift_is_zero(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["kl"], tmp_path / "vae")  # also: the source may be a pipeline's folder
    config = json.loads((tmp_path / "vae/config.json").read_text())
    (tmp_path / "vae/config.json").write_text(json.dumps({**config, "shift_factor": None}))
    assert read_config(str(tmp_path)).latent_shift == 0.0


@pytest.mark.parametrize("shift", [0.0, 0.1159])
def test_latents_are_the_scaled_posterior_mean_on_a_picture_that_is_not_square(
    folders: dict[str, Path], shift: float
) -> None:
    vae = load_diffusers_vae(VAEConfig("diffusers", str(folders["kl"]), 4, 4, 0.3611, shift))
    raw = diffusers.AutoencoderKL.from_pretrained(folders["kl"])
    images = pictures(2, 3, 32, 48)
    with torch.no_grad():
        z = raw.encode(images).latent_dist.mean
        latents = vae.encode(images)
        assert latents.shape == (2, 4, 8, 12)
        torch.testing.assert_close(latents, (z - shift) * 0.3611)
        assert torch.equal(latents, vae.encode(images))  # the mean, not a sample
        decoded = vae.decode(latents)
        assert decoded.shape == images.shape
        torch.testing.assert_close(decoded, raw.decode(z).sample)


def test_autoencoder_tiny_in_both_conventions(folders: dict[str, Path]) -> None:
    raw = diffusers.AutoencoderTiny.from_pretrained(folders["tiny"])
    images = pictures(1, 3, 16, 40)
    for shift in (0.0, -0.0419):
        vae = load_diffusers_vae(VAEConfig("diffusers", str(folders["tiny"]), 6, 8, 1.0, shift))
        with torch.no_grad():
            z = raw.encode(images).latents
            latents = vae.encode(images)
            assert latents.shape == (1, 6, 2, 5)
            torch.testing.assert_close(latents, z - shift)
            torch.testing.assert_close(vae.decode(latents), raw.decode(z).sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["kl", "tiny"])
def test_gradients_reach_latents_and_pixels_but_no_weight(folders: dict[str, Path], name: str) -> None:
    vae = load_diffusers_vae(read_config(str(folders[name]))).train()
    assert not any(module.training for module in vae.modules())
    images = pictures(1, 3, 16, 24).requires_grad_()
    latents = vae.encode(images).detach().requires_grad_()
    vae.decode(latents).square().sum().backward()
    vae.encode(images).square().sum().backward()
    for tensor in (latents, images):
        assert tensor.grad is not None and tensor.grad.abs().sum() > 0
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in vae.parameters())


def test_precision(folders: dict[str, Path]) -> None:
    config = read_config(str(folders["kl"]))
    with pytest.raises(OpenVisionError, match="float16"):
        load_diffusers_vae(config, dtype=torch.float16)
    with pytest.raises(OpenVisionError, match="float16"):
        load_diffusers_vae(config).half()
    images = pictures(1, 3, 16, 16)
    vae = load_diffusers_vae(config)
    exact = vae.encode(images)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(vae.encode(images), exact)
    bf16 = load_diffusers_vae(config, dtype=torch.bfloat16)
    latents = bf16.encode(images)
    assert latents.dtype == torch.float32  # the caller's type: only the network runs in bf16
    assert 0 < (latents - exact).abs().max() < 0.05


def test_loading_draws_no_random_numbers(folders: dict[str, Path]) -> None:
    state = torch.get_rng_state()
    load_diffusers_vae(read_config(str(folders["kl"])))
    assert torch.equal(state, torch.get_rng_state())


def test_conventions_of_flux() -> None:
    released, usual = flux_config(), flux_config("diffusers", "some/folder")
    assert (released.channels, released.factor, released.latent_scale, released.latent_shift) == (16, 8, 0.3611, 0.0)
    assert (usual.latent_shift, usual.source, usual.sha256) == (0.1159, "some/folder", FLUX_SHA256)
    assert "Apache-2.0" in released.licence and "non-commercial" in released.licence
    z, small = torch.randn(5), taef1_config()
    as_taef1 = (z - 0.1159) * 0.3611  # what TAEF1 gives
    torch.testing.assert_close((as_taef1 - small.latent_shift) * small.latent_scale, z * released.latent_scale)
    with pytest.raises(OpenVisionError, match="convention"):
        flux_config("other")


def test_wrong_weights_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    config = read_config(str(folders["kl"]))
    copy = tmp_path / "copy"
    shutil.copytree(folders["kl"], copy)
    weights = copy / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["encoder.conv_in.bias"] += 1
    save_file(tensors, weights, {"format": "pt"})
    here = VAEConfig("diffusers", str(copy), 4, 4, 0.3611, 0.0, config.sha256)
    with pytest.raises(OpenVisionError, match="sha256"):
        load_diffusers_vae(here)
    del tensors["encoder.conv_in.bias"]
    save_file(tensors, weights, {"format": "pt"})
    unchecked = VAEConfig("diffusers", str(copy), 4, 4)
    with pytest.raises(OpenVisionError, match=r"lack 1 tensors .*encoder.conv_in.bias"):
        load_diffusers_vae(unchecked)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(OpenVisionError, match="does not load"):
        load_diffusers_vae(unchecked)
    weights.rename(copy / "diffusion_pytorch_model.bin")
    with pytest.raises(OpenVisionError, match="pickle"):
        load_diffusers_vae(unchecked)
    (copy / "diffusion_pytorch_model.bin").unlink()
    with pytest.raises(OpenVisionError, match=r"holds no diffusion_pytorch_model.safetensors"):
        load_diffusers_vae(unchecked)


def test_wrong_configs_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(OpenVisionError, match="has 4 channels and factor 4, its config says 16 and 8"):
        load_diffusers_vae(VAEConfig("diffusers", str(folders["kl"])))
    with pytest.raises(OpenVisionError, match="not a folder"):
        load_diffusers_vae(VAEConfig("diffusers", str(tmp_path / "nowhere")))
    with pytest.raises(OpenVisionError, match="config.json"):
        load_diffusers_vae(VAEConfig("diffusers", str(tmp_path)))
    for text in ("not json", "[]", '{"_class_name": "UNet2DModel"}', '{"_class_name": "AutoencoderKLOutput"}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(OpenVisionError, match="config.json"):
            read_config(str(tmp_path))


def test_gated_and_unreachable_hub_ids_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def gated(*args: object, **kwargs: object) -> str:
        raise GatedRepoError.__new__(GatedRepoError)  # its arguments differ between the hub library's versions

    def offline(*args: object, **kwargs: object) -> str:
        raise LocalEntryNotFoundError("no connection\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gated)
    with pytest.raises(OpenVisionError) as caught:
        load_diffusers_vae(flux_config())
    for words in ("FLUX.1-schnell is gated", "Apache-2.0", "accept its conditions on https://", "HF_TOKEN", "folder"):
        assert words in str(caught.value)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(OpenVisionError, match=r"no connection\. Go online, or put its config.json") as caught:
        load_diffusers_vae(flux_config())
    assert "\n" not in str(caught.value)
