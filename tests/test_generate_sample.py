"""`ov3 generate sample`: the k-th picture of a seed, whatever the batch and the processes; its files and its errors."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_generation_train import SMALL
from test_shared_runs import finish, start

from openvision3 import cli
from openvision3.commands.generate_sample import unlearned
from openvision3.config import VAEConfig
from openvision3.generation.config import GeneratorConfig
from openvision3.generation.dit import DiT
from openvision3.generation.folder import Description, save_generator, text_fingerprint
from openvision3.generation.generator import load_generator
from openvision3.generation.sample import SamplerConfig
from openvision3.generation.space import PictureSpace
from openvision3.generation.statistics import Normalizer
from openvision3.hub.load import load

PROMPTS = [f"a {name}" for name in ("panda", "car", "rainbow", "lion", "temple", "comet", "rooster")]


def make(folder: Path, model_folder: Path, config: GeneratorConfig, **changes: object) -> Path:
    """A generator of random weights on the tiny model's tokens."""
    model = load(model_folder, device="cpu")
    space = PictureSpace(model, "tokens")
    torch.manual_seed(1)
    dit = DiT(config)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    normalizer = Normalizer(torch.zeros(16, 32), torch.ones(16, 32))
    text = text_fingerprint(model) if config.condition == "text" else ""
    description = Description(config, str(model_folder), "tokens", 64, space.fingerprint, text, steps=4)
    save_generator(folder, dit, normalizer, replace(description, **changes))  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="module")
def texts(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = replace(SMALL, text_width=32, text_length=16)
    return make(tmp_path_factory.mktemp("generators") / "texts", tiny_model, config)


@pytest.fixture(scope="module")
def classes(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = GeneratorConfig("classes", 32, (4, 4), SMALL.backbone, SMALL.head, num_classes=3)
    folder = tmp_path_factory.mktemp("generators") / "classes"
    return make(folder, tiny_model, config, classes=("cat", "dog", "owl"))


def sample(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str]:
    code = cli.main(["generate", "sample", "--device", "cpu", *map(str, args)])
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return code, err


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["a lion by the water", "two big lions"], ""),
        (["a panda on a beach", "a lion"], "never saw 'panda'; it was trained on scenes of 2 things"),
        (["five o'clock"], 'never saw "five o\'clock"'),
        ([f"a {name}" for name in ("panda", "car", "rainbow", "temple")], "'panda', 'car', 'rainbow', ...; it"),
    ],
)
def test_prompts_beyond_what_was_learned_are_named(texts: list[str], said: str) -> None:
    found = unlearned(("lion", "apple"), texts)
    assert (said in found and found.count("\n") == 0) if said else not found
    assert not unlearned((), texts), "nothing is known of other data"


def pictures(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))]


def test_tokens_do_not_depend_on_the_batch(texts: Path) -> None:
    generator = load_generator(texts, device="cpu")
    prompts = (PROMPTS * 10)[:64]
    sampler = SamplerConfig(steps=6, guidance=2.0)
    whole = generator.tokens(prompts, range(64), 5, sampler)
    for size in (1, 7):
        parts = [
            generator.tokens(prompts[at : at + size], range(at, min(at + size, 64)), 5, sampler)
            for at in range(0, 64, size)
        ]
        assert (torch.cat(parts) - whole).abs().max() < 1e-4
    other = generator.tokens(prompts[:2], range(2), 6, sampler)
    assert (other - whole[:2]).abs().max() > 0.1


def test_two_processes_draw_the_pictures_of_one(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    options = ["--generator", str(texts), "--prompts", str(prompts), "--device", "cpu"]
    code, err = sample(capsys, *options[:-2], "--out", tmp_path / "one", "--batch-size", 4)
    assert code == 0, err
    command = ["-m", "openvision3", "generate", "sample", *options, "--out", str(tmp_path / "two"), "--batch-size", "3"]
    processes = start(2, tmp_path, VAEConfig(), 0, command=command)
    errors = finish(processes)
    assert not any(process.returncode for process in processes), errors
    one, two = pictures(tmp_path / "one"), pictures(tmp_path / "two")
    assert len(one) == len(two) == len(PROMPTS)
    assert all(abs(a.astype(int) - b).max() <= 1 for a, b in zip(one, two, strict=True))
    assert (tmp_path / "two" / "sheet.png").is_file()


def test_what_is_written(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["--generator", texts, "--prompt", "a panda", "--num", 3, "--class", "lion", "--out", out, "--npz"]
    assert sample(capsys, *arguments)[0] == 0
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["a panda"] * 3 + ["a lion"] * 3
    assert [row.get("class") for row in rows] == [None] * 3 + ["lion"] * 3
    packed = np.load(out / "samples.npz", allow_pickle=False)["arr_0"]
    assert packed.shape == (6, 64, 64, 3) and packed.dtype == np.uint8
    assert all(np.array_equal(a, b) for a, b in zip(packed, pictures(out), strict=True))
    assert not np.array_equal(packed[0], packed[1])

    (out / "000004.png").unlink()  # the same command makes what is missing, and nothing else
    kept = (out / "000000.png").stat().st_mtime_ns
    assert sample(capsys, *arguments)[0] == 0
    assert np.array_equal(pictures(out)[4], packed[4]) and (out / "000000.png").stat().st_mtime_ns == kept
    code, err = sample(capsys, *arguments, "--seed", 1)
    assert code == 2 and "holds other pictures" in err
    assert sample(capsys, *arguments, "--seed", 1, "--overwrite")[0] == 0
    assert not np.array_equal(pictures(out)[0], packed[0])


def test_classes(classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample(capsys, "--generator", classes, "--num", 5, "--per-class", 2, "--out", tmp_path / "a")[0] == 0
    rows = [json.loads(line)["class"] for line in (tmp_path / "a" / "samples.jsonl").read_text().splitlines()]
    assert rows == ["cat", "cat", "dog", "dog", "owl"]
    assert sample(capsys, "--generator", classes, "--class", "dog", "--num", 1, "--out", tmp_path / "b")[0] == 0
    code, err = sample(capsys, "--generator", classes, "--class", "cow", "--out", tmp_path / "c")
    assert code == 2 and "'cow' is no class" in err


def test_autoguidance(texts: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weak = make(tmp_path / "weak", tiny_model, replace(SMALL, text_width=32, text_length=16, name="weak"))
    arguments = ["--generator", texts, "--prompt", "a panda", "--num", 1, "--autoguidance", weak]
    code, err = sample(capsys, *arguments, "--out", tmp_path / "a")
    assert code == 2 and "--guidance" in err
    assert sample(capsys, *arguments, "--guidance", 1.4, "--out", tmp_path / "a")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x"], "give --prompt"),
        (["--prompt", "a", "--steps", "-1"], "steps"),
        (["--prompt", "a", "--guidance-from", "0.9", "--guidance-to", "0.1"], "guidance_from"),
        (["--prompts", "missing.txt"], "missing.txt"),
        (["--prompt", "a", "--num", "-2"], "--num"),
        (["--prompt", "a", "--per-class", "2"], "--per-class"),
    ],
)
def test_wrong_usage_is_one_line(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    if "--out" not in arguments:
        arguments = [*arguments, "--out", str(tmp_path / "out")]
    code, err = sample(capsys, "--generator", texts, *arguments)
    assert code == 2 and message in err and err.count("\n") <= 2
    assert not (tmp_path / "out").exists()


def test_a_missing_generator_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, err = sample(capsys, "--generator", tmp_path / "none", "--prompt", "a")
    assert code == 2 and "is no generator folder" in err
