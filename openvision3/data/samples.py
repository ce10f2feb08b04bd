"""A sample: a picture with its two texts, and how it is made of the members of a tar."""

import io
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from openvision3.config import DataConfig, OpenVisionError
from openvision3.data.filters import field_of
from openvision3.data.tar_index import BLOCK, Entry, Place, is_header
from openvision3.data.transforms import Box, crop, decode_crops, decode_image

MAX_TEXT = 10_000  # letters of a caption or alt text
MAX_MEMBER_BYTES = {"image": 256 * 2**20, "text": 2**20}
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
NO_PICTURE = np.zeros((0, 0, 3), np.uint8)
MAX_GAP = 64 * 1024  # bytes between two members that are read over rather than left out

Read = Callable[[int, int], bytes]  # offset and size to bytes
Part = Literal["whole", "texts", "picture"]  # of a sample
Boxes = Callable[[int, int], Sequence[Box]]  # of a picture's width and height


@dataclass(frozen=True)
class Encoded:
    """A picture's file, as a tar holds it."""

    name: str  # of the member: "jpg"
    data: bytes

    def decode(self) -> np.ndarray:
        """The picture, uint8 (H, W, 3). Raises `OpenVisionError`."""
        return np.array(decode_image(io.BytesIO(self.data), f"its {self.name}"))

    def crops(self, size: int, boxes: "Boxes", fast: bool) -> list[np.ndarray]:
        """Crops, each uint8 (size, size, 3): see `decode_crops`. Raises `OpenVisionError`."""
        return decode_crops(io.BytesIO(self.data), f"its {self.name}", size, boxes, fast)


@dataclass
class Sample:
    """A picture with its two texts. `meta` is the JSON that came with it."""

    key: str
    image: np.ndarray  # uint8 (H, W, 3), RGB; (0, 0, 3) where it was not asked for, or is left in `encoded`
    alt: str
    caption: str
    meta: dict[str, Any] = field(default_factory=dict)
    tar: str = ""  # name of the tar that holds it
    shard: int = 0  # number of that tar among its source's
    number: int = 0  # within the tar, in its order; of a scene: its index
    encoded: Encoded | None = None  # the picture's file, where it was asked for undecoded
    missing: Literal["", "alt", "caption"] = ""  # a text that the config names and is not there: the other stands in

    @property
    def name(self) -> str:
        """The key, with the tar's name before it where there is one: keys repeat from tar to tar."""
        return f"{self.tar}/{self.key}" if self.tar else self.key

    def crops(self, size: int, boxes: "Boxes", fast: bool) -> list[np.ndarray]:
        """Crops of the picture, encoded or not, each uint8 (size, size, 3). Raises `BadSample`."""
        if self.encoded is None:
            return [crop(self.image, size, box) for box in boxes(self.image.shape[1], self.image.shape[0])]
        try:
            return self.encoded.crops(size, boxes, fast)
        except OpenVisionError as error:
            raise BadSample(self.name, str(error)) from None


class BadSample(OpenVisionError):
    """A sample that can't be used: `key` ("000000.tar/000123") and `reason`."""

    def __init__(self, key: str, reason: str):
        super().__init__(f"{key}: {reason}")
        self.key = key
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return BadSample, (self.key, self.reason)


class Source(Protocol):
    """Samples by position. Positions go on past `size`: each turn is another order of the same samples."""

    size: int | None = None  # how many different samples there are; None: no end, or not yet known

    def read(self, position: int) -> Sample:
        """The sample at a position, always the same one. Raises `BadSample`."""
        ...

    def read_encoded(self, position: int) -> Sample:
        """The same sample, its picture left `encoded` where there is a file of it. Raises `BadSample`."""
        return self.read(position)

    def read_texts(self, position: int) -> Sample:
        """The same sample without its picture, which need not be read or decoded. Raises `BadSample`."""
        return self.read(position)

    def substitute(self, position: int, draw: float) -> Sample:
        """A sample for a position whose own can't be used, as `read_encoded` gives it. Raises `BadSample`.

        Which it is is a function of position and `draw`, in [0, 1).
        """
        return self.read_encoded(int(draw * (self.size or 2**31)))

    def prepare(self, positions: list[int], texts_alone: Collection[int] = ()) -> None:
        """Hears which positions are read next, so that what is far away can be fetched in few long reads.

        Of those in `texts_alone`, only the texts will be read.
        """

    def fingerprint(self, shard: int) -> int:
        """A number that differs where a tar has other samples, or has them elsewhere, or another filter keeps them."""
        return 0


@dataclass(frozen=True)
class Needed:
    """The members of a sample that are read, and the stretch of the tar that holds them with their headers."""

    image: str  # name of the picture's member, which may be none of those that are read
    members: dict[str, Place]
    begin: int
    end: int

    @property
    def together(self) -> bool:
        """Whether little else lies between the members, so that one read of the stretch gets them all."""
        return self.end - self.begin <= sum(size for _, size in self.members.values()) + MAX_GAP


def needed(entry: Entry, config: DataConfig, part: Part = "whole") -> Needed:
    """What is read of a sample. Raises `BadSample` where there is no picture, or a member is too large.

    A sample without any of the members that `part` names needs an empty stretch.
    """
    names = (config.image_key.removeprefix(".").lower(),) if config.image_key else IMAGE_EXTENSIONS
    image = next((name for name in names if name in entry.members), None)
    if image is None:
        raise BadSample(entry.key, f"has no picture ({', '.join(names)})")
    texts = {"json", _member(config.alt_key, "txt"), _member(config.caption_field, "json")}
    wanted = {"whole": {image, *texts}, "texts": texts, "picture": {image}}[part]
    members = {name: place for name, place in entry.members.items() if name in wanted}
    for name, (_, size) in entry.members.items():
        most = MAX_MEMBER_BYTES["image" if name == image else "text"]
        if size > most and (name == image or name in texts):  # whatever is read, the same samples are bad
            raise BadSample(entry.key, f"its {name} has {size} bytes, more than {most}")
    begin = min((offset for offset, _ in members.values()), default=BLOCK) - BLOCK
    end = max((offset + size for offset, size in members.values()), default=0)
    return Needed(image, members, max(0, begin), end)


def contents(entry: Entry, needed: Needed, read: Read) -> dict[str, bytes]:
    """The bytes of the members, in one read where they lie together. Raises `BadSample` where the tar holds others."""
    if not needed.members:
        return {}
    whole = read(needed.begin, needed.end - needed.begin) if needed.together else b""
    found: dict[str, bytes] = {}
    for name, (offset, size) in needed.members.items():
        begin = max(0, offset - BLOCK)
        data = (
            whole[begin - needed.begin : offset - needed.begin + size]
            if needed.together
            else read(begin, offset + size - begin)
        )
        if len(data) < offset + size - begin:
            raise BadSample(entry.key, f"its {name} is cut short")
        if not is_header(data[:BLOCK], size, f"{entry.key}.{name}"):
            raise BadSample(entry.key, f"its {name} is not where the index says: the tar was changed")
        found[name] = data[offset - begin :]
    return found


def make_sample(entry: Entry, needed: Needed, read: Read, config: DataConfig) -> Sample:
    """Reads a sample, its picture still encoded; a text that is missing or empty is the other. Raises `BadSample`.

    Where `needed` leaves the picture out, so does the sample.
    """
    members, key = contents(entry, needed, read), entry.key
    meta = parse_json(key, members["json"]) if "json" in members else {}
    alt = _named_text(key, config.alt_key, "txt", members, meta)
    caption = _named_text(key, config.caption_field, "json", members, meta)
    if not (alt or caption):
        raise BadSample(key, "has no caption")
    encoded = Encoded(needed.image, members[needed.image]) if needed.image in members else None
    missing = "alt" if config.alt_key and not alt else "caption" if config.caption_field and not caption else ""
    return Sample(key, NO_PICTURE, alt or caption, caption or alt, meta, encoded=encoded, missing=missing)


def picture_alone(entry: Entry, needed: Needed, read: Read) -> Sample:
    """Reads a sample's picture, and no texts. Raises `BadSample`."""
    data = contents(entry, needed, read)[needed.image]
    return Sample(entry.key, NO_PICTURE, "", "", encoded=Encoded(needed.image, data))


def parse_json(key: str, data: bytes) -> dict[str, Any]:
    """The table of fields that a json member holds. Raises `BadSample`."""
    try:
        meta = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise BadSample(key, "its json is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise BadSample(key, f"its json is broken ({error})") from None
    if not isinstance(meta, dict):
        raise BadSample(key, "its json is not a table of fields")
    return meta


def _member(name: str, home: str) -> str:
    """The member that a text's name in the config stands for; empty: none, or a field of the json.

    `home` says what a bare name is. An index has extensions in lower case.
    """
    if name.startswith("json.") or (home == "json" and not name.startswith(".")):
        return ""
    return name.removeprefix(".").lower()


def _named_text(key: str, name: str, home: str, members: dict[str, bytes], meta: dict[str, Any]) -> str:
    """A text by its name in the config."""
    member = _member(name, home)
    if name and not member:
        field = name if home == "json" else name.removeprefix("json.")
        return _text(key, field, field_of(meta, field) or "")
    return _text(key, member, members.get(member, b""))


def _text(key: str, member: str, value: Any) -> str:
    """A text, with its white space made single spaces."""
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            raise BadSample(key, f"its {member} is not UTF-8") from None
    if not isinstance(value, str):
        raise BadSample(key, f"its {member} is {type(value).__name__}, not text")
    if len(value) > MAX_TEXT:
        raise BadSample(key, f"its {member} has {len(value)} letters, more than {MAX_TEXT}")
    return " ".join(value.split())
