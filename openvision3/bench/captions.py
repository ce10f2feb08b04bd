"""Caption decoding against transformers' `generate`, on a model of the same size, shape and weights.

transformers' side is a `VisionEncoderDecoderModel` with GPT-2 as the decoder, its usual captioning model: pre-norm
blocks with self-attention, cross-attention and an MLP, learned positions and tied embeddings, as ours. It takes our
weights, so that both must write the same captions.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from openvision3.bench.timing import Spread, ratio, time_in_turns
from openvision3.config import OpenVisionError, TextDecoderConfig
from openvision3.model.generate import greedy_search
from openvision3.model.text import CaptionDecoder

_BOS, _NO_EOS = 1, -1  # an id that is never chosen: all captions have the same length
_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu", "relu_squared": "relu2"}
_DECISIVE = 0.08  # spread of the embeddings: choices then differ from step to step


@dataclass(frozen=True)
class CaptionFigures:
    """What `measure_captions` found; seconds are of a batch of captions."""

    batch_size: int
    length: int  # tokens of a caption, with [bos]
    image_tokens: int
    parameters: dict[str, int]  # "ours", "transformers"
    seconds: dict[str, Spread]  # "ours", "transformers, default cache", "transformers, static cache"
    ratio: Spread  # of the faster of transformers' two over ours
    compared: str  # which that is
    same_ids: float  # share of ids that are the same
    refused: str  # why transformers' static cache could not be used, or ""

    def rate(self, name: str) -> float:
        """Tokens a second, median."""
        return self.batch_size * (self.length - 1) / self.seconds[name].median


@torch.inference_mode()
def measure_captions(
    config: TextDecoderConfig,
    device: torch.device,
    image_tokens: int = 256,
    batch_size: int = 8,
    length: int = 64,
    rounds: int = 5,
    dtype: torch.dtype = torch.float32,
    compile: bool = False,
    seed: int = 0,
    say: Callable[[str], object] | None = None,
) -> CaptionFigures:
    """Times greedy decoding of `length` tokens in turns; image tokens have the decoder's width on both sides.

    Raises `OpenVisionError` without transformers.
    """
    ours = random_decoder(config, seed).to(device, dtype)
    theirs = transformers_captioner(ours).to(device, dtype)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch_size, image_tokens, config.transformer.width, generator=generator).to(device, dtype)
    calls: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: greedy_search(ours, tokens, _BOS, _NO_EOS, length, compile=compile)
    }
    ids, refused = {}, ""
    for name, cache in (("default", None), ("static", "static")):
        call = _generate(theirs, ours.image_norm(tokens), length, cache)
        try:
            ids[name] = call()
            calls[f"transformers, {name} cache"] = call
        except Exception as error:  # what transformers says of a cache that a model can't use has no type of its own
            if name == "default":
                raise
            refused = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    same = (calls["ours"]() == ids["default"]).float().mean()
    seconds = time_in_turns(calls, device, rounds, say=say)
    compared = min((name for name in seconds if name != "ours"), key=lambda name: seconds[name].median)
    return CaptionFigures(
        batch_size,
        length,
        image_tokens,
        {"ours": _parameters(ours), "transformers": _parameters(theirs.decoder)},
        seconds,
        ratio(seconds[compared], seconds["ours"]),
        compared,
        float(same),
        refused,
    )


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def random_decoder(config: TextDecoderConfig, seed: int = 0) -> CaptionDecoder:
    """A caption decoder that cross-attends to tokens of its own width, and never chooses padding or [bos]."""
    if config.image_input != "cross":
        raise OpenVisionError("transformers has cross-attention alone to compare with: image_input must be 'cross'")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = CaptionDecoder(config, config.transformer.width, "auto")
        nn.init.normal_(decoder.embedding.tokens, std=_DECISIVE)
    with torch.no_grad():
        decoder.embedding.tokens[[config.pad_id, _BOS]] = 0.0
    return decoder.eval().requires_grad_(False)


def transformers_captioner(ours: CaptionDecoder) -> Any:
    """`VisionEncoderDecoderModel` with GPT-2 as decoder, which holds the weights of `ours`; its encoder is a stub."""
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError:
        raise OpenVisionError(
            "captions are compared with transformers, which is not installed: pip install 'openvision3[vlm]'"
        ) from None
    config, size = ours.config, ours.config.transformer
    gpt2 = transformers.GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.context_length,
        n_embd=size.width,
        n_layer=size.depth,
        n_head=size.num_heads,
        n_inner=size.mlp_width or 4 * size.width,
        activation_function=_ACTIVATIONS[size.activation],
        layer_norm_epsilon=size.norm_eps,
        add_cross_attention=True,
        is_decoder=True,
        bos_token_id=_BOS,
        eos_token_id=None,
    )
    stub = transformers.ViTConfig(
        hidden_size=size.width, num_hidden_layers=1, num_attention_heads=size.num_heads, intermediate_size=4
    )
    with torch.random.fork_rng(devices=[]):
        model = transformers.VisionEncoderDecoderModel(
            encoder=transformers.ViTModel(stub, add_pooling_layer=False), decoder=transformers.GPT2LMHeadModel(gpt2)
        )
    model.decoder.load_state_dict(gpt2_state(ours))
    model.decoder.tie_weights()
    return model.eval().requires_grad_(False)


def gpt2_state(ours: CaptionDecoder) -> dict[str, Tensor]:
    """The decoder's weights under GPT-2's names; its linear layers have theirs transposed."""
    state = ours.state_dict()
    layers = {
        "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "cross.query": "crossattention.q_attn",
        "cross.key_value": "crossattention.c_attn",
        "cross.out": "crossattention.c_proj",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    }
    norms = {"norm_1": "ln_1", "norm_cross": "ln_cross_attn", "norm_2": "ln_2"}
    found = {
        "transformer.wte.weight": state["embedding.tokens"],
        "lm_head.weight": state["embedding.tokens"],
        "transformer.wpe.weight": state["embedding.positions"],
        "transformer.ln_f.weight": state["norm.weight"],
        "transformer.ln_f.bias": state["norm.bias"],
    }
    for index in range(ours.config.transformer.depth):
        for here, there in (layers | norms).items():
            weight = state[f"transformer.blocks.{index}.{here}.weight"]
            found[f"transformer.h.{index}.{there}.weight"] = weight.T.contiguous() if here in layers else weight
            found[f"transformer.h.{index}.{there}.bias"] = state[f"transformer.blocks.{index}.{here}.bias"]
    return found


def _generate(model: Any, image: Tensor, length: int, cache: str | None) -> Callable[[], Tensor]:
    outputs: Any = importlib.import_module("transformers.modeling_outputs").BaseModelOutput
    options = {} if cache is None else {"cache_implementation": cache}

    def call() -> Tensor:
        return model.generate(
            encoder_outputs=outputs(last_hidden_state=image),
            max_new_tokens=length - 1,
            do_sample=False,
            num_beams=1,
            decoder_start_token_id=_BOS,
            pad_token_id=0,
            eos_token_id=None,
            **options,
        )

    return call
