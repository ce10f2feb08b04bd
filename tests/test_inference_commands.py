"""`ov3 info`, `encode`, `reconstruct`, `caption` and `classify` on real files, with a tiny random model."""

import json
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from openvision3 import cli
from openvision3.commands.inference import prompts_for, read_labels
from openvision3.commands.pictures import prepare
from openvision3.config import OpenVisionError
from openvision3.hub.released import load_released
from openvision3.model.openvision3 import OpenVision3


def picture(path: Path, width: int = 64, height: int = 64, seed: int = 0, **options: object) -> Path:
    """Writes a smooth coloured picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path, **options)  # type: ignore[arg-type]
    return path


def ov3(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """Runs a command in this process: (exit code, stdout, stderr)."""
    code = cli.main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def test_info_prints_the_parts(capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path) -> None:
    code, out, err = ov3(capsys, "info", tiny_model, "--json", tmp_path / "info.json")
    assert code == 0, err
    model = OpenVision3.load(tiny_model)
    figures = json.loads((tmp_path / "info.json").read_text())
    assert figures["parameters"] == model.num_parameters()
    assert figures["flops"] == model.flops(64)
    assert figures["config"]["encoder"]["width"] == 32
    assert "4 x 4 of width 32" in out and "licence MIT" in out
    assert "positions: computed from row and column, at any size" in out
    for part in ("encoder", "decoder", "text_encoder", "text_decoder", "vae"):
        assert part in out


def test_info_says_how_positions_are_made(capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path) -> None:
    model = OpenVision3.load(tiny_model)
    for name, change, expected in (
        ("scaled", {"positions": "scaled"}, "computed; at other sizes spread over what 4 x 4 tokens cover"),
        ("stored", {"stored_positions": True}, "a stored table for 4 x 4 tokens, interpolated at other sizes"),
    ):
        config = replace(model.config, text_decoder=None, text_encoder=None, **change)
        OpenVision3(config, model.vae).save(tmp_path / name)
        assert f"positions: {expected}\n" in ov3(capsys, "info", tmp_path / name)[1]


def test_reconstruct_writes_every_output_beside_its_input(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path
) -> None:
    """A folder of mixed pictures, good and bad: the good come out in their own shape, each bad one is one line."""
    shapes = {"a.png": (64, 64), "b.jpg": (100, 70), "sub/c.webp": (33, 90), "d.png": (64, 64), "e.png": (1, 1)}
    for i, (name, (width, height)) in enumerate(shapes.items()):
        picture(tmp_path / name, width, height, seed=i)
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "b.jpg").read_bytes()[:200])
    options = ("--model", tiny_model, "--batch-size", 2, "--json", tmp_path / "r.json")
    code, out, err = ov3(capsys, "reconstruct", tmp_path, *options)
    assert code == 1
    expected = {"a": (64, 64), "b": (100, 70), "sub/c": (33, 90), "d": (64, 64), "e": (1, 1)}
    for name, size in expected.items():
        assert Image.open(tmp_path / f"{name}.reconstructed.png").size == size
    lines = err.splitlines()
    assert len(lines) == 4
    for name in ("cut.png", "empty.png", "text.jpg"):
        assert sum(str(tmp_path / name) in line for line in lines) == 1
    assert lines[-1].startswith("5 pictures in ") and " a second), 3 failed" in lines[-1]
    figures = json.loads((tmp_path / "r.json").read_text())
    assert (figures["done"], figures["failed"], len(figures["pictures"])) == (5, 3, 5)
    assert f"{figures['mean_psnr']:.2f} dB" in out
    assert not list(tmp_path.rglob("*.tmp*"))


def test_reconstructed_pixels_and_psnr_are_the_models(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path
) -> None:
    """A picture of 61 x 35 pixels is padded to 64 x 48 tokens' worth, and cropped back before it is scored."""
    path = picture(tmp_path / "a.png", 61, 35)
    assert ov3(capsys, "reconstruct", path, "--model", tiny_model, "--json", tmp_path / "r.json")[0] == 0
    model, images = OpenVision3.load(tiny_model), prepare(path, None, 1024)[0][None]
    assert images.shape == (1, 3, 48, 64)
    with torch.no_grad():
        decoded = model.decode(model.encode(images), grid=(3, 4))[0, :, :35, :61]
    expected = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    written = np.asarray(Image.open(tmp_path / "a.reconstructed.png"))
    np.testing.assert_array_equal(written, expected)
    error = np.mean((written.astype(float) - np.asarray(Image.open(path)).astype(float)) ** 2)
    figures = json.loads((tmp_path / "r.json").read_text())
    assert figures["pictures"][0]["psnr"] == pytest.approx(10 * np.log10(255**2 / error), abs=1e-4)
    assert figures["pictures"][0]["size"] == [61, 35]


def test_nothing_is_overwritten_unless_asked(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path
) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    (tmp_path / "a.reconstructed.png").write_text("mine")
    code, _, err = ov3(capsys, "reconstruct", tmp_path, "--model", tiny_model)
    assert code == 1
    assert (tmp_path / "a.reconstructed.png").read_text() == "mine"
    assert Image.open(tmp_path / "b.reconstructed.png").size == (64, 64)
    assert "a.reconstructed.png exists; left alone (--overwrite replaces)" in err
    code, _, err = ov3(capsys, "reconstruct", tmp_path, "--model", tiny_model, "--overwrite")
    assert code == 0, err
    assert Image.open(tmp_path / "a.reconstructed.png").size == (64, 64)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a.png", "a.reconstructed.png", "b.png", "b.reconstructed.png"
    ]  # fmt: skip
    (tmp_path / "r.json").write_text("{}")
    code, _, err = ov3(capsys, "reconstruct", tmp_path, "--model", tiny_model, "--json", tmp_path / "r.json")
    assert code == 2 and "r.json exists" in err and err.count("\n") == 1


def test_out_size_suffix_and_max_side(capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path) -> None:
    picture(tmp_path / "in" / "sub" / "wide.png", 200, 100)
    options = ("--model", tiny_model, "--out", tmp_path / "out")
    assert ov3(capsys, "reconstruct", tmp_path / "in", *options, "--size", 48, "--suffix", "-48.jpg")[0] == 0
    image = Image.open(tmp_path / "out" / "sub" / "wide-48.jpg")
    assert (image.size, image.format) == ((48, 48), "JPEG")
    assert ov3(capsys, "reconstruct", tmp_path / "in", *options, "--max-side", 100)[0] == 0
    assert Image.open(tmp_path / "out" / "sub" / "wide.reconstructed.png").size == (100, 50)


def test_bad_pictures_are_named_and_cost_exit_code_1(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path
) -> None:
    bomb = tmp_path / "bomb.png"  # 30,000 x 30,000 by its header
    header = b"IHDR" + struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    bomb.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)))
    truncated = tmp_path / "truncated.jpg"
    truncated.write_bytes(picture(tmp_path / "whole.jpg", 200, 200).read_bytes()[:2000])
    good = picture(tmp_path / "good.png")
    bad = [bomb, truncated, tmp_path / "missing.png"]
    code, _, err = ov3(capsys, "reconstruct", *bad, good, "--model", tiny_model)
    assert code == 1
    lines = err.splitlines()
    assert len(lines) == len(bad) + 1
    for path, line in zip(bad, lines, strict=False):
        assert line.startswith(f"ov3: {path}: ")
    assert (tmp_path / "good.reconstructed.png").exists()


def test_every_kind_of_picture_is_read(capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path) -> None:
    base = Image.open(picture(tmp_path / "rgb.png", 48, 32))
    picture(tmp_path / "narrow.png", 2000, 3)
    base.convert("CMYK").save(tmp_path / "cmyk.jpg")
    base.convert("P").save(tmp_path / "palette.gif", transparency=0)
    base.save(tmp_path / "animated.webp", save_all=True, append_images=[base.rotate(90)])
    Image.fromarray(np.asarray(base.convert("L")).astype(np.uint16) * 257).save(tmp_path / "deep.png")
    base.convert("LA").save(tmp_path / "grey_alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    base.save(tmp_path / "turned.jpg", exif=exif)
    code, _, err = ov3(capsys, "reconstruct", tmp_path, "--model", tiny_model)
    assert code == 0, err
    sizes = {p.name.split(".")[0]: Image.open(p).size for p in tmp_path.glob("*.reconstructed.png")}
    assert sizes.pop("turned") == (32, 48)
    assert sizes.pop("narrow") == (1024, 2)
    assert len(sizes) == 6 and set(sizes.values()) == {(48, 32)}


def test_an_output_that_cannot_be_written_fails_alone(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path
) -> None:
    picture(tmp_path / "in" / "a" / "x.png")
    picture(tmp_path / "in" / "b.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("a file where a folder is needed")
    code, _, err = ov3(capsys, "reconstruct", tmp_path / "in", "--model", tiny_model, "--out", tmp_path / "out")
    assert code == 1
    assert "x.png: cannot write" in err
    assert (tmp_path / "out" / "b.reconstructed.png").exists()


def test_encode_gives_the_models_tokens(capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path) -> None:
    paths = [picture(tmp_path / f"{i}.png", 75, 64, seed=i) for i in range(3)]
    assert ov3(capsys, "encode", *paths, "--model", tiny_model)[0] == 0
    model = OpenVision3.load(tiny_model)
    with torch.no_grad():
        tokens = model.encode(prepare(paths[2], 64, 1024)[0][None])
        embedding = model.pool(tokens)
    saved = load_file(tmp_path / "2.tokens.safetensors")
    torch.testing.assert_close(saved["tokens"], tokens[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(saved["embedding"], embedding[0], atol=1e-5, rtol=0)
    assert ov3(capsys, "encode", paths[0], "--model", tiny_model, "--native-size", "--overwrite")[0] == 0
    with safe_open(tmp_path / "0.tokens.safetensors", "pt") as file:
        assert file.metadata() == {"grid": "4x5", "size": "64x75", "model": str(tiny_model)}
        assert file.get_tensor("tokens").shape == (20, 32)


def test_caption_prints_a_line_a_picture(capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path) -> None:
    paths = [picture(tmp_path / f"{i}.png", 64 + i, 90, seed=i) for i in range(3)]
    options = ("--model", tiny_model, "--json", tmp_path / "c.json", "--num-beams", 2)
    code, out, err = ov3(capsys, "caption", tmp_path, *options)
    assert code == 0, err
    lines = [line.split("\t") for line in out.splitlines()]
    assert [line[0] for line in lines] == [str(path) for path in paths]
    model = OpenVision3.load(tiny_model)
    images = torch.stack([prepare(path, 64, 1024)[0] for path in paths])
    assert [line[1] for line in lines] == model.caption(images, num_beams=2)
    figures = json.loads((tmp_path / "c.json").read_text())
    assert [p["caption"] for p in figures["pictures"]] == [line[1] for line in lines]


def test_classify_ranks_labels(capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    options = ("--model", tiny_model, "--json", tmp_path / "c.json", "--templates", "a {}", "one {} here")
    code, out, err = ov3(capsys, "classify", path, "--labels", "panda, apple,car", *options, "--top", 2)
    assert code == 0, err
    ranked = json.loads((tmp_path / "c.json").read_text())["pictures"][0]["labels"]
    model = OpenVision3.load(tiny_model)
    names = ["panda", "apple", "car"]
    with torch.no_grad():
        image = model.embed_image(prepare(path, 64, 1024)[0][None])
        text = torch.stack([model.embed_text([f"a {n}", f"one {n} here"]).mean(0) for n in names])
        text = text / text.norm(dim=-1, keepdim=True)
        probabilities = (model.temperature() * image @ text.T).softmax(-1)[0]
    best = probabilities.argsort(descending=True)[:2].tolist()
    assert list(ranked) == [names[i] for i in best]
    assert list(ranked.values()) == pytest.approx(probabilities[best].tolist(), abs=1e-5)
    assert out.startswith(f"{path}\t{names[best[0]]} {probabilities[best[0]]:.3f}\t")


def test_labels_from_a_list_a_file_or_the_demo(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("red panda\n\n apple \napple\n")
    assert read_labels(str(tmp_path / "labels.txt"), "x") == ["red panda", "apple"]
    assert read_labels("a, b ,a", "x") == ["a", "b"]
    assert len(read_labels("", "demo")) == 494
    for labels in ("", " , "):
        with pytest.raises(OpenVisionError, match="label"):
            read_labels(labels, "x")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(OpenVisionError, match="UTF-8"):
        read_labels(str(tmp_path / "latin.txt"), "x")
    assert prompts_for("zebra crossing of no name") == ["a photo of a zebra crossing of no name"]
    with pytest.raises(OpenVisionError, match="no {} for the label"):
        prompts_for("a", ("no place",))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--size", "50"], "multiple of 16"),
        (["--batch-size", "0"], "--batch-size"),
        (["--device", "abacus"], "abacus"),
        (["--suffix", ".txt"], "--suffix"),
        (["--suffix", ".png"], "--suffix"),
        (["--dtype", "fp16"], "--dtype"),
    ],
)
def test_wrong_options_exit_2(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path, options: list[str], expected: str
) -> None:
    path = picture(tmp_path / "a.png")
    code, _, err = ov3(capsys, "reconstruct", path, "--model", tiny_model, *options)
    assert code == 2
    assert expected in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png"]


def broken_model(tiny_model: Path, folder: Path, how: str) -> Path:
    shutil.copytree(tiny_model, folder)
    weights = folder / "model.safetensors"
    if how == "without weights":
        weights.unlink()
    elif how == "wrong shape":
        tensors = load_file(weights)
        name = max(tensors, key=lambda key: tensors[key].ndim)
        save_file(tensors | {name: tensors[name][:1].clone()}, weights)
    elif how == "pickle":
        tensors = load_file(weights)
        weights.unlink()
        torch.save(tensors, folder / "model.safetensors")
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "misspelt field":
        config = json.loads((folder / "config.json").read_text())
        config["model"]["image_sise"] = 64
        (folder / "config.json").write_text(json.dumps(config))
    elif how == "empty folder":
        shutil.rmtree(folder)
        folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("without weights", "model.safetensors"),
        ("wrong shape", "shape"),
        ("pickle", "ov3 convert"),
        ("truncated", "model.safetensors"),
        ("misspelt field", "did you mean 'image_size'"),
        ("empty folder", ""),
    ],
)
def test_broken_models_exit_2_in_one_line(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path, how: str, expected: str
) -> None:
    folder = broken_model(tiny_model, tmp_path / "broken", how)
    path = picture(tmp_path / "a.png")
    code, _, err = ov3(capsys, "reconstruct", path, "--model", folder)
    assert code == 2
    assert err.count("\n") == 1 and "traceback" not in err
    assert expected in err


def test_a_missing_part_is_named(capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path) -> None:
    model = OpenVision3.load(tiny_model)
    config = replace(model.config, text_decoder=None, text_encoder=None)
    OpenVision3(config, model.vae).save(tmp_path / "vision")
    path = picture(tmp_path / "a.png")
    for command, part in ((["caption"], "text decoder"), (["classify", "--labels", "a,b"], "text encoder")):
        code, _, err = ov3(capsys, command[0], path, *command[1:], "--model", tmp_path / "vision")
        assert code == 2
        assert part in err


def test_convert_makes_a_pickled_folder_safe(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path
) -> None:
    folder = broken_model(tiny_model, tmp_path / "pickled", "pickle")
    code, _, err = ov3(capsys, "convert", folder, "--out", tmp_path / "safe")
    assert code == 0, err
    before, after = OpenVision3.load(tiny_model).state_dict(), OpenVision3.load(tmp_path / "safe").state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    code, _, err = ov3(capsys, "convert", folder, "--out", tmp_path / "safe")
    assert code == 2 and "exists already" in err
    assert ov3(capsys, "convert", folder, "--out", tmp_path / "safe", "--dtype", "bf16", "--overwrite")[0] == 0
    saved = load_file(tmp_path / "safe" / "model.safetensors")
    assert saved["encoder.class_token"].dtype == torch.bfloat16


def test_convert_never_runs_a_pickles_code(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path
) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "sprung",)

    folder = broken_model(tiny_model, tmp_path / "hostile", "without weights")
    torch.save({"encoder.class_token": Trap()}, folder / "weights.bin")
    code, _, err = ov3(capsys, "convert", folder, "--out", tmp_path / "safe")
    assert code == 2 and "weights.bin is refused" in err
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "safe").exists()


def test_a_released_checkpoint_is_described_and_converted_without_its_vae(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    released = Path(__file__).parent / "golden" / "released-format-tiny"
    code, out, err = ov3(capsys, "info", released)
    assert code == 0, err
    assert "has tokens\n" in out and "can't be loaded: " in out
    assert "positions: " in out
    assert ov3(capsys, "convert", released, "--out", tmp_path / "own")[0] == 0
    own, original = OpenVision3.load(tmp_path / "own", vae=None), load_released(released, vae=None)
    latents = torch.randn(1, own.config.in_channels, 8, 8)
    with torch.no_grad():
        assert torch.equal(own.encode_latents(latents), original.encode_latents(latents))
    code, _, err = ov3(capsys, "encode", picture(tmp_path / "a.png"), "--model", tmp_path / "own")
    assert code == 2 and "FLUX" in err and err.count("\n") == 1
