"""Reading from stores: retries and their bound, what is refused, and the same samples as from disk."""

import gc
import os
import pickle
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from small_tars import picture, write_tar

from openvision3.config import DataConfig, OpenVisionError
from openvision3.data import shards
from openvision3.data import store as module
from openvision3.data.batches import BatchStream
from openvision3.data.shards import TarSource
from openvision3.data.store import Store, StoreError, expand, locate, name_of, sibling
from openvision3.data.tar_index import load_index, save_index, scan


class Flaky(MemoryFileSystem):
    """Memory whose answers are spoilt as `faults` says, one a call, and counted in `calls`."""

    protocol = "flaky"
    cachable = False
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    faults: list[str] = []
    calls: list[str] = []

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).replace("flaky://", "memory://"))

    def unstrip_protocol(self, name: str) -> str:
        return "flaky://" + name.lstrip("/")

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        self.calls.append(f"{path}:{start}-{end}")
        data = super().cat_file(path, start, end)
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "drop":
            raise ConnectionResetError("connection reset\nby peer")
        if fault == "hang":
            time.sleep(3)
        if fault == "lost":
            raise FileNotFoundError(path) from ConnectionResetError()
        if fault == "forbid":
            raise PermissionError("403")
        return data[: len(data) // 2] if fault == "cut" else data + data if fault == "twice" else data


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Flaky]]:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.store, Flaky.pseudo_dirs, Flaky.faults, Flaky.calls = {}, [""], [], []
    monkeypatch.setattr(module, "FIRST_WAIT", 0.001)
    yield Flaky


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Five tars of 12 samples each, without an index."""
    for i in range(5):
        members: dict[str, bytes] = {}
        for j in range(12):
            members |= {f"{i}-{j}.png": picture(colour=f"rgb({i * 40},{j * 20},9)"), f"{i}-{j}.txt": b"text " * (j + 1)}
        write_tar(tmp_path / f"{i}.tar", members)
    return tmp_path


def put(flaky: type[Flaky], folder: Path, suffix: str = "") -> None:
    for file in folder.iterdir():
        if file.is_file() and file.name.endswith(suffix):
            flaky().pipe_file(f"/data/{file.name}", file.read_bytes())


def rows(source: TarSource, **options: Any) -> list[Any]:
    stream = BatchStream(source, None, 16, 10, 0, 120, contrastive_length=0, caption_length=0, **options)
    return [(b.positions, b.keys, b.captions, b.images.numpy().tobytes()) for b in stream]


def test_locations() -> None:
    assert locate("a/b.tar") == Path("a/b.tar") and locate("file:///a/b.tar") == Path("/a/b.tar")
    assert locate("s3://a/b.tar") == "s3://a/b.tar"
    assert name_of("https://h/a/b.tar?sign=x/y") == "b.tar" and sibling("https://h/a/b.tar?s", "c") == "https://h/a/c"
    for text in ("pipe:cat a.tar", "pipe:aws s3 cp s3://a/b.tar -"):
        with pytest.raises(OpenVisionError, match="pipe: sources run commands, so they are refused"):
            expand(text)


@pytest.mark.parametrize("fault", ["drop", "cut", "hang"])
def test_a_spoilt_answer_is_asked_for_again(flaky: type[Flaky], fault: str) -> None:
    flaky().pipe_file("/data/a", bytes(range(200)))
    flaky.faults = [fault, fault]
    store = Store(attempts=3, timeout=0.3)
    assert store.read("flaky://data/a", 50, 100) == bytes(range(50, 150))
    assert flaky.calls == ["/data/a:50-150"] * 3 and store.retried == 2


@pytest.mark.parametrize("fault", ["drop", "cut", "hang"])
def test_attempts_end(flaky: type[Flaky], fault: str) -> None:
    """No endless trying, and one line that says what, where, how often and why."""
    flaky().pipe_file("/data/a", bytes(200))
    flaky.faults = [fault] * 9
    begin = time.monotonic()
    with pytest.raises(StoreError, match="^flaky://data/a: no answer after 4 attempts; the last error: ") as caught:
        Store(attempts=4, timeout=0.1).read("flaky://data/a", 0, 100)
    assert "\n" not in str(caught.value) and len(flaky.calls) == 4 and time.monotonic() - begin < 5


def test_what_trying_again_does_not_mend(flaky: type[Flaky]) -> None:
    flaky().pipe_file("/data/a", bytes(200))
    flaky.faults = ["forbid"]
    with pytest.raises(StoreError, match="can't be read or written .PermissionError: 403"):
        Store().read("flaky://data/a", 0, 100)
    flaky.faults = ["twice"]
    with pytest.raises(StoreError, match="a request for 100 bytes with 200"):
        Store().read("flaky://data/a", 0, 100)
    assert len(flaky.calls) == 2
    for call in (lambda: Store().read("flaky://data/none", 0, 1), lambda: Store().size("flaky://data/none")):
        with pytest.raises(StoreError, match="flaky://data/none: no such file"):
            call()
    assert Store().read_all("flaky://data/none", 10) is None
    flaky.faults = ["forbid"]
    assert Store().read_all("flaky://data/a", 1000) is None  # as S3 says of missing files where it may not be listed
    flaky.faults = ["lost", "lost"]
    assert Store().read("flaky://data/a", 0, 100) == bytes(100)  # as fsspec says of any error over http


def test_unknown_stores_and_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OpenVisionError, match="nope://a.tar: can't be opened"):
        scan("nope://a.tar")

    def missing(*arguments: Any, **options: Any) -> Any:
        raise ImportError("Install gcsfs")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(OpenVisionError, match="gs:// needs another package: pip install gcsfs"):
        scan("gs://bucket/a.tar")
    for attempts, timeout in ((0, 1.0), (1, 0.0)):
        with pytest.raises(OpenVisionError, match="store_attempts"):
            Store(attempts, timeout)


def test_expand(flaky: type[Flaky], tars: Path) -> None:
    put(flaky, tars)
    flaky().pipe_file("/data/notes.txt", b"")
    every = [f"flaky://data/{i}.tar" for i in range(5)]
    assert expand("flaky://data") == expand("flaky://data/*.tar") == expand("flaky://data/{0..4}.tar") == every
    assert expand(["flaky://data/[13].tar"]) == [every[1], every[3]]
    with pytest.raises(OpenVisionError, match="flaky://none: no such tar, nor a folder with tars"):
        expand("flaky://none")


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("indexed", [False, True])
def test_a_store_gives_what_the_disk_gives(
    flaky: type[Flaky], tars: Path, tmp_path: Path, lazy: bool, indexed: bool
) -> None:
    """The same batches, though each fifth answer is spoilt; in this process and in forked workers."""
    if indexed:
        for tar in tars.glob("*.tar"):
            save_index(scan(tar))
    put(flaky, tars)
    config = DataConfig(shuffle_window=2, shuffle_block=3, seed=2, store_timeout=1.0)
    expected = rows(TarSource(tars, config))
    flaky.faults = ["drop", "", "", "", "", "cut", "", "", ""] * 100
    cache = tmp_path / "cache" if lazy else None
    assert rows(TarSource("flaky://data", config, cache=cache)) == expected
    assert rows(TarSource("flaky://data", config, cache=cache), num_workers=2) == expected


def test_reads_are_long_where_blocks_are(flaky: type[Flaky], tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch's neighbours come in one read; a sample that lies alone in one too, all of its members together."""
    monkeypatch.setattr(shards, "JOIN_GAP", 1024)
    put(flaky, tars)
    for block, most in ((1, 120), (12, 36)):
        source = TarSource("flaky://data", DataConfig(shuffle_block=block))
        flaky.calls.clear()
        rows(source)
        assert most / 2 <= len(flaky.calls) <= most


def test_what_is_fetched_and_not_read_is_let_go(flaky: type[Flaky], tars: Path) -> None:
    put(flaky, tars)
    source = TarSource("flaky://data", DataConfig())
    for begin in range(0, 60, 10):
        source.prepare(list(range(begin, begin + 10)))
    assert len(source._fetched) <= 20


def test_index_files_beside_the_tars_of_a_store(flaky: type[Flaky], tars: Path) -> None:
    put(flaky, tars)
    index = scan("flaky://data/0.tar")
    save_index(index)
    assert load_index("flaky://data/0.tar") == index and flaky().exists("/data/0.idx.json")
    flaky().pipe_file("/data/0.idx.json", b"junk")
    assert load_index("flaky://data/0.tar") is None


def test_a_large_tar_of_a_store_is_read_in_blocks(
    flaky: type[Flaky], tars: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(flaky, tars)
    monkeypatch.setattr(module, "BLOCK", 4096)
    assert scan("flaky://data/2.tar").entries == scan(tars / "2.tar").entries
    assert len(flaky.calls) <= (tars / "2.tar").stat().st_size / 4096 + 13
    assert len(set(flaky.calls)) == len(flaky.calls)  # nothing twice


def test_a_store_survives_forks_and_pickling(flaky: type[Flaky], tars: Path) -> None:
    put(flaky, tars)
    source = TarSource("flaky://data", DataConfig(seed=1))
    key = source.read(7).key
    source.prepare([8, 9])
    again = pickle.loads(pickle.dumps(source))
    assert again.read(7).key == key and len(again) == len(source) and again.read(8).key == source.read(8).key
    child = os.fork()
    if child == 0:  # pragma: no cover
        threading.Timer(20, lambda: os._exit(2)).start()
        source.prepare([8, 9])
        os._exit(0 if source.read(8).key == again.read(8).key else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_process_does_not_wait_for_reads_at_its_end() -> None:
    """Else a run that ended with one line would stay for as long as a dead store is asked again."""
    program = """
import fsspec, threading
from fsspec.implementations.memory import MemoryFileSystem
from openvision3.data.store import Store
class Dead(MemoryFileSystem):
    protocol = "dead"
    def cat_file(self, *arguments, **options):
        threading.Event().wait()
fsspec.register_implementation("dead", Dead)
store = Store()
reads = [store.submit("dead://data/a", 0, 10) for _ in range(40)]
threading.Event().wait(0.5)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)


def test_reads_of_a_parent_are_not_waited_for_by_its_child(flaky: type[Flaky], tars: Path) -> None:
    """A fork takes no threads along: what they were about to fetch is fetched anew."""
    put(flaky, tars)
    source = TarSource("flaky://data", DataConfig(seed=1))
    flaky.faults = ["hang"] * 9
    source.prepare([8, 9])
    child = os.fork()
    if child == 0:  # pragma: no cover
        threading.Timer(20, lambda: os._exit(2)).start()
        flaky.faults.clear()
        os._exit(0 if source.read(8).key else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_child_leaves_the_parents_connections_alone() -> None:
    """s3fs closes them where a file system is no longer used, which fails in a forked child with tracebacks."""

    class Cached(fsspec.AbstractFileSystem):
        protocol = "cached"

        def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
            return b"1"

    fsspec.register_implementation("cached", Cached, clobber=True)
    store = Store()
    assert store.read("cached://a", 0, 1) == b"1"
    parents = weakref.ref(store._system("cached://a"))
    child = os.fork()
    if child == 0:  # pragma: no cover
        store.read("cached://a", 0, 1)
        gc.collect()
        os._exit(1 if parents() is None else 0)
    assert os.waitpid(child, 0)[1] == 0


def test_hosts_are_kept_apart() -> None:
    """Stores whose file systems are bound to a host, such as ftp and abfs."""

    class Hosts(MemoryFileSystem):
        protocol = "hosts"

        def __init__(self, host: str, **options: Any):
            super().__init__(**options)
            self.host = host

        @staticmethod
        def _get_kwargs_from_urls(path: str) -> dict[str, str]:
            return {"host": path.split("/")[2]}

        def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
            return self.host.encode()

    fsspec.register_implementation("hosts", Hosts, clobber=True)
    store = Store()
    assert [store.read(f"hosts://{host}/x", 0, 1) for host in "ab"] == [b"a", b"b"]
    with pytest.raises(OpenVisionError, match="chained URLs"):
        expand("zip://a.tar::s3://b/c.zip")


def test_what_can_not_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="none/a.idx.json: can't be written"):
        Store().write(tmp_path / "none" / "a.idx.json", b"x")


def test_members_far_apart_are_read_one_by_one(flaky: type[Flaky], tmp_path: Path) -> None:
    """What else a sample holds is neither fetched nor kept; nor is more fetched ahead than there is room for."""
    film = bytes(3 * shards.JOIN_GAP)
    members = {f"{i}.{name}": data for i in range(4) for name, data in (
        ("png", picture()), ("mp4", film if i < 2 else b""), ("txt", b"x"))}  # fmt: skip
    write_tar(tmp_path / "a.tar", members)
    put(flaky, tmp_path)
    source = TarSource("flaky://data", shuffle=False)
    flaky.calls.clear()
    source.prepare([0, 1, 2, 3])
    assert sorted(number for _, number, _ in source._fetched) == [2, 3]
    assert [source.read(position).key for position in range(4)] == list("0123")
    spans = [tuple(map(int, call.split(":")[1].split("-"))) for call in flaky.calls]
    assert len(spans) == 5 and all(end - begin < len(film) for begin, end in spans)


def test_what_is_fetched_ahead_is_bounded(flaky: type[Flaky], tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(flaky, tars)
    source = TarSource("flaky://data", shuffle=False)
    monkeypatch.setattr(shards, "MAX_AHEAD", 9000)
    source.prepare(list(range(12)))
    assert 0 < len(source._fetched) < 12 and source.read(11).key == "0-11"
