"""Benches of encoding and captions, on small models: both sides must give the same before their times mean anything."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from openvision3 import cli
from openvision3.bench import encoding
from openvision3.bench.captions import measure_captions, random_decoder
from openvision3.bench.encoding import Difference, measure_encoding, released_like_model
from openvision3.config import OpenVisionError, TextDecoderConfig, TransformerConfig

CPU = torch.device("cpu")
DECODER = TextDecoderConfig(TransformerConfig(64, 2, 2, activation="gelu_tanh"), vocab_size=100, context_length=16)
SMALL_VAE = encoding.FLUX_ARCHITECTURE | {"block_out_channels": (32,) * 4, "layers_per_block": 1}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small encoder and autoencoder in the place of those of FLUX.1's and ViT-B's size, and short limits."""
    monkeypatch.setitem(encoding.SIZES, "B", TransformerConfig(64, 2, 2))
    monkeypatch.setattr(encoding, "FLUX_ARCHITECTURE", SMALL_VAE)
    monkeypatch.setattr(encoding, "limits", lambda *_: {"matrix product": encoding.Spread.of([1e9])})


@pytest.mark.skipif(importlib.util.find_spec("open_clip") is None, reason="needs openvision3[eval]")
def test_both_paths_give_the_same_tokens(small: None) -> None:
    model = released_like_model(image_size=64)
    found = measure_encoding(model, CPU, 64, batch_size=2, rounds=1)
    assert found.differences["ours fp32 from published fp32"].largest < 1e-4
    bf16 = found.differences["ours bf16 from published fp32"]
    assert bf16.largest > 1e-4 and bf16.cosine > 0.99  # it does compute in bf16
    assert next(model.parameters()).dtype == torch.float32
    assert set(found.seconds) == {"published fp32", "ours fp32", "published bf16", "ours bf16"}
    seconds = found.seconds["published bf16"].median / found.seconds["ours bf16"].median
    assert found.ratios["bf16"].median == pytest.approx(seconds)


def test_a_difference_is_measured_against_the_tokens() -> None:
    tokens = torch.tensor([[[3.0, 4.0], [0.0, 5.0]]])
    found = Difference.between(tokens + torch.tensor([0.0, 0.5]), tokens)
    assert (found.largest, found.mean) == (0.5, 0.25)
    assert found.rms == pytest.approx(12.5**0.5)
    assert found.lowest_cosine == pytest.approx((9 + 18) / 5 / (9 + 20.25) ** 0.5)


def test_captions_are_those_of_transformers() -> None:
    pytest.importorskip("transformers")
    found = measure_captions(DECODER, CPU, image_tokens=9, batch_size=3, length=12, rounds=1)
    assert found.same_ids == 1.0 and not found.refused
    assert set(found.seconds) == {"ours", "transformers, default cache", "transformers, static cache"}
    assert found.parameters["ours"] - found.parameters["transformers"] == 2 * 64  # the norm of the image tokens


def test_captions_that_transformers_has_not_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    with pytest.raises(OpenVisionError, match="cross"):
        random_decoder(replace(DECODER, image_input="prefix"))
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(OpenVisionError, match=r"openvision3\[vlm\]"):
        measure_captions(DECODER, CPU, 9, 1, 4, 1)


def test_the_command_writes_its_figures(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("open_clip")
    path = tmp_path / "figures.json"
    options = ["--size", "64", "--batch-size", "1", "--rounds", "1", "--device", "cpu", "--json", str(path)]
    assert cli.main(["bench", "encode", *options]) == 0
    assert json.loads(path.read_text())["ratios"]["bf16"]["median"] > 0
    assert "published over ours" in capsys.readouterr().out
    assert cli.main(["bench", "encode", *options]) == 2  # it exists
    assert cli.main(["bench", "encode", "--rounds", "0"]) == 2
    assert cli.main(["bench", "encode", "--captions", "--length", "1"]) == 2
