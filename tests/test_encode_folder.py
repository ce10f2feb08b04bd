"""`ov3 encode DIR --out TOKENS`: shards that survive every kind of stop, whoever fills them."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from encoder_folders import save_transformers
from forks import Fork
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import openvision3
from openvision3 import cli
from openvision3.commands import encode
from openvision3.commands.common import ModelOptions
from openvision3.commands.pictures import prepare
from openvision3.config import ExternalEncoderConfig, ModelConfig, OpenVisionError, TransformerConfig, to_dict
from openvision3.data.token_shards import (
    Encoding,
    Place,
    ShardWriter,
    TokenFolder,
    open_for_writing,
    read_index,
    write_index,
)
from openvision3.model.openvision3 import OpenVision3
from openvision3.vae import TinyVAE

COUNT = 13
SHARD_MB = 0.009  # four pictures of 16 tokens of width 32, fp32: 2,112 bytes each
ON_CLIP = ModelConfig(
    image_size=32, encoder=TransformerConfig(32, 2, 2), decoder=None, text_encoder=None, text_decoder=None
)


def picture(path: Path, width: int, height: int, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(COUNT):
        picture(folder / ("sub" if i % 3 else "") / f"{i}é.png", 64 + i % 2 * 20, 64 - i % 4, seed=i)
    return folder


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of pictures of each batch that a model encodes in this process."""
    counts: list[int] = []
    original = OpenVision3.encode

    def counting(self: OpenVision3, images: torch.Tensor) -> torch.Tensor:
        counts.append(len(images))
        return original(self, images)

    monkeypatch.setattr(OpenVision3, "encode", counting)
    return counts


Ov3 = Callable[..., tuple[int, str]]


@pytest.fixture
def ov3(capsys: pytest.CaptureFixture[str], tiny_model: Path, pictures: Path) -> Ov3:
    """`ov3 encode` of the pictures with small batches and shards, in this process: (exit code, stderr)."""

    def run(out: Path, *args: object, source: Path = pictures, also: tuple[Path, ...] = ()) -> tuple[int, str]:
        options = ["--model", tiny_model, "--out", out, "--batch-size", 2, "--shard-mb", SHARD_MB, "--device", "cpu"]
        code = cli.main([str(arg) for arg in ("encode", source, *also, *options, *args)])
        err = capsys.readouterr().err
        assert "Traceback" not in err and "unexpected" not in err
        return code, err

    return run


def assert_complete(out: Path, tiny_model: Path, pictures: Path) -> None:
    """Every picture is in exactly one row of one shard, where the index says, with the model's own tokens."""
    model = OpenVision3.load(tiny_model)
    assert model.vae is not None
    rows: dict[str, tuple[str, int]] = {}
    for shard in sorted(out.glob("tokens-*.safetensors")):
        with safe_open(shard, "pt") as file:
            keys = json.loads(file.metadata()["keys"])
        assert len(load_file(shard)["tokens"]) == len(keys) <= 4
        assert not set(keys) & set(rows)
        rows |= {key: (shard.name, row) for row, key in enumerate(keys)}
    names = {path.relative_to(pictures).as_posix() for path in pictures.rglob("*.png")}
    assert set(rows) == names
    index = json.loads((out / "index.json").read_text())
    listed = index["pictures"].items()
    assert {key: (index["shards"][number], row) for key, (number, row, _) in listed} == rows
    for key in names:
        shard, row = rows[key]
        with torch.no_grad():
            tokens = model.encode_latents(model.vae.encode(prepare(pictures / key, 64, 1024)[0][None]))
        saved = load_file(out / shard)
        torch.testing.assert_close(saved["tokens"][row], tokens[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(saved["embedding"][row], model.pool(tokens)[0].detach(), atol=1e-5, rtol=0)
    assert not [path for path in out.iterdir() if ".tmp" in path.name]


def test_a_folder_becomes_bounded_shards_and_an_index(
    ov3: Ov3, tiny_model: Path, pictures: Path, tmp_path: Path, encoded: list[int]
) -> None:
    code, err = ov3(tmp_path / "tokens")
    assert code == 0, err
    assert sum(encoded) == COUNT
    assert_complete(tmp_path / "tokens", tiny_model, pictures)
    shards = sorted((tmp_path / "tokens").glob("*.safetensors"))
    assert [path.name for path in shards] == [f"tokens-0000-{i:06d}.safetensors" for i in range(4)]
    files = {path: path.read_bytes() for path in (tmp_path / "tokens").iterdir()}
    code, err = ov3(tmp_path / "tokens")
    assert code == 0 and f"{COUNT} of {COUNT} pictures are in {tmp_path / 'tokens'} already" in err
    assert sum(encoded) == COUNT
    assert files == {path: path.read_bytes() for path in (tmp_path / "tokens").iterdir()}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_what_was_encoded_and_the_same_command_goes_on(
    ov3: Ov3,
    tiny_model: Path,
    pictures: Path,
    tmp_path: Path,
    encoded: list[int],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
) -> None:
    pool, batches = OpenVision3.pool, []

    def signalled(self: OpenVision3, tokens: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        batches.append(len(tokens))
        if len(batches) == 3:
            os.kill(os.getpid(), number)
        return pool(self, tokens, normalize)

    monkeypatch.setattr(OpenVision3, "pool", signalled)
    stopped, err = ov3(tmp_path / "tokens")
    assert stopped == code
    assert "the same command goes on" in err
    assert sum(encoded) == len(read_index(tmp_path / "tokens")) == 6
    monkeypatch.setattr(OpenVision3, "pool", pool)
    assert ov3(tmp_path / "tokens")[0] == 0
    assert sum(encoded) == COUNT
    assert_complete(tmp_path / "tokens", tiny_model, pictures)


def kill_after(shards: int, out: Path, command: list[str], environment: dict[str, str]) -> None:
    """Starts the command and kills it, at no moment in particular, soon after the folder has that many shards."""
    process = Fork(command[1:], environment)
    end = time.monotonic() + 300
    while process.poll() is None and len(list(out.glob("tokens-*.safetensors"))) < shards and time.monotonic() < end:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors


def command_line(out: Path, tiny_model: Path, pictures: Path, batch_size: int = 1) -> tuple[list[str], dict[str, str]]:
    options = ["--model", tiny_model, "--out", out, "--batch-size", batch_size, "--shard-mb", SHARD_MB]
    program = [sys.executable, "-m", "openvision3.cli", "encode", pictures, *options, "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return [str(part) for part in program], environment


def test_killed_in_the_middle(ov3: Ov3, tiny_model: Path, tmp_path: Path, encoded: list[int]) -> None:
    source, out, count = tmp_path / "many", tmp_path / "tokens", 60
    for i in range(count):
        picture(source / f"{i}.png", 64, 64, seed=i)
    kill_after(2, out, *command_line(out, tiny_model, source))
    finished = read_index(out)
    assert 8 <= len(finished) < count
    (out / ".tokens-0000-000009.1.tmp.safetensors").write_bytes(b"half")  # as a kill within a write leaves it
    assert ov3(out, source=source)[0] == 0
    assert sum(encoded) == count - len(finished)
    assert_complete(out, tiny_model, source)


@pytest.mark.slow
def test_killed_ten_times(ov3: Ov3, tiny_model: Path, tmp_path: Path, encoded: list[int]) -> None:
    """120 pictures, ten kills at random moments: a picture that was in a shard is never encoded again."""
    source, out, rng = tmp_path / "many", tmp_path / "tokens", random.Random(0)
    for i in range(120):
        picture(source / f"{i}.png", 64, 64, seed=i)
    finished: dict[str, Place] = {}
    for _ in range(10):
        there = len(list(out.glob("tokens-*.safetensors")))
        kill_after(there + rng.randint(0, 2), out, *command_line(out, tiny_model, source))
        now = read_index(out) if out.exists() else {}
        assert finished.items() <= now.items()
        finished = now
    assert ov3(out, source=source)[0] == 0
    assert sum(encoded) == 120 - len(finished)
    assert_complete(out, tiny_model, source)


def test_processes_share_the_work_and_may_become_more_or_fewer(
    ov3: Ov3,
    tiny_model: Path,
    pictures: Path,
    tmp_path: Path,
    encoded: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, counts = tmp_path / "tokens", []
    for rank, world in ((1, 3), (0, 2), (1, 2), (0, 1)):  # of three processes two were killed before they began
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        code, err = ov3(out)
        assert code == 0 and (f"process {rank} of {world}: " in err) == (world > 1)
        counts.append(len(read_index(out)))
    assert 0 < counts[0] < counts[1] < counts[2] == COUNT
    assert sum(encoded) == COUNT
    assert_complete(out, tiny_model, pictures)


def test_processes_take_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for asked, given in (("auto", "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")):
        assert encode.on_own_device(ModelOptions(device=asked), world=4).device == given
    assert encode.on_own_device(ModelOptions(device="cuda"), world=1).device == "cuda"


@pytest.mark.slow
def test_torchrun(tiny_model: Path, pictures: Path, tmp_path: Path) -> None:
    program, environment = command_line(tmp_path / "tokens", tiny_model, pictures, batch_size=2)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program[1:]]
    subprocess.run(torchrun, env=environment, check=True, timeout=600)
    assert {path.name[:11] for path in (tmp_path / "tokens").glob("*.safetensors")} == {"tokens-0000", "tokens-0001"}
    assert_complete(tmp_path / "tokens", tiny_model, pictures)


@pytest.mark.slow
def test_a_process_that_fails_waits_for_the_others(tiny_model: Path, tmp_path: Path) -> None:
    """torchrun ends the others as soon as one has failed: here one with a single picture, which is broken."""
    source, out = tmp_path / "source", tmp_path / "tokens"
    ranks = {f"{i}.png": zlib.crc32(f"{i}.png".encode()) % 2 for i in range(600)}
    good = [name for name, rank in ranks.items() if rank == 0]
    for name in good:
        picture(source / name, 64, 64, 0)
    broken = next(name for name, rank in ranks.items() if rank == 1)
    (source / broken).write_text("no picture")
    program, environment = command_line(out, tiny_model, source)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program[1:]]
    done = subprocess.run(torchrun, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and done.stderr.count(f"{source / broken}:") == 1
    assert sorted(read_index(out)) == sorted(good)


def test_wrong_shares_of_work_are_refused(monkeypatch: pytest.MonkeyPatch, ov3: Ov3, tmp_path: Path) -> None:
    for rank, world in (("2", "2"), ("-1", "2"), ("x", "2")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world)
        with pytest.raises(OpenVisionError, match="no share of work"):
            encode.share_of_work()
    monkeypatch.setenv("RANK", "0")
    code, err = ov3(tmp_path / "tokens", "--json", tmp_path / "figures.json")
    assert code == 2 and "leave it out under torchrun" in err
    assert not list(tmp_path.iterdir())


def test_the_index_has_what_another_process_finishes_while_it_is_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that merged before the last shard and writes after the other's index must not leave a shorter one."""
    encoding = Encoding("f", 2, 1, 16, 32, None, "fp32")

    def shard(rank: int, key: str) -> None:
        writer = ShardWriter(tmp_path, encoding, rank, 1000, 100.0)
        writer.add([key], torch.zeros(1, 4, 2), torch.zeros(1, 1), (2, 2), [(32, 32)], [7])
        writer.flush()

    shard(0, "a")
    from openvision3.data import token_shards

    write_json, meanwhile = token_shards._write_json, [lambda: (shard(1, "b"), write_index(tmp_path))]

    def late(path: Path, data: object) -> None:
        if meanwhile:
            meanwhile.pop()()
        write_json(path, data)

    monkeypatch.setattr(token_shards, "_write_json", late)
    write_index(tmp_path)
    assert set(json.loads((tmp_path / "index.json").read_text())["pictures"]) == {"a", "b"}


def test_pictures_of_their_own_size_in_bf16(
    ov3: Ov3, tiny_model: Path, pictures: Path, tmp_path: Path, encoded: list[int]
) -> None:
    assert ov3(tmp_path / "tokens", "--native-size", "--save-dtype", "bf16", "--max-side", 80)[0] == 0
    folder, model = TokenFolder(tmp_path / "tokens"), OpenVision3.load(tiny_model)
    assert len(folder) == COUNT and sorted(folder) == sorted(folder.pictures)
    for key in folder:
        image, size = prepare(pictures / key, None, 80)
        with torch.no_grad():
            tokens = model.encode(image[None])[0]
        found = folder[key]
        assert found.size == size and found.grid == (image.shape[1] // 16, image.shape[2] // 16)
        assert found.tokens.dtype == torch.bfloat16 and found.embedding.dtype == torch.float32
        torch.testing.assert_close(found.tokens.float(), tokens, atol=0.02, rtol=0.01)
        torch.testing.assert_close(found.embedding, model.pool(tokens[None])[0].detach(), atol=1e-5, rtol=0)
        decoded = model.decode(found.tokens.float()[None], grid=found.grid)
        assert decoded.shape[2] >= size[0] and decoded.shape[3] >= size[1]
    assert len({folder[key].grid for key in folder}) > 1


def test_square_tokens_are_read_by_key(ov3: Ov3, tiny_model: Path, pictures: Path, tmp_path: Path) -> None:
    assert ov3(tmp_path / "tokens")[0] == 0
    (tmp_path / "tokens" / "index.json").unlink()  # the shards alone are enough
    folder = TokenFolder(tmp_path / "tokens")
    assert "sub/1é.png" in folder and "1é.png" not in folder
    found = folder["sub/1é.png"]
    with torch.no_grad():
        tokens = OpenVision3.load(tiny_model).encode(prepare(pictures / "sub" / "1é.png", 64, 1024)[0][None])
    torch.testing.assert_close(found.tokens, tokens[0], atol=1e-5, rtol=0)
    assert (found.grid, found.size) == ((4, 4), (64, 64))


def test_bad_pictures_are_named_and_tried_again(ov3: Ov3, pictures: Path, tmp_path: Path, encoded: list[int]) -> None:
    source, out = tmp_path / "source", tmp_path / "tokens"
    picture(source / "a.png", 64, 64, 0)
    (source / "b.png").write_text("no picture")
    code, err = ov3(out, source=source)
    assert code == 1 and err.count(str(source / "b.png")) == 1 and "1 failed" in err
    assert list(read_index(out)) == ["a.png"]
    picture(source / "b.png", 64, 64, 1)
    assert ov3(out, source=source)[0] == 0
    assert sum(encoded) == 2 and list(TokenFolder(out)) == ["a.png", "b.png"]


def test_another_model_preparation_or_dtype_is_refused(
    ov3: Ov3, tiny_model: Path, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tokens"
    assert ov3(out)[0] == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    model = OpenVision3.load(tiny_model)
    with torch.no_grad():
        model.encoder.class_token += 1e-3  # type: ignore[operator]
    model.save(tmp_path / "other")
    for options, name in (
        (["--save-dtype", "bf16"], "dtype 'fp32', not 'bf16'"),
        (["--size", "32"], "size 64, not 32"),
        (["--native-size"], "size 64, not None"),
        (["--model", tmp_path / "other"], "fingerprint"),
    ):
        code, err = ov3(out, *options)
        assert code == 2 and name in err and err.count("\n") == 1
    assert before == {path: path.read_bytes() for path in out.iterdir()}


def test_a_text_towers_training_keeps_the_fingerprint(tiny_model: Path) -> None:
    from openvision3.model.fingerprint import image_fingerprint

    model = OpenVision3.load(tiny_model)
    before = image_fingerprint(model)
    assert len(before) == 64 and before == image_fingerprint(OpenVision3.load(tiny_model))
    assert model.text_encoder is not None and model.vae is not None
    with torch.no_grad():
        next(model.text_encoder.parameters()).add_(1)
        next(cast(TinyVAE, model.vae).decoder.parameters()).add_(1)
        assert image_fingerprint(model) == before
        next(cast(TinyVAE, model.vae).encoder.parameters()).add_(1)
        changed = image_fingerprint(model)
        assert changed != before
        model.encoder.class_token.copy_(model.encoder.class_token.flip(-1))  # type: ignore[operator,union-attr]
        assert image_fingerprint(model) not in (before, changed)


def test_an_activation_is_part_of_another_librarys_encoder(tmp_path: Path) -> None:
    """Two towers of equal weights, one of quick_gelu, give other tokens."""
    from openvision3.model.fingerprint import image_fingerprint

    found = []
    for act in ("quick_gelu", "gelu", "quick_gelu"):
        folder = save_transformers(tmp_path / act, "clip_vision_model", hidden_act=act)
        config = replace(ON_CLIP, external=ExternalEncoderConfig(str(folder)))
        torch.manual_seed(0)
        OpenVision3(config).save(tmp_path / f"{len(found)}")
        model = openvision3.load(tmp_path / f"{len(found)}", device="cpu")
        found.append(image_fingerprint(model))
    assert found[0] == found[2] != found[1]


def test_folders_that_are_something_else_or_in_use_are_refused(
    ov3: Ov3, tiny_model: Path, pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    code, err = ov3(tmp_path / "mine")
    assert code == 2 and "no folder of tokens" in err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]
    code, err = ov3(tmp_path / "mine" / "letter.txt")
    assert code == 2 and "no folder of tokens" in err
    out = tmp_path / "tokens"
    assert ov3(out)[0] == 0
    hold = (
        "import fcntl, sys\nlock = open(sys.argv[1], 'a')\nfcntl.lockf(lock, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(out / ".lock-0")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        code, err = ov3(out)
        assert code == 2 and "in use by another process" in err
        holder.communicate()


def test_wrong_options_leave_nothing(ov3: Ov3, tmp_path: Path) -> None:
    clip = save_transformers(tmp_path / "clip", "clip_vision_model")
    OpenVision3(replace(ON_CLIP, external=ExternalEncoderConfig(str(clip)))).save(tmp_path / "on_clip")
    for options, words in (
        (["--shard-mb", "0"], "--shard-mb 0"),
        (["--shard-mb", "-1"], "--shard-mb -1"),
        (["--shard-mb", "nan"], "--shard-mb nan"),
        (["--shard-mb", "inf"], "--shard-mb inf"),
        (["--size", "50"], "multiple of 16"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--native-size", "--max-side", "8"], "--max-side 16"),
        (["--native-size", "--size", "64"], "leave out --size"),
        (["--max-side", "64"], "pass --native-size too"),
        (["--native-size", "--model", tmp_path / "on_clip"], "reads pictures of 32 x 32 pixels alone"),
    ):
        code, err = ov3(tmp_path / "no", *options)
        assert code == 2 and words in err and not (tmp_path / "no").exists(), (options, err)


def test_a_folder_without_shards_takes_another_encoding(ov3: Ov3, tmp_path: Path, pictures: Path) -> None:
    """As a command leaves it that ended before its first shard."""
    with open_for_writing(tmp_path / "tokens", Encoding("f", 2, 1, 16, 32, None, "fp32"), 0, 1):
        pass
    assert ov3(tmp_path / "tokens")[0] == 0 and len(TokenFolder(tmp_path / "tokens")) == COUNT


def test_another_picture_under_a_known_key_is_named(ov3: Ov3, tmp_path: Path, encoded: list[int]) -> None:
    source, out = tmp_path / "source", tmp_path / "tokens"
    for name in "ab":
        picture(source / f"{name}.png", 64, 64, 0)
    assert ov3(out, source=source)[0] == 0
    picture(source / "b.png", 80, 64, 1)
    for index in (True, False):
        if not index:
            (out / "index.json").unlink()
        code, err = ov3(out, source=source)
        assert code == 1 and err.count("choose another --out") == 1 and f"{source / 'b.png'}: has" in err
        assert "as 'b.png' had" in err and "1 failed" in err and sum(encoded) == 2


def test_a_folder_that_another_process_makes_meanwhile_is_entered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoding, iterdir = Encoding("f", 2, 1, 16, 32, None, "fp32"), Path.iterdir

    def late(self: Path) -> Iterator[Path]:
        (self / "encoding.json").write_text(json.dumps(to_dict(encoding)))
        return iterdir(self)

    monkeypatch.setattr(Path, "iterdir", late)
    with open_for_writing(tmp_path, encoding, 0, 2):
        pass


def test_broken_weights_write_nothing(ov3: Ov3, pictures: Path, tiny_model: Path, tmp_path: Path) -> None:
    model = OpenVision3.load(tiny_model)
    with torch.no_grad():
        model.encoder.class_token.fill_(torch.nan)  # type: ignore[operator]
    model.save(tmp_path / "broken")
    code, err = ov3(tmp_path / "tokens", "--model", tmp_path / "broken")
    assert code == 2 and "are not finite" in err and not read_index(tmp_path / "tokens")
    source = tmp_path / "source" / "a.png"
    picture(source, 64, 64, 0)
    options = ["--model", str(tmp_path / "broken"), "--device", "cpu"]
    assert cli.main(["encode", str(source), *options]) == 2
    assert list(source.parent.iterdir()) == [source]


def test_two_pictures_with_one_key_are_refused(ov3: Ov3, tmp_path: Path) -> None:
    picture(tmp_path / "x" / "a.png", 64, 64, 0)
    picture(tmp_path / "y" / "a.png", 64, 64, 1)
    code, err = ov3(tmp_path / "tokens", source=tmp_path / "x", also=(tmp_path / "y",))
    assert code == 2 and "share the key 'a.png'" in err
    assert not (tmp_path / "tokens").exists()


def test_a_shard_that_is_broken_is_named_and_one_that_is_taken_away_encoded_again(
    ov3: Ov3, tiny_model: Path, pictures: Path, tmp_path: Path, encoded: list[int]
) -> None:
    out = tmp_path / "tokens"
    assert ov3(out)[0] == 0
    last = out / "tokens-0000-000003.safetensors"
    (out / "index.json").unlink()
    whole = last.read_bytes()
    last.write_bytes(whole[:50])
    code, err = ov3(out)
    assert code == 2 and f"{last} is not a readable shard" in err
    last.write_bytes(whole)
    folder = TokenFolder(out)
    key = next(key for key, place in folder.pictures.items() if place.shard == last.name)
    last.write_bytes(whole[:50])
    with pytest.raises(OpenVisionError, match=f"{last} is not a readable shard"):
        folder[key]
    last.write_bytes(whole)
    assert ov3(out)[0] == 0 and sum(encoded) == COUNT
    last.unlink()
    assert ov3(out)[0] == 0 and sum(encoded) == COUNT + 1
    assert_complete(out, tiny_model, pictures)


def test_a_taken_away_shards_name_does_not_come_back_with_its_old_rows(tmp_path: Path) -> None:
    """The index would point to it: a kill may come before the next merge."""
    encoding = Encoding("f", 2, 1, 16, 32, None, "fp32")

    def add(key: str) -> None:
        with open_for_writing(tmp_path, encoding, 0, 1):
            writer = ShardWriter(tmp_path, encoding, 0, 1000, 100.0)
            writer.add([key], torch.zeros(1, 4, 2), torch.zeros(1, 1), (2, 2), [(32, 32)], [7])
            writer.flush()

    add("a")
    write_index(tmp_path)
    (tmp_path / "tokens-0000-000000.safetensors").unlink()
    add("b")
    assert read_index(tmp_path) == {"b": ("tokens-0000-000000.safetensors", 0, 7)}


def test_a_shard_waits_no_longer_than_it_may(tmp_path: Path) -> None:
    encoding = Encoding("f", 2, 1, 16, 32, None, "fp32")
    writer = ShardWriter(tmp_path, encoding, 0, 10**9, shard_seconds=0.0)
    for key in "ab":
        time.sleep(0.002)
        writer.add([key], torch.zeros(1, 4, 2), torch.zeros(1, 1), (2, 2), [(32, 32)], [7])
    assert Counter(place.shard for place in read_index(tmp_path).values()) == {
        "tokens-0000-000000.safetensors": 1,
        "tokens-0000-000001.safetensors": 1,
    }
