"""Where each sample lies in a tar: found by one walk over its headers, or read from the index file beside it.

The walk is this package's own because it is bounded: it never follows a size or a name further than the file goes,
reads no member's content but long names, and takes what is complete from a tar that was cut short.
"""

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openvision3.config import OpenVisionError
from openvision3.data.store import ForwardReader, Location, Store, name_of, sibling

BLOCK = 512
MAX_NAME_RECORD = 64 * 1024  # bytes of a long name or pax header
MAX_INDEX_BYTES = 512 * 2**20
INDEX_VERSION = 2
_REGULAR = (b"0", b"\0", b"7")
_RECORDS = (b"x", b"g", b"L", b"K")  # they say something of the member that follows
_EMPTY = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices and folders: no content, whatever size they claim
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\x28\xb5": "zstd", b"\xfd7": "xz"}
_CHUNK = 1024  # headers whose checksums are computed together

Place = tuple[int, int]  # offset and size in bytes


@dataclass(frozen=True)
class Entry:
    """A sample: its key, and where its members lie, by extension ("jpg", "txt", "json"), in the tar's order."""

    key: str
    members: dict[str, Place]


class TarIndex:
    """The samples of one tar in its order, as arrays: some 100 bytes a sample.

    `size` is the tar's, in bytes. `broken` says what is wrong with its end; empty: nothing.
    """

    def __init__(
        self,
        path: Location,
        size: int,
        keys: Sequence[str],
        extensions: Sequence[str],
        counts: np.ndarray,  # members of each sample
        kinds: np.ndarray,  # of each member: its extension's number
        places: np.ndarray,  # (members, 2): offset and size
        broken: str = "",
    ):
        self.path, self.size, self.broken = path, size, broken
        encoded = [key.encode("utf-8", "surrogatepass") for key in keys]
        self._keys = b"".join(encoded)
        self._key_ends = np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)))
        self.extensions = tuple(extensions)
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._kinds = kinds.astype(np.int32)
        self._places = places.astype(np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._ends)

    def key(self, number: int) -> str:
        """The key of a sample."""
        begin = int(self._key_ends[number - 1]) if number else 0
        return self._keys[begin : int(self._key_ends[number])].decode("utf-8", "surrogatepass")

    def entry(self, number: int) -> Entry:
        """The sample that is `number` in the tar's order, from 0."""
        begin, end = int(self._ends[number - 1]) if number else 0, int(self._ends[number])
        kinds, places = self._kinds[begin:end].tolist(), self._places[begin:end].tolist()
        members = {self.extensions[kind]: (o, n) for kind, (o, n) in zip(kinds, places, strict=True)}
        return Entry(self.key(number), members)

    @property
    def entries(self) -> list[Entry]:
        """All samples, as objects."""
        return [self.entry(number) for number in range(len(self))]

    def select(self, numbers: Sequence[int]) -> "TarIndex":
        """The index with these samples alone."""
        chosen = np.asarray(numbers, np.int64)
        counts = np.diff(self._ends, prepend=0)
        members = np.zeros(len(self), bool)
        members[chosen] = True
        members = np.repeat(members, counts)
        keys = [self.key(int(number)) for number in chosen]
        kinds, places = self._kinds[members], self._places[members]
        return TarIndex(self.path, self.size, keys, self.extensions, counts[chosen], kinds, places, self.broken)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TarIndex):
            return NotImplemented
        same = (self.path, self.size, self.broken) == (other.path, other.size, other.broken)
        return same and self.entries == other.entries

    def to_json(self) -> dict[str, Any]:
        """What an index file holds."""
        return {
            "format_version": INDEX_VERSION,
            "tar_size": self.size,
            "broken": self.broken,
            "crc32": self.checksum(),
            "extensions": list(self.extensions),
            "keys": [self.key(number) for number in range(len(self))],
            "members": np.diff(self._ends, prepend=0).tolist(),
            "kinds": self._kinds.tolist(),
            "offsets": self._places[:, 0].tolist(),
            "sizes": self._places[:, 1].tolist(),
        }

    def checksum(self) -> int:
        """crc32 of all that the index says."""
        parts = (
            json.dumps([self.size, self.broken, self.extensions]).encode(),
            self._keys, self._key_ends.tobytes(), self._ends.tobytes(), self._kinds.tobytes(), self._places.tobytes(),
        )  # fmt: skip
        checksum = 0
        for part in parts:
            checksum = zlib.crc32(part, checksum)
        return checksum


def _from_json(path: Location, data: dict[str, Any]) -> TarIndex | None:
    """The index that an index file holds; None, or an error of any kind, where it holds none."""
    if data["format_version"] != INDEX_VERSION:
        return None
    counts, kinds = (np.array(data[name], np.int64) for name in ("members", "kinds"))
    places = np.array([data["offsets"], data["sizes"]], np.int64).T
    keys, extensions, size, broken = data["keys"], data["extensions"], data["tar_size"], data["broken"]
    texts = [broken, *keys, *extensions]
    if not (isinstance(size, int) and all(isinstance(text, str) for text in texts)):
        return None
    if not (len(counts) == len(keys) and counts.sum() == len(kinds) == len(places) and (counts > 0).all()):
        return None
    if len(kinds) and not (kinds.min() >= 0 and kinds.max() < len(extensions) and _inside(places, size)):
        return None
    index = TarIndex(path, size, keys, extensions, counts, kinds, places, broken)
    # the checksum is of what was understood: a file that was changed anywhere that matters is not used
    return index if index.checksum() == data["crc32"] else None


def _inside(places: np.ndarray, size: int) -> bool:
    return bool((places >= 0).all() and (places <= size).all() and (places.sum(1) <= size).all())


class NotATar(OpenVisionError):
    """A file that is empty, or has no tar's header where one must be."""


class _CutShort(Exception):
    """The tar ends, or stops making sense, before its end marker."""


def index_path(tar: Path) -> Path:
    """The index file beside a tar: 000000.tar -> 000000.idx.json."""
    return tar.with_suffix(".idx.json")


def _index_location(tar: Location) -> Location:
    return index_path(tar) if isinstance(tar, Path) else sibling(tar, name_of(tar).removesuffix(".tar") + ".idx.json")


def scan(path: Location, store: Store | None = None) -> TarIndex:
    """Indexes a tar by walking over its headers once.

    Members with the same path up to the first dot of the file name make a sample, as in WebDataset. A tar that was cut
    short gives its complete samples, and `broken` says so. Raises `OpenVisionError` for a file that is no tar at all.
    """
    store = store or Store()
    if isinstance(path, Path) and path.is_dir():
        raise OpenVisionError(f"{path}: is a folder, not a tar")
    reader = ForwardReader(store, path)
    try:
        start = reader.read(0, BLOCK)
        if start[:2] in _COMPRESSED:
            raise OpenVisionError(f"{path}: is compressed ({_COMPRESSED[start[:2]]}); unpack it to a plain tar first")
        if not start:
            raise NotATar(f"{path}: is empty")
        gathered, broken = _Gathered(), ""
        try:
            for members in _members(reader):
                for name, offset, length in members:
                    gathered.add(name, offset, length)
        except _CutShort as error:
            broken = str(error)
    finally:
        reader.close()
    if broken and not gathered.keys:
        raise NotATar(f"{path}: is not a tar ({broken})")
    if broken and len(gathered.keys) > 1 and gathered.kinds_of(-1) != gathered.kinds_of(0):
        broken += f"; its last sample {gathered.drop_last()} is not whole"
    return gathered.index(path, reader.size, broken)


class _Gathered:
    """Members put together to samples, in flat lists."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.starts: list[int] = []  # of each sample: its first member
        self.extensions: dict[str, int] = {}
        self.kinds: list[int] = []
        self.offsets: list[int] = []
        self.lengths: list[int] = []
        self._kinds: dict[str, int] = {}  # of extensions as they are written
        self._present: set[int] = set()  # kinds of the last sample
        self._start = "\0"  # of the names of the last sample's members: its key and a dot

    def add(self, name: str, offset: int, length: int) -> None:
        same = name.startswith(self._start)  # most members belong to the sample before
        extension = name[len(self._start) :] if same else ""
        if not extension or "/" in extension:
            slash = name.rfind("/") + 1
            dot = name.find(".", slash)
            if dot <= slash or dot == len(name) - 1:
                return  # no sample's member: hidden files, or a name without extension
            same, extension = False, name[dot + 1 :]
        kind = self._kinds.get(extension)
        if kind is None:
            kind = self.extensions.setdefault(extension.lower(), len(self.extensions))
            self._kinds[extension] = kind
        if not same or kind in self._present:
            self._start = name[: len(name) - len(extension)]
            self.keys.append(self._start[:-1].removeprefix("/") if self._start.rfind("/") == 0 else self._start[:-1])
            self.starts.append(len(self.kinds))
            self._present = set()
        self._present.add(kind)
        self.kinds.append(kind)
        self.offsets.append(offset)
        self.lengths.append(length)

    def kinds_of(self, number: int) -> set[int]:
        starts = [*self.starts, len(self.kinds)]
        number %= len(self.starts)
        return set(self.kinds[starts[number] : starts[number + 1]])

    def drop_last(self) -> str:
        start = self.starts.pop()
        del self.kinds[start:], self.offsets[start:], self.lengths[start:]
        return self.keys.pop()

    def index(self, path: Location, size: int, broken: str) -> TarIndex:
        counts = np.diff(np.array([*self.starts, len(self.kinds)], np.int64))
        places = np.array([self.offsets, self.lengths], np.int64).T
        kinds = np.array(self.kinds, np.int32)
        return TarIndex(path, size, self.keys, list(self.extensions), counts, kinds, places, broken)


def _members(reader: ForwardReader) -> Iterator[list[tuple[str, int, int]]]:
    """Yields lists of (name, offset, size) of the regular files that lie whole in the tar.

    Raises `_CutShort` if it ends early. Headers are walked first and their checksums computed together, many at a time:
    one that fails ends the list before whatever was read in its wake.
    """
    size, block, start = reader.size, b"", 0
    at, long_name, long_size = 0, "", None
    done, end = False, bytes(BLOCK)
    while not done:
        headers: list[bytes] = []
        places: list[int] = []  # of the headers
        members: list[tuple[int, str, int, int]] = []  # header's number here, name, offset, size
        problem = ""
        while len(headers) < _CHUNK:
            header = block[at - start : at - start + BLOCK]
            if len(header) < BLOCK:
                start, block = at, reader.block(at)
                header = block[:BLOCK]
            if header == end:
                done = True
                break
            if len(header) < BLOCK:
                problem = f"cut short after {at} bytes"
                break
            length, kind = _length(header), header[156:157]
            if length < 0:
                problem = f"no member's header at byte {at}"
                break
            headers.append(header)
            places.append(at)
            at += BLOCK
            if kind == b"0" and not long_name and long_size is None and at + length <= size:  # as nearly always
                members.append((len(headers) - 1, member_name(header), at, length))
                at += (length + 511) & -BLOCK
                continue
            if kind in _EMPTY:
                length = 0
            elif kind not in _RECORDS and long_size is not None:
                length = long_size
            if at + length > size:
                problem = f"cut short: a member of {length} bytes begins at byte {at} of {size}"
                break
            if kind in _RECORDS:
                if length > MAX_NAME_RECORD:
                    problem = f"a header record of {length} bytes at byte {at}"
                    break
                if long_name and kind in (b"x", b"L"):
                    problem = f"two names for one member at byte {at}"
                    break
                record = reader.read(at, length)
                if kind == b"L":
                    long_name = _text(record)
                elif kind == b"x":
                    fields = _read_pax(record)
                    if fields is None:
                        problem = f"a broken pax header at byte {at}"
                        break
                    long_name = fields.get("path", long_name)
                    long_size = int(fields["size"]) if _is_size(fields.get("size", "")) else long_size
            else:
                if kind in _REGULAR:
                    members.append((len(headers) - 1, long_name or member_name(header), at, length))
                long_name, long_size = "", None
            at += -(-length // BLOCK) * BLOCK
        wrong = _first_wrong(headers)
        if wrong is not None:
            problem = f"no member's header at byte {places[wrong]}"
        yield [member[1:] for member in members if wrong is None or member[0] < wrong]
        if problem:
            raise _CutShort(problem)


def _is_size(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 20


def _length(header: bytes) -> int:
    """Size in bytes of a header's member; -1 where the field holds none."""
    field = header[124:136]
    if field[11] in b"\0 ":  # as nearly all writers do it: eleven octal digits and an end
        try:
            length = int(field[:11], 8)
            return length if length >= 0 else -1
        except ValueError:
            pass
    if field[0] == 0x80:  # sizes beyond 8 GiB are stored in base 256, marked by the highest bit
        return int.from_bytes(field[1:], "big")
    try:
        return max(-1, int(field.split(b"\0")[0].strip() or b"0", 8))
    except ValueError:
        return -1


def _first_wrong(headers: list[bytes]) -> int | None:
    """The number of the first header whose checksum does not fit it."""
    if not headers:
        return None
    block = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, BLOCK)
    # the checksum's own eight bytes count as spaces
    sums = block.sum(1, dtype=np.int64) - block[:, 148:156].sum(1, dtype=np.int64) + 8 * ord(" ")
    digits = block[:, 148:154].astype(np.int64) - ord("0")
    stored = digits @ (8 ** np.arange(5, -1, -1))
    # as nearly all writers do it: six octal digits, a zero and a space
    usual = ((digits >= 0) & (digits < 8)).all(1) & (block[:, 154] == 0)
    for number in np.flatnonzero(~usual):
        stored[number] = _stored_checksum(headers[number])
    wrong = np.flatnonzero(sums != stored)
    return int(wrong[0]) if len(wrong) else None


def _stored_checksum(header: bytes) -> int:
    try:
        checksum = int(header[148:156].split(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        return -1
    return checksum if 0 <= checksum < 2**31 else -1


def is_header(header: bytes, size: int, name: str) -> bool:
    """Whether 512 bytes are the header of a member of that size and name (of long names, only the size is compared)."""
    if len(header) != BLOCK or header[156:157] not in _REGULAR:
        return False
    if sum(header) - sum(header[148:156]) + 8 * ord(" ") != _stored_checksum(header):
        return False
    # pax and GNU records in front of the header hold names and sizes that do not fit into it
    own_name, own_size = member_name(header), _length(header)
    long_name = len(name.encode("utf-8", "replace")) >= 100 or not name.isascii()
    same_name = own_name.lstrip("/").lower() == name.lstrip("/").lower()  # an index has extensions in lower case
    return (own_size == size or size >= 8**11) and (same_name or long_name)


def member_name(header: bytes) -> str:
    """The name in a header, of at most 100 letters, or 256 with the folder that ustar keeps apart."""
    name = _text(header[:100])
    if header[345] and header[257:263] == b"ustar\0":
        return f"{_text(header[345:500])}/{name}"
    return name


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "replace")


def _read_pax(record: bytes) -> dict[str, str] | None:
    """The fields of a pax header, lines of "LENGTH KEY=VALUE"; None where it is not made of such."""
    fields, at = {}, 0
    while record[at:].strip(b"\0"):
        digits, space, _ = record[at : at + 12].partition(b" ")
        if not (space and digits.isdigit() and int(digits) > len(digits) + 1):
            return None
        line = record[at + len(digits) + 1 : at + int(digits)]
        key, equals, value = line[:-1].partition(b"=")
        if line[-1:] != b"\n" or not equals:
            return None
        fields[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        at += int(digits)
    return fields


def save_index(index: TarIndex, store: Store | None = None, to: Location | None = None) -> Location:
    """Writes the index file, beside the tar unless `to` says where, whole or not at all; returns its location."""
    location = _index_location(index.path) if to is None else to
    text = json.dumps(index.to_json(), separators=(",", ":")) + "\n"
    (store or Store()).write(location, text.encode())
    return location


def load_index(path: Location, store: Store | None = None, at: Location | None = None) -> TarIndex | None:
    """The index of a tar from its index file, or None where there is none, or one that does not fit the tar."""
    store = store or Store()
    content = store.read_all(_index_location(path) if at is None else at, MAX_INDEX_BYTES)
    if content is None:
        return None
    try:
        index = _from_json(path, json.loads(content))
        # every look at a store costs a request; there it shows at the first sample read
        fits = index is not None and (not isinstance(path, Path) or path.stat().st_size == index.size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError, IndexError):
        return None
    return index if fits else None


def open_index(path: Location, store: Store | None = None) -> TarIndex:
    """The index of a tar: from its index file where that fits, else by `scan`."""
    index = load_index(path, store)
    return scan(path, store) if index is None else index
