"""Fast fronts: the encoder, its folder, how it is attached, and its training."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from small_tars import picture, write_tar

import openvision3
from openvision3 import cli
from openvision3.config import (
    DataConfig,
    DistillConfig,
    DistilledVAEConfig,
    FastEncoderConfig,
    OpenVisionError,
    TinyVAEConfig,
    VAEConfig,
    load_json,
)
from openvision3.model.flops import counted_flops, vae_flops
from openvision3.model.openvision3 import OpenVision3
from openvision3.training import distill
from openvision3.vae import TinyVAE, load_tiny_vae, load_vae
from openvision3.vae_distilled import FLUX_FRONT, DistilledVAE, FastEncoder, is_distilled

SMALL = FastEncoderConfig((8, 16), (1, 1))
CONFIG = DistillConfig(
    "distill_vae_encoder", encoder=SMALL, data=DataConfig(num_workers=0), resolution=32, samples=32, warmup_samples=8,
    batch_size=4, precision="fp32", log_every=1, checkpoint_every=12, eval_every=0, eval_samples=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def original() -> TinyVAE:
    torch.manual_seed(1)
    convention = VAEConfig(latent_scale=0.5, latent_shift=0.1)
    vae = TinyVAE(convention, TinyVAEConfig((8, 8, 8), (1, 1, 1), (8, 8, 8), (1, 1, 1)))
    return vae.freeze()  # type: ignore[return-value]


def random_front(channels: int = 16) -> FastEncoder:
    front = FastEncoder(SMALL, channels, 8)
    for parameter in front.parameters():  # half-precision values, as a folder keeps them
        parameter.data = (torch.randn_like(parameter) * 0.1).half().float()
    return front


def test_any_grid_and_what_is_far_away_does_not_matter() -> None:
    front, images = random_front(), torch.rand(1, 3, 64, 192)
    latents = front(images)
    assert latents.shape == (1, 16, 8, 24)
    changed = images.clone()
    changed[..., 128:] = 0
    assert torch.allclose(front(changed)[..., :8], latents[..., :8], atol=1e-6)
    assert not torch.allclose(front(changed), latents)


def test_operations_are_few() -> None:
    def flops(size: FastEncoderConfig, side: int) -> float:
        with torch.device("meta"):
            front = FastEncoder(size, 16, 8).requires_grad_(False)
        return counted_flops(front, (3, side, side))

    assert flops(FastEncoderConfig(), 128) < vae_flops(load_tiny_vae(), 128)["vae_encoder"] / 3
    assert flops(FLUX_FRONT, 256) <= 271e9 / 20  # FLUX.1's VAE encoder: see tests/test_costs.py


def test_folder_gives_the_same_latents_and_pictures(tmp_path: Path, original: TinyVAE) -> None:
    embedded, front = load_vae("tiny"), random_front()
    vae = DistilledVAE.of(front, SMALL, embedded)
    vae.save(tmp_path)
    described = load_json(DistilledVAEConfig, tmp_path / "config.json")
    assert described == vae.description and described.original == embedded.config
    assert is_distilled(tmp_path) and not is_distilled(tmp_path / "nothing")
    again = load_vae(str(tmp_path))
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    assert isinstance(again, DistilledVAE) and not any(p.requires_grad for p in again.parameters())
    assert (again.config.kind, again.config.channels, again.config.factor) == ("distilled", 16, 8)
    latents = again.encode(images)
    assert torch.equal(latents, front(images))  # scaled ones, whatever the original's convention is
    assert torch.equal(again.decode(latents), embedded.decode(latents))
    shifted = DistilledVAE.of(front, SMALL, original)
    assert torch.equal(shifted.encode(images), front(images))
    assert torch.equal(shifted.decode(latents), original.decode(latents))


def test_broken_folders_are_one_line(tmp_path: Path, original: TinyVAE) -> None:
    DistilledVAE.of(random_front(), SMALL, load_vae("tiny")).save(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"encoder": {"widths": [8, 8], "depths": [1, 1]}}))
    with pytest.raises(OpenVisionError, match="does not fit"):
        load_vae(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(settings | {"fingerprint": "0" * 64}))
    with pytest.raises(OpenVisionError, match="stands for another VAE"):
        load_vae(str(tmp_path))
    named = settings | {"original": {"source": str(tmp_path / "gone")}}
    (tmp_path / "config.json").write_text(json.dumps(named))
    with pytest.raises(OpenVisionError, match="can't be loaded: .*gone"):
        load_vae(str(tmp_path))


def test_model_takes_a_front_of_its_own_vae_alone(tmp_path: Path, tiny_model: Path) -> None:
    plain = openvision3.load(tiny_model, device="cpu")
    assert plain.vae is not None
    front = random_front()
    DistilledVAE.of(front, SMALL, plain.vae).save(tmp_path / "front")
    model = openvision3.load(tiny_model, vae=tmp_path / "front", device="cpu")
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    tokens = model.encode(images)
    assert torch.equal(tokens, plain.encode_latents(front(images)))
    assert torch.equal(model.decode(tokens), plain.decode(tokens))
    half = openvision3.load(tiny_model, vae=tmp_path / "front", device="cpu", dtype=torch.bfloat16)
    assert half.encode(images.bfloat16()).dtype == torch.bfloat16

    model.save(tmp_path / "saved")  # with the VAE behind the front
    assert torch.equal(openvision3.load(tmp_path / "saved", device="cpu").encode(images), plain.encode(images))

    DistilledVAE.of(front, SMALL, load_vae("tiny")).save(tmp_path / "other")
    with pytest.raises(OpenVisionError, match="stands for another VAE .*distill_vae_encoder --init"):
        openvision3.load(tiny_model, vae=tmp_path / "other", device="cpu")


def test_front_of_the_embedded_vae_fits_the_demo_model() -> None:
    demo = openvision3.load("demo", device="cpu")
    vae = DistilledVAE.of(random_front(), SMALL, load_vae("tiny"))
    assert demo.vae is not None
    DistilledVAE(vae.front, vae.description, demo.vae, "")  # raises where the fingerprints differ


def run(model: Path, folder: Path, **changes: object) -> Path:
    return distill.distill(dataclasses.replace(CONFIG, init=str(model), **changes), "cpu", folder)  # type: ignore[arg-type]


def records(folder: Path, kind: str) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def test_linear_map_is_the_least_squares_one(tiny_model: Path) -> None:
    vae, front = openvision3.load(tiny_model, device="cpu").vae, FastEncoder(SMALL, 16, 8)
    assert vae is not None
    pixels = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    distill.initialise_linear(front, vae, pixels)
    images = pixels.float() / 127.5 - 1
    error = (front(images) - vae.encode(images)).square().mean()
    assert error < 0.5 * vae.encode(images).var()
    with torch.no_grad():
        front.linear.weight.mul_(1.01)
        assert (front(images) - vae.encode(images)).square().mean() > error


def test_training_lowers_the_loss_and_resumes_exactly(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tiny_model, tmp_path / "whole")
    assert len(records(tmp_path / "whole", "train")) == 8
    (figures,) = records(tmp_path / "whole", "eval")
    assert 0 < figures["token_cosine"] <= 1 and figures["latent_error"] < 1

    original = distill.distillation_losses
    calls = []

    def breaking(*args: object) -> dict:
        calls.append(args)
        if len(calls) == 6:  # in the middle of a step, as a kill would; the last checkpoint is after 3
            raise KeyboardInterrupt
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(distill, "distillation_losses", breaking)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, tmp_path / "part")
    monkeypatch.setattr(distill, "distillation_losses", original)
    resumed = run(tiny_model, tmp_path / "part")
    a, b = ((folder / "model.safetensors").read_bytes() for folder in (whole, resumed))
    assert a == b
    with pytest.raises(OpenVisionError, match="another encoder.widths"):
        run(tiny_model, tmp_path / "part", encoder=FastEncoderConfig((8, 8), (1, 1)))


def test_steps_lower_the_loss_on_one_batch(tiny_model: Path) -> None:
    torch.manual_seed(0)
    model = distill.teacher(dataclasses.replace(CONFIG, init=str(tiny_model)))
    front = FastEncoder(SMALL, 16, 8)
    images = torch.rand(8, 3, 32, 32) * 2 - 1
    optimizer = torch.optim.AdamW(front.parameters(), lr=3e-3)
    losses: list[dict[str, torch.Tensor]] = []
    for _ in range(30):
        losses.append(distill.distillation_losses(CONFIG, model, front, images, "fp32"))
        optimizer.zero_grad()
        losses[-1]["total"].backward()
        optimizer.step()
    for name in ("l1", "token_distance"):
        assert losses[-1][name] < 0.8 * losses[0][name]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_run_is_held_to_its_model(tmp_path: Path, tiny_model: Path) -> None:
    run(tiny_model, tmp_path / "run", samples=8)
    model = OpenVision3.load(tiny_model)
    with torch.no_grad():
        next(model.encoder.parameters()).add_(0.01)
    model.save(tmp_path / "model")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"init": str(tmp_path / "model")}))
    with pytest.raises(OpenVisionError, match="began with another init"):
        run(tmp_path / "model", tmp_path / "run", samples=8)


def test_pictures_of_tars_go_on_where_a_run_stopped(tmp_path: Path) -> None:
    colours = ("red", "green", "blue", "white", "black", "brown", "pink", "grey")
    samples = [{f"{colour}.png": picture(colour=colour), f"{colour}.txt": b"a colour"} for colour in colours]
    write_tar(tmp_path / "a.tar", {name: content for sample in samples for name, content in sample.items()})
    data = DataConfig(source=str(tmp_path / "a.tar"), num_workers=0)
    config = dataclasses.replace(CONFIG, data=data, samples=16)
    batches = list(distill.pictures(config, tmp_path, 0))
    assert [batch.shape for batch in batches] == [(4, 3, 32, 32)] * 4
    assert torch.equal(torch.cat(list(distill.pictures(config, tmp_path, 2))), torch.cat(batches[2:]))
    assert distill.evaluation_source(config) == "" and distill.evaluation_source(CONFIG) == "scenes-v1"


def test_commands(tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ["train", "distill_vae_encoder", "--init", str(tiny_model), "--device", "cpu"]
    assert cli.main([*recipe, "--dry-run", "--encoder.widths", "8", "16"]) == 0
    out = capsys.readouterr().out
    assert "1,875 steps of 32 samples at 64 px" in out and "times as many" in out

    front = run(tiny_model, tmp_path / "run", samples=8)
    json_file = tmp_path / "front.json"
    command = ["eval", "front", "--model", str(tiny_model), "--vae", str(front), "--device", "cpu", "--samples", "8"]
    assert cli.main([*command, "--json", str(json_file), "--batch-size", "4", "--num-names", "30"]) == 0
    out = capsys.readouterr().out
    assert "token cosine" in out and "PSNR, dB" in out and "pictures a second, to tokens" in out
    figures = json.loads(json_file.read_text())
    assert figures["original"]["reconstruction"] != figures["front"]["reconstruction"]
    assert figures["speed"]["gflops"]["front"] > 0

    assert cli.main(["eval", "front", "--model", str(tiny_model), "--device", "cpu"]) == 2
    assert "without a fast front" in capsys.readouterr().err
