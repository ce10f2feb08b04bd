"""The losses of a global batch: against the equations written out, and the same over any micro-batches."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_run import make_vae, tiny_config, tiny_model
from torch import Tensor, nn

from openvision3.config import LossConfig, OpenVisionError, VAEConfig
from openvision3.data.batches import Batch
from openvision3.data.grammar import parse
from openvision3.data.tokenizer import demo_tokenizer
from openvision3.evaluation.perceptual import load_lpips
from openvision3.model.openvision3 import OpenVision3
from openvision3.training import setup
from openvision3.training.noise import draw_noise
from openvision3.training.optimizer import parameter_groups
from openvision3.training.stages import plan
from openvision3.training.step import Objective
from openvision3.training.watch import FiniteWatch
from openvision3.vae import load_vae

CPU = torch.device("cpu")
LOSS = LossConfig(beta=0.4, alpha=0.7, omega_rec=0.5, omega_und=1.0, pixel_stride=3)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> VAEConfig:
    return make_vae(tmp_path_factory.mktemp("vae"))


def build(vae: VAEConfig, **changes) -> OpenVision3:
    config = tiny_model(vae, **changes)
    torch.manual_seed(1)
    return OpenVision3(config, load_vae(vae) if config.input == "latents" else None, demo_tokenizer())


@pytest.fixture(scope="module")
def batch(vae: VAEConfig) -> Batch:
    """Eight scenes at 48 px, with captions of different lengths."""
    config = tiny_config(Path("unused"), vae)
    stage = replace(config.stage2, samples=8, batch_size=8)
    (only,) = plan(replace(config, stage1=replace(config.stage1, samples=0), stage2=stage))
    batch = next(iter(setup.open_stream(config, only, 0, demo_tokenizer())))
    assert len({int((row != 0).sum()) for row in batch.caption_ids}) > 1
    return batch


def gradients(model: OpenVision3) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("image_input", ["cross", "prefix"])
def test_losses_are_the_equations(vae: VAEConfig, batch: Batch, image_input: str) -> None:
    config = tiny_model(vae)
    assert config.text_decoder is not None
    model = build(vae, text_decoder=replace(config.text_decoder, image_input=image_input))
    assert model.vae is not None
    lpips = load_lpips()
    found = Objective(model, LOSS, 0.5, lpips, seed=3).backward(batch)
    got = gradients(model)

    x = batch.images.float() / 127.5 - 1
    z = model.vae.encode(x)
    z_u = model.encode_latents(z)
    rms = z_u.detach().square().mean().sqrt()
    sigma, epsilon = draw_noise(3, batch.positions, (9, 16), 0.3, CPU)
    z_hat = model.decode_latents(z_u + sigma[:, None, None] * rms * epsilon)
    chosen = [0, 3, 6]
    x_hat = model.vae.decode(z_hat[chosen])
    pixel, latent, perceptual = F.l1_loss(x_hat, x[chosen]), F.l1_loss(z_hat, z), lpips(x_hat, x[chosen]).mean()
    image, labels = model.pool(z_u), torch.arange(8)
    contrastive = torch.zeros(())
    for ids in (batch.alt_ids, batch.caption_text_ids):
        logits = model.logit_scale.exp() * image @ model.embed_text_ids(ids).T
        contrastive = contrastive + (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 4
    logits = model.caption_logits(z_u, batch.caption_ids)
    caption = F.cross_entropy(logits.flatten(0, 1), batch.caption_ids[:, 1:].flatten(), ignore_index=0)
    reconstruction, understanding = pixel + 0.4 * latent + 0.5 * perceptual, caption + 0.7 * contrastive
    total = 0.5 * reconstruction + understanding
    expected = {
        "pixel_l1": pixel,
        "latent_l1": latent,
        "lpips": perceptual,
        "caption": caption,
        "contrastive": contrastive,
        "reconstruction": reconstruction,
        "understanding": understanding,
        "total": total,
        "token_rms": rms,
        "temperature": torch.tensor(1 / 0.07),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-5, atol=1e-6, msg=name)
    assert model.token_rms == found["token_rms"]

    total.backward()
    wanted = gradients(model)
    assert got.keys() == wanted.keys() and not any(name.startswith("vae.") for name in got)
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("micro_batch", [2, 3])
def test_micro_batches_change_nothing(vae: VAEConfig, batch: Batch, micro_batch: int) -> None:
    model, lpips = build(vae), load_lpips()
    whole = Objective(model, LOSS, 0.5, lpips, seed=3).backward(batch)
    expected = gradients(model)
    model.token_rms.zero_()
    parts = Objective(model, LOSS, 0.5, lpips, seed=3, micro_batch=micro_batch).backward(batch)
    got = gradients(model)
    assert parts.keys() == whole.keys() and got.keys() == expected.keys()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-5, atol=1e-6, msg=name)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=2e-6, msg=name)
    assert got["logit_scale"].abs() > 1e-4
    torch.testing.assert_close(model.token_rms, whole["token_rms"])


def test_bf16_keeps_gradients_fp32_and_near(vae: VAEConfig, batch: Batch) -> None:
    model = build(vae)
    exact = Objective(model, LOSS, seed=3).backward(batch)
    expected = gradients(model)
    for micro_batch in (0, 2):
        rough = Objective(model, LOSS, seed=3, precision="bf16", micro_batch=micro_batch).backward(batch)
        got = gradients(model)
        torch.testing.assert_close(rough["total"], exact["total"], rtol=2e-2, atol=0)
        assert all(gradient.dtype == torch.float32 for gradient in got.values())
        flat_got, flat = (torch.cat([g[name].flatten() for name in expected]) for g in (got, expected))
        assert F.cosine_similarity(flat_got, flat, dim=0) > 0.98


def test_parts_that_the_model_lacks_are_left_out(vae: VAEConfig, batch: Batch) -> None:
    found = Objective(build(vae, text_encoder=None, text_decoder=None), LOSS).backward(batch)
    assert {"pixel_l1", "latent_l1"} < found.keys() and "caption" not in found and "contrastive" not in found
    torch.testing.assert_close(found["total"], 0.5 * (found["pixel_l1"] + 0.4 * found["latent_l1"]))
    found = Objective(build(vae, decoder=None), LOSS, micro_batch=4).backward(batch)
    assert "pixel_l1" not in found
    torch.testing.assert_close(found["total"], found["caption"] + 0.7 * found["contrastive"])


def test_model_on_pixels_has_no_latent_loss(vae: VAEConfig, batch: Batch) -> None:
    model = build(vae, input="pixels", in_channels=3, patch_size=16)
    whole = Objective(model, LOSS).backward(batch)
    parts = Objective(model, LOSS, micro_batch=4).backward(batch)
    assert "latent_l1" not in whole
    torch.testing.assert_close(whole["pixel_l1"], parts["pixel_l1"])


def test_lpips_is_loaded_only_where_lambda_asks_for_it(vae: VAEConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(net: str) -> nn.Module:
        raise AssertionError("loaded")

    monkeypatch.setattr(setup, "load_lpips", refuse)
    config = tiny_config(Path("unused"), vae, lpips=0.5)
    first, second = plan(config)
    assert setup.build_objective(config, first, build(vae), "fp32").perceptual is None
    with pytest.raises(AssertionError, match="loaded"):
        setup.build_objective(config, second, build(vae), "fp32")


def test_sigmoid_loss_has_a_learned_bias(vae: VAEConfig, batch: Batch, tmp_path: Path) -> None:
    config = replace(tiny_config(tmp_path, vae), loss=replace(LOSS, contrastive="sigmoid"))
    model = setup.build_model(config, CPU)
    assert model.logit_bias is not None
    assert model.temperature().item() == pytest.approx(10) and model.logit_bias.item() == -10
    found = Objective(model, config.loss, seed=3).backward(batch)
    assert found["logit_bias"] == -10 and gradients(model)["logit_bias"] != 0
    image = model.pool(model.encode(batch.images.float() / 127.5 - 1))
    expected = torch.zeros(())
    for ids in (batch.alt_ids, batch.caption_text_ids):
        signs = 2 * torch.eye(8) - 1
        logits = 10 * image @ model.embed_text_ids(ids).T - 10
        expected = expected - F.logsigmoid(signs * logits).sum() / 8 / 2
    torch.testing.assert_close(found["contrastive"], expected.detach(), rtol=1e-5, atol=1e-6)

    model.logit_bias.data.fill_(-7.0)
    model.save(tmp_path / "model")
    loaded = OpenVision3.load(tmp_path / "model", vae=None)
    assert loaded.logit_bias is not None and loaded.logit_bias.item() == -7
    assert setup.build_model(tiny_config(tmp_path, vae), CPU).logit_bias is None
    assert not setup.trained_model(replace(config, model=replace(config.model, text_encoder=None))).logit_bias


def test_noise_depends_on_seed_and_position_alone() -> None:
    sigma, epsilon = draw_noise(5, [7, 8, 9], (4, 6), 0.3, CPU)
    sigma_alone, epsilon_alone = draw_noise(5, [8], (4, 6), 0.3, CPU)
    assert torch.equal(sigma[1:2], sigma_alone) and torch.equal(epsilon[1:2], epsilon_alone)
    assert not torch.equal(draw_noise(6, [8], (4, 6), 0.3, CPU)[1], epsilon_alone)
    sigma, epsilon = draw_noise(0, range(2000), (4, 6), 0.3, CPU)
    assert sigma.min() >= 0 and sigma.max() <= 0.3 and sigma.mean() == pytest.approx(0.15, abs=0.01)
    assert epsilon.mean() == pytest.approx(0, abs=0.02) and epsilon.std() == pytest.approx(1, abs=0.02)
    assert len(set(sigma.tolist())) > 1990
    assert abs(torch.corrcoef(torch.stack([sigma[1:], sigma[:-1]]))[0, 1]) < 0.1


def test_decay_on_the_real_model(vae: VAEConfig) -> None:
    model = build(vae)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(p)] for p in parameter_groups(model, 0.2)[0]["params"]}
    assert not [name for name in decayed if "embedding" in name or "norm" in name or "bias" in name or "vae" in name]
    assert "encoder.patch_embed.weight" in decayed and "text_encoder.projection.weight" in decayed
    matrices = {n for n, p in model.named_parameters() if p.ndim >= 2 and p.requires_grad}
    assert matrices - decayed == {
        f"{part}.embedding.{table}" for part in ("text_encoder", "text_decoder") for table in ("tokens", "positions")
    }


def test_a_few_steps_lower_every_loss(vae: VAEConfig, batch: Batch) -> None:
    model = build(vae)
    objective = Objective(model, LOSS, seed=3)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.2), lr=5e-3)
    losses = []
    for _ in range(25):
        losses.append(objective.backward(batch))
        optimizer.step()
        optimizer.zero_grad()
    for name in ("latent_l1", "reconstruction", "caption", "contrastive", "total"):
        assert losses[-1][name] < losses[0][name], name


def test_watch_skips_until_there_are_too_many_in_a_row(tmp_path: Path, batch: Batch) -> None:
    watch = FiniteWatch(tmp_path, limit=2)

    def skips(step: int, value: str) -> bool:
        losses = {"caption": torch.tensor(1.0), "total": torch.tensor(float(value))}
        flag = watch.see(step, replace(batch, positions=[step]), losses)
        told = watch.settle()
        assert told == ("" if not flag else f"step {step} skipped: total not finite") and watch.settle() == ""
        return bool(flag)

    assert [skips(1, "1"), skips(2, "nan"), skips(3, "1"), skips(4, "inf")] == [False, True, False, True]
    assert watch.skipped == 2 and not (tmp_path / "bad_batch.json").exists()
    with pytest.raises(OpenVisionError, match="step 5: total not finite, as in all of the last 2 steps"):
        skips(5, "nan")
    record = json.loads((tmp_path / "bad_batch.json").read_text())
    assert record["step"] == 5 and record["positions"] == [5] and record["keys"] == batch.keys
    assert record["losses"] == {"caption": 1.0, "total": "nan"}
    assert not skips(6, "1") and skips(7, "nan")


def test_padding_that_all_rows_share_is_left_out_and_changes_nothing(vae: VAEConfig, batch: Batch) -> None:
    model = build(vae)
    assert model.text_encoder is not None
    ids = batch.alt_ids
    padding = (ids == 0).all(dim=0)
    assert padding.any(), "the batch has no column of padding to leave out"
    seen: list[int] = []
    hook = model.text_encoder.transformer.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    short = model.text_encoder(ids)
    hook.remove()
    assert seen == [int((~padding).sum())]
    mask = (ids != 0)[:, None, None, :]
    x = model.text_encoder.transformer(model.text_encoder.embedding(ids), mask, first_query=ids.shape[1] - 1)
    whole = model.text_encoder.projection(model.text_encoder.norm(x[:, 0]))
    torch.testing.assert_close(short, whole)


def test_a_stage_can_have_scenes_of_its_own(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, make_vae(tmp_path / "vae"))
    alone = replace(config.data.scenes, count_weights=(1.0, 0.0, 0.0, 0.0))
    several = replace(alone, count_weights=(0.0, 0.0, 0.0, 1.0))
    data, stage1 = replace(config.data, scenes=several), replace(config.stage1, scenes=alone)
    config = replace(config, data=data, stage1=stage1)
    first, second = (setup.open_stream(config, stage, stage.first_step, demo_tokenizer()) for stage in plan(config))
    counts = [
        {sum(parse(caption).things.values()) for batch in stream for caption in batch.captions}
        for stream in (first, second)
    ]
    assert counts == [{1}, {4}]


@pytest.mark.parametrize("micro_batch", [0, 4])
def test_speed_options_change_nothing(vae: VAEConfig, batch: Batch, micro_batch: int) -> None:
    model = build(vae).double()

    def losses_and_gradients(**options) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        objective = Objective(model, LOSS, 0.5, load_lpips().double(), seed=3, micro_batch=micro_batch, **options)
        return objective.backward(batch), gradients(model)

    expected = losses_and_gradients(pack_text=False, vae_batch=8)
    for options in ({"pack_text": True, "vae_batch": 8}, {"pack_text": False, "vae_batch": 1}):
        found = losses_and_gradients(**options)
        for a, b in zip(expected, found, strict=True):
            assert a.keys() == b.keys()
            for name in a:
                torch.testing.assert_close(a[name], b[name], msg=name)
