"""`ov3 generate eval` through the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from openvision3 import cli
from openvision3.evaluation import fidelity
from openvision3.evaluation.scene_classifier import save_scene_classifier, train_scene_classifier

NAMES = ("red apple", "panda")


class Colours(fidelity.FeatureNetwork):
    """Mean colours, in EfficientNet-Lite0's place."""

    name, protocol = "EffNetLite0", "mean colours"

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=(2, 3))


@pytest.fixture(autouse=True)
def without_inception(monkeypatch: pytest.MonkeyPatch) -> None:
    find = fidelity.inception_path
    monkeypatch.setattr(fidelity, "inception_path", lambda path="": find(path) if path else None)
    monkeypatch.setattr(fidelity, "load_effnet_lite0", lambda device: Colours())


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Six pictures of 64 px with their classes, and eight wider ones to compare with."""
    made, real = tmp_path / "made", tmp_path / "real"
    for folder, count, width in ((made, 6, 64), (real, 8, 80)):
        folder.mkdir()
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 200 + 5 * i, (64, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    lines = [json.dumps({"file": f"{i}.png", "class": NAMES[i % 2]}) for i in range(6)]
    (made / "samples.jsonl").write_text("\n".join(lines))
    return made, real


def ov3(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """Runs a command in this process: (exit code, stdout, stderr)."""
    code = cli.main(["generate", "eval", *(str(arg) for arg in args)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def test_figures_protocol_hashes_and_judges(
    capsys: pytest.CaptureFixture[str], folders: tuple[Path, Path], tiny_model: Path, tmp_path: Path
) -> None:
    save_scene_classifier(train_scene_classifier(NAMES, 16, batch_size=8, held_out=4), tmp_path / "judge")
    options = ("--reference", folders[1], "--json", tmp_path / "f.json", "--device", "cpu")
    judges = ("--model", tiny_model, "--classifier", tmp_path / "judge")
    code, out, err = ov3(capsys, folders[0], *options, *judges)
    assert code == 0, err
    figures = json.loads((tmp_path / "f.json").read_text())
    assert {"FD-EffNetLite0", "KID-EffNetLite0", "precision (EffNetLite0)"} < set(figures["figures"])
    assert err.count("under its name, and compare with nothing published") == 1
    assert (figures["samples"]["n"], figures["reference"]["n"]) == (6, 8)
    for text in (
        *figures["figures"],
        figures["samples"]["sha256"],
        figures["reference"]["sha256"],
        figures["protocol"],
        figures["classifier"]["protocol"],
        figures["zeroshot"]["protocol"],
        f"torch {figures['versions']['torch']}",
    ):
        assert text in out
    assert figures["classifier"]["n"] == figures["zeroshot"]["n"] == 6
    assert figures["classifier"]["labels"] == figures["zeroshot"]["labels"] == 2
    code, _, err = ov3(capsys, folders[0], *options)
    assert code == 2 and "f.json exists" in err


def test_pictures_that_fail_are_named(capsys: pytest.CaptureFixture[str], folders: tuple[Path, Path]) -> None:
    (folders[0] / "x.png").touch()
    (folders[1] / "y.png").touch()
    code, out, err = ov3(capsys, folders[0], "--reference", folders[1])
    assert code == 1 and "; 6 used" in out and "; 8 used" in out
    assert [line for line in err.splitlines() if line.startswith("ov3: ") and "x.png" in line]
    assert [line for line in err.splitlines() if line.startswith("ov3: ") and "y.png" in line]


def test_npz_samples_and_reference(
    capsys: pytest.CaptureFixture[str], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    for name, count in (("made", 6), ("real", 7)):
        pixels = [np.array(Image.open(folders[0] / f"{i % 6}.png")) for i in range(count)]
        np.savez(tmp_path / f"{name}.npz", np.stack(pixels))
    _, from_folder, _ = ov3(capsys, folders[0], "--reference", tmp_path / "real.npz")
    code, out, _ = ov3(capsys, tmp_path / "made.npz", "--reference", tmp_path / "real.npz")
    assert code == 0
    assert out.splitlines()[1:] == from_folder.splitlines()[1:]  # but for the first line, on where samples come from


def test_wrong_use_is_one_line(capsys: pytest.CaptureFixture[str], folders: tuple[Path, Path], tmp_path: Path) -> None:
    made, real = folders
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(tmp_path / "s.npz", np.zeros((4, 8, 8, 3), np.uint8))
    (tmp_path / "weights.pth").write_bytes(b"no weights")
    for samples, reference, more, said in (
        (tmp_path / "none", real, (), "none"),
        (made, tmp_path / "none.npz", (), "none.npz"),
        (made, tmp_path / "statistics.npz", (), "weights are needed"),
        (made, real, ("--inception", tmp_path / "weights.pth"), "sha256"),
        (made, real, ("--inception", tmp_path / "missing.pth"), "missing.pth"),
        (made, real, ("--classifier", tmp_path / "none"), "classifier"),
        (tmp_path / "s.npz", real, ("--classifier", tmp_path), "samples.jsonl"),
        (made, real, ("--samples-used", -1), "0 or more"),
    ):
        code, _, err = ov3(capsys, samples, "--reference", reference, *more)
        lines = [line for line in err.splitlines() if line.startswith("ov3: ")]
        assert code == 2 and len(lines) == 1 and said in lines[0], err
