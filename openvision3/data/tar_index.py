"""Where each sample lies in a tar: found by one walk over its headers, or read from the index file beside it.

The walk is this package's own because it is bounded: it never follows a size or a name further than the file goes,
reads no member's content but long names, and takes what is complete from a tar that was cut short.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from openvision3.config import OpenVisionError

BLOCK = 512
MAX_NAME_RECORD = 64 * 1024  # bytes of a long name or pax header
MAX_INDEX_BYTES = 512 * 2**20
INDEX_VERSION = 1
_REGULAR = (b"0", b"\0", b"7")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\x28\xb5": "zstd", b"\xfd7": "xz"}

Place = tuple[int, int]  # offset and size in bytes


@dataclass(frozen=True)
class Entry:
    """A sample: its key, and where its members lie, by extension ("jpg", "txt", "json")."""

    key: str
    members: dict[str, Place]


@dataclass(frozen=True)
class TarIndex:
    """The samples of one tar in its order. `broken` says what is wrong with its end; empty: nothing."""

    path: Path
    size: int  # bytes of the tar
    entries: list[Entry]
    broken: str = ""


class _CutShort(Exception):
    """The tar ends, or stops making sense, before its end marker."""


def index_path(tar: Path) -> Path:
    """The index file beside a tar: 000000.tar -> 000000.idx.json."""
    return tar.with_suffix(".idx.json")


def scan(path: Path) -> TarIndex:
    """Indexes a tar by walking over its headers once.

    Members with the same path up to the first dot of the file name make a sample, as in WebDataset. A tar that was cut
    short gives its complete samples, and `broken` says so. Raises `OpenVisionError` for a file that is no tar at all.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(BLOCK)
            if start[:2] in _COMPRESSED:
                raise OpenVisionError(
                    f"{path}: is compressed ({_COMPRESSED[start[:2]]}); unpack it to a plain tar first"
                )
            if not start:
                raise OpenVisionError(f"{path}: is empty")
            entries: list[Entry] = []
            broken = ""
            try:
                for name, place in _members(file, size):
                    _add(entries, name, place)
            except _CutShort as error:
                broken = str(error)
    except FileNotFoundError:
        raise OpenVisionError(f"{path}: no such file") from None
    except OSError as error:
        raise OpenVisionError(f"{path}: can't be read ({error.strerror or error})") from None
    if broken and not entries:
        raise OpenVisionError(f"{path}: is not a tar ({broken})")
    if broken and len(entries) > 1 and entries[-1].members.keys() != entries[0].members.keys():
        broken += f"; its last sample {entries.pop().key} is not whole"
    return TarIndex(path, size, entries, broken)


def _add(entries: list[Entry], name: str, place: Place) -> None:
    folder, _, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    if not (stem and dot and extension):
        return  # no sample's member: hidden files, or a name without extension
    key, extension = f"{folder}/{stem}" if folder else stem, extension.lower()
    if not entries or entries[-1].key != key or extension in entries[-1].members:
        entries.append(Entry(key, {}))
    entries[-1].members[extension] = place


def _members(file: BinaryIO, size: int) -> Iterator[tuple[str, Place]]:
    """Yields (name, place) of every regular file that lies whole in the tar; raises `_CutShort` if it ends early."""
    at, long_name, long_size = 0, "", None
    while True:
        file.seek(at)
        header = file.read(BLOCK)
        if header == bytes(BLOCK):
            return
        if len(header) < BLOCK:
            raise _CutShort(f"cut short after {at} bytes")
        length, kind = _read_header(header, at)
        at += BLOCK
        if kind not in (b"x", b"g", b"L", b"K") and long_size is not None:
            length = long_size
        if at + length > size:
            raise _CutShort(f"cut short: a member of {length} bytes begins at byte {at} of {size}")
        if kind in (b"x", b"g", b"L", b"K"):
            if length > MAX_NAME_RECORD:
                raise _CutShort(f"a header record of {length} bytes at byte {at}")
            record = file.read(length)
            if kind == b"L":
                long_name = _text(record)
            elif kind == b"x":
                fields = _read_pax(record)
                long_name = fields.get("path", long_name)
                long_size = int(fields["size"]) if fields.get("size", "").isdecimal() else long_size
        else:
            if kind in _REGULAR:
                yield long_name or _ustar_name(header), (at, length)
            long_name, long_size = "", None
        at += -(-length // BLOCK) * BLOCK


def _read_header(header: bytes, at: int) -> tuple[int, bytes]:
    """Size in bytes and type of a member; raises `_CutShort` where this is no header."""
    plain = header[:148] + b" " * 8 + header[156:]
    try:
        checksum = int(header[148:156].split(b"\0")[0].strip() or b"0", 8)
        field = header[124:136]
        # sizes beyond 8 GiB are stored in base 256, marked by the highest bit
        length = int.from_bytes(field[1:], "big") if field[0] == 0x80 else int(field.split(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        raise _CutShort(f"no member's header at byte {at}") from None
    if checksum != sum(plain) or length < 0:
        raise _CutShort(f"no member's header at byte {at}")
    return length, header[156:157]


def _ustar_name(header: bytes) -> str:
    name, prefix = _text(header[:100]), _text(header[345:500])
    return f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\0" else name


def _text(field: bytes) -> str:
    return field.split(b"\0")[0].decode("utf-8", "replace")


def _read_pax(record: bytes) -> dict[str, str]:
    """The fields of a pax header, lines of "LENGTH KEY=VALUE"; what does not fit that is left out."""
    fields, at = {}, 0
    while at < len(record):
        digits, space, _ = record[at : at + 12].partition(b" ")
        if not (space and digits.isdigit() and int(digits) > len(digits) + 1):
            break
        key, equals, value = record[at + len(digits) + 1 : at + int(digits) - 1].partition(b"=")
        if equals:
            fields[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        at += int(digits)
    return fields


def save_index(index: TarIndex) -> Path:
    """Writes the index file beside the tar, whole or not at all."""
    path = index_path(index.path)
    data = {
        "format_version": INDEX_VERSION,
        "tar_size": index.size,
        "broken": index.broken,
        "samples": [[entry.key, entry.members] for entry in index.entries],
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(data, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def load_index(path: Path) -> TarIndex | None:
    """The index of a tar from its index file, or None where there is none, or one that does not fit the tar."""
    file = index_path(path)
    try:
        size = path.stat().st_size
        if file.stat().st_size > MAX_INDEX_BYTES:
            return None
        return _from_json(path, size, json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _from_json(path: Path, size: int, data: Any) -> TarIndex | None:
    if data["format_version"] != INDEX_VERSION or data["tar_size"] != size:
        return None
    entries = []
    for key, members in data["samples"]:
        places = {extension: (int(offset), int(length)) for extension, (offset, length) in members.items()}
        if not isinstance(key, str) or any(o < 0 or n < 0 or o + n > size for o, n in places.values()):
            return None
        entries.append(Entry(key, places))
    return TarIndex(path, size, entries, str(data["broken"]))


def open_index(path: Path) -> TarIndex:
    """The index of a tar: from its index file where that fits, else by `scan`."""
    return load_index(path) or scan(path)
