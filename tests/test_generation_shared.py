"""A generator's training that two processes share: the run of one process, replicated and sharded."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_shared_runs import finish, start

from openvision3.config import VAEConfig
from openvision3.training.checkpoint import checkpoints
from openvision3.training.monitor import read_records

FIELDS = {
    "samples": 24,
    "batch-size": 4,
    "draws": 1,
    "warmup-samples": 0,
    "decay-samples": 0,
    "peak-lr": 0.002,
    "statistics-samples": 8,
    "precision": "fp32",
    "optimizer.kind": "adamw",  # Muon rounds to bf16, so that rounding elsewhere grows
    "optimizer.eps": 1e-3,
    "ema": 0.5,
    "sheet-steps": 2,
    "sheet-every": 0,
    "log-every": 1,
    "checkpoint-every": 12,
    "data.num-workers": 0,
    "generator.token-width": 32,
    "generator.backbone.width": 16,
    "generator.backbone.num-heads": 2,
    "generator.backbone.depth": 2,
    "generator.head.width": 32,
    "generator.head.depth": 1,
    "generator.head.num-heads": 2,
}


def command(model: Path, out: Path, **changes: object) -> list[str]:
    fields = FIELDS | {"model": model, "out": out} | {name.replace("_", "-"): v for name, v in changes.items()}
    flags = [part for name, value in fields.items() for part in (f"--{name}", str(value))]
    return ["-m", "openvision3", "generate", "train", "demo_generator", "--device", "cpu", *flags]


def complete(size: int, folder: Path, arguments: list[str]) -> None:
    processes = start(size, folder, VAEConfig(), 0, command=arguments)
    errors = finish(processes)
    assert not any(process.returncode for process in processes), "\n".join(errors)


@pytest.fixture(scope="module")
def alone(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    complete(1, folder, command(tiny_model, folder))
    return folder


def assert_alike(folder: Path, other: Path) -> None:
    mine, theirs = (load_file(run / "generator" / "generator.safetensors") for run in (folder, other))
    assert mine.keys() == theirs.keys()
    assert all(torch.allclose(mine[name], theirs[name], atol=1e-4) for name in mine)
    rows, wanted = (read_records(run / "metrics.jsonl") for run in (folder, other))
    assert [row["samples_seen"] for row in rows] == [row["samples_seen"] for row in wanted]
    for row, want in zip(rows, wanted, strict=True):
        assert row["total"] == pytest.approx(want["total"], rel=1e-4)
        assert row["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_two_processes_train_as_one(alone: Path, tiny_model: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "two"
    complete(2, folder, command(tiny_model, folder, parallel=kind, micro_batch=1))
    assert_alike(folder, alone)


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_another_number_of_processes(alone: Path, tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "two"
    processes = start(2, folder, VAEConfig(), 0, command=command(tiny_model, folder, parallel="fsdp"))
    while not (folder / "metrics.jsonl").exists() or len(read_records(folder / "metrics.jsonl")) < 2:
        assert all(process.poll() is None for process in processes), finish(processes)
        time.sleep(0.05)
    os.kill(processes[1].pid, signal.SIGTERM)
    errors = finish(processes)
    assert not any(process.returncode for process in processes), errors
    assert checkpoints(folder / "checkpoints")
    complete(1, folder, command(tiny_model, folder))
    assert_alike(folder, alone)
