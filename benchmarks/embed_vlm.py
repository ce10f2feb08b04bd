"""Makes the embedded demo VLM, openvision3/weights/demo_vlm, from a run of `ov3 vlm train demo`.

    python benchmarks/embed_vlm.py runs/vlm_demo [--figures seen.json blind.json]

Copies the adapter (projector and low-rank updates, fp16) and the run's records, and writes a card. `--figures`: what
`ov3 vlm eval demo --json` wrote of the embedded one, with pictures and `--blind`, so that it is run after this, and
this once more.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from openvision3.training.monitor import read_records
from openvision3.vlm.folder import DEMO_FOLDER
from openvision3.vlm.lora import DESCRIPTION, WEIGHTS

STAGES = ("words", "stage1", "stage2")
CARD = """# The demo VLM

Answers questions about the demo's scenes: SmolLM2-135M-Instruct (fetched, 145 MB) on the embedded demo model's tokens,
through the projector and the low-rank updates in this folder.

**It knows {names} drawn things on landscapes and the questions that scenes-vqa asks, and nothing else; its answers on
photographs mean nothing.**

| | |
|---|---|
| made by | `ov3 vlm train {recipe}`, seed {seed}: {lengths} |
| machine | {machine} |
| licence | MIT; SmolLM2's is Apache-2.0 |
{figures}"""


def row(name: str, seen: dict[str, Any], blind: dict[str, Any]) -> str:
    """One kind of question."""
    low, high = seen["interval"]
    return (
        f"| {name} | {seen['accuracy']:.1%} ({low:.1%} to {high:.1%}) | {blind['accuracy']:.1%} "
        f"| {100 * (seen['accuracy'] - blind['accuracy']):+.1f} |"
    )


def table(seen: dict[str, Any], blind: dict[str, Any]) -> str:
    """Accuracy with pictures and with grey in their place."""
    lines = [
        f"\n`ov3 vlm eval demo --num {seen['num']}`, and `--blind` (grey in every picture's place):\n",
        "| question | accuracy (95 %) | blind | difference, points |",
        "|---|---|---|---|",
    ]
    lines += [row(f"presence, {k} negatives", seen["presence"][k], blind["presence"][k]) for k in seen["presence"]]
    lines += [row(kind, seen[kind], blind[kind]) for kind in ("relation", "count", "scene")]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--figures", type=Path, nargs=2, metavar=("SEEN", "BLIND"))
    options = parser.parse_args()
    run: Path = options.run
    config = json.loads((run / "config.json").read_text())
    environment = json.loads((run / "environment.json").read_text())
    DEMO_FOLDER.mkdir(exist_ok=True)
    for name in (WEIGHTS, DESCRIPTION):
        shutil.copyfile(run / "adapter" / name, DEMO_FOLDER / name)
    for stage in STAGES:
        records = run / stage / "metrics.jsonl"
        kept = read_records(records) + read_records(records, "eval")
        text = "".join(json.dumps(record) + "\n" for record in kept)
        (DEMO_FOLDER / f"{stage}.jsonl").write_text(text)
    figures = table(*(json.loads(path.read_text()) for path in options.figures)) if options.figures else ""
    lengths = (
        f"{config['words']['samples']:,} captions for words, {config['stage1']['samples']:,} for the projector, "
        f"{config['stage2']['samples']:,} scenes with questions"
    )
    names = config["stage2"]["data"]["scenes"]["num_names"]
    card = CARD.format(
        names=names,
        recipe=config["recipe"].removeprefix("vlm_"),
        seed=config["seed"],
        lengths=lengths,
        machine=f"{environment['processors']} processors, {environment['platform']}, torch "
        f"{environment['packages']['torch']}",
        figures=figures,
    )
    (DEMO_FOLDER / "README.md").write_text(card)
    if options.figures:
        seen, blind = (
            {k: v for k, v in json.loads(p.read_text()).items() if k != "questions"} for p in options.figures
        )
        (DEMO_FOLDER / "figures.json").write_text(json.dumps({"seen": seen, "blind": blind}, indent=2) + "\n")


if __name__ == "__main__":
    main()
