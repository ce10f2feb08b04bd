"""Encoding against the published inference path: diffusers' AutoencoderKL, then open_clip's vision tower, both plain.

The same weights on both sides and the same pictures; what differs in the tokens is stated beside the speed.
"""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openvision3.bench.timing import Spread, limits, ratio, time_in_turns
from openvision3.config import ModelConfig, OpenVisionError
from openvision3.hub.open_clip import open_clip_tower, save_released
from openvision3.model.blocks import SIZES
from openvision3.model.openvision3 import OpenVision3
from openvision3.vae import FrozenVAE
from openvision3.vae_diffusers import DiffusersVAE, flux_config

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}

# The vae/config.json of FLUX.1-schnell and FLUX.1-dev, as far as it decides shapes.
FLUX_ARCHITECTURE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def released_like_model(
    size: str = "B", image_size: int = 256, seed: int = 0, architecture: dict[str, Any] | None = None
) -> OpenVision3:
    """An encoder as released, behind an autoencoder of FLUX.1's size (or `architecture`), all weights random.

    The autoencoder's last layer is scaled so that latents have about the spread of FLUX.1's, 1 after its factor.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    if size not in SIZES:
        raise OpenVisionError(f"unknown encoder size {size!r}: it is one of {', '.join(SIZES)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        autoencoder: Any = AutoencoderKL(**(architecture or FLUX_ARCHITECTURE))
        config = ModelConfig(
            name=f"released-like-{size}",
            image_size=image_size,
            encoder=SIZES[size],
            decoder=None,
            text_encoder=None,
            text_decoder=None,
            vae=flux_config("released"),
        )
        model = OpenVision3(config)
        with torch.no_grad():
            spread = autoencoder.encode(pictures(2, 64, seed)).latent_dist.mode().std() * config.vae.latent_scale
            for parameter in autoencoder.encoder.conv_out.parameters():
                parameter.div_(spread)
    model.attach_vae(DiffusersVAE(config.vae, autoencoder))
    return model.eval().requires_grad_(False)


def pictures(count: int, size: int, seed: int = 0) -> Tensor:
    """Smooth random pictures (B, 3, size, size) in [-1, 1]."""
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return F.interpolate(coarse, size=(size, size), mode="bicubic").clamp(-1, 1)


class PublishedPath(nn.Module):
    """The released script's way from pictures to tokens: `posterior.mean * scaling_factor`, then open_clip's tower."""

    def __init__(self, model: OpenVision3) -> None:
        """Copies the model's weights. Raises `OpenVisionError` for one that open_clip cannot hold."""
        super().__init__()
        if model.vae is None:
            raise OpenVisionError(f"model {model.config.name!r} has no VAE: there is no path from pictures to compare")
        with tempfile.TemporaryDirectory() as folder:
            save_released(model, Path(folder))
            tower = open_clip_tower(Path(folder))
        if tower is None:
            raise OpenVisionError("the published path needs open_clip: pip install 'openvision3[eval]'")
        self.tower = tower
        plain = copy.deepcopy(model.vae.autoencoder if isinstance(model.vae, DiffusersVAE) else model.vae)
        self.vae: Any = plain.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self.scale, self.shift = model.vae.config.latent_scale, model.vae.config.latent_shift

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> tokens (B, N, D)."""
        if isinstance(self.vae, FrozenVAE):
            return self.tower(self.vae.encode(images))[1]
        latents = (self.vae.encode(images).latent_dist.mode() - self.shift) * self.scale
        return self.tower(latents)[1]


@dataclass(frozen=True)
class Difference:
    """How far tokens are from others of the same pictures."""

    largest: float  # absolute
    mean: float  # absolute
    rms: float  # of the tokens themselves: the unit of the two
    cosine: float  # mean over tokens
    lowest_cosine: float

    @classmethod
    def between(cls, tokens: Tensor, reference: Tensor) -> "Difference":
        """Tokens (B, N, D) against a reference of the same shape."""
        tokens, reference = tokens.double().cpu(), reference.double().cpu()
        gap, cosine = (tokens - reference).abs(), F.cosine_similarity(tokens, reference, dim=-1)
        rms = reference.square().mean().sqrt()
        return cls(float(gap.max()), float(gap.mean()), float(rms), float(cosine.mean()), float(cosine.min()))


@dataclass(frozen=True)
class EncodingFigures:
    """What `measure_encoding` found; seconds are of a batch, by "published" or "ours" and precision."""

    batch_size: int
    size: int
    flops: float  # of a picture, autoencoder and encoder
    seconds: dict[str, Spread]
    ratios: dict[str, Spread]  # published over ours, by precision, and published fp32 over published bf16
    limits: dict[str, dict[str, Spread]]  # FLOP/s, by precision
    differences: dict[str, Difference]

    def rate(self, name: str) -> float:
        """Pictures a second, median."""
        return self.batch_size / self.seconds[name].median

    def flop_rate(self, name: str) -> float:
        """FLOP/s, median."""
        return self.flops * self.rate(name)


@torch.inference_mode()
def measure_encoding(
    model: OpenVision3,
    device: torch.device,
    size: int = 256,
    batch_size: int = 4,
    rounds: int = 5,
    compile: bool = False,
    seed: int = 0,
    say: Callable[[str], object] | None = None,
) -> EncodingFigures:
    """Times both paths in fp32 and bf16, all four in turns, and compares their tokens. The model itself is left alone.

    compile: the encoder's blocks, on our side (`compile_encoder`).
    """
    from openvision3.model.compiled import compile_encoder

    images = pictures(batch_size, size, seed).to(device)
    flops = model.flops(size)
    calls: dict[str, Callable[[], Tensor]] = {}
    tokens: dict[str, Tensor] = {}
    for precision, dtype in DTYPES.items():
        theirs = PublishedPath(model).to(device, dtype).eval()
        ours = copy.deepcopy(model).to(device, dtype).eval()
        if compile:
            compile_encoder(ours)
        calls[f"published {precision}"] = _call(theirs, images.to(dtype))
        calls[f"ours {precision}"] = _call(ours.encode, images.to(dtype))
    for name, call in calls.items():
        tokens[name] = call().float().clone()
    seconds = time_in_turns(calls, device, rounds, say=say)
    ratios = {p: ratio(seconds[f"published {p}"], seconds[f"ours {p}"]) for p in DTYPES}
    ratios["published fp32 over bf16"] = ratio(seconds["published fp32"], seconds["published bf16"])
    pairs = [
        ("ours fp32", "published fp32"),
        ("ours bf16", "published bf16"),
        ("ours bf16", "published fp32"),
        ("published bf16", "published fp32"),
    ]
    return EncodingFigures(
        batch_size,
        size,
        flops["vae_encoder"] + flops["encoder"],
        seconds,
        ratios,
        {precision: limits(device, dtype, rounds) for precision, dtype in DTYPES.items()},
        {f"{a} from {b}": Difference.between(tokens[a], tokens[b]) for a, b in pairs},
    )


def _call(function: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[], Tensor]:
    return lambda: function(images)
