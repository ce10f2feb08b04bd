"""Finding, grouping and prefetching of the pictures that commands read."""

import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from openvision3.commands.pictures import Picture, batches, find_pictures
from openvision3.config import OpenVisionError

SUFFIX = ".reconstructed.png"


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def outputs(root: Path, *inputs: Path, **options: object) -> dict[str, str]:
    found = find_pictures(inputs, SUFFIX, **options)  # type: ignore[arg-type]
    return {str(p.path.relative_to(root)): str((p.output or p.path).relative_to(root)) for p in found.pictures}


def test_folders_give_their_pictures_sorted_and_without_earlier_outputs(tmp_path: Path) -> None:
    touch(tmp_path, "b.JPG", "a.png", "sub/c.webp", "a.reconstructed.png", "notes.txt", ".hidden.png", ".git/x.png")
    assert outputs(tmp_path, tmp_path) == {
        "a.png": "a.reconstructed.png",
        "b.JPG": "b.reconstructed.png",
        "sub/c.webp": "sub/c.reconstructed.png",
    }
    found = find_pictures([tmp_path], SUFFIX)
    assert (found.earlier_outputs, found.other_files) == (1, 1)


def test_pictures_that_differ_in_the_extension_keep_it(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "a.jpg", "b.jpg")
    assert outputs(tmp_path, tmp_path) == {
        "a.jpg": "a.jpg.reconstructed.png",
        "a.png": "a.png.reconstructed.png",
        "b.jpg": "b.reconstructed.png",
    }


def test_out_keeps_a_folders_shape_and_refuses_two_results_in_one_file(tmp_path: Path) -> None:
    touch(tmp_path, "in/sub/c.png", "x/same.png", "y/same.png")
    assert outputs(tmp_path, tmp_path / "in", out=tmp_path / "out") == {"in/sub/c.png": "out/sub/c.reconstructed.png"}
    found = find_pictures([tmp_path / "x" / "same.png", tmp_path / "y" / "same.png"], SUFFIX, tmp_path / "out")
    assert [p.path.parent.name for p in found.pictures] == ["x"]
    assert found.failed == 1 and "already the output of" in found.failures[0]


def test_keys_are_paths_inside_the_folder_that_was_given(tmp_path: Path) -> None:
    touch(tmp_path, "in/sub/c.png", "in/a.png", "b.png")
    for suffix in ("", SUFFIX):
        found = find_pictures([tmp_path / "in", tmp_path / "b.png"], suffix)
        assert [p.key for p in found.pictures] == ["a.png", "sub/c.png", "b.png"]


def test_files_are_taken_as_named_and_once(tmp_path: Path) -> None:
    touch(tmp_path, "odd", "a.reconstructed.png")
    given = [tmp_path / "odd", tmp_path / "missing.png", tmp_path / "odd", tmp_path / "a.reconstructed.png"]
    assert [p.path.name for p in find_pictures(given).pictures] == ["odd", "missing.png", "a.reconstructed.png"]


def test_an_output_never_replaces_an_input(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "a.reconstructed.png")
    found = find_pictures([tmp_path / "a.png", tmp_path / "a.reconstructed.png"], SUFFIX)
    assert found.failed == 1 and "already one of the inputs" in found.failures[0]
    for suffix in (".png", "/x.png"):
        with pytest.raises(OpenVisionError, match="--suffix"):
            find_pictures([tmp_path / "a.png"], suffix)
    with pytest.raises(OpenVisionError, match="at least one"):
        find_pictures([])


def sized(sizes: dict[str, tuple[int, int]]) -> "tuple[list[Picture], object]":
    def prepare(path: Path) -> tuple[Tensor, tuple[int, int]]:
        if path.name not in sizes:
            raise OpenVisionError(f"{path.name}: broken")
        height, width = sizes[path.name]
        return torch.full((3, height, width), float(list(sizes).index(path.name))), (height - 1, width - 2)

    return [Picture(Path(name)) for name in sizes], prepare


def test_batches_group_by_size_and_hold_every_picture_once() -> None:
    names = {f"p{i}": ((32, 32), (32, 48), (64, 32))[i % 3] for i in range(20)}
    pictures, prepare = sized(names)
    failures: list[str] = []
    pictures.insert(7, Picture(Path("bad")))
    seen: list[str] = []
    counts = []
    for group, images in batches(pictures, prepare, 4, lambda picture, line: failures.append(line)):  # type: ignore[arg-type]
        counts.append(len(group))
        for picture, image in zip(group, images, strict=True):
            height, width = names[picture.path.name]
            assert tuple(image.shape[1:]) == (height, width)
            assert picture.size == (height - 1, width - 2)
            assert image[0, 0, 0] == list(names).index(picture.path.name)
            seen.append(picture.path.name)
    assert sorted(seen) == sorted(names)
    assert failures == ["bad: broken"]
    assert counts == [4, 4, 4, 3, 3, 2]


def test_one_size_keeps_the_order_and_large_pictures_go_in_smaller_batches() -> None:
    pictures, prepare = sized({f"p{i}": (256, 256) for i in range(5)})
    assert [[p.path.name for p in group] for group, _ in batches(pictures, prepare, 2, print)] == [  # type: ignore[arg-type]
        ["p0", "p1"],
        ["p2", "p3"],
        ["p4"],
    ]
    pictures, prepare = sized({f"p{i}": (512, 512) for i in range(3)})
    assert [len(group) for group, _ in batches(pictures, prepare, 4, print)] == [1, 1, 1]  # type: ignore[arg-type]


def test_what_waits_is_bounded_when_every_picture_has_its_own_size() -> None:
    """120 sizes of which none fills a batch of 4: some must leave before the last is read."""
    alive = 0
    most = 0

    def prepare(path: Path) -> tuple[Tensor, tuple[int, int]]:
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return torch.zeros(3, 128, 128 + int(path.name)), (128, 128)

    pictures = [Picture(Path(str(i))) for i in range(120)]
    for group, _ in batches(pictures, prepare, 4, lambda picture, line: None):
        alive -= len(group)
    assert alive == 0
    # four batches' area waits for company (each has at least 128 x 128 pixels); three groups are on their way
    assert most <= 4 * 4 * 256**2 // 128**2 + 4


def test_a_caller_that_stops_early_stops_the_thread() -> None:
    pictures, prepare = sized({f"p{i}": (16, 16) for i in range(200)})
    iterator = batches(pictures, prepare, 1, lambda picture, line: None)  # type: ignore[arg-type]
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    time.sleep(0.2)
    assert not [thread for thread in threading.enumerate() if thread.name == "pictures"]


def test_a_fault_of_the_thread_reaches_the_caller() -> None:
    def prepare(path: Path) -> tuple[Tensor, tuple[int, int]]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(batches([Picture(Path("a"))], prepare, 1, lambda picture, line: None))
