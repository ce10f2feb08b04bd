"""A fast front: a small convolutional encoder trained onto a frozen autoencoder's latents (`distill_vae_encoder`).

    FOLDER/config.json          the encoder's size, and which autoencoder it stands for: see `DistilledVAEConfig`
    FOLDER/model.safetensors    the fast encoder alone, fp16

Latents are decoded by the autoencoder itself, which is loaded from its own place and known by its fingerprint.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from openvision3.config import (
    DistilledVAEConfig,
    FastEncoderConfig,
    OpenVisionError,
    VAEConfig,
    load_json,
    save_json,
)
from openvision3.data.latent_cache import describe_vae
from openvision3.files import save_tensors, whole_file
from openvision3.model.fingerprint import vae_fingerprint
from openvision3.vae import FrozenVAE, ResidualBlock, activation, load_vae, zero_weights

CONFIG, WEIGHTS = "config.json", "model.safetensors"

# A twentieth of the operations of FLUX.1's VAE encoder (docs/PERFORMANCE.md, "A fast front").
FLUX_FRONT = FastEncoderConfig(widths=(128, 256), depths=(1, 4))


class FastEncoder(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] to scaled latents (B, C, H / factor, W / factor).

    A linear map of each patch carries most of the signal. Residual convolutions add what is not linear, where patches
    of half the factor have been folded into channels: nothing is computed at the picture's own resolution.
    """

    def __init__(self, size: FastEncoderConfig, channels: int, factor: int):
        super().__init__()
        self.factor = factor
        fine, coarse = size.widths
        self.linear = nn.Conv2d(3 * factor**2, channels, 1)
        self.stem = nn.Conv2d(3 * (factor // 2) ** 2, fine, 3, padding=1)
        self.fine = nn.Sequential(*(ResidualBlock(fine) for _ in range(size.depths[0])))
        self.down = nn.Conv2d(fine, coarse, 2, stride=2)
        self.coarse = nn.Sequential(*(ResidualBlock(coarse) for _ in range(size.depths[1])))
        self.head = nn.Conv2d(coarse, channels, 1)
        zero_weights(self.head)

    def forward(self, images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)
        x = self.fine(self.stem(F.pixel_unshuffle(images, self.factor // 2)))
        x = self.coarse(self.down(x))
        return self.head(activation(x)) + self.linear(F.pixel_unshuffle(images, self.factor))


class DistilledVAE(FrozenVAE):
    """A frozen autoencoder whose encoder is a fast one in its place; `original` decodes.

    Its latents are `original`'s scaled ones: the own convention is scale 1, shift 0.
    """

    def __init__(self, front: FastEncoder, description: DistilledVAEConfig, original: FrozenVAE, source: str):
        """`original` in fp32, as fingerprints are of fp32 weights.

        Raises `OpenVisionError` where it is not the autoencoder that `description` names by its fingerprint.
        """
        own = original.config
        super().__init__(VAEConfig("distilled", source, own.channels, own.factor, licence=own.licence))
        self.description = description
        self.front = front
        self.original = original
        if (found := vae_fingerprint(original)) != description.fingerprint:
            raise OpenVisionError(
                f"the fast front {source} stands for another VAE ({describe_vae(description.original)}; fingerprint "
                f"{description.fingerprint[:12]}) than this one ({describe_vae(own)}; {found[:12]}): "
                "`ov3 train distill_vae_encoder --init MODEL` makes one for a model"
            )
        self.freeze()

    @classmethod
    def of(cls, front: FastEncoder, size: FastEncoderConfig, original: FrozenVAE, source: str = "") -> "DistilledVAE":
        """A fast encoder in front of the autoencoder that it was trained on, `original`, in fp32."""
        return cls(front, DistilledVAEConfig(size, original.config, vae_fingerprint(original)), original, source)

    def _encode(self, images: Tensor) -> Tensor:
        return self.front(images)

    def _decode(self, latents: Tensor) -> Tensor:
        return self.original.decode(latents)

    def save(self, folder: Path) -> None:
        """Writes the fast encoder and what it stands for; each file whole or not at all, `config.json` last."""
        tensors = {name: tensor.half().contiguous().cpu() for name, tensor in self.front.state_dict().items()}
        with whole_file(folder / WEIGHTS) as path:
            save_tensors(path, tensors, {"format": "pt"})
        save_json(self.description, folder / CONFIG)


def is_distilled(folder: str | Path) -> bool:
    """Whether a folder holds a fast front."""
    try:
        described = json.loads((Path(folder) / CONFIG).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(described, dict) and described.get("kind") == "distilled"


def load_distilled_vae(folder: Path, original: FrozenVAE | None = None) -> DistilledVAE:
    """Loads a fast front, frozen, on the CPU in fp32, before `original` (None: the autoencoder that the folder names).

    `original` is in fp32. Raises `OpenVisionError` where a file is missing or broken, the named autoencoder can't be
    had, or `original` is another than the one that the front was trained on.
    """
    description = load_json(DistilledVAEConfig, folder / CONFIG)
    if original is None:
        try:
            original = load_vae(description.original)
        except OpenVisionError as error:
            raise OpenVisionError(
                f"{folder} stands for the VAE {describe_vae(description.original)}, which can't be loaded: {error}"
            ) from None
    with torch.device("meta"):
        front = FastEncoder(description.encoder, original.config.channels, original.config.factor)
    try:
        tensors = {name: tensor.float() for name, tensor in load_file(folder / WEIGHTS).items()}
        front.load_state_dict(tensors, assign=True)
    except (RuntimeError, SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OpenVisionError(f"{folder / WEIGHTS} does not fit its {CONFIG}: {reason}") from None
    front.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return DistilledVAE(front, description, original, str(folder))
