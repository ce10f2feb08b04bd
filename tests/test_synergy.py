"""The synergy meter against gradients taken by hand, and losses as probes: the encoder gets nothing from them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_shared_runs import start
from test_training_step import LOSS, batch, build, gradients, vae  # noqa: F401
from tiny_run import tiny_config, tiny_model
from torch import Tensor

from openvision3.config import OpenVisionError, VAEConfig
from openvision3.data.batches import Batch
from openvision3.evaluation.report import render, report_of_run
from openvision3.training.loop import train
from openvision3.training.monitor import read_records
from openvision3.training.noise import draw_noise
from openvision3.training.stages import validate
from openvision3.training.step import Objective
from openvision3.training.synergy import synergy


def test_cosine_and_norms_of_known_gradients() -> None:
    found = synergy({"reconstruction": torch.tensor([[3.0, 0.0]]), "understanding": torch.tensor([[1.0, 1.0]])})
    assert found == pytest.approx(
        {"reconstruction_gradient": 3.0, "understanding_gradient": 2**0.5, "gradient_cosine": 0.5**0.5}
    )
    still = synergy({"reconstruction": torch.zeros(1, 2), "understanding": torch.ones(1, 2)})
    assert still["gradient_cosine"] is None and still["reconstruction_gradient"] == 0 and "left_out" not in still
    alone = synergy({"understanding": torch.ones(4)})
    assert alone["understanding_gradient"] == 2 and alone["gradient_cosine"] is None
    assert alone["reconstruction_gradient"] is None and "reconstruction" in alone["left_out"]


def test_gradients_by_tokens_are_those_of_the_equations(vae: VAEConfig, batch: Batch) -> None:  # noqa: F811
    model = build(vae)
    model.token_rms.fill_(7.0)
    losses, got = Objective(model, replace(LOSS, pixel_stride=1), seed=3).by_tokens(batch)
    assert model.token_rms == 7 and not gradients(model), "the model was changed"
    assert model.vae is not None
    x = batch.images.float() / 127.5 - 1
    z = model.vae.encode(x)
    z_u = model.encode_latents(z).detach().requires_grad_()
    sigma, epsilon = draw_noise(3, batch.positions, (9, 16), 0.3, torch.device("cpu"))
    z_hat = model.decode_latents(z_u + sigma[:, None, None] * z_u.detach().square().mean().sqrt() * epsilon)
    reconstruction = F.l1_loss(model.vae.decode(z_hat), x) + 0.4 * F.l1_loss(z_hat, z)
    logits = model.caption_logits(z_u, batch.caption_ids)
    understanding = F.cross_entropy(logits.flatten(0, 1), batch.caption_ids[:, 1:].flatten(), ignore_index=0)
    for ids in (batch.alt_ids, batch.caption_text_ids):
        logits = model.temperature() * model.pool(z_u) @ model.embed_text_ids(ids).T
        labels = torch.arange(8)
        understanding = understanding + 0.7 * (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 4
    for name, loss in (("reconstruction", reconstruction), ("understanding", understanding)):
        torch.testing.assert_close(losses[name], loss.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got[name], torch.autograd.grad(loss, z_u)[0], rtol=1e-4, atol=1e-7)
    assert losses.keys() > {"pixel_l1", "latent_l1", "caption", "contrastive"}


def of_encoder(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the encoder's blocks: the pooled embedding's norm and projection are the text towers' side."""
    head = ("encoder.pool_norm.", "encoder.projection.")
    return {name: value for name, value in found.items() if name.startswith("encoder.") and not name.startswith(head)}


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_probes_leave_the_encoder_to_the_other_loss(vae: VAEConfig, batch: Batch, micro_batch: int) -> None:  # noqa: F811
    def of(detach: Any, **changes: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model = build(vae)
        loss = replace(LOSS, detach=detach, **changes)
        losses = Objective(model, loss, seed=3, micro_batch=micro_batch).backward(batch)
        return losses, gradients(model)

    losses, every = of("none")
    for detach, other in (("reconstruction", "omega_rec"), ("understanding", "omega_und")):
        probed, got = of(detach)
        alone = of("none", **{other: 0.0})[1]
        assert probed.keys() == losses.keys()
        for name in ("pixel_l1", "latent_l1", "caption", "contrastive", "total"):
            torch.testing.assert_close(probed[name], losses[name])
        for name, gradient in of_encoder(got).items():
            torch.testing.assert_close(gradient, alone[name], rtol=1e-4, atol=1e-7, msg=name)
            if name in alone and alone[name].abs().max() > 1e-4:
                assert not torch.allclose(gradient, every[name], rtol=1e-3, atol=1e-7), name
        for name in set(every) - set(of_encoder(every)):  # the probes learn as they would have
            torch.testing.assert_close(got[name], every[name], rtol=1e-4, atol=2e-6, msg=name)
    untrained = of("both")[1]
    assert not of_encoder(untrained) and untrained.keys() == every.keys() - of_encoder(every).keys()


def test_a_probe_needs_another_loss(vae: VAEConfig) -> None:  # noqa: F811
    config = tiny_config(Path("unused"), vae)
    validate(replace(config, loss=replace(config.loss, detach="reconstruction")))
    for detach, model in (
        ("reconstruction", tiny_model(vae, text_encoder=None, text_decoder=None)),
        ("understanding", tiny_model(vae, decoder=None)),
    ):
        with pytest.raises(OpenVisionError, match=f"loss.detach is {detach}: no other loss"):
            validate(replace(config, model=model, loss=replace(config.loss, detach=detach)))
    with pytest.raises(OpenVisionError, match="meter_samples is -1"):
        validate(replace(config, meter_samples=-1))


def test_the_meter_changes_nothing_and_is_in_log_and_report(vae: VAEConfig, tmp_path: Path) -> None:  # noqa: F811
    runs = {
        samples: train(tiny_config(tmp_path / str(samples), vae, 3, meter_samples=samples, eval_every=4), "cpu")
        for samples in (0, 8)
    }
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in runs.values()]
    assert weights[0] == weights[1]
    assert not read_records(runs[0] / "metrics.jsonl", "meter")
    rows = read_records(runs[8] / "metrics.jsonl", "meter")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(-1 <= row["gradient_cosine"] <= 1 and row["caption"] > 0 for row in rows)
    page = render(report_of_run(runs[8]))
    assert "Cosine of the two gradients" in page and "Synergy" not in render(report_of_run(runs[0]))

    model = tiny_model(vae, decoder=None)
    (row,) = read_records(train(tiny_config(tmp_path / "text", vae, 1, model=model), "cpu") / "metrics.jsonl", "meter")[
        -1:
    ]
    assert row["gradient_cosine"] is None and row["reconstruction_gradient"] is None
    assert row["understanding_gradient"] > 0 and "reconstruction" in row["left_out"]
    assert "Not measured: no loss of reconstruction is trained" in render(report_of_run(tmp_path / "text"))


def test_processes_agree_with_one(vae: VAEConfig, tmp_path: Path) -> None:  # noqa: F811
    rows: list[list[dict]] = []
    for size in (1, 2):
        for process in start(size, tmp_path / str(size), vae, 3):
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
        lines = (tmp_path / str(size) / "metrics.jsonl").read_text().splitlines()
        rows.append([row for row in map(json.loads, lines) if row["kind"] == "meter"])
    assert len(rows[0]) == len(rows[1]) >= 2
    for one, two in zip(*rows, strict=True):
        assert {k: v for k, v in two.items() if k != "kind"} == pytest.approx(
            {k: v for k, v in one.items() if k != "kind"}, rel=1e-4
        )
