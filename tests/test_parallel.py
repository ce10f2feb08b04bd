"""DDP and FSDP2, micro-batches, recomputed and compiled blocks: the losses, gradients and steps of one process."""

from pathlib import Path

import pytest
from parallel_losses import Case, results
from test_distributed import run_world
from tiny_run import make_vae
from torch import Tensor

KINDS = ("ddp", "fsdp")
FP64 = [
    f"kind={kind},micro_batch={micro},checkpointing={again}" for kind in KINDS for micro in (0, 1) for again in (0, 1)
]
SIGMOID = [f"kind={kind},micro_batch=1,loss=sigmoid" for kind in KINDS]
FP32 = [f"kind={kind},dtype=float32,micro_batch=1" for kind in KINDS]
MUON = [f"kind={kind},dtype=float32,optimizer=muon" for kind in KINDS]
COMPILED = [
    f"kind={kind},dtype=float32,micro_batch={micro},checkpointing={micro // 2},compile=1"
    for kind in KINDS
    for micro in (0, 2)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    make_vae(folder / "vae")
    return folder


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative L2 error of a tensor, and the tensor's name."""
    assert found.keys() == expected.keys()
    errors = {name: float((found[name] - tensor).norm() / tensor.norm()) for name, tensor in expected.items()}
    assert all(error == error for error in errors.values()), errors
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


def compare(size: int, folder: Path, cases: list[str], bound: float, steps: bool = True) -> None:
    """Every process has what a process alone has, within `bound`; without `steps`, up to the first gradient."""
    (folder / f"engines{size}").unlink(missing_ok=True)  # where the processes of the test before met
    shares = run_world(size, folder, "parallel_losses.py", cases)
    alone: dict[Case, dict[str, Tensor]] = {}
    for text in cases:
        case = Case.parse(text)
        plain = Case(dtype=case.dtype, loss=case.loss, optimizer=case.optimizer)
        if plain not in alone:
            alone[plain] = results(folder, plain)
        for share in shares:
            names = [n for n in alone[plain] if steps or not n.startswith(("weight", "average", "norm 2"))]
            assert share[text].keys() == alone[plain].keys()
            error, name = largest_error({n: share[text][n] for n in names}, {n: alone[plain][n] for n in names})
            print(f"{size} processes, {text}: {error:.1e} ({name})")
            assert error <= bound, f"{size} processes, {text}: {name} differs by {error:.1e}"


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_in_fp64(size: int, folder: Path) -> None:
    compare(size, folder, FP64 + SIGMOID, 1e-9)


def test_in_fp32(folder: Path) -> None:
    """Steps are left out: where a gradient is rounding alone, AdamW makes a whole step of it."""
    compare(2, folder, FP32 + MUON, 1e-4, steps=False)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 4])
def test_compiled(size: int, folder: Path) -> None:
    compare(size, folder, COMPILED, 1e-4, steps=False)


@pytest.mark.slow
def test_four_in_fp32(folder: Path) -> None:
    compare(4, folder, FP32 + MUON, 1e-4, steps=False)


def test_one_alone_is_the_same_whatever_it_recomputes(folder: Path) -> None:
    whole = results(folder, Case())
    for case in (Case(micro_batch=3), Case(checkpointing=True, micro_batch=1)):
        error, name = largest_error(results(folder, case), whole)
        assert error <= 1e-9, name
