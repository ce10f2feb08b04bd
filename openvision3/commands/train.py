"""`ov3 train RECIPE [--field.sub value]`: a recipe's config, changed field by field, handed to the training loop."""

import dataclasses
import difflib
import os
import re
import signal
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar

import tyro

from openvision3.config import DistillConfig, OpenVisionError, RunConfig, TrainConfig, VAETrainConfig

if TYPE_CHECKING:
    from openvision3.model.openvision3 import OpenVision3
    from openvision3.training.loop import Evaluate

Config = TypeVar("Config")
_INIT = re.compile(r"^--init[-_]from(?=$|=)")  # another name of --init


@dataclass(frozen=True)
class Run(Generic[Config]):
    """The recipe's fields, where it runs, and whether it only says what it would do."""

    config: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    device: str = "auto"  # auto: cuda, then mps, then cpu
    # print the resolved recipe and stop; nothing is fetched but a hub id's --init
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


def train(args: list[str]) -> int:
    """Trains the recipe that `args` begins with; the same command run again resumes. Returns the exit code."""
    from openvision3.recipes import RECIPES

    recipe = chosen_recipe("ov3 train", RECIPES, args)
    if isinstance(recipe, int):
        return recipe
    prog = f"ov3 train {args[0]}"
    run = resolve(recipe, args[1:], prog)
    if isinstance(run.config, TrainConfig) and isinstance(recipe, TrainConfig) and run.config.attach:
        from openvision3.training.attach import SETTLES, attached

        chosen = {name: getattr(run.config, name) for name in SETTLES}
        run = resolve(attached(dataclasses.replace(recipe, **chosen)), args[1:], prog)  # the other fields go on top
    return run_train(run.config, run.device, run.dry_run)


def misspelt_recipe(name: str, recipes: Sequence[str]) -> str:
    """One line about a recipe that there is not, with the nearest."""
    near = difflib.get_close_matches(name, recipes, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(recipes)}"
    return f"there is no recipe {name!r}; {hint}"


def run_train(config: RunConfig, device: str = "auto", dry_run: bool = False) -> int:
    """Trains a resolved recipe in its run folder (or resumes it there) and prints the folder; or only describes it.

    Returns the exit code, as `run_to_end` does.
    """
    if dry_run:
        from openvision3.training import dryrun

        print(dryrun.dry_run(config, device))
        return 0
    if isinstance(config, TrainConfig):
        from openvision3.training.loop import train as train_encoder

        return run_to_end(lambda: train_encoder(config, device, evaluator(config)))
    return run_to_end(lambda: _train_alone(config, device))


def _train_alone(config: VAETrainConfig | DistillConfig, device: str) -> Path:
    """Runs a recipe that trains in one process; a fast front is measured at the end."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise OpenVisionError(f"recipe {config.recipe} trains in one process: start it without torchrun")
    if isinstance(config, VAETrainConfig):
        from openvision3.training.vae_training import train_vae

        return train_vae(config, device)
    from openvision3.commands.front import measure
    from openvision3.training.distill import distill, evaluation_source

    folder = distill(config, device)
    if source := evaluation_source(config):
        measure(config.init, folder, device, source, config.resolution, json=folder.parent / "front.json")
    return folder


def evaluator(config: TrainConfig) -> "Evaluate | None":
    """What a run evaluates on the way, at the resolution of its stage: held-out demo scenes, or `config.eval_source`.

    None where there is nothing to evaluate on: training on tars without `eval_source`.
    """
    from openvision3.data.demo import BENCHMARK
    from openvision3.training.stages import plan

    source = config.eval_source or (BENCHMARK if config.data.sources == ("demo",) else "")
    if not source or config.eval_samples == 0:
        return None
    stages = plan(config)

    def evaluate(model: "OpenVision3", step: int) -> dict[str, float]:
        from openvision3.evaluation.evaluate import evaluate_all, flat_figures

        (size,) = {stage.config.resolution for stage in stages if stage.first_step < step <= stage.last_step}
        parts = ("reconstruction", "zeroshot", "retrieval", "captioning")
        scenes = config.data.scenes if config.data.sources == ("demo",) else None
        figures = evaluate_all(model, source, parts, config.eval_samples, size=size, scenes=scenes, landscapes=False)
        return flat_figures(figures)

    return evaluate


def recipe_list(command: str, recipes: Mapping[str, Callable[[], Any]]) -> str:
    """The recipes of a command ("ov3 train") with the first line of their docstrings."""
    width = max(map(len, recipes))
    lines = [f"usage: {command} RECIPE [--field.sub value] [--device auto] [--dry-run]", ""]
    lines += [
        f"  {name:<{width}}  {(make.__doc__ or '').strip().partition(chr(10))[0]}" for name, make in recipes.items()
    ]
    return "\n".join([*lines, "", f"{command} RECIPE --help lists its fields."])


def chosen_recipe(command: str, recipes: Mapping[str, Callable[[], Config]], args: list[str]) -> "Config | int":
    """The recipe that `args` begins with; or, where they ask for help or for nothing, the exit code after the list.

    Raises `OpenVisionError` for a recipe that there is not.
    """
    if not args or args[0] in ("-h", "--help"):
        print(recipe_list(command, recipes))
        return 0 if args else 2
    if args[0] not in recipes:
        raise OpenVisionError(misspelt_recipe(args[0], list(recipes)))
    return recipes[args[0]]()


def run_to_end(train: Callable[[], Path]) -> int:
    """Trains, and prints the folder that results; of the processes that torchrun starts the first alone speaks.

    Returns the exit code: 0, also where SIGTERM or SIGUSR1 stopped the run, with all saved, as a scheduler's way to
    interrupt it; 130 after SIGINT.
    """
    from openvision3.training.run_folder import RunInterrupted

    speaks = os.environ.get("RANK", "0") == "0"
    try:
        folder = train()
    except RunInterrupted as stop:
        if speaks:
            print(f"ov3: {stop}", file=sys.stderr)
        return 128 + signal.SIGINT if stop.signal_number == signal.SIGINT else 0
    if speaks:
        print(folder)
    return 0


def resolve(config: Config, args: Sequence[str], prog: str = "ov3 train") -> "Run[Config]":
    """The recipe's config with the command line's fields in place of its own.

    `--model.decoder none` leaves out a part that may be absent. Raises `OpenVisionError` that names a misspelt field
    with the nearest right one; exits with 2 where a value has the wrong type.
    """
    config, rest = _without_parts(config, [_INIT.sub("--init", arg) for arg in args])
    run, unknown = tyro.cli(
        Run[type(config)],
        default=Run(config),
        args=rest,
        prog=prog,
        description="Fields of the recipe, with their values there as defaults.",
        config=(tyro.conf.AvoidSubcommands,),
        return_unknown_args=True,
    )
    if unknown:
        raise OpenVisionError(misspelt(unknown[0], [name for name, _ in leaves(type(config))]))
    return run


def misspelt(argument: str, fields: Sequence[str]) -> str:
    """One line about an argument that is no field, with the nearest field."""
    if not argument.startswith("--"):
        return f"unexpected argument {argument!r}; fields are given as --field.sub value"
    wanted = argument[2:].split("=")[0].replace("-", "_")
    if wanted in fields:
        return f"--{wanted} belongs to a part that this recipe leaves out"
    near = [field for field in fields if field.split(".")[-1] == wanted]  # --batch_size for --stage1.batch_size
    near = near or difflib.get_close_matches(wanted, [*fields, "device", "dry_run"], n=1)
    hint = f"did you mean --{near[0]}?" if near else "see --help for the recipe's fields"
    return f"there is no field --{wanted}; {hint}"


def leaves(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, type) of every field below a config class; of optional parts also the part itself."""
    for name, kind in typing.get_type_hints(cls).items():
        inner, optional = _optional(kind)
        if dataclasses.is_dataclass(inner):
            assert isinstance(inner, type)
            if optional:
                yield f"{prefix}{name}", kind
            yield from leaves(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", kind


def _optional(kind: Any) -> tuple[Any, bool]:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        inner = [arg for arg in typing.get_args(kind) if arg is not type(None)]
        return inner[0], len(inner) < len(typing.get_args(kind))
    return kind, False


def _without_parts(config: Config, args: list[str]) -> tuple[Config, list[str]]:
    """Takes `--part none` out of `args` for the parts that may be absent, and the parts out of the config."""
    parts = [name for name, kind in leaves(type(config)) if dataclasses.is_dataclass(_optional(kind)[0])]
    for part in parts:
        for i in range(len(args) - 1):
            if args[i].replace("-", "_") == f"__{part}" and args[i + 1].lower() == "none":
                config, args = _replaced(config, part.split("."), None), args[:i] + args[i + 2 :]
                break
    return config, args


def _replaced(config: Any, path: Sequence[str], value: Any) -> Any:
    if len(path) > 1:
        value = _replaced(getattr(config, path[0]), path[1:], value)
    return dataclasses.replace(config, **{path[0]: value})
