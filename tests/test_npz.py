"""Pictures and statistics of `.npz` files and folders, hostile ones among them."""

import io
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from openvision3.config import OpenVisionError
from openvision3.evaluation import npz, picture_sets
from openvision3.evaluation.npz import NpzFile
from openvision3.evaluation.picture_sets import open_generated, open_reference, sample_batches, sha256_of


def pictures(count: int, side: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def header(shape: tuple[int, ...], dtype: str = "|u1", fortran: bool = False) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": fortran, "shape": shape})
    return file.getvalue()


def write_member(path: Path, content: bytes, name: str = "arr_0", method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(f"{name}.npy", content)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("block", [1, 7, 16, 100])
def test_pictures_come_back_in_blocks(save: object, block: int, tmp_path: Path) -> None:
    expected = pictures(21)
    save(tmp_path / "s.npz", expected, y=np.arange(21))  # type: ignore[operator]
    file = NpzFile(tmp_path / "s.npz")
    assert file.pictures() == (21, 8) and set(file.names) == {"arr_0", "y"}
    blocks = list(file.read_pictures(block=block))
    assert [len(b) for b in blocks] == [min(block, 21 - i) for i in range(0, 21, block)]
    assert np.array_equal(np.concatenate(blocks), expected)


def test_pictures_are_never_read_whole(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "s.npz", np.zeros((400, 128, 128, 3), np.uint8))  # 20 MB
    file = NpzFile(tmp_path / "s.npz")
    tracemalloc.start()
    assert sum(len(block) for block in file.read_pictures()) == 400
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6


def test_truncated_claims_cost_no_memory(tmp_path: Path) -> None:
    """A header of 200 GB in front of a few bytes, and a member whose length is right but whose data ends early."""
    for shape in ((1_000_000, 256, 256, 3), (2**40, 256, 256, 3)):
        bomb = NpzFile(write_member(tmp_path / "bomb.npz", header(shape) + b"0" * 100))
        with pytest.raises(OpenVisionError, match="its header says"):
            bomb.pictures()
    np.savez(tmp_path / "cut.npz", pictures(50))
    content = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[:4000])
    with pytest.raises(OpenVisionError, match="no readable .npz"):
        NpzFile(tmp_path / "cut.npz")


def test_deflated_zeros_are_refused_by_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "bomb.npz", np.zeros((100, 64, 64, 3), np.uint8))
    assert (tmp_path / "bomb.npz").stat().st_size < 3000
    monkeypatch.setattr(npz, "MAX_BYTES", 100 * 64 * 64 * 3 - 1)
    with pytest.raises(OpenVisionError, match="at most"):
        NpzFile(tmp_path / "bomb.npz").pictures()
    wide = np.zeros((1, npz.MAX_SIDE + 1, npz.MAX_SIDE + 1, 3), np.uint8)
    np.savez_compressed(tmp_path / "wide.npz", wide)
    with pytest.raises(OpenVisionError, match="at most"):
        NpzFile(tmp_path / "wide.npz").pictures()


def test_pickled_arrays_are_refused_unread(tmp_path: Path) -> None:
    class Program:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "ran",))  # type: ignore[return-value]

    np.savez(tmp_path / "p.npz", np.array([Program()], dtype=object), mu=np.array([Program()], dtype=object))
    file = NpzFile(tmp_path / "p.npz")
    for read in (file.pictures, lambda: file.floats("mu", (1,)), lambda: next(file.read_pictures())):
        with pytest.raises(OpenVisionError, match="is a pickle"):
            read()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), "uint8"),
        (np.zeros((2, 8, 8, 3), np.int8), "uint8"),
        (np.zeros((2, 3, 8, 8), np.uint8), "shape"),
        (np.zeros((2, 8, 9, 3), np.uint8), "shape"),
        (np.zeros((8, 8, 3), np.uint8), "shape"),
        (np.zeros((0, 8, 8, 3), np.uint8), "at least one"),
        (np.asfortranarray(np.zeros((2, 8, 8, 3), np.uint8)), "columns"),
    ],
)
def test_wrong_arrays_are_named(array: np.ndarray, said: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", array)
    with pytest.raises(OpenVisionError, match=said):
        NpzFile(tmp_path / "w.npz").pictures()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not numpy",
        b"\x93NUMPY\x01\x00\xff\xff",
        b"\x93NUMPY\x07\x00",
        header((-2, 8, 8, 3)),
        header((2, 8, 8, 3)),
    ],
)
def test_broken_members_are_one_line(content: bytes, tmp_path: Path) -> None:
    file = NpzFile(write_member(tmp_path / "b.npz", content))
    with pytest.raises(OpenVisionError, match="b.npz"):
        file.pictures()


def test_no_zip_a_missing_file_a_missing_array_and_bad_data(tmp_path: Path) -> None:
    (tmp_path / "no.npz").write_bytes(b"PK no zip")
    with pytest.raises(OpenVisionError, match="no readable"):
        NpzFile(tmp_path / "no.npz")
    with pytest.raises(OpenVisionError, match="can't be read"):
        NpzFile(tmp_path / "missing.npz")
    np.savez(tmp_path / "other.npz", labels=np.arange(3))
    with pytest.raises(OpenVisionError, match="it has labels"):
        NpzFile(tmp_path / "other.npz").pictures()
    np.savez(tmp_path / "bad.npz", pictures(4))
    content = bytearray((tmp_path / "bad.npz").read_bytes())
    content[300] ^= 1  # a pixel: the member's checksum no longer fits
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(OpenVisionError, match="no readable"):
        list(NpzFile(tmp_path / "bad.npz").read_pictures())


def test_statistics_of_a_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_sets, "POOLED", 4)
    monkeypatch.setattr(picture_sets, "SPATIAL", 3)
    good = {
        "mu": np.arange(4.0),
        "sigma": np.eye(4, dtype=np.float32) * 2,
        "mu_s": np.arange(3, dtype=np.float32),
        "sigma_s": np.eye(3),
    }
    np.savez(tmp_path / "r.npz", **good)
    reference = open_reference(tmp_path / "r.npz", 8)
    assert reference.pictures is None and reference.pooled is not None and reference.spatial is not None
    assert reference.pooled.mean.tolist() == [0, 1, 2, 3] and reference.pooled.covariance.trace() == 8
    assert reference.spatial.mean.dtype == reference.spatial.covariance.dtype == reference.pooled.mean.dtype
    skew = np.eye(4)
    skew[0, 1] = 1
    for change, said in (
        ({"mu": np.arange(5.0)}, r"shape \(4,\)"),
        ({"sigma": np.eye(4, dtype=np.int64)}, "floats"),
        ({"sigma": np.full((4, 4), np.nan)}, "finite"),
        ({"sigma": skew}, "symmetric"),
    ):
        np.savez(tmp_path / "r.npz", **(good | change))  # pyright: ignore[reportArgumentType]
        with pytest.raises(OpenVisionError, match=said):
            open_reference(tmp_path / "r.npz", 8)
    np.savez(tmp_path / "r.npz", mu=good["mu"])
    with pytest.raises(OpenVisionError, match="neither"):
        open_reference(tmp_path / "r.npz", 8)


def test_folders_and_npz_give_the_same_pictures(tmp_path: Path) -> None:
    expected = pictures(9)
    folder = tmp_path / "folder"
    for i, picture in enumerate(expected):
        path = folder / f"class{i % 2}" / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    np.savez(tmp_path / "s.npz", expected)
    from_folder = open_generated(folder)
    keys = [sample.key for batch, _ in sample_batches(from_folder, 4) for sample in batch]
    assert keys == [f"class{c}/{i:03}.png" for c in (0, 1) for i in range(c, 9, 2)]
    by_key = {sample.key: sample.image for sample in from_folder}
    for sample in open_generated(tmp_path / "s.npz"):
        assert np.array_equal(by_key[f"class{int(sample.key) % 2}/{int(sample.key):03}.png"], sample.image)
    assert [sample.key for sample in open_generated(tmp_path / "s.npz", samples=3)] == ["0", "3", "6"]
    pixels = next(batch for _, batch in sample_batches(open_generated(tmp_path / "s.npz"), 4))
    assert pixels.shape == (4, 3, 8, 8) and np.array_equal(pixels[1].permute(1, 2, 0).numpy(), expected[1])


def test_pictures_of_another_size_are_named_and_left_out(tmp_path: Path) -> None:
    for i, side in enumerate((8, 8, 16)):
        Image.fromarray(pictures(1, side)[0]).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").touch()
    samples = open_generated(tmp_path)
    assert [sample.key for sample in samples] == ["0.png", "1.png"]
    assert [Path(name).name for name, _ in samples.failed] == ["2.png", "3.png"]
    Image.new("RGB", (8, 9)).save(tmp_path / "0.png")
    with pytest.raises(OpenVisionError, match="square"):
        open_generated(tmp_path)
    for empty in (tmp_path / "none", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(OpenVisionError):
            open_generated(empty)


def test_the_hash_of_a_folder_is_that_of_sha256sum(tmp_path: Path) -> None:
    """cd FOLDER; find . -name '*.png' -printf '%P\\n' | LC_ALL=C sort | xargs sha256sum | sha256sum"""
    import subprocess

    for name in ("b.png", "a.png"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "samples.jsonl").write_text("{}")
    expected = subprocess.run(
        "sha256sum a.png b.png | sha256sum", shell=True, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert sha256_of(tmp_path) == expected.stdout.split()[0]
