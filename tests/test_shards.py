"""Tars of samples: written, indexed, read in any order, and what happens to broken ones."""

import json
import multiprocessing
import os
import signal
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_tars import picture, write_tar

from openvision3.commands import data as commands
from openvision3.commands.batching import OutputOptions
from openvision3.config import DataConfig, OpenVisionError, SceneConfig
from openvision3.data import demo
from openvision3.data.samples import BadSample, Sample
from openvision3.data.shards import DemoSource, TarSource, open_source
from openvision3.data.store import expand
from openvision3.data.tar_index import index_path, load_index, open_index, save_index, scan
from openvision3.data.writing import write_shards

SIZE = 32


def demo_samples(count: int, seed: int = 0, size: int = SIZE) -> Iterator[Sample]:
    source = DemoSource(DataConfig(seed=seed), "train", size)
    return (source.read(i) for i in range(count))


def same(a: Sample, b: Sample) -> bool:
    texts = (a.key, a.alt, a.caption, a.meta) == (b.key, b.alt, b.caption, b.meta)
    return texts and np.array_equal(a.image, b.image)


def reason(path: Path, **config: Any) -> str:
    """Why the only sample of a tar is bad."""
    with pytest.raises(BadSample) as caught:
        TarSource(path, DataConfig(**config)).read(0)
    assert "\n" not in str(caught.value) and caught.value.key == f"{path.name}/a"
    return caught.value.reason


def test_rendering_on_the_fly_equals_reading_the_tars(tmp_path: Path) -> None:
    """Same seed, same range: the same pictures, texts and questions, to the last bit."""
    assert write_shards(demo_samples(25), tmp_path / "out", samples_per_shard=10) == 25
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == [f"00000{i}.{ending}" for i in range(3) for ending in ("idx.json", "tar")]
    config = DataConfig(source=str(tmp_path / "out"), shuffle=False)
    tars, rendered = open_source(config, "train", SIZE), open_source(DataConfig(), "train", SIZE)
    assert tars.size == 25 and rendered.size is None
    for position in range(25):
        assert same(tars.read(position), rendered.read(position))
    assert same(tars.read(26), rendered.read(1))


def test_jpg_tars(tmp_path: Path) -> None:
    write_shards(demo_samples(3), tmp_path / "out", image_format="jpg")
    for position, expected in enumerate(demo_samples(3)):
        sample = TarSource(tmp_path / "out", shuffle=False).read(position)
        assert sample.image.shape == (SIZE, SIZE, 3) and sample.caption == expected.caption
        assert np.abs(sample.image.astype(int) - expected.image).mean() < 8


def test_order_is_another_permutation_each_turn(tmp_path: Path) -> None:
    write_shards(demo_samples(12), tmp_path / "out", samples_per_shard=5)
    source = TarSource(tmp_path / "out", DataConfig(seed=4))
    keys = [source.read(position).key for position in range(36)]
    turns = [keys[i : i + 12] for i in (0, 12, 24)]
    assert len(set(map(tuple, turns))) == 3 and all(sorted(turn) == sorted(turns[0]) for turn in turns)
    again = TarSource(tmp_path / "out", DataConfig(seed=4))
    assert [again.read(position).key for position in reversed(range(36))] == keys[::-1]
    other = TarSource(tmp_path / "out", DataConfig(seed=5))
    assert [other.read(position).key for position in range(12)] != turns[0]
    # the order is part of what a resumed run relies on: it must never change
    assert [int(key[-2:]) for key in turns[0]] == [3, 7, 5, 11, 1, 9, 4, 6, 8, 10, 0, 2]


def test_only_training_is_shuffled(tmp_path: Path) -> None:
    write_shards(demo_samples(12), tmp_path / "out")
    source = open_source(DataConfig(source=str(tmp_path / "out")), "val", SIZE)
    assert [int(source.read(i).key[-2:]) for i in range(12)] == list(range(12))


def test_benchmark_split_is_fixed() -> None:
    """Whatever the run's own scenes and seed are, "scenes-v1" is the frozen thousand."""
    source = open_source(DataConfig(seed=7, scenes=SceneConfig(num_names=10)), demo.BENCHMARK, SIZE)
    assert source.size == 1000
    expected = demo.scene(SceneConfig(), demo.BENCHMARK, 1000, 3)
    assert source.read(3).key == expected.key == source.read(1003).key
    assert source.read(3).meta["things"] == [vars(thing) for thing in expected.things]


def test_samples_without_index_are_found_by_a_scan(tmp_path: Path) -> None:
    write_shards(demo_samples(4), tmp_path / "out")
    (tar,) = (tmp_path / "out").glob("*.tar")
    indexed = load_index(tar)
    assert indexed is not None and indexed == scan(tar)
    index_path(tar).unlink()
    assert load_index(tar) is None and open_index(tar) == indexed
    assert not index_path(tar).exists()  # reading writes nothing


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_scan_agrees_with_tarfile(tmp_path: Path, format: int) -> None:
    """Long names, non-ASCII names, folders and names of several dots, in the three formats."""
    names = ["a.txt", "dir/b.jpg", "dir/b.txt", "x.seg.png", "y" * 90 + "/" + "z" * 90 + ".txt"]
    names += [] if format == tarfile.USTAR_FORMAT else ["n" * 300 + ".txt", "ü" * 150 + ".json"]
    path = write_tar(tmp_path / "a.tar", {name: name.encode() * 40 for name in names}, format)
    found = scan(path)
    assert not found.broken
    with tarfile.open(path) as tar:
        expected = {member.name: (member.offset_data, member.size) for member in tar}
    places = {f"{e.key}.{extension}": place for e in found.entries for extension, place in e.members.items()}
    assert places == expected and list(expected) == names
    assert [(e.key, list(e.members)) for e in found.entries][:3] == [
        ("a", ["txt"]), ("dir/b", ["jpg", "txt"]), ("x", ["seg.png"]),
    ]  # fmt: skip


def test_folders_links_and_hidden_files_are_no_samples(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (
            ("d", tarfile.DIRTYPE),
            ("l.txt", tarfile.SYMTYPE),
            (".x", tarfile.REGTYPE),
            ("a.txt", tarfile.REGTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd" if kind == tarfile.SYMTYPE else ""
            tar.addfile(info)
    assert [entry.key for entry in scan(path).entries] == ["a"]


def test_folders_and_links_that_claim_a_size_have_no_content(tmp_path: Path) -> None:
    """As some writers have them, and as Python's tarfile reads them."""
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        for name, kind, size in (("d", tarfile.DIRTYPE, 4096), ("l.txt", tarfile.LNKTYPE, 700), ("a.txt", b"0", 3)):
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, size
            file.write(info.tobuf(tarfile.USTAR_FORMAT))
        file.write(b"abc" + bytes(509 + 1024))
    with tarfile.open(path) as tar:
        assert tar.getnames() == ["d", "l.txt", "a.txt"]
    assert scan(path).entries[0].members == {"txt": (1536, 3)} and not scan(path).broken


def test_stale_or_broken_indexes_are_not_used(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.txt": b"one"})
    good = json.loads(Path(save_index(scan(path))).read_text())
    assert load_index(path) is not None
    changes: list[dict[str, Any]] = [
        {"tar_size": 1},
        {"format_version": 99},
        {"sizes": [10**9]},
        {"offsets": [-512]},
        {"offsets": [0]},  # in the tar, but not where the member is: the checksum tells
        {"offsets": [2**70]},
        {"offsets": [512, 512]},
        {"kinds": [1]},
        {"members": [2]},
        {"keys": [5]},
        {"keys": ["b"]},
        {"extensions": ["jpg"]},
        {"crc32": None},
        {"keys": None},
    ]
    for change in changes:
        index_path(path).write_text(json.dumps({**good, **change}))
        assert load_index(path) is None, change
        assert open_index(path).entries[0].members == {"txt": (512, 3)}
    index_path(path).write_bytes(b"\xff\xfe")
    assert load_index(path) is None
    index_path(path).write_text("[" * 100_000)
    assert load_index(path) is None


@pytest.mark.parametrize("cut", [100, 511, 513, 900, 1400, 2000, 2600, 3100])
def test_a_tar_cut_short_gives_its_whole_samples(tmp_path: Path, cut: int) -> None:
    """Cut at `cut` bytes before the end of the members: whole samples stay, and the break is reported."""
    image = picture()
    members = {f"{key}.{ending}": content for key in "abc" for ending, content in (("png", image), ("txt", b"x" * 600))}
    path = write_tar(tmp_path / "a.tar", members)
    entries = scan(path).entries
    end = entries[-1].members["txt"][0] + 1024
    path.write_bytes(path.read_bytes()[: end - cut])
    index = scan(path)
    assert "cut short" in index.broken
    assert index.entries == [e for e in entries if all(o + n <= end - cut for o, n in e.members.values())]
    assert 1 <= len(index.entries) <= 3
    source = TarSource(path)
    assert source.broken == [(path, index.broken)]
    for position in range(len(source)):
        assert source.read(position).alt == "x" * 600


def test_every_cut_is_safe(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.png": picture(), "a.txt": b"one", "b.png": picture(), "b.txt": b"two"})
    whole = path.read_bytes()
    end = scan(path).entries[-1].members["txt"][0] + 3
    for cut in range(0, len(whole), 97):
        path.write_bytes(whole[:cut])
        try:
            index = scan(path)
        except OpenVisionError:
            assert cut < 1024
            continue
        assert all(o + n <= cut for entry in index.entries for o, n in entry.members.values())
        assert bool(index.broken) == (cut < -(-end // 512) * 512 + 512)


def test_no_tar_at_all(tmp_path: Path) -> None:
    cases = {
        "a.tar": (b"", "is empty"),
        "b.tar": (b"this is text" * 100, "is not a tar"),
        "c.tar": (b"\x1f\x8b" + bytes(600), "compressed"),
        "d.tar": (b"x", "is not a tar"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(OpenVisionError, match=message):
            scan(tmp_path / name)
    with pytest.raises(OpenVisionError, match="no such file"):
        scan(tmp_path / "none.tar")
    write_tar(tmp_path / "nothing.tar", {})
    with pytest.raises(OpenVisionError, match="no samples"):
        TarSource(tmp_path / "nothing.tar")


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 5119), st.integers(0, 255)), min_size=1, max_size=12))
def test_broken_headers_are_safe(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    """Whatever the bytes, a scan ends with places inside the file, or with the one error."""
    path = write_tar(tmp_path / "a.tar", {"n" * 200 + ".txt": b"1", "a.json": b"2" * 700}, tarfile.PAX_FORMAT)
    data = bytearray(path.read_bytes())
    for at, value in changes:
        data[at] = value
    path.write_bytes(data)
    try:
        index = scan(path)
    except OpenVisionError:
        return
    assert all(o >= 0 and o + n <= len(data) for entry in index.entries for o, n in entry.members.values())


def test_a_damaged_header_ends_the_tar(tmp_path: Path) -> None:
    """One flipped bit in the third header: its checksum gives it away, the samples before it stay."""
    path = write_tar(tmp_path / "a.tar", {"a.txt": b"1", "b.txt": b"2", "c.txt": b"3"})
    data = bytearray(path.read_bytes())
    data[2 * 1024] ^= 1
    path.write_bytes(data)
    index = scan(path)
    assert [entry.key for entry in index.entries] == ["a", "b"]
    assert index.broken == "no member's header at byte 2048"


def test_a_header_with_a_huge_size_is_safe(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    info = tarfile.TarInfo("a.txt")
    info.size = 2**60
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(OpenVisionError, match="is not a tar"):
        scan(path)


def test_texts_of_a_sample(tmp_path: Path) -> None:
    """Alt text and caption come from where the config says; where one is missing or empty the other stands in."""
    image = picture()

    def read(members: dict[str, bytes], **config: Any) -> tuple[str, str]:
        sample = TarSource(write_tar(tmp_path / "a.tar", {"a.png": image, **members}), DataConfig(**config)).read(0)
        return sample.alt, sample.caption

    both = {"a.txt": b" an\n alt ", "a.json": b'{"caption": "A caption.", "re": "Re."}'}
    assert read(both) == ("an alt", "A caption.")
    assert read(both, caption_field="re") == ("an alt", "Re.")
    assert read(both, caption_field="none") == ("an alt", "an alt")
    assert read({"a.txt": b"alt"}) == ("alt", "alt")
    assert read({"a.json": b'{"caption": "only"}'}) == ("only", "only")
    assert read({"a.alt": b"x", "a.txt": b"y"}, alt_key="alt") == ("x", "x")
    assert read({"a.ALT": b"x", "a.txt": b"y"}, alt_key="ALT", image_key="PNG") == ("x", "x")
    assert read({"a.txt": b"x", "a.Syn": b"y"}, caption_field=".Syn", image_key=".png") == ("x", "y")
    assert read({"a.txt": b"x", "a.caption": bytes(2 * 2**20)}) == ("x", "x")  # a field's name, not this member's
    assert read({"a.txt": b"", "a.json": b'{"caption": "only"}'}) == ("only", "only")
    assert read({"a.txt": b"alt", "a.json": b'{"caption": null}'}) == ("alt", "alt")
    assert read({"a.txt": "été".encode()}) == ("été", "été")
    assert read({"a.txt": b"x" * 10_000}) == ("x" * 10_000, "x" * 10_000)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "no caption"),
        ({"a.txt": b"  \n"}, "no caption"),
        ({"a.txt": b"", "a.json": b'{"caption": ""}'}, "no caption"),
        ({"a.txt": b"caf\xe9"}, "txt is not UTF-8"),
        ({"a.txt": b"x" * 10_001}, "txt has 10001 letters"),
        ({"a.txt": b"x" * 2_000_000}, "txt has 2000000 bytes"),
        ({"a.txt": b"x", "a.json": b"{"}, "json is broken"),
        ({"a.txt": b"x", "a.json": b"[1]"}, "not a table"),
        ({"a.txt": b"x", "a.json": b"\xff"}, "json is not UTF-8"),
        ({"a.txt": b"x", "a.json": b"[" * 100_000}, "json is broken"),
        ({"a.txt": b"x", "a.json": b'{"caption": 5}'}, "caption is int"),
        ({"a.txt": b"x", "a.json": json.dumps({"caption": "x" * 10_001}).encode()}, "caption has 10001 letters"),
    ],
)
def test_bad_texts(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    assert message in reason(write_tar(tmp_path / "a.tar", {"a.png": picture(), **members}))


def test_bad_pictures(tmp_path: Path) -> None:
    jpg = picture("JPEG")
    cases = {
        "has no picture": {},
        "its jpg: can't be decoded": {"a.jpg": jpg[: len(jpg) // 2]},
        "its png: is not a picture": {"a.png": b"text"},
        "its webp: is empty": {"a.webp": b""},
    }
    for message, members in cases.items():
        assert message in reason(write_tar(tmp_path / "a.tar", {**members, "a.txt": b"x"}))


def test_expand(tmp_path: Path) -> None:
    for i in range(12):
        write_tar(tmp_path / f"{i:03d}.tar", {"a.txt": b""})
    (tmp_path / "notes.txt").touch()
    every = [tmp_path / f"{i:03d}.tar" for i in range(12)]
    assert expand(tmp_path) == expand(str(tmp_path)) == expand(f"{tmp_path}/*.tar") == every
    assert expand(f"{tmp_path}/{{000..011}}.tar") == every
    assert expand(f"{tmp_path}/{{003,001}}.tar") == [every[3], every[1]]
    assert expand(f"{tmp_path}/{{00,01}}{{0..1}}.tar") == [every[0], every[1], every[10], every[11]]
    assert expand([every[2], str(every[5])]) == [every[2], every[5]]
    for missing in (f"{tmp_path}/none.tar", f"{tmp_path}/{{010..012}}.tar", f"{tmp_path}/x*.tar", []):
        with pytest.raises(OpenVisionError, match="no such tar|no tars given"):
            expand(missing)


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_shards(demo_samples(2), out)
    with pytest.raises(OpenVisionError, match="--overwrite"):
        write_shards(demo_samples(3), out)
    assert len(TarSource(out)) == 2
    write_shards(demo_samples(3), out, overwrite=True)
    assert len(TarSource(out)) == 3
    (out / "thesis.doc").touch()
    with pytest.raises(OpenVisionError, match="other files"):
        write_shards(demo_samples(1), out, overwrite=True)
    assert (out / "thesis.doc").exists() and len(TarSource(out)) == 3


def _endless(out: Path) -> None:
    source = DemoSource(DataConfig(), "train", 16)
    write_shards((source.read(i) for i in range(10**9)), out, samples_per_shard=5)


def test_a_broken_off_write_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    """Killed in the middle of writing: no half-written folder, and the same command works again."""
    out = tmp_path / "out"
    writer = multiprocessing.get_context("fork").Process(target=_endless, args=(out,))
    writer.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "out.partial" / "000002.tar").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    assert [file.name for file in tmp_path.iterdir()] == ["out.partial"]
    write_shards(demo_samples(2), out)
    assert [file.name for file in tmp_path.iterdir()] == ["out"] and len(TarSource(out)) == 2


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """make-demo, index and check: exit codes, and each unusable sample named on stderr."""
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    assert commands.make_demo(out, samples=6, seed=2, size=32) == 0
    assert [s.key for s in (TarSource(out, shuffle=False).read(i) for i in (0, 5))] == [
        "train-2-000000000",
        "train-2-000000005",
    ]
    assert commands.check((str(out),)) == 0
    assert "6 samples in 1 tars, 0 unusable" in capsys.readouterr().out
    bad = write_tar(out / "bad.tar", {"a.png": picture(), "a.txt": b"x", "b.png": b"junk", "b.txt": b"x"})
    bad.write_bytes(bad.read_bytes()[: 512 * 8])
    assert commands.check((str(out),), output=OutputOptions(json=figures)) == 1
    captured = capsys.readouterr()
    assert "1 have no caption text (--caption-field caption): their other text stands in" in captured.out
    said = captured.err
    assert f"{bad}/b: its png: is not a picture" in said and f"{bad}: cut short" in said
    found = json.loads(figures.read_text())
    assert (found["without_alt"], found["without_caption"]) == (0, 1)
    assert found["bad"] == [[f"{bad}/b", "its png: is not a picture of a known format"]]
    (out / "junk.tar").write_bytes(b"junk")
    assert commands.index((str(out / "junk.tar"), str(out / "000000.tar"))) == 1
    assert "junk.tar: is not a tar" in capsys.readouterr().err and load_index(out / "000000.tar") is not None
    assert commands.check((str(out),)) == 1  # the others are read all the same
    said = capsys.readouterr()
    assert "junk.tar: is not a tar" in said.err and f"{bad}/b: its png" in said.err
    assert "8 samples in 3 tars" in said.out
    for wrong in ({"samples": 0}, {"size": 5000}, {"num_names": 9999}, {"split": demo.BENCHMARK, "samples": 1001}):
        with pytest.raises(OpenVisionError):
            commands.make_demo(tmp_path / "wrong", **wrong)  # type: ignore[arg-type]
    assert not (tmp_path / "wrong").exists()
