"""transformers' common model tests over our classes; `test_hf_common.py` copies this file beside them and runs it.

What is left out has its reason beside it (`LEFT_OUT`); what skips by itself is printed by pytest (-rs).
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import unittest
from typing import Any

import torch
from torch import nn

from openvision3.config import TextDecoderConfig, TransformerConfig, to_dict
from openvision3.hub.hf import (
    OpenVision3Config,
    OpenVision3Model,
    OpenVision3TextConfig,
    OpenVision3TextModel,
    OpenVision3VAEConfig,
    OpenVision3VisionConfig,
    OpenVision3VisionModel,
)

from ...test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor

TOWERS = "the towers' own tests have it; as CLIP's, the output has none of its own"
NO_ATTENTION = "the autoencoder's config has no attention implementation: it is none of transformers' sub_configs"
LEFT_OUT = {
    "VisionModelTest.test_config_attn_implementation_setter": NO_ATTENTION,
    "WholeModelTest.test_config_attn_implementation_setter": NO_ATTENTION,
    "WholeModelTest.test_attention_outputs": TOWERS,
    "WholeModelTest.test_hidden_states_output": TOWERS,
    "WholeModelTest.test_retain_grad_hidden_states_attentions": TOWERS,
}

TINY_VAE = OpenVision3VAEConfig(
    architecture={
        "encoder_widths": [8, 8, 8],
        "encoder_depths": [1, 1, 1],
        "decoder_widths": [8, 8, 8],
        "decoder_depths": [1, 1, 1],
    },
    include_decoder=True,
)
STACK: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}


class VisionTester:
    """A tiny vision encoder, and pixels of 2 x 2 tokens."""

    batch_size, seq_length, is_training = 3, 4, False
    num_hidden_layers, hidden_size, num_attention_heads = 2, 32, 4

    def get_config(self) -> OpenVision3VisionConfig:
        return OpenVision3VisionConfig(
            **STACK, image_size=32, projection_dim=16, stored_positions=True, vae_config=TINY_VAE.to_dict()
        )

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"pixel_values": floats_tensor([self.batch_size, 3, 32, 32]) * 2 - 1}


class TextTester:
    """A tiny text tower, and ids with padding before the last."""

    batch_size, seq_length, is_training = 3, 7, False
    num_hidden_layers, hidden_size, num_attention_heads, vocab_size = 2, 32, 4, 99

    def get_config(self) -> OpenVision3TextConfig:
        return OpenVision3TextConfig(**STACK, vocab_size=99, max_position_embeddings=12, projection_dim=16)

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 1) + 1
        mask = torch.ones_like(ids)
        ids[1, 3:6], mask[1, 3:6] = 0, 0
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


class WholeTester:
    """Both towers and their contrastive loss."""

    is_training, batch_size = True, 3

    def __init__(self) -> None:
        self.vision_model_tester, self.text_model_tester = VisionTester(), TextTester()

    def get_config(self, **decoders) -> OpenVision3Config:
        vision, text = self.vision_model_tester.get_config(), self.text_model_tester.get_config()
        return OpenVision3Config(vision_config=vision, text_config=text, **decoders)

    def prepare_config_and_inputs_for_common(self):
        _, pixels = self.vision_model_tester.prepare_config_and_inputs_for_common()
        _, text = self.text_model_tester.prepare_config_and_inputs_for_common()
        return self.get_config(), {**text, **pixels, "return_loss": True}


class DecodersTester(WholeTester):
    """With openvision3's own decoders too, which the contrastive loss does not train."""

    is_training = False

    def get_config(self) -> OpenVision3Config:
        size = TransformerConfig(32, 1, 2)
        return super().get_config(
            latent_decoder=to_dict(size),
            caption_decoder=to_dict(TextDecoderConfig(size, 99, 12)),
            bos_token_id=1,
            eos_token_id=2,
        )


class Common(ModelTesterMixin):
    test_can_init_all_missing_weights_before_2023 = True  # our files state no year

    def setUp(self) -> None:
        for kind in type(self).__mro__:
            if reason := LEFT_OUT.get(f"{kind.__name__}.{self._testMethodName}"):
                self.skipTest(f"left out: {reason}")


class VisionModelTest(Common, unittest.TestCase):
    all_model_classes = (OpenVision3VisionModel,)
    test_resize_embeddings = False
    model_tester = VisionTester()

    def test_attention_outputs(self) -> None:
        self.model_tester = VisionTester()
        self.model_tester.seq_length = 5  # the attention has the class token, the hidden states have not
        super().test_attention_outputs()

    def test_model_get_set_embeddings(self) -> None:
        """As for every vision model of transformers: no table of words."""
        model = OpenVision3VisionModel(self.model_tester.get_config())
        assert isinstance(model.get_input_embeddings(), nn.Conv2d)


class TextModelTest(Common, unittest.TestCase):
    all_model_classes = (OpenVision3TextModel,)
    model_tester = TextTester()


class WholeModelTest(Common, unittest.TestCase):
    all_model_classes = (OpenVision3Model,)
    _is_composite = True
    additional_model_inputs = ["pixel_values"]
    model_tester = WholeTester()


class DecodersModelTest(WholeModelTest):
    model_tester = DecodersTester()
