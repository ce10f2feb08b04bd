"""Records, pictures, the run's folder and stopping on a signal."""

import io
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from openvision3.config import DataConfig, OpenVisionError, StageConfig, TrainConfig
from openvision3.training.monitor import Monitor, read_records, save_picture_grid, truncate_records
from openvision3.training.precision import choose_precision, resolve_device
from openvision3.training.run_folder import StopRequest, open_run, record_environment, recorded_environment


def test_records_after_the_checkpoint_and_broken_lines_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = ['{"step": 1, "x": 1}', '{"step": 2}', "not json", '{"step": 3}', '{"step": 2, "kind": "eval"}']
    path.write_text("\n".join([*rows, '{"step": 1, "x']))
    truncate_records(path, 2)
    assert path.read_text() == '{"step": 1, "x": 1}\n{"step": 2}\n{"step": 2, "kind": "eval"}\n'
    truncate_records(path, 0)
    assert path.read_text() == ""
    truncate_records(tmp_path / "absent", 2)


def test_monitor_writes_json_lines_and_plain_text(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Monitor(tmp_path, 20, stream=stream, tensorboard=False) as monitor:
        monitor.log(1, 10, {"total": torch.tensor(2.5), "grad_norm": float("inf")})
        monitor.record("eval", 1, 10, {"psnr": 20.0})
        monitor.log(2, 20, {"total": torch.tensor(1.5)})
        monitor.flush()
        monitor.say("[done]")
    rows = read_records(tmp_path / "metrics.jsonl")
    assert [row["total"] for row in rows] == [2.5, 1.5]
    assert rows[0]["grad_norm"] == "inf"
    assert rows[0]["samples_per_second"] > 0 and rows[0]["data_wait"] == 0
    assert read_records(tmp_path / "metrics.jsonl", "eval") == [
        {"kind": "eval", "step": 1, "samples_seen": 10, "psnr": 20.0}
    ]
    assert "10/20 samples  total 2.5" in stream.getvalue() and "20/20 samples  total 1.5" in stream.getvalue()
    assert stream.getvalue().endswith("[done]\n")


def test_waiting_for_data_is_told_as_a_share_of_the_time(tmp_path: Path) -> None:
    def batches() -> Iterator[int]:
        for number in range(4):
            time.sleep(0.06)
            yield number

    with Monitor(tmp_path, 20, stream=io.StringIO(), tensorboard=False) as monitor:
        for number in monitor.waiting(batches()):
            time.sleep(0.02 if number < 2 else 0.24)
            if number % 2:
                with monitor.paused():
                    time.sleep(0.1)
                monitor.log(number, number, {})
    slow, fast = (row["data_wait"] for row in read_records(tmp_path / "metrics.jsonl"))
    assert 0.55 < slow < 0.9 and 0.1 < fast < 0.4


def test_monitor_hides_tensorboard_steps_that_run_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with Monitor(tmp_path, 20, stream=io.StringIO()) as monitor:
        monitor.log(1, 10, {"total": 1.0})
    assert list((tmp_path / "tensorboard").iterdir())


def test_picture_grid_rounds_and_clamps(tmp_path: Path) -> None:
    left = torch.full((2, 3, 4, 4), 0.3)  # (0.3 + 1) * 127.5 = 165.75
    right = torch.full((2, 3, 4, 4), 7.0)
    save_picture_grid(tmp_path / "samples" / "a.png", [left, right], gap=2)
    with Image.open(tmp_path / "samples" / "a.png") as image:
        pixels = np.asarray(image)
    assert pixels.shape == (12, 12, 3)
    assert (pixels[:4, :4] == 166).all() and (pixels[:4, 6:10] == 255).all()
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["a.png"]


def config(**changes) -> TrainConfig:
    return TrainConfig("x", stage1=StageConfig(32, samples=8, batch_size=4), **changes)


def test_a_changed_config_is_told_and_refused(tmp_path: Path) -> None:
    told: list[str] = []
    with open_run(tmp_path / "run", config(seed=7), told.append):
        record_environment(tmp_path / "run", torch.device("cpu"), precision="bf16")
    with open_run(tmp_path / "run", config(), told.append):  # nothing has been trained yet
        assert recorded_environment(tmp_path / "run") is None
    assert not told
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    with open_run(tmp_path / "run", config(log_every=3, data=DataConfig(num_workers=2)), told.append):
        pass
    assert told == ["data.num_workers: 1 -> 2", "log_every: 10 -> 3"]
    before = (tmp_path / "run" / "config.json").read_text()
    with (
        pytest.raises(OpenVisionError, match="another seed: start with the old value"),
        open_run(tmp_path / "run", config(seed=5), told.append),
    ):
        pass
    assert "seed: 0 -> 5  (fixed for this run)" in told
    assert (tmp_path / "run" / "config.json").read_text() == before


def test_a_run_belongs_to_one_process(tmp_path: Path) -> None:
    def enter_elsewhere() -> str:
        """Opens the run in another process and returns what it says; a child holds no lock of its parent's."""
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            try:
                with open_run(tmp_path, config(), lambda _: None):
                    os.write(write, b"entered")
            except OpenVisionError as error:
                os.write(write, str(error).encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        os.close(write)
        with os.fdopen(read) as answer:
            return answer.read()

    with open_run(tmp_path, config(), lambda _: None):
        assert enter_elsewhere() == f"{tmp_path} is in use by another process"
    assert enter_elsewhere() == "entered"


def test_environment_is_recorded_once(tmp_path: Path) -> None:
    assert recorded_environment(tmp_path) is None
    record_environment(tmp_path, torch.device("cpu"), precision="bf16")
    record = recorded_environment(tmp_path)
    assert record is not None and record["precision"] == "bf16"
    assert torch.__version__.startswith(record["packages"]["torch"])
    assert json.loads((tmp_path / "environment.json").read_text()) == record


def test_the_end_of_a_terminal_stops_where_it_is_asked_for() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with StopRequest(hangup=True) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal_number == signal.SIGHUP
        assert signal.signal(signal.SIGHUP, signal.SIG_IGN) == signal.SIG_DFL
        with StopRequest(hangup=True) as stop:  # as under nohup
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop
    finally:
        signal.signal(signal.SIGHUP, before)


def test_first_signal_asks_second_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop and stop.signal_number == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_faster_precision_is_chosen() -> None:
    def step(slow: str):
        return lambda precision: torch.linspace(0, 1, 3_000_000).sin().sum() if precision == slow else None

    cpu = torch.device("cpu")
    assert choose_precision("auto", cpu, step("fp32")) == "bf16"
    assert choose_precision("auto", cpu, step("bf16")) == "fp32"
    assert choose_precision("bf16", cpu, step("bf16")) == "bf16"


@pytest.mark.parametrize("name", ["nonsense", "cuda:99"])
def test_unknown_or_absent_devices_are_refused(name: str) -> None:
    with pytest.raises(OpenVisionError, match=name):
        resolve_device(name)
