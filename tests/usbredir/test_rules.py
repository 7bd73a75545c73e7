from __future__ import annotations

import pytest

from farplug.errors import Reason, UsageError
from farplug.exit_codes import ExitCode, exit_code
from farplug.usb.classes import CLASS_NAMES
from farplug.usbredir.filter import Filter, FilterResult, Rule, Verdict
from farplug.usbredir.rules import MAX_LENGTH, parse_rules


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("allow class=hid; deny vendor=046d", "0x03,-1,-1,-1,1|-1,0x046d,-1,-1,0"),
        ("allow", "-1,-1,-1,-1,1"),
        ("deny", "-1,-1,-1,-1,0"),
        ("deny class=storage; deny", "0x08,-1,-1,-1,0|-1,-1,-1,-1,0"),
        (" ALLOW  Class=HID ;; Deny\nVendor=046D;", None),
        ("allow class=e0", "0xe0,-1,-1,-1,1"),
        ("allow class=0x0e", "0x0e,-1,-1,-1,1"),
        ("allow class=10", "0x10,-1,-1,-1,1"),  # hexadecimal, as lsusb
        ("allow vendor=46d product=c31c version=1.10", "-1,0x046d,0xc31c,0x0110,1"),
        ("allow version=12.34", "-1,-1,-1,0x1234,1"),
        ("allow version=0110", "-1,-1,-1,0x0110,1"),
        ("allow product=1\ndeny class=smart-card", "-1,-1,0x0001,-1,1|0x0b,-1,-1,-1,0"),
        ("0x03,-1,-1,-1,1|-1,-1,-1,-1,0", "0x03,-1,-1,-1,1|-1,-1,-1,-1,0"),
        ("8,1133,-1,-1,0", "0x08,0x046d,-1,-1,0"),
        ("-1,-1,-1,-1,0", "-1,-1,-1,-1,0"),
        (" |0x03,-1,-1,-1,1|\n", "0x03,-1,-1,-1,1"),
        ("0x08:0x1234:0xBEEF:0x0200:1|-1:-1:-1:-1:0", "0x08,0x1234,0xbeef,0x0200,1|-1,-1,-1,-1,0"),
        ("-1:-1:-1:-1:1", "-1,-1,-1,-1,1"),
        (" |8:1133:-1:-1:0|\n", "0x08,0x046d,-1,-1,0"),
        ("3,-1,-1,-1,0|8:-1:-1:-1:1", "0x03,-1,-1,-1,0|0x08,-1,-1,-1,1"),
    ],
)
def test_rules(text: str, canonical: str | None) -> None:
    if canonical is None:
        with pytest.raises(UsageError, match="not with 'Vendor=046D'"):
            parse_rules(text)
    else:
        assert str(parse_rules(text)) == canonical


@pytest.mark.parametrize("name", CLASS_NAMES.values())
def test_the_readable_form_is_parsed_again(name: str) -> None:
    text = f"deny class={name} vendor=046d product=c31c version=0110; allow"
    rules = parse_rules(text)
    assert "; ".join(rule.readable for rule in rules.rules) == text
    assert parse_rules(str(rules)) == rules


@pytest.mark.parametrize(
    ("text", "expected_text"),
    [
        ("", "filter rules are empty"),
        (" ; |\n", "filter rules are empty"),
        ("permit", "begins with 'allow' or 'deny', not with 'permit'"),
        ("class=hid", "not with 'class=hid'"),
        ("allow hid", "'hid' in a filter rule is none of class=, vendor=, product=, version="),
        ("allow colour=red", "'colour=red' in a filter rule is none of"),
        ("allow class", "'class' in a filter rule is none of"),
        ("allow class=", "class= in a filter rule is not a class's name or 2 hexadecimal digits"),
        ("allow class=disk", "class=disk in a filter rule is not a class's name"),
        ("allow class=100", "class=100 in a filter rule is not a class's name"),
        ("allow vendor=hid", "vendor=hid in a filter rule is not 4 hexadecimal digits"),
        ("allow vendor=10000", "vendor=10000 in a filter rule is not"),
        ("allow vendor=-1", "vendor=-1 in a filter rule is not"),
        ("allow version=1.1", "version=1.1 in a filter rule is not"),
        ("allow vendor=\u0664", "in a filter rule is not 4 hexadecimal digits"),
        ("allow class=hid class=audio", "a filter rule has class= twice"),
        ("deny vendor=046d", "filter rules allow no device"),
        ("deny; deny class=hid", "filter rules allow no device"),
        ("x" * (MAX_LENGTH + 1), f"filter rules have {MAX_LENGTH + 1} characters, more than {MAX_LENGTH}"),
        ("3,1,2", "has 3 fields, not 5"),
        ("3:1", "has 2 fields, not 5"),
        ("3:-1:-1:-1:yes", "allow 'yes' in a filter rule is not a number"),
        ("256:-1:-1:-1:1", "class 256 in a filter rule is not between -1 and 255"),
        ("0x03,zz,-1,-1,1", "vendor 'zz' in a filter rule is not a number"),
        ("3,-1,-1,-1,yes", "allow 'yes' in a filter rule is not a number"),
        ("256,-1,-1,-1,1", "class 256 in a filter rule is not between -1 and 255"),
    ],
)
def test_invalid_rules(text: str, expected_text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_rules(text)
    assert expected_text in caught.value.message
    assert (caught.value.reason, exit_code(caught.value)) == (Reason.BAD_OPTION, ExitCode.USAGE)
    own_form = not text.lstrip(" ;|\n")[:1].isdigit()
    assert ("class,vendor,product,version,allow" in caught.value.remedy) is not own_form


def check(text: str, *interfaces: tuple[int, int, int]) -> FilterResult:
    return parse_rules(text).check(
        device_class=0, vendor_id=0x046D, product_id=0xC31C, device_version=0x0110, interfaces=interfaces
    )


@pytest.mark.parametrize(
    ("text", "expected_text"),
    [
        ("allow class=hid", "no rule matches its class audio (01)"),
        ("deny vendor=1; deny class=audio; allow", "rule 2 (deny class=audio) denies its class audio (01)"),
        ("deny vendor=046d version=0110; allow", "rule 1 (deny vendor=046d version=0110) denies its class hid (03)"),
    ],
)
def test_which_rule_decided(text: str, expected_text: str) -> None:
    result = check(text, (3, 1, 1), (1, 1, 0))
    assert not result.allowed
    assert str(result) == expected_text


def test_allowed() -> None:
    assert check("allow", (3, 1, 1)) == FilterResult(Verdict.ALLOWED)
    assert str(check("allow", (3, 1, 1))) == "allowed"
    assert Filter((Rule(0x42, -1, -1, -1, False),)).rules[0].readable == "deny class=42"
