"""Runs that several processes share: stopped, killed, resumed by other numbers of processes, and lost by nobody."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from forks import Fork
from safetensors.torch import load_file
from test_resume import wait_for_steps
from tiny_run import make_vae, tiny_config

from openvision3.config import VAEConfig
from openvision3.training.checkpoint import checkpoints, read_state
from openvision3.training.monitor import read_records

SECONDS = 900  # so long only where something hangs, or the machine is very busy
COUNTS = (1, 2, 4)  # of processes
UNLIKE = ("samples_per_second", "data_wait", "kind")


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> VAEConfig:
    return make_vae(tmp_path_factory.mktemp("vae"))


def start(
    size: int, folder: Path, vae: VAEConfig, steps: int, workers: int = 0, precision: str = "fp64", kind: str = "ddp",
    saves: str = "", spoil: str = "", pause: float = 0.0, command: Sequence[str] = (),
) -> list[Fork]:  # fmt: skip
    """The processes of a run, which meet at a port of their own; `command` is what is given to `python`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("shared_run.py")
    arguments = command or [str(script), str(folder), vae.source, str(steps), str(workers), precision, kind]
    shared = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "SAVES": saves,
        "SPOIL": spoil,
        "PAUSE": str(pause),
    }
    return [Fork(arguments, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(size)]


def finish(processes: Sequence[Fork | subprocess.Popen], seconds: float = SECONDS) -> list[str]:
    """Waits for all processes, at most so long; returns what they wrote on stderr."""
    end = time.monotonic() + seconds
    try:
        return [process.communicate(timeout=max(1.0, end - time.monotonic()))[1] for process in processes]
    finally:
        for process in processes:
            process.kill()


def complete(*args, **options) -> None:
    """A run to its end, by processes that nothing disturbs."""
    processes = start(*args, **options)
    errors = finish(processes)
    assert not any(process.returncode for process in processes), "\n".join(errors)


def assert_same_samples(folder: Path, unbroken: Path) -> None:
    """Every batch that some process ever saw holds what the unbroken run had at its positions, and none is missing."""
    expected: dict[int, str] = {}
    for row in map(json.loads, Path(f"{unbroken}-ids.jsonl").read_text().splitlines()):
        expected |= dict(zip(row["positions"], row["keys"], strict=True))
    found: set[int] = set()
    for line in Path(f"{folder}-ids.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["keys"] == [expected[position] for position in row["positions"]]
        found |= set(row["positions"])
    assert found == set(expected)


def largest_difference(folder: Path, unbroken: Path) -> float:
    """The largest relative difference of a loss in some step; every step is there once, in order."""
    rows, wanted = (read_records(run / "metrics.jsonl") for run in (folder, unbroken))
    assert [(row["step"], row["samples_seen"]) for row in rows] == [(w["step"], w["samples_seen"]) for w in wanted]
    differences = [
        abs(row[name] - value) / max(abs(value), 1e-30)
        for row, want in zip(rows, wanted, strict=True)
        for name, value in want.items()
        if name not in UNLIKE
    ]
    return max(differences)


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_stopped_by_a_signal_and_resumed_by_others(tmp_path: Path, vae: VAEConfig, kind: str) -> None:
    """Two processes, of which one is asked to stop; then one; then four."""
    complete(1, tmp_path / "unbroken", vae, 9)
    run = tmp_path / "run"
    for size, asked, number in ((2, 1, signal.SIGUSR1), (1, 0, signal.SIGTERM)):
        processes = start(size, run, vae, 9, workers=1, kind=kind, saves="background" if size == 2 else "")
        wait_for_steps(processes[0], run / "metrics.jsonl", 2, SECONDS)
        processes[asked].send_signal(number)
        errors = finish(processes)
        assert [process.returncode for process in processes] == [0] * size, errors
        assert "saved in" in errors[0]
    assert len(read_records(run / "metrics.jsonl")) < 9
    complete(4, run, vae, 9, kind=kind)
    assert_same_samples(run, tmp_path / "unbroken")
    assert largest_difference(run, tmp_path / "unbroken") <= 1e-9
    weights, wanted = (load_file(folder / "model" / "model.safetensors") for folder in (run, tmp_path / "unbroken"))
    assert weights.keys() == wanted.keys()
    assert all((weights[name] - wanted[name]).norm() <= 1e-6 * wanted[name].norm() for name in wanted)


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_a_step_that_one_process_spoils_is_skipped_by_all(tmp_path: Path, vae: VAEConfig, kind: str) -> None:
    """NaN in the third step of the last of two processes, or of one alone: the same run."""
    complete(1, tmp_path / "alone", vae, 6, spoil="0")
    complete(2, tmp_path / "run", vae, 6, kind=kind, spoil="1", saves="background")
    alone, rows = (read_records(run / "metrics.jsonl") for run in (tmp_path / "alone", tmp_path / "run"))
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1, 1] == [row["skipped_steps"] for row in alone]
    assert rows[2]["total"] == "nan"
    for row, expected in zip(rows[3:], alone[3:], strict=True):
        assert all(abs(row[name] - expected[name]) <= 1e-9 * abs(expected[name]) for name in ("total", "token_rms"))
    states = [read_state(checkpoints(tmp_path / run / "checkpoints")[-1]) for run in ("alone", "run")]
    assert states[0]["skipped_steps"] == states[1]["skipped_steps"] == 1
    # the save that was due at the fourth step, the last of stage 1, is there
    assert "step_4" in {path.name for path in checkpoints(tmp_path / "run" / "checkpoints")}


def test_counts_that_do_not_divide_the_batch_are_refused(tmp_path: Path, vae: VAEConfig) -> None:
    processes = start(3, tmp_path / "run", vae, 4)
    errors = finish(processes)
    assert [process.returncode for process in processes] == [2, 2, 2]
    assert "stage1.batch_size is 4, which 3 processes can't share equally" in errors[0]
    assert not (tmp_path / "run").exists()


def test_an_error_of_the_first_process_ends_all(tmp_path: Path, vae: VAEConfig) -> None:
    complete(1, tmp_path / "run", vae, 3)
    config = tiny_config(tmp_path / "run", vae, 3)
    assert (tmp_path / "run" / "config.json").exists() and config.seed == 0
    processes = start(2, tmp_path / "run", vae, 6)  # another length
    errors = finish(processes)
    assert [process.returncode for process in processes] == [2, 2]
    assert all("holds a run with another stage1.samples" in error for error in errors)


def test_one_process_names_what_all_find(tmp_path: Path, vae: VAEConfig) -> None:
    """`python -m openvision3`, as torchrun starts it: the first process alone says what is wrong, and all end."""
    processes = start(2, tmp_path / "run", vae, 6, command=["-m", "openvision3", "train", "demo", "--ema", "2"])
    errors = finish(processes)
    assert [process.returncode for process in processes] == [2, 2]
    assert errors == ["ov3: ema is 2: expected at least 0 and less than 1\n", ""]


def kill(how: str, processes: Sequence[Fork], rng: random.Random, folder: Path) -> None:
    """SIGKILL for one process or for all; "saving" waits for a checkpoint under way, and spoils what is there of it."""
    if how == "one":
        processes[rng.randrange(len(processes))].send_signal(signal.SIGKILL)
        return
    if how == "saving":
        end = time.monotonic() + 60
        while time.monotonic() < end and all(process.poll() is None for process in processes):
            if list((folder / "checkpoints").glob(".step_*.writing")):
                time.sleep(rng.uniform(0, 0.01))
                break
            time.sleep(0.0005)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    if how == "saving":  # what was not yet flushed to disk is lost in a power cut
        for path in (folder / "checkpoints").glob(".step_*.writing/*"):
            os.truncate(path, rng.randint(0, path.stat().st_size))


def killed_run(
    folder: Path, vae: VAEConfig, steps: int, kills: int, seed: int, precision: str, kinds: Sequence[str]
) -> dict[str, int]:
    """A run to its end through `kills` kills, each time resumed with other numbers; returns how often it was killed."""
    rng, done = random.Random(seed), {"one": 0, "all": 0, "saving": 0}
    while True:
        size, workers = rng.choice(COUNTS), rng.randint(0, 2)
        saves = rng.choice(("", "background"))
        # a pause in each step, or a busy machine would be through with many before the kill
        processes = start(size, folder, vae, steps, workers, precision, rng.choice(kinds), saves, pause=0.1)
        if sum(done.values()) == kills:
            errors = finish(processes)
            assert not any(process.returncode for process in processes), "\n".join(errors)
            return done
        how = rng.choice(list(done))
        saved = [int(path.name[5:]) for path in checkpoints(folder / "checkpoints")]
        if max(saved, default=0) > steps * sum(done.values()) / kills:  # ahead: at any moment of the start
            how = "all"
            time.sleep(rng.uniform(0, 4))
        else:
            wait_for_steps(processes[0], folder / "metrics.jsonl", rng.randint(2, 3), SECONDS)
            time.sleep(rng.uniform(0, 0.02))
        kill(how, processes, rng, folder)
        errors = finish(processes, 120)  # the others notice, and end by themselves
        codes = [process.returncode for process in processes]
        for code, error in zip(codes, errors, strict=True):  # of the survivors, the last word is one line
            assert code in (0, -signal.SIGKILL) or "\nov3: another process" in f"\n{error}", error
        if -signal.SIGKILL in codes:
            done[how] += 1
            assert codes.count(0) == 0 or how == "one", errors
        else:
            assert codes == [0] * size, "\n".join(errors)
            raise AssertionError("the run ended before it was killed often enough")


def test_killed_a_few_times(tmp_path: Path, vae: VAEConfig) -> None:
    complete(1, tmp_path / "unbroken", vae, 12)
    killed_run(tmp_path / "run", vae, 12, 3, 1, "fp64", ["ddp"])
    assert_same_samples(tmp_path / "run", tmp_path / "unbroken")
    assert largest_difference(tmp_path / "run", tmp_path / "unbroken") <= 1e-9


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "kills", "bound"), [("fp64", 50, 1e-9), ("fp32", 20, 1e-4)])
def test_killed_often(tmp_path: Path, vae: VAEConfig, precision: str, kills: int, bound: float) -> None:
    complete(1, tmp_path / "unbroken", vae, 60, precision=precision)
    done = killed_run(tmp_path / "run", vae, 60, kills, 0, precision, ["ddp", "fsdp"])
    assert_same_samples(tmp_path / "run", tmp_path / "unbroken")
    difference = largest_difference(tmp_path / "run", tmp_path / "unbroken")
    print(f"{precision}, 60 steps, killed {done}: samples as unbroken, losses within {difference:.1e}")
    assert difference <= bound


def children(process: int) -> list[int]:
    """The processes that a process has started (Linux)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = stat.read_text().rpartition(")")[2].split()[1]
            found += [int(stat.parent.name)] if int(parent) == process else []
    return found


@pytest.mark.slow
def test_an_agent_is_killed_and_brought_back(tmp_path: Path, vae: VAEConfig) -> None:
    """Two torchrun agents with a process each, as on two machines of which one fails and comes back.

    The run goes on by itself from the last checkpoint.
    """
    steps = 60
    complete(1, tmp_path / "unbroken", vae, steps)
    run, script = tmp_path / "run", Path(__file__).with_name("shared_run.py")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=10",
        "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test", "--monitor-interval=0.5",
        str(script), str(run), vae.source, str(steps), "0", "fp64", "ddp",
    ]  # fmt: skip
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else an agent that joins later never learns of the store

    def agent(host: bool) -> subprocess.Popen:
        noticed_soon = "keep_alive_interval=1,keep_alive_max_attempt=3"  # instead of after 15 seconds
        options = [f"--rdzv-conf=is_host={'true' if host else 'false'},{noticed_soon}"]
        return subprocess.Popen(
            [*command[:3], *options, *command[3:]],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    first, second = agent(True), agent(False)
    try:
        wait_for_steps(first, run / "metrics.jsonl", 8, SECONDS)
        assert first.poll() is None
        before = len(checkpoints(run / "checkpoints"))
        for number in [second.pid, *children(second.pid)]:
            os.kill(number, signal.SIGKILL)
        second.wait()
        assert before, "it was killed before the first checkpoint"
        time.sleep(6)
        second = agent(False)
        errors = finish([first, second])
        assert (first.returncode, second.returncode) == (0, 0), "\n".join(errors)[-4000:]
    finally:
        for process in (first, second):
            process.kill()
    assert "resuming" in errors[0] + errors[1]
    assert_same_samples(run, tmp_path / "unbroken")
    assert largest_difference(run, tmp_path / "unbroken") <= 1e-9
