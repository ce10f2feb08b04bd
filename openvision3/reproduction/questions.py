"""A language model that looks through a finished encoder, and what it answers about held-out scenes."""

import json
import shutil
from pathlib import Path
from typing import Any

from openvision3.files import whole_file
from openvision3.reproduction.arm import median_rate
from openvision3.reproduction.arms import QuestionsRecipe
from openvision3.training.precision import resolve_device
from openvision3.vlm.folder import load_vlm
from openvision3.vlm.lora import DESCRIPTION
from openvision3.vlm.scenes_questions import ask_all
from openvision3.vlm.scenes_vqa import scenes_vqa, wilson
from openvision3.vlm.train import train

ANSWERS = {False: "answers.json", True: "blind.json"}  # every question, as `ov3 vlm eval --json` has them


def run_questions(recipe: QuestionsRecipe, folder: Path, device: str) -> dict[str, Any]:
    """Trains both stages, asks what `ov3 vlm eval` asks, seeing and blind; drops the merged model, keeps the adapter.

    The adapter and the projector, in fp16, are what is asked: they are what is kept.
    """
    adapter = folder / "adapter"
    if not (adapter / DESCRIPTION).exists():
        train(recipe.train, device)
    shutil.rmtree(folder / "model", ignore_errors=True)
    vlm = load_vlm(str(adapter), resolve_device(device))
    captions = [question for question in ask_all(recipe.asked, recipe.scenes) if question.kind == "caption"]
    things = sum(len(question.scene.things) for question in captions)
    figures: dict[str, Any] = {}
    for blind, name in ANSWERS.items():
        if not (folder / name).exists():
            found = scenes_vqa(vlm, recipe.asked, blind, config=recipe.scenes)
            with whole_file(folder / name) as path:
                path.write_text(json.dumps(found, indent=1) + "\n")
        figures |= flat(json.loads((folder / name).read_text()), "blind" if blind else "questions", things)
    return {"figures": figures, "samples_per_second": median_rate(folder / "stage2" / "metrics.jsonl")}


def flat(found: dict[str, Any], prefix: str, things: int) -> dict[str, Any]:
    """The accuracies of an evaluation with their intervals, as prefix/KIND; `things`: those that captions should name.

    "prefix/things" is the part of them that captions name.
    """
    parts = {f"presence, {kind}": part for kind, part in found["presence"].items()}
    parts |= {kind: found[kind] for kind in ("relation", "count", "scene", "caption")}
    figures: dict[str, Any] = {f"{prefix}/{kind}": part["accuracy"] for kind, part in parts.items()}
    figures |= {f"{prefix}/{kind}, interval": part["interval"] for kind, part in parts.items()}
    recall = found["caption"]["recall"]
    figures |= {f"{prefix}/things": recall, f"{prefix}/things, interval": wilson(round(recall * things), things)}
    figures[f"{prefix}/errors"] = found["errors"]["number"]
    return figures
