"""Settings and commands as JSON: dataclasses of plain values, to JSON's types and back.

:func:`decode` is strict: settings come over a control socket or from a browser, and a misspelt field must not be
ignored. Only the fields of a command may be extended by later versions of a protocol: see ``ignore_unknown``.
"""

from __future__ import annotations

import os
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, Final, TypeVar, Union, get_args, get_origin, get_type_hints

from farplug.errors import Reason, UsageError
from farplug.text import shown

T = TypeVar("T")

MAX_STRING: Final = 8192
"""Characters of a string: twice the longest path of Linux. Longer strings are refused."""
MAX_ITEMS: Final = 1000
"""Items of an array. Longer arrays are refused."""

_NAMES: Mapping[type, str] = {str: "a string", bool: "true or false", int: "an integer", float: "a number"}


def encode(value: object) -> Any:
    """Return a value as JSON's types: dataclasses as objects, enums as their values, tuples as arrays.

    A field whose metadata has ``secret`` is left out. ``public`` in its metadata is a function that removes the secrets
    from the field's value.
    """
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: encode(field.metadata.get("public", _same)(getattr(value, field.name)))
            for field in fields(value)
            if not field.metadata.get("secret")
        }
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [encode(item) for item in value]
    return value


def _same(value: object) -> object:
    return value


def decode(kind: type[T], data: object, name: str = "", *, ignore_unknown: bool = False) -> T:
    """Return the dataclass that an object of JSON's types describes.

    Args:
        kind: the dataclass. Its fields are strings, numbers, booleans, enums, dataclasses, tuples of these, or None.
        data: what the JSON parser returned.
        name: of the value, for errors; its fields are ``name.field``.
        ignore_unknown: ignore fields of this object that the dataclass does not have. Objects in its fields are
            settings, and remain strict: without a misspelt ``snapshot`` the guest would write to the image.

    Raises:
        UsageError: ``bad-setting``: a field is unknown, is missing, or has a value of the wrong type or none of those
            allowed. The message names the field. It quotes the value, unless the ``repr`` of the dataclass leaves the
            field out: a password, a text that is typed.
    """
    if ignore_unknown and isinstance(data, Mapping):
        known: Any = kind
        data = {key: value for key, value in data.items() if key in _hints(known)}
    return _decode(kind, data, name)  # type: ignore[no-any-return]


def _decode(kind: Any, data: object, name: str) -> Any:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _union(get_args(kind), data, name)
    if origin is tuple:
        return _array(get_args(kind)[0], data, name)
    if is_dataclass(kind):
        return _object(kind, data, name)
    if isinstance(kind, type) and issubclass(kind, Enum):
        for member in kind:
            if type(data) is type(member.value) and data == member.value:
                return member
        raise _bad(name, data, f"one of {', '.join(str(member.value) for member in kind)}")
    if kind is float and type(data) is int:
        return float(data)
    if type(data) is not kind:  # a bool is an int for Python, and not for us
        raise _bad(name, data, _NAMES[kind])
    if isinstance(data, str):
        _check_string(data, name)
    return data


def _check_string(data: str, name: str) -> None:
    """Refuse a string that cannot be the name of a file: what a path or a target is, no system call takes then."""
    if len(data) > MAX_STRING:
        raise BadValue(name, f"a string of {len(data)} characters", f"a string of at most {MAX_STRING} characters")
    try:
        valid = b"\0" not in os.fsencode(data)
    except UnicodeEncodeError:
        valid = False  # half of a surrogate pair, which JSON can escape
    if not valid:
        raise _bad(name, data, "a string without NUL characters and surrogates")


def _union(kinds: Sequence[Any], data: object, name: str) -> Any:
    if data is None:
        if type(None) in kinds:
            return None
        raise _bad(name, data, "a value")
    (kind,) = (kind for kind in kinds if kind is not type(None))
    return _decode(kind, data, name)


def _array(kind: Any, data: object, name: str) -> tuple[Any, ...]:
    if not isinstance(data, (list, tuple)):
        raise _bad(name, data, "an array")
    if len(data) > MAX_ITEMS:
        raise _bad(name, data, f"an array of at most {MAX_ITEMS} items")
    return tuple(_decode(kind, item, f"{name}[{index}]") for index, item in enumerate(data))


def _object(kind: Any, data: object, name: str) -> Any:
    if not isinstance(data, Mapping):
        raise _bad(name, data, "an object")
    hints = _hints(kind)
    prefix = f"{name}." if name else ""
    for key in data:
        if key not in hints:
            raise UsageError(
                f"{prefix}{shown(key)} is not a known setting",
                reason=Reason.BAD_SETTING,
                remedy=f"known: {', '.join(hints)}",
            )
    values = {}
    for field in fields(kind):
        if field.name in data:
            value_name = f"{prefix}{field.name}"
            try:
                values[field.name] = _decode(hints[field.name], data[field.name], value_name)
            except BadValue as error:
                if field.repr:
                    raise
                raise BadValue(value_name, "the value", error.expected) from None
        elif field.default is MISSING and field.default_factory is MISSING:
            raise UsageError(f"{prefix}{field.name} is missing", reason=Reason.BAD_SETTING)
    try:
        return kind(**values)
    except ValueError as error:
        raise UsageError(f"{prefix}{error}", reason=Reason.BAD_SETTING) from error


@cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


class BadValue(UsageError):
    """A value is not what a field takes."""

    def __init__(self, name: str, value: str, expected: str) -> None:
        subject = f"{name}: " if name else ""
        super().__init__(f"{subject}{value} is not {expected}", reason=Reason.BAD_SETTING)
        self.expected = expected


def _bad(name: str, data: object, expected: str) -> BadValue:
    return BadValue(name, shown(data), expected)
