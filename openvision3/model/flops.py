"""Floating-point operations of a forward pass by part: two for each multiply-add of matrices and convolutions."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from openvision3.config import ModelConfig, TransformerConfig
from openvision3.vae import FrozenVAE


def forward_flops(config: ModelConfig, resolution: int, vae: FrozenVAE | None = None) -> dict[str, float]:
    """FLOPs of one sample by part, at a square resolution in pixels and full context lengths.

    Parts that the model lacks are absent. Norms, activations and softmax are not counted, as is usual.
    """
    tokens = (resolution // config.downsampling) ** 2
    patch = config.patch_size**2 * config.in_channels
    width = config.encoder.width
    counts = {
        "encoder": 2.0 * tokens * patch * width
        + stack_flops(config.encoder, tokens + 1, last_outputs=tokens)
        + 2 * width * config.embed_dim
    }
    if size := config.decoder:
        counts["decoder"] = 2.0 * tokens * size.width * (width + patch) + stack_flops(size, tokens)
    if text := config.text_encoder:
        size = text.transformer
        counts["text_encoder"] = (
            stack_flops(size, text.context_length, last_outputs=1) + 2 * size.width * config.embed_dim
        )
    if caption := config.text_decoder:
        size, length = caption.transformer, caption.context_length - 1
        output = 2.0 * length * size.width * caption.vocab_size
        if caption.image_input == "cross":
            counts["text_decoder"] = stack_flops(size, length, context=(tokens, width)) + output
        else:
            prefix = 2.0 * tokens * width * size.width
            counts["text_decoder"] = prefix + stack_flops(size, tokens + length, last_outputs=length) + output
    if vae is not None:
        counts |= vae_flops(vae, resolution)
    return counts


def stack_flops(
    size: TransformerConfig, length: int, last_outputs: int | None = None, context: tuple[int, int] | None = None
) -> float:
    """FLOPs of a stack over `length` positions, of which the last block outputs only `last_outputs`.

    `context`: (length, width) of what each block cross-attends to.
    """
    width, hidden = size.width, size.mlp_width or 4 * size.width

    def block(outputs: int) -> float:
        total = 6.0 * length * width * width  # qkv
        total += 4.0 * outputs * length * width  # scores and mixing
        total += 2.0 * outputs * width * (width + 2 * hidden)  # output and MLP
        if context is not None:
            total += 4.0 * context[0] * context[1] * width  # keys and values
            total += 4.0 * outputs * width * (width + context[0])  # query, output, scores and mixing
        return total

    return (size.depth - 1) * block(length) + block(length if last_outputs is None else last_outputs)


def vae_flops(vae: FrozenVAE, resolution: int) -> dict[str, float]:
    """FLOPs of an autoencoder's encoder and decoder on one picture, counted on shapes alone (nothing is computed)."""
    shell: nn.Module = copy.deepcopy(vae).to("meta")
    assert isinstance(shell, FrozenVAE)
    side, channels = resolution // vae.config.factor, vae.config.channels
    return {
        "vae_encoder": counted_flops(shell.encode, (3, resolution, resolution)),
        "vae_decoder": counted_flops(shell.decode, (channels, side, side)),
    }


def counted_flops(function: Callable[[Tensor], object], shape: tuple[int, ...]) -> float:
    """FLOPs of a function of modules on the meta device, for one input of that shape, counted by PyTorch.

    The modules' parameters must need no gradients: PyTorch's counter fails on some of them otherwise.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(torch.empty(1, *shape, device="meta"))
    return float(counter.get_total_flops())
