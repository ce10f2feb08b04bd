"""The whole model: one encoder, and the decoders and text towers that train it or read it."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openvision3.config import ModelConfig, OpenVisionError
from openvision3.model.blocks import Transformer
from openvision3.model.decoder import LatentDecoder
from openvision3.model.encoder import VisionEncoder, square_grid
from openvision3.model.external import ExternalEncoder
from openvision3.model.flops import forward_flops
from openvision3.model.generate import beam_search, greedy_search
from openvision3.model.packing import Packing
from openvision3.model.text import CaptionDecoder, TextEncoder
from openvision3.vae import FrozenVAE

if TYPE_CHECKING:
    from openvision3.data.tokenizer import CaptionTokenizer

MAX_LOGIT_SCALE = math.log(100)  # CLIP's clamp
INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
SIGMOID_LOGIT_SCALE, SIGMOID_LOGIT_BIAS = math.log(10), -10.0  # initial ones of the sigmoid loss (SigLIP, section 3.2)

Part = TypeVar("Part")


class OpenVision3(nn.Module):
    """Unified visual encoder (OpenVision 3, arXiv 2601.15369): image to tokens, tokens to image, embedding, caption.

    A part that `config` has as None is missing; using it raises `OpenVisionError`. `logit_scale` is the logarithm of
    the contrastive temperature, and `logit_bias` the bias of the sigmoid loss, for models with `config.logit_bias`;
    buffer `token_rms` records the tokens' root mean square, the unit of the noise of Eq. 3.
    """

    logit_scale: nn.Parameter
    logit_bias: nn.Parameter | None
    token_rms: Tensor

    def __init__(
        self, config: ModelConfig, vae: FrozenVAE | None = None, tokenizer: "CaptionTokenizer | None" = None
    ) -> None:
        super().__init__()
        check_model(config)
        self.config = config
        self.encoder = VisionEncoder(config) if config.external is None else ExternalEncoder(config)
        self.decoder = LatentDecoder(config, config.decoder) if config.decoder else None
        self.text_encoder = (
            TextEncoder(config.text_encoder, config.embed_dim, config.attention) if config.text_encoder else None
        )
        self.text_decoder = (
            CaptionDecoder(config.text_decoder, config.encoder.width, config.attention, config.position_extent)
            if config.text_decoder
            else None
        )
        scale = SIGMOID_LOGIT_SCALE if config.logit_bias else INITIAL_LOGIT_SCALE
        self.logit_scale = nn.Parameter(torch.tensor(scale))
        self.logit_bias = nn.Parameter(torch.tensor(SIGMOID_LOGIT_BIAS)) if config.logit_bias else None
        self.register_buffer("token_rms", torch.ones(()))
        self.vae: FrozenVAE | None = None
        self.tokenizer: CaptionTokenizer | None = None
        if vae is not None:
            self.attach_vae(vae)
        if tokenizer is not None:
            self.attach_tokenizer(tokenizer)

    def attach_vae(self, vae: FrozenVAE) -> None:
        """Gives the model its frozen autoencoder; raises `OpenVisionError` where the latents would not fit."""
        if self.config.input == "pixels":
            raise OpenVisionError(f"model {self.config.name!r} reads pixels: it takes no VAE")
        have, want = vae.config, self.config
        if have.channels != want.in_channels or have.factor != want.vae.factor:
            raise OpenVisionError(
                f"the VAE has {have.channels} channels at 1/{have.factor}, model {want.name!r} needs "
                f"{want.in_channels} at 1/{want.vae.factor}"
            )
        self.vae = vae

    def attach_tokenizer(self, tokenizer: "CaptionTokenizer") -> None:
        """Gives the model its tokenizer; raises `OpenVisionError` where vocabulary or padding differ."""
        for part in (self.config.text_encoder, self.config.text_decoder):
            if part is not None and (tokenizer.vocab_size, tokenizer.pad_id) != (part.vocab_size, part.pad_id):
                raise OpenVisionError(
                    f"the tokenizer has {tokenizer.vocab_size} entries and pad id {tokenizer.pad_id}, "
                    f"model {self.config.name!r} was made for {part.vocab_size} and {part.pad_id}"
                )
        self.tokenizer = tokenizer

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.logit_scale.device

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], sides multiples of 16 -> unified tokens (B, H/16 * W/16, D), not normalised.

        Raises `ValueError` for other shapes and `OpenVisionError` without a VAE. The trained `image_size` is no limit.
        """
        step = self.config.downsampling
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % step or images.shape[3] % step:
            raise ValueError(
                f"expected images (B, 3, H, W) with H and W multiples of {step}, got {tuple(images.shape)}"
            )
        if self.config.input == "pixels" or self.config.external is not None:
            return self.encoder(images)
        return self.encode_latents(self._need_vae().encode(images))

    def encode_latents(self, latents: Tensor) -> Tensor:
        """Scaled VAE latents (B, C, h, w) -> unified tokens (B, h/2 * w/2, D); skips the VAE."""
        if self.config.input == "pixels" or self.config.external is not None:
            raise OpenVisionError(f"model {self.config.name!r} reads pixels, not latents: call encode(images)")
        return self.encoder(latents)

    def decode(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Unified tokens (B, h * w, D) -> images (B, 3, 16 h, 16 w), about [-1, 1], not clamped.

        `grid`: (h, w) of a picture that is not square. Raises `OpenVisionError` without decoder or VAE.
        """
        if self.config.input == "pixels":
            return self._need(self.decoder, "decoder")(tokens, grid or square_grid(tokens.shape[1]))
        return self._need_vae().decode(self.decode_latents(tokens, grid))

    def decode_latents(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Unified tokens (B, h * w, D) -> scaled VAE latents (B, C, 2h, 2w)."""
        decoder = self._need(self.decoder, "decoder")
        if self.config.input == "pixels":
            raise OpenVisionError(f"model {self.config.name!r} has no latents: call decode(tokens)")
        return decoder(tokens, grid or square_grid(tokens.shape[1]))

    def pool(self, tokens: Tensor, normalize: bool = True) -> Tensor:
        """Unified tokens (B, N, D) -> pooled and projected image embedding (B, embed_dim), L2-normalised by default."""
        pooled = self.encoder.pool(tokens)
        return F.normalize(pooled, dim=-1) if normalize else pooled

    def embed_image(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> L2-normalised embeddings (B, embed_dim)."""
        return self.pool(self.encode(images))

    def embed_text(self, texts: list[str]) -> Tensor:
        """Texts -> L2-normalised embeddings (B, embed_dim), comparable with `embed_image`'s."""
        encoder = self._need(self.text_encoder, "text encoder")
        ids = self._need_tokenizer().encode_contrastive(list(texts), encoder.config.context_length)
        return self.embed_text_ids(ids.to(self.device))

    def embed_text_ids(self, ids: Tensor, packing: Packing | None = None) -> Tensor:
        """Ids (B, L), `[bos] words [eos] pad... [cls]` -> L2-normalised embeddings (B, embed_dim).

        `packing`: of what is no padding in `ids`; the same result for less work.
        """
        return F.normalize(self._need(self.text_encoder, "text encoder")(ids, packing), dim=-1)

    def temperature(self) -> Tensor:
        """Factor of the cosines in the contrastive loss: exp(logit_scale), at most 100.

        The limit takes nothing off the gradient: with torch's clamp there is none at or above it, and the temperature
        could never come back.
        """
        excess = (self.logit_scale - MAX_LOGIT_SCALE).clamp(min=0).detach()
        return (self.logit_scale - excess).exp()

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Brings `logit_scale` itself back to its limit: call after each optimizer step, or it may wander far above."""
        self.logit_scale.clamp_(max=MAX_LOGIT_SCALE)

    def caption_logits(self, tokens: Tensor, caption_ids: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Tokens (B, N, D) and ids (B, L), `[bos] words [eos] pad...` -> logits (B, L - 1, V) for ids[:, 1:].

        `grid`: (h, w) of a picture that is not square.
        """
        return self._need(self.text_decoder, "text decoder")(tokens, caption_ids[:, :-1], grid)

    def caption_loss(
        self,
        tokens: Tensor,
        caption_ids: Tensor,
        normalizer: Tensor | int | float,
        packing: Packing | None = None,
    ) -> Tensor:
        """Cross-entropy of `caption_logits`, summed over targets that are not padding, divided by `normalizer`.

        The logits are never all there (see `losses.caption_loss`). `packing`: of the targets, caption_ids[:, 1:], up to
        each row's last that is no padding (`up_to_last`); the same result for less work.
        """
        decoder = self._need(self.text_decoder, "text decoder")
        return decoder.loss(tokens, caption_ids[:, :-1], caption_ids[:, 1:], normalizer, packing)

    def caption(
        self,
        images: Tensor | None = None,
        *,
        tokens: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        num_beams: int = 1,
        max_length: int | None = None,
    ) -> list[str]:
        """Captions of images (B, 3, H, W) in [-1, 1], or of their tokens; greedy, or beam search for num_beams > 1.

        `grid`: (h, w) of the tokens of a picture that is not square.
        """
        decoder, tokenizer = self._need(self.text_decoder, "text decoder"), self._need_tokenizer()
        if (images is None) == (tokens is None):
            raise ValueError("caption needs either images or tokens")
        with torch.no_grad():
            if tokens is None:
                assert images is not None
                tokens = self.encode(images)
                grid = images.shape[2] // self.config.downsampling, images.shape[3] // self.config.downsampling
            bos, eos = tokenizer.bos_id, tokenizer.eos_id
            if num_beams == 1:
                ids = greedy_search(decoder, tokens, bos, eos, max_length, grid)
            else:
                ids = beam_search(decoder, tokens, bos, eos, num_beams, max_length, grid=grid)
        return [tokenizer.decode(row) for row in ids.tolist()]

    def set_checkpointing(self, enabled: bool) -> None:
        """Recomputes blocks in the backward pass: less memory, about a third more time."""
        for module in self.modules():
            if isinstance(module, Transformer):
                module.checkpoint_blocks = enabled

    def num_parameters(self) -> dict[str, int]:
        """Parameters by part; parts that the model lacks are absent."""
        parts = {
            "encoder": self.encoder,
            "decoder": self.decoder,
            "text_encoder": self.text_encoder,
            "text_decoder": self.text_decoder,
            "vae": self.vae,
        }
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items() if part is not None}
        if isinstance(self.encoder, ExternalEncoder):
            counts["encoder"] += self.encoder.tower_parameters()
        scalars = {"temperature": self.logit_scale, "logit_bias": self.logit_bias}
        return counts | {name: scalar.numel() for name, scalar in scalars.items() if scalar is not None}

    def flops(self, resolution: int) -> dict[str, float]:
        """Floating-point operations of one sample's forward pass by part, at a square resolution in pixels."""
        return forward_flops(self.config, resolution, self.vae)

    def save(
        self,
        folder: str | Path,
        *,
        overwrite: bool = False,
        model_card: str = "",
        dtype: torch.dtype | None = None,
        pack_vae: bool = True,
    ) -> None:
        """Writes the model folder; see `model/folder.py`. `dtype`: of the weights on disk (None: as they are).

        A tiny VAE goes inside, unless `pack_vae` is off: then the folder names it, as it does any other.
        """
        from openvision3.model.folder import save_folder

        save_folder(self, Path(folder), overwrite=overwrite, model_card=model_card, dtype=dtype, pack_vae=pack_vae)

    @staticmethod
    def load(
        folder: str | Path,
        vae: "FrozenVAE | Literal['auto'] | None" = "auto",
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> "OpenVision3":
        """Reads a model folder, in eval mode; see `model/folder.py`. `dtype` None: fp32, whatever is on disk."""
        from openvision3.model.folder import load_folder

        return load_folder(Path(folder), vae, device, dtype)

    def _need(self, part: Part | None, name: str) -> Part:
        if part is None:
            recipe = "attach_decoder" if name == "decoder" else "attach_text"
            raise OpenVisionError(
                f"model {self.config.name!r} has no {name}; `ov3 train {recipe} --init MODEL` gives it one"
            )
        return part

    def _need_vae(self) -> FrozenVAE:
        if self.vae is None:
            raise OpenVisionError(
                f"model {self.config.name!r} was loaded without a VAE: call encode_latents and decode_latents, or load "
                "it with vae='auto'"
            )
        return self.vae

    def _need_tokenizer(self) -> "CaptionTokenizer":
        if self.tokenizer is None:
            raise OpenVisionError(f"model {self.config.name!r} has no tokenizer; its folder lacks tokenizer.json")
        return self.tokenizer


def check_model(config: ModelConfig) -> None:
    """Raises `OpenVisionError` where a config does not describe a model; the towers check their own sizes."""
    ranges = {"patch_size": (1, 1024), "in_channels": (1, 4096), "embed_dim": (1, 65536), "image_size": (1, 65536)}
    _check_ranges(config.vae, {"factor": (1, 1024), "channels": (1, 4096)})
    _check_ranges(config, ranges)
    if not 0 < abs(config.vae.latent_scale) < math.inf:
        raise OpenVisionError(f"model config: latent_scale must be finite and not 0, got {config.vae.latent_scale:g}")
    for part in (config.text_encoder, config.text_decoder):
        if part is not None:
            _check_ranges(part, {"vocab_size": (1, 10_000_000), "context_length": (2, 65536)})
            _check_ranges(part, {"pad_id": (0, part.vocab_size - 1)})
    step = config.downsampling
    if config.image_size < step or config.image_size % step:
        raise OpenVisionError(f"model {config.name!r}: image_size {config.image_size} is not a multiple of {step}")
    if config.input == "pixels" and config.in_channels != 3:
        raise OpenVisionError(f"model {config.name!r}: input 'pixels' needs in_channels 3, got {config.in_channels}")
    if config.noise_tau < 0:
        raise OpenVisionError(f"model {config.name!r}: noise_tau must not be negative, got {config.noise_tau}")


def _check_ranges(config: object, ranges: dict[str, tuple[int, int]]) -> None:
    for name, (low, high) in ranges.items():
        if not low <= getattr(config, name) <= high:
            raise OpenVisionError(f"model config: {name} is {getattr(config, name)}, it must be from {low} to {high}")
