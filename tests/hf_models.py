"""What the tests of the transformers integration share: tiny models, and pictures."""

from pathlib import Path
from typing import Any

import torch
from evaluation_models import random_model
from PIL import Image
from torch import Tensor, nn

import openvision3 as ov3
from openvision3.config import ModelConfig, TransformerConfig, VAEConfig
from openvision3.model.openvision3 import OpenVision3

ASSETS = Path(ov3.__file__).parent / "data" / "assets"


def shaken(model: nn.Module, std: float = 0.05) -> Any:
    """The model with noise on every weight, so that nothing is zero or one by its initialisation."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.add_(torch.randn(tensor.shape, generator=generator) * std)
    return model


def whole_model(**changes: Any) -> OpenVision3:
    """Every part, tiny, two encoder blocks."""
    return shaken(random_model(**{"encoder": TransformerConfig(width=32, depth=2, num_heads=2), **changes}))


def diffusers_model() -> OpenVision3:
    """An encoder alone on a tiny autoencoder of FLUX.1's kind, in the released convention."""
    from diffusers import AutoencoderKL  # type: ignore[attr-defined]

    from openvision3.vae_diffusers import DiffusersVAE

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (4, 4, 4, 4),
        "norm_num_groups": 2,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    autoencoder = AutoencoderKL(**sizes)
    config = VAEConfig("diffusers", "tests/tiny-kl", 16, 8, 0.3611, 0.0, "", "MIT")
    model = OpenVision3(
        ModelConfig(
            name="kl",
            image_size=32,
            embed_dim=16,
            encoder=TransformerConfig(width=32, depth=2, num_heads=2),
            decoder=None,
            text_encoder=None,
            text_decoder=None,
            vae=config,
        ),
        DiffusersVAE(config, autoencoder),
    )
    return shaken(model).eval()


def images(count: int = 2, height: int = 32, width: int = 32) -> Tensor:
    """Random pixels (count, 3, height, width) in [-1, 1]."""
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(2)) * 2 - 1


def picture() -> Image.Image:
    """A real landscape."""
    path = sorted(path for path in ASSETS.rglob("*") if path.suffix in (".jpg", ".webp", ".png"))[-1]
    return ov3.load_image(path)
