"""Checkpoints of a run: exact, whole or absent, and readable without pickle.

A checkpoint is a folder `step_N` with `weights.safetensors` (every parameter and persistent buffer, tied ones once),
`optimizer.safetensors` (the optimizer's state by parameter name) and `state.json` (counters). It is written under a
hidden name, flushed to disk and renamed, so that a process killed at any moment leaves either all of it or nothing.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from openvision3.config import OpenVisionError

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
FORMAT_VERSION = 1


def save_checkpoint(
    folder: Path,
    step: int,
    modules: Mapping[str, nn.Module],
    optimizer: Optimizer | None,
    state: Mapping[str, Any],
    *,
    keep: int = 2,
    ignore: Iterable[str] = (),
) -> Path:
    """Writes `folder/step_N` whole or not at all, then removes all but the newest `keep` checkpoints.

    `modules` maps a name to a module; a tensor is stored as `name.path.to.tensor`. Names that start with one of
    `ignore` are left out (a frozen part that has its own file). `state` is anything that `json` can write. Returns the
    new folder.
    """

    def write(path: Path) -> None:
        _save_tensors(path / WEIGHTS, named_tensors(modules, ignore))
        if optimizer is not None:
            _save_tensors(path / OPTIMIZER, optimizer_tensors(modules, optimizer))
        text = json.dumps({"format_version": FORMAT_VERSION, "step": step, "state": dict(state)}, indent=2)
        (path / STATE).write_text(text + "\n")

    target = folder / f"step_{step}"
    write_folder(target, write)
    for old in checkpoints(folder)[: -max(1, keep)]:
        _remove(old)
    return target


def write_folder(target: Path, write: Callable[[Path], object]) -> None:
    """Makes the folder `target` by `write(temporary folder)`: whole or not at all, on disk before it has its name.

    Replaces a folder of that name, and removes what broken-off calls left beside it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent)
    temporary = target.with_name(f".{target.name}.writing")
    temporary.mkdir()
    write(temporary)
    for path in [*sorted(temporary.iterdir()), temporary]:
        _flush(path)
    if target.exists():
        _remove(target)
    temporary.rename(target)
    _flush(target.parent)


def load_checkpoint(
    path: Path, modules: Mapping[str, nn.Module], optimizer: Optimizer | None = None, *, ignore: Iterable[str] = ()
) -> dict[str, Any]:
    """Copies a checkpoint's tensors into `modules` (and `optimizer`, when given) and returns its `state`.

    Raises `OpenVisionError` where a tensor is missing, left over or of another shape, or a file can't be read.
    """
    try:
        record = json.loads((path / STATE).read_text())
        if record["format_version"] != FORMAT_VERSION:
            raise OpenVisionError(f"{path} has format_version {record['format_version']}, expected {FORMAT_VERSION}")
        stored = load_file(path / WEIGHTS)
        moments = load_file(path / OPTIMIZER) if optimizer is not None else {}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise OpenVisionError(f"{path} is not a readable checkpoint ({error}); remove it to use an older one") from None
    wanted = named_tensors(modules, ignore)
    for name in sorted(wanted.keys() ^ stored.keys()):
        raise OpenVisionError(f"{path}: tensor {name} is {'missing' if name in wanted else 'not part of this model'}")
    with torch.no_grad():
        for name, tensor in wanted.items():
            if tensor.shape != stored[name].shape:
                raise OpenVisionError(
                    f"{path}: {name} has shape {tuple(stored[name].shape)}, expected {tuple(tensor.shape)}"
                )
            tensor.copy_(stored[name])
    if optimizer is not None:
        _load_optimizer(path, modules, optimizer, moments)
    return record["state"]


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


def named_tensors(modules: Mapping[str, nn.Module], ignore: Iterable[str] = ()) -> dict[str, Tensor]:
    """Every parameter and persistent buffer by name, detached; tied tensors once, under their first name."""
    prefixes, named, seen = tuple(ignore), {}, set()
    for prefix, module in modules.items():
        for name, tensor in module.state_dict(keep_vars=True).items():
            full = f"{prefix}.{name}"
            if id(tensor) not in seen and not full.startswith(prefixes):
                seen.add(id(tensor))
                named[full] = tensor.detach()
    return named


def optimizer_tensors(modules: Mapping[str, nn.Module], optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `parameter name|entry`, for the parameters that it has stepped at least once."""
    names = _parameter_names(modules)
    return {
        f"{names[id(parameter)]}|{entry}": value.detach()
        for parameter, entries in optimizer.state.items()
        for entry, value in entries.items()
        if value is not None
    }


def _load_optimizer(
    path: Path, modules: Mapping[str, nn.Module], optimizer: Optimizer, stored: Mapping[str, Tensor]
) -> None:
    names = _parameter_names(modules)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index = {names[id(parameter)]: number for number, parameter in enumerate(parameters)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in stored.items():
        name, _, entry = key.rpartition("|")
        if name not in index:
            raise OpenVisionError(f"{path}: the optimizer's state names {name}, which is not a trained parameter")
        parameter = parameters[index[name]]
        if value.shape == parameter.shape:  # the fused step walks memory, so the moments need the parameter's layout
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(index[name], {})[entry] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _parameter_names(modules: Mapping[str, nn.Module]) -> dict[int, str]:
    return {
        id(parameter): f"{prefix}.{name}"
        for prefix, module in modules.items()
        for name, parameter in module.named_parameters()
    }


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)


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
