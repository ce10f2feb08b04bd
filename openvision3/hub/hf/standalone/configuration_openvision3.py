"""Configuration of OpenVision 3's vision encoder and of the frozen autoencoder inside it (arXiv 2601.15369)."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class OpenVision3VAEConfig(PreTrainedConfig):
    """The frozen autoencoder and its latent convention: `scaled = (z - latent_shift) * latent_scale`."""

    model_type = "openvision3_vae"
    base_config_key = "vae_config"

    kind: Literal["tiny", "diffusers", "none"] = "tiny"  # "none": no weights; the encoder takes latents
    architecture: dict[str, Any] | None = None  # sizes of the tiny one (None: small), or the config of diffusers' class
    channels: int = 16  # latent channels
    factor: int = 8  # pixels per latent, each side
    latent_scale: float = 1.0  # FLUX.1: 0.3611
    latent_shift: float = 0.0  # OpenVision 3's released weights: 0, where diffusers has 0.1159 for FLUX.1
    include_decoder: bool = False  # whether the half that gives pixels is here too
    source: str = ""  # where the weights came from
    sha256: str = ""  # of their file
    license: str = ""  # theirs, which holds for the weights in this checkpoint too


@strict
class OpenVision3VisionConfig(PreTrainedConfig):
    """The encoder: pixels in [-1, 1] to unified tokens, one for each `patch_size` x `patch_size` pixels."""

    model_type = "openvision3_vision"
    base_config_key = "vision_config"
    _auto_class = "AutoConfig"

    vae_config: dict[str, Any] | PreTrainedConfig | None = None  # None: the encoder reads pixels, as a plain ViT
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    projection_dim: int = 768  # of the pooled embedding
    num_channels: int = 3  # of pixel_values
    image_size: int = 256  # pixels; size at which stored positions apply
    patch_size: int = 16  # pixels per token, each side: the autoencoder's factor times the patch on its latents
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    positions: Literal["computed", "scaled"] = "computed"  # at other sizes: row and column, or spread as at image_size
    stored_positions: bool = False  # the weights hold a position table that the sine-cosine formula does not give

    def __post_init__(self, **kwargs: Any) -> None:
        # Not one of transformers' `sub_configs`, whose attention implementation is set with this one's: it has none.
        if isinstance(self.vae_config, dict):
            self.vae_config = OpenVision3VAEConfig(**self.vae_config)
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Raises `ValueError` for sizes that fit no encoder; called by `@strict`."""
        if self.hidden_size % self.num_attention_heads or self.hidden_size % 4 or self.hidden_size < 8:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 4, at least 8, and divisible by "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.patch_size % self.factor or self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size {self.patch_size} must be a multiple of the autoencoder's factor {self.factor}, and "
                f"image_size {self.image_size} one of patch_size"
            )

    @property
    def vae(self) -> Any:
        """`vae_config`. Not asked for its class: transformers may hold this file, as remote code, twice."""
        return self.vae_config

    @property
    def factor(self) -> int:
        """Pixels for each of the encoder's inputs, each side: the autoencoder's factor, or 1 without one."""
        return 1 if self.vae is None else self.vae.factor

    @property
    def in_channels(self) -> int:
        """Channels of the encoder's input: latents, or pixels without an autoencoder."""
        return self.num_channels if self.vae is None else self.vae.channels


__all__ = ["OpenVision3VAEConfig", "OpenVision3VisionConfig"]
