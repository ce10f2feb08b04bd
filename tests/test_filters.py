"""Conditions on json fields: what they mean, and what is none."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvision3.config import OpenVisionError
from openvision3.data.filters import MAX_DEPTH, field_of, parse_filter

META: dict[str, Any] = {
    "width": 300, "score": 0.25, "lang": "en", "safe": True, "none": None, "a": {"b": {"c": 7}}, "x.y": 1,
    "x": {"y": 2}, "my field": "z", "list": [1],
}  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "width >= 300", "width == 300.0", "width<301", "width != 3e3", "score > .2", "score > -1", 'lang == "en"',
        "lang == 'en'", 'lang < "fr"', "safe == true", "none == null", "missing == null", "width != null",
        "a.b.c == 7", "x.y == 1", '`my field` == "z"', "not width < 300", "not (width < 300)", "not not safe == true",
        'lang == "fr" or lang == "en" and width > 200', 'not lang == "fr" and safe == true', 'width != "300"',
        "list != 1", "safe != 1", "(((width == 300)))",
    ],
)  # fmt: skip
def test_conditions_that_hold(text: str) -> None:
    assert parse_filter(text)(META) is True
    assert parse_filter(f"not ({text})")(META) is False


@pytest.mark.parametrize(
    "text",
    [
        "width > 300", 'width == "300"', 'width < "400"', "lang > 1", "missing > 0", "missing < 0", "none >= null",
        "safe == 1", "safe < 2", "a.b == 7", "a.b.c.d == 7", "list == 1", 'a.b > "a"',
        '(lang == "fr" or lang == "en") and width > 400',
    ],
)  # fmt: skip
def test_conditions_that_do_not_hold(text: str) -> None:
    assert parse_filter(text)(META) is False


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("", "letter 1, got its end"), ("width", "comparison"), ("width >", "letter 8"), ("width = 3", "letter 6"),
        ("(width > 3", "`)`"), ("width > 3 4", "`and`, `or` or the end at letter 11"), ("and > 3", "field's name"),
        ("width > other", "a number"), ("width > 1.2.3", "letter 8"), ("__import__('os')", "comparison"),
        ("width > 1 and", "got its end"), ('lang == "en', "letter 8"), ("3 > width", "field's name"),
        ("(" * (MAX_DEPTH + 2) + "width > 1", "nests more than"), ("not " * 100 + "width > 1", "nests more than"),
        ("width > 1 or " * 2000, "letters"),
    ],
)  # fmt: skip
def test_what_is_no_condition(text: str, where: str) -> None:
    with pytest.raises(OpenVisionError, match="filter") as caught:
        parse_filter(text)
    assert where in str(caught.value) and "\n" not in str(caught.value)


@given(st.text(alphabet="ab.<>=!()'\"`1e- \nnotandrue", max_size=40))
def test_any_text_is_a_condition_or_an_error(text: str) -> None:
    try:
        condition = parse_filter(text)
    except OpenVisionError:
        return
    assert condition(META) in (True, False)


def test_fields() -> None:
    assert field_of(META, "x.y") == 1 and field_of(META, "a.b") == {"c": 7} and field_of(META, "a.z.c") is None
