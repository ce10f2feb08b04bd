"""The text tower of the contrastive loss for transformers."""

from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import TransformersKwargs, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from openvision3.hub.hf.config import OpenVision3TextConfig
from openvision3.hub.hf.standalone.modeling_openvision3 import (
    OpenVision3Attention,
    OpenVision3Layer,
    OpenVision3PreTrainedModel,
)


class OpenVision3TextModel(OpenVision3PreTrainedModel):
    """Ids laid out `[bos] words [eos] pad... [cls]` to a text's embedding.

    `last_hidden_state` (B, L, D) is normalised; `pooler_output` (B, projection_dim) is its last position, projected,
    not L2-normalised.
    """

    config: OpenVision3TextConfig  # type: ignore[assignment]
    base_model_prefix = "text_model"
    main_input_name = "input_ids"
    input_modalities = ("text",)
    _input_embed_layer = "token_embedding"
    _keep_in_fp32_modules = []
    _can_record_outputs = {"hidden_states": OpenVision3Layer, "attentions": OpenVision3Attention}

    def __init__(self, config: OpenVision3TextConfig):
        super().__init__(config)
        width = config.hidden_size
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, width)
        self.layers = nn.ModuleList(OpenVision3Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.projection = nn.Linear(width, config.projection_dim, bias=False)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """input_ids (B, L), `[cls]` last; attention_mask (B, L), 1 where not padding (default: by `pad_token_id`).

        Raises `ValueError` where L exceeds `max_position_embeddings`.
        """
        if input_ids.ndim != 2 or input_ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"expected input_ids (B, L) with L at most {self.config.max_position_embeddings}, "
                f"got {tuple(input_ids.shape)}"
            )
        if attention_mask is None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.token_embedding(input_ids) + self.position_embedding(positions)
        mask: Any = create_bidirectional_mask(config=self.config, inputs_embeds=x, attention_mask=attention_mask)
        for layer in self.layers:
            x = layer(x, mask, **kwargs)
        x = self.norm(x)
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=self.projection(x[:, -1]))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, OpenVision3TextModel):
            init.normal_(module.position_embedding.weight, std=0.01)  # as CLIP's text tower
