"""`ov3 bench data`: what it makes, measures and counts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openvision3 import cli
from openvision3.bench.feeding import BATCH, SIDES, Feed, device_demand, make_pictures, sample_parts, stream_rates
from openvision3.config import DataConfig
from openvision3.data.shards import open_source
from openvision3.data.tokenizer import demo_tokenizer
from openvision3.recipes import paper_b16


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"), 24)


def test_the_pictures_are_of_the_stated_sizes_and_always_the_same(pictures: Path, tmp_path: Path) -> None:
    assert make_pictures(tmp_path, 24).read_bytes() == pictures.read_bytes()
    source = open_source(DataConfig(source=str(pictures), shuffle=False), "train", 128)
    assert source.size == 24
    shapes = [source.read(position).image.shape for position in range(24)]
    assert all(SIDES[0] <= side <= SIDES[1] for shape in shapes for side in shape[:2])
    assert len(set(shapes)) > 20 and source.read(3).alt != source.read(3).caption


@pytest.mark.parametrize("kind", ["tar", "demo"])
def test_rates_and_parts_agree(pictures: Path, kind: str) -> None:
    """In one process, the parts make up the time of a sample that the stream takes, by the processor's clock."""
    tar = DataConfig(source=str(pictures), crop_min_area=0.4)
    feed = Feed(tar if kind == "tar" else DataConfig(), 64, demo_tokenizer())
    (rate,) = stream_rates(feed, (0,), 2 * BATCH, 2)
    parts = sample_parts(feed, BATCH, 2)
    whole = sum(part.median for part in (parts.read, parts.decode, parts.crop, parts.text))
    assert 0.5 < whole * rate.per_core.median / 1e3 < 1.5
    assert rate.workers == 0 and len(rate.per_second.values) == 2
    assert parts.decode.median > parts.crop.median >= 0 and parts.read.median > 0


def test_processor_time_of_workers_counts(pictures: Path) -> None:
    feed = Feed(DataConfig(source=str(pictures), crop_min_area=0.4), 64, demo_tokenizer())
    none, one = stream_rates(feed, (0, 1), 2 * BATCH, 1)
    assert 0.3 < one.per_core.median / none.per_core.median < 1.3


def test_fast_decoding_streams_the_same_samples_with_nearly_the_same_pixels(pictures: Path) -> None:
    feed = Feed(DataConfig(source=str(pictures), crop_min_area=0.4), 64, demo_tokenizer())
    fast = replace(feed, data=replace(feed.data, fast_decode=True))
    (exact,), (quick,), (again,) = (
        list(f.stream(f.open(), 0, 48, workers)) for f, workers in ((feed, 0), (fast, 0), (fast, 1))
    )
    assert exact.keys == quick.keys and torch.equal(quick.images, again.images)
    error = ((exact.images.double() - quick.images) ** 2).mean(dim=(1, 2, 3))
    assert error.max() < 255**2 / 10**4.5 and (error > 0).all()  # 45 dB


def test_the_device_rate_is_the_counted_one() -> None:
    """In orders of magnitude that docs/SCALING.md states: 0.27 TFLOPs to encode and twice 0.62 to decode, and B/16."""
    config = paper_b16()
    whole = device_demand(config, 256)
    assert whole.flops is not None and 1.7e12 < whole.flops < 2.2e12
    assert whole.rate == pytest.approx(0.4 * 989e12 / whole.flops)
    strided = device_demand(replace(config, loss=replace(config.loss, pixel_stride=8)), 256)
    assert strided.flops is not None and whole.flops - strided.flops == pytest.approx(7 / 8 * 2 * 0.62e12, rel=0.03)


def test_the_command_prints_and_writes(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    few = ["--resolution", "32", "--workers", "0", "--samples", "24", "--rounds", "1", "--recipe", "s16_1gpu"]
    given = ["bench", "data", str(pictures), *few, "--device-rate", "1000", "--json", str(path)]
    assert cli.main([*given, "--fast-decode", "False"]) == 0
    (figures,) = json.loads(path.read_text())["sources"]
    assert figures["resolution"] == 32 and figures["fast_decode"] is False and figures["crop_min_area"] == 0.4
    assert figures["cores"] == pytest.approx(1000 / figures["rates"][0]["per_core"]["median"])
    shown = capsys.readouterr().out
    assert "32 px, crops of 0.4 at least, fast_decode off" in shown
    assert f"1,000 samples/s (as given) needs {figures['cores']:.1f} such cores" in shown
    assert cli.main(given) == 2 and "pass --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--recipe", "demo_vae"), "expected a recipe that trains an encoder"),
        (("--recipe", "nothing"), "expected a recipe that trains an encoder"),
        (("--workers", "-1"), "--workers at least 0"),
        (("--crop-min-area", "0"), "more than 0 and at most 1"),
        (("--device-rate", "0"), "expected more than 0"),
        (("/nowhere/at/all.tar",), "/nowhere/at/all.tar"),
    ],
)
def test_impossible_wishes(more: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "data", *more]) == 2
    assert told in capsys.readouterr().err
