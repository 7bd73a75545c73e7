from __future__ import annotations

import pytest

from farplug.usbredir.filter import ANY, Filter, Rule, Verdict

ALLOWED, DENIED, NO_MATCH = Verdict.ALLOWED, Verdict.DENIED, Verdict.NO_MATCH


@pytest.mark.parametrize(
    ("text", "separators", "canonical"),
    [
        ("", ",", ""),
        ("||", ",", ""),
        ("-1,-1,-1,-1,1", ",", "-1,-1,-1,-1,1"),
        ("|0x03,-1,-1,-1,0||-1,-1,-1,-1,1|", ",", "0x03,-1,-1,-1,0|-1,-1,-1,-1,1"),
        ("010,0X1d6B,+7, \t0,-5", ",", "0x08,0x1d6b,0x0007,0x0000,1"),
        (",,8,,1,2,3,0,", ",", "0x08,0x0001,0x0002,0x0003,0"),
        ("8:1:2:3:1", ":", "0x08,0x0001,0x0002,0x0003,1"),
        ("8:1,2:3,1", ":,", "0x08,0x0001,0x0002,0x0003,1"),
        ("255,65535,65535,65535,2147483647", ",", "0xff,0xffff,0xffff,0xffff,1"),
        ("-0,-0x0,00,-01,-2147483648", ",", "0x00,0x0000,0x0000,-1,1"),
        ("0" * 40 + "1,1,1,1,1", ",", "0x01,0x0001,0x0001,0x0001,1"),
    ],
)
def test_parse_and_print(text: str, separators: str, canonical: str) -> None:
    parsed = Filter.parse(text, separators)
    assert str(parsed) == canonical
    assert parsed.format(":") == canonical.replace(",", ":")
    assert Filter.parse(canonical) == parsed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2,3,4", "filter rule '1,2,3,4' has 4 fields, not 5"),
        ("1,2,3,4,5,6", "filter rule '1,2,3,4,5,6' has 6 fields, not 5"),
        ("-1,-1,-1,-1,1| ", "filter rule ' ' has 1 field, not 5"),
        ("1:2:3:4:5", "filter rule '1:2:3:4:5' has 1 field, not 5"),
        ("," * 100, "has 0 fields, not 5"),
        ("a,2,3,4,5", "class 'a' in a filter rule is not a number"),
        ("1 ,2,3,4,5", "class '1 ' in a filter rule is not a number"),
        ("08,2,3,4,5", "class '08' in a filter rule is not a number"),
        ("0x,2,3,4,5", "class '0x' in a filter rule is not a number"),
        ("\u0661,2,3,4,5", "in a filter rule is not a number"),
        ("1,b,3,4,5", "vendor 'b' in a filter rule is not a number"),
        ("1,2,c,4,5", "product 'c' in a filter rule is not a number"),
        ("1,2,3,d,5", "version 'd' in a filter rule is not a number"),
        ("1,2,3,4,yes", "allow 'yes' in a filter rule is not a number"),
        ("-2,2,3,4,5", "class -2 in a filter rule is not between -1 and 255"),
        ("256,2,3,4,5", "class 256 in a filter rule is not between -1 and 255"),
        ("1,65536,3,4,5", "vendor 65536 in a filter rule is not between -1 and 65535"),
        ("1,2,65536,4,5", "product 65536 in a filter rule is not between -1 and 65535"),
        ("1,2,3,65536,5", "version 65536 in a filter rule is not between -1 and 65535"),
        ("1,2,3,4,2147483648", "allow '2147483648' in a filter rule does not fit into 32 bits"),
        ("1,2,3,4," + "9" * 10000, "... in a filter rule does not fit into 32 bits"),
    ],
)
def test_bad_rules(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Filter.parse(text)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)


def test_a_rule_out_of_range_cannot_be_made() -> None:
    with pytest.raises(ValueError):
        Rule(ANY, 0x10000, ANY, ANY, True)
    assert str(Rule(3, ANY, 0x1234, 0x100, False)) == "0x03,-1,0x1234,0x0100,0"


STORAGE, HID, BOOT_KEYBOARD = (0x08, 0x06, 0x50), (0x03, 0x00, 0x00), (0x03, 0x01, 0x01)
NO_HID = "3,-1,-1,-1,0|-1,-1,-1,-1,1"


@pytest.mark.parametrize(
    ("rules", "device_class", "interfaces", "verdict"),
    [
        ("", 0, [STORAGE], NO_MATCH),
        ("", 0, [], ALLOWED),
        ("8,-1,-1,-1,1", 0, [STORAGE], ALLOWED),
        ("8,-1,-1,-1,1", 0, [STORAGE, BOOT_KEYBOARD], NO_MATCH),
        ("-1,-1,-1,-1,1|8,-1,-1,-1,0", 0, [STORAGE], ALLOWED),
        # the device's own class, unless it points to the interfaces
        ("9,-1,-1,-1,0|-1,-1,-1,-1,1", 9, [STORAGE], DENIED),
        ("0,-1,-1,-1,0|-1,-1,-1,-1,1", 0, [STORAGE], ALLOWED),
        ("0xef,-1,-1,-1,0|-1,-1,-1,-1,1", 0xEF, [STORAGE], ALLOWED),
        # ids
        ("-1,0x1d6b,0x0104,0x0100,1", 0, [STORAGE], ALLOWED),
        ("-1,0x1d6c,-1,-1,1", 0, [STORAGE], NO_MATCH),
        ("-1,-1,0x0105,-1,1", 0, [STORAGE], NO_MATCH),
        ("-1,-1,-1,0x0101,1", 0, [STORAGE], NO_MATCH),
        # HID without boot protocol, on a device with other interfaces
        (NO_HID, 0, [STORAGE, HID], ALLOWED),
        (NO_HID, 0, [STORAGE, BOOT_KEYBOARD], DENIED),
        (NO_HID, 0, [HID], DENIED),
        (NO_HID, 0, [HID, HID], DENIED),
        ("-1,-1,-1,-1,1", 0, [HID, HID], ALLOWED),
    ],
)
def test_check(rules: str, device_class: int, interfaces: list[tuple[int, int, int]], verdict: Verdict) -> None:
    result = Filter.parse(rules).check(
        device_class=device_class,
        vendor_id=0x1D6B,
        product_id=0x0104,
        device_version=0x0100,
        interfaces=interfaces,
    )
    assert (result.verdict, result.allowed) == (verdict, verdict is ALLOWED)
    assert str(verdict) == verdict.value
