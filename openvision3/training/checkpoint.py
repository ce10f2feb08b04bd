"""Checkpoints of a run: exact, whole or absent, readable without pickle, and by any number of processes.

A checkpoint is a folder `step_N` with `state.json` (counters, and the other files' lengths) and safetensors files that
hold every parameter and persistent buffer (tied ones once) and the optimizer's state by parameter name. They are
written and read by torch.distributed.checkpoint: each process writes its share, and one that reads takes what it needs,
however many wrote. A folder is written under a hidden name, flushed to disk and renamed, so that a process killed at
any moment leaves either all of it or nothing.
"""

import contextlib
import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from openvision3.config import OpenVisionError
from openvision3.distributed import ALONE, World

STATE = "state.json"
FORMAT_VERSION = 2
_OPTIMIZER = "optimizer."  # before the names of the optimizer's tensors

Modules = Mapping[str, nn.Module | Mapping[str, Tensor]]


class Saver:
    """Saves a run's checkpoints into `folder`: the newest `keep` stay, and those marked as lasting.

    With `background` the training goes on after a copy into memory, while a thread writes; an error then comes up at
    the next call. Every process of `world` makes the same calls.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 2,
        world: World = ALONE,
        background: bool = False,
        device: torch.device | None = None,  # of the tensors
    ) -> None:
        self.folder, self.keep, self.device = folder, keep, device
        # a group of its own: a thread's exchanges must not mix with the training's
        self.world = world
        if world.size > 1:
            group = dist.new_group(backend="gloo")
            assert isinstance(group, dist.ProcessGroup)
            self.world = World(world.rank, world.size, group)
        self.background = background
        self._under_way: tuple[threading.Thread, Future[Path]] | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], lasting: bool = False) -> None:
        """Saves `step_N` as `save_checkpoint` does, after the one before is whole."""
        self.finish()
        # whole tensors, which all processes have alike, are shared out
        tensors = {
            name: tensor
            for number, (name, tensor) in enumerate(tensors.items())
            if isinstance(tensor, DTensor) or number % self.world.size == self.world.rank
        }
        options = {"keep": self.keep, "lasting": lasting, "world": self.world}
        if not self.background:
            save_checkpoint(self.folder, step, tensors, state, **options)
            return
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        outcome: Future[Path] = Future()

        def write() -> None:
            if self.device is not None and self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # threads begin with the first one
            try:
                outcome.set_result(save_checkpoint(self.folder, step, copies, state, **options))
            except BaseException as error:
                outcome.set_exception(error)

        # a daemon: a process that fails must not wait for others that it would write with
        thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        thread.start()
        self._under_way = thread, outcome

    def finish(self) -> None:
        """Waits for what is under way."""
        if self._under_way is not None:
            (thread, outcome), self._under_way = self._under_way, None
            thread.join()
            outcome.result()


def checkpoint_tensors(
    modules: Modules, optimizer: Optimizer | None = None, ignore: Iterable[str] = ()
) -> dict[str, Tensor]:
    """What a checkpoint holds: `modules`' tensors as `named_tensors`, and the optimizer's, by the parameters' names."""
    tensors = named_tensors(modules, ignore)
    return tensors if optimizer is None else tensors | optimizer_tensors(modules, optimizer)


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    keep: int = 2,
    lasting: bool = False,
    world: World = ALONE,
) -> Path:
    """Writes `folder/step_N` whole or not at all, then removes all but the newest `keep` and those that are lasting.

    `state` is anything that `json` can write. Every process of `world` calls this; what they all have alike is written
    once. Returns the new folder. Raises `OpenVisionError` where it can't be written.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    target, first = folder / f"step_{step}", world.rank == 0
    temporary = _hidden(target)
    if first:
        _begin_folder(target)
    if world.size > 1:
        dist.barrier(world.group)
    try:
        with _unremarked():
            save(
                {name: _contiguous(tensor) for name, tensor in tensors.items()},
                storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True),
                process_group=world.group,
                no_dist=world.size == 1,
            )
    except (OSError, CheckpointException) as error:
        raise OpenVisionError(f"{target} can't be written: {' '.join(str(error).split())[-300:]}") from None
    own = sorted(temporary.glob(f"shard-{world.rank + 1:05d}-*"))  # on a network disk each knows its own files best
    for path in own:
        _flush(path)
    written = world.gather_objects({path.name: path.stat().st_size for path in own})
    if first:
        files = {name: size for sizes in written for name, size in sizes.items()}
        record = {
            "format_version": FORMAT_VERSION, "step": step, "lasting": lasting, "files": files, "state": dict(state)
        }  # fmt: skip
        (temporary / STATE).write_text(json.dumps(record, indent=2) + "\n")
        _finish_folder(target)
        _prune(folder, keep)
    return target


@contextlib.contextmanager
def _unremarked() -> Iterator[None]:
    """One process alone is nothing that torch.distributed.checkpoint need warn of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _prune(folder: Path, keep: int) -> None:
    for old in checkpoints(folder)[: -max(1, keep)]:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if json.loads((old / STATE).read_text()).get("lasting"):
                continue
        _remove(old)


def _contiguous(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.contiguous() if type(tensor) is Tensor else tensor


def write_folder(target: Path, write: Callable[[Path], object]) -> None:
    """Makes the folder `target` by `write(temporary folder)`: whole or not at all, on disk before it has its name.

    Replaces a folder of that name, and removes what broken-off calls left beside it.
    """
    write(_begin_folder(target))
    _finish_folder(target)


def _hidden(target: Path) -> Path:
    return target.with_name(f".{target.name}.writing")


def _begin_folder(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent)
    temporary = _hidden(target)
    temporary.mkdir()
    return temporary


def _finish_folder(target: Path) -> None:
    temporary = _hidden(target)
    for path in [*sorted(temporary.iterdir()), temporary]:
        _flush(path)
    if target.exists():
        _remove(target)
    temporary.rename(target)
    _flush(target.parent)


def read_state(path: Path) -> dict[str, Any]:
    """The `state` of a checkpoint. Raises `OpenVisionError` for one that is not whole, or of another format."""
    try:
        record = json.loads((path / STATE).read_text())
        version = record["format_version"]
        if version != FORMAT_VERSION:
            raise OpenVisionError(
                f"{path} has format_version {version}, expected {FORMAT_VERSION}: another version of openvision3 wrote "
                "it, which can resume it"
            )
        for name, size in record["files"].items():
            found = (path / Path(name).name).stat().st_size
            if found != size:
                raise ValueError(f"{name} has {found} bytes, expected {size}")
        return record["state"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(path, error) from None


def load_checkpoint(
    path: Path,
    modules: Modules,
    optimizer: Optimizer | None = None,
    *,
    ignore: Iterable[str] = (),
    world: World = ALONE,
) -> dict[str, Any]:
    """Copies a checkpoint's tensors into `modules` and, when given, `optimizer`; returns its `state`.

    What starts with one of `ignore` is left alone. Every process of `world` calls this, and of a sharded tensor each
    reads its own part. Raises `OpenVisionError` where a tensor is missing, left over or of another shape, or a file
    can't be read.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    prefixes = tuple(ignore)
    state = read_state(path)
    try:
        stored = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise _unreadable(path, error) from None
    wanted = named_tensors(modules, ignore)
    if optimizer is not None:
        wanted |= _prepared_state(path, modules, optimizer, stored)
    names = {name for name in stored if not name.startswith(prefixes)}
    if optimizer is None:
        names = {name for name in names if not name.startswith(_OPTIMIZER)}
    for name in sorted(wanted.keys() ^ names):
        raise OpenVisionError(f"{path}: tensor {name} is {'missing' if name in wanted else 'not part of this model'}")
    for name, tensor in wanted.items():
        shape = tuple(stored[name].size)  # type: ignore[union-attr]
        if tuple(tensor.shape) != shape:
            raise OpenVisionError(f"{path}: {name} has shape {shape}, expected {tuple(tensor.shape)}")
    try:
        with _unremarked():
            load(
                wanted,
                storage_reader=HuggingFaceStorageReader(str(path)),
                process_group=world.group,
                no_dist=world.size == 1,
            )
    except (OSError, SafetensorError, CheckpointException) as error:
        raise _unreadable(path, error) from None
    return state


def _unreadable(path: Path, error: BaseException) -> OpenVisionError:
    reason = " ".join(str(error).split())[-300:]
    return OpenVisionError(f"{path} is not a readable checkpoint ({reason}); remove it to use an older one")


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in `folder`, oldest first; empty where there is no such folder."""
    found = [path for path in folder.glob("step_*") if path.name[5:].isdigit() and path.is_dir()]
    return sorted(found, key=checkpoint_step)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`, or None; removes what broken-off saves left there."""
    remove_leftovers(folder)
    return next(reversed(checkpoints(folder)), None)


def checkpoint_step(path: Path) -> int:
    """The number of optimizer steps after which a checkpoint was saved."""
    return int(path.name[5:])


def remove_leftovers(folder: Path) -> None:
    """Removes the hidden folders of saves and removals that were broken off."""
    for path in [*folder.glob(".*.writing"), *folder.glob(".*.removing")]:
        shutil.rmtree(path)


def named_tensors(modules: Modules, ignore: Iterable[str] = ()) -> dict[str, Tensor]:
    """Every parameter and persistent buffer by name, detached; tied tensors once, under their first name.

    `modules` maps a name to a module, or to named tensors; a tensor is called `name.path.to.tensor`. Names that start
    with one of `ignore` are left out (a frozen part that has its own file).
    """
    prefixes, named, seen = tuple(ignore), {}, set()
    for prefix, module in modules.items():
        tensors = module.state_dict(keep_vars=True) if isinstance(module, nn.Module) else module
        for name, tensor in tensors.items():
            full = f"{prefix}.{name}"
            if id(tensor) not in seen and not full.startswith(prefixes):
                seen.add(id(tensor))
                named[full] = tensor.detach()
    return named


def optimizer_tensors(modules: Modules, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `optimizer.PARAMETER|ENTRY`, for the parameters that it has stepped at least once."""
    names = _parameter_names(modules)
    return {
        f"{_OPTIMIZER}{names[id(parameter)]}|{entry}": value.detach()
        for parameter, entries in optimizer.state.items()
        for entry, value in entries.items()
        if value is not None
    }


@torch.no_grad()
def _prepared_state(path: Path, modules: Modules, optimizer: Optimizer, stored: Iterable[str]) -> dict[str, Tensor]:
    """The state tensors to read into, of the parameters whose state is `stored`.

    The optimizer makes them itself, in a step that changes nothing: so they have the type, the sharding and the layout
    in memory that its next step needs.
    """
    keys = [name.removeprefix(_OPTIMIZER) for name in stored if name.startswith(_OPTIMIZER)]
    stepped = {key.rpartition("|")[0] for key in keys}
    names = _parameter_names(modules)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name in sorted(stepped - {names[id(parameter)] for parameter in parameters}):
        raise OpenVisionError(f"{path}: the optimizer's state names {name}, which is not a trained parameter")
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if names[id(parameter)] in stepped else None
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return optimizer_tensors(modules, optimizer)


def _parameter_names(modules: Modules) -> dict[int, str]:
    return {
        id(parameter): f"{prefix}.{name}"
        for prefix, module in modules.items()
        if isinstance(module, nn.Module)
        for name, parameter in module.named_parameters()
    }


def _remove(path: Path) -> None:
    """Renames before removing, so that a half-removed checkpoint never looks whole."""
    hidden = path.with_name(f".{path.name}.removing")
    path.rename(hidden)
    shutil.rmtree(hidden)


def _flush(path: Path) -> None:
    """Waits until a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
