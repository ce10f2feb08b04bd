"""OpenVision 3's vision encoder (arXiv 2601.15369) for transformers: a plain ViT on the latents of a frozen VAE.

Pixels (B, 3, H, W) in [-1, 1] go through the VAE inside; unified tokens (B, H/16 * W/16, D) come out, raw (the last
block's outputs, not normalised, no class token), with a pooled and projected embedding. The mathematics and weights are
those of openvision3's own encoder; attention implementations, hidden states and gradient checkpointing, transformers'.
"""

from collections.abc import Callable
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import TransformersKwargs, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_openvision3 import OpenVision3VAEConfig, OpenVision3VisionConfig


def sincos_positions(grid: tuple[int, int], width: int, device: torch.device, extent: tuple[int, int] | None) -> Tensor:
    """Fixed 2-D sine-cosine positions (h * w, width), row by row, in fp32: quarters sin x, cos x, sin y, cos y.

    Coordinates are columns and rows; with `extent` (rows, columns) any grid covers what one of that size covers.
    """
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float32, device=device) / (width // 4 - 1))
    coordinates = []
    for axis, count in enumerate(grid):
        steps = torch.arange(count, dtype=torch.float32, device=device)
        steps = steps if extent is None else (steps + 0.5) * (extent[axis] / count) - 0.5
        coordinates.append(steps[:, None] * frequency)
    y, x = coordinates
    x = torch.cat([x.sin(), x.cos()], dim=-1).expand(*grid, -1)
    y = torch.cat([y.sin(), y.cos()], dim=-1)[:, None].expand(*grid, -1)
    return torch.cat([x, y], dim=-1).flatten(0, 1)


def resize_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Interpolates a stored position table (h * w, width) from one grid to another: bicubic, antialiased."""
    picture = table.float().unflatten(0, old).permute(2, 0, 1)[None]
    picture = F.interpolate(picture, size=new, mode="bicubic", antialias=True, align_corners=False)
    return picture[0].permute(1, 2, 0).flatten(0, 1)


# The frozen autoencoders


def _activation(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.1)


class TinyResidualBlock(nn.Module):
    """Two 3x3 convolutions around an activation, added to the input."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(_activation(self.conv1(_activation(x))))


class TinyEncoder(nn.Module):
    """Images (B, 3, 8h, 8w) to the posterior's mean (B, C, h, w): a linear map of each 8x8 patch plus convolutions."""

    def __init__(self, widths: list[int], depths: list[int], channels: int):
        super().__init__()
        self.linear = nn.Conv2d(3 * 64, channels, 1)
        layers: list[nn.Module] = [nn.PixelUnshuffle(2), nn.Conv2d(12, widths[0], 3, padding=1)]
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            if i:
                layers.append(nn.Conv2d(widths[i - 1], width, 2, stride=2))
            layers += [TinyResidualBlock(width) for _ in range(depth)]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Conv2d(widths[-1], 2 * channels, 1)  # mean, and log variance for training

    def forward(self, images: Tensor) -> Tensor:
        mean = self.head(_activation(self.layers(images))).chunk(2, dim=1)[0]
        return mean + self.linear(F.pixel_unshuffle(images, 8))


class TinyDecoder(nn.Module):
    """Latents (B, C, h, w) to images (B, 3, 8h, 8w)."""

    def __init__(self, widths: list[int], depths: list[int], channels: int):
        super().__init__()
        self.linear = nn.Conv2d(channels, 3 * 64, 1)
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[-1], 3, padding=1)]
        for i in (2, 1, 0):
            layers += [TinyResidualBlock(widths[i]) for _ in range(depths[i])]
            if i:
                layers += [nn.Conv2d(widths[i], 4 * widths[i - 1], 1), nn.PixelShuffle(2)]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Conv2d(widths[0], 12, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        image = F.pixel_shuffle(self.head(_activation(self.layers(latents))), 2)
        return image + F.pixel_shuffle(self.linear(latents), 8)


def build_autoencoder(architecture: dict[str, Any]) -> Any:
    """An autoencoder of diffusers from its config, without weights of its own; `_class_name` says which."""
    try:
        import diffusers
    except ImportError as error:
        raise ImportError("this encoder's autoencoder is one of diffusers': pip install diffusers") from error
    name = str(architecture.get("_class_name"))
    kind = getattr(diffusers, name, None) if name.startswith("Autoencoder") else None
    if kind is None:
        raise ValueError(f"vae_config.architecture names {name!r}, which is no autoencoder of diffusers")
    return kind.from_config(architecture)


class OpenVision3VAE(nn.Module):
    """A frozen autoencoder: pixels to scaled latents and, where `include_decoder` says so, back."""

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: OpenVision3VAEConfig):
        super().__init__()
        self.config = config
        if config.kind == "tiny":
            sizes = config.architecture or {"encoder_widths": [32, 64, 128], "encoder_depths": [1, 2, 2]}
            self.encoder = TinyEncoder(sizes["encoder_widths"], sizes["encoder_depths"], config.channels)
            if config.include_decoder:
                self.decoder = TinyDecoder(sizes["decoder_widths"], sizes["decoder_depths"], config.channels)
            self.register_buffer("latent_mean", torch.zeros(1, config.channels, 1, 1))
            self.register_buffer("latent_std", torch.ones(1, config.channels, 1, 1))
        else:
            self.autoencoder = build_autoencoder(config.architecture or {})
            if not config.include_decoder:
                self.autoencoder.decoder = self.autoencoder.post_quant_conv = None
        self.train()

    def train(self, mode: bool = True) -> "OpenVision3VAE":
        """Leaves it frozen, in eval mode. `from_pretrained` makes new parameters and then calls this."""
        return super().train(False).requires_grad_(False)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to scaled latents (B, C, H/8, W/8), the posterior's mean."""
        images = images.to(self._dtype())
        # Nothing inside learns: without a gradient to the pixels, activations need not be kept.
        with torch.set_grad_enabled(torch.is_grad_enabled() and images.requires_grad):
            if self.config.kind == "tiny":
                latents = (self.encoder(images) - self.latent_mean) / self.latent_std
            else:
                output = self.autoencoder.encode(images)
                if hasattr(output, "latent_dist"):
                    latents = output.latent_dist.mode()
                else:
                    latents = output.latents if hasattr(output, "latents") else output.latent
            return (latents - self.config.latent_shift) * self.config.latent_scale

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) to images (B, 3, 8h, 8w), about [-1, 1], not clamped."""
        if not self.config.include_decoder:
            raise ValueError("this checkpoint holds the encoding half of its autoencoder alone: it gives no pixels")
        latents = latents.to(self._dtype()) / self.config.latent_scale + self.config.latent_shift
        if self.config.kind == "tiny":
            return self.decoder(latents * self.latent_std + self.latent_mean)
        return self.autoencoder.decode(latents).sample

    def _dtype(self) -> torch.dtype:
        dtype = next(self.parameters()).dtype
        if dtype == torch.float16 and self.config.kind == "diffusers":
            raise ValueError(
                "FLUX.1's autoencoder overflows in fp16: call from_pretrained with that dtype, which leaves it in fp32"
            )
        return dtype


# The transformer


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """(B, heads, N, d) each -> mixed values (B, N, heads, d) and attention weights (B, heads, N, N)."""
    weights = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class OpenVision3Attention(nn.Module):
    """Multi-head self-attention with one fused projection to queries, keys and values."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        qkv = self.qkv(x).unflatten(-1, (3, -1, self.head_dim))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        mixed, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.out(mixed.flatten(2)), weights


class OpenVision3MLP(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(self, config: Any):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class OpenVision3Layer(GradientCheckpointingLayer):
    """One pre-norm block: self-attention and MLP, each added to the residual stream."""

    def __init__(self, config: Any):
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = OpenVision3Attention(config)
        self.norm_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = OpenVision3MLP(config)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """(B, N, D) -> (B, N, D)"""
        return self.block(hidden_states, attention_mask, **kwargs)

    def block(self, x: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        x = x + self.attention(self.norm_1(x), attention_mask, **kwargs)[0]
        return x + self.mlp(self.norm_2(x))


class OpenVision3VisionLayer(OpenVision3Layer):
    """A block with the class token beside the patches, so that the hidden states that are recorded are theirs alone."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, class_state: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Patches (B, N, D) and class token (B, 1, D) -> the same."""
        x = self.block(torch.cat([class_state, hidden_states], dim=1), None, **kwargs)
        return x[:, 1:], x[:, :1]


class OpenVision3PreTrainedModel(PreTrainedModel):
    """What OpenVision 3's models share: switches, and the initialisation of random weights."""

    config: OpenVision3VisionConfig
    base_model_prefix = "openvision3"
    input_modalities = ("image", "text")  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    _no_split_modules = ["OpenVision3Layer", "OpenVision3VisionLayer", "OpenVision3VAE"]
    _keep_in_fp32_modules = ["vae"]  # of fp16 models: FLUX.1's autoencoder overflows there
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, OpenVision3VisionModel):
            init.normal_(module.class_token, std=self.config.initializer_range)
            if module.positions is not None:
                init.zeros_(module.positions)
        elif isinstance(module, OpenVision3VAE) and module.config.kind == "tiny":
            init.zeros_(module.latent_mean)
            init.ones_(module.latent_std)


class OpenVision3VisionModel(OpenVision3PreTrainedModel):
    """Pixels in [-1, 1] (or scaled latents) to unified tokens and a pooled embedding.

    `last_hidden_state` (B, N, D) are the raw tokens, also the last of `hidden_states`; no class token anywhere.
    `pooler_output` (B, projection_dim) is mean -> LayerNorm -> projection, not L2-normalised.
    """

    config: OpenVision3VisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]
    _auto_class = "AutoModel"
    _input_embed_layer = "patch_embed"
    _can_record_outputs = {"hidden_states": OpenVision3VisionLayer, "attentions": OpenVision3Attention}

    vae: OpenVision3VAE | None
    positions: Tensor | None

    def __init__(self, config: OpenVision3VisionConfig):
        super().__init__(config)
        vae, width, patch = config.vae, config.hidden_size, config.patch_size // config.factor
        side = config.image_size // config.patch_size
        self.stored_grid = (side, side)
        self.vae = None if vae is None or vae.kind == "none" else OpenVision3VAE(vae)
        self.patch_embed = nn.Conv2d(config.in_channels, width, kernel_size=patch, stride=patch, bias=False)
        self.class_token = nn.Parameter(torch.zeros(width))
        self.register_buffer("positions", torch.zeros(side * side + 1, width) if config.stored_positions else None)
        self.layers = nn.ModuleList(OpenVision3VisionLayer(config) for _ in range(config.num_hidden_layers))
        self.pool_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.projection = nn.Linear(width, config.projection_dim, bias=False)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: Tensor | None = None,
        latents: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """pixel_values (B, 3, H, W) in [-1, 1], sides multiples of 16, or scaled latents (B, C, h, w), not both.

        Any size will do; `image_size` is no limit. Raises `ValueError` for other shapes, and for pixels where the
        checkpoint has no autoencoder.
        """
        x = self.patch_embed(self._inputs(pixel_values, latents))
        of_class, of_patches = self._positions((x.shape[2], x.shape[3]))
        tokens = x.flatten(2).transpose(1, 2) + of_patches.to(x.dtype)
        first = self.class_token if of_class is None else self.class_token + of_class
        state = first.to(x.dtype).expand(x.shape[0], 1, -1)
        for layer in self.layers:
            tokens, state = layer(tokens, state, **kwargs)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=self.pool(tokens))

    def pool(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, D) -> pooled, projected embedding (B, projection_dim), not L2-normalised."""
        return self.projection(self.pool_norm(tokens.mean(dim=1)))

    def _inputs(self, pixel_values: Tensor | None, latents: Tensor | None) -> Tensor:
        """What the patch embedding reads: latents, or pixels where the encoder has no autoencoder by design."""
        config = self.config
        if latents is not None and pixel_values is None:
            if config.vae is None:
                raise ValueError("this encoder reads pixels: pass pixel_values")
            inputs = _checked("latents", latents, config.in_channels, config.patch_size // config.factor)
        elif pixel_values is not None and latents is None:
            inputs = _checked("pixel_values", pixel_values, config.num_channels, config.patch_size)
            if self.vae is not None:
                inputs = self.vae.encode(inputs)
            elif config.vae is not None:
                raise ValueError("this checkpoint has no autoencoder: pass latents, scaled as its vae_config says")
        else:
            raise ValueError("pass either pixel_values or latents")
        return inputs.to(self.patch_embed.weight.dtype)

    def _positions(self, grid: tuple[int, int]) -> tuple[Tensor | None, Tensor]:
        """Positions of the class token (None: zero) and of the patches (h * w, D)."""
        if self.positions is None:
            extent = self.stored_grid if self.config.positions == "scaled" else None
            return None, sincos_positions(grid, self.config.hidden_size, self.class_token.device, extent)
        patches = self.positions[1:]
        if grid != self.stored_grid:
            patches = resize_positions(patches, self.stored_grid, grid)
        return self.positions[0], patches


def _checked(name: str, given: Tensor, channels: int, step: int) -> Tensor:
    if given.ndim != 4 or given.shape[1] != channels or given.shape[2] % step or given.shape[3] % step:
        raise ValueError(
            f"expected {name} (B, {channels}, H, W) with H and W multiples of {step}, got {tuple(given.shape)}"
        )
    return given


__all__ = ["OpenVision3PreTrainedModel", "OpenVision3VisionModel"]
