"""The command line's own part: finding commands, exit codes, one line for an error, recipes' fields."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from openvision3 import cli
from openvision3.commands import common
from openvision3.commands.train import leaves, misspelt, resolve
from openvision3.config import OpenVisionError, TextDecoderConfig, TrainConfig, VAETrainConfig


def ov3(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """Runs a command in this process: (exit code, stdout, stderr)."""
    code = cli.main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return code, out, err


def test_help_lists_every_command_without_importing_torch() -> None:
    program = "import sys; from openvision3.cli import main; sys.exit(main(['--help']) or 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0
    for name in cli.COMMANDS:
        assert f"  {name} " in result.stdout


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, out, err = ov3(capsys, *name.split(), "--help")
    assert code == 0, err
    assert "usage" in out


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], "usage"),
        (["recontsruct"], "did you mean 'reconstruct'?"),
        (["zzz"], "see ov3 --help"),
        (["data"], "data needs a command; it has make-demo, index, check"),
        (["data", "mke-demo"], "data has no command 'mke-demo'"),
        (["reconstruct"], "name at least one picture"),
        (["reconstruct", "--no-such-option", "3"], "--no-such-option"),
        (["train"], "usage"),
        (["train", "no-such-recipe"], "there is no recipe 'no-such-recipe'"),
        (["train", "demo", "--stage1.batch_sise", "3"], "did you mean --stage1.batch_size?"),
        (["train", "demo", "--stage1.samples", "many"], "--stage1.samples"),
        (["info", "no/such/model"], "no/such/model"),
    ],
)
def test_wrong_usage_exits_2_without_a_traceback(
    capsys: pytest.CaptureFixture[str], args: list[str], expected: str
) -> None:
    code, out, err = ov3(capsys, *args)
    assert code == 2
    assert expected in err + out
    assert "Traceback" not in err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ov3(capsys, "--version")
    assert code == 0
    assert out.startswith("openvision3 ")


def test_unexpected_errors_are_one_line_that_names_the_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(args: list[str]) -> int:
        raise KeyError("inner\nmatter")

    monkeypatch.setattr(cli, "dispatch", explode)
    code, _, err = ov3(capsys, "anything")
    assert code == 2
    assert err.count("\n") == 1 and "Traceback" not in err
    path = Path(err.rstrip().rstrip(")").split()[-1])
    assert "KeyError" in path.read_text() and "explode" in path.read_text()
    path.unlink()
    monkeypatch.setenv("OV3_DEBUG", "1")
    with pytest.raises(KeyError):
        cli.main(["anything"])


def test_errors_keep_to_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(args: list[str]) -> int:
        raise OpenVisionError("first\nsecond")

    monkeypatch.setattr(cli, "dispatch", refuse)
    assert ov3(capsys, "anything") == (2, "", "ov3: first second\n")


def test_interrupt_is_clean() -> None:
    program = (
        "import signal, sys, time\nfrom openvision3 import cli\n"
        # a background job of a shell starts with the signal ignored, and its children too
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def wait(args):\n    print('ready', flush=True)\n    time.sleep(60)\n    return 0\n"
        "cli.dispatch = wait\nsys.exit(cli.main(['x']))"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr.read() == b"ov3: interrupted\n"


def test_a_closed_pipe_is_no_error() -> None:
    program = "import sys; from openvision3.cli import main; sys.exit(main(['--help']))"
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        result = subprocess.run([sys.executable, "-c", program], stdout=closed, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1
    assert result.stderr == ""


def test_recipe_fields_from_the_command_line() -> None:
    run = resolve(
        TrainConfig("demo"),
        ["--stage1.batch_size", "96", "--stage1.base-lr=1e-3", "--data.scenes.count-weights", "1", "0", "0", "0"]
        + ["--checkpoint-blocks", "True", "--model.text-decoder.image-input", "prefix", "--device", "cpu", "--dry-run"],
    )
    assert run.config.stage1.batch_size == 96
    assert run.config.stage1.base_lr == 1e-3
    assert run.config.data.scenes.count_weights == (1.0, 0.0, 0.0, 0.0)
    assert run.config.checkpoint_blocks is True
    assert run.config.model.text_decoder == TextDecoderConfig(image_input="prefix")
    assert (run.device, run.dry_run) == ("cpu", True)
    assert resolve(TrainConfig("demo"), []).config == TrainConfig("demo")
    vae = resolve(VAETrainConfig("vae"), ["--vae.encoder-widths", "8", "8", "16"]).config.vae
    assert vae.encoder_widths == (8, 8, 16)


def test_parts_can_be_left_out() -> None:
    run = resolve(TrainConfig("demo"), ["--model.text-decoder", "none", "--model.decoder", "None", "--seed", "3"])
    assert run.config.model.text_decoder is None and run.config.model.decoder is None
    assert run.config.model.text_encoder is not None and run.config.seed == 3
    with pytest.raises(OpenVisionError, match="belongs to a part that this recipe leaves out"):
        resolve(TrainConfig("demo"), ["--model.decoder", "none", "--model.decoder.width", "8"])


def test_misspelt_fields_name_the_nearest() -> None:
    fields = [name for name, _ in leaves(TrainConfig)]
    assert "stage1.batch_size" in fields and "model.text_encoder.transformer.width" in fields
    assert "did you mean --stage2.lpips_weight?" in misspelt("--stage2.lpips-wieght", fields)
    assert "did you mean --stage1.batch_size?" in misspelt("--batch-size=3", fields)
    assert "unexpected argument 'x'" in misspelt("x", fields)


def test_whole_file_leaves_nothing_half_written(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "figures.json"
    with pytest.raises(RuntimeError), common.whole_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert list(path.parent.iterdir()) == []
    common.write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(OpenVisionError, match="--overwrite"):
        common.write_json(path, {"a": 2})
    common.write_json(path, {"a": 2}, overwrite=True)
    assert json.loads(path.read_text()) == {"a": 2}
    assert [p.name for p in path.parent.iterdir()] == ["figures.json"]
    with common.whole_file(path, overwrite=True) as one, common.whole_file(path, overwrite=True) as other:
        assert one != other  # a process of this id on another host writes there too
        one.write_text("1")
        other.write_text("2")


def test_progress_prints_plain_lines_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    with common.Progress(4, "pictures", seconds_between_lines=0.0) as progress:
        time.sleep(0.01)
        progress.advance(2)
        progress.advance(2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("2 of 4 pictures, ") and lines[0].endswith(" s left")


def test_train_lists_recipes_and_describes_one(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ov3(capsys, "train", "--help")
    assert code == 0 and "  quickstart " in out and "  demo " in out
    code, out, err = ov3(capsys, "train", "quickstart", "--dry-run", "--stage1.samples", "6400", "--device", "cpu")
    assert code == 0, err
    assert '"samples": 6400' in out and "recipe quickstart" in out
