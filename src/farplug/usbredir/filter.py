"""Filters: which devices a side lets through.

A filter is text: rules separated by ``|``, each ``class,vendor,product,version,allow``, -1 for any. The first rule that
matches counts. Source: usb-redirection-protocol.md, "usb_redir_filter_filter", and usbredirfilter.c.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, Self

from farplug.errors import Reason, UsageError
from farplug.usb.classes import class_name

ANY: Final = -1
"""In a rule: matches every number."""

_RULE_SEPARATOR = "|"
_FIELDS = (("class", 0xFF), ("vendor", 0xFFFF), ("product", 0xFFFF), ("version", 0xFFFF))
# What strtol(3) takes with base 0. The sign and the digits are caught apart: int() does not know octal as "017".
_NUMBER = re.compile(r"[ \t\n\v\f\r]*([+-]?)(?:0[xX]([0-9a-fA-F]+)|(0[0-7]*)|([1-9][0-9]*))", re.ASCII)
_MAX_DIGITS = 20
_MAX_SHOWN = 60


class Verdict(Enum):
    """What a filter says about a device."""

    ALLOWED = "allowed"
    NO_MATCH = "denied, no rule matches"
    DENIED = "denied by a rule"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. Each number is :data:`ANY` or what the device must have.

    Attributes:
        device_class: the device's or the interface's class code.
        vendor_id: idVendor.
        product_id: idProduct.
        device_version: bcdDevice.
        allow: what to do with a device that matches.

    Raises:
        UsageError: a number is out of its range (``BAD_OPTION``).
    """

    device_class: int
    vendor_id: int
    product_id: int
    device_version: int
    allow: bool

    def __post_init__(self) -> None:
        numbers = (self.device_class, self.vendor_id, self.product_id, self.device_version)
        for number, (name, highest) in zip(numbers, _FIELDS, strict=True):
            if not ANY <= number <= highest:
                raise _bad(f"{name} {number} in a filter rule is not between -1 and {highest}")

    @classmethod
    def parse(cls, text: str, separators: str = ",") -> Self:
        """Read one rule; any character of ``separators`` separates fields.

        Raises:
            UsageError: it is not a rule (``BAD_OPTION``).
        """
        fields = [field for field in re.split(f"[{re.escape(separators)}]", text) if field]
        if len(fields) != 5:
            raise _bad(f"filter rule {_shown(text)} has {len(fields)} field{'' if len(fields) == 1 else 's'}, not 5")
        names = (*(name for name, _ in _FIELDS), "allow")
        device_class, vendor_id, product_id, device_version, allow = map(_parse_number, names, fields)
        return cls(device_class, vendor_id, product_id, device_version, allow != 0)

    def format(self, separator: str = ",") -> str:
        """The canonical text, as libusbredirparser writes it."""
        return separator.join(
            (
                _format_number(self.device_class, 2),
                _format_number(self.vendor_id, 4),
                _format_number(self.product_id, 4),
                _format_number(self.device_version, 4),
                str(int(self.allow)),
            )
        )

    def __str__(self) -> str:
        return self.format()

    @property
    def readable(self) -> str:
        """The readable form, see :mod:`farplug.usbredir.rules`: ``deny class=hid vendor=046d``."""
        words = ["allow" if self.allow else "deny"]
        if self.device_class != ANY:
            words.append(f"class={class_name(self.device_class)}")
        numbers = (("vendor", self.vendor_id), ("product", self.product_id), ("version", self.device_version))
        return " ".join([*words, *(f"{name}={number:04x}" for name, number in numbers if number != ANY)])

    def matches(self, class_code: int, vendor_id: int, product_id: int, device_version: int) -> bool:
        """Whether this is the rule for a device or interface of this class."""
        return (
            self.device_class in (ANY, class_code)
            and self.vendor_id in (ANY, vendor_id)
            and self.product_id in (ANY, product_id)
            and self.device_version in (ANY, device_version)
        )


@dataclass(frozen=True, slots=True)
class FilterResult:
    """What a filter says about a device, and why.

    Attributes:
        verdict: what it says.
        class_code: the class that decided: the device's or that of an interface; None if every one is allowed.
        rule: the rule that denies it; None if it is allowed, or no rule matches.
        number: which rule that is, counted from 1; 0 if there is none.
    """

    verdict: Verdict
    class_code: int | None = None
    rule: Rule | None = None
    number: int = 0

    @property
    def allowed(self) -> bool:
        """Whether the device may pass."""
        return self.verdict is Verdict.ALLOWED

    def __str__(self) -> str:
        if self.class_code is None:
            return str(self.verdict)
        which = f"class {class_name(self.class_code)} ({self.class_code:02x})"
        if self.rule is None:
            return f"no rule matches its {which}"
        return f"rule {self.number} ({self.rule.readable}) denies its {which}"


@dataclass(frozen=True, slots=True)
class Filter:
    """Rules in order. Without any, everything is denied."""

    rules: tuple[Rule, ...] = ()

    @classmethod
    def parse(cls, text: str, separators: str = ",") -> Self:
        """Read a filter. Empty rules and doubled separators are skipped, as strtok(3) does.

        Numbers are written as strtol(3) reads them with base 0. Those that an int of 32 bits does not hold are refused:
        what C makes of them depends on the platform.

        Args:
            text: rules separated by ``|``.
            separators: each of these characters separates the fields of a rule. QEMU's command line uses ``:``.

        Raises:
            UsageError: a rule is not written right (``BAD_OPTION``).
        """
        return cls(tuple(Rule.parse(rule, separators) for rule in text.split(_RULE_SEPARATOR) if rule))

    def format(self, separator: str = ",") -> str:
        """The canonical text, as libusbredirparser writes it."""
        return _RULE_SEPARATOR.join(rule.format(separator) for rule in self.rules)

    def __str__(self) -> str:
        return self.format()

    def check(
        self,
        *,
        device_class: int,
        vendor_id: int,
        product_id: int,
        device_version: int,
        interfaces: Sequence[tuple[int, int, int]],
    ) -> FilterResult:
        """Judge a device: its own class first, then that of every interface; all of them must be allowed.

        Class 00 and ef say "see the interfaces" and are not checked. Neither are interfaces 03/00/00 (HID without boot
        protocol) of a device with several interfaces, unless it has no others.

        Args:
            device_class: bDeviceClass.
            vendor_id: idVendor.
            product_id: idProduct.
            device_version: bcdDevice.
            interfaces: (class, subclass, protocol) of each interface.
        """
        classes = [] if device_class in (0x00, 0xEF) else [device_class]
        checked = [codes for codes in interfaces if len(interfaces) == 1 or codes != (0x03, 0x00, 0x00)]
        classes += [codes[0] for codes in checked or interfaces]
        for class_code in classes:
            result = self._check_class(class_code, vendor_id, product_id, device_version)
            if not result.allowed:
                return result
        return FilterResult(Verdict.ALLOWED)

    def _check_class(self, class_code: int, vendor_id: int, product_id: int, device_version: int) -> FilterResult:
        for number, rule in enumerate(self.rules, 1):
            if rule.matches(class_code, vendor_id, product_id, device_version):
                verdict = Verdict.ALLOWED if rule.allow else Verdict.DENIED
                return FilterResult(verdict, class_code, rule, number)
        return FilterResult(Verdict.NO_MATCH, class_code)


def _parse_number(name: str, text: str) -> int:
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise _bad(f"{name} {_shown(text)} in a filter rule is not a number")
    sign, hexadecimal, octal, decimal = match.groups()
    digits = (hexadecimal or octal or decimal).lstrip("0") or "0"
    if len(digits) <= _MAX_DIGITS:
        number = int(digits, 16 if hexadecimal else 8 if octal else 10)
        number = -number if sign == "-" else number
        if -(1 << 31) <= number < 1 << 31:
            return number
    raise _bad(f"{name} {_shown(text)} in a filter rule does not fit into 32 bits")


def _format_number(number: int, digits: int) -> str:
    return "-1" if number == ANY else f"0x{number:0{digits}x}"


def _shown(text: str) -> str:
    return repr(text) if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]!r}..."


def _bad(message: str) -> UsageError:
    return UsageError(
        message,
        reason=Reason.BAD_OPTION,
        remedy="write rules as class,vendor,product,version,allow separated by |, with -1 for any, "
        "for example 0x08,-1,-1,-1,1|-1,-1,-1,-1,0",
    )
