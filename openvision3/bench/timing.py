"""Fair comparisons of speed: things are timed in turns in one run, against what the machine can do in that run.

A shared or throttled machine changes from minute to minute. Times of different runs say little then; ratios of
neighbouring turns, their median and spread, and rates against a plain matrix product's say most of what can be said.
"""

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from openvision3.training.precision import synchronize


@dataclass(frozen=True)
class Spread:
    """A median, and the quartiles around it, of some measurements."""

    median: float
    low: float
    high: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of one value at least."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], (values[0],))
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, tuple(values))

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.low:.4g} to {self.high:.4g})"


def time_in_turns(
    functions: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int = 5,
    warmup: int = 1,
    say: Callable[[str], object] | None = None,
) -> dict[str, Spread]:
    """Seconds of a call of each function, by name; each round calls all of them once, one after the other.

    `warmup` rounds come first and do not count. The device's queue is waited for around every call. `say` hears about
    each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(-warmup, rounds):
        for name, function in functions.items():
            gc.collect()
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
        if say is not None:
            last = ", ".join(f"{name} {times[-1]:.3g} s" for name, times in seconds.items() if times)
            say(f"round {number + 1} of {rounds}: {last}" if number >= 0 else "warmed up")
    return {name: Spread.of(times) for name, times in seconds.items()}


def ratio(slower: Spread, faster: Spread) -> Spread:
    """How many times as long `slower` takes, round by round; both from one `time_in_turns`."""
    return Spread.of([a / b for a, b in zip(slower.values, faster.values, strict=True)])


MATRIX_SIDE = 2048
CONVOLUTION = (128, 128)  # channels, side of the picture: the widest layers of a VAE's decoder at 128 px


def limits(device: torch.device, dtype: torch.dtype, rounds: int = 5) -> dict[str, Spread]:
    """FLOP/s of a "matrix product" (2048 x 2048 by the same) and a "convolution" (3 x 3, 128 channels, 128 px)."""
    side, (channels, size) = MATRIX_SIDE, CONVOLUTION
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    convolution = nn.Conv2d(channels, channels, 3, padding=1, device=device, dtype=dtype).requires_grad_(False)
    convolution = convolution.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    picture = torch.randn(1, channels, size, size, device=device, dtype=dtype)
    picture = picture.contiguous(memory_format=torch.channels_last)
    flops = {"matrix product": 2.0 * side**3, "convolution": 18.0 * channels**2 * size**2}
    calls = {"matrix product": lambda: a @ b, "convolution": lambda: convolution(picture)}

    def several(call: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(REPEATS):
                call()

        return run

    seconds = time_in_turns({name: several(call) for name, call in calls.items()}, device, rounds)
    return {name: Spread.of([REPEATS * flops[name] / s for s in seconds[name].values]) for name in flops}


REPEATS = 4  # calls of what is too short to be timed alone


def machine(device: torch.device) -> str:
    """The device and what it runs on, in a line."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}"
    cores, name = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(), ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        text = info.read_text()
        found = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
        special = [flag for flag in ("amx_bf16", "avx512_bf16") if f" {flag}" in text]
        name = ", ".join([*found[:1], *(special or ["no bf16 instructions"])])
    return f"{name or platform.processor() or device.type}, {cores} cores, {torch.get_num_threads()} threads, " + (
        f"PyTorch {torch.__version__}"
    )


def resident_bytes() -> int:
    """Memory that this process holds now (Linux)."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """The most that this process has held since `reset_peak` (Linux)."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Starts `peak_resident_bytes` anew from what is held now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
