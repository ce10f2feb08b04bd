"""`ov3 search`: what is found, what is encoded again and what is not, and where the embeddings are kept."""

import contextlib
import json
import os
import shutil
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from openvision3 import cli
from openvision3.commands import search as search_command
from openvision3.commands.contact_sheet import GAP, LINE, SIDE, contact_sheet
from openvision3.commands.pictures import prepare, walk
from openvision3.config import OpenVisionError
from openvision3.data import embedding_cache
from openvision3.data.embedding_cache import EmbeddingCache, Stamp
from openvision3.evaluation.zeroshot import demo_prompts
from openvision3.model.openvision3 import OpenVision3


def picture(path: Path, seed: int) -> Path:
    """Writes a smooth coloured picture that was last changed a minute ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((80, 64), Image.Resampling.BICUBIC).save(path)
    os.utime(path, (time.time() - 60, time.time() - 60))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(6):
        picture(tmp_path / "pictures" / ("sub" if i % 2 else "") / f"{i}.png", seed=i)
    return tmp_path / "pictures"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of pictures of each batch that a model encodes."""
    counts: list[int] = []
    original = OpenVision3.encode

    def counting(self: OpenVision3, images: torch.Tensor) -> torch.Tensor:
        counts.append(len(images))
        return original(self, images)

    monkeypatch.setattr(OpenVision3, "encode", counting)
    return counts


Search = Callable[..., tuple[int, dict, str]]


@pytest.fixture
def search(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Search:
    """`ov3 search` in this process: (exit code, figures of --json where it wrote them, stdout and stderr)."""
    monkeypatch.setenv("OV3_CACHE", str(tmp_path / "cache"))

    def run(*args: object) -> tuple[int, dict, str]:
        figures = tmp_path / "figures.json"
        figures.unlink(missing_ok=True)
        options = ["--images", folder, "--model", tiny_model, "--device", "cpu", "--json", figures]
        code = cli.main([str(arg) for arg in ("search", *args, *options)])
        out, err = capsys.readouterr()
        assert "Traceback" not in err and "unexpected" not in err
        return code, json.loads(figures.read_text()) if figures.exists() else {}, out + err

    return run


def test_text_and_picture_queries_give_the_nearest(
    search: Search, folder: Path, tiny_model: Path, encoded: list[int]
) -> None:
    model = OpenVision3.load(tiny_model)
    paths = sorted(folder.rglob("*.png"))
    with torch.no_grad():
        images = torch.cat([model.embed_image(prepare(path, 64, 1024)[0][None]) for path in paths])
        queries = [model.embed_text(["two red things"])[0], images[3]]
        named = torch.nn.functional.normalize(model.embed_text(demo_prompts("panda")).mean(dim=0), dim=0)
    encoded.clear()
    for args, query in ((["two red things"], queries[0]), (["--like", paths[3]], queries[1])):
        code, figures, said = search(*args, "--top", 4)
        assert code == 0, said
        scores, order = (images @ query).topk(4)
        assert [result["picture"] for result in figures["results"]] == [str(paths[i]) for i in order.tolist()]
        assert [result["score"] for result in figures["results"]] == pytest.approx(scores.tolist(), abs=1e-5)
        assert figures["pictures"] == 6 and figures["failed"] == 0
        for score, path in zip(scores.tolist(), order.tolist(), strict=True):
            assert f"{paths[path]}" in said and f"{score:.3f}" in said
    assert figures["results"][0]["picture"] == str(paths[3])
    assert sum(encoded) == 6 + 1  # of the second search the query alone
    # a thing's bare name is searched by prompts that hold it
    found = search("panda", "--top", 6)[1]["results"]
    expected = dict(zip(map(str, paths), (images @ named).tolist(), strict=True))
    assert {result["picture"]: result["score"] for result in found} == pytest.approx(expected, abs=1e-5)
    assert sum(encoded) == 7


def test_only_what_is_new_or_changed_is_encoded(search: Search, folder: Path, encoded: list[int]) -> None:
    def names() -> set[str]:
        code, figures, said = search("a panda")
        assert code == 0, said
        return {os.path.relpath(result["picture"], folder) for result in figures["results"]}

    assert len(names()) == 6 and sum(encoded) == 6
    cache = next(folder.glob(".ov3-search-*.safetensors"))
    before = (cache.read_bytes(), cache.stat().st_mtime_ns)
    assert len(names()) == 6 and sum(encoded) == 6
    assert before == (cache.read_bytes(), cache.stat().st_mtime_ns)  # nor is it written again
    # moved and renamed: known by content
    (folder / "0.png").rename(folder / "sub" / "renamed.png")
    (folder / "sub" / "1.png").rename(folder / "1.png")
    assert names() == {"1.png", "2.png", "4.png", "sub/3.png", "sub/5.png", "sub/renamed.png"}
    assert sum(encoded) == 6
    # touched: read, not encoded
    os.utime(folder / "2.png", (1000, 1000))
    assert len(names()) == 6 and sum(encoded) == 6
    # changed; deleted; new
    picture(folder / "2.png", seed=20)
    assert len(names()) == 6 and sum(encoded) == 7
    (folder / "4.png").unlink()
    assert names() == {"1.png", "2.png", "sub/3.png", "sub/5.png", "sub/renamed.png"} and sum(encoded) == 7
    picture(folder / "new.png", seed=21)
    assert "new.png" in names() and sum(encoded) == 8
    assert len(list(folder.glob(".*"))) == 1


def test_a_change_that_keeps_size_and_time_within_two_seconds_is_seen(folder: Path) -> None:
    """A file that was just written is read again, because its stamp may hide a change."""
    path, said = folder / "0.png", []

    def content() -> str:
        cache = EmbeddingCache(folder, "f" * 64, 2, said.append)
        status = path.stat()
        assert cache.update({"0.png": Stamp(status.st_size, status.st_mtime_ns, status.st_ino)}, lambda _: None) == {}
        key = cache.files["0.png"][1]
        cache.add([key], torch.ones(1, 2))
        cache.save()
        return key

    path.write_bytes(b"one")
    now = time.time_ns()
    os.utime(path, ns=(now, now))
    first = content()
    path.write_bytes(b"two")
    os.utime(path, ns=(now, now))
    second = content()
    assert first != second
    os.utime(path, ns=(now - 10**10, now - 10**10))
    content()
    path.write_bytes(b"six")  # against all custom: with the old time, and long after it
    os.utime(path, ns=(now - 10**10, now - 10**10))
    assert content() == second  # the stamp was trusted: the file was not read
    assert said == []


def test_copies_are_encoded_once_and_shown_once(search: Search, folder: Path, encoded: list[int]) -> None:
    shutil.copy(folder / "0.png", folder / "sub" / "copy.png")
    code, figures, said = search("--like", folder / "0.png")
    assert code == 0 and sum(encoded) == 7 and figures["pictures"] == 7 and len(figures["results"]) == 6
    best = figures["results"][0]
    assert (best["picture"], best["copies"]) == (str(folder / "0.png"), [str(folder / "sub" / "copy.png")])
    assert best["score"] == pytest.approx(1, abs=1e-5)
    assert "0.png (and 1 copy)" in said


def test_unreadable_pictures_are_named_once_and_the_others_found(
    search: Search, folder: Path, encoded: list[int]
) -> None:
    (folder / "broken.png").write_text("no picture")
    shutil.copy(folder / "broken.png", folder / "sub" / "copy.png")
    (folder / "notes.txt").write_text("not looked at")
    written: list[int] = []
    for _ in range(2):
        code, figures, said = search("a panda")
        assert code == 1
        assert said.count(str(folder / "broken.png")) == said.count(str(folder / "sub" / "copy.png")) == 1
        assert (figures["pictures"], figures["failed"], len(figures["results"])) == (6, 2, 6)
        written.append(next(folder.glob(".ov3-search-*")).stat().st_mtime_ns)
    assert sum(encoded) == 6
    assert written[0] == written[1]  # what is broken is no reason to write all again
    picture(folder / "broken.png", seed=9)
    (folder / "sub" / "copy.png").unlink()
    assert search("a panda")[0] == 0 and sum(encoded) == 7


def test_another_model_or_size_has_embeddings_of_its_own(
    search: Search, folder: Path, tiny_model: Path, tmp_path: Path, encoded: list[int]
) -> None:
    model = OpenVision3.load(tiny_model)
    with torch.no_grad():
        model.encoder.class_token += 0.1  # type: ignore[operator]
    model.save(tmp_path / "other")
    for number, args in enumerate(([], ["--size", 32], [])):
        assert search("a panda", *args)[0] == 0
        assert sum(encoded) == (6, 12, 12)[number]
    options = ["--images", folder, "--model", tmp_path / "other", "--device", "cpu"]
    assert cli.main([str(arg) for arg in ("search", "a panda", *options)]) == 0
    assert sum(encoded) == 18
    assert len(list(folder.glob(".ov3-search-*"))) == 3


def test_a_model_without_text_says_so_before_it_encodes(
    search: Search, folder: Path, tiny_model: Path, tmp_path: Path, encoded: list[int]
) -> None:
    model = OpenVision3.load(tiny_model)
    vision = replace(model.config, text_encoder=None, text_decoder=None, name="seer")
    OpenVision3(vision, model.vae).save(tmp_path / "vision")
    options = ["--images", str(folder), "--model", str(tmp_path / "vision"), "--device", "cpu"]
    with pytest.raises(OpenVisionError, match="'seer' has no text encoder, so it can't search by text; .*--like"):
        cli.dispatch(["search", "a panda", *options])
    assert not encoded and not list(folder.glob(".*"))
    assert cli.main(["search", "--like", str(folder / "2.png"), *options]) == 0
    assert sum(encoded) == 7


def test_wrong_usage_is_one_line(search: Search, folder: Path, tmp_path: Path, encoded: list[int]) -> None:
    (tmp_path / "there.png").touch()
    for args, expected in (
        ([], "give a text to search for, or --like PICTURE"),
        (["a", "--like", folder / "0.png"], "and not both"),
        (["a", "--top", 0], "--top 0"),
        (["a", "--out", tmp_path / "sheet.txt"], "expected a picture's extension"),
        (["a", "--out", tmp_path / "there.png"], "exists; pass --overwrite"),
        (["a", "--top", 501, "--out", tmp_path / "sheet.png"], "--top 501: expected at most 500 with --out"),
        (["--like", tmp_path / "none.png"], "no such file"),
        (["a", "--size", 50], "multiple of 16"),
        (["--like", folder / "0.png", "--size", 50], "multiple of 16"),
        (["a", "--batch-size", 0], "--batch-size must be at least 1"),
    ):
        code, figures, said = search(*args)
        assert code == 2 and expected in said and said.count("\n") == 1 and not figures
    for images, expected in ((tmp_path / "none", "no such folder"), (folder / "0.png", "not a folder")):
        with pytest.raises(OpenVisionError, match=expected):
            search_command.search(images, "a")
    assert not encoded and not list(folder.glob(".*"))


def test_a_folder_without_pictures(search: Search, folder: Path) -> None:
    for path in folder.rglob("*.png"):
        path.unlink()
    code, _, said = search("a panda")
    assert code == 2 and "no pictures in" in said


def test_an_interrupted_first_search_keeps_what_it_encoded(
    search: Search, folder: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    embed = OpenVision3.embed_image

    def interrupted(self: OpenVision3, images: torch.Tensor) -> torch.Tensor:
        if sum(encoded) >= 4:
            raise KeyboardInterrupt
        return embed(self, images)

    monkeypatch.setattr(OpenVision3, "embed_image", interrupted)
    assert search("a panda", "--batch-size", 2)[0] == 130
    monkeypatch.setattr(OpenVision3, "embed_image", embed)
    assert search("a panda")[0] == 0
    assert sum(encoded) == 6


def test_embeddings_are_saved_now_and_then(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that even SIGKILL costs little."""
    monkeypatch.setattr(embedding_cache, "_SAVE_SECONDS", 0.0)
    cache = EmbeddingCache(folder, "f" * 64, 2, print)
    listed = {"0.png": Stamp(1, 2, 3)}
    cache.update(listed, lambda _: None)
    content = cache.files["0.png"][1]
    time.sleep(0.002)
    cache.add([content], torch.ones(1, 2))
    again = EmbeddingCache(folder, "f" * 64, 2, print)
    assert again.files == {"0.png": (Stamp(1, 2, 3), content)} and torch.equal(again.embeddings[content], torch.ones(2))


def test_a_broken_cache_is_said_and_made_anew(search: Search, folder: Path, encoded: list[int]) -> None:
    assert search("a panda")[0] == 0
    cache = next(folder.glob(".ov3-search-*"))
    for content in (b"", cache.read_bytes()[:-7], b"\0" * 500):
        cache.write_bytes(content)
        encoded.clear()
        code, figures, said = search("a panda")
        assert code == 0 and sum(encoded) == 6 and len(figures["results"]) == 6
        assert f"{cache} is broken" in said
        assert "is broken" not in search("a panda")[2] and sum(encoded) == 6


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's power to write anywhere, where the tests run as root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if user == 0:
            os.seteuid(user)


def test_a_read_only_folder_has_its_embeddings_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(tempfile.mkdtemp(prefix="ov3-test-"))  # that pytest makes is not for other users' eyes
    try:
        picture(root / "pictures" / "a.png", seed=0)
        (root / "cache").mkdir()
        root.chmod(0o755)
        (root / "cache").chmod(0o777)
        (root / "pictures").chmod(0o555)
        monkeypatch.setenv("OV3_CACHE", str(root / "cache"))
        said: list[str] = []
        with as_nobody():
            cache = EmbeddingCache(root / "pictures", "f" * 64, 2, said.append)
            cache.update({"a.png": Stamp(1, 2, 3)}, lambda _: None)
            cache.add([cache.files["a.png"][1]], torch.ones(1, 2))
            cache.save()
            assert len(said) == 1 and "can't be written (Permission denied), are kept in " in said[0]
            assert said[0].endswith(str(cache.elsewhere)) and cache.elsewhere.is_file()
            again = EmbeddingCache(root / "pictures", "f" * 64, 2, said.append)
            assert len(again) == 1 and len(said) == 2 and str(cache.elsewhere) in said[1]
        assert [path.name for path in (root / "pictures").iterdir()] == ["a.png"]
    finally:
        (root / "pictures").chmod(0o755)
        shutil.rmtree(root)


def test_what_cannot_be_kept_anywhere_is_answered_anyway(
    search: Search, folder: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedding_cache, "whole_file", full)
    for count in (6, 12):
        code, figures, said = search("a panda")
        assert code == 0 and len(figures["results"]) == 6 and sum(encoded) == count
        assert said.count("can't be kept (No space left on device; ") == 1


def test_a_file_that_is_written_while_others_are_read_is_read_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long that takes: its time is compared with the start, not with the end."""
    now = time.time_ns()
    clock = iter(range(now, now + 10**11, 10**10))
    monkeypatch.setattr(embedding_cache.time, "time_ns", lambda: next(clock))
    cache = EmbeddingCache(folder, "f" * 64, 2, print)
    cache.update({"2.png": Stamp(1, now - 10**10, 3), "0.png": Stamp(1, now + 10**9, 3)}, lambda _: None)
    assert cache.files["0.png"][0] == Stamp(-1, -1, -1) and cache.files["2.png"][0] == Stamp(1, now - 10**10, 3)


def test_a_large_file_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(40_000_000)
    content = embedding_cache._content(path)
    assert isinstance(content, str)
    tracemalloc.start()
    try:
        with pytest.raises(OpenVisionError, match="large.png"):
            search_command.read_same(path, content)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_a_picture_that_changes_between_hash_and_reading_is_not_stored_under_the_wrong_content(folder: Path) -> None:
    content = embedding_cache._content(folder / "0.png")
    assert isinstance(content, str) and search_command.read_same(folder / "0.png", content).size == (80, 64)
    picture(folder / "0.png", seed=7)
    with pytest.raises(OpenVisionError, match="changed meanwhile"):
        search_command.read_same(folder / "0.png", content)


def test_walk_gives_files_in_order_without_hidden_ones_and_linked_folders(tmp_path: Path) -> None:
    for name in ("b.png", "a/c.png", "a/.hidden.png", ".git/x.png", "a b.png", "a/d/e.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "in" / "b.png")
    failures: list[tuple[str, str]] = []
    expected = ["a/c.png", "a/d/e.png", "a b.png", "b.png", "link.png"]
    assert [name for name, _ in walk(tmp_path / "in", lambda *failure: failures.append(failure))] == expected
    assert not failures
    loop = tmp_path / "in" / "a" / "0.png"
    loop.symlink_to(loop)  # the others of its folder are found
    assert [name for name, _ in walk(tmp_path / "in", lambda *failure: failures.append(failure))] == expected
    assert failures.pop() == ("a/0.png", f"{loop}: can't be read (Too many levels of symbolic links)") and not failures
    walk(tmp_path / "none", lambda *failure: failures.append(failure))
    assert failures == [("", f"{tmp_path / 'none'}: the folder can't be read (No such file or directory)")]


def test_a_folder_that_cannot_be_read_for_once_loses_nothing(
    search: Search, folder: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert search("a panda")[0] == 0 and sum(encoded) == 6
    scandir = os.scandir

    def broken(path: str) -> Iterator[os.DirEntry[str]]:
        if path.endswith("sub"):
            raise OSError(5, "Input/output error")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", broken)
    (folder / "0.png").unlink()
    code, figures, said = search("a panda")
    assert code == 1 and f"{folder / 'sub'}: the folder can't be read (Input/output error)" in said
    assert (figures["pictures"], figures["failed"]) == (5, 1)
    monkeypatch.setattr(os, "scandir", scandir)
    assert search("a panda")[0] == 0 and sum(encoded) == 6


def test_the_contact_sheet_shows_pictures_in_order_with_scores(search: Search, folder: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "out" / "sheet.png"
    assert search("--like", folder / "2.png", "--out", sheet)[0] == 0
    image = np.asarray(Image.open(sheet).convert("RGB")).astype(int)
    header = GAP + 2 * LINE + SIDE // 2 + GAP
    assert image.shape == (header + 2 * (SIDE + 2 * LINE + GAP), GAP + 5 * (SIDE + GAP), 3)
    shown = Image.open(folder / "2.png").convert("RGB").resize((SIDE, SIDE * 64 // 80), Image.Resampling.BICUBIC)
    top = header + (SIDE - shown.height) // 2
    np.testing.assert_array_equal(image[top : top + shown.height, GAP : GAP + SIDE], np.asarray(shown))
    below = image[header + SIDE : header + SIDE + 2 * LINE, GAP : GAP + SIDE]
    assert below.min() < 100 and below.max() == 255  # rank, score and name are written there
    long = folder / f"{'long' * 30}.png"
    (folder / "0.png").rename(long)
    drawn = contact_sheet("x" * 500, None, [(long, 0.5), (folder / "gone.png", 0.25)])
    assert drawn.width == GAP + 3 * (SIDE + GAP)
    margins = np.asarray(drawn)[:, -GAP // 2 :], np.asarray(drawn)[GAP + 2 * LINE :, GAP + SIDE : GAP + SIDE + GAP]
    assert all((margin == 255).all() for margin in margins)  # no text runs out of its place


def test_a_sheet_that_cannot_be_saved_loses_no_figures(
    search: Search, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openvision3.commands.contact_sheet.LINE", 8200)  # WebP's limit is 16383 pixels
    code, figures, said = search("a panda", "--top", 1, "--out", tmp_path / "sheet.webp")
    assert code == 2 and len(figures["results"]) == 1
    assert f"--out {tmp_path / 'sheet.webp'}: " in said and "pixels can't be saved (" in said


def test_names_that_are_no_utf8_and_look_like_markup(search: Search, folder: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"[red]\xff.png")
    (folder / "0.png").rename(folder / name)
    code, figures, said = search("--like", folder / name, "--top", 1, "--out", tmp_path / "sheet.png")
    assert code == 0 and f"{folder}/[red]\\udcff.png" in search("a panda")[2]
    assert figures["results"][0]["picture"] == f"{folder}/[red]\udcff.png"
    assert (tmp_path / "sheet.png").is_file()
