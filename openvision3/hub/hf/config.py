"""Configurations of the whole model for transformers: vision, text, and the decoders that openvision3 adds."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from openvision3.config import ModelConfig, TextDecoderConfig, TransformerConfig, from_dict
from openvision3.hub.hf.standalone.configuration_openvision3 import OpenVision3VisionConfig


@strict
class OpenVision3TextConfig(PreTrainedConfig):
    """The bidirectional text tower; its feature is the last position, `[cls]` (OpenVision 1)."""

    model_type = "openvision3_text"
    base_config_key = "text_config"

    vocab_size: int = 30522
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 80  # tokens, with [bos], [eos], padding and the final [cls]
    projection_dim: int = 768
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    pad_token_id: int = 0


@strict
class OpenVision3Config(PreTrainedConfig):
    """The whole model. A part that is None is missing: text tower, reconstruction decoder, caption decoder."""

    model_type = "openvision3"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "vision_config": SubConfigSpec(OpenVision3VisionConfig),
        "text_config": SubConfigSpec(OpenVision3TextConfig, optional=True),
    }

    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    text_config: dict[str, Any] | PreTrainedConfig | None = None
    latent_decoder: dict[str, Any] | None = None  # openvision3's TransformerConfig
    decoder_norm: bool = True
    caption_decoder: dict[str, Any] | None = None  # openvision3's TextDecoderConfig
    logit_scale_init_value: float = 2.6592600  # log(1 / 0.07)
    initializer_range: float = 0.02
    bos_token_id: int | None = None  # of captions, as eos_token_id
    eos_token_id: int | None = None

    def parts(self) -> ModelConfig:
        """What openvision3's decoders are built from; raises `OpenVisionError` for fields that they do not have."""
        vision = self.vision_config
        assert isinstance(vision, OpenVision3VisionConfig)
        decoder, caption = self.latent_decoder, self.caption_decoder
        return ModelConfig(
            input="pixels" if vision.vae is None else "latents",
            in_channels=vision.in_channels,
            patch_size=vision.patch_size // vision.factor,
            image_size=vision.image_size,
            embed_dim=vision.projection_dim,
            encoder=TransformerConfig(width=vision.hidden_size),
            positions=vision.positions,
            decoder=None if decoder is None else from_dict(TransformerConfig, decoder, "latent_decoder"),
            decoder_norm=self.decoder_norm,
            text_encoder=None,
            text_decoder=None if caption is None else from_dict(TextDecoderConfig, caption, "caption_decoder"),
        )
