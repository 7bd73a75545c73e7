"""Filters as people write them: ``deny vendor=046d; allow class=hid``.

Rules are separated by ``;`` or line ends. Each is ``allow`` or ``deny`` and the properties of the device, in any order:
``class=`` (a name or a number), ``vendor=``, ``product=`` and ``version=``. Numbers are hexadecimal, as lsusb prints
them. A rule without properties matches every device. The first rule that matches decides, and a device that no rule
matches is denied: the result is the same :class:`~farplug.usbredir.filter.Filter` as for usbredir's own form.
"""

from __future__ import annotations

import re
from typing import Final

from farplug.errors import Reason, UsageError
from farplug.usb.classes import CLASS_CODES
from farplug.usbredir.filter import ANY, Filter, Rule

MAX_LENGTH: Final = 4096
"""The longest text with rules, in characters."""

SEPARATORS: Final = ",:"
"""Separators of the fields in usbredir's own form. QEMU's option ``filter=`` has colons: a comma ends its value."""

_VERBS = {"allow": True, "deny": False}
_FIELDS = ("class", "vendor", "product", "version")
_HEXADECIMAL = re.compile(r"(?:0[xX])?([0-9a-fA-F]{1,4})")
_VERSION = re.compile(r"([0-9]{1,2})\.([0-9])([0-9])")

REMEDY: Final = (
    "write rules as 'allow class=hid; deny vendor=046d; allow', the first that matches decides; "
    f"classes: {', '.join(CLASS_CODES)}"
)

USBREDIR_REMEDY: Final = (
    "write rules as class,vendor,product,version,allow separated by |, with -1 for any, for example "
    "0x08,-1,-1,-1,1|-1,-1,-1,-1,0"
)


def parse_rules(text: str) -> Filter:
    """Parse a filter in this form, in usbredir's (``0x03,-1,-1,-1,1|-1,-1,-1,-1,0``), or in QEMU's (``:`` for ``,``).

    Raises:
        UsageError: the text has none of these forms, or allows no device and does not end with ``deny``
            (``BAD_OPTION``).
    """
    if len(text) > MAX_LENGTH:
        raise _bad(f"filter rules have {len(text)} characters, more than {MAX_LENGTH}")
    if not text.strip(" \t\r\n;|"):
        raise _bad("filter rules are empty")
    if not text.lstrip(" \t\r\n;|")[0].isalpha():
        try:
            return Filter.parse(text.strip(), SEPARATORS)
        except ValueError as error:
            raise _bad(str(error), USBREDIR_REMEDY) from None
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


def _bad(message: str, remedy: str = REMEDY) -> UsageError:
    return UsageError(message, reason=Reason.BAD_OPTION, remedy=remedy)
