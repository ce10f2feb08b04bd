"""Prints what one picture costs in OpenVision 3, CLIP and SigLIP encoders: the table of docs/CHOOSING.md.

    python benchmarks/costs.py

Floating-point operations are counted by PyTorch's counter on the meta device, two for each multiply-add of matrices and
convolutions, from picture to pooled embedding, batch 1; no weights are read. CLIP is built from open_clip's
configurations, SigLIP from timm's, FLUX.1's VAE from diffusers' AutoencoderKL. Needs openvision3[eval].
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from openvision3.config import ModelConfig, TransformerConfig
from openvision3.model.flops import counted_flops
from openvision3.model.openvision3 import OpenVision3
from openvision3.vae import load_vae
from openvision3.vae_diffusers import FLUX_ARCHITECTURE, DiffusersVAE, flux_config

SIZES = {"B": TransformerConfig(768, 12, 12), "L": TransformerConfig(1024, 24, 16)}


@dataclass(frozen=True)
class Cost:
    """What one encoder needs for one picture."""

    name: str
    size: int  # side of the picture, pixels
    tokens: int
    width: int  # of a token
    parameters: int  # without the VAE
    flops: float  # without the VAE
    vae_parameters: int = 0  # of the VAE's encoder
    vae_flops: float = 0.0  # of the VAE's encoder


def main() -> None:
    """Prints the table, as Markdown."""
    print(table(list(costs())))


def table(rows: list[Cost]) -> str:
    """The costs as a Markdown table; the last column compares with the CLIP row above."""
    lines = [
        "| encoder | picture | tokens | parameters | of its VAE encoder | GFLOPs without VAE | with VAE "
        "| against the CLIP above |",
        "|---|---|---|---|---|---|---|---|",
    ]
    clip = rows[0]
    for row in rows:
        clip = row if row.name.startswith("CLIP") else clip
        total = row.flops + row.vae_flops
        of_vae = f"{row.vae_parameters / 1e6:.1f} M" if row.vae_parameters else "no VAE"
        lines.append(
            f"| {row.name} | {row.size} px | {row.tokens} x {row.width} | {row.parameters / 1e6:.1f} M | {of_vae} | "
            f"{row.flops / 1e9:.1f} | {total / 1e9:.1f} | x {total / clip.flops:.1f} |"
        )
    return "\n".join(lines)


def costs() -> Iterator[Cost]:
    """Counts every row of the table, on the meta device."""
    flux, tiny = flux_vae(), load_vae("tiny").to("meta")
    yield clip("ViT-B-16", "CLIP B/16")
    yield siglip("vit_base_patch16_siglip_224", "SigLIP B/16")
    yield openvision("B", 224, "FLUX.1's VAE", flux)
    yield openvision("B", 256, "FLUX.1's VAE", flux)
    yield openvision("B", 256, "the embedded VAE", tiny)
    yield clip("ViT-L-14", "CLIP L/14")
    yield siglip("vit_large_patch16_siglip_256", "SigLIP L/16")
    yield siglip("vit_so400m_patch14_siglip_224", "SigLIP So400m/14")
    yield openvision("L", 256, "FLUX.1's VAE", flux)


def flux_vae() -> DiffusersVAE:
    """FLUX.1's autoencoder without weights."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    with torch.device("meta"):
        return DiffusersVAE(flux_config(), AutoencoderKL(**FLUX_ARCHITECTURE))


def openvision(size: str, side: int, named: str, vae: Any) -> Cost:
    """An encoder of ours, embedding of 768 numbers, with a VAE on the meta device."""
    config = ModelConfig(
        image_size=side, encoder=SIZES[size], decoder=None, text_encoder=None, text_decoder=None, attention="sdpa"
    )
    with torch.device("meta"):
        model = OpenVision3(config).eval().requires_grad_(False)

    def embed(latents: Tensor) -> Tensor:
        return model.pool(model.encode_latents(latents))

    inner = vae.autoencoder if isinstance(vae, DiffusersVAE) else vae
    return Cost(
        f"OpenVision 3 {size}, {named}",
        side,
        (side // config.downsampling) ** 2,
        config.encoder.width,
        parameters(model.encoder),
        counted_flops(embed, (config.in_channels, side // 8, side // 8)),
        parameters(inner.encoder),
        counted_flops(vae.encode, (3, side, side)),
    )


def clip(architecture: str, name: str) -> Cost:
    """The vision tower of one of open_clip's configurations."""
    import open_clip

    config: Any = open_clip.get_model_config(architecture)
    with torch.device("meta"):
        tower: Any = open_clip.CLIP(**config).eval().requires_grad_(False).visual
    side = tower.image_size[0]
    tokens = (side // tower.patch_size[0]) ** 2
    return Cost(name, side, tokens, tower.conv1.out_channels, parameters(tower), counted_flops(tower, (3, side, side)))


def siglip(architecture: str, name: str) -> Cost:
    """One of timm's SigLIP towers, its attention pooling included."""
    import timm

    with torch.device("meta"):
        tower: Any = timm.create_model(architecture, pretrained=False, num_classes=0).eval().requires_grad_(False)
    side = tower.patch_embed.img_size[0]
    flops = counted_flops(tower, (3, side, side))
    return Cost(name, side, tower.patch_embed.num_patches, tower.embed_dim, parameters(tower), flops)


def parameters(module: nn.Module) -> int:
    """Number of a module's weights."""
    return sum(parameter.numel() for parameter in module.parameters())


if __name__ == "__main__":
    main()
