"""Assets: what is read is pinned, nothing fetched is run, and a user can act on every failure.

The package index is a real server on the loopback.
"""

import base64
import hashlib
import io
import json
import os
import pickle
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from openvision3 import assets, package_index
from openvision3.assets import Archive, Asset, fetch, list_assets, read_array_pickle, read_member
from openvision3.config import OpenVisionError
from openvision3.package_index import DEFAULT_INDEX, pip_settings


class Index:
    """A package index: pages by path, and what was asked for."""

    def __init__(self) -> None:
        self.pages: dict[str, tuple[str, bytes]] = {}
        self.asked: list[tuple[str, str | None]] = []  # path and Authorization
        self.cut = 0  # so many answers break off half-way
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.asked.append((self.path, self.headers.get("Authorization")))
                kind, content = index.pages.get(self.path, ("", b""))
                self.send_response(302 if kind == "redirect" else 200 if kind else 404)
                if kind == "redirect":
                    self.send_header("Location", content.decode())
                self.send_header("Content-Type", kind or "text/plain")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                half = index.cut > 0 and kind == "application/octet-stream"
                index.cut -= half
                self.wfile.write(content[: len(content) // 2] if half else content)
                self.close_connection = True

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.host = f"127.0.0.1:{self.server.server_port}"
        self.url = f"http://{self.host}/simple"

    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]


@pytest.fixture
def index() -> Iterator[Index]:
    served = Index()
    yield served
    served.server.shutdown()
    served.server.server_close()


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An own cache, and neither pip's variables nor its files (which the tests of settings bring back)."""
    for name in list(os.environ):
        if name.startswith(("PIP_", "OV3_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OV3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(package_index, "_pip_config_list", list)
    monkeypatch.setattr(package_index, "RETRY_PAUSE", 0)


def source_archive(sentinel: Path) -> bytes:
    """A source archive whose setup.py, if ever run, leaves a trace."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in {"a-1/setup.py": f"open({str(sentinel)!r}, 'w')", "a-1/words.txt": "one two"}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content.encode()))
    return buffer.getvalue()


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> bytes:
    """The content of an archive that holds the asset "words"; its sentinel is tmp_path/ran."""
    content = source_archive(tmp_path / "ran")
    pinned = Archive("a", "a-1.tar.gz", len(content), hashlib.sha256(content).hexdigest())
    asset = Asset("words", "", "", pinned, "a-1/words.txt", 7, ".txt", lambda text: text.upper())
    monkeypatch.setattr(assets, "_ASSETS", {"words": asset})
    return content


def serve_html(index: Index, content: bytes) -> None:
    page = b"<html><a href='b-1.tar.gz'>b</a><a data-x href='../../files/a-1.tar.gz#sha256=00'>a-1.tar.gz</a></html>"
    index.pages["/simple/a/"] = ("text/html", page)
    index.pages["/files/a-1.tar.gz"] = ("application/octet-stream", content)


def serve_json(index: Index, content: bytes) -> None:
    page = json.dumps({"files": [{"url": "b-1.tar.gz"}, {"url": f"http://{index.host}/files/a-1.tar.gz"}]})
    index.pages["/simple/a/"] = ("application/vnd.pypi.simple.v1+json", page.encode())
    index.pages["/files/a-1.tar.gz"] = ("application/octet-stream", content)


@pytest.mark.parametrize("serve", [serve_html, serve_json])
def test_fetched_once_and_nothing_is_run(
    index: Index, archive: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, serve
) -> None:
    serve(index, archive)
    monkeypatch.setenv("PIP_INDEX_URL", index.url)
    path = fetch("words")
    assert path.read_text() == "ONE TWO" and path.parent == tmp_path / "cache"
    assert index.paths() == ["/simple/a/", "/files/a-1.tar.gz"]
    assert fetch("words") == path and len(index.asked) == 2
    assert not (tmp_path / "ran").exists()
    assert [item.name for item in path.parent.iterdir() if not item.name.endswith(".lock")] == [path.name]


def test_several_at_once_download_once(index: Index, archive: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_json(index, archive)
    monkeypatch.setenv("PIP_INDEX_URL", index.url)
    threads = [threading.Thread(target=fetch, args=("words",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert index.paths() == ["/simple/a/", "/files/a-1.tar.gz"]


def test_a_broken_download_is_tried_again(index: Index, archive: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_json(index, archive)
    monkeypatch.setenv("PIP_INDEX_URL", index.url)
    index.cut = 2
    assert fetch("words").read_text() == "ONE TWO"
    assert index.paths().count("/files/a-1.tar.gz") == 3


def test_another_file_is_refused(index: Index, archive: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", index.url)
    changed = archive[:-1] + bytes([archive[-1] ^ 1])
    for content in (changed, archive + b"x"):
        serve_json(index, content)
        with pytest.raises(OpenVisionError, match="not the pinned file"):
            fetch("words")
    assert not list((tmp_path / "cache").glob("words*")) and not list((tmp_path / "cache").glob("download*"))


def test_the_next_index_is_asked_and_failure_says_what_to_do(
    index: Index, archive: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"http://{index.host}/empty")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"http://user:secret@{index.host}/simple")
    with pytest.raises(OpenVisionError) as caught:
        fetch("words")
    message = str(caught.value)
    for words in ("a-1.tar.gz", "/empty: HTTP Error 404", "/simple: HTTP Error 404", "OV3_ASSETS", "sha256"):
        assert words in message
    assert "secret" not in message
    serve_html(index, archive)
    assert fetch("words").is_file()


def test_a_login_goes_to_the_index_alone(index: Index, archive: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Index()  # another host: the port differs, and so does the name
    page = json.dumps({"files": [{"url": f"http://localhost:{files.server.server_port}/a-1.tar.gz"}]}).encode()
    index.pages["/simple/a/"] = ("application/vnd.pypi.simple.v1+json", page)
    files.pages["/a-1.tar.gz"] = ("application/octet-stream", archive)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://user:se%40cret@{index.host}/simple")
    assert fetch("words").is_file()
    login = "Basic " + base64.b64encode(b"user:se@cret").decode()
    assert index.asked == [("/simple/a/", login)]
    assert files.asked == [("/a-1.tar.gz", None)]
    fetch("words").unlink()
    index.pages["/simple/a/"] = ("redirect", f"http://localhost:{files.server.server_port}/moved/".encode())
    files.pages["/moved/"] = ("text/html", b"<a href='../a-1.tar.gz'>a</a>")
    assert fetch("words").is_file()
    assert index.asked[-1] == ("/simple/a/", login)
    assert files.asked[1:] == [("/moved/", None), ("/a-1.tar.gz", None)]
    files.server.shutdown()
    files.server.server_close()


def test_an_index_on_the_web_can_not_name_local_files(
    index: Index, archive: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a-1.tar.gz").write_bytes(archive)
    page = json.dumps({"files": [{"url": f"file://{tmp_path}/a-1.tar.gz"}]}).encode()
    index.pages["/simple/a/"] = ("application/vnd.pypi.simple.v1+json", page)
    monkeypatch.setenv("PIP_INDEX_URL", index.url)
    with pytest.raises(OpenVisionError, match="refusing a link"):
        fetch("words")


@pytest.mark.parametrize("way", ["OV3_ASSETS", "PIP_FIND_LINKS", "PIP_INDEX_URL"])
def test_from_local_folders_without_a_network(
    archive: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, way: str
) -> None:
    folder = tmp_path / "local"
    project = folder / "a" if way == "PIP_INDEX_URL" else folder
    project.mkdir(parents=True)
    (project / "index.html").write_text("<a href='a-1.tar.gz'>a</a>")
    (project / "a-1.tar.gz").write_bytes(archive)
    monkeypatch.setenv(way, folder.as_uri() if way == "PIP_INDEX_URL" else str(folder))
    assert fetch("words").read_text() == "ONE TWO"


def test_a_wrong_local_file_is_named(archive: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a-1.tar.gz").write_bytes(b"something else")
    monkeypatch.setenv("OV3_ASSETS", str(tmp_path))
    with pytest.raises(OpenVisionError, match="not the pinned file"):
        fetch("words")


def test_unknown_names_and_a_cache_that_can_not_be_written(archive: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OpenVisionError, match="no asset 'word'; there are words"):
        fetch("word")
    monkeypatch.setenv("OV3_CACHE", "/dev/null/cache")
    with pytest.raises(OpenVisionError, match="OV3_CACHE"):
        fetch("words")


def test_settings_of_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pip_settings().indexes == (DEFAULT_INDEX,)
    lines = [
        ":env:.index-url='ignored'",
        "global.index-url='https://mirror/simple'",
        "global.extra-index-url='https://one/simple\\nhttps://two/simple'",
        "download.extra-index-url='https://three/simple'",
        "global.cert='/some/bundle.pem'",
        "not an option",
        "global.proxy=__import__('os').getcwd()",
    ]
    monkeypatch.setattr(package_index, "_pip_config_list", lambda: lines)
    settings = pip_settings()
    assert settings.indexes == ("https://mirror/simple", "https://three/simple")
    assert (settings.cert, settings.proxy) == ("/some/bundle.pem", "")
    monkeypatch.setenv("PIP_INDEX_URL", "https://mine/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    assert pip_settings().indexes[0] == "https://mine/simple"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert pip_settings().indexes == ()


def test_settings_come_from_pips_own_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()  # the real pip
    (tmp_path / "pip.conf").write_text("[global]\nindex-url = https://from.file/simple\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    pytest.importorskip("pip")
    assert pip_settings().indexes[0] == "https://from.file/simple"


def as_old_numpy(tree: object) -> bytes:
    """A pickle with the names that numpy 1 wrote, as in the archive."""
    return pickle.dumps(tree, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def test_array_pickles() -> None:
    kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
    flat = read_array_pickle(as_old_numpy({"net": {"conv": {"kernel": kernel}}, "count": np.array(3)}))
    assert list(flat) == ["net/conv/kernel", "count"]
    assert np.array_equal(flat["net/conv/kernel"], kernel) and flat["count"] == 3


@pytest.mark.parametrize(("net", "convolutions"), [("AlexNet_0", 5), ("VGG16_0", 13)])
def test_lpips_kernels_are_turned(net: str, convolutions: int) -> None:
    from safetensors.torch import load

    kernel = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)  # Flax: height, width, in, out
    trunk = {f"Conv_{i}": {"kernel": kernel + i, "bias": np.full(4, i, np.float32)} for i in range(convolutions)}
    heads = {f"NetLinLayer_{i}": {"Conv_0": {"kernel": np.ones((1, 1, 4, 1), np.float32)}} for i in range(5)}
    tensors = load(assets._convert_lpips(as_old_numpy({net: trunk, **heads})))
    assert len(tensors) == 2 * convolutions + 5
    first = tensors["net.slice1.0.weight"]
    assert first.shape == (4, 3, 1, 2)
    assert first[3, 2, 0, 1] == kernel[0, 1, 2, 3] and first[1, 0, 0, 0] == kernel[0, 0, 0, 1]
    last = "net.slice5.10.bias" if net == "AlexNet_0" else "net.slice5.28.bias"
    assert tensors[last].tolist() == [convolutions - 1] * 4
    assert tensors["lin4.model.1.weight"].shape == (1, 4, 1, 1)


class Attack:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("attacked",)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Attack()),
        as_old_numpy({"a": np.zeros(2), "b": Attack()}),
        as_old_numpy({"a": np.array([Attack()], dtype=object)}),
        as_old_numpy({"a": np.array(["text"], dtype=object)}),
        pickle.dumps({"a": 1.0}),
        pickle.dumps([1, 2]),
        as_old_numpy({1: np.zeros(2)}),
        b"",
        b"\x80\x03garbage",
    ],
)
def test_other_pickles_are_refused(content: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OpenVisionError, match="refusing a pickle"):
        read_array_pickle(content)
    assert not (tmp_path / "attacked").exists()


def test_archive_members(tmp_path: Path) -> None:
    tar_path, zip_path = tmp_path / "a.tar.gz", tmp_path / "a.whl"
    with tarfile.open(tar_path, "w:gz") as tar:
        entry = tarfile.TarInfo("file")
        entry.size = 4
        tar.addfile(entry, io.BytesIO(b"1234"))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "file"
        tar.addfile(link)
    with zipfile.ZipFile(zip_path, "w") as archive:
        archive.writestr("file", "1234")
    for path in (tar_path, zip_path):
        assert read_member(path, "file", 4) == b"1234"
        for name, size in (("file", 3), ("file", 5), ("missing", 4), ("link", 4)):
            with pytest.raises(OpenVisionError, match=path.name):
                read_member(path, name, size)
        path.write_bytes(path.read_bytes()[:-30])
        with pytest.raises(OpenVisionError, match=path.name):
            read_member(path, "missing", 4)


def test_torch_state_dicts_keep_their_order_and_are_never_unpickled_freely() -> None:
    from safetensors.torch import load

    buffer = io.BytesIO()
    torch.save({"z": torch.ones(2), "a": torch.zeros(1, dtype=torch.int64)}, buffer)
    assert sorted(load(assets._convert_torch(buffer.getvalue()))) == ["000.z", "001.a"]
    buffer = io.BytesIO()
    torch.save({"z": Attack()}, buffer)
    with pytest.raises(pickle.UnpicklingError):
        assets._convert_torch(buffer.getvalue())


def test_the_list_is_sound() -> None:
    names = [asset.name for asset in list_assets()]
    assert names == ["lpips-alex", "lpips-vgg", "efficientnet-lite0", "bert-vocab", "smollm2-135m-instruct"]
    for asset in list_assets():
        assert len(asset.archive.sha256) == 64 and asset.member_size > 0 and asset.licence
        assert asset.archive.filename.endswith((".tar.gz", ".whl"))


def test_commands(archive: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    from openvision3.commands.assets import assets_fetch, assets_list

    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert assets_fetch(("words",)) == 1
    assert "words: could not get a-1.tar.gz" in capsys.readouterr().err
    (tmp_path / "a-1.tar.gz").write_bytes(archive)
    monkeypatch.setenv("OV3_ASSETS", str(tmp_path))
    assert assets_fetch(("all",), json=tmp_path / "fetched.json") == 0
    fetched = json.loads((tmp_path / "fetched.json").read_text())
    assert Path(fetched["words"]).is_file()
    assert assets_list(json=tmp_path / "list.json") == 0
    assert json.loads((tmp_path / "list.json").read_text())[0]["cached"] == fetched["words"]
    assert "words" in capsys.readouterr().out
    with pytest.raises(OpenVisionError, match="no asset"):
        assets_fetch(("words", "other"))
    with pytest.raises(OpenVisionError, match="name what to fetch"):
        assets_fetch(())
