"""A run that is stopped, broken off or killed at any moment, and started again, ends with the very same weights."""

import json
import os
import random
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Fork
from safetensors.torch import load_file
from tiny_run import make_vae, tiny_config

from openvision3.cli import main
from openvision3.config import OpenVisionError, VAEConfig
from openvision3.data.batches import Batch
from openvision3.evaluation import evaluate
from openvision3.recipes import RECIPES
from openvision3.training import checkpoint
from openvision3.training.checkpoint import checkpoints, read_state
from openvision3.training.loop import train
from openvision3.training.monitor import read_records
from openvision3.training.run_folder import RunInterrupted
from openvision3.training.step import Objective

STEPS = 6  # 4 in stage 1, 2 in stage 2; a checkpoint every second one


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes that are killed
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> VAEConfig:
    return make_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, vae: VAEConfig) -> Path:
    """The folder of a run that nothing disturbs."""
    return train(tiny_config(tmp_path_factory.mktemp("unbroken"), vae, STEPS), "cpu")


def assert_same_run(folder: Path, unbroken: Path) -> None:
    """Weights, optimizer state and records, to the last bit; only rates may differ."""
    last, expected = checkpoints(folder / "checkpoints")[-1], checkpoints(unbroken / "checkpoints")[-1]
    assert last.name == expected.name
    assert {path.name for path in last.iterdir()} == {path.name for path in expected.iterdir()}
    assert (last / "state.json").read_text() == (expected / "state.json").read_text()
    for path in last.glob("*.safetensors"):  # their headers' order is by chance
        stored, wanted = load_file(path), load_file(expected / path.name)
        assert stored.keys() == wanted.keys()
        assert all(torch.equal(stored[name], wanted[name]) for name in wanted), path.name
    weights, wanted = (load_file(run / "model" / "model.safetensors") for run in (folder, unbroken))
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    rows, wanted_rows = (
        [
            {k: v for k, v in row.items() if k not in ("samples_per_second", "data_wait")}
            for row in read_records(run / "metrics.jsonl")
        ]
        for run in (folder, unbroken)
    )
    assert rows == wanted_rows


def test_the_run_folder_is_whole(unbroken: Path) -> None:
    names = {path.name for path in unbroken.iterdir()}
    assert {"config.json", "environment.json", "metrics.jsonl", "checkpoints", "samples", "model"} <= names
    assert not [name for name in names if name.endswith((".tmp", ".writing"))]
    assert {path.name for path in (unbroken / "samples").iterdir()} == {"step_4.png", "step_6.png"}
    rows = read_records(unbroken / "metrics.jsonl")
    assert [(row["step"], row["samples_seen"]) for row in rows] == [(step, 4 * step) for step in range(1, STEPS + 1)]
    needed = "latent_l1 pixel_l1 caption contrastive reconstruction understanding total grad_norm clipped learning_rate"
    assert set(f"{needed} samples_per_second temperature token_rms bad_samples".split()) <= rows[0].keys()


def test_a_complete_run_is_left_alone(unbroken: Path, vae: VAEConfig, capsys: pytest.CaptureFixture[str]) -> None:
    files = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*") if path.name not in ("config.json", ".lock")}
    train(tiny_config(unbroken, vae, STEPS), "cpu")
    assert "is complete: its weights are in" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == time for path, time in files.items() if path.is_file())


def test_same_seed_same_weights(tmp_path: Path, vae: VAEConfig, unbroken: Path) -> None:
    config = tiny_config(tmp_path / "again", vae, STEPS)
    assert_same_run(train(replace(config, data=replace(config.data, num_workers=1)), "cpu"), unbroken)


@pytest.mark.parametrize("broken_at", [1, 3, 5, 6])
def test_broken_off_at_a_step(tmp_path: Path, vae: VAEConfig, unbroken: Path, broken_at: int) -> None:
    """At 5, the newest checkpoint is stage 1's last one, whose optimizer must not enter stage 2."""
    config = tiny_config(tmp_path / "run", vae, STEPS, eval_every=4)

    def crash(model: object, step: int) -> dict[str, float]:
        if step == broken_at:
            raise ZeroDivisionError
        return {"step_again": float(step)}

    with pytest.raises(ZeroDivisionError):
        train(config, "cpu", crash)
    train(replace(config, log_every=1), "cpu")
    assert_same_run(tmp_path / "run", unbroken)
    figures = read_records(tmp_path / "run" / "metrics.jsonl", "eval")
    assert [row["step"] for row in figures] == list(range(1, {1: 0, 3: 2, 5: 4, 6: 4}[broken_at] + 1))


def test_a_signal_saves_and_stops(tmp_path: Path, vae: VAEConfig, unbroken: Path) -> None:
    config = tiny_config(tmp_path / "run", vae, STEPS, eval_every=4)

    def ask_to_stop(model: object, step: int) -> dict[str, float]:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    with pytest.raises(RunInterrupted, match="stopped after .* the same command goes on") as caught:
        train(config, "cpu", ask_to_stop)
    assert caught.value.signal_number == signal.SIGTERM
    assert checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step_3"
    train(config, "cpu")
    assert_same_run(tmp_path / "run", unbroken)


def test_the_command_evaluates_stops_and_resumes(
    tmp_path: Path,
    vae: VAEConfig,
    unbroken: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`ov3 train`, evaluations included: they must leave no trace in the weights."""
    config = tiny_config(tmp_path / "run", vae, STEPS, eval_samples=4, eval_every=8)
    monkeypatch.setitem(RECIPES, "tiny", lambda: config)
    evaluate_all = evaluate.evaluate_all

    def interrupted(*args: Any, **options: Any) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate_all(*args, **options)

    monkeypatch.setattr(evaluate, "evaluate_all", interrupted)
    assert main(["train", "tiny", "--device", "cpu"]) == 130
    assert f"stopped after 8 samples, saved in {tmp_path / 'run'}; the same command" in capsys.readouterr().err
    monkeypatch.setattr(evaluate, "evaluate_all", evaluate_all)
    assert main(["train", "tiny", "--device", "cpu", "--seed", "5"]) == 2
    assert "seed: 0 -> 5" in (told := capsys.readouterr()).out and "holds a run with another seed" in told.err
    assert main(["train", "tiny", "--device", "cpu", "--data.num-workers", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "run")
    assert_same_run(tmp_path / "run", unbroken)
    figures = read_records(tmp_path / "run" / "metrics.jsonl", "eval")
    assert [row["step"] for row in figures] == [2, 4, 6]
    assert {"reconstruction/psnr", "reconstruction/vae_psnr", "retrieval/image_to_text_r1"} & figures[0].keys()


def test_a_changed_config_is_refused(unbroken: Path, vae: VAEConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(unbroken, vae, STEPS)
    before = (unbroken / "config.json").read_bytes()
    with pytest.raises(OpenVisionError, match="another stage1.base_lr, seed"):
        train(replace(config, seed=1, stage1=replace(config.stage1, base_lr=0.2), log_every=3), "cpu")
    told = capsys.readouterr().out
    assert "stage1.base_lr: 0.1 -> 0.2  (fixed for this run)" in told and "log_every: 1 -> 3\n" in told
    assert (unbroken / "config.json").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, vae: VAEConfig) -> None:
    config = tiny_config(tmp_path / "run", vae, STEPS)
    with pytest.raises(OpenVisionError, match=r"not finite, as in .* 3 steps .*; the batch's samples are in"):
        train(replace(config, max_skipped=3, stage1=replace(config.stage1, base_lr=1e38)), "cpu")
    record = json.loads((tmp_path / "run" / "bad_batch.json").read_text())
    first = 4 * (record["step"] - 1)
    assert record["positions"] == [first, first + 1, first + 2, first + 3]
    assert record["keys"][0] == f"train-0-{first:09d}"
    assert all(int(path.name[5:]) <= record["step"] - 3 for path in checkpoints(tmp_path / "run" / "checkpoints"))
    rows = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [row["skipped_steps"] for row in rows] == [0, 1, 2]  # the third stops the run


def test_a_step_that_is_not_finite_is_skipped(
    tmp_path: Path, vae: VAEConfig, monkeypatch: pytest.MonkeyPatch, unbroken: Path
) -> None:
    """The weights stay as they were, and the run goes on with the next batch."""
    backward, seen = Objective.backward, []

    def spoilt(self: Objective, batch: Batch) -> dict[str, torch.Tensor]:
        before = {name: p.detach().clone() for name, p in self.model.state_dict().items()}
        seen.append(before)
        found = backward(self, batch)
        if len(seen) == 3:
            self.model.token_rms.fill_(float("nan"))
            next(p for p in self.model.parameters() if p.grad is not None).grad.view(-1)[0] = float("nan")  # type: ignore
        return found

    monkeypatch.setattr(Objective, "backward", spoilt)
    folder = train(tiny_config(tmp_path / "run", vae, STEPS), "cpu")
    assert all(torch.equal(seen[3][name], tensor) for name, tensor in seen[2].items())
    assert any(not torch.equal(seen[4][name], tensor) for name, tensor in seen[3].items())
    rows = read_records(folder / "metrics.jsonl")
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert rows[2]["grad_norm"] == "nan" and rows[1]["total"] == read_records(unbroken / "metrics.jsonl")[1]["total"]
    assert read_state(checkpoints(folder / "checkpoints")[-1])["skipped_steps"] == 1


def test_skipped_at_the_end_and_stopped_at_a_skip(
    tmp_path: Path, vae: VAEConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 3 is skipped, and a signal comes with it; so are the last steps of both stages: nothing is lost."""
    backward, steps = Objective.backward, iter([1, 2, 3, 4, 5, 6])

    def spoilt(self: Objective, batch: Batch) -> dict[str, torch.Tensor]:
        found, step = backward(self, batch), next(steps)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return {name: loss * float("nan") for name, loss in found.items()} if step in (3, 4, 6) else found

    monkeypatch.setattr(Objective, "backward", spoilt)
    config = tiny_config(tmp_path / "run", vae, STEPS)
    with pytest.raises(RunInterrupted, match="stopped after 12 samples, saved in"):
        train(config, "cpu")
    assert read_state(tmp_path / "run" / "checkpoints" / "step_3")["skipped_steps"] == 1
    train(config, "cpu")
    assert read_state(tmp_path / "run" / "checkpoints" / "step_6")["skipped_steps"] == 3
    assert (tmp_path / "run" / "model").exists()


def test_an_error_waits_for_the_save_under_way(tmp_path: Path, vae: VAEConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    backward, save, calls = Objective.backward, checkpoint.save_checkpoint, []

    def spoilt(self: Objective, batch: Batch) -> dict[str, torch.Tensor]:
        found = backward(self, batch)
        calls.append(found)
        return {name: loss * float("nan") for name, loss in found.items()} if len(calls) > 2 else found

    def slow(*args: Any, **options: Any) -> Path:
        time.sleep(2)
        return save(*args, **options)

    monkeypatch.setattr(Objective, "backward", spoilt)
    monkeypatch.setattr(checkpoint, "save_checkpoint", slow)
    with pytest.raises(OpenVisionError, match="not finite"):
        train(tiny_config(tmp_path / "run", vae, STEPS, background_saves=True, max_skipped=2), "cpu")
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["step_2"]


def test_lasting_checkpoints(tmp_path: Path, vae: VAEConfig) -> None:
    """The first one after each multiple of 10 samples stays, whenever the run was stopped; so does the newest."""
    config = tiny_config(tmp_path / "run", vae, 9, checkpoint_every=4, keep_checkpoints=1, keep_every=10)

    def stop(model: object, step: int) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    with pytest.raises(RunInterrupted):
        train(replace(config, eval_every=16), "cpu", stop)
    train(config, "cpu")
    kept = [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")]
    assert kept == ["step_3", "step_5", "step_8", "step_9"]  # after 12, 20, 32 and 36 samples


def test_starting_from_another_model(tmp_path: Path, vae: VAEConfig, unbroken: Path) -> None:
    still = tiny_config(tmp_path / "run", vae, 3, init=str(unbroken / "model"))
    still = replace(still, stage1=replace(still.stage1, base_lr=0.0), stage2=replace(still.stage2, base_lr=0.0))
    folder = train(still, "cpu")
    weights, start = (load_file(run / "model" / "model.safetensors") for run in (folder, unbroken))
    different = [name for name in weights if not torch.equal(weights[name], start[name])]
    assert different == ["token_rms"]
    for source in (unbroken, checkpoints(unbroken / "checkpoints")[-1]):
        again = train(replace(still, init=str(source), out=str(tmp_path / source.name)), "cpu")
        same = load_file(again / "model" / "model.safetensors")
        assert all(torch.equal(same[name], weights[name]) for name in weights)
    other = tiny_config(tmp_path / "other", vae, 3, init=str(unbroken / "model"))
    with pytest.raises(OpenVisionError, match="init: .*model has decoder"):
        train(replace(other, model=replace(other.model, decoder=None)), "cpu")


def kill_and_finish(folder: Path, vae: VAEConfig, steps: int, kills: int, seed: int, workers: int) -> int:
    """Runs the training in a process that is killed at `kills` random moments, then lets it finish; returns the kills.

    Half of the moments are anywhere within the start of the process, half a few steps into training: few enough that
    the run does not end before its last kill.
    """
    rng = random.Random(seed)
    script = Path(__file__).with_name("tiny_run.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = 0
    while True:
        arguments = [str(script), str(folder), vae.source, str(steps), str(rng.randint(0, workers))]
        process = Fork(arguments, environment)
        if done < kills:
            seconds = rng.uniform(0, 4) if rng.random() < 0.5 else 600.0
            wait_for_steps(process, folder / "metrics.jsonl", rng.randint(1, max(1, steps // kills)), seconds)
            if seconds == 600.0:
                time.sleep(rng.uniform(0, 0.005))
            process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        if process.returncode == -signal.SIGKILL:
            done += 1
            continue
        assert process.returncode == 0, errors
        return done


def wait_for_steps(process: Fork | subprocess.Popen, records: Path, steps: int, seconds: float) -> None:
    """Waits until the process has logged `steps` more of them than there were, or has ended, or for `seconds`."""
    lines, end = [-1], time.monotonic() + seconds
    while process.poll() is None and len(lines) <= steps and time.monotonic() < end:
        count = records.read_bytes().count(b"\n") if records.exists() else 0
        if count < lines[-1]:
            lines = [count]  # the records were cut at the resume
        elif count > lines[-1]:
            lines.append(count)
        time.sleep(0.002)


def test_killed_a_few_times(tmp_path: Path, vae: VAEConfig, unbroken: Path) -> None:
    assert kill_and_finish(tmp_path / "run", vae, STEPS, kills=2, seed=4, workers=1) == 2
    assert_same_run(tmp_path / "run", unbroken)


@pytest.mark.slow
def test_killed_twenty_times_in_forty_steps(tmp_path: Path, vae: VAEConfig) -> None:
    unbroken = train(tiny_config(tmp_path / "unbroken", vae, 40), "cpu")
    kills = kill_and_finish(tmp_path / "run", vae, 40, kills=20, seed=0, workers=2)
    assert_same_run(tmp_path / "run", unbroken)
    print(f"killed {kills} times: final weights bit-identical to the unbroken run's")
    assert kills == 20
