"""A cache of latents: what it holds, that any way to fill it gives the same bytes, that training reads it right."""

import hashlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import tarfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forks import Fork
from PIL import Image
from safetensors.torch import load_file
from tiny_run import make_vae, tiny_config

from openvision3 import cli
from openvision3.bench.feeding import make_pictures
from openvision3.config import DataConfig, OpenVisionError, SceneConfig, VAEConfig
from openvision3.data import samples as samples_module
from openvision3.data.batches import Batch, BatchStream
from openvision3.data.latent_cache import LatentCache, load_caching
from openvision3.data.latent_filling import begin_cache
from openvision3.data.shards import DemoSource, MixtureSource, TarSource, open_source
from openvision3.data.tokenizer import demo_tokenizer
from openvision3.data.transforms import from_uint8
from openvision3.distributed import World
from openvision3.training import setup
from openvision3.training.dryrun import dry_run
from openvision3.training.latents import check_latents, open_latents
from openvision3.training.loop import train
from openvision3.training.monitor import read_records
from openvision3.training.run_folder import RunInterrupted
from openvision3.training.stages import plan
from openvision3.vae import load_vae

SIDE = 32
COUNTS = (9, 5, 7)
BAD = (1, 3)  # tar and number of the sample whose picture is broken
NAMES = 30


def write_tar(path: Path, count: int, shift: int, bad: int = -1) -> None:
    """Pictures of different sizes; one may be no picture. The field `odd` is for filters."""
    with tarfile.open(path, "w") as archive:
        for i in range(count):
            width, height = 40 + 3 * (i % 4), 60 - 5 * (i % 3)
            coarse = np.random.Generator(np.random.PCG64([shift, i])).integers(0, 256, (5, 5, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "PNG")
            members = {
                "png": b"broken" if i == bad else buffer.getvalue(),
                "txt": f"alt {shift} {i}".encode(),
                "json": json.dumps({"caption": f"One {i}. Two {shift}.", "odd": i % 2}).encode(),
            }
            for ending, content in members.items():
                info = tarfile.TarInfo(f"s{i:03d}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> VAEConfig:
    return make_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tars")
    for number, count in enumerate(COUNTS):
        write_tar(folder / f"{number}.tar", count, number, BAD[1] if number == BAD[0] else -1)
    return folder


def arguments(source: Path | str, out: Path, vae: VAEConfig, *more: object) -> list[str]:
    options = ("--out", out, "--resolution", SIDE, "--vae", vae.source, "--device", "cpu", "--workers", 0)
    return [str(arg) for arg in ("data", "cache-latents", source, *options, *more)]


VIEWS = ("--views", 3, "--crop-min-area", 0.4, "--batch-size", 7)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tars: Path, vae: VAEConfig) -> Path:
    """Three views of each sample of the tars."""
    out = tmp_path_factory.mktemp("cache") / "c"
    assert cli.main(arguments(tars, out, vae, *VIEWS)) == 1  # one sample can't be used
    return out


def scenes_cache(out: Path, vae: VAEConfig, samples: int, *more: object, side: int = SIDE) -> Path:
    given = arguments("demo", out, vae, "--samples", samples, "--scenes.num-names", NAMES, *more)
    given[given.index("--resolution") + 1] = str(side)
    assert cli.main(given) == 0
    return out


def stream(source: Any, cache: LatentCache | None, start: int = 0, stop: int = 24, **options: Any) -> BatchStream:
    options = {"batch_size": 6, "contrastive_length": 16, "caption_length": 16, "seed": 5, **options}
    options |= {"max_bad_fraction": 1.0, "latents": cache}
    return BatchStream(source, demo_tokenizer(), SIDE, start=start, stop=stop, **options)


def rows(batches: Sequence[Batch]) -> dict[int, tuple[Any, ...]]:
    """What each position holds, but for the picture."""
    found: dict[int, tuple[Any, ...]] = {}
    for b in batches:
        assert b.latents is not None and b.latents.dtype == torch.bfloat16
        for i, position in enumerate(b.positions):
            tensors = (b.latents[i].view(torch.int16), b.alt_ids[i], b.caption_text_ids[i], b.caption_ids[i])
            found[position] = (b.keys[i], b.captions[i], *(t.numpy().tobytes() for t in tensors))
    return found


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("latents-*.safetensors"))}


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for bf16's eight bits."""
    torch.testing.assert_close(found.float(), expected.float(), rtol=2**-8, atol=1e-3)


def test_latents_and_boxes_are_those_of_the_crops(cache: Path, tars: Path, vae: VAEConfig) -> None:
    """Each view's latents are the VAE's of the picture cut by its box with Pillow, written out here."""
    source, model = TarSource(tars, shuffle=False), load_vae(vae)
    for number, count in enumerate(COUNTS):
        shard = load_file(cache / f"latents-{number:06d}.safetensors")
        assert shard["latents"].shape == (count, 3, 16, 4, 4) and shard["latents"].dtype == torch.bfloat16
        expected = [(number, i) != BAD for i in range(count)]
        assert shard["valid"].tolist() == expected
        areas = []
        for i in range(count):
            if not expected[i]:
                assert not shard["boxes"][i].any()
                continue
            encoded = source.read_picture(number, i).encoded
            assert encoded is not None
            picture = Image.fromarray(encoded.decode())
            for view in range(3):
                left, top, right, bottom = shard["boxes"][i, view].tolist()
                assert 0 <= left < right <= picture.width and 0 <= top < bottom <= picture.height
                areas.append((right - left) * (bottom - top) / (picture.width * picture.height))
                crop = picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
                pixels = from_uint8(torch.from_numpy(np.array(crop)).permute(2, 0, 1))[None]
                with torch.no_grad():
                    close(shard["latents"][i, view], model.encode(pixels)[0])
        assert min(areas) > 0.37 and len(set(areas)) > len(areas) * 0.8
    boxes = [load_file(path)["boxes"] for path in sorted(cache.glob("*.safetensors"))]
    assert not torch.equal(boxes[0][0], boxes[2][0])  # the same size, another tar


def test_a_stream_takes_a_view_by_seed_and_position_and_cuts_pictures_by_its_box(cache: Path, tars: Path) -> None:
    source, cached = TarSource(tars, DataConfig(seed=1)), LatentCache(cache)
    views: dict[str, set[bytes]] = {}
    for batch in stream(source, cached, 0, 120, pixel_stride=1):
        assert batch.latents is not None
        for i, position in enumerate(batch.positions):
            sample = source.read(position) if position not in [p for p, _, _ in batch.bad] else None
            if sample is None:
                continue
            shard = load_file(cache / f"latents-{sample.shard:06d}.safetensors")
            same = [torch.equal(batch.latents[i], shard["latents"][sample.number, view]) for view in range(3)]
            view = same.index(True)
            left, top, right, bottom = shard["boxes"][sample.number, view].tolist()
            box = (left, top, right, bottom)
            crop = Image.fromarray(sample.image).resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=box)
            assert np.array_equal(batch.images[i].permute(1, 2, 0).numpy(), np.array(crop))
            views.setdefault(f"{sample.shard} {sample.number}", set()).add(
                batch.latents[i].view(torch.int16).numpy().tobytes()
            )
    assert len(views) == sum(COUNTS) - 1
    assert sum(len(taken) for taken in views.values()) > 2 * len(views)  # other turns take other views


def test_batches_depend_on_seed_and_position_alone(cache: Path, tars: Path) -> None:
    """Whatever the start, batch, stride, workers and ranks; one broken sample among them."""
    source, cached = TarSource(tars, DataConfig(seed=1)), LatentCache(cache)
    whole = rows(list(stream(source, cached, 0, 48)))
    assert rows(list(stream(source, cached, 0, 48, num_workers=2, pixel_stride=5))) == whole
    assert rows(list(stream(source, cached, 0, 48, batch_size=8))) == whole
    assert rows(list(stream(source, cached, 24, 48))) == {p: row for p, row in whole.items() if p >= 24}
    other = rows(list(stream(source, cached, 0, 48, seed=6)))
    assert sum(other[p][2] != whole[p][2] for p in whole) > 20
    (one, *_), alone = (list(stream(source, cached, 0, 48, batch_size=24, pixel_stride=5)) for _ in range(2))
    shares = [
        list(stream(source, cached, 0, 48, batch_size=24, pixel_stride=5, rank=r, world_size=4)) for r in range(4)
    ]
    for batch, *parts in zip(alone, *shares, strict=True):
        assert rows(parts) == rows([batch])
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
    assert len(one.images) == 5  # samples 0, 5, 10, 15, 20 of 24
    assert [len(share[0].images) for share in shares] == [2, 1, 1, 1]
    again = pickle.loads(pickle.dumps(cached))  # as a spawned worker has it
    assert rows(list(stream(source, again, 0, 6))) == {p: row for p, row in whole.items() if p < 6}


def test_only_compared_pictures_are_decoded(cache: Path, tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    original = samples_module.decode_crops

    def counting(file: Any, name: str, *what: Any) -> Any:
        decoded.append(name)
        return original(file, name, *what)

    source, cached = TarSource(tars, DataConfig(filter=""), shuffle=False), LatentCache(cache)
    whole = [batch.images for batch in stream(source, cached, 0, 8, batch_size=8)]
    monkeypatch.setattr(samples_module, "decode_crops", counting)
    (batch,) = stream(source, cached, 0, 8, batch_size=8, pixel_stride=3)
    assert len(decoded) == 3
    assert torch.equal(batch.images, whole[0][[0, 3, 6]])
    assert batch.latents is not None and len(batch.latents) == len(batch.captions) == 8 and all(batch.captions)


def test_a_broken_picture_is_replaced_wherever_it_stands(cache: Path, tars: Path) -> None:
    """Compared or not, by the same substitute as on the fly."""
    source, cached = TarSource(tars, shuffle=False), LatentCache(cache)
    position = COUNTS[0] + BAD[1]
    told = {}
    for stride in (1, 5):
        batches = stream(source, cached, 0, 15, batch_size=15, pixel_stride=stride)
        told[stride] = next(iter(batches)).keys[position]
        assert [(p, key) for p, key, _ in batches.bad] == [(position, "1.tar/s003")]
    on_the_fly = next(iter(stream(source, None, 0, 15, batch_size=15))).keys[position]
    assert told[1] == told[5] == on_the_fly


def test_the_parts_of_a_mixture_find_their_tars(cache: Path, tars: Path) -> None:
    paths = tuple(str(tars / f"{number}.tar") for number in range(3))
    source = open_source(DataConfig(mixture=paths, weights=(1.0, 1.0, 2.0)), "train", SIDE)
    assert isinstance(source, MixtureSource)
    for batch in stream(source, LatentCache(cache), 0, 60):
        assert batch.latents is not None
        for i, position in enumerate(batch.positions):
            if position not in [p for p, _, _ in batch.bad]:
                part, at = source.order.find(position)
                number = source.sources[part].read(at).number
                stored = load_file(cache / f"latents-{part:06d}.safetensors")["latents"][number]
                assert any(torch.equal(batch.latents[i], view) for view in stored)


def ov3(args: list[str]) -> Fork:
    return Fork(["-m", "openvision3", *args], {**os.environ, "OMP_NUM_THREADS": "1"})


def test_killed_and_started_again_the_bytes_are_the_same(tmp_path: Path, vae: VAEConfig) -> None:
    """SIGKILL in the midst of the second of three blocks of scenes, then the same command."""
    whole = scenes_cache(tmp_path / "whole", vae, 2060, "--workers", 1)
    given = arguments("demo", tmp_path / "c", vae, "--samples", 2060, "--scenes.num-names", NAMES)
    process = ov3(given)
    first = tmp_path / "c" / "latents-000000.safetensors"
    begun: list[Path] = []
    while process.poll() is None and not begun:
        begun = list((tmp_path / "c").glob(".latents-000001.*.tmp.*")) if first.exists() else []
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and begun
    done = first.stat().st_mtime_ns
    with pytest.raises(OpenVisionError, match=r"has 1 of 3 shards: the same ov3 data cache-latents"):
        LatentCache(tmp_path / "c")
    assert cli.main(given) == 0
    assert shard_bytes(tmp_path / "c") == shard_bytes(whole)
    assert first.stat().st_mtime_ns == done  # was left alone
    assert not [path for path in (tmp_path / "c").iterdir() if ".tmp" in path.name or ".lock-0" in path.name]


def test_two_processes_share_the_tars(tmp_path: Path, cache: Path, tars: Path, vae: VAEConfig) -> None:
    """Each tar is done by one of them, both return when all are there, and the bytes are those of one process."""
    for number in range(3, 9):  # more to share
        (tmp_path / "tars").mkdir(exist_ok=True)
        write_tar(tmp_path / "tars" / f"{number}.tar", 60, number)
    alone = tmp_path / "alone"
    assert cli.main(arguments(tmp_path / "tars", alone, vae, *VIEWS)) == 0
    figures = [tmp_path / f"{i}.json" for i in range(2)]
    both = [ov3(arguments(tmp_path / "tars", tmp_path / "c", vae, *VIEWS, "--json", path)) for path in figures]
    for process in both:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert shard_bytes(tmp_path / "c") == shard_bytes(alone)
    assert sum(json.loads(path.read_text())["samples"] for path in figures) == 6 * 60


def test_a_filter_numbers_the_samples_that_it_keeps(tmp_path: Path, tars: Path, vae: VAEConfig) -> None:
    assert cli.main(arguments(tars, tmp_path / "c", vae, "--filter", "odd == 1")) == 1
    cached = LatentCache(tmp_path / "c")
    kept = TarSource(tars, DataConfig(filter="odd == 1"), shuffle=False)
    (batch,) = stream(kept, cached, 0, 8, batch_size=8)
    assert batch.latents is not None and batch.keys[:4] == ["s001", "s003", "s005", "s007"]
    with torch.no_grad():
        close(batch.latents, load_vae(vae).encode(from_uint8(batch.images)))
    with pytest.raises(OpenVisionError, match="made of other samples than 0.tar holds now"):
        list(stream(TarSource(tars, shuffle=False), LatentCache(tmp_path / "c"), 0, 6))


def test_fast_decoding_is_the_cache_s_and_the_stream_s(tmp_path: Path, vae: VAEConfig) -> None:
    tar = make_pictures(tmp_path, 6)
    assert cli.main([*arguments(tar, tmp_path / "c", vae, *VIEWS), "--fast-decode"]) == 0
    cached = LatentCache(tmp_path / "c")
    assert cached.caching.fast_decode
    source = TarSource(tar, shuffle=False)
    (fast,), (exact,) = (list(stream(source, cached, 0, 6, fast_decode=fast)) for fast in (True, False))
    assert not torch.equal(fast.images, exact.images)
    assert fast.latents is not None
    with torch.no_grad():
        close(fast.latents, load_vae(vae).encode(from_uint8(fast.images)))
    with pytest.raises(OpenVisionError, match="fast_decode True, not False"):
        begin_cache(tmp_path / "c", replace(cached.caching, fast_decode=False))


def test_a_run_from_before_there_was_fast_decoding_goes_on(
    tmp_path: Path, cache: Path, tars: Path, vae: VAEConfig
) -> None:
    """Its cache.json and the hash in its checkpoints lack the field."""
    old = tmp_path / "c"
    shutil.copytree(cache, old)
    made = json.loads((old / "cache.json").read_text())
    assert made.pop("fast_decode") is False
    (old / "cache.json").write_text(json.dumps(made))
    config = tiny_config(tmp_path, vae)
    data = replace(config.data, source=str(tars), crop_min_area=0.4, latents=str(old))
    fits = replace(config, data=data, stage2=replace(config.stage2, samples=0))
    expected = hashlib.sha256(json.dumps([made]).encode()).hexdigest()
    assert check_latents(fits, plan(fits), load_vae(vae)) == expected
    wrong = replace(fits, data=replace(data, fast_decode=True))
    with pytest.raises(OpenVisionError, match="fast_decode False, but stage 1 has True"):
        check_latents(wrong, plan(wrong), load_vae(vae))


def test_a_tar_that_changed_is_noticed(tmp_path: Path, cache: Path, tars: Path) -> None:
    for number, count in enumerate(COUNTS):
        write_tar(tmp_path / f"{number}.tar", count, number + (number == 2), BAD[1] if number == BAD[0] else -1)
    with pytest.raises(OpenVisionError, match="made of other samples than 2.tar"):
        list(stream(TarSource(tmp_path, shuffle=False), LatentCache(cache), 0, 20))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--views", 2, "--crop-min-area", 0.4), "views 3, not 2"),
        (("--views", 3, "--crop-min-area", 0.5), "crop_min_area 0.4, not 0.5"),
        (("--views", 3, "--crop-min-area", 0.4, "--seed", 7), "seed 0, not 7"),
        (("--views", 3, "--crop-min-area", 0.4, "--vae", "tiny"), "vae '"),
        (("--views", 2), "the centre square is the only crop"),
        (("--crop-min-area", 0), "more than 0"),
        (("--resolution", 36), "multiple of the VAE's 8"),
        (("--samples", 3), "are for demo"),
    ],
)
def test_other_settings_are_refused_in_one_line(
    cache: Path, tars: Path, vae: VAEConfig, more: tuple[object, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = shard_bytes(cache)
    assert cli.main(arguments(tars, cache, vae, *more)) == 2
    errors = capsys.readouterr().err
    assert told in errors and errors.startswith("ov3: ") and errors.count("\n") == 1
    assert shard_bytes(cache) == before


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, tars: Path, vae: VAEConfig) -> None:
    (tmp_path / "note.txt").write_text("mine")
    assert cli.main(arguments(tars, tmp_path, vae)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_what_does_not_fit_is_refused_before_training(tmp_path: Path, cache: Path, tars: Path, vae: VAEConfig) -> None:
    config = tiny_config(tmp_path / "run", vae)
    data = replace(config.data, source=str(tars), crop_min_area=0.4, latents=str(cache))
    fits = replace(config, data=data, stage2=replace(config.stage2, samples=0))
    check_latents(fits, plan(fits), load_vae(vae))
    check_latents(replace(fits, data=replace(data, seed=9)), plan(fits), load_vae(vae))  # the order's alone
    scenes = scenes_cache(tmp_path / "scenes", vae, 20)
    of_scenes = replace(config.data, latents=str(scenes))
    whole = replace(config, data=of_scenes, stage2=replace(config.stage2, samples=0))
    check_latents(whole, plan(whole), load_vae(vae))
    longer = replace(whole, stage1=replace(whole.stage1, samples=24))
    for wrong, told in (
        (replace(fits, stage2=config.stage2), "resolution 32, but stage 2 has 48"),
        (replace(fits, data=replace(data, crop_min_area=0.5)), "crop_min_area 0.4, but stage 1 has 0.5"),
        (replace(fits, data=replace(data, filter="odd == 1")), "filter '', but stage 1 has 'odd == 1'"),
        (
            replace(fits, data=replace(data, source=str(tars / "0.tar"))),
            r"source '3 tars, .* but stage 1 has '1 tar, 0.tar",
        ),
        (replace(fits, data=replace(data, source="demo")), "source '3 tars, .* but stage 1 has 'demo'"),
        (replace(whole, data=replace(of_scenes, seed=3)), "seed 0, but stage 1 has 3"),
        (replace(whole, data=replace(of_scenes, scenes=SceneConfig())), "scenes .*num_names=30.*num_names=494"),
        (longer, "the scenes 0 to 19, but stage 1 sees 0 to 23"),
        (replace(fits, data=replace(data, latents=str(tars))), "is no cache of latents"),
        (replace(fits, model=replace(fits.model, vae=VAEConfig())), "VAE .* but the run's is embedded, "),
        (replace(fits, model=replace(fits.model, input="pixels", in_channels=3, patch_size=16)), "reads pixels"),
    ):
        with pytest.raises(OpenVisionError, match=told):
            train(wrong, "cpu")
        assert not (tmp_path / "run" / "metrics.jsonl").exists()


def losses(folder: Path) -> dict[str, np.ndarray]:
    found = read_records(folder / "metrics.jsonl", "train")
    return {name: np.array([row[name] for row in found]) for name in ("total", "latent_l1", "pixel_l1", "caption")}


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_training_from_a_cache_is_training_on_the_fly(tmp_path: Path, vae: VAEConfig, micro_batch: int) -> None:
    """One view of whole scenes: the same losses but for bf16, in both stages."""
    steps, options = 6, {"micro_batch": micro_batch}
    plain = tiny_config(tmp_path / "plain", vae, steps, **options)
    first = scenes_cache(tmp_path / "c1", vae, 16)
    second = scenes_cache(tmp_path / "c2", vae, 8, "--first-scene", 16, side=48)
    data = replace(plain.data, latents=str(first))
    cached = replace(plain, data=data, stage2=replace(plain.stage2, latents=str(second)), out=str(tmp_path / "cached"))
    train(plain, "cpu")
    train(cached, "cpu")
    expected, found = losses(tmp_path / "plain"), losses(tmp_path / "cached")
    for name, values in expected.items():
        assert len(values) == steps
        np.testing.assert_allclose(found[name], values, rtol=5e-3, err_msg=name)
    assert not np.array_equal(found["latent_l1"], expected["latent_l1"])  # bf16: it was the cache that was read


def test_a_cached_run_goes_on_exactly_and_not_from_another_cache(
    tmp_path: Path, cache: Path, tars: Path, vae: VAEConfig
) -> None:
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)
    plain = tiny_config(tmp_path / "run", vae, 6, checkpoint_every=8, eval_every=8)
    data = DataConfig(source=str(tars), latents=str(copy), crop_min_area=0.4, num_workers=0, max_bad_fraction=0.5)
    other = replace(plain, data=data, stage2=replace(plain.stage2, samples=0))

    def stop(model: object, step: int) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    whole = replace(other, out=str(tmp_path / "unbroken"))
    train(whole, "cpu")
    with pytest.raises(RunInterrupted):
        train(other, "cpu", stop)
    described = json.loads((copy / "cache.json").read_text())
    (copy / "cache.json").write_text(json.dumps({**described, "views": described["views"] + 1}))
    with pytest.raises(OpenVisionError, match="the cached latents are others than when .* began"):
        train(other, "cpu")
    (copy / "cache.json").write_text(json.dumps(described))
    train(other, "cpu")
    for name, values in losses(tmp_path / "unbroken").items():
        np.testing.assert_array_equal(losses(tmp_path / "run")[name], values, err_msg=name)


def test_the_step_does_not_encode(tmp_path: Path, vae: VAEConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """And several ranks' steps see the pictures that are theirs."""
    cache = scenes_cache(tmp_path / "c", vae, 12)
    config = tiny_config(tmp_path / "run", vae)
    config = replace(
        config, data=replace(config.data, latents=str(cache)), stage1=replace(config.stage1, samples=12, batch_size=12)
    )
    stage = plan(replace(config, stage2=replace(config.stage2, samples=0)))[0]
    model = setup.build_model(config, torch.device("cpu"))
    assert model.vae is not None
    monkeypatch.setattr(type(model.vae), "encode", lambda *_: pytest.fail("encoded"))
    config = replace(config, loss=replace(config.loss, pixel_stride=5))
    objective = setup.build_objective(config, stage, model, "fp32")
    (whole,) = setup.open_stream(config, stage, 0, model.tokenizer)
    parts = list(objective._micro_batches(whole))
    assert [len(part.images) for part in parts] == [3]
    for rank in range(3):
        (share,) = setup.open_stream(config, stage, 0, model.tokenizer, rank, 3)
        objective.world, objective.micro_batch = World(rank, 3), 2
        shares = list(objective._micro_batches(share))
        for part in shares:
            at = range(part.start, part.start + 2)
            wanted = [index // 5 for index in at if index % 5 == 0]
            assert torch.equal(part.pixels, whole.images[wanted])
            assert part.latents is not None and whole.latents is not None
            assert torch.equal(part.latents, whole.latents[at.start : at.stop].float())


def test_the_trial_step_is_like_the_runs(tmp_path: Path, vae: VAEConfig) -> None:
    config = tiny_config(tmp_path / "run", vae)
    config = replace(config, data=replace(config.data, latents="somewhere"))
    batch = setup.trial_batch(config, plan(config)[0])
    assert batch.latents is not None and batch.latents.shape == (4, 16, 4, 4) and len(batch.images) == 2


def test_a_dry_run_counts_no_encoder_and_names_a_cache_that_is_missing(tmp_path: Path, vae: VAEConfig) -> None:
    config = tiny_config(tmp_path / "run", vae)
    cached = replace(config, data=replace(config.data, latents=str(tmp_path / "none")))
    told, plain = dry_run(cached, "cpu"), dry_run(config, "cpu")
    assert f"missing: latents: {tmp_path / 'none'} is no cache of latents" in told and "latents: " not in plain
    work, more = (re.findall(r"training FLOPs: .*", text) for text in (told, plain))
    assert len(work) == len(more) == 2 and not set(work) & set(more)


def test_scenes_are_described_without_being_drawn() -> None:
    source = DemoSource(DataConfig(seed=4), "train", SIDE)
    whole, texts = source.read(7), source.read_texts(7)
    assert texts.image.size == 0 and (texts.key, texts.alt, texts.caption) == (whole.key, whole.alt, whole.caption)


def test_a_broken_shard_gives_one_line(tmp_path: Path, vae: VAEConfig) -> None:
    cache = scenes_cache(tmp_path / "c", vae, 8)
    shard = cache / "latents-000000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    source = DemoSource(DataConfig(scenes=SceneConfig(num_names=NAMES)), "train", SIDE)
    with pytest.raises(OpenVisionError, match="no readable shard of latents"):
        list(stream(source, LatentCache(cache), 0, 6))
    (cache / "cache.json").write_text((cache / "cache.json").read_text().replace('version": 1', 'version": 2'))
    with pytest.raises(OpenVisionError, match="format_version 2, expected 1"):
        load_caching(cache)
    assert open_latents(tiny_config(tmp_path, vae), plan(tiny_config(tmp_path, vae))[0]) is None
