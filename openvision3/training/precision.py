"""Device and arithmetic of a run: `auto` takes the best device, and the faster of bf16 autocast and fp32."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal

import torch

from openvision3.config import OpenVisionError

Precision = Literal["bf16", "fp32", "fp64"]  # fp64 is for checks


def resolve_device(name: str = "auto") -> torch.device:
    """Turns `auto` into cuda, else mps, else cpu, and checks any other name.

    Raises `OpenVisionError` for a name that torch does not know or a device that this machine lacks.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise OpenVisionError(f"unknown device {name!r}: use auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda" and (not cuda or (device.index or 0) >= torch.cuda.device_count()):
        found = torch.cuda.device_count()
        raise OpenVisionError(f"device {name!r} asked for, but this machine has {found} CUDA devices")
    if device.type == "mps" and not mps:
        raise OpenVisionError("device 'mps' asked for, but this machine has none; use --device cpu")
    return device


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager:
    """Autocast to bf16, or nothing for fp32; weights and optimizer state stay fp32. Not fp16: FLUX's VAE gives NaN."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def choose_precision(
    requested: Literal["auto", "bf16", "fp32", "fp64"], device: torch.device, run_step: Callable[[Precision], object]
) -> Precision:
    """Resolves `auto` by timing one call of `run_step` in each precision, each after one call to warm up.

    `run_step` should do a step's forward and backward pass and leave nothing behind. The caller records the answer, so
    that a resumed run keeps it.
    """
    if requested != "auto":
        return requested
    seconds: dict[Precision, float] = {}
    for precision in ("fp32", "bf16"):
        try:
            run_step(precision)
            synchronize(device)
            start = time.perf_counter()
            run_step(precision)
            synchronize(device)
            seconds[precision] = time.perf_counter() - start
        except (RuntimeError, NotImplementedError):
            if precision == "fp32":  # a fault of the step itself
                raise
    return min(seconds, key=lambda precision: seconds[precision])


def synchronize(device: torch.device) -> None:
    """Waits for the device's queue, for timings."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
