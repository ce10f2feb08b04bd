"""Checkpoints: whole or absent, exact, without pickle, and the optimizer's state by name."""

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openvision3.config import OpenVisionError
from openvision3.training import checkpoint
from openvision3.training.checkpoint import (
    Saver,
    checkpoint_tensors,
    checkpoints,
    latest_checkpoint,
    load_checkpoint,
)
from openvision3.training.optimizer import adamw, set_learning_rate

TENSORS = "shard-00001-model-00001-of-00001.safetensors"


def save_checkpoint(
    folder: Path, step: int, modules: dict, optimizer: torch.optim.Optimizer | None, state: dict, **options
) -> Path:
    ignore = options.pop("ignore", ())
    return checkpoint.save_checkpoint(folder, step, checkpoint_tensors(modules, optimizer, ignore), state, **options)


class Tied(nn.Module):
    """An embedding tied to an output layer, a buffer, a buffer that is not saved, and a frozen part."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Embedding(5, 4)
        self.hidden = nn.Linear(4, 4)
        self.output = nn.Linear(4, 5, bias=False)
        self.output.weight = self.embedding.weight
        self.register_buffer("rms", torch.tensor(float(seed)))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.vae = nn.Linear(2, 2).requires_grad_(False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.output(self.hidden(self.embedding(ids)))


def build(seed: int) -> tuple[Tied, torch.optim.Optimizer]:
    model = Tied(seed)
    return model, adamw(model, 0.9, 0.95, 1e-8, 0.2)


def advance(model: Tied, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        set_learning_rate(optimizer, 0.01 * (step + 1))
        ids = torch.tensor([step % 5, (step + 2) % 5])
        nn.functional.cross_entropy(model(ids), ids).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_resume_is_bit_identical(tmp_path: Path) -> None:
    unbroken, optimizer = build(0)
    advance(unbroken, optimizer, range(6))

    first, optimizer = build(0)
    advance(first, optimizer, range(3))
    path = save_checkpoint(tmp_path, 3, {"model": first}, optimizer, {"samples": 30}, ignore=["model.vae."])
    second, optimizer = build(1)
    assert load_checkpoint(path, {"model": second}, optimizer, ignore=["model.vae."]) == {"samples": 30}
    advance(second, optimizer, range(3, 6))
    assert torch.equal(second.embedding.weight, unbroken.embedding.weight)
    assert torch.equal(second.hidden.weight, unbroken.hidden.weight)
    assert second.rms == 0.0  # buffers come from the checkpoint
    assert not torch.equal(second.vae.weight, first.vae.weight)  # ignored parts do not
    assert second.output.weight is second.embedding.weight


def test_contents_are_named_tensors(tmp_path: Path) -> None:
    model, optimizer = build(0)
    advance(model, optimizer, range(2))
    path = save_checkpoint(tmp_path, 2, {"model": model}, optimizer, {}, ignore=["model.vae."])
    state = load_file(path / TENSORS)
    assert sorted(name for name in state if not name.startswith("optimizer.")) == [
        "model.embedding.weight",
        "model.hidden.bias",
        "model.hidden.weight",
        "model.rms",
    ]
    assert "optimizer.model.hidden.weight|exp_avg_sq" in state
    assert state["optimizer.model.embedding.weight|step"] == 2
    assert not any("vae" in name for name in state)


def test_several_modules_and_no_optimizer(tmp_path: Path) -> None:
    online, average = nn.Linear(2, 2), nn.Linear(2, 2)
    path = save_checkpoint(tmp_path, 1, {"online": online, "average": average}, None, {"note": "x"})
    other = {"online": nn.Linear(2, 2), "average": nn.Linear(2, 2)}
    assert load_checkpoint(path, other) == {"note": "x"}
    assert torch.equal(other["average"].weight, average.weight)
    assert not torch.equal(other["online"].weight, average.weight)


def test_keeps_the_newest_by_number(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    for step in (8, 9, 10, 100):
        save_checkpoint(tmp_path, step, {"model": model}, None, {}, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_10", "step_100"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step_100"
    assert latest_checkpoint(tmp_path / "absent") is None


def test_broken_off_saves_are_not_seen_and_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(1, 1)
    save_checkpoint(tmp_path, 1, {"model": model}, None, {})

    def killed(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, {"model": model}, None, {})
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 2
    assert latest_checkpoint(tmp_path) == tmp_path / "step_1"
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]
    save_checkpoint(tmp_path, 1, {"model": model}, None, {"again": True})
    assert load_checkpoint(tmp_path / "step_1", {"model": model}) == {"again": True}


def test_everything_is_flushed_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def traced_fsync(handle: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{handle}").rpartition("/")[2])
        fsync(handle)

    def traced_rename(self: Path, target: Path) -> Path:
        events.append("rename")
        return rename(self, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("names of open files need /proc")
    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(Path, "rename", traced_rename)
    model, optimizer = build(0)
    advance(model, optimizer, range(1))
    save_checkpoint(tmp_path, 1, {"model": model}, optimizer, {})
    whole = [TENSORS, "state.json", ".step_1.writing", "rename"]
    assert events[-5:] == [*whole, tmp_path.name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.weight"), "model.weight is missing"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "extra is not part"),
        (lambda tensors: tensors.update({"model.weight": torch.zeros(3, 3)}), r"shape \(3, 3\), expected \(2, 2\)"),
    ],
)
def test_wrong_tensors_are_named(tmp_path: Path, change, message: str) -> None:
    path = save_checkpoint(tmp_path, 1, {"model": nn.Linear(2, 2)}, None, {})
    tensors: dict[str, Tensor] = load_file(path / TENSORS)
    change(tensors)
    save_file(tensors, path / TENSORS)
    record = json.loads((path / "state.json").read_text())
    record["files"][TENSORS] = (path / TENSORS).stat().st_size
    (path / "state.json").write_text(json.dumps(record))
    with pytest.raises(OpenVisionError, match=message):
        load_checkpoint(path, {"model": nn.Linear(2, 2)})


@pytest.mark.parametrize("name", [TENSORS, "state.json"])
def test_unreadable_checkpoint_is_named(tmp_path: Path, name: str) -> None:
    path = save_checkpoint(tmp_path, 1, {"model": nn.Linear(2, 2)}, None, {})
    (path / name).write_bytes(b"\x80\x04garbage")
    with pytest.raises(OpenVisionError, match="step_1 is not a readable checkpoint"):
        load_checkpoint(path, {"model": nn.Linear(2, 2)})


def test_a_missing_or_short_file_is_named(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"model": nn.Linear(2, 2)}, None, {})
    (path / TENSORS).write_bytes((path / TENSORS).read_bytes()[:-4])
    with pytest.raises(OpenVisionError, match=f"{TENSORS} has .* bytes, expected"):
        load_checkpoint(path, {"model": nn.Linear(2, 2)})
    (path / TENSORS).unlink()
    with pytest.raises(OpenVisionError, match="step_1 is not a readable checkpoint"):
        load_checkpoint(path, {"model": nn.Linear(2, 2)})


def test_lasting_ones_stay(tmp_path: Path) -> None:
    for step in range(1, 7):
        save_checkpoint(tmp_path, step, {"model": nn.Linear(1, 1)}, None, {}, keep=2, lasting=step in (1, 3))
    assert [path.name for path in checkpoints(tmp_path)] == ["step_1", "step_3", "step_5", "step_6"]


def test_saves_in_the_background_hold_what_was_when_they_were_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = build(0)
    advance(model, optimizer, range(1))
    before = {name: tensor.clone() for name, tensor in checkpoint_tensors({"model": model}, optimizer).items()}
    going_on, save = threading.Event(), checkpoint.save_checkpoint

    def slow(*args, **options) -> Path:
        assert going_on.wait(60)
        return save(*args, **options)

    monkeypatch.setattr(checkpoint, "save_checkpoint", slow)
    saver = Saver(tmp_path, background=True)
    saver.save(1, checkpoint_tensors({"model": model}, optimizer), {"samples": 1})
    advance(model, optimizer, range(1, 3))
    assert not checkpoints(tmp_path)
    going_on.set()
    saver.finish()
    stored = load_file(tmp_path / "step_1" / TENSORS)
    assert stored.keys() == before.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in before.items())


def test_an_error_of_a_save_in_the_background_comes_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args, **options) -> Path:
        raise OpenVisionError("step_1 can't be written: disk full")

    monkeypatch.setattr(checkpoint, "save_checkpoint", fails)
    saver = Saver(tmp_path, background=True)
    saver.save(1, checkpoint_tensors({"model": nn.Linear(1, 1)}), {})
    with pytest.raises(OpenVisionError, match="disk full"):
        saver.finish()
