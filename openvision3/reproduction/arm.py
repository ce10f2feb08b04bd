"""One arm in a process of its own: `python -m openvision3.reproduction.arm FOLDER KIND DEVICE` trains and measures it.

FOLDER/arm.json is the arm's recipe. FOLDER/result.json, written at the end, is all that tables and curves are made of.
"""

import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openvision3.config import OpenVisionError, TrainConfig, load_json
from openvision3.data.demo import BENCHMARK
from openvision3.files import whole_file
from openvision3.model.openvision3 import OpenVision3
from openvision3.reproduction.arms import ClassifierRecipe, GenerationRecipe, QuestionsRecipe
from openvision3.training.loop import train
from openvision3.training.monitor import read_records
from openvision3.training.run_folder import RunInterrupted
from openvision3.training.stages import plan

PARTS = ("reconstruction", "zeroshot", "retrieval")
RECIPE, RESULT = "arm.json", "result.json"


def run_arm(folder: Path, kind: str, device: str = "cpu") -> None:
    """Trains the recipe in `folder/arm.json`, or goes on, and writes `folder/result.json`; drops the checkpoints then.

    Raises what the training of its kind raises.
    """
    started = time.monotonic()
    if kind == "encoder":
        found = run_encoder(load_json(TrainConfig, folder / RECIPE), folder, device)
    elif kind == "generation":
        from openvision3.reproduction.generation import run_generation

        found = run_generation(load_json(GenerationRecipe, folder / RECIPE), folder, device)
    elif kind == "questions":
        from openvision3.reproduction.questions import run_questions

        found = run_questions(load_json(QuestionsRecipe, folder / RECIPE), folder, device)
    elif kind == "classifier":
        from openvision3.reproduction.generation import run_classifier

        found = run_classifier(load_json(ClassifierRecipe, folder / RECIPE), folder)
    else:
        raise OpenVisionError(f"there is no kind of arm {kind!r}")
    # of this process: an arm that was resumed took longer
    result = {"config": json.loads((folder / RECIPE).read_text())} | found
    result["seconds"] = round(time.monotonic() - started, 1)
    if (folder / "environment.json").exists():
        result["environment"] = json.loads((folder / "environment.json").read_text())
    with whole_file(folder / RESULT) as path:
        path.write_text(json.dumps(result, indent=1) + "\n")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def run_encoder(config: TrainConfig, folder: Path, device: str) -> dict[str, Any]:
    """Trains an encoder and measures it on scenes of the held-out split; its held-out losses on the way beside that."""
    last = plan(config)[-1].last_step

    def evaluate(model: OpenVision3, step: int) -> Mapping[str, float]:
        return final_figures(config, model) if step == last else {}

    train(config, device, evaluate)
    records = folder / "metrics.jsonl"
    return {
        "figures": next(row for row in reversed(read_records(records, "eval")) if row["step"] == last),
        "meter": read_records(records, "meter"),
        "samples_per_second": median_rate(records),
    }


def median_rate(records: Path) -> float:
    """Samples a second in the middle of a training's records."""
    rates = sorted(row["samples_per_second"] for row in read_records(records))
    return rates[len(rates) // 2]


def final_figures(config: TrainConfig, model: OpenVision3) -> dict[str, float]:
    """Reconstruction, zero-shot and retrieval on the benchmark's split, of the arm's own scenes and resolution."""
    from openvision3.evaluation.evaluate import evaluate_all, flat_figures
    from openvision3.evaluation.fidelity import load_effnet_lite0

    size, scenes, network = config.stage1.resolution, config.data.scenes, load_effnet_lite0(model.device)
    figures = evaluate_all(
        model, BENCHMARK, PARTS, config.eval_samples, size=size, scenes=scenes, landscapes=False, network=network
    )
    return flat_figures(figures)


def main(arguments: list[str]) -> int:
    """Exit codes: 0, 2 with one line on stderr, or 128 + the signal that stopped a training, with all saved."""
    from openvision3.cli import complain, describe

    try:
        run_arm(Path(arguments[0]), arguments[1], arguments[2])
    except RunInterrupted as stop:
        return 128 + stop.signal_number
    except Exception as error:
        return complain(describe(error))
    return 0


def finished(folder: Path) -> dict[str, Any] | None:
    """The result of an arm that is done, or None."""
    path = folder / RESULT
    return json.loads(path.read_text()) if path.exists() else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
