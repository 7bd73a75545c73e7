"""Filters as people write them: ``deny vendor=046d; allow class=hid``.

Rules are separated by ``;`` or line ends, each ``allow`` or ``deny`` and what the device must have, in any order:
``class=`` (a name or a number), ``vendor=``, ``product=`` and ``version=``. Numbers are hexadecimal, as lsusb writes
them. A rule without any of these matches every device. The first rule that matches counts, and what no rule matches is
denied: it is the same :class:`~farplug.usbredir.filter.Filter` as in usbredir's own form.
"""

from __future__ import annotations

import re
from typing import Final

from farplug.errors import Reason, UsageError
from farplug.usb.classes import CLASS_CODES
from farplug.usbredir.filter import ANY, Filter, Rule

MAX_LENGTH: Final = 4096
"""Characters of a text with rules."""

SEPARATORS: Final = ",:"
"""Of fields in usbredir's own form. QEMU's option ``filter=`` has colons, as a comma ends its value."""

_VERBS = {"allow": True, "deny": False}
_FIELDS = ("class", "vendor", "product", "version")
_HEXADECIMAL = re.compile(r"(?:0[xX])?([0-9a-fA-F]{1,4})")
_VERSION = re.compile(r"([0-9]{1,2})\.([0-9])([0-9])")

REMEDY: Final = (
    "write rules as 'allow class=hid; deny vendor=046d; allow', the first that matches counts; "
    f"classes: {', '.join(CLASS_CODES)}"
)


def parse_rules(text: str) -> Filter:
    """Read a filter in this form, in usbredir's (``0x03,-1,-1,-1,1|-1,-1,-1,-1,0``), or in QEMU's (``:`` for ``,``).

    Raises:
        UsageError: it has none of them, or it could not allow any device and does not say so (``BAD_OPTION``).
    """
    if len(text) > MAX_LENGTH:
        raise _bad(f"filter rules have {len(text)} characters, more than {MAX_LENGTH}")
    if not text.strip(" \t\r\n;|"):
        raise _bad("filter rules are empty")
    if not text.lstrip(" \t\r\n;|")[0].isalpha():
        return Filter.parse(text.strip(), SEPARATORS)
    rules = tuple(_parse_rule(rule.split()) for rule in re.split(r"[;\n]", text) if rule.strip())
    if not any(rule.allow for rule in rules) and rules[-1].readable != "deny":
        raise _bad("filter rules allow no device: what no rule matches is denied; end them with '; allow'")
    return Filter(rules)


def _parse_rule(words: list[str]) -> Rule:
    verb, *conditions = words
    if verb.lower() not in _VERBS:
        raise _bad(f"a filter rule begins with 'allow' or 'deny', not with {verb[:40]!r}")
    numbers: dict[str, int] = {}
    for condition in conditions:
        name, equals, value = condition.partition("=")
        if not equals or name.lower() not in _FIELDS:
            raise _bad(f"{condition[:40]!r} in a filter rule is none of {', '.join(f'{f}=' for f in _FIELDS)}")
        if name.lower() in numbers:
            raise _bad(f"a filter rule has {name.lower()}= twice")
        numbers[name.lower()] = _parse_value(name.lower(), value)
    device_class, vendor, product, version = (numbers.get(name, ANY) for name in _FIELDS)
    return Rule(device_class, vendor, product, version, _VERBS[verb.lower()])


def _parse_value(name: str, value: str) -> int:
    if name == "class" and value.lower() in CLASS_CODES:
        return CLASS_CODES[value.lower()]
    if name == "version" and (match := _VERSION.fullmatch(value)):
        return int("".join(match.groups()), 16)  # binary-coded decimal
    match = _HEXADECIMAL.fullmatch(value)
    if match is None or (name == "class" and int(match[1], 16) > 0xFF):
        what = "a class's name or 2 hexadecimal digits" if name == "class" else "4 hexadecimal digits"
        raise _bad(f"{name}={value[:40]} in a filter rule is not {what}")
    return int(match[1], 16)


def _bad(message: str) -> UsageError:
    return UsageError(message, reason=Reason.BAD_OPTION, remedy=REMEDY)
