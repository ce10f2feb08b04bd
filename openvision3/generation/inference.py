"""A DiT's form for sampling: weights converted once, and laid out as the CPU multiplies them; same mathematics."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openvision3.generation.condition import Condition
from openvision3.generation.dit import DiT
from openvision3.generation.flow import Model
from openvision3.generation.layers import SwiGLU
from openvision3.model.prepacked import PackedLinear, can_pack

ALIGNMENT = 32  # bf16 numbers of a cache line: other widths cost the CPU's products up to a third of their speed


class FrozenLinear(nn.Module):
    """A linear layer without gradients: takes any dtype, computes and answers in its own."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, packed: bool) -> None:
        super().__init__()
        self.dtype = dtype
        converted, self.bias = weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype)
        self.weight = None if packed else converted
        self.product = PackedLinear(converted, self.bias) if packed else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        x = x.to(self.dtype)
        if self.product is not None:
            return self.product(x)
        assert self.weight is not None
        return F.linear(x, self.weight, self.bias)


class FrozenSwiGLU(nn.Module):
    """A `SwiGLU` without gradients; gate and value are tensors of their own, padded by zeros to an aligned width."""

    def __init__(self, layer: SwiGLU, dtype: torch.dtype, packed: bool) -> None:
        super().__init__()
        fill = -layer.w3.in_features % ALIGNMENT

        def half(weight: Tensor, bias: Tensor) -> FrozenLinear:
            return FrozenLinear(F.pad(weight.detach(), (0, 0, 0, fill)), F.pad(bias.detach(), (0, fill)), dtype, packed)

        halves = zip(layer.w12.weight.chunk(2), layer.w12.bias.chunk(2), strict=True)
        self.gate, self.value = (half(weight, bias) for weight, bias in halves)
        self.out = FrozenLinear(F.pad(layer.w3.weight.detach(), (0, fill)), layer.w3.bias, dtype, packed)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, W) -> (B, N, W)"""
        x = x.to(self.gate.dtype)
        return self.out(F.silu(self.gate(x), inplace=True).mul_(self.value(x)))


@torch.no_grad()
def frozen(dit: DiT) -> DiT:
    """A copy of a DiT for sampling, whose linear layers hold copies of their weights; all other tensors are shared.

    Its products are in bf16 under autocast to it, else in the weights' dtype: call it with autocast off. On a CPU the
    copies are laid out for oneDNN. Changes of the weights after this call are not seen.
    """
    device = dit.backbone_in.weight.device.type
    dtype = dit.backbone_in.weight.dtype
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    with torch.autocast("cpu", enabled=False):
        operators: Any = torch.ops.mkldnn
        packed = can_pack(dit) and (dtype == torch.float32 or operators._is_mkldnn_bf16_supported())
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*dit.parameters(), *dit.buffers())}
    result = copy.deepcopy(dit, shared).eval()
    _freeze(result, dtype, packed)
    return result


def _freeze(module: nn.Module, dtype: torch.dtype, packed: bool) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, SwiGLU):
            setattr(module, name, FrozenSwiGLU(child, dtype, packed))
        elif type(child) is nn.Linear:
            setattr(module, name, FrozenLinear(child.weight, child.bias, dtype, packed))
        else:
            _freeze(child, dtype, packed)


def evaluator(dit: DiT) -> Model:
    """The velocity by a `frozen` copy, for many evaluations of the same weights under the autocast of this call."""
    copied, device = frozen(dit), dit.backbone_in.weight.device.type

    def velocity(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        with torch.autocast(device, enabled=False):
            return copied(x, t, condition)

    return velocity
