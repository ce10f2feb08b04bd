"""Linear layers for a few rows at a time on the CPU: weights laid out once as oneDNN multiplies them.

With few rows a product costs what reading the weights costs, and a general product lays them out anew each time: of a
caption's step that is more than half.
"""

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


class PackedLinear(nn.Module):
    """A linear layer with a copy of its weights in oneDNN's layout; without gradients."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        # inductor's own operators for frozen weights; the only ones that keep the layout for dense inputs
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def can_pack(module: nn.Module) -> bool:
    """Whether all of a module's parameters are plain tensors on a CPU with oneDNN, and its arithmetic is theirs."""
    operators: Any = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(operators, "_linear_pointwise"):
        return False
    dtypes = {parameter.dtype for parameter in module.parameters()}
    return (
        len(dtypes) == 1
        and dtypes <= {torch.float32, torch.bfloat16}
        and (torch.float32 in dtypes or operators._is_mkldnn_bf16_supported())
        and all(type(p) is nn.Parameter and p.device.type == "cpu" for p in module.parameters())
        and not torch.is_autocast_enabled("cpu")
    )


def packed_copy(module: Module) -> Module:
    """The module with `PackedLinear` for each `nn.Linear`; shares all other tensors. The weights must not change."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    result = copy.deepcopy(module, shared)
    for parent in list(result.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child.weight, child.bias))
    return result
