"""The embedded tiny VAE, its interface and its training."""

import dataclasses
import json

import pytest
import torch

from openvision3.config import OpenVisionError, TinyVAEConfig, VAEConfig, VAETrainConfig
from openvision3.data import demo
from openvision3.training import vae_training
from openvision3.training.checkpoint import latest_checkpoint
from openvision3.vae import TINY_FOLDER, TinyVAE, load_tiny_vae, load_vae

SMALL = TinyVAEConfig((8, 8, 16), (1, 1, 1), (8, 8, 16), (1, 1, 1))
CONFIG = VAETrainConfig(
    "demo_vae", SMALL, resolution=64, samples=48, warmup_samples=8, batch_size=8, lpips_weight=0.0, precision="fp32",
    num_workers=0, log_every=1, checkpoint_every=16, eval_every=0,
)  # fmt: skip


@pytest.fixture(autouse=True)
def few_statistics(monkeypatch):
    monkeypatch.setattr(vae_training, "_STATISTICS_PICTURES", 64)
    monkeypatch.setattr(vae_training, "_landscapes", lambda size: vae_training._scenes(size, 2))


def test_embedded_vae_fits_its_limits():
    assert (TINY_FOLDER / "model.safetensors").stat().st_size <= 6_000_000
    vae = load_vae("tiny")
    assert sum(parameter.numel() for parameter in vae.parameters()) <= 3_000_000
    assert (vae.config.factor, vae.config.channels, vae.training) == (8, 16, False)
    assert not any(parameter.requires_grad for parameter in vae.parameters())


def test_embedded_vae_reconstructs_held_out_landscapes():
    pictures = torch.stack([torch.from_numpy(p).permute(2, 0, 1) for _, p in list(demo.landscape_crops(128))[::6]])
    vae = load_tiny_vae()
    figures = vae_training.evaluate(vae, {"landscapes": pictures}, torch.device("cpu"))
    assert figures["psnr_landscapes"] > 32
    latents = vae.encode(pictures.float() / 127.5 - 1)
    assert 0.5 < latents.std() < 2 and latents.mean().abs() < 0.5  # scaled


def test_latents_of_any_grid_and_what_is_far_away_does_not_matter():
    vae = load_tiny_vae()
    images = torch.rand(1, 3, 64, 192) * 2 - 1
    latents = vae.encode(images)
    assert latents.shape == (1, 16, 8, 24) and vae.decode(latents).shape == images.shape
    changed = images.clone()
    changed[..., 160:] = 0
    assert torch.allclose(vae.encode(changed)[..., :8], latents[..., :8], atol=1e-6)
    with pytest.raises(ValueError, match="multiples of 8"):
        vae.encode(torch.zeros(1, 3, 60, 64))
    with pytest.raises(ValueError, match="16"):
        vae.decode(torch.zeros(1, 4, 8, 8))


def test_convention_is_applied_and_inverted():
    plain = load_tiny_vae()
    shifted = load_vae(dataclasses.replace(VAEConfig(), latent_scale=0.3611, latent_shift=0.1159))
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    assert torch.allclose(shifted.encode(images), (plain.encode(images) - 0.1159) * 0.3611, atol=1e-6)
    assert torch.allclose(shifted.decode(shifted.encode(images)), plain.decode(plain.encode(images)), atol=1e-5)


def test_gradient_reaches_latents_and_no_weight():
    vae = load_tiny_vae().train()
    latents = torch.zeros(1, 16, 4, 4, requires_grad=True)
    vae.decode(latents).sum().backward()
    assert latents.grad is not None and latents.grad.abs().sum() > 0 and not vae.training


def test_broken_folder_is_one_line(tmp_path):
    with pytest.raises(OpenVisionError, match="does not exist"):
        load_tiny_vae(tmp_path)
    TinyVAE(VAEConfig(), SMALL).save(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "channels": 4}))
    with pytest.raises(OpenVisionError, match="does not fit"):
        load_tiny_vae(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(OpenVisionError, match="does not fit"):
        load_tiny_vae(tmp_path)


def test_steps_lower_the_loss_on_one_batch():
    torch.manual_seed(0)
    vae = TinyVAE(VAEConfig(), SMALL)
    pictures = vae_training.statistics_pictures(CONFIG)[:8]  # from random weights: components start near their best
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        loss = vae_training._losses(CONFIG, vae, None, pictures, 0, "fp32")["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


def test_training_resumes_exactly(tmp_path):
    whole = vae_training.train_vae(dataclasses.replace(CONFIG, samples=96), "cpu", tmp_path / "whole")
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["total"] for row in rows if row["kind"] == "train"]
    assert len(losses) == 12

    part = dataclasses.replace(CONFIG, samples=96)
    stop_after(monkey := pytest.MonkeyPatch(), step=5)
    with pytest.raises(KeyboardInterrupt):
        vae_training.train_vae(part, "cpu", tmp_path / "part")
    monkey.undo()
    assert latest_checkpoint(tmp_path / "part" / "checkpoints")
    resumed = vae_training.train_vae(part, "cpu", tmp_path / "part")
    a, b = ((folder / "model.safetensors").read_bytes() for folder in (whole, resumed))
    assert a == b


def stop_after(monkey: pytest.MonkeyPatch, step: int) -> None:
    """Breaks the run off in the middle of a step, as a kill would."""
    original = vae_training._losses

    def breaking(*args):
        if args[4] == step + 1:
            raise KeyboardInterrupt
        return original(*args)

    monkey.setattr(vae_training, "_losses", breaking)


def test_initial_linear_map_is_the_principal_components():
    torch.manual_seed(0)
    vae = TinyVAE(VAEConfig(), SMALL)
    pictures = vae_training.statistics_pictures(CONFIG)
    vae_training.initialise_linear(vae, pictures)
    latents = vae.encoder(pictures)[0].transpose(0, 1).flatten(1)
    covariance = torch.cov(latents)
    assert torch.allclose(covariance, torch.eye(16), atol=0.02)  # whitened
    error = (vae.decoder(vae.encoder(pictures)[0]) - pictures).square().mean()
    assert error < 0.01
