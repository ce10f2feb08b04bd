"""Memory of a training step, counted on tensors that have shapes and no values."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from openvision3.config import TrainConfig
from openvision3.model.blocks import Block
from openvision3.model.openvision3 import OpenVision3
from openvision3.training.frozen import set_training, trained_losses
from openvision3.training.precision import Precision, autocast
from openvision3.vae import FrozenVAE

STATE_BYTES = 16  # a trained parameter: weight, gradient and AdamW's two moments in fp32


def activation_bytes(
    config: TrainConfig, resolution: int, device: torch.device, precision: Precision, vae: FrozenVAE | None
) -> dict[str, float]:
    """Bytes that the forward pass of one sample keeps for the backward pass, by part; nothing is computed.

    "vae_decoder" is that of a picture that is decoded, of which `training/decoded.py` keeps few at a time. It is left
    out without `vae`. LPIPS is not counted.
    """
    with torch.device("meta"):
        model = OpenVision3(config.model, copy.deepcopy(vae) if vae is not None else None)
    model.set_checkpointing(config.checkpoint_blocks)
    set_training(model, config.frozen)
    trained = trained_losses(config.model, config.frozen)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
        _empty_tensors(model)
        grid = resolution // config.model.downsampling
        width, channels = config.model.encoder.width, config.model.in_channels
        side = grid * config.model.patch_size

        def tokens(n: int) -> Tensor:
            return torch.empty(n, grid * grid, width, requires_grad="encoder" not in config.frozen)

        def ids(n: int, length: int) -> Tensor:
            return torch.zeros(n, length, dtype=torch.long)

        parts: dict[str, Callable[[int], object]] = {}
        if "encoder" not in config.frozen:
            parts["encoder"] = lambda n: model.pool(model.encoder(torch.empty(n, channels, side, side)))
        if "reconstruction" in trained:
            parts["decoder"] = lambda n: nn.functional.l1_loss(*_pair(model.decoder, tokens(n), (grid, grid)))
        if "contrastive" in trained and (text := config.model.text_encoder):
            parts["text_encoder"] = lambda n: model.embed_text_ids(ids(2 * n, text.context_length))
        if "caption" in trained and (caption := config.model.text_decoder):
            parts["text_decoder"] = lambda n: model.caption_loss(tokens(n), ids(n, caption.context_length), 1)
        if "reconstruction" in trained and model.vae is not None:
            decode = model.vae.decode
            parts["vae_decoder"] = lambda n: decode(torch.empty(n, channels, side, side, requires_grad=True))

        def saved(run: Callable[[int], object], samples: int) -> int:
            with autocast(device, precision):
                return _saved_bytes(model, lambda: run(samples))

        # The difference of two batch sizes leaves out what a batch keeps whatever its size, such as casts of weights.
        return {name: (saved(run, 3) - saved(run, 1)) / 2 for name, run in parts.items()}


def _empty_tensors(model: nn.Module) -> None:
    """Replaces parameters and buffers by ones of the same shapes that the current mode and device make."""
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape), parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _saved_bytes(model: OpenVision3, run: Callable[[], object]) -> int:
    kept: dict[int, torch.UntypedStorage] = {}
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # holds it, so that no other takes its place
        return tensor

    # A block that is recomputed keeps its input alone, and not through the hooks.
    handles = [
        block.register_forward_pre_hook(lambda _, inputs: (keep(inputs[0]), None)[1])
        for block in model.modules()
        if isinstance(block, Block)
    ]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    for handle in handles:
        handle.remove()
    del result
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


def _pair(decoder: nn.Module | None, tokens: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    assert decoder is not None
    output = decoder(tokens, grid).float()
    return output, torch.empty_like(output)
