"""The embedded demo VLM: small, described, and seeing."""

import json
from pathlib import Path

import pytest

from openvision3.vlm.folder import DEMO_FOLDER, load_vlm
from openvision3.vlm.lora import DESCRIPTION, WEIGHTS
from openvision3.vlm.scenes_vqa import scenes_vqa


def test_is_small_and_described():
    """At most 8 MB, of the embedded encoder; the card's figures are those of the file beside it."""
    assert sum(path.stat().st_size for path in DEMO_FOLDER.iterdir()) <= 8e6
    described = json.loads((DEMO_FOLDER / DESCRIPTION).read_text())
    assert (described["tower"], described["language_model"]) == ("demo", "smollm2-135m-instruct")
    assert (DEMO_FOLDER / WEIGHTS).is_file()
    figures, card = json.loads((DEMO_FOLDER / "figures.json").read_text()), (DEMO_FOLDER / "README.md").read_text()
    for kind in ("relation", "count", "scene"):
        assert f"| {kind} | {figures['seen'][kind]['accuracy']:.1%}" in card


def test_the_docs_have_its_figures():
    """docs/VLM.md says of each kind of question what figures.json does, seen and blind; the README of presence."""
    figures = json.loads((DEMO_FOLDER / "figures.json").read_text())
    seen, blind = figures["seen"], figures["blind"]
    root = Path(__file__).parents[1]
    rows = [line for line in (root / "docs" / "VLM.md").read_text().splitlines() if line.startswith("| ")]
    kinds = {f"presence, {kind}": (seen["presence"][kind], blind["presence"][kind]) for kind in seen["presence"]}
    kinds |= {kind: (seen[kind], blind[kind]) for kind in ("relation", "count", "scene")}
    for name, (with_picture, without) in kinds.items():
        (row,) = (row for row in rows if row.startswith(f"| {name}") and row.count("(") == 1 and "%" in row)
        low, high = with_picture["interval"]
        said = f"{100 * with_picture['accuracy']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
        assert said in row.replace("*", "") and f"| {100 * without['accuracy']:.1f} % |" in row, name
    presence = round(100 * seen["presence"]["random"]["accuracy"])
    assert f"presence {presence} %" in (root / "README.md").read_text()


@pytest.mark.slow  # fetches the language model (145 MB) where it is not there
def test_sees():
    """On landscapes of the test split; blind it is at chance."""
    vlm = load_vlm("demo")
    seen, blind = (scenes_vqa(vlm, 12, blind=blind)["presence"]["random"]["accuracy"] for blind in (False, True))
    assert seen >= 0.85 and seen - blind >= 0.3
