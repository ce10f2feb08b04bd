"""What `ov3 vlm chat` and `ov3 vlm eval` share: the model."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from openvision3.vlm.folder import VLM


@dataclass(frozen=True)
class WhereOptions:
    """Where the model runs, and in which precision."""

    device: str = "auto"  # auto: cuda, then mps, then cpu; or cpu, cuda, cuda:1, mps
    dtype: Literal["fp32", "bf16"] = "fp32"  # of weights and arithmetic


def load(model: str, where: WhereOptions) -> "VLM":
    """Loads "demo", or a folder. Raises as `load_vlm` does."""
    import torch

    from openvision3.training.precision import resolve_device
    from openvision3.vlm.folder import load_vlm

    return load_vlm(model, resolve_device(where.device), torch.bfloat16 if where.dtype == "bf16" else torch.float32)
