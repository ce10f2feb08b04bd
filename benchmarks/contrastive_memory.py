"""Memory of one process's share of the contrastive losses in a large world, and their equality with the plain losses.

    python benchmarks/contrastive_memory.py                 # local batch 1,024 of a global 32,768, width 512; minutes
    python benchmarks/contrastive_memory.py --world 4 --local 256

The world is simulated: this process holds the features of all, and takes the part of each rank in turn. Memory is what
forward and backward pass of one rank take at most above the gathered features, gradients and the rank's own features
among it: by PyTorch's count of tensors' bytes, and as growth of the peak resident size (Linux, VmHWM), which holds what
the matrix library takes too. The plain losses are rank by rank `cross_entropy` or `logsigmoid` over a whole (local,
global) matrix, with gradients to all features; shares and gradients are summed over all ranks and compared, in fp32.
Resident size and the processor's seconds are the least of three runs: the system's work beside them only adds.
"""

import argparse
import ctypes
import functools
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from openvision3.contrastive import Everyone, contrastive_loss, sigmoid_loss
from openvision3.distributed import World

TEMPERATURE, BIAS = 20.0, -10.0


@dataclass(frozen=True)
class Simulated(World):
    """A rank of a world that is not there. What the others would send is in `sent`, and what this one sends is kept."""

    sent: list[Tensor] = field(default_factory=list)

    def all_gather(self, tensor: Tensor) -> Tensor:
        count = len(tensor)
        if not self.sent:
            self.sent.append(torch.zeros(self.size * count, *tensor.shape[1:]))
        self.sent[0][self.rank * count : (self.rank + 1) * count] = tensor
        return self.sent[0]


@dataclass
class Found:
    """A loss and its gradients, summed over ranks; those by images and texts (G, D)."""

    loss: float
    images: Tensor
    texts: Tensor
    temperature: float
    bias: float


def ours(kind: str, world: World, everyone: Everyone) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A rank's share, and what it is differentiated by: image, text, temperature, bias."""
    count = len(everyone.images) // world.size
    mine = slice(world.rank * count, (world.rank + 1) * count)
    image, text = (features[mine].clone().requires_grad_() for features in everyone)
    temperature, bias = (torch.tensor(value, requires_grad=True) for value in (TEMPERATURE, BIAS))
    if kind == "softmax":
        return contrastive_loss(image, text, temperature, world, everyone), (image, text, temperature)
    return sigmoid_loss(image, text, temperature, bias, world, everyone), (image, text, temperature, bias)


def plain(kind: str, world: World, everyone: Everyone) -> tuple[Tensor, tuple[Tensor, ...]]:
    """As `ours`, but by all images and texts."""
    images, texts = (features.detach().requires_grad_() for features in everyone)
    count = len(images) // world.size
    labels = torch.arange(world.rank * count, (world.rank + 1) * count)
    temperature, bias = (torch.tensor(value, requires_grad=True) for value in (TEMPERATURE, BIAS))
    logits = temperature * images[labels] @ texts.T
    if kind == "softmax":
        loss = F.cross_entropy(logits, labels) + F.cross_entropy(temperature * texts[labels] @ images.T, labels)
        return loss / (2 * world.size), (images, texts, temperature)
    signs = torch.full_like(logits, -1.0)
    signs[torch.arange(count), labels] = 1.0
    return -F.logsigmoid(signs * (logits + bias)).sum() / len(images), (images, texts, temperature, bias)


Way = Callable[[str, World, Everyone], tuple[Tensor, tuple[Tensor, ...]]]


def all_ranks(way: Way, kind: str, worlds: list[Simulated], everyone: Everyone) -> Found:
    """Sums over ranks. Rows that a rank has gradients for are its own (`ours`) or all (`plain`)."""
    found = Found(0.0, *(torch.zeros_like(features) for features in everyone), 0.0, 0.0)
    for world in worlds:
        loss, inputs = way(kind, world, everyone)
        d_image, d_text, d_temperature, *d_bias = torch.autograd.grad(loss, inputs)
        start = 0 if len(d_image) == len(everyone.images) else world.rank * len(d_image)
        found.images[start : start + len(d_image)] += d_image
        found.texts[start : start + len(d_text)] += d_text
        found.loss += loss.item()
        found.temperature += d_temperature.item()
        found.bias += sum(bias.item() for bias in d_bias)
    return found


def peak_resident(run: Callable[[], object], everyone: Everyone) -> tuple[float, float]:
    """MiB by which the resident size grew at most during `run`, and seconds."""
    ctypes.CDLL(None).malloc_trim(0)  # gives back what earlier runs freed, or it would count as there before
    for features in everyone:
        features.sum()  # brings back pages that the system took away
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start = resident("VmRSS"), time.process_time()
    run()
    seconds = time.process_time() - start
    return resident("VmHWM") - before, seconds


def peak_tensors(run: Callable[[], object]) -> float:
    """MiB of tensors' storage that `run` held at most at a time, those inside operators too, by PyTorch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    held, peak = 0, 0
    for event in sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak / 2**20


def resident(name: str) -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def step(way: Way, kind: str, world: World, everyone: Everyone) -> tuple[Tensor, ...]:
    loss, inputs = way(kind, world, everyone)
    return torch.autograd.grad(loss, inputs)


def make_features(samples: int, width: int) -> Everyone:
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(samples, width, generator=generator), dim=1)
    texts = F.normalize(torch.randn(samples, width, generator=generator).add_(images, alpha=width**0.5 / 3), dim=1)
    return Everyone(images, texts)


def relative(found: Tensor | float, expected: Tensor | float) -> float:
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    return float((found - expected).norm() / expected.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local", type=int, default=1024, help="samples of a rank")
    parser.add_argument("--world", type=int, default=32, help="ranks")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--memory-only", action="store_true", help="no comparison over all ranks, which takes minutes")
    options = parser.parse_args()
    samples, size = options.local * options.world, options.world
    everyone = make_features(samples, options.width)
    gathered = sum(features.nbytes for features in everyone) / 2**20
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; {options.local:,} of {samples:,} samples, ",
        end="",
    )
    print(f"width {options.width}: gathered features {gathered:.1f} MiB, their gradients as much")
    for kind in ("softmax", "sigmoid"):
        sent: list[Tensor] = []
        worlds = [Simulated(rank, size, None, sent) for rank in range(size)]
        small = make_features(16, options.width)
        for way in (ours, plain):  # loads what is loaded at first use
            step(way, kind, Simulated(0, 2), small)
        if not options.memory_only:
            with torch.no_grad():  # what the ranks send each other
                for world in worlds:
                    ours(kind, world, everyone)
        rank = worlds[size // 2]
        for name, way in (("ours", ours), ("plain", plain)):
            run = functools.partial(step, way, kind, rank, everyone)
            grown, seconds = map(min, zip(*(peak_resident(run, everyone) for _ in range(3)), strict=True))
            line = f"{kind} {name:5}: at most {peak_tensors(run):6.1f} MiB of tensors, resident size + {grown:6.1f} MiB"
            print(f"{line}, {seconds:.2f} s", flush=True)
        if options.memory_only:
            continue
        found, expected = (all_ranks(way, kind, worlds, everyone) for way in (ours, plain))
        errors = {name: relative(value, vars(expected)[name]) for name, value in vars(found).items()}
        if kind == "softmax":
            del errors["bias"]
        print("  relative error against plain: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))


if __name__ == "__main__":
    main()
