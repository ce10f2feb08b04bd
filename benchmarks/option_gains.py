"""Prints what each training option gains by itself: our training step with it against the same step without.

    python benchmarks/option_gains.py [--recipe paper_b16] [--resolution 128] [--batch-size 4] [--rounds 3]
        [--options pack_text vae_batch ...] [--pixel-stride 8] [--set FIELD=VALUE ...] [--device auto] [--json F]

The step without is the recipe's, with padding left in the texts, the whole batch in the VAE at once, nothing compiled
or recomputed, no cached latents, and all pictures decoded; each pair differs from each other in one option alone, and
starts from the same weights and batch (seed 0, random texts of Recap-DataComp's lengths; a diffusers VAE of FLUX.1's
size with random weights). The two have a process each and take steps in turns, after one that warms up. On a CPU the
ratio is of processor time, which other work on the machine does not enter. Memory is the peak of a step above the
process at rest, without parameters, gradients, optimizer state and frozen weights.
"""

import argparse
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from openvision3.bench.compare import Figures, start_worker
from openvision3.bench.timing import Spread, machine
from openvision3.bench.train_step import Case, SideKind, make_case, save_random_vae
from openvision3.commands.bench_train import BenchTrain, chosen_recipe, gib
from openvision3.config import OpenVisionError

OPTIONS = ("pack_text", "vae_batch", "compile", "checkpoint_blocks", "latents", "pixel_stride")


@dataclass(frozen=True)
class Gain:
    """A step with an option, against one without."""

    option: str
    ratio: Spread  # the time without over the time with, round by round
    seconds: tuple[Spread, Spread]  # without, with
    memory: tuple[int | None, int | None]  # bytes beside the static ones

    def row(self) -> str:
        """A line of the table."""
        without, with_option = self.seconds
        return f"| `{self.option}` | {without} | {with_option} | {self.ratio} | {gib(self.memory[0])} | " + (
            f"{gib(self.memory[1])} |"
        )


def main() -> None:
    """Times the options one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="paper_b16")
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--options", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--pixel-stride", type=int, default=8)
    parser.add_argument("--set", nargs="+", default=[])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.rounds < 1:
        raise OpenVisionError(f"--rounds {options.rounds}: expected at least 1")
    recipe = chosen_recipe(BenchTrain(recipe=options.recipe, set=tuple(options.set)))
    with tempfile.TemporaryDirectory(prefix="ov3-bench-") as folder:
        vae = Path(folder) if recipe.model.vae.kind == "diffusers" else None
        case = make_case(recipe, options.resolution, options.batch_size, vae=vae, device=options.device)
        if vae is not None:
            save_random_vae(vae, case.config.seed)
        print(
            f"{options.recipe}, {options.resolution} px, batch {options.batch_size}, {case.precision}, seed 0; ", end=""
        )
        print(f"{machine(torch.device(case.device))}; seconds of {clock(case)} a step, GiB beside the static bytes\n")
        print(
            "| option | without, s | with, s | without takes x | without, GiB | with, GiB |\n|---|---|---|---|---|---|"
        )
        found = []
        for option in options.options:
            found.append(measure(case, option, options.pixel_stride, options.rounds))
            print(found[-1].row(), flush=True)
            if options.json:
                options.json.write_text(json.dumps([to_json(gain) for gain in found], indent=2) + "\n")


def clock(case: Case) -> str:
    """What the times are of."""
    return "processor time" if case.device == "cpu" else "time"


def plain(case: Case) -> Case:
    """The case with every option off."""
    off: dict[str, Any] = {"pack_text": False, "vae_batch": case.batch_size, "compile": False}
    return replace(case, config=replace(case.config, **off), pixel_stride=1)


def with_option(case: Case, option: str, pixel_stride: int) -> tuple[Case, SideKind]:
    """A plain case with one option on, and its side."""
    config, loss = case.config, case.config.loss
    on: dict[str, Any] = {
        "pack_text": {"pack_text": True},
        "vae_batch": {"vae_batch": 0},
        "compile": {"compile": True},
        "checkpoint_blocks": {"checkpoint_blocks": True},
        "pixel_stride": {"loss": replace(loss, pixel_stride=pixel_stride)},
        "latents": {},
    }
    return replace(case, config=replace(config, **on[option])), SideKind(option, False, fast=option == "latents")


def measure(case: Case, option: str, pixel_stride: int, rounds: int) -> Gain:
    """Steps without and with the option, in turns."""
    case = plain(case)
    sides = (case, SideKind(f"without {option}", False)), with_option(case, option, pixel_stride)
    figures = tuple(Figures(kind) for _, kind in sides)
    with start_worker(*sides[0]) as without, start_worker(*sides[1]) as with_it:
        for number in range(rounds + 1):
            for worker, side in zip((without, with_it), figures, strict=True):
                turn = worker.turn()
                side.static = turn["static"]
                if number:
                    side.add({**turn, "seconds": turn["processor" if case.device == "cpu" else "seconds"]})
    a, b = figures
    ratio = Spread.of([x / y for x, y in zip(a.seconds, b.seconds, strict=True)])
    return Gain(option, ratio, (Spread.of(a.seconds), Spread.of(b.seconds)), (a.activations, b.activations))


def to_json(gain: Gain) -> dict[str, Any]:
    """Its figures."""
    without, with_it = gain.seconds
    return {
        "option": gain.option,
        "ratio": vars(gain.ratio),
        "seconds": {"without": without.values, "with": with_it.values},
        "bytes": {"without": gain.memory[0], "with": gain.memory[1]},
    }


if __name__ == "__main__":
    main()
