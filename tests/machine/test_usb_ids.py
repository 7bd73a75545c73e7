from __future__ import annotations

from pathlib import Path

import pytest

from farplug.machine import usb_ids as module
from farplug.machine.usb_ids import UsbIds, usb_ids

TEXT = """\
# a comment
046d  Logitech, Inc.
\tc31c  Keyboard K120
\t\t00  an interface
\tnonsense
1050  Yubico.com
\t0407  Yubikey 4/5 OTP+U2F+CCID
046d  the second one does not count

C 00  (Defined at Interface level)
\t0001  a subclass, no product
AT 0100  Streaming
"""


def test_names() -> None:
    ids = UsbIds(TEXT)
    assert ids.vendor(0x046D) == "Logitech, Inc."
    assert ids.product(0x1050, 0x0407) == "Yubikey 4/5 OTP+U2F+CCID"
    assert ids.product(0x046D, 0x0407) == ids.vendor(0xFFFF) == ""
    assert ids.product(0x046D, 0x0001) == ids.product(0x1050, 0x0001) == ids.product(0x046D, 0) == ""


def test_all_of_a_file() -> None:
    """With numbers in capitals too, and where the last line has no end."""
    ids = UsbIds("ABCD  First\n\n# between\n\tEF01  One\n\tef02  Two\nabce  Last\n\t0001  End")
    assert (ids.vendor(0xABCD), ids.vendor(0xABCE)) == ("First", "Last")
    assert [ids.product(0xABCD, number) for number in (0xEF01, 0xEF02, 0x0001)] == ["One", "Two", ""]
    assert ids.product(0xABCE, 1) == "End"


@pytest.mark.parametrize(
    "text", ["", "\0" * 100, "\t" * 100, "046d", "046d  ", "\n\n\t1234  orphan\n", "046d  \n\t1234", "\ud800  x"]
)
def test_nonsense(text: str) -> None:
    ids = UsbIds(text)
    assert ids.vendor(0x046D) == ids.product(0x046D, 0x1234) == ids.product(0, 0x1234) == ""


def test_long_and_unprintable_names() -> None:
    name = UsbIds("1234  \x1b" + "x" * 5000).vendor(0x1234)
    assert name.isprintable()
    assert len(name) == module.MAX_NAME


def test_where_there_is_none(tmp_path: Path) -> None:
    assert usb_ids(tmp_path) == UsbIds()


def test_a_large_file_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SIZE", 64)
    (tmp_path / "usr/share/misc").mkdir(parents=True)
    (tmp_path / "usr/share/misc/usb.ids").write_bytes(b"1234  first\n\xff\xfe" + b"#" * 64 + b"\n5678  too far\n")
    ids = usb_ids(tmp_path)
    assert (ids.vendor(0x1234), ids.vendor(0x5678)) == ("first", "")


def test_this_machines_own() -> None:
    assert "Linux Foundation" in usb_ids().vendor(0x1D6B)
