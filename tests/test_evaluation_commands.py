"""`ov3 eval` through the command line, with a tiny random model."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from openvision3 import cli


def ov3(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """Runs a command in this process: (exit code, stdout, stderr)."""
    code = cli.main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def test_figures_are_printed_with_their_protocol_and_written(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path
) -> None:
    paths = {"json": tmp_path / "figures.json", "html": tmp_path / "figures.html"}
    options = ("--model", tiny_model, "--samples", 12, "--json", paths["json"], "--html", paths["html"])
    code, out, err = ov3(capsys, "eval", "retrieval", *options)
    assert code == 0, err
    figures = json.loads(paths["json"].read_text())
    assert figures["data"]["n"] == 12
    assert figures["retrieval"]["protocol"] in out and figures["data"]["protocol"] in out
    names = [name for name, value in figures["retrieval"].items() if isinstance(value, float)]
    assert names and all(name in out for name in names)
    assert paths["html"].read_text().lstrip().lower().startswith("<!doctype html>")
    assert paths["html"].read_text().count("data:image/png") >= 4  # pictures beside the figures
    code, _, err = ov3(capsys, "eval", "retrieval", *options)
    assert code == 2 and "figures.json exists" in err


def test_unusable_pictures_of_a_folder_are_named(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path
) -> None:
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"picture {i}")
    (tmp_path / "empty.png").touch()
    code, _, err = ov3(capsys, "eval", "retrieval", "--model", tiny_model, "--data", tmp_path)
    assert code == 1
    assert [line for line in err.splitlines() if "empty.png" in line and line.startswith("ov3: ")]


def test_wrong_data_exits_2(capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path) -> None:
    for data in ("no-such-data", tmp_path):
        code, _, err = ov3(capsys, "eval", "all", "--model", tiny_model, "--data", data, "--no-fidelity")
        assert code == 2
        assert str(data) in err and err.count("\n") == 1 and "traceback" not in err
