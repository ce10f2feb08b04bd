"""The whole model for transformers: image and text embeddings, and openvision3's own decoders where they exist."""

from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPOutput
from transformers.utils.generic import TransformersKwargs, can_return_tuple

from openvision3.config import OpenVisionError
from openvision3.contrastive import contrastive_loss
from openvision3.hub.hf.config import OpenVision3Config, OpenVision3TextConfig
from openvision3.hub.hf.standalone.modeling_openvision3 import OpenVision3PreTrainedModel, OpenVision3VisionModel
from openvision3.hub.hf.text import OpenVision3TextModel
from openvision3.model.blocks import EMBEDDING_STD
from openvision3.model.decoder import LatentDecoder
from openvision3.model.encoder import square_grid
from openvision3.model.generate import beam_search, greedy_search
from openvision3.model.openvision3 import MAX_LOGIT_SCALE
from openvision3.model.text import CaptionDecoder, TextEmbedding


class OpenVision3Model(OpenVision3PreTrainedModel):
    """Vision and text towers with their contrastive loss; `decode` and `caption` where the checkpoint has the decoders.

    A part that `config` has as None is missing; using it raises `OpenVisionError`.
    """

    config: OpenVision3Config  # type: ignore[assignment]
    _keep_in_fp32_modules = []  # the vision tower names its own
    _no_split_modules = ["OpenVision3Layer", "OpenVision3VisionLayer", "OpenVision3VAE", "Block"]

    token_rms: Tensor

    def __init__(self, config: OpenVision3Config):
        super().__init__(config)
        parts, text = config.parts(), config.text_config
        self.vision_model = OpenVision3VisionModel._from_config(config.vision_config)
        self.text_model = OpenVision3TextModel._from_config(text) if isinstance(text, OpenVision3TextConfig) else None
        self.decoder = None if parts.decoder is None else LatentDecoder(parts, parts.decoder)
        self.text_decoder = (
            None
            if parts.text_decoder is None
            else CaptionDecoder(parts.text_decoder, parts.encoder.width, parts.attention, parts.position_extent)
        )
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.register_buffer("token_rms", torch.ones(()))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The text tower's token embedding, or the patch embedding without a text tower."""
        return self.vision_model.patch_embed if self.text_model is None else self.text_model.token_embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:  # type: ignore[override]
        """Replaces the text tower's token embedding."""
        self._text_model().token_embedding = value

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor | None = None, latents: Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """The vision tower's output: tokens, and `pooler_output` (B, projection_dim), not L2-normalised."""
        return self.vision_model(pixel_values=pixel_values, latents=latents, return_dict=True, **kwargs)

    @can_return_tuple
    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """The text tower's output; `pooler_output` (B, projection_dim), not L2-normalised."""
        return self._text_model()(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        latents: Tensor | None = None,
        return_loss: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CLIPOutput:
        """Images and texts -> embeddings (L2-normalised), `logits_per_image` (B_image, B_text) and its transpose.

        With `return_loss`, the symmetric contrastive loss of Eq. 5 over matching rows.
        """
        if input_ids is None:
            raise ValueError("pass input_ids as well, or call get_image_features")
        vision = self.get_image_features(pixel_values=pixel_values, latents=latents, **kwargs)
        text = self.get_text_features(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        assert vision.pooler_output is not None and text.pooler_output is not None
        image_embeds = F.normalize(vision.pooler_output, dim=-1)
        text_embeds = F.normalize(text.pooler_output, dim=-1)
        logits = self.temperature() * image_embeds @ text_embeds.T
        return CLIPOutput(
            loss=contrastive_loss(image_embeds, text_embeds, self.temperature()) if return_loss else None,  # type: ignore[arg-type]
            logits_per_image=logits,  # type: ignore[arg-type]
            logits_per_text=logits.T,  # type: ignore[arg-type]
            text_embeds=text_embeds,  # type: ignore[arg-type]
            image_embeds=image_embeds,  # type: ignore[arg-type]
            text_model_output=text,
            vision_model_output=vision,
        )

    def temperature(self) -> Tensor:
        """Factor of the cosines: exp(logit_scale), at most 100; the limit takes nothing off the gradient."""
        excess = (self.logit_scale - MAX_LOGIT_SCALE).clamp(min=0).detach()
        return (self.logit_scale - excess).exp()

    def decode(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Unified tokens (B, h * w, D) -> images (B, 3, 16 h, 16 w), about [-1, 1]; `grid` (h, w) where not square."""
        latents = self._need(self.decoder, "decoder")(tokens, grid or square_grid(tokens.shape[1]))
        if self.config.parts().input == "pixels":
            return latents
        return self._need(self.vision_model.vae, "autoencoder").decode(latents)

    @torch.no_grad()
    def caption(
        self,
        pixel_values: Tensor | None = None,
        *,
        tokens: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        num_beams: int = 1,
        max_length: int | None = None,
    ) -> Tensor:
        """Ids (B, L) of captions of images (B, 3, H, W) in [-1, 1], or of their tokens; the processor decodes them.

        `grid`: (h, w) of the tokens of a picture that is not square.
        """
        decoder, bos, eos = self._need(self.text_decoder, "text decoder"), *self._caption_ids()
        if (pixel_values is None) == (tokens is None):
            raise ValueError("caption needs either pixel_values or tokens")
        if tokens is None:
            assert pixel_values is not None
            tokens = self.get_image_features(pixel_values=pixel_values).last_hidden_state
            step = self.vision_model.config.patch_size
            grid = pixel_values.shape[2] // step, pixel_values.shape[3] // step
        assert tokens is not None
        if num_beams == 1:
            return greedy_search(decoder, tokens, bos, eos, max_length, grid)
        return beam_search(decoder, tokens, bos, eos, num_beams, max_length, grid=grid)

    def _caption_ids(self) -> tuple[int, int]:
        bos, eos = self.config.bos_token_id, self.config.eos_token_id
        if bos is None or eos is None:
            raise OpenVisionError("this checkpoint's config has no bos_token_id and eos_token_id, which captions need")
        return bos, eos

    def _text_model(self) -> OpenVision3TextModel:
        return self._need(self.text_model, "text tower")

    def _need(self, part: Any, name: str) -> Any:
        if part is None:
            raise OpenVisionError(
                f"this checkpoint has no {name}; models trained by `ov3 train`, such as 'demo', have one"
            )
        return part

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, OpenVision3Model):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            init.ones_(module.token_rms)
        elif isinstance(module, TextEmbedding):
            init.normal_(module.tokens, std=EMBEDDING_STD)
            init.normal_(module.positions, std=0.01)
