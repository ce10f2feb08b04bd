"""Losses and gradients of a global batch that several processes share: the same as in one process, in fp64."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from forks import Fork
from shared_losses import Kind, contrastive_results, objective_results
from tiny_run import make_vae
from torch import Tensor

KINDS: tuple[Kind, Kind] = ("softmax", "sigmoid")
SECONDS = 900  # a run takes a few; so long only where something hangs, or the machine is very busy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    make_vae(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for kind in KINDS:
        found[kind] = contrastive_results(kind)
        for micro_batch in (0, 3):
            found[f"{kind} {micro_batch}"] = objective_results(folder, kind, micro_batch)
    return found


def run_world(
    size: int, folder: Path, script: str = "shared_losses.py", cases: Sequence[str] = ()
) -> list[dict[str, dict[str, Tensor]]]:
    """What each of `size` processes found."""
    path = Path(__file__).with_name(script)
    processes = [Fork([str(path), str(rank), str(size), str(folder), *cases], os.environ) for rank in range(size)]
    try:
        errors = [process.communicate(timeout=SECONDS)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (found[name] - tensor).norm() / tensor.norm()
        assert error <= 1e-9, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("size", [2, 4])
def test_processes_add_up_to_one(size: int, folder: Path, alone: dict[str, dict[str, Tensor]]) -> None:
    shares = run_world(size, folder)
    for kind in KINDS:
        found = {name: torch.stack([share[kind][name] for share in shares]).sum(dim=0) for name in alone[kind]}
        assert_equal(found, alone[kind])
        for micro_batch in (0, 1):
            parts = [share[f"{kind} {micro_batch}"] for share in shares]
            assert all(torch.equal(part[name], parts[0][name]) for part in parts for name in part if "grad" not in name)
            found = {
                name: torch.stack([part[name] for part in parts]).sum(dim=0) if "grad" in name else parts[0][name]
                for name in parts[0]
            }
            assert_equal(found, alone[f"{kind} 0"])


def test_micro_batches_change_nothing(alone: dict[str, dict[str, Tensor]]) -> None:
    for kind in KINDS:
        assert_equal(alone[f"{kind} 3"], alone[f"{kind} 0"])
    assert "grad logit_bias" in alone["sigmoid 0"] and "grad logit_bias" not in alone["softmax 0"]
