from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farplug.app.codec import MAX_ITEMS, MAX_STRING, decode, encode
from farplug.app.commands import CheckText, TypeText
from farplug.app.settings import TargetSettings
from farplug.errors import Reason, UsageError


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Size(IntEnum):
    ONE = 1
    TWO = 2


@dataclass(frozen=True)
class Inner:
    flag: bool
    size: Size = Size.ONE
    ratio: float = 1.0


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner
    colours: tuple[Colour, ...] = ()
    number: int = 0
    maybe: Inner | None = None
    word: str | None = None
    key: str = field(default="", metadata={"secret": True})
    url: str = field(default="", metadata={"public": str.upper})


@dataclass(frozen=True)
class Even:
    number: int

    def __post_init__(self) -> None:
        if self.number % 2:
            raise ValueError(f"number: {self.number} is odd")


GOOD: dict[str, object] = {"name": "n", "inner": {"flag": True}}


def refuse(data: object, name: str = "") -> UsageError:
    with pytest.raises(UsageError) as caught:
        decode(Outer, data, name)
    assert caught.value.reason is Reason.BAD_SETTING
    assert len(caught.value.message) < 300
    assert caught.value.message.isprintable()
    return caught.value


def test_json_in() -> None:
    value = decode(
        Outer,
        {
            "name": "n",
            "inner": {"flag": False, "size": 2, "ratio": 2},
            "colours": ["red", "blue"],
            "number": -(10**30),
            "maybe": {"flag": True},
            "word": None,
            "key": "k",
        },
    )
    inner = Inner(flag=False, size=Size.TWO, ratio=2.0)
    assert value == Outer("n", inner, (Colour.RED, Colour.BLUE), -(10**30), Inner(flag=True), None, "k")
    assert type(value.inner.ratio) is float
    assert type(value.inner.size) is Size


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("hunter2\0", "a string without NUL characters and surrogates"),
        ("hunter2\ud800", "a string without NUL characters and surrogates"),
        (["hunter2"], "a string"),
    ],
)
def test_errors_quote_no_secret(value: object, expected: str) -> None:
    for kind, field_name in ((TypeText, "text"), (CheckText, "text"), (TargetSettings, "password")):
        settings = {"target": "spice://a", field_name: value} if kind is TargetSettings else {field_name: value}
        with pytest.raises(UsageError) as caught:
            decode(kind, settings, "params")
        assert caught.value.message == f"params.{field_name}: the value is not {expected}"


def test_errors_do_not_quote_what_is_too_long() -> None:
    error = refuse({**GOOD, "name": "x" * (MAX_STRING + 1)})
    assert error.message == "name: a string of 8193 characters is not a string of at most 8192 characters"


def test_json_out_has_no_secret() -> None:
    data = encode(Outer("n", Inner(flag=True), (Colour.RED,), key="k", url="u"))
    assert data == {
        "name": "n",
        "inner": {"flag": True, "size": 1, "ratio": 1.0},
        "colours": ["red"],
        "number": 0,
        "maybe": None,
        "word": None,
        "url": "U",
    }
    assert [type(item) for item in (data["colours"][0], data["inner"]["size"])] == [str, int]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nam": "n"}, "'nam' is not a known setting"),
        ({1: "n"}, "1 is not a known setting"),
        ({None: 1}, "None is not a known setting"),
        ({"name": None}, "name: None is not a string"),
        ({"name": 1}, "name: 1 is not a string"),
        ({"name": True}, "name: True is not a string"),
        ({"name": ["n"]}, "name: ['n'] is not a string"),
        ({"name": {}}, "name: {} is not a string"),
        ({"name": "a\0b"}, r"name: 'a\x00b' is not a string without NUL characters and surrogates"),
        ({"name": "\ud800"}, r"name: '\ud800' is not a string without NUL characters and surrogates"),
        ({"number": True}, "number: True is not an integer"),
        ({"number": False}, "number: False is not an integer"),
        ({"number": 1.0}, "number: 1.0 is not an integer"),
        ({"number": "1"}, "number: '1' is not an integer"),
        ({"number": None}, "number: None is not an integer"),
        ({"number": float("nan")}, "number: nan is not an integer"),
        ({"inner": None}, "inner: None is not an object"),
        ({"inner": []}, "inner: [] is not an object"),
        ({"inner": {}}, "inner.flag is missing"),
        ({"inner": {"flag": 1}}, "inner.flag: 1 is not true or false"),
        ({"inner": {"flag": "true"}}, "inner.flag: 'true' is not true or false"),
        ({"inner": {"flag": None}}, "inner.flag: None is not true or false"),
        ({"inner": {"flag": True, "x": 1}}, "inner.'x' is not a known setting"),
        ({"inner": {"flag": True, "size": True}}, "inner.size: True is not one of 1, 2"),
        ({"inner": {"flag": True, "size": 1.0}}, "inner.size: 1.0 is not one of 1, 2"),
        ({"inner": {"flag": True, "size": "1"}}, "inner.size: '1' is not one of 1, 2"),
        ({"inner": {"flag": True, "size": 3}}, "inner.size: 3 is not one of 1, 2"),
        ({"inner": {"flag": True, "ratio": True}}, "inner.ratio: True is not a number"),
        ({"inner": {"flag": True, "ratio": "1"}}, "inner.ratio: '1' is not a number"),
        ({"colours": "red"}, "colours: 'red' is not an array"),
        ({"colours": {"red": 1}}, "colours: {'red': 1} is not an array"),
        ({"colours": None}, "colours: None is not an array"),
        ({"colours": ["red", "RED"]}, "colours[1]: 'RED' is not one of red, blue"),
        ({"colours": [[]]}, "colours[0]: [] is not one of red, blue"),
        ({"maybe": {"flag": None}}, "maybe.flag: None is not true or false"),
        ({"maybe": 0}, "maybe: 0 is not an object"),
        ({"word": 0}, "word: 0 is not a string"),
        ({"key": 5}, "key: 5 is not a string"),
    ],
)
def test_refused(change: dict[object, object], message: str) -> None:
    data = change | dict[object, object]((name, value) for name, value in GOOD.items() if name not in change)
    assert refuse(data).message == message
    assert refuse(data, "a").message == f"a.{message}"


@pytest.mark.parametrize("data", [None, [], "x", 1, True, [GOOD]])
def test_no_object(data: object) -> None:
    assert refuse(data).message.endswith(" is not an object")
    assert refuse(data, "x").message.startswith("x: ")


def test_what_is_missing_and_what_is_known_is_named() -> None:
    assert refuse({"inner": {"flag": True}}).message == "name is missing"
    assert refuse({**GOOD, "x": 1}).remedy == "known: name, inner, colours, number, maybe, word, key, url"


def test_unknown_fields_of_a_command_may_be_ignored_but_not_those_of_settings_in_it() -> None:
    assert decode(Outer, {**GOOD, "later": 1}, ignore_unknown=True) == Outer("n", Inner(flag=True))
    inner = {"flag": True, "later": 1}
    for data in ({**GOOD, "inner": inner}, {**GOOD, "maybe": inner}):
        with pytest.raises(UsageError, match="'later' is not a known setting"):
            decode(Outer, data, ignore_unknown=True)
    with pytest.raises(UsageError, match="is not an object"):
        decode(Outer, None, ignore_unknown=True)


def test_a_refusal_of_the_dataclass_itself() -> None:
    assert decode(Even, {"number": 2}) == Even(2)
    with pytest.raises(UsageError, match=r"^a\.number: 3 is odd$") as caught:
        decode(Even, {"number": 3}, "a")
    assert caught.value.reason is Reason.BAD_SETTING


def wrap_in_array(value: object) -> object:
    return [value]


def wrap_in_object(value: object) -> object:
    return {"a": value}


def nested(make: Callable[[object], object], depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = make(value)
    return value


@pytest.mark.parametrize(
    "value",
    [
        "x" * 10_000_000,
        ["x" * 10_000_000] * 3,
        [1] * 1_000_000,
        dict.fromkeys(map(str, range(100_000)), "x" * 1000),
        10**100_000,
        -(10**5000),
        nested(wrap_in_array, 100_000),
        nested(wrap_in_object, 100_000),
        "\x1b[2J\r\n\u202e",
        "\ud83d\ude00" * 100,
        1e308 * 10,
    ],
    ids=lambda value: f"{type(value).__name__}",
)
def test_hostile_values_are_bounded_in_messages(value: object) -> None:
    for field_name in ("name", "inner", "colours", "number", "maybe", "word"):
        if field_name == "number" and isinstance(value, int):
            continue  # valid: a number of any size
        if field_name in ("name", "word") and value == "\x1b[2J\r\n\u202e":
            continue  # valid: the name of a file may hold this
        error = refuse({**GOOD, field_name: value})
        assert error.message.startswith(field_name)
        assert "..." in error.message or "…" in error.message or len(error.message) < 150


def test_hostile_names_of_fields_are_bounded_in_messages() -> None:
    for name in ("x" * 1_000_000, "\x1b[2J", "\ud800", "name\0"):
        assert "is not a known setting" in refuse({**GOOD, name: 1}).message


def test_strings_and_arrays_have_limits() -> None:
    assert decode(Outer, {**GOOD, "name": "ä" * MAX_STRING}).name == "ä" * MAX_STRING
    assert refuse({**GOOD, "name": "x" * (MAX_STRING + 1)}).message.endswith("a string of at most 8192 characters")
    assert len(decode(Outer, {**GOOD, "colours": ["red"] * MAX_ITEMS}).colours) == MAX_ITEMS
    too_many = refuse({**GOOD, "colours": ["red"] * (MAX_ITEMS + 1)})
    assert too_many.message.endswith("an array of at most 1000 items")


def test_names_of_files_that_are_not_utf_8_are_taken() -> None:
    assert decode(Outer, {**GOOD, "name": "a\udcff"}).name == "a\udcff"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from([*Outer.__dataclass_fields__, "flag", "x"]), JSON), JSON)
def test_any_json_is_decoded_or_refused(fields: dict[str, object], inner: object) -> None:
    data = {**GOOD, **fields, "inner": inner if "x" in fields else GOOD["inner"]}
    try:
        value = decode(Outer, data)
    except UsageError:
        refuse(data)
    else:
        json.dumps(encode(value))
