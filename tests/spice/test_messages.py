from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from typing import Any

import pytest

from farplug.errors import RemoteProtocolError
from farplug.spice.messages import (
    MAX_CHANNELS,
    MAX_TEXT,
    ChannelId,
    Disconnecting,
    MainInit,
    Migrate,
    MigrateFlags,
    Notify,
    SetAck,
    SwitchHost,
    WaitForChannels,
    parse_channels_list,
    parse_name,
    parse_uuid,
)
from farplug.spice.types import ChannelType, LinkError

PARSED: list[tuple[Callable[[bytes], Any], str, Any]] = [
    (SetAck.parse, "01000000 14000000", SetAck(1, 20)),
    (Migrate.parse, "03000000", Migrate(MigrateFlags.NEED_FLUSH | MigrateFlags.NEED_DATA_TRANSFER)),
    (
        WaitForChannels.parse,
        "02 02 00 0500000000000000 09 01 ffffffffffffffff",
        WaitForChannels(((ChannelType.DISPLAY, 0, 5), (ChannelType.USBREDIR, 1, 2**64 - 1))),
    ),
    (Disconnecting.parse, "0100000000000000 02000000", Disconnecting(1, LinkError.INVALID_MAGIC)),
    (
        Notify.parse,
        "0100000000000000 02000000 02000000 00000000 03000000 68690a 00",
        Notify(1, 2, 2, 0, "hi\N{REPLACEMENT CHARACTER}"),
    ),
    (
        MainInit.parse,
        "1b ba 69 94 00000000 01000000 01000000 00000000 0a000000 379e0f00 00000000",
        MainInit(0x9469BA1B, 0, 1, 1, 0, 10, 0x0F9E37, 0),
    ),
    (
        parse_channels_list,
        "03000000 0901 0900 0300",
        (
            ChannelId(ChannelType.INPUTS, 0),
            ChannelId(ChannelType.USBREDIR, 0),
            ChannelId(ChannelType.USBREDIR, 1),
        ),
    ),
    (parse_name, "07000000 74657374766d00", "testvm"),
    (parse_uuid, "12345678123456781234567812345678", "12345678-1234-5678-1234-567812345678"),
    *(
        (SwitchHost.parse, f"{ports} 05000000 14000000 {subject}", SwitchHost(port, tls_port, "host", text))
        for ports, port, tls_port in (
            ("0c17 0d17", 5900, 5901),
            ("0c17 ffff", 5900, None),
            ("ffff 0d17", None, 5901),
            ("0000 ffff", None, None),
        )
        for subject, text in (
            ("00000000 00000000 686f737400", ""),
            ("05000000 19000000 686f737400 434e3d7600", "CN=v"),
        )
    ),
]


@pytest.mark.parametrize(("parse", "body", "expected"), PARSED)
def test_parse(parse: Callable[[bytes], Any], body: str, expected: Any) -> None:
    assert parse(bytes.fromhex(body)) == expected


@pytest.mark.parametrize(("parse", "body", "expected"), PARSED)
def test_truncated(parse: Callable[[bytes], Any], body: str, expected: Any) -> None:
    """A message cut anywhere is refused, or parsed if it needs none of the missing bytes."""
    whole = bytes.fromhex(body)
    for size in range(len(whole)):
        with contextlib.suppress(RemoteProtocolError):
            parse(whole[:size])
    with pytest.raises(RemoteProtocolError, match="bytes"):
        parse(b"")


def test_bounds() -> None:
    with pytest.raises(RemoteProtocolError, match=f"{MAX_CHANNELS + 1} channels, more than {MAX_CHANNELS}"):
        parse_channels_list(struct.pack("<I", MAX_CHANNELS + 1) + bytes(2 * MAX_CHANNELS + 2))
    with pytest.raises(RemoteProtocolError, match="4294967295 bytes of text"):
        parse_name(struct.pack("<I", 2**32 - 1) + b"name")
    for places in ((4, 2**32 - 1, 0, 0), (4, 20, 4, 21), (0, 0, 1, 24)):
        with pytest.raises(RemoteProtocolError, match="outside"):
            SwitchHost.parse(struct.pack("<HHIIII", 1, 2, *places) + b"host")
    for places in ((MAX_TEXT + 1, 20, 0, 0), (0, 0, MAX_TEXT + 1, 20)):
        with pytest.raises(RemoteProtocolError, match="1025 bytes of text, more than 1024"):
            SwitchHost.parse(struct.pack("<HHIIII", 1, 2, *places) + bytes(MAX_TEXT + 1))
    assert parse_name(struct.pack("<I", 5000) + b"x" * 5000) == "x" * MAX_TEXT


def test_text_for_logs() -> None:
    assert parse_name(struct.pack("<I", 6) + b"a\x1b[31m") == "a\N{REPLACEMENT CHARACTER}[31m"
    assert parse_name(struct.pack("<I", 2) + b"\xff\xfe") == "\N{REPLACEMENT CHARACTER}" * 2
    assert str(ChannelId(ChannelType.USBREDIR, 3)) == "usbredir 3"


@pytest.mark.parametrize(
    ("where", "text"),
    [
        (SwitchHost(5900, None, "vmhost"), "vmhost (port 5900)"),
        (SwitchHost(None, 5901, "vmhost"), "vmhost (TLS port 5901)"),
        (SwitchHost(5900, 5901, "::1"), "::1 (port 5900, TLS port 5901)"),
        (SwitchHost(None, None, "vmhost"), "vmhost"),
        (SwitchHost(5900, None, ""), "another host (port 5900)"),
    ],
)
def test_the_new_host_of_a_vm_as_text(where: SwitchHost, text: str) -> None:
    assert str(where) == text


def test_wait_for_no_channels() -> None:
    assert WaitForChannels.parse(b"\0") == WaitForChannels(())
