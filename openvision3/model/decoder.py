"""The reconstruction decoder: a ViT with patch 1 on the unified tokens, then a linear layer to latent patches."""

from einops import rearrange
from torch import Tensor, nn

from openvision3.config import ModelConfig, OpenVisionError, TransformerConfig
from openvision3.model.blocks import Transformer, init_linear, sincos_positions

_OUTPUT_STD = 0.02  # first outputs near zero, the mean of scaled latents


class LatentDecoder(nn.Module):
    """Unified tokens to VAE latents (or to pixels, in the variant without a VAE). Source: OpenVision 3, section 3.

    The paper states the blocks (Base, patch 1) and the linear layer; fixed sine-cosine positions, no class token and a
    LayerNorm before the linear layer (`decoder_norm`) are choices made here.
    """

    def __init__(self, config: ModelConfig, size: TransformerConfig):
        super().__init__()
        self.patch_size, self.out_channels = config.patch_size, config.in_channels
        self.extent = config.position_extent
        self.embed = nn.Linear(config.encoder.width, size.width)
        self.transformer = Transformer(size, config.attention)
        self.norm = nn.LayerNorm(size.width, eps=size.norm_eps) if config.decoder_norm else nn.Identity()
        self.output = nn.Linear(size.width, config.patch_size**2 * config.in_channels)
        init_linear(self.embed)
        nn.init.trunc_normal_(self.output.weight, std=_OUTPUT_STD)
        nn.init.zeros_(self.output.bias)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, h * w, W_enc) of a grid (h, w) -> latents (or pixels) (B, C, h * p, w * p)."""
        if tokens.ndim != 3 or tokens.shape[1:] != (grid[0] * grid[1], self.embed.in_features):
            raise OpenVisionError(
                f"expected tokens (B, {grid[0] * grid[1]}, {self.embed.in_features}) for a grid of {grid[0]} x "
                f"{grid[1]}, got {tuple(tokens.shape)}"
            )
        dtype = self.embed.weight.dtype
        positions = sincos_positions(grid, self.embed.out_features, tokens.device, self.extent)
        x = self.transformer(self.embed(tokens).to(dtype) + positions.to(dtype))
        patches = self.output(self.norm(x))
        p = self.patch_size
        return rearrange(patches, "b (h w) (c p q) -> b c (h p) (w q)", h=grid[0], w=grid[1], p=p, q=p)
