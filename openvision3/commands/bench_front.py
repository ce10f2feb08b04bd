"""`ov3 bench front`: what a fast front costs at the size of FLUX.1's VAE, on random weights."""

import sys
from typing import Annotated, Any, Literal

import tyro

from openvision3.commands import common
from openvision3.commands.batching import OutputOptions

Output = Annotated[OutputOptions, tyro.conf.arg(name=""), tyro.conf.FlagCreatePairsOff]


def front(
    size: int = 256,
    batch_size: int = 4,
    widths: tuple[int, int] = (128, 256),
    depths: tuple[int, int] = (1, 4),
    rounds: int = 5,
    device: str = "auto",
    dtype: Literal["fp32", "bf16"] = "bf16",
    output: Output = OutputOptions(),
) -> int:
    """GFLOPs and pictures a second of a fast encoder and of FLUX.1's VAE encoder, both untrained, in turns.

    Args:
        size: side of the square pictures, pixels; a multiple of 16.
        batch_size: pictures of a call.
        widths: channels at 1/4 and 1/8 of the picture's side.
        depths: residual blocks there.
        rounds: of measurements.
        device: auto, cpu, cuda, cuda:N or mps.
        dtype: of weights and arithmetic.
    """
    common.refuse_existing(output.json, output.overwrite)
    figures = measure(size, batch_size, widths, depths, rounds, device, dtype)
    rate, seconds = figures["flops_per_second"], figures["seconds"]
    rows = [
        (name, figures["parameters"][name], figures["gflops"][name], batch_size / seconds[name]["median"], rate[name])
        for name in ("VAE encoder", "fast encoder")
    ]
    columns = ("", "parameters", "GFLOPs a picture", "pictures/s", "GFLOP/s")
    common.print_table(f"{size} px, batch {batch_size}, {dtype}", columns, rows)
    speedup, limits = figures["speedup"], figures["limits"]
    print(f"speed-up {speedup['median']:.1f} ({speedup['low']:.1f} to {speedup['high']:.1f}), "
          f"{figures['gflops']['VAE encoder'] / figures['gflops']['fast encoder']:.1f} times fewer GFLOPs")  # fmt: skip
    print("limits, GFLOP/s: " + ", ".join(f"{name} {value:.0f}" for name, value in limits.items()))
    print(f"({figures['machine']})")
    common.write_json(output.json, figures, output.overwrite)
    return 0


def measure(
    size: int,
    batch_size: int,
    widths: tuple[int, int],
    depths: tuple[int, int],
    rounds: int,
    device: str,
    dtype: Literal["fp32", "bf16"],
) -> dict[str, Any]:
    """The figures that `ov3 bench front` prints."""
    import torch

    from openvision3.bench.timing import limits, machine, ratio, time_in_turns
    from openvision3.config import FastEncoderConfig
    from openvision3.model.flops import counted_flops
    from openvision3.training.precision import resolve_device
    from openvision3.vae_diffusers import DiffusersVAE, flux_autoencoder, flux_config
    from openvision3.vae_distilled import FastEncoder

    config, place = flux_config(), resolve_device(device)
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    sizes = FastEncoderConfig(widths, depths)
    torch.manual_seed(0)
    vae = DiffusersVAE(config, flux_autoencoder())
    vae.autoencoder.decoder = None
    fast = FastEncoder(sizes, config.channels, config.factor).requires_grad_(False)
    with torch.device("meta"):
        shells = DiffusersVAE(config, flux_autoencoder()), FastEncoder(sizes, config.channels, config.factor)
    flops = {
        "VAE encoder": counted_flops(shells[0].encode, (3, size, size)),
        "fast encoder": counted_flops(shells[1].requires_grad_(False), (3, size, size)),
    }
    modules: dict[str, torch.nn.Module] = {"VAE encoder": vae, "fast encoder": fast}
    for module in modules.values():
        module.to(device=place, dtype=kind).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.rand(batch_size, 3, size, size, device=place, dtype=kind) * 2 - 1
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        seconds = time_in_turns(
            {"VAE encoder": lambda: vae.encode(images), "fast encoder": lambda: fast(images)},
            place,
            rounds,
            say=lambda line: print(line, file=sys.stderr),
        )
        rates = limits(place, kind, rounds)
    return {
        "size": size,
        "batch_size": batch_size,
        "dtype": dtype,
        "encoder": vars(sizes),
        "parameters": {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()},
        "gflops": {name: count / 1e9 for name, count in flops.items()},
        "seconds": {name: vars(spread) for name, spread in seconds.items()},
        "flops_per_second": {name: batch_size * flops[name] / seconds[name].median / 1e9 for name in flops},
        "speedup": vars(ratio(seconds["VAE encoder"], seconds["fast encoder"])),
        "limits": {name: spread.median / 1e9 for name, spread in rates.items()},
        "machine": machine(place),
    }
