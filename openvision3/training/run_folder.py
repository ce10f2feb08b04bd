"""A run's folder: its config, its environment, one process at a time, and a clean stop on a signal.

`config.json` (resolved), `environment.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/step_N/`, `samples/`.
"""

import errno
import fcntl
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import torch

from openvision3.config import OpenVisionError, differences, load_json, save_json

ENVIRONMENT = "environment.json"


class RunInterrupted(Exception):
    """A run that stopped on a signal, with everything saved: says where. `signal_number` is the signal."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


@contextmanager
def open_run(folder: Path, config: Any, say: Callable[[str], None], wait: float = 0.0) -> Iterator[None]:
    """Creates the run's folder, or enters it again to resume, and holds it against other processes meanwhile.

    Where another process holds it, it has `wait` seconds to end.

    The config is written at the first start. At a resume, each difference from it is told through `say`; where one of
    them is not marked resumable, raises `OpenVisionError` and changes nothing. Before the first step is recorded, there
    is nothing to resume, and any config will do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    if not path.exists() and (folder / "checkpoints").exists():
        raise OpenVisionError(f"{folder} has checkpoints but no config.json; choose another folder (--out)")
    with (folder / ".lock").open("a") as lock:
        end = time.monotonic() + wait
        while not _locked(lock):
            if time.monotonic() >= end:
                raise OpenVisionError(f"{folder} is in use by another process")
            time.sleep(0.2)
        if not has_begun(folder):
            (folder / ENVIRONMENT).unlink(missing_ok=True)
        elif path.exists():
            check_resumable(load_json(type(config), path), config, folder, say)
        save_json(config, path)
        yield


def _locked(file: TextIO) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # record lock: data workers do not inherit it
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise OpenVisionError(
                f"{file.name} can't be locked ({error.strerror}): runs need a disk with file locks (Lustre: flock)"
            ) from None
        return False
    return True


def has_begun(folder: Path) -> bool:
    """Whether a run, or a stage of it in a folder of its own, has recorded a step or saved weights."""
    records = (folder / "metrics.jsonl", *folder.glob("*/metrics.jsonl"))
    saved = (*folder.glob("checkpoints/step_*"), *folder.glob("*/*.safetensors"))
    return bool(saved) or any(path.exists() and path.stat().st_size > 0 for path in records)


def check_resumable(old: Any, new: Any, folder: Path, say: Callable[[str], None]) -> None:
    """Tells how a run's config changed; raises `OpenVisionError` where the change would change what it computes."""
    changes = list(differences(old, new))
    for name, before, after, may_change in changes:
        say(f"{name}: {before!r} -> {after!r}" + ("" if may_change else "  (fixed for this run)"))
    fixed = [name for name, _, _, may_change in changes if not may_change]
    if fixed:
        raise OpenVisionError(
            f"{folder} holds a run with another {', '.join(fixed)}: start with the old value to resume it, "
            "or choose another folder (--out)"
        )


def record_environment(folder: Path, device: torch.device, **decisions: Any) -> dict[str, Any]:
    """Writes `environment.json` at a run's first start: machine, versions, and `decisions` that a resume must keep."""
    packages = ("openvision3", "torch", "torchvision", "numpy", "tokenizers", "safetensors", "lpips", "diffusers")
    record = {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),  # that share the run
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "packages": {name: version for name in packages if (version := _version(name)) is not None},
        **decisions,
    }
    temporary = folder / f"{ENVIRONMENT}.tmp"
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    temporary.replace(folder / ENVIRONMENT)
    return record


def recorded_environment(folder: Path) -> dict[str, Any] | None:
    """The `environment.json` of a run that has started before, or None."""
    path = folder / ENVIRONMENT
    return json.loads(path.read_text()) if path.exists() else None


class StopRequest:
    """Turns the first SIGINT, SIGTERM or SIGUSR1 into a request to stop after the step; a second SIGINT stops at once.

    With `hangup`, so does the end of the terminal, unless that is ignored (nohup). A context manager; outside the main
    thread it does nothing, as Python delivers signals there only.
    """

    def __init__(self, hangup: bool = False) -> None:
        self._numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
        if hangup and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            self._numbers.append(signal.SIGHUP)
        self.signal_number = 0  # of the signal received; 0: none
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in self._numbers:
            try:
                self._previous[number] = signal.signal(number, self._receive)
            except ValueError:
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.signal_number != 0

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
