"""`ov3 bench train`: the training step against the same composed from public parts."""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from openvision3.commands import common
from openvision3.config import OpenVisionError, TrainConfig, from_dict, to_dict

if TYPE_CHECKING:
    from openvision3.bench.compare import Comparison, Figures
    from openvision3.bench.train_step import Case


@dataclass(frozen=True)
class BenchTrain:
    """What is measured."""

    recipe: str = "paper_b16"  # its model, losses and optimizer; a diffusers VAE has FLUX.1's size and random weights
    resolution: tuple[int, ...] = (128, 256)  # pixels; LPIPS as the recipe's stage of that resolution has it
    batch_size: tuple[int, ...] = (4, 2)  # samples of a step: one number, or one for each resolution
    rounds: int = 5  # timed steps of each side, in turns
    text: Literal["recap", "full"] = "recap"  # lengths of texts: Recap-DataComp's, or all positions used
    pixel_stride: int = 8  # sides with the speed options decode every n-th picture of the batch
    peer: Literal["best", "eager", "compiled"] = "best"  # of eager and compiled, the faster, or one of them alone
    precision: Literal["bf16", "fp32"] = "bf16"
    device: str = "auto"
    seed: int = 0
    memory: bool = False  # memory alone, of the eager peer and of ours, one after the other
    set: tuple[str, ...] = ()  # fields of the recipe to change, such as compile=false
    json: Path | None = None  # also write the figures to this file
    overwrite: bool = False  # replace it where it exists


DEFAULTS = BenchTrain()
Options = Annotated[BenchTrain, tyro.conf.arg(name=""), tyro.conf.FlagCreatePairsOff]


def bench_train(options: Options = DEFAULTS) -> int:
    """The training step against the same composed of diffusers, open_clip and lpips: time, memory, FLOP/s.

    Every side has its own process; they take turns, and their losses and gradients must agree. Needs openvision3[eval].
    """
    common.refuse_existing(options.json, options.overwrite)
    sizes = options.batch_size * (len(options.resolution) if len(options.batch_size) == 1 else 1)
    if len(sizes) != len(options.resolution) or not sizes:
        raise OpenVisionError("--batch-size: expected one number, or one for each --resolution")
    if options.rounds < 1:
        raise OpenVisionError(f"--rounds {options.rounds}: expected at least 1")
    recipe = chosen_recipe(options)

    from openvision3.bench.compare import compare, compare_memory
    from openvision3.bench.peer import check_supported
    from openvision3.bench.train_step import PEER, PEER_COMPILED, make_case, save_random_vae

    check_supported(recipe.model)
    peers = {"best": (PEER, PEER_COMPILED), "eager": (PEER,), "compiled": (PEER_COMPILED,)}[options.peer]
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="ov3-bench-") as folder:
        vae = Path(folder) if recipe.model.vae.kind == "diffusers" else None
        cases = [
            make_case(
                recipe,
                resolution,
                size,
                vae=vae,
                pixel_stride=options.pixel_stride,
                texts=options.text,
                precision=options.precision,
                device=options.device,
                seed=options.seed,
            )
            for resolution, size in zip(options.resolution, sizes, strict=True)
        ]
        if vae is not None:
            save_random_vae(vae, options.seed)
        for case in cases:
            if options.memory:
                found.append(print_memory(case, compare_memory(case, say=say)))
            else:
                comparison = compare(case, options.rounds, peers, say)
                print_comparison(comparison)
                found.append(comparison.to_json())
    common.write_json(options.json, found, options.overwrite)
    return 0


def say(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)


def chosen_recipe(options: BenchTrain) -> TrainConfig:
    """The recipe with its changed fields; raises `OpenVisionError` for names or values that are not right."""
    from openvision3.recipes import RECIPES

    if options.recipe not in RECIPES:
        raise OpenVisionError(f"there is no recipe {options.recipe!r}; there are {', '.join(RECIPES)}")
    recipe = RECIPES[options.recipe]()
    if not isinstance(recipe, TrainConfig) or recipe.freeze:
        raise OpenVisionError(f"recipe {options.recipe!r} does not train a whole model")
    fields: dict[str, Any] = to_dict(recipe)
    for change in options.set:
        name, equals, value = change.partition("=")
        place, *path = fields, *name.split(".")
        for part in path[:-1]:
            place = place.get(part) if isinstance(place, dict) else None
        if not equals or not isinstance(place, dict):
            raise OpenVisionError(f"--set {change}: expected FIELD=VALUE, such as compile=false")
        try:
            place[path[-1]] = json.loads(value)
        except ValueError:
            place[path[-1]] = value  # a word
    return from_dict(TrainConfig, fields, "recipe")


def print_comparison(found: "Comparison") -> None:
    """The table of one case."""
    from openvision3.bench.timing import Spread

    case, figures = found.case, found.to_json()
    rows: list[list[str]] = []
    for name, side in found.sides.items():
        seconds, rate = Spread.of(side.seconds), found.flops_per_second(name)
        of_limits = " ".join(f"{share:.0%}" for share in found.of_limits(name).values())
        against = found.ratios.get((found.best_peer.name, name))
        rows.append(
            [
                name,
                str(seconds),
                f"{case.batch_size / seconds.median:.3g}",
                str(against) if against else "",
                f"{rate / 1e9:.0f}",
                of_limits,
                gib(side.peak),
                gib(sum(side.static.values())),
                gib(side.activations),
            ]
        )
    limits = ", ".join(f"{name} {limit.median / 1e9:.0f} GFLOP/s" for name, limit in found.limits.items())
    lpips = case.stage().config.lpips_weight
    common.print_table(
        f"{case.config.recipe}, {case.resolution} px, batch {case.batch_size}, {case.precision}, texts {case.texts}, "
        f"LPIPS {case.config.loss.lpips_net if lpips else 'none'}; {figures['machine']}",
        ["side", "s a step", "samples/s", "peer takes x", "GFLOP/s", "of limits", "peak GiB", "static", "the rest"],
        rows,
    )
    print(
        f"limits of this run: {limits} (the columns' order); GFLOPs of a step: "
        f"{sum(found.flops[False].values()) / 1e9:.0f}, with the speed options "
        f"{sum(found.flops[True].values()) / 1e9:.0f}"
    )
    for (slower, faster), ratio in found.ratios.items():
        print(f"{slower} takes {ratio} times as long as {faster}")
    for note in found.notes:
        print(f"note: {note}")
    print(f"the peer of the ratios: {found.best_peer.name}; seed {case.config.seed}")


def print_memory(case: "Case", sides: "dict[str, Figures]") -> dict[str, Any]:
    """The table of one case's memory; its figures."""
    import torch

    from openvision3.bench.timing import machine

    peer = next(iter(sides.values())).activations
    rows = []
    for name, side in sides.items():
        share = f"{side.activations / peer:.2f}" if peer and side.activations is not None else ""
        rows.append([name, gib(side.peak), gib(sum(side.static.values())), gib(side.activations), share])
    common.print_table(
        f"{case.config.recipe}, {case.resolution} px, batch {case.batch_size}, {case.precision}, texts {case.texts}, "
        f"seed {case.config.seed}; {machine(torch.device(case.device))}",
        ["side", "peak GiB", "static", "the rest", "of the peer's"],
        rows,
    )
    return {
        "recipe": case.config.recipe,
        "resolution": case.resolution,
        "batch_size": case.batch_size,
        "sides": {
            name: {"peak_bytes": side.peak, "static_bytes": side.static, "activation_bytes": side.activations}
            for name, side in sides.items()
        },
    }


def gib(count: int | None) -> str:
    """Bytes in GiB; empty where they are not known."""
    return "" if count is None else f"{count / 2**30:.2f}"
