"""Losses, gradients and weights of a small model after two steps, by one process of several that share a batch.

`parallel_losses.py RANK SIZE FOLDER CASE...` leaves what it found in FOLDER as RANK.pt; FOLDER holds the VAE.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from shared_losses import LargestDifference, make_batch
from tiny_run import tiny_model
from torch import Tensor

from openvision3.config import LossConfig, OptimizerConfig, ParallelKind, VAEConfig
from openvision3.distributed import ALONE, World
from openvision3.model.openvision3 import OpenVision3
from openvision3.training.ema import Average
from openvision3.training.optimizer import build_optimizer, clip_gradients, set_learning_rate
from openvision3.training.parallel import build_engine, compile_blocks, whole_tensor
from openvision3.training.step import Objective
from openvision3.vae import load_vae

DEVICE = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """How a step is computed; none of it may change what is computed."""

    kind: ParallelKind = "ddp"
    dtype: str = "float64"
    micro_batch: int = 0
    checkpointing: bool = False
    compile: bool = False
    loss: str = "softmax"
    optimizer: str = "adamw"

    @staticmethod
    def parse(text: str) -> "Case":
        """Fields joined by commas, as `kind=fsdp,micro_batch=1`."""
        fields: dict[str, Any] = dict(part.split("=") for part in text.split(",") if part)
        for name in ("micro_batch", "checkpointing", "compile"):
            if name in fields:
                fields[name] = type(getattr(Case, name))(int(fields[name]))
        return Case(**fields)


def results(folder: Path, case: Case, world: World = ALONE) -> dict[str, Tensor]:
    """The losses and whole gradients of the first step, and the weights and their averages after the second."""
    vae = VAEConfig(kind="tiny", source=str(folder / "vae"))
    torch.manual_seed(1)
    model = OpenVision3(replace(tiny_model(vae), logit_bias=case.loss == "sigmoid"), load_vae(vae))
    model.to(getattr(torch, case.dtype)).set_checkpointing(case.checkpointing)
    if case.compile:
        compile_blocks(model)
    engine = build_engine(model, case.kind, world, DEVICE)
    config: Any = OptimizerConfig(kind=case.optimizer, weight_decay=0.1)  # type: ignore[arg-type]
    optimizer, average = build_optimizer(model, config), Average(dict(model.named_parameters()), 0.5)
    set_learning_rate(optimizer, 1e-3)
    metric: Any = LargestDifference()
    loss: Any = LossConfig(alpha=0.7, pixel_stride=3, contrastive=case.loss)  # type: ignore[arg-type]
    objective = Objective(model, loss, 0.5, metric, seed=3, micro_batch=case.micro_batch, world=world, engine=engine)
    found: dict[str, Tensor] = {}
    for step in (1, 2):
        losses = objective.backward(make_batch(world))
        if step == 1:
            found |= losses
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    found[f"grad {name}"] = whole_tensor(parameter.grad).clone()
        found[f"norm {step}"] = clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update(step, torch.zeros(()))
    found |= {f"weight {name}": whole_tensor(p.detach()).clone() for name, p in model.named_parameters()}
    return found | {f"average {name}": whole_tensor(tensor) for name, tensor in average.values().items()}


def main() -> None:
    rank, size, folder, cases = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/engines{size}", rank=rank, world_size=size)
    found = {case: results(folder, Case.parse(case), World(rank, size)) for case in cases}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
