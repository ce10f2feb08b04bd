"""Indexes of many shards: where they come from, who makes them, and what a cache folder keeps of them."""

import multiprocessing
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_tars import picture, write_tar

from openvision3.commands import data as commands
from openvision3.commands.train import resolve
from openvision3.config import DataConfig, OpenVisionError, TrainConfig, differences, load_json, save_json
from openvision3.data import library as module
from openvision3.data.batches import BatchStream
from openvision3.data.catalogue import CATALOGUE, read_catalogue
from openvision3.data.filters import parse_filter
from openvision3.data.library import Library
from openvision3.data.shards import MixtureSource, TarSource, open_source
from openvision3.data.store import Location, Store
from openvision3.data.tar_index import TarIndex, index_path, save_index, scan
from openvision3.recipes import demo

COUNTS = [4, 7, 1, 6, 5, 3]


@pytest.fixture
def tars(tmp_path: Path) -> list[Path]:
    """Tars without an index; sample j of tar i has the caption "i.j" and the width 100 * j."""
    folder = tmp_path / "tars"
    folder.mkdir()
    found = []
    for i, count in enumerate(COUNTS):
        members: dict[str, bytes] = {}
        for j in range(count):
            members |= {f"{i}-{j}.png": picture(), f"{i}-{j}.txt": f"alt {i}.{j}".encode()}
            members[f"{i}-{j}.json"] = f'{{"caption": "{i}.{j}", "width": {100 * j}}}'.encode()
        found.append(write_tar(folder / f"{i}.tar", members))
    return found


def no_scan(path: Location, store: Store | None = None) -> TarIndex:
    raise AssertionError(f"{path} was gone through")


def keys(source: Any, positions: range) -> list[str]:
    return [source.read(position).key for position in positions]


def test_training_starts_without_an_index(tars: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the shards of the first window are gone through for the first sample; the next start needs none again."""
    config = DataConfig(seed=3, shuffle_window=2)
    whole = keys(TarSource(tars, config), range(60))
    scanned: list[Path] = []

    def recorded(path: Path, store: Store | None = None) -> TarIndex:
        scanned.append(path)
        return scan(path, store)

    monkeypatch.setattr(module, "scan", recorded)
    monkeypatch.setattr(TarSource, "_index_ahead", lambda self, number: None)
    source = TarSource(tars, config, cache=tmp_path / "cache")
    assert not scanned and source.size is None
    assert keys(source, range(1)) == whole[:1] and 2 <= len(scanned) < 6 and source.size is None
    assert keys(source, range(60)) == whole and sorted(scanned) == tars and source.size == 26
    assert not any(index_path(tar).exists() for tar in tars)  # beside the tars nothing is written
    monkeypatch.setattr(module, "scan", no_scan)
    again = TarSource(tars, config, cache=tmp_path / "cache")
    assert keys(again, range(59, 60)) == whole[59:]
    assert keys(again, range(60)) == whole


def test_the_next_window_is_indexed_ahead(tars: list[Path], tmp_path: Path) -> None:
    source = TarSource(tars, DataConfig(shuffle_window=2), cache=tmp_path / "cache")
    first = source.order.window_shards(0, 0)
    size = sum(COUNTS[number] for number in first)
    keys(source, range(size))
    deadline = 100
    while (source.library.counts[source.order.window_shards(0, 1)] < 0).any() and deadline:
        deadline -= 1
        module.time.sleep(0.05)
    assert (source.library.counts[source.order.window_shards(0, 1)] >= 0).all()


def _count(tars: list[Path], cache: Path, log: Path) -> None:
    def recorded(path: Path, store: Store | None = None) -> TarIndex:
        with log.open("a") as file:
            file.write(f"{path.name}\n")
        module.time.sleep(0.05)
        return scan(path, store)

    module.scan = recorded
    library = Library(tars, Store(), cache=cache)
    library.count(np.arange(len(tars)))
    assert library.counts.tolist() == COUNTS


def test_processes_share_the_work_of_indexing(tars: list[Path], tmp_path: Path) -> None:
    """Four processes that need all indexes at once: each is made once."""
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_count, args=(tars, tmp_path / "cache", log)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(log.read_text().split()) == [tar.name for tar in tars]


def test_a_filter_is_part_of_the_order(tars: list[Path], tmp_path: Path) -> None:
    """Each turn has every sample that is kept once, and no other; lazily or not, with index files or not."""
    config = DataConfig(filter="width >= 200 and width != 400", shuffle_window=2, seed=1)
    kept = {f"{i}-{j}" for i, count in enumerate(COUNTS) for j in range(count) if j >= 2 and j != 4}
    source = TarSource(tars, config)
    assert source.size == len(kept) == len(source)
    whole = keys(source, range(2 * len(kept)))
    assert set(whole[: len(kept)]) == set(whole[len(kept) :]) == kept
    assert keys(TarSource(tars, config, cache=tmp_path / "a"), range(2 * len(kept))) == whole
    assert commands.index((str(tars[0].parent),)) == 0
    assert keys(TarSource(tars, config, cache=tmp_path / "b"), range(2 * len(kept))) == whole
    assert len(TarSource(tars, DataConfig(), cache=tmp_path / "b")) == sum(COUNTS)  # caches are kept apart
    with pytest.raises(OpenVisionError, match="no samples that 'width > 5000' keeps"):
        TarSource(tars, DataConfig(filter="width > 5000"))
    with pytest.raises(OpenVisionError, match="no samples"):
        TarSource(tars, DataConfig(filter="width > 5000"), cache=tmp_path / "c").read(0)


def test_broken_json_has_no_fields_for_a_filter(tmp_path: Path) -> None:
    members = {"a.txt": b"x", "a.json": b"{", "b.txt": b"x", "b.json": b'{"w": 1}', "c.txt": b"x", "d.json": b"[1]"}
    tar = write_tar(tmp_path / "a.tar", members)

    def kept(condition: str) -> list[str]:
        return [entry.key for entry in Library([tar], Store(), parse_filter(condition), condition).index(0).entries]

    assert kept("w == 1") == ["b"] and kept("w == null") == ["a", "c", "d"]


def test_a_shard_that_changed_stops_the_run(tars: list[Path], tmp_path: Path) -> None:
    """Else the order would silently be another one."""
    cache = tmp_path / "cache"
    keys(TarSource(tars, cache=cache), range(26))
    write_tar(tars[2], {"new.png": picture(), "new.txt": b"x" * 9000, "more.png": picture(), "more.txt": b"x" * 9000})
    with pytest.raises(OpenVisionError, match=r"2.tar: has 2 samples, but had 1 when it was counted"):
        keys(TarSource(tars, cache=cache), range(26))


def test_a_shard_that_is_no_tar(tars: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where all tars are indexed at once it is an error; in a training it is named, and has no samples."""
    tars[3].write_bytes(b"junk" * 400)
    tars[4].write_bytes(b"")
    with pytest.raises(OpenVisionError, match=r"(3|4).tar: is (not a tar|empty)"):
        TarSource(tars)
    source = TarSource(tars, cache=tmp_path / "cache")
    assert len(set(keys(source, range(15)))) == 15 == len(source)
    assert [(path, "no samples" in why) for path, why in source.broken] == [(tars[3], True), (tars[4], True)]
    assert "3.tar: is not a tar" in caplog.text
    again = TarSource(tars, cache=tmp_path / "cache")
    assert keys(again, range(15)) == keys(source, range(15))
    tars[5].unlink()
    with pytest.raises(OpenVisionError, match="5.tar: no such file|no such tar"):
        keys(TarSource(tars, cache=tmp_path / "other"), range(26))


def test_counts_from_the_catalogue(tars: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With it, all tars are opened without one look into their indexes; of a tar that changed it is not believed."""
    assert commands.index((str(tars[0].parent),), workers=2) == 0
    place = tars[0].parent / CATALOGUE
    assert read_catalogue(place, Store())["1.tar"] == (tars[1].stat().st_size, 7)
    loaded: list[Path] = []
    load: Callable[..., Any] = module.load_index

    def recorded(path: Path, *args: Any, **options: Any) -> TarIndex | None:
        loaded.append(path)
        return load(path, *args, **options)

    monkeypatch.setattr(module, "load_index", recorded)
    source = TarSource(tars)
    assert source.size == 26 and not loaded
    whole = tars[1].read_bytes()
    tars[1].write_bytes(whole[:-12_000])
    assert commands.index((str(tars[1]),)) == 1  # cut short: its old count is not kept
    assert sorted(read_catalogue(place, Store())) == ["0.tar", "2.tar", "3.tar", "4.tar", "5.tar"]
    tars[1].write_bytes(whole)
    write_tar(tars[2], {f"{i}.txt": b"x" * 2000 for i in range(9)})
    save_index(scan(tars[2]))
    assert TarSource(tars).size == 26 + 8
    for junk in (b"", b"[]", b'{"format_version": 1}', b'{"format_version": 1, "tars": {"1.tar": ["a", 7]}}',
                 b'{"format_version": 1, "tars": {"1.tar": [5000, -7]}}', b"[" * 100_000, b"\xff"):  # fmt: skip
        place.write_bytes(junk)
        assert read_catalogue(place, Store()) == {} and TarSource(tars).size == 26 + 8


def test_a_counts_file_that_is_broken_is_made_anew(tars: list[Path], tmp_path: Path) -> None:
    whole = keys(TarSource(tars, cache=tmp_path), range(26))
    (counts,) = tmp_path.glob("*/counts")
    whole_file = counts.read_bytes()
    for junk in (b"", b"junk", whole_file[:-8], bytes(len(whole_file)), whole_file[:-24] + bytes(24)):
        (tmp_path / "junk").write_bytes(junk)
        (tmp_path / "junk").replace(counts)
        assert keys(TarSource(tars, cache=tmp_path), range(26)) == whole


def test_mixtures(tars: list[Path], tmp_path: Path) -> None:
    folder = tars[0].parent
    config = DataConfig(mixture=(f"{folder}/{{0,1,2}}.tar", "demo", f"{folder}/{{3..5}}.tar"), weights=(1.0, 1.0, 2.0))
    source = open_source(config, "train", 16, tmp_path / "cache")
    assert isinstance(source, MixtureSource) and source.size is None
    held = keys(source, range(400))
    scenes = [key for key in held if key.startswith("train-0-")]
    assert scenes == [f"train-0-{i:09d}" for i in range(len(scenes))] and 70 < len(scenes) < 130
    assert 160 < sum(key[0] in "345" and not key.startswith("t") for key in held) < 240
    own = [key for key in held if key[0] in "012"]
    assert own == keys(TarSource(f"{folder}/{{0,1,2}}.tar", config), range(len(own)))
    for changes in ({"weights": (1.0,)}, {"weights": (1.0, 1.0, 0.0)}, {"mixture": ()}):
        with pytest.raises(OpenVisionError, match="weights"):
            open_source(DataConfig(**{"mixture": config.mixture, "weights": config.weights, **changes}), "train", 16)


def test_the_command_lines_flags_reach_the_data(tars: list[Path], tmp_path: Path) -> None:
    """Flags of `ov3 train`, by way of the run's config.json, to the samples."""
    folder = tars[0].parent
    text = ["--data.alt-key", "", "--data.caption-field", "caption", "--data.filter", "width >= 100"]
    mixture = ["--data.mixture", f"{folder}/{{0,1}}.tar", f"{folder}/2.tar", "--data.weights", "3", "1"]
    config = resolve(demo(), [*text, *mixture, "--data.store-attempts", "3"]).config
    save_json(config, tmp_path / "config.json")
    data = load_json(TrainConfig, tmp_path / "config.json").data
    assert data == config.data and data.weights == (3.0, 1.0) and len(data.sources) == 2
    sample = open_source(replace(data, mixture=data.mixture[:1], weights=(1.0,)), "train", 16).read(0)
    assert sample.alt == sample.caption and sample.meta["width"] >= 100
    changed = {name: again for name, _, _, again in differences(config.data, DataConfig(scenes=config.data.scenes))}
    assert changed == {"mixture": False, "weights": False, "filter": False, "alt_key": False, "store_attempts": True}


def test_a_store_is_not_asked_again_and_again_while_another_process_indexes(
    tars: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thousands of processes may wait for a window's index: each looks once for an index beside each tar."""
    cache, looked = tmp_path / "cache", []
    library = Library(tars, Store(), cache=cache)
    load: Callable[..., Any] = module.load_index

    def recorded(path: Path, store: Store | None = None, at: Location | None = None) -> TarIndex | None:
        if at is None:
            looked.append(path)
        return load(path, store, at=at)

    monkeypatch.setattr(module, "load_index", recorded)
    monkeypatch.setattr(module, "POLL", 0.01)
    assert library.cache is not None
    locks = [module.FileLock(library.cache / "locks" / f"{number}.lock") for number in range(len(tars))]
    for lock in locks:
        lock.acquire()
    thread = threading.Thread(target=library.count, args=(np.arange(len(tars)),), daemon=True)
    thread.start()
    module.time.sleep(0.5)
    assert thread.is_alive() and sorted(looked) == tars
    for lock in locks:
        lock.release()
    thread.join(30)
    assert library.counts.tolist() == COUNTS


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_bad_samples_stop_a_run_without_an_index(tmp_path: Path, num_workers: int) -> None:
    """The workers count the shards; the process that judges learns of it."""
    for i in range(4):
        members: dict[str, bytes] = {}
        for j in range(50):
            members |= {f"{i}-{j}.png": picture() if j else b"junk", f"{i}-{j}.txt": b"x"}
        write_tar(tmp_path / f"{i}.tar", members)
    source = TarSource(tmp_path, DataConfig(shuffle_window=2), cache=tmp_path / "cache")
    stream = BatchStream(source, None, 8, 10, 0, 800, contrastive_length=0, caption_length=0, num_workers=num_workers)
    with pytest.raises(OpenVisionError, match="of all 200 samples|of 1?[0-9]0 samples"):
        list(stream)
    assert stream.seen <= 200
