"""10,000 mutated tars and indexes: no crash, no hang, no wrong sample (slow: `make test-slow`).

A sample is wrong where one of its members is not what the tar itself, read by Python's tarfile, says it is.
"""

import hashlib
import io
import json
import random
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_tars import write_tar

from openvision3.config import DataConfig, OpenVisionError
from openvision3.data.samples import BadSample, contents, needed
from openvision3.data.shards import TarSource
from openvision3.data.store import Store
from openvision3.data.tar_index import TarIndex, index_path, load_index, save_index, scan

SECONDS = 20  # that no case may take, on a busy machine


def text_of(key: str) -> str:
    """A text that no few changes make into another key's."""
    return hashlib.sha256(key.encode()).hexdigest()


def make_tar(path: Path, kind: int, long_names: bool) -> Path:
    members: dict[str, bytes] = {}
    for i in range(6):
        key = f"{'n' * 120 if long_names else 'k'}{i}"
        buffer = io.BytesIO()
        Image.new("RGB", (4 + i, 5), (i * 40, 10, 20)).save(buffer, "PNG")
        members |= {f"{key}.png": buffer.getvalue(), f"{key}.txt": text_of(key).encode() * (1 + 9 * (i == 3))}
        members[f"{key}.json"] = json.dumps({"caption": "c" + text_of(key)}).encode()
    return write_tar(path, members, kind)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to four changes: of bytes anywhere or in headers, of whole blocks, of the length."""
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 5)):
        at, block = rng.randrange(len(changed)), rng.randrange(len(changed) // 512 or 1) * 512
        match rng.randrange(9):
            case 0:
                changed[at] = rng.randrange(256)
            case 1:
                changed[at] ^= 1 << rng.randrange(8)
            case 2:
                changed = changed[: max(1, at)]
            case 3:
                other = rng.randrange(len(changed) // 512 or 1) * 512
                changed[block : block + 512], changed[other : other + 512] = (
                    changed[other : other + 512],
                    changed[block : block + 512],
                )
            case 4:
                del changed[block : block + 512]
            case 5:
                changed[block:block] = changed[block : block + 512] if rng.random() < 0.5 else rng.randbytes(512)
            case 6:
                changed[block : block + 512] = bytes(len(changed[block : block + 512]))
            case 7:
                changed[at : at + 8] = rng.randbytes(len(changed[at : at + 8]))
            case 8:
                damaged_header(changed, block, rng)
        changed = changed or bytearray(b"\0")
    return bytes(changed)


def damaged_header(data: bytearray, at: int, rng: random.Random) -> None:
    """Changes a field of what may be a header, and makes its checksum fit: only sense can tell."""
    if len(data) < at + 512:
        return
    begin, end = rng.choice([(0, 100), (124, 136), (156, 157), (257, 265), (345, 500)])
    size = end - begin
    number = f"{rng.randrange(8**6):0{max(1, size - 1)}o}".encode()[:size].ljust(size, b"\0")
    values = [rng.randbytes(size), b"7" * size, b"\xff" * size, b"\x80" + bytes(size - 1), number]
    data[at + begin : at + end] = rng.choice([*values, rng.choice([b"x", b"L", b"g", b"5", b"S"]) * size])
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = f"{sum(data[at : at + 512]):06o}\0 ".encode()


def true_member(data: bytes, name: str, offset: int, size: int) -> bool:
    """Whether Python's tarfile takes the block before `offset` for the header of a file of this name and size.

    A long name is in the record before that header. (tarfile's own walk is no measure: of two long names in a row it
    takes the first, where GNU tar takes the last; and it takes the prefix field for part of the name in every format.)
    """
    info = tarfile.TarInfo.frombuf(data[offset - 512 : offset], "utf-8", "replace")
    # an index has extensions in lower case, and no slash in front
    record, name = data[offset - 1024 : offset - 512].decode("utf-8", "replace").lstrip("/").lower(), name.lower()
    long_name = (record.startswith(name) or f" path={name}\n" in record) and data[offset - 1536 :][156:157] in b"Lx"
    named = long_name or name in (info.name.lstrip("/").lower(), info.name.rpartition("/")[2].lower())
    return named and info.isreg() and info.size == size and offset + size <= len(data)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
def test_mutated_tars(tmp_path: Path, part: int) -> None:
    """1,000 at a time, scanned; and read by the index of the tar as it was."""
    rng = random.Random(part)
    path, scanned, read = tmp_path / "a.tar", 0, 0
    for case in range(1000):
        long_names = case % 4 == 3
        make_tar(path, tarfile.PAX_FORMAT if case % 8 == 3 else tarfile.GNU_FORMAT, long_names)
        original, whole = scan(path), path.read_bytes()
        path.write_bytes(mutated(whole, rng))
        begin = time.monotonic()
        try:
            index = scan(path)
        except OpenVisionError:
            index = None
        if index is not None:
            data = path.read_bytes()
            for entry in index.entries:
                for extension, (offset, size) in entry.members.items():
                    name = f"{entry.key}.{extension}"
                    assert true_member(data, name, offset, size), (part, case, name, offset)
                    scanned += 1
            source = try_open(path)
            if source is not None:
                for number in range(len(source)):
                    try_read(source, number)
        read += read_by(original, path)
        assert time.monotonic() - begin < SECONDS
    assert scanned > 3000 and read > 2000  # enough was left to be right or wrong


def try_open(path: Path) -> TarSource | None:
    try:
        return TarSource(path, DataConfig(), shuffle=False)
    except OpenVisionError:
        return None


def try_read(source: TarSource, number: int) -> None:
    try:
        sample = source.read(number)
    except BadSample:
        return
    # a text may have changed, but is never that of another sample whose own members are in place
    assert sample.image.ndim == 3 and len(sample.alt) > 0


def read_by(index: TarIndex, path: Path) -> int:
    """Reads members by an index of another time: each has its own name in its header, or is refused."""
    store, data, count = Store(), path.read_bytes(), 0
    for entry in index.entries:
        try:
            stretch = needed(entry, DataConfig())
            found = contents(entry, stretch, lambda offset, size: store.read(path, offset, size))
        except BadSample:
            continue
        for extension, content in found.items():
            offset, size = entry.members[extension]
            name = f"{entry.key}.{extension}"
            # of long names only the size is compared: their records lie before the stretch that is read
            assert len(name) > 99 or true_member(data, name, offset, size)
            assert content == data[offset : offset + size] and len(content) == size
            count += 1
    store.close_local(path)
    return count


Change = Callable[[dict[str, Any], random.Random], None]


def changed_index(data: dict[str, Any], rng: random.Random) -> None:
    """Changes one field of an index: a value, the order or number of values, the type, or leaves it out."""
    name = rng.choice(list(data))
    value = data[name]
    junk: list[Any] = [None, -1, 2**70, 1.5, "x", [], {}, [[1]], True, float("nan")]
    if isinstance(value, list) and value and rng.random() < 0.8:
        at, other = rng.randrange(len(value)), rng.randrange(len(value))
        match rng.randrange(5):
            case 0:
                value[at], value[other] = value[other], value[at]
            case 1:
                del value[at]
            case 2:
                value.insert(at, value[other])
            case 3:
                value[at] = rng.choice(junk)
            case 4 if isinstance(value[at], int):
                value[at] += rng.choice([-512, -1, 1, 512, 1024, 1536])
    elif rng.random() < 0.3:
        del data[name]
    else:
        data[name] = rng.choice(junk)


def with_checksum(path: Path, data: dict[str, Any]) -> dict[str, Any]:
    """The index with a checksum that fits what it says, where it says anything."""
    try:
        counts, kinds = np.array(data["members"], np.int64), np.array(data["kinds"], np.int64)
        places = np.array([data["offsets"], data["sizes"]], np.int64).T
        args = (path, data["tar_size"], data["keys"], data["extensions"], counts, kinds, places, data["broken"])
        return {**data, "crc32": TarIndex(*args).to_json()["crc32"]}
    except Exception:  # of every kind, on such values
        return data


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
def test_mutated_indexes(tmp_path: Path, part: int) -> None:
    """1,000 at a time: half as bytes, half by fields with a checksum that fits, so that only reading can tell."""
    rng = random.Random(part + 100)
    path = make_tar(tmp_path / "a.tar", tarfile.USTAR_FORMAT, long_names=False)
    good = save_index(scan(path))
    assert isinstance(good, Path)
    whole, used, refused = good.read_text(), 0, 0
    for case in range(1000):
        begin = time.monotonic()
        if case % 2:
            data = json.loads(whole)
            for _ in range(rng.randrange(1, 4)):
                changed_index(data, rng)
            index_path(path).write_text(json.dumps(with_checksum(path, data)))
        else:
            index_path(path).write_bytes(mutated(whole.encode(), rng))
        used += load_index(path) is not None
        source = TarSource(path, DataConfig(), shuffle=False)
        for number in range(len(source)):
            try:
                sample = source.read(number)
            except BadSample:
                refused += 1
                continue
            key, i = sample.key, int(sample.key[1:])
            # where an index leaves out a text, the other stands in
            own = (text_of(key) * (1 + 9 * (i == 3)), "c" + text_of(key))
            assert sample.alt in own and sample.caption in own, (part, case, key)
            assert sample.image.shape == (5, 4 + i, 3) and sample.image[0, 0, 0] == i * 40, (part, case, key)
        assert time.monotonic() - begin < SECONDS
    assert used > 50 and refused > 50  # the deeper defence was put to the test
