"""Prints the time of a picture in a frozen VAE by how many go through it at once: what `training/decoded.py` sets.

    python benchmarks/vae_batches.py [--vae tiny | FOLDER] [--resolution 128] [--pictures 16] [--device auto]

Encoding without gradients, and decoding with L1, LPIPS and their gradient by the latents, in bf16, in turns. FOLDER is
of diffusers; `--vae flux-size` has FLUX.1's architecture and random weights.
"""

import argparse
from functools import partial

import torch
from torch import Tensor

from openvision3.bench.timing import machine, time_in_turns
from openvision3.evaluation.perceptual import load_lpips
from openvision3.training.decoded import DecodedLosses, encode_pixels
from openvision3.training.precision import autocast, resolve_device
from openvision3.vae import load_vae
from openvision3.vae_diffusers import random_flux_vae


def main() -> None:
    """Times both directions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", default="tiny")
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true", help="compile the VAE's layers")
    options = parser.parse_args()
    device = resolve_device(options.device)
    vae = random_flux_vae() if options.vae == "flux-size" else load_vae(options.vae)
    if options.compile:
        vae.compile_layers()
    vae, metric = vae.to(device), load_lpips().to(device)
    side, count = options.resolution, options.pictures
    pixels = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, device=device)
    latents = torch.randn(count, vae.config.channels, side // vae.config.factor, side // vae.config.factor)
    latents = latents.to(device)

    def encode(at_once: int) -> Tensor:
        with autocast(device, "bf16"):
            return encode_pixels(vae, pixels, torch.float32, at_once)

    def decode(at_once: int) -> None:
        with autocast(device, "bf16"):
            loss, _, _ = DecodedLosses.apply(latents.clone().requires_grad_(), pixels, vae, metric, 0.5, count, at_once)
        loss.backward()

    sizes = [2**n for n in range(count.bit_length()) if 2**n <= count]
    calls = {f"{what.__name__} {size}": partial(what, size) for what in (encode, decode) for size in sizes}
    print(f"{machine(device)}; {options.vae}, {side} px, {count} pictures; milliseconds a picture")
    for name, spread in time_in_turns(calls, device, options.rounds).items():
        low, median, high = (1e3 * value / count for value in (spread.low, spread.median, spread.high))
        print(f"{name:>10} at once: {median:8.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
