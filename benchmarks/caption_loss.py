"""Time and memory of the caption loss's ways to be computed, forward and backward, on this machine's CPU.

    python benchmarks/caption_loss.py          # shapes of the demo and of a micro-batch of the paper; fp32 and bf16
    python benchmarks/caption_loss.py --rows 8192 --width 512 --vocabulary 30522

Each way runs in a process of its own. Time: the processor's, of all threads together, the least of several runs that
are interleaved in rounds. Memory: the growth of the peak resident size (Linux, VmHWM) over that of the inputs, which
holds the gradients too. Error: of the loss, and relative L2 of the gradients, against the plain loss in fp64 (where its
logits fit).
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from openvision3 import chunked

# rows: captions times tokens
SHAPES = {"demo": (64 * 24, 192, 1888), "paper": (16 * 127, 512, 30522)}


def plain(hidden: Tensor, output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, output).float(), targets, ignore_index=0, reduction="sum")


def torch_chunked(hidden: Tensor, output: Tensor, targets: Tensor) -> Tensor:
    """PyTorch's own (2.13 and newer); it knows nothing of autocast, so the casts are made here."""
    if torch.is_autocast_enabled("cpu"):
        hidden, output = hidden.bfloat16(), output.bfloat16()
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, output, targets, ignore_index=0, reduction="sum", options=options)


def ours(hidden: Tensor, output: Tensor, targets: Tensor) -> Tensor:
    return chunked.LinearCrossEntropy.apply(hidden, output, targets, 0)


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"plain": plain, "torch": torch_chunked, "ours": ours}


def make_inputs(rows: int, width: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator)
    output = torch.randn(vocabulary, width, generator=generator) * 0.02
    targets = torch.randint(1, vocabulary, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < 0.3] = 0  # padding
    return hidden.requires_grad_(), output.requires_grad_(), targets


def resident(name: str) -> float:
    """MiB of VmRSS, or of VmHWM: its peak."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def measure(way: str, shape: tuple[int, int, int], precision: str, runs: int) -> dict[str, float]:
    """Figures of one way in this process."""
    hidden, output, targets = make_inputs(*shape)
    small = [tensor.detach()[:8].clone().requires_grad_() for tensor in (hidden, output)]
    seconds, value = float("inf"), 0.0

    def run(hidden: Tensor, output: Tensor, targets: Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = WAYS[way](hidden, output, targets)
        loss.backward()
        return loss.item()

    run(small[0], small[1], targets[:8] % 8)  # loads what is loaded at first use
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    for _ in range(runs):
        hidden.grad = output.grad = None
        start = time.process_time()
        value = run(hidden, output, targets)
        seconds = min(seconds, time.process_time() - start)
    found = {"seconds": seconds, "mib": resident("VmHWM") - before, "loss": value}
    if shape[0] * shape[2] < 2**27:
        exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, output)]
        loss = plain_fp64(exact[0], exact[1], targets)
        loss.backward()
        found["loss_error"] = abs(value / loss.item() - 1)
        for name, tensor, right in zip(("hidden_error", "output_error"), (hidden, output), exact, strict=True):
            assert tensor.grad is not None and right.grad is not None
            found[name] = float((tensor.grad - right.grad).norm() / right.grad.norm())
    return found


def plain_fp64(hidden: Tensor, output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, output), targets, ignore_index=0, reduction="sum")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("rows", "width", "vocabulary"):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3, help="processes for each way")
    parser.add_argument("--runs", type=int, default=3, help="runs in each process")
    parser.add_argument("--block", type=int, default=chunked.CPU_ROWS, help="rows of a block of ours")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    chunked.CPU_ROWS = options.block
    if options.one:
        way, precision, *shape = options.one
        rows, width, vocabulary = map(int, shape)
        print(json.dumps(measure(way, (rows, width, vocabulary), precision, options.runs)))
        return
    shapes = {"given": (options.rows, options.width, options.vocabulary)} if options.rows else SHAPES
    ways = [way for way in WAYS if way != "torch" or hasattr(torch.nn, "LinearCrossEntropyOptions")]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, shape in shapes.items():
        for precision in ("fp32", "bf16"):
            found: dict[str, dict[str, float]] = {}
            for _ in range(options.rounds):
                for way in ways:
                    command = [sys.executable, __file__, "--runs", str(options.runs), "--block", str(options.block)]
                    command += ["--one", way, precision, *map(str, shape)]
                    row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                    seconds = min(row["seconds"], found.get(way, row)["seconds"])
                    found[way] = row | {"seconds": seconds}
            print(f"{name}: {shape[0]} rows, width {shape[1]}, vocabulary {shape[2]}, {precision}")
            for way, row in found.items():
                errors = "".join(f", {key} {row[key]:.1e}" for key in row if key.endswith("error"))
                print(f"  {way:6} {row['seconds'] * 1e3:9.1f} ms {row['mib']:8.1f} MiB{errors}")


if __name__ == "__main__":
    main()
