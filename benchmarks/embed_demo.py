"""Makes the embedded demo model, openvision3/weights/demo, from a finished run of `ov3 train demo`.

    python benchmarks/embed_demo.py runs/demo

Writes the weights in fp16 (the embedded VAE is named, not packed), the run's metrics.jsonl, the figures that the stored
weights reach (figures.json, measured here, minutes), a model card made from them, and docs/demo.png.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from demo_figures import draw_first, markdown, measure

import openvision3
from openvision3.hub.load import DEMO_FOLDER
from openvision3.training.monitor import read_records

PICTURE = Path(__file__).parents[1] / "docs" / "demo.png"
CARD = """# The demo model

The model that `openvision3` embeds, to try every command without a download: {parameters:.1f} M parameters in fp16
(encoder, reconstruction decoder, text encoder, caption decoder) on the embedded tiny VAE, trained at {size} px.

**It knows 494 drawn things (fruit, animals, tools ...) on landscapes, and the words for them; not photographs in
general, and no other words.**

| | |
|---|---|
| made by | `{command}`, seed {seed}: {samples:,} rendered scenes, {hours:.1f} hours |
| machine | {machine} |
| recipe, and what was tried | docs/RECIPE.md of the project |
| measured by | `python benchmarks/demo_figures.py`, on pictures never trained on (`figures.json`) |
| licence | MIT |

{table}

Limits: small things and pictures of three or more are named less well; what is not one of the 494 things is called by
one of their names; at sizes above {size} px reconstructions lose more against the VAE. `metrics.jsonl` is the
log of the run.
"""


def main(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    environment = json.loads((run / "environment.json").read_text())
    model = openvision3.load(run / "model", device="cpu")
    model.save(DEMO_FOLDER, overwrite=True, dtype=torch.float16, pack_vae=False)
    shutil.copyfile(run / "metrics.jsonl", DEMO_FOLDER / "metrics.jsonl")

    stored = openvision3.load("demo", device="cpu")
    figures = measure(stored)
    (DEMO_FOLDER / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    draw_first(stored, PICTURE)
    rows = [row for row in read_records(run / "metrics.jsonl") if row["kind"] == "train"]
    card = CARD.format(
        parameters=sum(count for part, count in stored.num_parameters().items() if part != "vae") / 1e6,
        size=stored.config.image_size,
        command=f"ov3 train {config['recipe']}",
        seed=config["seed"],
        samples=rows[-1]["samples_seen"],
        hours=_hours(rows),
        machine=f"{environment['processors']} processors, {environment['platform']}, "
        f"torch {environment['packages']['torch']}",
        table=markdown(figures),
    )
    (DEMO_FOLDER / "README.md").write_text(card)
    print(card)


def _hours(rows: list[dict[str, Any]]) -> float:
    """Time in training steps, from the logged rates."""
    seen, hours = 0, 0.0
    for row in rows:
        hours += (row["samples_seen"] - seen) / row["samples_per_second"] / 3600
        seen = row["samples_seen"]
    return hours


if __name__ == "__main__":
    main(Path(sys.argv[1]))
