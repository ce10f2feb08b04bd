"""Frozen autoencoders behind one interface: pixels to scaled latents and back.

`TinyVAE` is the embedded one (8x, 16 channels), trained by the recipe `demo_vae`; any autoencoder of diffusers, FLUX's
first, comes through `vae_diffusers.py`; `vae_distilled.py` puts a fast encoder in front of either.
"""

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openvision3.config import OpenVisionError, TinyVAEConfig, VAEConfig, load_json, save_json

TINY_FOLDER = Path(__file__).parent / "weights" / "tiny_vae"


class FrozenVAE(nn.Module):
    """An autoencoder that never trains. Subclasses give `_encode` and `_decode` in the autoencoder's own units.

    `config` holds the latent convention: `scaled = (z - latent_shift) * latent_scale` (OpenVision 3's released weights
    were trained with latent_shift = 0; diffusers' FLUX convention has 0.1159).
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config

    def freeze(self) -> "FrozenVAE":
        """Turns off the gradients of all weights; gradients still flow to latents and pixels."""
        return self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "FrozenVAE":
        return super().train(False)

    def compile_layers(self) -> None:
        """Has PyTorch compile what gains by it, if anything: slow first calls, faster ones later."""

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], H and W multiples of `config.factor`, to scaled latents (B, C, h, w).

        The latents are the posterior's mean. Raises `ValueError` for other shapes.
        """
        factor = self.config.factor
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % factor or images.shape[3] % factor:
            shape = tuple(images.shape)
            raise ValueError(f"expected images (B, 3, H, W) with H and W multiples of {factor}, got {shape}")
        return (self._encode(images) - self.config.latent_shift) * self.config.latent_scale

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) to images (B, 3, H, W), about [-1, 1], not clamped.

        Raises `ValueError` for other shapes.
        """
        if latents.ndim != 4 or latents.shape[1] != self.config.channels:
            raise ValueError(f"expected latents (B, {self.config.channels}, h, w), got {tuple(latents.shape)}")
        return self._decode(latents / self.config.latent_scale + self.config.latent_shift)

    def _encode(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def _decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError


def activation(x: Tensor) -> Tensor:
    # Leaky: without normalisation layers, plain ReLUs died by whole layers early in training.
    return F.leaky_relu(x, 0.1)


def zero_weights(layer: nn.Conv2d) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around an activation; not normalised: what is decoded does not depend on the crop."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        zero_weights(self.conv2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(activation(self.conv1(activation(x))))


class TinyEncoder(nn.Module):
    """Images (B, 3, 8h, 8w) to posterior mean and log variance (B, C, h, w) each.

    A linear map of each 8x8 patch (initialised with principal components) carries most of the signal; the
    convolutions add what is not linear.
    """

    def __init__(self, widths: tuple[int, int, int], depths: tuple[int, int, int], channels: int):
        super().__init__()
        self.linear = nn.Conv2d(3 * 64, channels, 1)
        layers: list[nn.Module] = [nn.PixelUnshuffle(2), nn.Conv2d(12, widths[0], 3, padding=1)]
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            if i:
                layers.append(nn.Conv2d(widths[i - 1], width, 2, stride=2))
            layers += [ResidualBlock(width) for _ in range(depth)]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Conv2d(widths[-1], 2 * channels, 1)
        zero_weights(self.head)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.head(activation(self.layers(images))).chunk(2, dim=1)
        return mean + self.linear(F.pixel_unshuffle(images, 8)), (log_variance - 6).clamp(-12, 2)


class TinyDecoder(nn.Module):
    """Latents (B, C, h, w) to images (B, 3, 8h, 8w): a linear map of each latent plus convolutions."""

    def __init__(self, widths: tuple[int, int, int], depths: tuple[int, int, int], channels: int):
        super().__init__()
        self.linear = nn.Conv2d(channels, 3 * 64, 1)
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[-1], 3, padding=1)]
        for i in (2, 1, 0):
            layers += [ResidualBlock(widths[i]) for _ in range(depths[i])]
            if i:
                layers += [nn.Conv2d(widths[i], 4 * widths[i - 1], 1), nn.PixelShuffle(2)]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Conv2d(widths[0], 12, 3, padding=1)
        zero_weights(self.head)

    def forward(self, latents: Tensor) -> Tensor:
        image = F.pixel_shuffle(self.head(activation(self.layers(latents))), 2)
        return image + F.pixel_shuffle(self.linear(latents), 8)


class TinyVAE(FrozenVAE):
    """The embedded autoencoder: 8x, fully convolutional, latents scaled per channel to zero mean and unit variance."""

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: VAEConfig, architecture: TinyVAEConfig):
        super().__init__(config)
        self.architecture = architecture
        a = architecture
        self.encoder = TinyEncoder(a.encoder_widths, a.encoder_depths, config.channels)
        self.decoder = TinyDecoder(a.decoder_widths, a.decoder_depths, config.channels)
        self.register_buffer("latent_mean", torch.zeros(1, config.channels, 1, 1))
        self.register_buffer("latent_std", torch.ones(1, config.channels, 1, 1))

    def _encode(self, images: Tensor) -> Tensor:
        mean, _ = self.encoder(images.contiguous(memory_format=torch.channels_last))
        return (mean - self.latent_mean) / self.latent_std

    def _decode(self, latents: Tensor) -> Tensor:
        latents = latents * self.latent_std + self.latent_mean
        return self.decoder(latents.contiguous(memory_format=torch.channels_last))

    def save(self, folder: Path) -> None:
        """Writes `config.json` and `model.safetensors` (fp16; the statistics stay fp32)."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: (tensor if name.startswith("latent_") else tensor.half()).contiguous().cpu()
            for name, tensor in self.state_dict().items()
        }
        save_json(self.architecture, folder / "config.json")
        temporary = folder / "model.safetensors.tmp"
        save_file(tensors, temporary)
        temporary.replace(folder / "model.safetensors")


def load_tiny_vae(folder: Path | None = None) -> TinyVAE:
    """Loads a folder written by `TinyVAE.save` (default: the embedded one), frozen, on the CPU in fp32.

    Raises `OpenVisionError` where a file is missing or does not fit.
    """
    embedded = folder is None
    folder = folder or TINY_FOLDER
    weights = folder / "model.safetensors"
    if not weights.exists():
        raise OpenVisionError(f"{weights} does not exist; `ov3 train demo_vae` makes such a folder (its RUN/model)")
    architecture = load_json(TinyVAEConfig, folder / "config.json")
    config = VAEConfig(
        kind="tiny", source="embedded" if embedded else str(folder), channels=architecture.channels, licence="MIT"
    )
    vae = TinyVAE(config, architecture)
    try:
        vae.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()})
    except (RuntimeError, SafetensorError, OSError) as error:
        raise OpenVisionError(f"{weights} does not fit its config.json: {' '.join(str(error).split())[:200]}") from None
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return vae.freeze()  # type: ignore[return-value]


def load_vae(
    source: VAEConfig | str = "tiny", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> FrozenVAE:
    """Loads a frozen autoencoder: "tiny", a folder, a hub id, or the full description as a `VAEConfig`.

    A folder is one that `TinyVAE.save` or `DistilledVAE.save` wrote, or of diffusers; the latter, or a hub id, takes
    its latent convention from the autoencoder's own config. Raises `OpenVisionError` where it can't be had, naming
    what to do.
    """
    from openvision3.vae_distilled import is_distilled, load_distilled_vae  # which builds on this module

    if source == "tiny":
        source = VAEConfig()
    elif isinstance(source, str) and is_distilled(source):
        source = VAEConfig(kind="distilled", source=source)
    elif isinstance(source, str) and (Path(source) / "model.safetensors").is_file():
        source = VAEConfig(kind="tiny", source=source)
    if isinstance(source, VAEConfig) and source.kind == "distilled":
        return load_distilled_vae(Path(source.source)).to(device=device, dtype=dtype)
    if isinstance(source, VAEConfig) and source.kind == "tiny":
        vae: FrozenVAE = load_tiny_vae(None if source.source == "embedded" else Path(source.source))
        vae.config = dataclasses.replace(source, channels=vae.config.channels)
    else:
        from openvision3.vae_diffusers import load_diffusers_vae  # diffusers is slow to import

        vae = load_diffusers_vae(source)
    return vae.to(device=device, dtype=dtype)
