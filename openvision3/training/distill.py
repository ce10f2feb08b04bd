"""Training of a fast encoder onto a frozen VAE's latents: L1 of the latents + cosine distance of the unified tokens."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openvision3.config import DistillConfig, OpenVisionError
from openvision3.data.batches import BatchStream
from openvision3.data.demo import BENCHMARK
from openvision3.data.shards import open_source
from openvision3.data.vae_crops import crop_batches
from openvision3.evaluation.front import agreement
from openvision3.evaluation.samples import open_samples
from openvision3.hub.load import load
from openvision3.model.fingerprint import image_fingerprint
from openvision3.model.openvision3 import OpenVision3
from openvision3.training.picture_loop import PictureTask, to_images, train_on_pictures
from openvision3.training.precision import Precision, autocast, resolve_device
from openvision3.training.run_folder import open_run
from openvision3.vae import FrozenVAE
from openvision3.vae_distilled import DistilledVAE, FastEncoder

_REGRESSION_PICTURES = 256  # that the initial linear map is fitted to


def distill(config: DistillConfig, device_name: str = "auto", out: Path | None = None) -> Path:
    """Trains a fast front and returns its folder, `RUN/model`; the same call again resumes a run that was stopped.

    Raises `OpenVisionError` where the run can't go on, `RunInterrupted` after a signal.
    """
    folder = out or Path(config.out or f"runs/{config.recipe}")
    device = resolve_device(device_name)
    model = teacher(config, device)
    config = replace(config, resolution=config.resolution or model.config.image_size)
    with open_run(folder, config, print):
        return _train(config, model, device, folder)


def teacher(config: DistillConfig, device: torch.device | str = "cpu") -> OpenVision3:
    """The frozen model at `config.init`, fp32, with its own VAE.

    Raises `OpenVisionError` where it has no VAE to be distilled, or the config does not fit it.
    """
    model = load(config.init, device=device, dtype=torch.float32).requires_grad_(False)
    if model.vae is None or model.config.external is not None:
        raise OpenVisionError(f"init: {config.init} makes no tokens of a VAE's latents: there is nothing to distil")
    step = model.config.downsampling
    if config.resolution % step or config.batch_size < 1 or config.samples < config.batch_size:
        raise OpenVisionError(
            f"resolution {config.resolution} must be a multiple of {step}, and samples {config.samples} at least one "
            f"batch of {config.batch_size}"
        )
    return model


def _train(config: DistillConfig, model: OpenVision3, device: torch.device, folder: Path) -> Path:
    original = model.vae
    assert original is not None
    torch.manual_seed(config.seed)
    front = FastEncoder(config.encoder, original.config.channels, original.config.factor)
    first = torch.cat(list(islice(pictures(config, folder, 0), -(-_REGRESSION_PICTURES // config.batch_size))))
    initialise_linear(front, original, first[:_REGRESSION_PICTURES])
    front.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    source = evaluation_source(config)
    held_out = open_samples(source, config.resolution, config.eval_samples) if source and config.eval_samples else None

    def figures(average: nn.Module) -> dict[str, float]:
        assert isinstance(average, FastEncoder)
        return agreement(model, average, held_out, config.batch_size) if held_out is not None else {}

    task = PictureTask(
        name="front",
        module=front,
        resolution=config.resolution,
        losses=lambda images, step, precision: distillation_losses(config, model, front, images, precision),
        batches=lambda step: pictures(config, folder, step),
        evaluate=figures,
        shown=("total", "l1", "token_distance"),
        given={"init": image_fingerprint(model)},
    )
    average = train_on_pictures(config, task, folder, device)
    assert isinstance(average, FastEncoder)
    DistilledVAE.of(average.cpu(), config.encoder, original.cpu()).save(folder / "model")
    return folder / "model"


def distillation_losses(
    config: DistillConfig, model: OpenVision3, front: FastEncoder, images: Tensor, precision: Precision
) -> dict[str, Tensor]:
    """The loss of one batch and its parts; gradients pass the frozen encoder on their way to the fast one."""
    assert model.vae is not None
    with autocast(images.device, precision):
        with torch.no_grad():
            target = model.vae.encode(images)
            target_tokens = model.encode_latents(target).float()
        latents = front(images)
        tokens = model.encode_latents(latents).float()
    l1 = (latents.float() - target.float()).abs().mean()
    distance = 1 - F.cosine_similarity(tokens, target_tokens, dim=-1).mean()
    return {
        "total": config.latent_weight * l1 + config.token_weight * distance,
        "l1": l1,
        "token_distance": distance,
    }


def pictures(config: DistillConfig, folder: Path, step: int) -> Iterator[Tensor]:
    """The run's uint8 batches (B, 3, R, R) after `step`, a function of the config alone."""
    size, data = config.batch_size, config.data
    start, stop = step * size, config.samples // size * size
    if data.sources == ("demo",):
        yield from crop_batches(config.resolution, data.seed, stop, start, size, data.num_workers)
        return
    stream = BatchStream(
        open_source(data, "train", config.resolution, folder / "index"),
        None,
        config.resolution,
        size,
        start=start,
        stop=stop,
        contrastive_length=0,
        caption_length=0,
        crop_min_area=data.crop_min_area,
        num_workers=data.num_workers,
        seed=data.seed,
        max_bad_fraction=data.max_bad_fraction,
    )
    for batch in stream:
        yield batch.images


def evaluation_source(config: DistillConfig) -> str:
    """What the result is measured on; empty where there is nothing."""
    return config.eval_source or (BENCHMARK if config.data.sources == ("demo",) else "")


@torch.no_grad()
def initialise_linear(front: FastEncoder, original: FrozenVAE, pixels: Tensor) -> None:
    """Sets the linear map to the least-squares one from patches to the original's latents, on uint8 pictures."""
    factor, channels = front.factor, original.config.channels
    device = next(original.parameters()).device
    size = 3 * factor**2 + 1  # with the constant 1
    square, mixed = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, channels, dtype=torch.float64)
    for chunk in pixels.split(16):
        images = to_images(chunk, device)
        latents = original.encode(images).permute(0, 2, 3, 1).reshape(-1, channels).cpu().double()
        patches = F.pixel_unshuffle(images, factor).permute(0, 2, 3, 1).reshape(-1, size - 1).cpu().double()
        patches = F.pad(patches, (0, 1), value=1.0)
        square += patches.T @ patches
        mixed += patches.T @ latents
    square += 1e-6 * square.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    solution = torch.linalg.solve(square, mixed).float()
    front.linear.weight.copy_(solution[:-1].T[:, :, None, None])
    front.linear.bias.copy_(solution[-1])  # type: ignore[union-attr]
