"""Training of the embedded tiny VAE: L1 + MSE + LPIPS + a small KL, on pictures that never run out."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openvision3.config import SceneConfig, VAEConfig, VAETrainConfig
from openvision3.data import demo
from openvision3.data.vae_crops import VAECrops, crop_batches
from openvision3.evaluation.perceptual import Perceptual, load_lpips
from openvision3.training.picture_loop import PictureTask, to_images, train_on_pictures
from openvision3.training.precision import Precision, autocast, resolve_device
from openvision3.training.run_folder import open_run
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
    vae = TinyVAE(VAEConfig(channels=config.vae.channels, licence="MIT"), config.vae)
    initialise_linear(vae, statistics_pictures(config))
    vae.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    lpips = load_lpips().to(device) if config.lpips_weight else None
    held_out = {"landscapes": _landscapes(config.resolution), "scenes": _scenes(config.resolution)}

    def figures(average: nn.Module) -> dict[str, float]:
        assert isinstance(average, TinyVAE)
        return evaluate(average, held_out, device)

    task = PictureTask(
        name="vae",
        module=vae,
        resolution=config.resolution,
        losses=lambda images, step, precision: _losses(config, vae, lpips, images, step, precision),
        batches=lambda step: crop_batches(
            config.resolution, config.seed, config.samples, step * config.batch_size, config.batch_size,
            config.num_workers,
        ),
        evaluate=figures,
        shown=("total", "l1", "lpips", "kl"),
    )  # fmt: skip
    average = train_on_pictures(config, task, folder, device)
    assert isinstance(average, TinyVAE)
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
            images = to_images(chunk, device)
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
