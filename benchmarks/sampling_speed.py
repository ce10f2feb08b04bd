"""Speed of drawing tokens by a DiT-DH-B, against diffusers' DiT pipeline of the same counted arithmetic, on the CPU.

    python benchmarks/sampling_speed.py                              # both dtypes, batch 1 and 4, without and with cfg
    python benchmarks/sampling_speed.py --dtypes bf16 --batches 1 --steps 2 --rounds 3

Both draw 256 tokens of 1,000 classes from random weights. The peer is `DiTPipeline` with a transformer of width 1,024
and the depth whose FLOPs are nearest (its seconds are divided by what is left of the difference), its DDIM scheduler,
and a VAE that does nothing. Few steps are timed and scaled to 50; the layout of our weights, made once a call, is timed
apart. Seconds are the processor's, of all threads together, so that other processes change little; sides take turns,
the ratio is that of neighbours, with median and quartiles. "automatic" is ours in the faster of both types against the
peer in bf16: on CPUs without AMX fp32 is the faster one. Needs openvision3[eval].
"""

import argparse
import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from openvision3.bench.timing import Spread, limits, machine, ratio
from openvision3.generation.config import named
from openvision3.generation.dit import Condition, DiT, flops
from openvision3.generation.inference import frozen
from openvision3.generation.sample import SamplerConfig, sample
from openvision3.generation.statistics import Normalizer

CPU = torch.device("cpu")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOKENS, CLASSES, STEPS, GUIDANCE = 256, 1000, 50, 1.5
DEPTHS = range(18, 22)


class NoVAE(nn.Module):
    """Stands in for a VAE: answers a pixel a latent, so that denoising alone counts."""

    config = SimpleNamespace(scaling_factor=1.0)

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))

    @property
    def dtype(self) -> torch.dtype:
        """As the pipeline asks for it."""
        return self.anchor.dtype

    @property
    def device(self) -> torch.device:
        """As the pipeline asks for it."""
        return self.anchor.device

    def decode(self, latents: Tensor) -> SimpleNamespace:
        """(B, 4, h, w) -> (B, 3, h, w)"""
        return SimpleNamespace(sample=latents[:, :3])


def transformer(depth: int) -> Any:
    """diffusers' DiT of patch 2 on 32 x 32 latents: 256 tokens of 1,024."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=16,
        attention_head_dim=64,
        in_channels=4,
        out_channels=8,
        num_layers=depth,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
    )


def peer_flops(depth: int) -> float:
    """Counted by PyTorch for one forward pass of one sample, on the meta device; modulation's products too."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        zero = torch.zeros(1, dtype=torch.int64)
        transformer(depth)(torch.empty(1, 4, 32, 32), zero, zero)
    return counter.get_total_flops()


def peer(depth: int, dtype: torch.dtype) -> Any:
    """The pipeline as a user would make it for this dtype."""
    from diffusers import DDIMScheduler, DiTPipeline

    pipe: Any = DiTPipeline(randomised(transformer(depth)), NoVAE(), DDIMScheduler())  # type: ignore[arg-type]
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype)


def randomised(module: nn.Module) -> nn.Module:
    """Weights that start at zero are drawn: products with zeros may be faster."""
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return module.eval().requires_grad_(False)


def in_turns(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Spread]:
    """Processor seconds of each function, after one call of each that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(-1, rounds):
        for name, function in functions.items():
            start = time.process_time()
            function()
            if number >= 0:
                seconds[name].append(time.process_time() - start)
    return {name: Spread.of(values) for name, values in seconds.items()}


def scaled(seconds: Spread, steps: int, once: float = 0.0) -> Spread:
    """The seconds of 50 steps from those of a few; `once` of them do not grow with the steps."""
    return Spread.of([once + (value - once) * STEPS / steps for value in seconds.values])


def main() -> None:
    """Prints a row for each dtype, batch and guidance."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--guidance", nargs="+", type=float, default=[1.0, GUIDANCE])
    parser.add_argument("--steps", type=int, default=4, help="timed, then scaled to 50")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    torch.manual_seed(0)
    config = named("B")
    one = flops(config)
    depth = min(DEPTHS, key=lambda n: abs(peer_flops(n) - one))
    other = peer_flops(depth)
    print(machine(CPU), flush=True)
    print(f"ours {one / 1e9:.2f} GFLOPs a pass, {depth} layers of the peer {other / 1e9:.2f}: x {other / one:.3f}")
    assert abs(other / one - 1) < 0.03, "the peer's arithmetic is not ours"
    ours = randomised(DiT(config))
    assert isinstance(ours, DiT)
    normalizer = Normalizer(torch.zeros(TOKENS, config.token_width), torch.ones(TOKENS, config.token_width))
    pipes = {name: peer(depth, DTYPES[name]) for name in options.dtypes}

    for batch in options.batches:
        for guidance in options.guidance:
            compare(ours, normalizer, pipes, batch, guidance, options, other / one)


def compare(
    dit: DiT,
    normalizer: Normalizer,
    pipes: dict[str, Any],
    batch: int,
    guidance: float,
    options: argparse.Namespace,
    arithmetic: float,
) -> None:
    """Times both sides in each dtype, all in turns, and prints the rows; the peer's seconds for our count of FLOPs."""
    condition = Condition(labels=torch.arange(batch))
    sampler = SamplerConfig(steps=options.steps, guidance=guidance)

    def ours(name: str) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=name == "bf16"):
            sample(dit, normalizer, condition, range(batch), 0, sampler)

    def prepare(name: str) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=name == "bf16"):
            frozen(dit)

    def theirs(name: str) -> None:
        pipes[name](list(range(batch)), guidance, num_inference_steps=options.steps, output_type="np")

    calls: dict[str, Callable[[], object]] = {}
    for name in pipes:
        calls |= {f"ours {name}": lambda name=name: ours(name), f"peer {name}": lambda name=name: theirs(name)}
        calls[f"prepare {name}"] = lambda name=name: prepare(name)
    seconds = in_turns(calls, options.rounds)
    for name in pipes:  # the layout of the weights is made once a call, whatever the steps
        once = seconds[f"prepare {name}"].median
        seconds[f"ours {name}"] = scaled(seconds[f"ours {name}"], options.steps, once)
        theirs_scaled = scaled(seconds[f"peer {name}"], options.steps)
        seconds[f"peer {name}"] = Spread.of([value / arithmetic for value in theirs_scaled.values])
    passes = STEPS * batch * (1 if guidance == 1 else 2)
    for name in pipes:
        product = limits(CPU, DTYPES[name], 1)["matrix product"].median / 1e9
        rate = {side: flops(dit.config) * passes / seconds[f"{side} {name}"].median / 1e9 for side in ("ours", "peer")}
        print(
            f"{name}, batch {batch}, guidance {guidance:g}: ours {seconds[f'ours {name}'].median / batch:.1f} s, peer "
            f"{seconds[f'peer {name}'].median / batch:.1f} s a sample of {STEPS} steps; peer / ours "
            f"{ratio(seconds[f'peer {name}'], seconds[f'ours {name}'])}; {rate['ours']:.0f} and {rate['peer']:.0f} "
            f"GFLOP/s, a matrix product (wall time) {product:.0f}",
            flush=True,
        )
    if len(pipes) == 2:
        best = min(pipes, key=lambda name: seconds[f"ours {name}"].median)
        found = ratio(seconds["peer bf16"], seconds[f"ours {best}"])
        print(f"automatic ({best} of ours, peer bf16), batch {batch}, guidance {guidance:g}: {found}", flush=True)


if __name__ == "__main__":
    main()
