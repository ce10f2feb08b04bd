"""The parts of a model that a run leaves as they are: no gradients, eval mode, no copy in checkpoints."""

import hashlib
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from openvision3.config import MODEL_PARTS, ModelConfig, ModelPart
from openvision3.model.openvision3 import OpenVision3
from openvision3.training.checkpoint import named_tensors

VAE = "model.vae."  # comes from its own file, so it is no part of a checkpoint
LOSSES = ("reconstruction", "contrastive", "caption")
_HEAD = ("encoder.pool_norm.", "encoder.projection.")


def part_of(name: str) -> ModelPart | None:
    """The part that a parameter or buffer belongs to, by its name in the model; None: to no one part (`token_rms`)."""
    if name.startswith(_HEAD):
        return "head"
    if name in ("logit_scale", "logit_bias"):
        return "text_encoder"
    return next((part for part in MODEL_PARTS if name.startswith(f"{part}.")), None)


def set_training(model: OpenVision3, frozen: Collection[ModelPart]) -> None:
    """Training mode and gradients, but for the frozen parts (and the VAE, which is always frozen)."""
    model.train()
    for name, parameter in model.named_parameters():
        if part_of(name) in frozen:
            parameter.requires_grad_(False)
    for part in frozen:
        modules = (model.encoder.pool_norm, model.encoder.projection) if part == "head" else (getattr(model, part),)
        for module in modules:
            if module is not None:
                module.eval()


def trained_parameters(model: OpenVision3, frozen: Collection[ModelPart]) -> dict[str, nn.Parameter]:
    """What a run changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad and part_of(name) not in frozen}


def trained_losses(config: ModelConfig, frozen: Collection[ModelPart]) -> set[str]:
    """Those of `LOSSES` that the model's parts allow and that some trained part lowers."""
    parts: tuple[tuple[bool, set[ModelPart]], ...] = (
        (config.decoder is not None, {"encoder", "decoder"}),
        (config.text_encoder is not None, {"encoder", "head", "text_encoder"}),
        (config.text_decoder is not None, {"encoder", "text_decoder"}),
    )
    return {loss for loss, (there, needs) in zip(LOSSES, parts, strict=True) if there and not needs <= set(frozen)}


def unsaved(model: OpenVision3, frozen: Collection[ModelPart]) -> tuple[str, ...]:
    """Names of the tensors that a checkpoint leaves out: the VAE's, and the frozen parts' (`init` has them)."""
    return tuple(f"model.{name}" for name, _ in _frozen_tensors(model, frozen))


def fingerprint(model: OpenVision3, frozen: Collection[ModelPart]) -> str:
    """sha256 (hex) of the tensors of frozen parts and the VAE (`init` may have both); empty where none is frozen."""
    if not frozen:
        return ""
    digest = hashlib.sha256()
    for name, tensor in _frozen_tensors(model, frozen):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _frozen_tensors(model: OpenVision3, frozen: Collection[ModelPart]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in named_tensors({"model": model}).items():
        if name.startswith(VAE) or part_of(name[6:]) in frozen:
            yield name[6:], tensor
