"""Filters: which devices a side accepts.

A filter is text: rules separated by ``|``, each ``class,vendor,product,version,allow``, -1 for any. The first rule that
matches decides. Source: usb-redirection-protocol.md, "usb_redir_filter_filter", and usbredirfilter.c.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, Self

from farplug.usb.classes import class_name

ANY: Final = -1
"""In a rule: matches every number."""

_RULE_SEPARATOR = "|"
_FIELDS = (("class", 0xFF), ("vendor", 0xFFFF), ("product", 0xFFFF), ("version", 0xFFFF))
# What strtol(3) accepts with base 0. Sign and digits are separate groups: int() does not accept octal numbers like 017.
_NUMBER = re.compile(r"[ \t\n\v\f\r]*([+-]?)(?:0[xX]([0-9a-fA-F]+)|(0[0-7]*)|([1-9][0-9]*))", re.ASCII)
_MAX_DIGITS = 20
_MAX_SHOWN = 60


class Verdict(Enum):
    """The kinds of result of :meth:`Filter.check`."""

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
        allow: whether a device that matches is accepted.

    Raises:
        ValueError: a number is out of its range.
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
                raise ValueError(f"{name} {number} in a filter rule is not between -1 and {highest}")

    @classmethod
    def parse(cls, text: str, separators: str = ",") -> Self:
        """Parse one rule; each character of ``separators`` separates fields.

        Raises:
            ValueError: the text is not a valid rule; the exception's text is a message for a user.
        """
        fields = [field for field in re.split(f"[{re.escape(separators)}]", text) if field]
        if len(fields) != 5:
            raise ValueError(
                f"filter rule {_shown(text)} has {len(fields)} field{'' if len(fields) == 1 else 's'}, not 5"
            )
        names = (*(name for name, _ in _FIELDS), "allow")
        device_class, vendor_id, product_id, device_version, allow = map(_parse_number, names, fields)
        return cls(device_class, vendor_id, product_id, device_version, allow != 0)

    def format(self, separator: str = ",") -> str:
        """Return the canonical text, as libusbredirparser writes it."""
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
        """Return the readable form of :mod:`farplug.usbredir.rules`: ``deny class=hid vendor=046d``."""
        words = ["allow" if self.allow else "deny"]
        if self.device_class != ANY:
            words.append(f"class={class_name(self.device_class)}")
        numbers = (("vendor", self.vendor_id), ("product", self.product_id), ("version", self.device_version))
        return " ".join([*words, *(f"{name}={number:04x}" for name, number in numbers if number != ANY)])

    def matches(self, class_code: int, vendor_id: int, product_id: int, device_version: int) -> bool:
        """Return whether the rule matches a device, or one of its interfaces, of this class."""
        return (
            self.device_class in (ANY, class_code)
            and self.vendor_id in (ANY, vendor_id)
            and self.product_id in (ANY, product_id)
            and self.device_version in (ANY, device_version)
        )


@dataclass(frozen=True, slots=True)
class FilterResult:
    """The result of :meth:`Filter.check`.

    Attributes:
        verdict: whether the device is allowed, and if not, whether a rule denies it.
        class_code: the class of the device or of an interface that is not allowed; None if all are allowed.
        rule: the rule that denies the device; None if the device is allowed, or no rule matches.
        number: the number of this rule, counted from 1; 0 if there is none.
    """

    verdict: Verdict
    class_code: int | None = None
    rule: Rule | None = None
    number: int = 0

    @property
    def allowed(self) -> bool:
        """Return whether the device is allowed."""
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
    """Rules in order. A filter without rules denies every device."""

    rules: tuple[Rule, ...] = ()

    @classmethod
    def parse(cls, text: str, separators: str = ",") -> Self:
        """Parse a filter. Empty rules and doubled separators are skipped, as strtok(3) does.

        Numbers are parsed like strtol(3) with base 0. Numbers that do not fit into a signed 32-bit integer are refused:
        their value in C depends on the platform.

        Args:
            text: rules separated by ``|``.
            separators: each of these characters separates the fields of a rule. QEMU's command line uses ``:``.

        Raises:
            ValueError: a rule is not valid; the exception's text is a message for a user.
        """
        return cls(tuple(Rule.parse(rule, separators) for rule in text.split(_RULE_SEPARATOR) if rule))

    def format(self, separator: str = ",") -> str:
        """Return the canonical text, as libusbredirparser writes it."""
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
        """Check a device: its own class first, then the class of every interface. All of them must be allowed.

        Device classes 00 and ef mean "see the interfaces" and are not checked. Interfaces 03/00/00 (HID without boot
        protocol) of a device with several interfaces are not checked either, unless it has no others.

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
        for class_code in dict.fromkeys(classes):
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
        raise ValueError(f"{name} {_shown(text)} in a filter rule is not a number")
    sign, hexadecimal, octal, decimal = match.groups()
    digits = (hexadecimal or octal or decimal).lstrip("0") or "0"
    if len(digits) <= _MAX_DIGITS:
        number = int(digits, 16 if hexadecimal else 8 if octal else 10)
        number = -number if sign == "-" else number
        if -(1 << 31) <= number < 1 << 31:
            return number
    raise ValueError(f"{name} {_shown(text)} in a filter rule does not fit into 32 bits")


def _format_number(number: int, digits: int) -> str:
    return "-1" if number == ANY else f"0x{number:0{digits}x}"


def _shown(text: str) -> str:
    return repr(text) if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]!r}..."
