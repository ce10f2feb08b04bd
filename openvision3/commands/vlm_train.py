"""`ov3 vlm train`: LLaVA's two stages on a frozen encoder."""

import json
import os
import signal
import sys
from typing import TYPE_CHECKING

from openvision3.config import OpenVisionError, to_dict

if TYPE_CHECKING:
    from openvision3.vlm.config import VLMTrainConfig


def train(args: list[str]) -> int:
    """Trains the recipe that `args` begins with; the same command run again resumes. Returns the exit code."""
    from openvision3.commands.train import misspelt_recipe, resolve
    from openvision3.vlm.recipes import VLM_RECIPES

    if not args or args[0] in ("-h", "--help"):
        print(recipe_list())
        return 0 if args else 2
    if args[0] not in VLM_RECIPES:
        raise OpenVisionError(misspelt_recipe(args[0], list(VLM_RECIPES)))
    run = resolve(VLM_RECIPES[args[0]](), args[1:], f"ov3 vlm train {args[0]}")
    if run.dry_run:
        print(_dry_run(run.config))
        return 0
    from openvision3.training.run_folder import RunInterrupted
    from openvision3.vlm.train import train as train_vlm

    speaks = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts
    try:
        folder = train_vlm(run.config, run.device)
    except RunInterrupted as stop:
        if speaks:
            print(f"ov3: {stop}", file=sys.stderr)
        return 128 + signal.SIGINT if stop.signal_number == signal.SIGINT else 0
    if speaks:
        print(folder / "model")
    return 0


def recipe_list() -> str:
    """The recipes with the first line of their docstrings."""
    from openvision3.vlm.recipes import VLM_RECIPES

    width = max(map(len, VLM_RECIPES))
    lines = ["usage: ov3 vlm train RECIPE [--field.sub value] [--device auto] [--dry-run]", ""]
    lines += [
        f"  {name:<{width}}  {(make.__doc__ or '').strip().partition(chr(10))[0]}" for name, make in VLM_RECIPES.items()
    ]
    return "\n".join([*lines, "", "ov3 vlm train RECIPE --help lists its fields."])


def _dry_run(config: "VLMTrainConfig") -> str:
    """The resolved recipe; nothing is fetched or written."""
    from openvision3.vlm.config import validate

    validate(config)
    lines = [json.dumps(to_dict(config), indent=2), ""]
    for name, stage in (("stage1", config.stage1), ("stage2", config.stage2)):
        what = "projector and language model" if stage.language_model else "projector"
        if stage.language_model and stage.lora is not None:
            what = f"projector and LoRA of rank {stage.lora.rank}"
        length = (
            f"{-(-stage.samples // stage.batch_size):,} steps" if stage.samples else "all of its data once, in steps"
        )
        lines.append(f"{name}: {what}; {length} of {stage.batch_size} conversations of {stage.data.source}")
    return "\n".join(lines)
