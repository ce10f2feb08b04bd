"""The peer of `ov3 bench train`: the unified encoder as one would compose it today from public parts.

diffusers' autoencoder, open_clip's vision and text towers and transformer blocks, the `lpips` package, PyTorch's AdamW,
autocast and compile; plain loss code. Same shapes and parameters as `OpenVision3`, whose weights it takes over.
Captions are read by CoCa's scheme, but in blocks of this model's shape (self-attention, cross-attention, MLP), for
which open_clip has none: its block, with PyTorch's attention added.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openvision3.config import ModelConfig, OpenVisionError, OptimizerConfig, TextDecoderConfig, TransformerConfig
from openvision3.data.batches import Batch
from openvision3.evaluation.perceptual import Perceptual
from openvision3.model.blocks import ACTIVATIONS, SelfAttention, sincos_positions
from openvision3.model.encoder import VisionEncoder
from openvision3.model.openvision3 import OpenVision3
from openvision3.training.noise import draw_noise
from openvision3.vae_diffusers import DiffusersVAE

try:
    from open_clip.loss import ClipLoss
    from open_clip.transformer import (
        LayerNorm,
        ResidualAttentionBlock,
        TextTransformer,
        Transformer,
        VisionTransformer,
    )
except ImportError:
    raise OpenVisionError("the peer is built from open_clip: pip install 'openvision3[eval]'") from None

Norm = Callable[[int], nn.Module]


class Activation(nn.Module):
    """An activation that open_clip's blocks have no class for."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def block_options(size: TransformerConfig) -> dict[str, Any]:
    """What a config says of a block, in open_clip's words."""
    activations: dict[str, Callable[[], nn.Module]] = {
        "gelu": nn.GELU,
        "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    }
    hidden = size.mlp_width or 4 * size.width
    return {
        "mlp_ratio": (hidden + 0.5) / size.width,  # open_clip rounds the product down
        "act_layer": activations.get(size.activation, partial(Activation, ACTIVATIONS[size.activation])),
        "norm_layer": partial(LayerNorm, eps=size.norm_eps),
    }


class PeerDecoder(nn.Module):
    """Tokens (B, N, W_enc) to latents (B, C, h, w), on open_clip's transformer."""

    positions: Tensor

    def __init__(self, config: ModelConfig, size: TransformerConfig, side: int) -> None:
        super().__init__()
        options = block_options(size)
        self.side, self.patch_size = side, config.patch_size
        self.embed = nn.Linear(config.encoder.width, size.width)
        self.register_buffer("positions", torch.zeros(side * side, size.width))
        self.transformer = Transformer(size.width, size.depth, size.num_heads, **options)
        self.norm = options["norm_layer"](size.width) if config.decoder_norm else nn.Identity()
        self.output = nn.Linear(size.width, config.patch_size**2 * config.in_channels)

    def forward(self, tokens: Tensor) -> Tensor:
        patches = self.output(self.norm(self.transformer(self.embed(tokens) + self.positions)))
        return F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, (self.side, self.side)), self.patch_size)


class CaptionBlock(ResidualAttentionBlock):
    """open_clip's block with cross-attention between its self-attention and its MLP."""

    def __init__(self, width: int, heads: int, context_width: int, **options: Any) -> None:
        super().__init__(width, heads, **options)
        self.ln_cross = options["norm_layer"](width)
        self.cross = nn.MultiheadAttention(width, heads, kdim=context_width, vdim=context_width, batch_first=True)

    def forward(self, x: Tensor, context: Tensor, attn_mask: Tensor) -> Tensor:  # type: ignore[override]
        x = x + self.attention(self.ln_1(x), attn_mask=attn_mask)
        x = x + self.cross(self.ln_cross(x), context, context, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class PeerCaptioner(nn.Module):
    """Image tokens and ids (B, L) to logits (B, L, V) of the token after each; output tied to the embedding."""

    mask: Tensor

    def __init__(self, config: TextDecoderConfig, image_width: int) -> None:
        super().__init__()
        size = config.transformer
        options = block_options(size)
        self.image_norm = options["norm_layer"](image_width)
        self.token_embedding = nn.Embedding(config.vocab_size, size.width)
        self.positions = nn.Parameter(torch.zeros(config.context_length, size.width))
        blocks = (CaptionBlock(size.width, size.num_heads, image_width, **options) for _ in range(size.depth))
        self.blocks = nn.ModuleList(blocks)
        self.ln_final = options["norm_layer"](size.width)
        causal = nn.Transformer.generate_square_subsequent_mask(config.context_length)
        self.register_buffer("mask", causal, persistent=False)

    def forward(self, tokens: Tensor, ids: Tensor) -> Tensor:
        length, context = ids.shape[1], self.image_norm(tokens)
        x = self.token_embedding(ids) + self.positions[:length]
        for block in self.blocks:
            x = block(x, context, self.mask[:length, :length])
        return F.linear(self.ln_final(x), self.token_embedding.weight)


class Peer(nn.Module):
    """The whole peer at one resolution, with the weights of `model`, its autoencoder and LPIPS as their packages have
    them.

    Raises `OpenVisionError` for what these parts can't be: other inputs than latents, captions with the image as a
    prefix or with positions, the sigmoid loss.
    """

    def __init__(self, model: OpenVision3, resolution: int, perceptual: Perceptual | None = None) -> None:
        super().__init__()
        check_supported(model.config)
        config = model.config
        text, captions = config.text_encoder, config.text_decoder
        assert text is not None and captions is not None and config.decoder is not None and model.vae is not None
        self.config, side = config, resolution // config.downsampling
        size, words = config.encoder, text.transformer
        self.vision = VisionTransformer(
            resolution // config.vae.factor,
            config.patch_size,
            size.width,
            size.depth,
            size.num_heads,
            output_dim=config.embed_dim,
            no_ln_pre=True,
            pos_embed_type="sin_cos_2d",
            pool_type="avg",
            final_ln_after_pool=True,
            output_tokens=True,
            **block_options(size),
        )
        # open_clip's reads pictures of three channels
        self.vision.conv1 = nn.Conv2d(config.in_channels, size.width, config.patch_size, config.patch_size, bias=False)
        self.decoder = PeerDecoder(config, config.decoder, side)
        self.text = TextTransformer(
            text.context_length,
            text.vocab_size,
            words.width,
            words.num_heads,
            words.depth,
            output_dim=config.embed_dim,
            no_causal_mask=True,
            use_pad_mask=True,
            pad_id=text.pad_id,
            pool_type="last",
            **block_options(words),
        )
        self.captioner = PeerCaptioner(captions, size.width)
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.clip_loss = ClipLoss()
        self.vae: Any = model.vae  # the embedded one, of which diffusers has no other
        if isinstance(model.vae, DiffusersVAE):
            self.vae = load_autoencoder(config.vae.source)
        self.lpips = None if perceptual is None else perceptual.network
        self.to(model.device, model.logit_scale.dtype)
        copy_weights(model, self, (side, side))

    def encode_pixels(self, images: Tensor) -> Tensor:
        """Images to scaled latents, by diffusers' own call (or the embedded autoencoder's)."""
        if self.config.vae.kind == "tiny":
            return self.vae.encode(images)
        vae = self.config.vae
        return (self.vae.encode(images).latent_dist.mode() - vae.latent_shift) * vae.latent_scale

    def decode_pixels(self, latents: Tensor) -> Tensor:
        """Scaled latents to images."""
        if self.config.vae.kind == "tiny":
            return self.vae.decode(latents)
        vae = self.config.vae
        return self.vae.decode(latents / vae.latent_scale + vae.latent_shift).sample

    def losses(self, batch: Batch, seed: int, pixel_stride: int) -> dict[str, Tensor]:
        """The parts of Eq. 6, to be called under autocast. `batch` is on the device."""
        images = batch.images.float() / 127.5 - 1
        if batch.latents is None:
            with torch.no_grad():
                latents = self.encode_pixels(images)
            images = images[::pixel_stride]
        else:
            latents = batch.latents.float()
        pooled, tokens = self.vision(latents)

        rms = tokens.detach().float().square().mean().sqrt() if self.config.noise_relative else 1.0
        sigma, epsilon = draw_noise(seed, batch.positions, tokens.shape[1:], self.config.noise_tau, tokens.device)
        latents_hat = self.decoder(tokens + sigma[:, None, None] * rms * epsilon)
        images_hat = self.decode_pixels(latents_hat[::pixel_stride])
        found = {
            "pixel_l1": F.l1_loss(images_hat.float(), images),
            "latent_l1": F.l1_loss(latents_hat.float(), latents.float()),
        }
        if self.lpips is not None:
            found["lpips"] = self.lpips(images_hat, images).float().mean()

        texts = self.text(torch.cat([batch.alt_ids, batch.caption_text_ids]))
        image, (alt, sentence) = F.normalize(pooled.float(), dim=-1), F.normalize(texts.float(), dim=-1).chunk(2)
        with torch.autocast(images.device.type, enabled=False):  # bf16 would round the logits to steps of 1/16
            pairs = [self.clip_loss(image, text, self.logit_scale.exp()) for text in (alt, sentence)]
        found["contrastive"] = torch.stack(pairs).mean()

        logits = self.captioner(tokens, batch.caption_ids[:, :-1]).float()
        targets = batch.caption_ids[:, 1:].flatten()
        pad_id = self.text.pad_id
        found["caption"] = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=pad_id)
        return found

    def compile_parts(self) -> None:
        """torch.compile on each transformer block and on both halves of the autoencoder."""
        stacks = (self.vision.transformer.resblocks, self.decoder.transformer.resblocks)
        for blocks in (*stacks, self.text.transformer.resblocks, self.captioner.blocks):
            for block in blocks:
                block.compile()
        self.vae.encoder.compile()
        self.vae.decoder.compile()


def load_autoencoder(source: str) -> Any:
    """diffusers' AutoencoderKL as its documentation loads it, frozen; raises `OpenVisionError` where it can't be."""
    diffusers: Any = importlib.import_module("diffusers")
    try:
        return diffusers.AutoencoderKL.from_pretrained(source).requires_grad_(False).eval()
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise OpenVisionError(f"{source} does not load as diffusers' AutoencoderKL: {reason}") from None


def check_supported(config: ModelConfig) -> None:
    """Raises `OpenVisionError` for a model that the peer can't be given the shape of."""
    text, captions = config.text_encoder, config.text_decoder
    if config.decoder is None or text is None or captions is None:
        raise OpenVisionError("the peer has a decoder and both text towers: choose a recipe that trains them all")
    if config.input != "latents" or config.external is not None or config.logit_bias:
        raise OpenVisionError("the peer reads latents and has the softmax loss: choose a recipe with these")
    if captions.image_input != "cross" or captions.image_positions:
        raise OpenVisionError("the peer's captions cross-attend to tokens without positions: choose such a recipe")


def adamw(peer: Peer, config: OptimizerConfig) -> torch.optim.AdamW:
    """PyTorch's AdamW, fused where the device has it; no decay on vectors, as open_clip's training has it."""
    trained = [parameter for parameter in peer.parameters() if parameter.requires_grad]
    kinds = {parameter.device.type for parameter in trained}
    groups = [
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=config.eps, fused=kinds <= {"cpu", "cuda"})


@torch.no_grad()
def copy_weights(model: OpenVision3, peer: Peer, grid: tuple[int, int]) -> None:
    """Gives the peer the weights of `model`."""
    values = {name: value.detach().clone() for name, value in peer_weights(model, grid).items()}
    found = peer.load_state_dict(values, strict=False)
    left = [name for name in found.missing_keys if not name.startswith(("vae.", "lpips."))]
    assert not left and not found.unexpected_keys, (left, found.unexpected_keys)


def peer_weights(model: OpenVision3, grid: tuple[int, int]) -> dict[str, Tensor]:
    """The weights of `model` by the peer's names."""
    encoder, decoder, text, captions = model.encoder, model.decoder, model.text_encoder, model.text_decoder
    assert isinstance(encoder, VisionEncoder) and decoder is not None and text is not None and captions is not None
    of_class, table = encoder.position_table(grid)
    first = torch.zeros_like(table[:1]) if of_class is None else of_class[None]
    found: dict[str, Tensor] = {
        "vision.conv1.weight": encoder.patch_embed.weight,
        "vision.class_embedding": encoder.class_token,
        "vision.positional_embedding": torch.cat([first, table]),
        "vision.proj": encoder.projection.weight.T,
        **renamed("vision.ln_post", encoder.pool_norm),
        **renamed("decoder.embed", decoder.embed),
        "decoder.positions": sincos_positions(grid, decoder.embed.out_features, extent=decoder.extent),
        **renamed("decoder.norm", decoder.norm),
        **renamed("decoder.output", decoder.output),
        "text.token_embedding.weight": text.embedding.tokens,
        "text.positional_embedding": text.embedding.positions,
        "text.text_projection": text.projection.weight.T,
        **renamed("text.ln_final", text.norm),
        **renamed("captioner.image_norm", captions.image_norm),
        "captioner.token_embedding.weight": captions.embedding.tokens,
        "captioner.positions": captions.embedding.positions,
        **renamed("captioner.ln_final", captions.norm),
        "logit_scale": model.logit_scale,
    }
    for name, stack in (
        ("vision.transformer.resblocks", encoder.transformer),
        ("decoder.transformer.resblocks", decoder.transformer),
        ("text.transformer.resblocks", text.transformer),
        ("captioner.blocks", captions.transformer),
    ):
        for number, block in enumerate(stack.blocks):
            found |= block_weights(f"{name}.{number}", block)
    return found


def block_weights(name: str, block: Any) -> dict[str, Tensor]:
    """A block's weights by open_clip's names."""
    found = {
        **renamed(f"{name}.ln_1", block.norm_1),
        **renamed(f"{name}.ln_2", block.norm_2),
        **attention_weights(f"{name}.attn", block.attention),
        **renamed(f"{name}.mlp.c_fc", block.mlp.up),
        **renamed(f"{name}.mlp.c_proj", block.mlp.down),
    }
    if (cross := block.cross) is not None:
        key, value = cross.key_value.weight.chunk(2)
        same = key.shape == cross.query.weight.shape  # PyTorch packs them then
        split = {
            f"{name}.cross.{part}_proj_weight": weight
            for part, weight in zip("qkv", (cross.query.weight, key, value), strict=True)
        }
        packed = {f"{name}.cross.in_proj_weight": torch.cat([cross.query.weight, key, value])} if same else split
        found |= packed | {
            **renamed(f"{name}.ln_cross", block.norm_cross),
            f"{name}.cross.in_proj_bias": torch.cat([cross.query.bias, cross.key_value.bias]),
            **renamed(f"{name}.cross.out_proj", cross.out),
        }
    return found


def attention_weights(name: str, attention: SelfAttention) -> dict[str, Tensor]:
    """Of PyTorch's attention, whose projections are packed as this model's are."""
    return {
        f"{name}.in_proj_weight": attention.qkv.weight,
        f"{name}.in_proj_bias": attention.qkv.bias,
        **renamed(f"{name}.out_proj", attention.out),
    }


def renamed(name: str, module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters under another name."""
    return {f"{name}.{own}": parameter for own, parameter in module.named_parameters(recurse=False)}
