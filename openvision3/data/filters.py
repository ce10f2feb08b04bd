"""Conditions on the json fields of samples, such as `width >= 256 and not (lang != "en" or nsfw > 0.5)`.

Grammar, nothing of it ever executed as code:

    condition:   all {"or" all}
    all:         one {"and" one}
    one:         "not" one  |  "(" condition ")"  |  FIELD COMPARISON VALUE
    COMPARISON:  ==  !=  <  <=  >  >=
    VALUE:       a number, a "text" or 'text', true, false, null
    FIELD:       a name, or names joined by dots for tables in tables; any other name between backquotes

A field that a sample lacks is null. Numbers compare with numbers and texts with texts; < <= > >= between anything else,
or with null, do not hold.
"""

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from openvision3.config import OpenVisionError

MAX_LENGTH = 10_000  # letters of a filter
MAX_DEPTH = 50  # of parentheses and "not"
_TOKEN = re.compile(
    r"""\s*(?:(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.]))|(?P<text>"[^"]*"|'[^']*')
    |(?P<comparison>==|!=|<=|>=|<|>)|(?P<bracket>[()])|(?P<name>[A-Za-z_][\w.-]*)|(?P<quoted>`[^`]+`))""",
    re.VERBOSE,
)
_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_CONSTANTS = {"true": True, "false": False, "null": None}

Filter = Callable[[dict[str, Any]], bool]


@dataclass(frozen=True)
class Comparison:
    """FIELD COMPARISON VALUE."""

    field: str
    comparison: str
    value: Any

    def __call__(self, meta: dict[str, Any]) -> bool:
        found = field_of(meta, self.field)
        if self.comparison in ("==", "!="):
            same = _kind(found) == _kind(self.value) and found == self.value
            return same == (self.comparison == "==")
        return _kind(found) == _kind(self.value) in ("number", "text") and _COMPARISONS[self.comparison](
            found, self.value
        )


@dataclass(frozen=True)
class Every:
    """All of the parts hold."""

    parts: tuple[Filter, ...]

    def __call__(self, meta: dict[str, Any]) -> bool:
        return all(part(meta) for part in self.parts)


@dataclass(frozen=True)
class Some:
    """One of the parts holds."""

    parts: tuple[Filter, ...]

    def __call__(self, meta: dict[str, Any]) -> bool:
        return any(part(meta) for part in self.parts)


@dataclass(frozen=True)
class Not:
    """The part does not hold."""

    part: Filter

    def __call__(self, meta: dict[str, Any]) -> bool:
        return not self.part(meta)


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float):
        return "number"
    return "text" if isinstance(value, str) else type(value).__name__


def field_of(meta: dict[str, Any], name: str) -> Any:
    """A field of a sample's json: by its whole name, else by the way through tables ("a.b"); None where it is not."""
    if name in meta:
        return meta[name]
    found: Any = meta
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def parse_filter(text: str) -> Filter:
    """The condition that a text spells; raises `OpenVisionError` that says where it is none."""
    return _Parser(text).whole()


class _Parser:
    def __init__(self, text: str):
        if len(text) > MAX_LENGTH:
            raise OpenVisionError(f"the filter has {len(text)} letters: at most {MAX_LENGTH} are read")
        self.text = text
        self.tokens: list[tuple[str, str, int]] = []  # kind, text, place
        at = 0
        while text[at:].strip():
            match = _TOKEN.match(text, at)
            if match is None or match.lastgroup is None:
                raise self._error(at, "a field, value or comparison")
            self.tokens.append((match.lastgroup, match[match.lastgroup], match.start(match.lastgroup)))
            at = match.end()
        self.next = 0

    def whole(self) -> Filter:
        condition = self.some(0)
        if self.next < len(self.tokens):
            raise self._error(self.tokens[self.next][2], "`and`, `or` or the end")
        return condition

    def some(self, depth: int) -> Filter:
        parts = [self.every(depth)]
        while self._take("name", "or"):
            parts.append(self.every(depth))
        return parts[0] if len(parts) == 1 else Some(tuple(parts))

    def every(self, depth: int) -> Filter:
        parts = [self.one(depth)]
        while self._take("name", "and"):
            parts.append(self.one(depth))
        return parts[0] if len(parts) == 1 else Every(tuple(parts))

    def one(self, depth: int) -> Filter:
        if depth > MAX_DEPTH:
            raise OpenVisionError(f"the filter nests more than {MAX_DEPTH} deep")
        if self._take("name", "not"):
            return Not(self.one(depth + 1))
        if self._take("bracket", "("):
            condition = self.some(depth + 1)
            if not self._take("bracket", ")"):
                raise self._error(self._place(), "`)`")
            return condition
        field = self._take("name") or self._take("quoted")
        if field is None or field in ("and", "or"):
            raise self._error(self._place(), "a field's name")
        comparison = self._take("comparison")
        if comparison is None:
            raise self._error(self._place(), f"a comparison ({' '.join(_COMPARISONS)})")
        return Comparison(field.strip("`"), comparison, self._value())

    def _value(self) -> Any:
        number = self._take("number")
        if number is not None:
            return float(number) if any(mark in number for mark in ".eE") else int(number)
        text = self._take("text")
        if text is not None:
            return text[1:-1]
        name = self._take("name")
        if name not in _CONSTANTS:
            raise self._error(self._place() if name is None else self.tokens[self.next - 1][2],
                              'a number, a "text", true, false or null')  # fmt: skip
        return _CONSTANTS[name]

    def _take(self, kind: str, text: str | None = None) -> str | None:
        if self.next < len(self.tokens):
            found, word, _ = self.tokens[self.next]
            if found == kind and text in (None, word):
                self.next += 1
                return word
        return None

    def _place(self) -> int:
        return self.tokens[self.next][2] if self.next < len(self.tokens) else len(self.text)

    def _error(self, at: int, expected: str) -> OpenVisionError:
        got = repr(self.text[at : at + 20]) if self.text[at:].strip() else "its end"
        return OpenVisionError(f"filter {self.text!r}: expected {expected} at letter {at + 1}, got {got}")
