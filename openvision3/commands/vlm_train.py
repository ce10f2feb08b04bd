"""`ov3 vlm train`: LLaVA's two stages on a frozen encoder."""

import json
from typing import TYPE_CHECKING

from openvision3.config import to_dict

if TYPE_CHECKING:
    from openvision3.vlm.config import VLMTrainConfig


def train(args: list[str]) -> int:
    """Trains the recipe that `args` begins with; the same command run again resumes. Returns the exit code."""
    from openvision3.commands.train import chosen_recipe, resolve, run_to_end
    from openvision3.vlm.recipes import VLM_RECIPES

    recipe = chosen_recipe("ov3 vlm train", VLM_RECIPES, args)
    if isinstance(recipe, int):
        return recipe
    run = resolve(recipe, args[1:], f"ov3 vlm train {args[0]}")
    if run.dry_run:
        print(_dry_run(run.config))
        return 0
    from openvision3.vlm.train import train as train_vlm

    return run_to_end(lambda: train_vlm(run.config, run.device) / "model")


def _dry_run(config: "VLMTrainConfig") -> str:
    """The resolved recipe; nothing is fetched or written."""
    from openvision3.vlm.config import validate

    validate(config)
    lines = [json.dumps(to_dict(config), indent=2), ""]
    for name, stage in (("stage1", config.stage1), ("stage2", config.stage2)):
        what = "projector and language model" if stage.language_model else "projector"
        if stage.lora.rank:
            what = f"projector and LoRA of rank {stage.lora.rank}"
        length = (
            f"{-(-stage.samples // stage.batch_size):,} steps" if stage.samples else "all of its data once, in steps"
        )
        lines.append(f"{name}: {what}; {length} of {stage.batch_size} conversations of {stage.data.source}")
    return "\n".join(lines)
