"""A run over many processes, one a device: how they meet, and how they share the model's passes and gradients.

`torchrun` (or any launcher that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT) starts the processes.
Each has an equal share of every batch (`World`), and one of two ways to share the rest, PyTorch's own:

- replicated (DistributedDataParallel): every process has all parameters; gradients are summed in buckets while the
  backward pass goes on.
- sharded (FSDP2, `fully_shard`): every process keeps its part of each block's parameters, gradients and optimizer
  state, gathers a block when a pass needs it, and reduces its gradient in fp32 right after.

Either way gradients come out as sums of the processes' shares, and frozen parts (the VAE among them) are whole in each.
"""

import datetime
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from openvision3.config import OpenVisionError, ParallelKind
from openvision3.distributed import ALONE, World
from openvision3.model.blocks import Block
from openvision3.training.precision import resolve_device
from openvision3.vae import FrozenVAE

START_TIMEOUT = datetime.timedelta(minutes=5)  # that a process waits for the others to come
TIMEOUT = datetime.timedelta(minutes=30)  # and later for an answer
PATIENCE = datetime.timedelta(days=1)  # and for the first process, which evaluates
COMPILED_VARIANTS = 64  # of a block: by part, by shape, with and without gradient

T = TypeVar("T")


@contextmanager
def open_world(device_name: str) -> Iterator[tuple[World, torch.device]]:
    """The processes of this run and this one's device: `cuda` means the one that LOCAL_RANK counts off.

    Without WORLD_SIZE, or where it is 1, nothing is set up. Raises `OpenVisionError` where a variable is missing, and
    where another process is gone.
    """
    size = _number("WORLD_SIZE", 1)
    if size == 1:
        yield ALONE, resolve_device(device_name)
        return
    device = resolve_device(device_name)
    if device.type == "cuda":
        device = resolve_device(f"cuda:{_number('LOCAL_RANK', None)}")
        torch.cuda.set_device(device)
    rank = _number("RANK", None)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise OpenVisionError(f"WORLD_SIZE is {size}, but {name} is not set: start the processes with torchrun")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # gloo for what is on the host
    try:
        store, *_ = next(rendezvous("env://", rank, size, timeout=START_TIMEOUT))
    except dist.DistError as error:
        raise OpenVisionError(f"the processes of this run did not meet: {' '.join(str(error).split())[:200]}") from None
    store.set_timeout(TIMEOUT)
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        assert isinstance(patient, dist.ProcessGroup)
        yield World(rank, size, patient=patient), device
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            reason = " ".join(str(error).split())[-300:]
            raise OpenVisionError(
                f"another process of this run has ended, and said why, or this one ({rank}) failed: {reason}"
            ) from error
        raise
    # after an error the group is left to the end of this process: to destroy it can mean to wait for the others
    dist.destroy_process_group()


def _number(name: str, default: int | None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise OpenVisionError(f"the environment variable {name} is {text!r}: start the processes with torchrun")
    return int(text)


class Engine:
    """Runs passes through a model: this one in a process alone."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, run: Callable[[], T], last: bool = True) -> T:
        """The result of `run`, which may use any part of the model.

        Tensors of the result are what the backward pass starts from. Gradients are exchanged in the backward pass of a
        step's `last` call; those of the others add up in this process.
        """
        return run()

    def finish(self) -> None:
        """Completes the gradients, once a step's passes are done."""


class _Passes(nn.Module):
    """The model as a module whose forward pass is whatever is asked for, between the wrappers' hooks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, run: Callable[[], Any]) -> Any:
        return run()


class _Shared(Engine):
    """What both ways share: scalars (temperature, bias) are summed here. FSDP2 refuses them, and with micro-batches the
    contrastive loss gives their gradient outside of the passes."""

    def __init__(self, model: nn.Module, world: World) -> None:
        super().__init__(model)
        self.world, self.passes = world, _Passes(model)
        self.scalars = [p for p in model.parameters() if p.requires_grad and p.ndim == 0]

    def finish(self) -> None:
        """Sums the scalars' gradients."""
        gradients = [scalar.grad for scalar in self.scalars if scalar.grad is not None]
        if gradients:
            for gradient, total in zip(gradients, self.world.all_reduce_sum(torch.stack(gradients)), strict=True):
                gradient.copy_(total)


class Replicated(_Shared):
    """The model in every process, by DistributedDataParallel; `unused` names parameters that no loss reaches."""

    def __init__(self, model: nn.Module, world: World, unused: Callable[[str], bool] = lambda name: False) -> None:
        super().__init__(model, world)
        scalars = {id(scalar) for scalar in self.scalars}
        left_out = [
            name
            for name, parameter in self.passes.named_parameters()
            if id(parameter) in scalars or not parameter.requires_grad or unused(name.removeprefix("model."))
        ]
        left_out += [name for name, _ in self.passes.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.passes, left_out)
        self.ddp = DistributedDataParallel(self.passes, process_group=world.group, gradient_as_bucket_view=True)
        self.ddp.register_comm_hook(world.group, _sum_bucket)

    def __call__(self, run: Callable[[], T], last: bool = True) -> T:
        """See `Engine`."""
        with nullcontext() if last else self.ddp.no_sync():
            return self.ddp(run)


def _sum_bucket(
    group: Any,
    bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage]
) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])


class Sharded(_Shared):
    """Each block's parameters divided among the processes, and what is outside of blocks as one more group (FSDP2)."""

    def __init__(
        self, model: nn.Module, world: World, device: torch.device, blocks: tuple[type[nn.Module], ...] = (Block,)
    ) -> None:
        super().__init__(model, world)
        mesh = init_device_mesh(device.type, (world.size,))
        for module in list(model.modules()):
            trained = [parameter.requires_grad for parameter in module.parameters()]
            if isinstance(module, blocks) and any(trained):
                assert all(trained), "a part is trained whole or not at all"
                fully_shard(module, mesh=mesh)
        whole = {parameter for parameter in model.parameters() if not parameter.requires_grad or parameter.ndim == 0}
        fully_shard(self.passes, mesh=mesh, ignored_params=whole)
        for module in self.passes.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # sums, no means; gloo has no other reduction either
                module.set_force_sum_reduction_for_comms(True)
        self.scalars = [p for p in model.parameters() if p.requires_grad and p.ndim == 0]

    def __call__(self, run: Callable[[], T], last: bool = True) -> T:
        """See `Engine`."""
        assert isinstance(self.passes, FSDPModule)
        self.passes.set_requires_gradient_sync(last)
        return self.passes(run)


def build_engine(
    model: nn.Module,
    kind: ParallelKind,
    world: World,
    device: torch.device,
    unused: Callable[[str], bool] = lambda name: False,
    blocks: tuple[type[nn.Module], ...] = (Block,),
) -> Engine:
    """The engine of a run's model, whose parameters a sharded one replaces by their shards, those of `blocks` apart."""
    if world.size == 1:
        return Engine(model)
    return Sharded(model, world, device, blocks) if kind == "fsdp" else Replicated(model, world, unused)


def compile_blocks(model: nn.Module, blocks: tuple[type[nn.Module], ...] = (Block,)) -> None:
    """Compiles each transformer block, and parts of the frozen VAE: one compilation serves all blocks of a part.

    Parameters keep their names. The first steps are slow.
    """
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(COMPILED_VARIANTS, dynamo.recompile_limit)
    dynamo.optimize_ddp = False  # it would cut blocks larger than a bucket of gradients in two
    for module in model.modules():
        if isinstance(module, blocks):
            module.forward = torch.compile(module.forward)  # type: ignore[method-assign]
        elif isinstance(module, FrozenVAE):
            module.compile_layers()


def whole_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor put together from all processes, each of which must ask for it; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same in all processes, as shards where `like` is sharded; nothing is exchanged."""
    if not isinstance(like, DTensor):
        return tensor
    from torch.distributed.tensor import Replicate

    mesh = like.device_mesh
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False).redistribute(
        placements=like.placements
    )


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norm of all tensors together, those that are sharded and those that are whole; a plain scalar."""
    kinds = [[t for t in tensors if isinstance(t, DTensor) == sharded] for sharded in (False, True)]
    norms = [whole_tensor(nn.utils.get_total_norm(kind)) for kind in kinds if kind]
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm() if norms else torch.tensor(math.nan)
