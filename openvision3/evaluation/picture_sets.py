"""The two sides of an evaluation of generated pictures: folders or `.npz` files, each with its count and hash."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from openvision3.config import OpenVisionError
from openvision3.data.transforms import load_image
from openvision3.evaluation.fidelity import Statistics
from openvision3.evaluation.inception import POOLED, SPATIAL
from openvision3.evaluation.npz import NpzFile
from openvision3.evaluation.samples import PICTURE_SUFFIXES, EvalSample, SampleSet, folder_samples

OVERVIEW = "sheet.png"  # of a folder of generated pictures


@dataclass(frozen=True)
class Reference:
    """What samples are compared with: pictures, ready statistics of Inception's features (ADM's file), or both."""

    name: str
    sha256: str
    pictures: SampleSet | None
    pooled: Statistics | None = None
    spatial: Statistics | None = None


def open_generated(path: Path, samples: int = 0) -> SampleSet:
    """Generated pictures as they are, square and of one size: a folder of files, or the array `arr_0` of a `.npz`.

    `samples` takes only so many, spread evenly (0: all). Files are sorted by path; those that can't be read, or have
    another size than the first that can, are left out and named in `failed`. Raises `OpenVisionError` where there is
    nothing to read.
    """
    if path.suffix == ".npz":
        return _npz_pictures(NpzFile(path), samples)
    files = picture_files(path)
    size, chosen = _first_size(files), [files[i] for i in _spread(len(files), samples)]

    def make(self: SampleSet) -> Iterator[EvalSample]:
        for file in chosen:
            try:
                pixels = np.array(load_image(file))
                if pixels.shape != (size, size, 3):
                    height, width = pixels.shape[:2]
                    raise OpenVisionError(f"{file}: has {width} x {height} pixels, not {size} x {size}")
            except OpenVisionError as error:
                self.failed.append((str(file), str(error)))
                continue
            yield EvalSample(file.relative_to(path).as_posix(), pixels)

    protocol = f"{len(chosen)} of {len(files)} pictures below {path}, {size} px, as they are"
    return SampleSet(str(path), protocol, size, None, make)


def open_reference(path: Path, size: int, samples: int = 0) -> Reference:
    """Real pictures to compare with: a folder (resized and cropped to `size` pixels), or a `.npz` such as ADM's.

    A `.npz` has pictures (`arr_0`, uint8 (N, S, S, 3)), statistics of Inception's features (`mu`, `sigma`, `mu_s`,
    `sigma_s`), or both. Raises `OpenVisionError` for anything else.
    """
    if path.suffix != ".npz":
        picture_files(path)  # says what is missing
        return Reference(str(path), sha256_of(path), folder_samples(path, size, samples))
    file = NpzFile(path)
    pictures = _npz_pictures(file, samples) if "arr_0" in file.names else None
    pooled = _statistics(file, "mu", "sigma", POOLED)
    if pictures is None and pooled is None:
        raise OpenVisionError(f"{path}: has neither pictures (arr_0) nor statistics (mu, sigma)")
    return Reference(str(path), sha256_of(path), pictures, pooled, _statistics(file, "mu_s", "sigma_s", SPATIAL))


def picture_files(folder: Path) -> list[Path]:
    """All pictures below a folder, sorted by path, but the overview that `ov3 generate sample` writes there.

    Raises `OpenVisionError` where there are none.
    """
    if not folder.is_dir():
        raise OpenVisionError(f"{folder}: no such folder (or .npz file) of pictures")
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in PICTURE_SUFFIXES and f.is_file())
    files = [file for file in files if file != folder / OVERVIEW]
    if not files:
        raise OpenVisionError(f"{folder} holds no pictures ({', '.join(sorted(PICTURE_SUFFIXES))})")
    return files


def sha256_of(path: Path) -> str:
    """The sha256 of a file; of a folder, that of the lines that sha256sum prints for its sorted pictures."""
    if path.is_file():
        return _file_sha256(path)
    lines = (f"{_file_sha256(file)}  {file.relative_to(path).as_posix()}\n" for file in picture_files(path))
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def sample_batches(samples: SampleSet, batch_size: int) -> Iterator[tuple[list[EvalSample], Tensor]]:
    """The pictures of a set, in order, at most `batch_size` at once, and as uint8 tensors (B, 3, S, S)."""
    pictures = iter(samples)
    while batch := list(islice(pictures, batch_size)):
        pixels = torch.from_numpy(np.stack([sample.image for sample in batch]))
        yield batch, rearrange(pixels, "b h w c -> b c h w").contiguous()


def _npz_pictures(file: NpzFile, samples: int) -> SampleSet:
    total, size = file.pictures()
    chosen = set(_spread(total, samples))

    def make(_: SampleSet) -> Iterator[EvalSample]:
        rows = (row for block in file.read_pictures() for row in block)
        for index, row in enumerate(rows):
            if index in chosen:
                yield EvalSample(str(index), row)

    protocol = f"{len(chosen)} of {total} pictures of {file.path}, {size} px, as they are"
    return SampleSet(str(file.path), protocol, size, None, make)


def _spread(total: int, samples: int) -> list[int]:
    count = min(samples or total, total)
    return [i * total // count for i in range(count)]


def _statistics(file: NpzFile, mean: str, covariance: str, width: int) -> Statistics | None:
    """Stored statistics; their number of pictures is not stored with them (0)."""
    if mean not in file.names or covariance not in file.names:
        return None
    matrix = file.floats(covariance, (width, width))
    if not np.allclose(matrix, matrix.T, rtol=1e-3, atol=1e-6 * float(np.abs(matrix).max())):
        raise OpenVisionError(f"{file.path}: {covariance} is no covariance: it is not symmetric")
    return Statistics(torch.from_numpy(file.floats(mean, (width,))), torch.from_numpy(matrix), 0)


def _first_size(files: list[Path]) -> int:
    """Side of the first picture that can be read, in pixels."""
    reason = ""
    for file in files:
        try:
            width, height = load_image(file).size
        except OpenVisionError as error:
            reason = reason or str(error)
            continue
        if width != height:
            raise OpenVisionError(f"{file}: has {width} x {height} pixels, but generated pictures must be square")
        return width
    raise OpenVisionError(f"not one picture could be read (first: {reason})")


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
