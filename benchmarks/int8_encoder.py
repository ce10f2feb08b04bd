"""Prints what int8 gives the encoder on a CPU: its linear layers by PyTorch's dynamic quantization, latents to tokens.

    python benchmarks/int8_encoder.py [--models demo ViT-B] [--resolution 256] [--batch-size 1] [--rounds 3]

fp32, bf16 and int8 (activations per tensor, weights per channel) in turns, processor time, medians and quartiles; the
tokens' cosine is to fp32's, the mean and the least over tokens. ViT-B is paper_b16's encoder with random weights, on
noise for latents (seed 0); demo reads the latents of scenes of the benchmark.
"""

import argparse
import copy
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from torch.ao.quantization.qconfig import per_channel_dynamic_qconfig

import openvision3
from openvision3.bench.timing import Spread, machine
from openvision3.config import SceneConfig
from openvision3.data.demo import BENCHMARK, BENCHMARK_SEED, render, scene
from openvision3.model.encoder import VisionEncoder
from openvision3.recipes import RECIPES
from openvision3.training.decoded import to_images
from openvision3.training.precision import autocast

CPU = torch.device("cpu")


def main() -> None:
    """Measures each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("demo", "ViT-B"), default=["demo", "ViT-B"])
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # PyTorch's quantization names its successor
    print(f"{machine(CPU)}; {options.resolution} px, batch {options.batch_size}; seconds of processor time")
    for name in options.models:
        encoder, latents = demo(options) if name == "demo" else vit_b(options)
        measure(name, encoder, latents, options.rounds)


@torch.no_grad()
def demo(options: argparse.Namespace) -> tuple[VisionEncoder, Tensor]:
    """The demo model's encoder, and latents of scenes."""
    model = openvision3.load("demo")
    assert isinstance(model.encoder, VisionEncoder) and model.vae is not None
    scenes = [scene(SceneConfig(), BENCHMARK, BENCHMARK_SEED, index) for index in range(options.batch_size)]
    pixels = torch.stack([torch.from_numpy(render(one, options.resolution)).permute(2, 0, 1) for one in scenes])
    return model.encoder, model.vae.encode(to_images(pixels, torch.float32))


def vit_b(options: argparse.Namespace) -> tuple[VisionEncoder, Tensor]:
    """paper_b16's encoder with random weights, and noise."""
    torch.manual_seed(0)
    config = RECIPES["paper_b16"]().model  # type: ignore[union-attr]
    side = options.resolution // config.vae.factor
    return VisionEncoder(config).eval(), torch.randn(options.batch_size, config.in_channels, side, side)


@torch.no_grad()
def measure(name: str, encoder: VisionEncoder, latents: Tensor, rounds: int) -> None:
    """Prints a line for each precision."""
    setting = {nn.Linear: per_channel_dynamic_qconfig}
    quantized = quantize_dynamic(copy.deepcopy(encoder), setting, dtype=torch.qint8)

    def in_bf16() -> Tensor:
        with autocast(CPU, "bf16"):
            return encoder(latents)

    calls: dict[str, Callable[[], Tensor]] = {
        "fp32": partial(encoder, latents),
        "bf16": in_bf16,
        "int8": partial(quantized, latents),
    }
    tokens = {kind: call().float() for kind, call in calls.items()}
    seconds: dict[str, list[float]] = {kind: [] for kind in calls}
    for _ in range(rounds):
        for kind, call in calls.items():
            start = time.process_time()
            call()
            seconds[kind].append(time.process_time() - start)
    for kind, taken in seconds.items():
        cosine = F.cosine_similarity(tokens[kind], tokens["fp32"], dim=-1)
        ratio = Spread.of([a / b for a, b in zip(seconds["bf16"], taken, strict=True)])
        print(
            f"{name} {kind}: {Spread.of(taken)} s, bf16 takes {ratio} times as long; cosine of tokens "
            f"{float(cosine.mean()):.6f}, least {float(cosine.min()):.6f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
