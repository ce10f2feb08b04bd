"""What the page's tabs do, with a tiny random model; hostile uploads; parts that a model lacks."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from evaluation_models import random_model
from PIL import Image

from openvision3.app import functions
from openvision3.config import OpenVisionError


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims so many pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def test_a_reconstruction_keeps_the_picture_and_noise_costs() -> None:
    model, picture = random_model(), noise(50, 37)
    clean, noisy = functions.reconstruct(model, picture), functions.reconstruct(model, picture, tau=2.0)
    assert clean.unified is not None and clean.vae is not None and noisy.unified is not None
    assert {clean.original.size, clean.vae.size, clean.unified.size} == {(50, 37)} and clean.tokens.size == (64, 48)
    assert np.array_equal(np.asarray(clean.original), np.asarray(picture))
    assert (clean.vae_psnr, noisy.vae_psnr)[0] == noisy.vae_psnr  # the noise is on the tokens alone
    assert not np.array_equal(np.asarray(clean.unified), np.asarray(noisy.unified))
    with pytest.raises(OpenVisionError, match="noise is nan: expected 0 to 2"):
        functions.reconstruct(model, picture, float("nan"))


def test_large_pictures_are_reduced() -> None:
    found = functions.reconstruct(random_model(), noise(1500, 30))
    assert found.unified is not None and found.unified.size == found.original.size == (512, 10)


def test_labels_are_ranked_and_counted() -> None:
    found = functions.zeroshot(random_model(), noise(40, 40), " panda\n\napple\npanda\n")
    assert list(found) == ["panda", "apple"] and sum(found.values()) == pytest.approx(1)
    for typed, message in (
        ("\n \n", "0 labels"),
        ("\n".join(map(str, range(201))), "201 labels: expected 1 to 200"),
        ("x" * 2001, "at most 2000 letters"),
    ):
        with pytest.raises(OpenVisionError, match=message):
            functions.zeroshot(random_model(), noise(40, 40), typed)


def test_a_caption_is_text() -> None:
    assert isinstance(functions.caption(random_model(), noise(40, 30)), str)
    with pytest.raises(OpenVisionError, match="beams is 9"):
        functions.caption(random_model(), noise(40, 30), 9)


def test_what_a_model_lacks_has_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("openvision3.generation.generator.DEMO_GENERATOR", tmp_path / "none")
    monkeypatch.setattr("openvision3.vlm.folder.DEMO_FOLDER", tmp_path / "none")
    model = random_model(decoder=None, text_encoder=None, text_decoder=None)
    parts = functions.load_parts(model, "demo", "demo")
    assert set(parts.reasons) == {"reconstruct", "caption", "zeroshot", "generate", "ask"}
    assert functions.reconstruct(model, noise(32, 32)).unified is None
    with pytest.raises(OpenVisionError, match="is no generator folder"):  # one that the user named
        functions.load_parts(model, str(tmp_path / "absent"), "demo")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (claims(8000, 8000), r"^up\.png: too large \(8000 x 8000 pixels\); at most 50 million pixels are read$"),
        (claims(200_000, 200_000), r"^up\.png: too large"),
        (b"", r"^up\.png: is empty$"),
        (b"#!/bin/sh\nexit 1\n" * 50, r"^up\.png: is not a picture of a known format$"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", r"^up\.png: is not a picture of a known format$"),
    ],
)
def test_hostile_uploads_give_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "up.png"
    path.write_bytes(content)
    with pytest.raises(OpenVisionError, match=message):
        functions.read_upload(path)


def test_truncated_and_missing_uploads(tmp_path: Path) -> None:
    file = io.BytesIO()
    noise(64, 64).save(file, "PNG")
    (tmp_path / "cut.png").write_bytes(file.getvalue()[:2000])
    for path, message in (
        (tmp_path / "cut.png", r"^cut\.png: can't be decoded"),
        (tmp_path / "no.png", r"^no\.png: can't be read$"),
        (None, "there is no picture yet"),
    ):
        with pytest.raises(OpenVisionError, match=message) as caught:
            functions.read_upload(path)
        assert str(tmp_path) not in str(caught.value)


def test_numbers_out_of_bounds_are_refused_before_the_generator() -> None:
    for changes, message in (
        ({"count": 9}, "number is 9: expected 1 to 8"),
        ({"seed": -1}, "seed is -1"),
        ({"steps": 10**6}, "steps is 1e"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"text": " "}, "say what to draw"),
    ):
        options = {"text": "a panda", "count": 1, "seed": 0, "guidance": 2.0, "steps": 4} | changes
        with pytest.raises(OpenVisionError, match=message):
            list(functions.generate(None, **options))  # type: ignore[arg-type]


def test_examples_come_with_a_question_about_the_first(tmp_path: Path) -> None:
    paths, question = functions.write_examples(tmp_path / "new", 32, count=2)
    assert [functions.read_upload(path).size for path in paths] == [(32, 32)] * 2
    assert question.startswith("is there") or question.startswith("Is there")
