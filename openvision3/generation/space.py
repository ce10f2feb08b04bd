"""What a generator makes: a frozen model's tokens, or its VAE's latents; from pictures, and back to pictures."""

import torch
from einops import rearrange
from torch import Tensor

from openvision3.config import OpenVisionError
from openvision3.generation.train_config import Space
from openvision3.model.fingerprint import image_fingerprint, vae_fingerprint
from openvision3.model.openvision3 import OpenVision3
from openvision3.training.decoded import encode_pixels, pictures_at_once, to_images


class PictureSpace:
    """The space (B, N, D) that a generator works in, through a frozen model with a decoder.

    "tokens": unified tokens, decoded by the model's ViT decoder and VAE. "latents": scaled VAE latents, a patch of them
    a token, so that the grid is the same; the VAE alone decodes them.
    """

    def __init__(self, model: OpenVision3, kind: Space, resolution: int = 0) -> None:
        self.model, self.kind = model.eval().requires_grad_(False), kind
        config = model.config
        self.resolution = resolution or config.image_size
        if self.resolution % config.downsampling:
            raise OpenVisionError(
                f"resolution {self.resolution} is no multiple of {config.downsampling}, a token of {config.name!r}"
            )
        if kind == "latents" and model.vae is None:
            raise OpenVisionError(f"model {config.name!r} has no VAE latents to generate")
        if kind == "tokens" and model.decoder is None:
            raise OpenVisionError(
                f"model {config.name!r} has no decoder, so its tokens can't become pictures; "
                "`ov3 train attach_decoder --init MODEL` gives it one"
            )
        side = self.resolution // config.downsampling
        self.grid = (side, side)

    @property
    def width(self) -> int:
        """D: numbers a token."""
        config = self.model.config
        return config.encoder.width if self.kind == "tokens" else config.in_channels * config.patch_size**2

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of all that decides what a picture becomes here."""
        if self.kind == "latents":
            assert self.model.vae is not None
            return vae_fingerprint(self.model.vae)
        return image_fingerprint(self.model)

    @torch.no_grad()
    def encode(self, pixels: Tensor | None, latents: Tensor | None = None, at_once: int = 0) -> Tensor:
        """uint8 pictures (B, 3, R, R), or their cached latents (B, C, h, w) -> (B, N, D), fp32."""
        model = self.model
        if model.vae is not None and (self.kind == "latents" or self._reads_latents):
            if latents is None:
                assert pixels is not None
                size = pictures_at_once(model.vae, model.device, pixels.shape[-1], at_once)
                latents = encode_pixels(model.vae, pixels, torch.float32, size)
            if self.kind == "latents":
                return self._patches(latents.float())
            return model.encode_latents(latents.float()).float()
        assert pixels is not None
        return model.encode(to_images(pixels, torch.float32)).float()

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """(B, N, D) -> images (B, 3, R, R), about [-1, 1], not clamped."""
        if self.kind == "tokens":
            return self.model.decode(x, self.grid)
        assert self.model.vae is not None
        size = self.model.config.patch_size
        h, w = self.grid
        latents = rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", h=h, w=w, p=size, q=size)
        return self.model.vae.decode(latents)

    @property
    def _reads_latents(self) -> bool:
        return self.model.config.input == "latents" and self.model.config.external is None

    def _patches(self, latents: Tensor) -> Tensor:
        size = self.model.config.patch_size
        return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=size, q=size)
