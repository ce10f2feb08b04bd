"""Models to evaluate: a real one with random weights, and an oracle that knows the answers."""

from types import SimpleNamespace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from openvision3.config import ModelConfig, TextDecoderConfig, TextEncoderConfig, TransformerConfig
from openvision3.data.tokenizer import demo_tokenizer
from openvision3.evaluation.samples import EvalSample, SampleSet
from openvision3.model.openvision3 import OpenVision3
from openvision3.vae import TinyVAE, TinyVAEConfig, VAEConfig


def random_model(**changes: Any) -> OpenVision3:
    """All parts, tiny, seeded; `changes` to the config may leave parts out."""
    torch.manual_seed(0)
    tokenizer = demo_tokenizer()
    size = TransformerConfig(width=32, depth=1, num_heads=2)
    text: Any = {
        "transformer": size,
        "vocab_size": tokenizer.vocab_size,
        "pad_id": tokenizer.pad_id,
        "context_length": 32,
    }
    parts: dict[str, Any] = {
        "name": "random",
        "image_size": 32,
        "embed_dim": 16,
        "encoder": size,
        "decoder": size,
        "text_encoder": TextEncoderConfig(**text),
        "text_decoder": TextDecoderConfig(**{**text, "context_length": 12, "image_positions": 1.0}),
    }
    architecture = TinyVAEConfig(
        encoder_widths=(8, 8, 8), decoder_widths=(8, 8, 8), encoder_depths=(1, 1, 1), decoder_depths=(1, 1, 1)
    )
    vae = TinyVAE(VAEConfig(), architecture).freeze()
    return OpenVision3(ModelConfig(**{**parts, **changes}), vae, tokenizer).eval()  # type: ignore[arg-type]


class Oracle(nn.Module):
    """Recognises each picture of a set, so that every figure must reach its ceiling.

    Decodes pictures exactly, says the reference caption, and gives equal embeddings to a picture, its caption and its
    label's prompts.
    """

    def __init__(self, samples: SampleSet) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.config = SimpleNamespace(
            name="oracle", downsampling=16, image_size=32, decoder=1, text_encoder=1, text_decoder=1
        )
        self.vae = None
        self.known: list[EvalSample] = list(samples)
        pictures = torch.stack([torch.from_numpy(sample.image) for sample in self.known]).permute(0, 3, 1, 2)
        self.pictures = (pictures.float() / 127.5 - 1).flatten(1)
        self.captions = list(dict.fromkeys(sample.caption for sample in self.known))
        self.batch_sizes: list[int] = []

    def encode(self, images: Tensor) -> Tensor:
        self.batch_sizes.append(len(images))
        assert not self.training and not torch.is_grad_enabled()
        return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=16, q=16)

    def decode(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], w=grid[1], p=16, q=16)

    def _samples(self, tokens: Tensor) -> list[EvalSample]:
        return [
            self.known[i]
            for i in torch.cdist(self.decode(tokens, (2, 2)).flatten(1), self.pictures).argmin(dim=1).tolist()
        ]

    def caption(self, *, tokens: Tensor, num_beams: int = 1) -> list[str]:
        return [sample.caption for sample in self._samples(tokens)]

    def pool(self, tokens: Tensor, normalize: bool = True) -> Tensor:
        rows = torch.tensor([self.captions.index(sample.caption) for sample in self._samples(tokens)])
        return nn.functional.one_hot(rows, len(self.captions)).float()

    def embed_text(self, texts: list[str]) -> Tensor:
        rows = torch.tensor([self.captions.index(text) for text in texts])
        return nn.functional.one_hot(rows, len(self.captions)).float()

    def num_parameters(self) -> dict[str, int]:
        return {"encoder": 1}
