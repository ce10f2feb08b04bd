"""How well pictures come back: PSNR, SSIM and LPIPS of the model, and of its VAE alone (the ceiling)."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openvision3.config import OpenVisionError
from openvision3.data.transforms import from_uint8
from openvision3.evaluation.fidelity import FeatureCollector, FeatureNetwork, fidelity, fidelity_protocol
from openvision3.evaluation.samples import EncodedBatch, SampleSet, encode_batches, evaluating, mean, to_uint8

PSNR_CAP = 100.0  # dB; that of identical pictures, which has no finite value
SSIM_WINDOW = 11  # pixels
PROTOCOL = (
    "8-bit RGB (rounded, not truncated) before and after; PSNR: mean of per-picture values over all channels, capped "
    f"at {PSNR_CAP:.0f} dB for identical pictures; SSIM: Gaussian window {SSIM_WINDOW}, sigma 1.5, data range 1, mean "
    "over channels and over positions where the window fits; LPIPS: v0.1, AlexNet; vae_*: the frozen VAE alone, the "
    "ceiling"
)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of uint8 pictures (B, C, H, W): (B,) in float64, `PSNR_CAP` where identical."""
    error = (a.double() - b.double()).square().mean(dim=(1, 2, 3)) / 255**2
    return (-10 * error.log10()).clamp(max=PSNR_CAP)  # infinite where identical


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of uint8 pictures (B, C, H, W): (B,) in float64, in [-1, 1], 1 where identical.

    Gaussian window 11, sigma 1.5, K1 = 0.01, K2 = 0.03, population covariance, no padding; the mean over channels.
    Raises `OpenVisionError` for pictures smaller than the window. Source: Wang et al., 2004.
    """
    channels, height, width = a.shape[1:]
    if min(height, width) < SSIM_WINDOW:
        raise OpenVisionError(f"SSIM needs pictures of at least {SSIM_WINDOW} px a side, got {height} x {width}")
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64, device=a.device) - SSIM_WINDOW // 2
    window = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = (window / window.sum()).expand(channels, 1, -1)

    def blur(x: Tensor) -> Tensor:
        x = F.conv2d(x, window[:, :, None, :], groups=channels)
        return F.conv2d(x, window[:, :, :, None], groups=channels)

    x, y = a.double() / 255, b.double() / 255
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


class ReconstructionMeter:
    """Gathers per-picture values batch by batch.

    `perceptual` is LPIPS (`load_lpips`), and `network` what Fréchet and kernel distances are measured on; None leaves
    them out.
    """

    def __init__(self, model: Any, perceptual: nn.Module | None = None, network: FeatureNetwork | None = None) -> None:
        if model.config.decoder is None:
            raise OpenVisionError(
                f"{model.config.name} has no latent decoder (part 'decoder'), so it can't reconstruct pictures; "
                "`ov3 train attach_decoder --init MODEL` gives it one"
            )
        self.model = model
        self.perceptual = perceptual
        self.values: dict[str, list[float]] = {}
        self.identical = 0
        self.network = network
        self.features = {name: FeatureCollector(network) for name in ("original", "", "vae_") if network is not None}

    def update(self, batch: EncodedBatch) -> None:
        height, width = batch.images.shape[2:]
        if self.features:
            self.features["original"].update(batch.pixels)
        step = self.model.config.downsampling
        images = self.model.decode(batch.tokens, grid=(height // step, width // step))
        self._compare("", batch.pixels, to_uint8(images).cpu())
        if self.model.vae is not None:
            images = self.model.vae.decode(self.model.vae.encode(batch.images))
            self._compare("vae_", batch.pixels, to_uint8(images).cpu())

    def _compare(self, prefix: str, originals: Tensor, others: Tensor) -> None:
        figures = {"psnr": psnr(originals, others), "ssim": ssim(originals, others)}
        if self.perceptual is not None:
            device = next(self.perceptual.parameters()).device
            figures["lpips"] = self.perceptual(from_uint8(originals).to(device), from_uint8(others).to(device))
        if not prefix:
            self.identical += int((originals == others).flatten(1).all(dim=1).sum())
        if self.features:
            self.features[prefix].update(others)
        for name, figure in figures.items():
            self.values.setdefault(prefix + name, []).extend(figure.double().tolist())

    def result(self) -> dict[str, Any]:
        """Means, gaps to the VAE (what the model loses: VAE minus model, for LPIPS model minus VAE), and counts."""
        figures: dict[str, Any] = {name: mean(values) for name, values in self.values.items()}
        for name in ("psnr", "ssim", "lpips"):
            if f"vae_{name}" in figures:
                gap = figures[f"vae_{name}"] - figures[name]
                figures[f"{name}_gap"] = -gap if name == "lpips" else gap
        values = self.values.get("psnr", [])
        protocol = PROTOCOL
        if self.network is not None and len(values) > 1:
            originals = self.features["original"].features()
            figures |= self._distances(originals, self.network)
            protocol += f"; distances: {fidelity_protocol(originals, originals, self.network)}"
        figures["psnr_standard_error"] = _standard_error(values)
        figures |= {"n": len(values), "identical": self.identical, "protocol": protocol}
        return figures

    def _distances(self, originals: Tensor, network: FeatureNetwork) -> dict[str, float]:
        """Fréchet and kernel distances to the originals' features, named after the network; on Inception rFID."""
        found: dict[str, float] = {}
        for prefix in ("", "vae_"):
            if f"{prefix}psnr" in self.values:
                scores = fidelity(originals, self.features[prefix].features(), network)
                found |= {prefix + {"FID": "rFID"}.get(name, name): score for name, score in scores.items()}
        return found


def _standard_error(values: list[float]) -> float:
    if len(values) < 2:
        return math.nan
    centre = mean(values)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - 1) / len(values))


def reconstruction(
    model: Any,
    samples: SampleSet,
    batch_size: int = 32,
    perceptual: nn.Module | None = None,
    network: FeatureNetwork | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """PSNR and SSIM of the model and of its VAE alone; LPIPS with `perceptual`; distances of the sets with `network`.

    Raises `OpenVisionError` for a model without a decoder.
    """
    with evaluating(model):
        meter = ReconstructionMeter(model, perceptual, network)
        for batch in encode_batches(model, samples, batch_size, progress):
            meter.update(batch)
        return meter.result()
