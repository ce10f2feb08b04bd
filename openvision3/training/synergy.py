"""The synergy meter: whether reconstruction and understanding pull the tokens the same way (the paper's thesis).

On a fixed held-out batch: every loss, the norms of the gradients of L_rec (Eq. 4) and L_und (Eq. 5) by the unified
tokens `z_u`, and their cosine. Above 0, a small step down one loss goes down the other too.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from openvision3.config import TrainConfig
from openvision3.model.openvision3 import OpenVision3
from openvision3.training.setup import build_objective, held_out_batch
from openvision3.training.stages import Stage

PIXEL_STRIDE = 4  # decoding pixels and the way back would take most of the time


def measure_synergy(config: TrainConfig, stage: Stage, model: OpenVision3) -> dict[str, float | str | None]:
    """Losses of `config.meter_samples` held-out samples at the stage's resolution, and `synergy` of their gradients.

    A loss that only probes the tokens in the run (`LossConfig.detach`) has its gradient here all the same. Pixels are
    compared for every fourth sample, or as many as in the run. Weights, gradients and buffers of `model` stay as they
    are.
    """
    loss = replace(config.loss, detach="none", pixel_stride=min(config.loss.pixel_stride, PIXEL_STRIDE))
    objective = build_objective(replace(config, loss=loss, micro_batch=0), stage, model, "fp32")
    batch = held_out_batch(config, stage.config.resolution, config.meter_samples, model.tokenizer)
    losses, gradients = objective.by_tokens(batch)
    return {**{name: float(value) for name, value in losses.items()}, **synergy(gradients)}


def synergy(gradients: Mapping[str, Tensor]) -> dict[str, Any]:
    """Norms and cosine of the gradients "reconstruction" and "understanding", any shape alike.

    Where one of them is missing, its norm and the cosine are None, and `left_out` says which; where one is 0, the
    cosine is None.
    """
    flat = {name: gradient.flatten().double() for name, gradient in gradients.items()}
    found: dict[str, Any] = {
        f"{name}_gradient": float(flat[name].norm()) if name in flat else None
        for name in ("reconstruction", "understanding")
    }
    both = all(found.values())
    found["gradient_cosine"] = float(F.cosine_similarity(*flat.values(), dim=0)) if both else None
    if missing := [name for name in ("reconstruction", "understanding") if name not in flat]:
        found["left_out"] = f"no loss of {' or '.join(missing)} is trained"
    return found
