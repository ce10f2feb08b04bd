"""The embedded demo VLM: small, described, and seeing."""

import json

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


@pytest.mark.slow  # fetches the language model (145 MB) where it is not there
def test_sees():
    """On landscapes of the test split; blind it is at chance."""
    vlm = load_vlm("demo")
    seen, blind = (scenes_vqa(vlm, 12, blind=blind)["presence"]["random"]["accuracy"] for blind in (False, True))
    assert seen >= 0.85 and seen - blind >= 0.3
