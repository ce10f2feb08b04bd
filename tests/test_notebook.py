"""The notebook: cleared in git, and run from top to bottom."""

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


def cells() -> list[dict[str, Any]]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_the_notebook_is_cleared_and_compiles() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in cells()}) == len(cells()) >= 10
    for cell in cells():
        assert cell["cell_type"] in ("markdown", "code")
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            compile("".join(cell["source"]), cell["id"], "exec")


@pytest.mark.slow
def test_the_notebook_runs(capsys: pytest.CaptureFixture[str]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown: list[Any] = []
    names: dict[str, Any] = {"__name__": "__main__"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyplot, "show", lambda: shown.append(pyplot.gcf()))
        for cell in cells():
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    pyplot.close("all")
    assert len(shown) == 4
    assert min(names["psnr"]) > 25
    there = [{thing.name for thing in scene.things} for scene in names["scenes"]]
    assert sum(name in things for name, things in zip(names["named"], there, strict=True)) >= 4
    assert len(names["captions"]) == 6 and all(names["captions"])
    assert names["captions"][0] in capsys.readouterr().out
    assert names["drawn"].shape == (4, 3, 128, 128) and names["drawn"].isfinite().all()
