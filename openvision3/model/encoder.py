"""The unified encoder: a plain ViT on VAE latents (or on pixels, the paper's variant without a VAE)."""

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from openvision3.config import ModelConfig, OpenVisionError
from openvision3.model.blocks import (
    EMBEDDING_STD,
    Transformer,
    init_projection,
    resize_positions,
    sincos_positions,
)


class VisionEncoder(nn.Module):
    """Patch embedding, class token, pre-norm blocks; tokens are the last block's patch outputs, not normalised.

    The pooled embedding is the mean over those tokens -> LayerNorm -> projection without bias. Source: OpenVision 3,
    section 3, and the layout of its released weights (`hub/released.py` has the names). Positions come from the
    sine-cosine formula at run time, so any grid works; only weights whose table that formula does not give keep the
    table (buffer `positions`, class row first), interpolated for other grids.
    """

    positions: Tensor | None

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, patch = config.encoder.width, config.patch_size
        side = config.image_size // config.downsampling
        self.patch_size, self.in_channels, self.stored_grid = patch, config.in_channels, (side, side)
        self.extent = config.position_extent
        self.transformer = Transformer(config.encoder, config.attention)
        self.patch_embed = nn.Conv2d(config.in_channels, width, kernel_size=patch, stride=patch, bias=False)
        self.class_token = nn.Parameter(torch.empty(width))
        self.register_buffer("positions", torch.zeros(side * side + 1, width) if config.stored_positions else None)
        self.pool_norm = nn.LayerNorm(width, eps=config.encoder.norm_eps)
        self.projection = nn.Linear(width, config.embed_dim, bias=False)
        init_projection(self.patch_embed)
        nn.init.normal_(self.class_token, std=EMBEDDING_STD)
        init_projection(self.projection)

    def grid(self, inputs: Tensor) -> tuple[int, int]:
        """Token grid (h, w) of latents (or pixels) (B, C, H, W); raises `ValueError` for a shape that does not fit."""
        p = self.patch_size
        if inputs.ndim != 4 or inputs.shape[1] != self.in_channels or inputs.shape[2] % p or inputs.shape[3] % p:
            raise ValueError(
                f"expected (B, {self.in_channels}, H, W) with H and W multiples of {p}, got {tuple(inputs.shape)}"
            )
        return inputs.shape[2] // p, inputs.shape[3] // p

    def position_table(self, grid: tuple[int, int]) -> tuple[Tensor | None, Tensor]:
        """Positions of the class token (None: zero) and of the patches (h * w, W), in fp32 where computed."""
        if self.positions is None:
            return None, sincos_positions(grid, self.patch_embed.out_channels, self.class_token.device, self.extent)
        patches = self.positions[1:]
        if grid != self.stored_grid:
            patches = resize_positions(patches, self.stored_grid, grid)
        return self.positions[0], patches

    def forward(self, inputs: Tensor) -> Tensor:
        """Scaled latents (B, C, H, W), or pixels in [-1, 1] -> tokens (B, H/p * W/p, W_enc), row by row."""
        of_class, of_patches = self.position_table(self.grid(inputs))
        x = rearrange(self.patch_embed(inputs), "b d h w -> b (h w) d")
        # The residual stream stays in the weights' dtype (fp32 in training), whatever autocast computes in.
        dtype = self.class_token.dtype
        first = self.class_token if of_class is None else self.class_token + of_class
        x = torch.cat([first.expand(x.shape[0], 1, -1), x.to(dtype) + of_patches.to(dtype)], dim=1)
        return self.transformer(x, first_query=1)

    def pool(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, W_enc) -> pooled, projected embedding (B, embed_dim), not L2-normalised."""
        return self.projection(self.pool_norm(tokens.mean(dim=1)))


def square_grid(num_tokens: int) -> tuple[int, int]:
    """The grid of a square picture; raises `OpenVisionError` where `num_tokens` is no square number."""
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise OpenVisionError(f"{num_tokens} tokens are no square grid: pass grid=(rows, columns)")
    return side, side
