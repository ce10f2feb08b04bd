"""Training of the embedded tiny VAE: L1 + MSE + LPIPS + a small KL, on pictures that never run out."""

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from openvision3.config import OpenVisionError, SceneConfig, VAEConfig, VAETrainConfig
from openvision3.data import demo
from openvision3.data.batches import begin_worker
from openvision3.data.vae_crops import VAECrops
from openvision3.evaluation.perceptual import Perceptual, load_lpips
from openvision3.training import optimizer as optim
from openvision3.training.checkpoint import checkpoint_tensors, latest_checkpoint, load_checkpoint, save_checkpoint
from openvision3.training.monitor import Monitor
from openvision3.training.precision import Precision, autocast, choose_precision, resolve_device
from openvision3.training.run_folder import (
    RunInterrupted,
    StopRequest,
    open_run,
    record_environment,
    recorded_environment,
)
from openvision3.vae import TinyVAE

_STATISTICS_PICTURES = 1024  # that give the principal components at the start and the latents' scale at the end


def train_vae(config: VAETrainConfig, device_name: str = "auto", out: Path | None = None) -> Path:
    """Trains a tiny VAE and returns its folder, `RUN/model`; the same call again resumes a run that was stopped.

    Raises `OpenVisionError` where the run can't go on, `RunInterrupted` after a signal.
    """
    folder = out or Path(config.out or f"runs/{config.recipe}")
    device = resolve_device(device_name)
    with open_run(folder, config, print):
        return _train(config, device, folder)


def _train(config: VAETrainConfig, device: torch.device, folder: Path) -> Path:
    torch.manual_seed(config.seed)
    steps = config.samples // config.batch_size
    data = VAECrops(config.resolution, config.seed, config.samples)
    vae = TinyVAE(VAEConfig(channels=config.vae.channels, licence="MIT"), config.vae)
    initialise_linear(vae, statistics_pictures(config))
    vae.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = copy.deepcopy(vae)
    lpips = load_lpips().to(device) if config.lpips_weight else None
    o = config.optimizer
    optimizer = optim.adamw(vae, o.beta1, o.beta2, o.eps, o.weight_decay)
    modules = {"vae": vae, "average": average}

    resume = latest_checkpoint(folder / "checkpoints")
    step = load_checkpoint(resume, modules, optimizer)["step"] if resume else 0
    environment = recorded_environment(folder)
    if environment is None:
        images = _images(torch.stack([data[i] for i in range(config.batch_size)]), device)
        precision = choose_precision(
            config.precision, device, lambda p: _losses(config, vae, lpips, images, 0, p)["total"].backward()
        )
        optimizer.zero_grad()
        environment = record_environment(folder, device, precision=precision)
    precision: Precision = environment["precision"]

    loader = DataLoader(
        Subset(data, range(step * config.batch_size, config.samples)),
        config.batch_size,
        num_workers=config.num_workers,
        drop_last=True,
        worker_init_fn=begin_worker,
    )
    held_out = {"landscapes": _landscapes(config.resolution), "scenes": _scenes(config.resolution)}
    with (
        StopRequest() as stop,
        Monitor(
            folder,
            steps * config.batch_size,
            samples_seen=step * config.batch_size,
            resume_step=step,
            shown=("total", "l1", "lpips", "kl"),
        ) as monitor,
    ):
        for batch in loader:
            step += 1
            seen = step * config.batch_size
            rate = config.peak_lr * optim.warmup_cosine(
                seen - config.batch_size / 2, config.warmup_samples, config.samples
            )
            optim.set_learning_rate(optimizer, rate)
            losses = _losses(config, vae, lpips, _images(batch, device), step, precision)
            losses["total"].backward()
            norm = optim.clip_gradients(vae, o.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            update_average(average, vae, min(config.ema, step / (step + 10)))
            monitor.advance(seen)

            if step % config.log_every == 0 or step == steps:
                values = {name: value.item() for name, value in losses.items()}
                if not all(map(torch.isfinite, map(torch.tensor, values.values()))):
                    raise OpenVisionError(f"{folder}: a loss is not finite at step {step}: {values}")
                monitor.log(step, seen, {**values, "grad_norm": float(norm), "lr": rate})
            if _due(seen, config.batch_size, config.eval_every) or step == steps:
                with monitor.paused():
                    figures = evaluate(average, held_out, device)
                    monitor.record("eval", step, seen, figures)
                    monitor.say("  ".join(f"{name} {value:.2f}" for name, value in figures.items()))
            if _due(seen, config.batch_size, config.checkpoint_every) or step == steps or stop:
                monitor.flush()
                tensors = checkpoint_tensors(modules, optimizer)
                save_checkpoint(folder / "checkpoints", step, tensors, {"step": step}, keep=config.keep_checkpoints)
            if stop and step < steps:
                raise RunInterrupted(f"stopped at {seen:,} samples; the same command resumes it", stop.signal_number)
    scale_latents(average, statistics_pictures(config), device)
    average.cpu().save(folder / "model")
    return folder / "model"


def _losses(
    config: VAETrainConfig, vae: TinyVAE, lpips: Perceptual | None, images: Tensor, step: int, precision: Precision
) -> dict[str, Tensor]:
    """The loss of one batch and its parts; the posterior's noise is a function of (seed, step)."""
    generator = torch.Generator(images.device).manual_seed(config.seed * 1_000_003 + step)
    with autocast(images.device, precision):
        mean, log_variance = (t.float() for t in vae.encoder(images))
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        output = vae.decoder(mean + (0.5 * log_variance).exp() * noise).float()
        subset = slice(step % config.lpips_stride, None, config.lpips_stride)
        distance = lpips(output[subset], images[subset]).mean() if lpips is not None else output.new_zeros(())
    difference = output - images
    l1, mse = difference.abs().mean(), difference.square().mean()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    total = config.l1_weight * l1 + config.mse_weight * mse + config.lpips_weight * distance + config.kl_weight * kl
    return {"total": total, "l1": l1, "mse": mse, "lpips": distance, "kl": kl}


def _images(batch: Tensor, device: torch.device) -> Tensor:
    return (batch.to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def _due(seen: int, batch_size: int, every: int) -> bool:
    return every > 0 and seen // every > (seen - batch_size) // every


def statistics_pictures(config: VAETrainConfig) -> Tensor:
    """Training pictures (N, 3, H, W) in [-1, 1] beyond those that the run sees."""
    data = VAECrops(config.resolution, config.seed + 1, _STATISTICS_PICTURES)
    return torch.stack([data[i] for i in range(_STATISTICS_PICTURES)]).float() / 127.5 - 1


@torch.no_grad()
def initialise_linear(vae: TinyVAE, images: Tensor) -> None:
    """Sets the linear maps of encoder and decoder to the principal components of 8x8 patches, whitened."""
    patches = F.pixel_unshuffle(images, 8).permute(0, 2, 3, 1).reshape(-1, 192).double()
    centre = patches.mean(0)
    covariance = (patches - centre).T @ (patches - centre) / len(patches)
    values, vectors = torch.linalg.eigh(covariance)
    channels = vae.config.channels
    scale, vectors = values[-channels:].sqrt(), vectors[:, -channels:]
    vae.encoder.linear.weight.copy_((vectors / scale).T[:, :, None, None])
    vae.encoder.linear.bias.copy_(-(centre @ vectors) / scale)  # type: ignore[union-attr]
    vae.decoder.linear.weight.copy_((vectors * scale)[:, :, None, None])
    vae.decoder.linear.bias.copy_(centre)  # type: ignore[union-attr]


@torch.no_grad()
def update_average(average: nn.Module, online: nn.Module, decay: float) -> None:
    """Moves the averaged weights towards the online ones: `average = decay * average + (1 - decay) * online`."""
    for mine, theirs in zip(average.parameters(), online.parameters(), strict=True):
        mine.lerp_(theirs, 1 - decay)


@torch.no_grad()
def scale_latents(vae: TinyVAE, images: Tensor, device: torch.device) -> None:
    """Sets the latents' mean and deviation per channel, in float64 over `images`, so that they become 0 and 1."""
    latents = torch.cat([vae.encoder(chunk.to(device))[0].double() for chunk in images.split(32)])
    vae.latent_mean.copy_(latents.mean((0, 2, 3), keepdim=True))
    vae.latent_std.copy_(latents.std((0, 2, 3), keepdim=True))


@torch.no_grad()
def evaluate(vae: TinyVAE, held_out: dict[str, Tensor], device: torch.device) -> dict[str, float]:
    """PSNR in dB of each set of pictures (uint8), in fp32, rounded to 8 bits: the mean of per-picture values."""
    figures = {}
    for name, pictures in held_out.items():
        values = []
        for chunk in pictures.split(16):
            images = _images(chunk, device)
            output = vae.decoder(vae.encoder(images)[0]).clamp(-1, 1)
            error = ((output + 1) * 127.5).round() - chunk.to(device).float()
            values.append(10 * torch.log10(255**2 / error.square().mean((1, 2, 3)).clamp(min=1e-10)))
        figures[f"psnr_{name}"] = float(torch.cat(values).mean())
    return figures


def _landscapes(size: int) -> Tensor:
    return torch.stack([torch.from_numpy(picture).permute(2, 0, 1) for _, picture in demo.landscape_crops(size)])


def _scenes(size: int, count: int = 100) -> Tensor:
    scenes = [demo.scene(SceneConfig(), "val", 0, i) for i in range(count)]
    return torch.stack([torch.from_numpy(demo.render(scene, size)).permute(2, 0, 1) for scene in scenes])
