"""Prints what the recipes cost on many devices, as Markdown: the tables of docs/SCALING.md.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --write docs/SCALING.md       # into the document, below the tables' names
    python benchmarks/scaling.py --hardware.matrix-efficiency 0.5 --hardware.network 25e9

Floating-point operations and bytes are counted on shapes alone, with FLUX.1's VAE; the device's rates are options, and
its efficiencies assumptions: no GPU was at hand. The arithmetic is `openvision3/bench/scaling.py`.
"""

from dataclasses import dataclass, field, fields, replace
from functools import cache
from itertools import dropwhile
from pathlib import Path
from typing import Any

import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode

from openvision3.bench import scaling
from openvision3.bench.scaling import H100, RTX_4090, Hardware, Plan, Work
from openvision3.config import StageConfig, TrainConfig
from openvision3.model.blocks import SIZES, Block
from openvision3.model.flops import counted_flops, forward_flops
from openvision3.model.openvision3 import OpenVision3
from openvision3.recipes import RECIPES
from openvision3.training.dryrun import trained_parameters, training_flops
from openvision3.training.frozen import set_training
from openvision3.training.memory import activation_bytes
from openvision3.vae import FrozenVAE
from openvision3.vae_diffusers import flux_shell

DEVICES = {"s16_1gpu": 1, "b16_1000_200": 8, "paper_b16": 64, "paper_l16": 64}


@dataclass(frozen=True)
class Options:
    """What the tables assume."""

    hardware: Hardware = field(default_factory=lambda: H100)
    decode_batch: int = 16  # pictures that the VAE's decoder keeps activations of at once; 0: all
    write: Path | None = None  # document whose tables, each below its `<!-- name -->`, are replaced


class Operations(TorchDispatchMode):
    """Counts what is called on a device; views cost nothing there."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@cache
def vae() -> FrozenVAE:
    """FLUX.1's, without weights."""
    return flux_shell().freeze()


@cache
def vae_costs(resolution: int) -> tuple[dict[str, float], float, float]:
    """FLOPs of encoder and decoder; bytes that the decoder keeps; operations of encoder, decoder and its gradient."""
    config = RECIPES["paper_b16"]()
    assert isinstance(config, TrainConfig)
    shell = vae()
    kept = activation_bytes(
        replace(config, loss=replace(config.loss, pixel_stride=1)), resolution, torch.device("cpu"), "bf16", shell
    )["vae_decoder"]
    side = resolution // 8
    with torch.no_grad(), Operations() as encoder:
        shell.encode(torch.empty(1, 3, resolution, resolution, device="meta"))
    with torch.no_grad(), Operations() as decoder:
        shell.decode(torch.empty(1, 16, side, side, device="meta"))
    flops = {
        name: counted_flops(function, shape)
        for name, function, shape in (
            ("vae_encoder", shell.encode, (3, resolution, resolution)),
            ("vae_decoder", shell.decode, (16, side, side)),
        )
    }
    return flops, kept, float(encoder.count + 2 * decoder.count)


@cache
def lpips_flops(net: str, resolution: int) -> float:
    """FLOPs of LPIPS's network on one picture."""
    import lpips

    with torch.device("meta"):
        network = lpips.LPIPS(pretrained=False, net=net, pnet_rand=True, verbose=False).requires_grad_(False)
    return counted_flops(lambda images: network.net(images), (3, resolution, resolution))  # type: ignore[operator]


@cache
def work_of(config: TrainConfig, stage: StageConfig) -> Work:
    """Counts what a sample of a stage asks for."""
    with torch.device("meta"):
        model = OpenVision3(config.model)
    set_training(model, config.frozen)
    towers = forward_flops(config.model, stage.resolution)
    flops, decoded, vae_operations = vae_costs(stage.resolution)
    every = replace(config, loss=replace(config.loss, pixel_stride=1))
    matrix = training_flops(every, towers, two_passes=False)
    forward = towers["encoder"] + towers["decoder"] + 2 * towers["text_encoder"] + towers["text_decoder"]
    lpips = 3 * lpips_flops(config.loss.lpips_net, stage.resolution) if stage.lpips_weight else 0.0
    blocks = [
        sum(parameter.numel() for parameter in block.parameters())
        for block in model.modules()
        if isinstance(block, Block)
    ]
    trained = trained_parameters(config, model)
    return Work(
        batch=stage.batch_size,
        samples=stage.samples,
        resolution=stage.resolution,
        parameters=trained,
        largest_block=max(blocks),
        outside_blocks=trained - sum(blocks),
        frozen_bytes=4.0 * sum(parameter.numel() for parameter in vae().parameters()),
        embed_dim=config.model.embed_dim,
        matrix_flops=matrix,
        first_pass_flops=training_flops(every, towers, two_passes=True) - matrix,
        backward_flops=matrix - forward,
        encoder_flops=flops["vae_encoder"],
        decoder_flops=2 * flops["vae_decoder"] + lpips,
        latent_bytes=4.0 * config.model.in_channels * (stage.resolution // 8) ** 2,
        kept=kept_bytes(config, stage.resolution),
        decoded=decoded,
        operations=(3.0 + config.checkpoint_blocks) * forward_operations(model, stage.resolution),
        vae_operations=vae_operations,
    )


def kept_bytes(config: TrainConfig, resolution: int) -> float:
    """Bytes of activations of a sample through the trained parts; with recomputed blocks, one whole block's too."""
    # The fused attention of a GPU keeps no scores. Counted as for the CPU, whose autocast needs no GPU.
    fused = replace(config, model=replace(config.model, attention="sdpa"))
    kept = activation_bytes(fused, resolution, torch.device("cpu"), "bf16", None)
    if not config.checkpoint_blocks:
        return sum(kept.values())
    whole = activation_bytes(replace(fused, checkpoint_blocks=False), resolution, torch.device("cpu"), "bf16", None)
    model = config.model
    assert model.decoder is not None and model.text_encoder is not None and model.text_decoder is not None
    depths = {
        "encoder": model.encoder.depth,
        "decoder": model.decoder.depth,
        "text_encoder": model.text_encoder.transformer.depth,
        "text_decoder": model.text_decoder.transformer.depth,
    }
    return sum(kept.values()) + max(whole[name] / depth for name, depth in depths.items())


def forward_operations(model: OpenVision3, resolution: int) -> int:
    """Operations of a forward pass through all trained parts."""
    text, caption = model.config.text_encoder, model.config.text_decoder
    assert text is not None and caption is not None
    with torch.device("meta"), torch.no_grad(), Operations() as counted:
        tokens = model.encode_latents(torch.empty(2, 16, resolution // 8, resolution // 8))
        model.pool(tokens)
        model.decode_latents(tokens)
        model.embed_text_ids(torch.zeros(4, text.context_length, dtype=torch.long))
        model.caption_logits(tokens, torch.zeros(2, caption.context_length, dtype=torch.long))
    return counted.count


def recipe(name: str) -> TrainConfig:
    """A recipe of training."""
    config = RECIPES[name]()
    assert isinstance(config, TrainConfig)
    return config


def sized(size: str, checkpoint: bool) -> TrainConfig:
    """The paper's recipe with another encoder: text towers of L's for L and larger."""
    base = recipe("paper_l16" if size in ("L", "H") else "paper_b16")
    model = replace(base.model, encoder=SIZES[size])
    return replace(base, model=model, checkpoint_blocks=checkpoint)


def works(config: TrainConfig) -> list[Work]:
    """Of each stage."""
    return [work_of(config, stage) for stage in config.stages]


def plan_of(config: TrainConfig, devices: int, options: Options) -> Plan:
    """A recipe as it is started on so many devices."""
    return Plan(devices, config.micro_batch, config.parallel, config.loss.pixel_stride, options.decode_batch)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def gib(count: float) -> str:
    return f"{count / 2**30:.3g}" if count < 2**30 * 10 else f"{count / 2**30:.0f}"


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"


def several(values: list[str]) -> str:
    return " / ".join(values)


def inputs_table(hardware: Hardware) -> str:
    """What is assumed of the device."""
    rows = [[f"`--hardware.{f.name.replace('_', '-')}`", f"{getattr(hardware, f.name):g}"]
            for f in fields(hardware) if f.name != "name"]  # fmt: skip
    return table([f"option ({hardware.name})", "value"], rows)


def recipes_table(options: Options) -> str:
    """Each recipe on the devices it is meant for."""
    rows = []
    for name, devices in DEVICES.items():
        config = recipe(name)
        hardware = RTX_4090 if devices == 1 else options.hardware
        plan, stages = plan_of(config, devices, options), works(config)
        flops = 0.0
        for work in stages:
            passes, _ = plan.passes(work)
            sample = work.matrix_flops + work.first_pass_flops * (passes > 1) + work.encoder_flops
            flops += work.samples * (sample + work.decoder_flops / plan.pixel_stride)
        samples = sum(work.samples for work in stages)
        counted = f"{samples / 1e9:.1f} G" if samples > 1e9 else f"{samples / 1e6:.0f} M"
        time = sum(scaling.hours(work, plan, hardware) for work in stages)
        kept = several([gib(scaling.memory(work, plan)) for work in stages])
        rows.append([f"`{name}`", f"{devices} x {hardware.name}", counted, f"{flops:.1e}".replace("e+", "e"),
                     f"{time:.0f}", f"{kept} GiB"])  # fmt: skip
    return table(["recipe", "devices", "samples", "FLOPs", "hours", "memory, stage 1 / 2"], rows)


def devices_table(options: Options) -> str:
    """The long recipes on 1 to 256 devices."""
    rows, hardware = [], options.hardware
    for name in ("b16_1000_200", "paper_b16", "paper_l16"):
        config = recipe(name)
        stages = works(config)
        for devices in (1, 8, 64, 256):
            plan = plan_of(config, devices, options)
            steps = [scaling.step(work, plan, hardware) for work in stages]
            alone = sum(scaling.hours(work, replace(plan, devices=1), hardware) for work in stages)
            time = sum(scaling.hours(work, plan, hardware) for work in stages)
            rows.append(
                [
                    f"`{name}`" if devices == 1 else "",
                    f"{devices}",
                    f"{time:,.0f}",
                    f"{alone / devices / time:.0%}",
                    several([f"{plan.local(work)}" for work in stages]),
                    several([gib(scaling.memory(work, plan)) for work in stages]),
                    several([ms(s.seconds) for s in steps]),
                    f"{steps[0].reduction_bytes / 1e9:.2f}",
                    several([f"{ms(s.reduction)} ({ms(s.exposed)})" for s in steps]),
                    several([f"{s.gather_bytes / 1e6:.0f}" for s in steps]),
                    several([ms(s.gathers) for s in steps]),
                    several([f"{scaling.cores(work, plan, hardware):.1f}" for work in stages]),
                ]
            )
    header = ["recipe", "GPUs", "hours", "of ideal", "samples a GPU", "GiB a GPU", "ms a step", "GB of gradients",
              "ms to sum them (exposed)", "MB of features", "ms to gather them", "cores a GPU"]  # fmt: skip
    return table(header, rows)


def parallel_table(options: Options) -> str:
    """Replicated and sharded parameters."""
    rows, hardware = [], options.hardware
    for name in ("paper_b16", "paper_l16"):
        config = recipe(name)
        for devices in (8, 64, 256):
            for kind in ("ddp", "fsdp"):
                plan = replace(plan_of(config, devices, options), parallel=kind)
                stages = works(config)
                steps = [scaling.step(work, plan, hardware) for work in stages]
                rows.append(
                    [
                        f"`{name}`",
                        f"{devices}",
                        f"`{kind}`",
                        several([f"{s.reduction_bytes / 1e9:.1f}" for s in steps]),
                        several([f"{ms(s.reduction)} ({ms(s.exposed)})" for s in steps]),
                        several([gib(scaling.static_bytes(work, plan)) for work in stages]),
                        f"{sum(scaling.hours(work, plan, hardware) for work in stages):.1f}",
                    ]
                )
    header = ["recipe", "GPUs", "", "GB past a GPU, a step", "ms (exposed)", "GiB without activations", "hours"]
    return table(header, rows)


def batches_table(options: Options) -> str:
    """The most samples a GPU can take at once."""
    rows, hardware = [], options.hardware
    for size in ("B", "L", "H"):
        for checkpoint in (False, True):
            config = sized(size, checkpoint)
            cells = [size, "yes" if checkpoint else "no"]
            cells.append(several([f"{work.kept / 2**20:.0f}" for work in works(config)]))
            for decode_batch in (0, options.decode_batch or 16):
                for work in works(config):
                    plan = Plan(devices=64, decode_batch=decode_batch)
                    cells.append(f"{scaling.largest_micro_batch(work, plan, hardware)}")
            rows.append(cells)
    chunk = f"{options.decode_batch or 16} decoded at once"
    header = ["encoder", "blocks recomputed", "MiB a sample, 128 / 256 px", "128 px, all decoded at once", "256 px",
              f"128 px, {chunk}", "256 px"]  # fmt: skip
    return table(header, rows)


def options_table(options: Options) -> str:
    """What the options that spare the VAE give."""
    rows, hardware = [], options.hardware
    for name in ("paper_b16", "paper_l16"):
        config = recipe(name)
        stages = works(config)
        plain = plan_of(config, 64, options)
        before = sum(scaling.hours(work, plain, hardware) for work in stages)
        for stride in (1, 8):
            for cached in (False, True):
                plan = replace(plain, pixel_stride=stride, cached_latents=cached)
                time = sum(scaling.hours(work, plan, hardware) for work in stages)
                steps = [scaling.step(work, plan, hardware) for work in stages]
                rows.append(
                    [
                        f"`{name}`",
                        f"{stride}",
                        "yes" if cached else "no",
                        f"{time:.1f}",
                        f"{before / time:.1f}",
                        several([f"{s.convolution / s.seconds:.0%}" for s in steps]),
                        several([f"{scaling.cores(work, plan, hardware):.1f}" for work in stages]),
                    ]
                )
    header = ["recipe, 64 GPUs", "`loss.pixel_stride`", "latents cached", "hours", "times as fast", "of it the VAE",
              "cores a GPU"]  # fmt: skip
    return table(header, rows)


def limits_table(options: Options) -> str:
    """What a step at 256 GPUs is made of, and how far the recipe goes."""
    rows, hardware = [], options.hardware
    for name in ("paper_b16", "paper_l16"):
        config = recipe(name)
        for stride in (1, 8):
            for number, work in enumerate(works(config), start=1):
                plan = replace(plan_of(config, 256, options), pixel_stride=stride)
                s = scaling.step(work, plan, hardware)
                most = [str(scaling.most_devices(work, plan, hardware, least)) for least in (0.9, 0.5)]
                rows.append(
                    [
                        f"`{name}`, stage {number}",
                        f"{stride}",
                        f"{plan.local(work)}",
                        ms(s.matrix),
                        ms(s.convolution),
                        ms(s.host),
                        ms(s.optimizer),
                        ms(s.exposed + s.gathers),
                        ms(s.contrastive),
                        ms(s.seconds),
                        several(most),
                    ]  # fmt: skip
                )
    header = ["256 GPUs", "`pixel_stride`", "samples a GPU", "matrix, ms", "convolutions", "host", "optimizer",
              "network, exposed", "contrastive", "step", "GPUs at 90 / 50 % of ideal"]  # fmt: skip
    return table(header, rows)


TABLES = {
    "inputs": lambda options: inputs_table(options.hardware),
    "recipes": recipes_table,
    "devices": devices_table,
    "parallel": parallel_table,
    "batches": batches_table,
    "options": options_table,
    "limits": limits_table,
}


def main() -> None:
    """Prints all tables."""
    options = tyro.cli(Options, description=__doc__)
    found = {name: draw(options) for name, draw in TABLES.items()}
    if options.write is None:
        print("\n\n".join(f"<!-- {name} -->\n{text}" for name, text in found.items()))
    else:
        options.write.write_text(with_tables(options.write.read_text(), found))


def with_tables(document: str, tables: dict[str, str]) -> str:
    """The document with each table below its name in place of the lines of the one that is there."""
    for name, text in tables.items():
        mark = f"<!-- {name} -->\n"
        before, found, after = document.partition(mark)
        if found:
            lines = after.split("\n")
            rest = list(dropwhile(lambda line: line.startswith("|"), lines))
            document = before + mark + "\n".join([*text.split("\n"), *rest])
    return document


if __name__ == "__main__":
    main()
