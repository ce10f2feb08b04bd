"""Losses and gradients of a small batch in fp64, by one process of several: `shared_losses.py RANK SIZE FOLDER`.

FOLDER holds the VAE; each process leaves what it found there as RANK.pt.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from tiny_run import tiny_model
from torch import Tensor, nn

from openvision3 import chunked, contrastive
from openvision3.config import LossConfig, VAEConfig
from openvision3.contrastive import contrastive_loss, sigmoid_loss
from openvision3.data.batches import Batch
from openvision3.data.tokenizer import demo_tokenizer
from openvision3.distributed import ALONE, World
from openvision3.model.openvision3 import OpenVision3
from openvision3.training.step import Objective
from openvision3.vae import load_vae

SAMPLES = 8  # of the global batch
Kind = Literal["softmax", "sigmoid"]


class LargestDifference(nn.Module):
    """In place of LPIPS."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().amax(dim=(1, 2, 3))


def make_batch(world: World = ALONE) -> Batch:
    """This process's part of eight noise pictures with texts of different lengths."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> Tensor:
        drawn = torch.randint(3, demo_tokenizer().vocab_size, (SAMPLES, length), generator=generator)
        return drawn * (torch.arange(length) < torch.arange(3, 3 + SAMPLES)[:, None])

    def text_ids() -> Tensor:
        return torch.cat([ids(15), torch.ones(SAMPLES, 1, dtype=torch.long)], dim=1)  # the last is no padding

    images = torch.randint(0, 256, (SAMPLES, 3, 32, 32), generator=generator, dtype=torch.uint8)
    names, count = [""] * SAMPLES, SAMPLES // world.size
    mine = slice(world.rank * count, (world.rank + 1) * count)
    tensors = (tensor[mine] for tensor in (images, text_ids(), text_ids(), ids(12)))
    return Batch(list(range(100, 100 + SAMPLES))[mine], names[mine], *tensors, captions=names[mine])


def objective_results(folder: Path, kind: Kind, micro_batch: int, world: World = ALONE) -> dict[str, Tensor]:
    """Every loss of the global batch, and this process's share of every gradient."""
    vae = VAEConfig(kind="tiny", source=str(folder / "vae"))
    torch.manual_seed(1)
    model = OpenVision3(replace(tiny_model(vae), logit_bias=kind == "sigmoid"), load_vae(vae)).double()
    config = LossConfig(alpha=0.7, pixel_stride=3, contrastive=kind)
    metric: Any = LargestDifference()
    objective = Objective(model, config, 0.5, metric, seed=3, micro_batch=micro_batch, world=world)
    found = objective.backward(make_batch(world))
    gradients = {f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | gradients


def contrastive_results(kind: Kind, world: World = ALONE) -> dict[str, Tensor]:
    """This process's share of the loss and of all gradients, the features' alone in their own rows."""
    generator = torch.Generator().manual_seed(2)
    everyone = nn.functional.normalize(torch.randn(2, 24, 16, generator=generator, dtype=torch.float64), dim=2)
    count = 24 // world.size
    mine = slice(world.rank * count, (world.rank + 1) * count)
    image, text = everyone.clone().requires_grad_()
    temperature, bias = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (20.0, -6.0))
    if kind == "softmax":
        loss = contrastive_loss(image[mine], text[mine], temperature, world)
    else:
        loss = sigmoid_loss(image[mine], text[mine], temperature, bias, world)
    wanted = {"image": image, "text": text, "temperature": temperature}
    if kind == "sigmoid":
        wanted["bias"] = bias
    gradients = torch.autograd.grad(loss, list(wanted.values()))
    return {"loss": loss.detach()} | dict(zip(wanted, gradients, strict=True))


def main() -> None:
    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    contrastive.BLOCK, chunked.CPU_ROWS = 50, 5  # several blocks, and their last ones smaller
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{size}", rank=rank, world_size=size)
    world = World(rank, size)
    found: dict[str, dict[str, Tensor]] = {}
    for kind in ("softmax", "sigmoid"):
        found[kind] = contrastive_results(kind, world)
        for micro_batch in (0, 1):
            found[f"{kind} {micro_batch}"] = objective_results(folder, kind, micro_batch, world)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
