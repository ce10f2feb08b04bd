"""Reading `.npz` files that others made: pictures as a stream, statistics within a size, never a pickle.

Such a file is a zip of `.npy` members. Nothing is allocated by what a header claims: a member's length must be exactly
that of the array it declares, and the array's shape must be the expected one, before any of it is read.
"""

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from openvision3.config import OpenVisionError

MAX_SIDE = 2048  # pixels; with BLOCK it bounds the memory of one block: 200 MB
MAX_BYTES = 2**38  # of all pictures of a file: 1.4 million of 256 x 256 pixels
BLOCK = 16  # pictures read at once
_MAX_HEADER = 10_000  # bytes of a member's description of its array; numpy's own limit
_READ_AT_ONCE = 1 << 24  # bytes


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class NpzFile:
    """A `.npz` file whose members' names and lengths are known; raises `OpenVisionError` where it is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._zip() as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
        self.names = tuple(info.filename.removesuffix(".npy") for info in members)
        if len(set(self.names)) != len(self.names):
            raise OpenVisionError(f"{path}: names one array twice")

    def pictures(self, name: str = "arr_0") -> tuple[int, int]:
        """How many pictures an array (N, S, S, 3) of uint8 holds, and their side S in pixels.

        Raises `OpenVisionError` for another type or shape, or a member that is not as long as it says.
        """
        with self._member(name) as (_, header):
            shape = header.shape
        if header.dtype != np.uint8:
            raise OpenVisionError(f"{self.path}: {name} is of type {header.dtype}, expected pictures in uint8")
        if len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2]:
            raise OpenVisionError(f"{self.path}: {name} has shape {shape}, expected square pictures (N, S, S, 3)")
        if not 1 <= shape[1] <= MAX_SIDE or shape[0] < 1 or math.prod(shape) > MAX_BYTES:
            raise OpenVisionError(
                f"{self.path}: {name} has shape {shape}; at least one picture is expected, of at most {MAX_SIDE} "
                f"pixels a side, and at most {MAX_BYTES / 1e9:.0f} GB in all"
            )
        return shape[0], shape[1]

    def read_pictures(self, name: str = "arr_0", block: int = BLOCK) -> Iterator[np.ndarray]:
        """The pictures in order, as uint8 arrays (at most `block`, S, S, 3), streamed from the file."""
        count, side = self.pictures(name)
        with self._member(name) as (file, _):
            for start in range(0, count, block):
                rows = min(block, count - start)
                data = _exactly(file, rows * side * side * 3, self.path)
                yield np.frombuffer(data, np.uint8).reshape(rows, side, side, 3)
            file.read(1)  # at its end the member's checksum is compared

    def floats(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A finite float array of exactly that shape, as float64; raises `OpenVisionError` where it is another."""
        with self._member(name) as (file, header):
            if header.dtype not in (np.float32, np.float64) or header.shape != shape:
                raise OpenVisionError(
                    f"{self.path}: {name} is {header.dtype} of shape {header.shape}, expected floats of shape {shape}"
                )
            data = _exactly(file, math.prod(shape) * header.dtype.itemsize, self.path)
            file.read(1)
        array = np.frombuffer(data, header.dtype).reshape(shape).astype(np.float64)
        if not np.isfinite(array).all():
            raise OpenVisionError(f"{self.path}: {name} holds values that are not finite")
        return array

    @contextmanager
    def _zip(self) -> Iterator[zipfile.ZipFile]:
        """The open archive; what zipfile raises for broken ones becomes one line."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                yield archive
        except OSError as error:
            raise OpenVisionError(f"{self.path}: can't be read ({error.strerror or error})") from None
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, KeyError) as error:
            raise OpenVisionError(f"{self.path}: is no readable .npz file ({error})") from None

    @contextmanager
    def _member(self, name: str) -> Iterator[tuple[IO[bytes], _Header]]:
        """An open member behind its header, once its length is known to be that of the array it declares."""
        if name not in self.names:
            raise OpenVisionError(f"{self.path}: has no array {name}; it has {', '.join(self.names) or 'none'}")
        with self._zip() as archive:
            info = archive.getinfo(f"{name}.npy")
            with archive.open(info) as file:
                header = self._header(file, name)
                expected = file.tell() + math.prod(header.shape) * header.dtype.itemsize
                if info.file_size != expected:
                    raise OpenVisionError(
                        f"{self.path}: {name} takes {info.file_size} bytes, but its header says {expected}"
                    )
                yield file, header

    def _header(self, file: IO[bytes], name: str) -> _Header:
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        try:
            version = np.lib.format.read_magic(file)
            shape, fortran, dtype = readers[version](file, max_header_size=_MAX_HEADER)
        except (ValueError, KeyError) as error:
            raise OpenVisionError(f"{self.path}: {name} has no readable header ({str(error)[:100]})") from None
        if dtype.hasobject:
            raise OpenVisionError(f"{self.path}: {name} is a pickle: pickles can run code and are refused")
        if fortran and len(shape) > 1:
            raise OpenVisionError(f"{self.path}: {name} is stored by columns, expected rows (C order)")
        if any(length < 0 for length in shape):
            raise OpenVisionError(f"{self.path}: {name} has shape {shape}")
        return _Header(tuple(map(int, shape)), dtype)


def _exactly(file: IO[bytes], length: int, path: Path) -> bytes:
    """That many bytes, in pieces, so that a file that ends early never costs more memory than it has."""
    pieces, left = [], length
    while left and (piece := file.read(min(left, _READ_AT_ONCE))):
        pieces.append(piece)
        left -= len(piece)
    if left:
        raise OpenVisionError(f"{path}: ends {left} bytes early")
    return b"".join(pieces)
