"""AdamW on the right parameters, and the learning rate as a function of samples seen."""

import math
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from openvision3.config import OptimizerConfig
from openvision3.model.blocks import CrossAttention, Mlp, SelfAttention
from openvision3.training.muon import MuonWithAdamW
from openvision3.training.parallel import global_norm

# Parts of a parameter's own name that mark it as a learned token or position, which no decay pulls to zero.
_TOKEN_NAMES = ("embedding", "position", "token", "query", "logit_scale")


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Splits the trainable parameters into a group with decay and one without, whole parameters and sharded ones apart.

    Decay falls on weight matrices (and convolution kernels) only: not on biases, norms, embeddings (also where an
    embedding is tied to an output layer), the temperature, or learned tokens and positions. Frozen parameters are in
    neither. Order: the module's own, so that it is the same in every process. (OpenVision's training code.)
    """
    embeddings = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        own_name = name.rpartition(".")[2]
        is_matrix = parameter.ndim >= 2 and id(parameter) not in embeddings
        is_matrix = is_matrix and not any(part in own_name for part in _TOKEN_NAMES)
        (decayed if is_matrix else undecayed).append(parameter)
    groups: list[dict] = []
    for parameters, decay in ((decayed, weight_decay), (undecayed, 0.0)):
        for sharded in (False, True):
            if chosen := [p for p in parameters if isinstance(p, DTensor) == sharded]:
                groups.append({"params": chosen, "weight_decay": decay})
    return groups


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer that the config names; set its learning rate by `set_learning_rate` before each step."""
    if config.kind == "muon":
        return muon(module, config)
    return adamw(module, config.beta1, config.beta2, config.eps, config.weight_decay)


def adamw(module: nn.Module, beta1: float, beta2: float, eps: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over `parameter_groups(module, weight_decay)`, in the fused implementation where the device has one."""
    groups = parameter_groups(module, weight_decay)
    kinds = {parameter.device.type for group in groups for parameter in group["params"]}
    return torch.optim.AdamW(groups, lr=0.0, betas=(beta1, beta2), eps=eps, fused=kinds <= {"cpu", "cuda"})


def muon(module: nn.Module, config: OptimizerConfig) -> MuonWithAdamW:
    """Muon on the matrices of transformer blocks, AdamW on all else (embeddings, heads, norms, biases)."""
    stacked = {id(p): rows for m in module.modules() for p, rows in _stacked(m)}
    groups: list[dict] = []
    for group in parameter_groups(module, config.weight_decay):
        rest = [p for p in group["params"] if id(p) not in stacked]
        for parts in (1, 2, 3):
            if chosen := [p for p in group["params"] if stacked.get(id(p)) == parts]:
                groups.append({**group, "params": chosen, "matrices": True, "parts": parts})
        groups.append({**group, "params": rest})
    return MuonWithAdamW(groups, (config.beta1, config.beta2), config.eps)


@runtime_checkable
class Stacked(Protocol):
    """A module that names its own matrices for Muon."""

    def stacked_matrices(self) -> list[tuple[Tensor, int]]:
        """Weight matrices of the module itself, and how many maps each stacks."""
        ...


def _stacked(module: nn.Module) -> list[tuple[Tensor, int]]:
    """The weight matrices of a part of a block, and how many maps each stacks."""
    if isinstance(module, Stacked):
        return module.stacked_matrices()
    if isinstance(module, SelfAttention):
        return [(module.qkv.weight, 3), (module.out.weight, 1)]
    if isinstance(module, CrossAttention):
        return [(module.query.weight, 1), (module.key_value.weight, 2), (module.out.weight, 1)]
    if isinstance(module, Mlp):
        return [(module.up.weight, 1), (module.down.weight, 1)]
    return []


def warmup_cosine(samples_seen: float, warmup: float, total: float) -> float:
    """The learning rate as a fraction of its peak: linear from 0 over `warmup` samples, then cosine to 0 at `total`."""
    if samples_seen < warmup:
        return samples_seen / warmup
    progress = (samples_seen - warmup) / max(total - warmup, 1.0)
    return 0.5 * (1.0 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets the rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def step_unless(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """One step, or none where `skip` (fp32 scalar on the device) is 1: weights and state are then as before.

    Fused AdamW decides it on the device; before a step of any other optimizer the device is waited for.
    """
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = skip  # type: ignore[attr-defined]  # as `torch.amp.GradScaler` hands it over
        optimizer.step()
    elif not skip:
        optimizer.step()


def clip_gradients(module: nn.Module, clip_norm: float) -> Tensor:
    """Scales all gradients so that their global norm is at most `clip_norm` (0: no clipping).

    Returns the norm before clipping, a scalar on the device (no wait for it).
    """
    parameters = [parameter for parameter in module.parameters() if parameter.grad is not None]
    norm = global_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    for sharded in (False, True):
        kind = [parameter for parameter in parameters if isinstance(parameter, DTensor) == sharded]
        nn.utils.clip_grads_with_norm_(kind, clip_norm if clip_norm > 0 else math.inf, norm)
    return norm
