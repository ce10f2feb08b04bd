"""Cross-entropy of a product of matrices, block by block, so that the product is never all there."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows of a block of logits. On a CPU few enough to stay in its cache (benchmarks/caption_loss.py); elsewhere enough to
# fill the device, 120 MiB in fp32 at BERT's vocabulary.
CPU_ROWS, DEVICE_ROWS = 128, 1024


def blocks(rows: int, size: int) -> Iterator[slice]:
    """Consecutive slices of `rows`, of `size` each but the last."""
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def at_least_fp32(tensor: Tensor) -> Tensor:
    """fp32, or fp64 where it is that already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class LinearCrossEntropy(torch.autograd.Function):
    """`cross_entropy(hidden @ output.T, targets, ignore_index=ignored, reduction="sum")`, in blocks of rows.

    hidden (N, W), output (V, W), targets (N,) in 0..V-1, `ignored` among them. The products are in autocast's dtype,
    the rest in fp32 (fp64 for fp64), as is the sum over blocks of the output matrix's gradient. The forward pass makes
    the gradients along with the loss, so that each block's logits are computed once, and the backward pass scales them.

    PyTorch's own (`linear_cross_entropy` with `options`, 2.13 and newer) saves as much memory and is as fast in fp32,
    but under bf16 it takes a CPU up to three times as long, and rounds the loss to bf16 (benchmarks/caption_loss.py).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, output: Tensor, targets: Tensor, ignored: int) -> Tensor:
        kind, full = hidden.device.type, at_least_fp32(hidden.new_empty(())).dtype
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        total = torch.zeros((), dtype=full, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_output = torch.zeros_like(output, dtype=full) if ctx.needs_input_grad[1] else None
        matrix = output.to(dtype)
        for part in blocks(len(hidden), CPU_ROWS if kind == "cpu" else DEVICE_ROWS):
            inputs, labels = hidden[part].to(dtype), targets[part, None]
            used = labels != ignored
            log_p = (inputs @ matrix.T).to(full).log_softmax(dim=1)
            total -= (log_p.gather(1, labels) * used).sum()
            if d_hidden is None and d_output is None:
                continue
            d_logits = log_p.exp_().scatter_add_(1, labels, -torch.ones_like(labels, dtype=full)).to(dtype)
            if d_hidden is not None:
                d_hidden[part] = (d_logits @ matrix) * used
            if d_output is not None and dtype == full:
                d_output.addmm_(d_logits.T, inputs * used)
            elif d_output is not None:
                d_output += d_logits.T @ (inputs * used)
        ctx.save_for_backward(d_hidden, d_output)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (gradient,) = gradients
        d_hidden, d_output = (None if d is None else d * gradient for d in ctx.saved_tensors)
        return d_hidden, d_output, None, None
