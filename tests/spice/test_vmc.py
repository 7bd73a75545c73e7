from __future__ import annotations

import os
import struct

import lz4.block
import pytest

from farplug.errors import RemoteProtocolError
from farplug.spice.channel import MAX_MESSAGE
from farplug.spice.link import LinkResult
from farplug.spice.messages import Disconnecting
from farplug.spice.vmc import MAX_SENT, MAX_UNCOMPRESSED, VmcChannel
from farplug.usb.types import Buffer

DATA, COMPRESSED = 101, 102


def vmc(*, server_compresses: bool = True, may_compress: bool = True, mini_header: bool = True) -> VmcChannel:
    caps = (1,) if server_compresses else ()
    return VmcChannel("usbredir 0", LinkResult(mini_header, (0b1011,), caps, b""), may_compress=may_compress)


def message(kind: int, body: bytes) -> bytes:
    return struct.pack("<HI", kind, len(body)) + body


def compressed(data: bytes) -> bytes:
    return message(COMPRESSED, struct.pack("<BI", 1, len(data)) + lz4.block.compress(data, store_size=False))


def received(channel: VmcChannel, data: bytes, step: int) -> bytes:
    out = b""
    for at in range(0, len(data), step):
        buffer = bytearray(data[at : at + step])
        channel.receive_data(memoryview(buffer))
        while (event := channel.next_event()) is not None:
            assert isinstance(event, memoryview)
            out += bytes(event)
        buffer[:] = b"\xee" * len(buffer)
    return out


def messages(sent: list[Buffer]) -> list[tuple[int, bytes]]:
    stream = b"".join(sent)
    found = []
    while stream:
        kind, size = struct.unpack_from("<HI", stream)
        found.append((kind, stream[6 : 6 + size]))
        stream = stream[6 + size :]
    return found


@pytest.mark.parametrize("step", [1, 7, 10**6])
def test_receive(step: int) -> None:
    stream = message(DATA, b"hello ") + compressed(b"compressed " * 200) + message(DATA, b"")
    stream += message(COMPRESSED, b"\0plain") + message(DATA, b"!") + message(COMPRESSED, b"\0")
    assert received(vmc(), stream, step) == b"hello " + b"compressed " * 200 + b"plain!"


@pytest.mark.parametrize(
    ("body", "expected_text"),
    [
        (b"", "0 bytes, fewer than 5"),
        (b"\x01\x05\x00\x00", "4 bytes, fewer than 5"),
        (b"\x02\x05\x00\x00\x00data", "unknown compression 2"),
        (struct.pack("<BI", 1, MAX_UNCOMPRESSED + 1) + bytes(10), f"more than {MAX_UNCOMPRESSED}"),
        (
            struct.pack("<BI", 1, 100) + lz4.block.compress(bytes(99), store_size=False),
            "announces 100 bytes and contains 99",
        ),
        (struct.pack("<BI", 1, 99) + lz4.block.compress(bytes(100), store_size=False), "damaged"),
        (struct.pack("<BI", 1, 100) + b"\xff" * 20, "damaged"),
        (struct.pack("<BI", 1, 100), "damaged"),
    ],
)
def test_hostile_compressed_data(body: bytes, expected_text: str) -> None:
    with pytest.raises(RemoteProtocolError, match=expected_text):
        received(vmc(), message(COMPRESSED, body), 1000)


def test_compressed_data_is_bounded_before_it_is_stored() -> None:
    with pytest.raises(RemoteProtocolError, match=f"more than {MAX_MESSAGE}"):
        received(vmc(), struct.pack("<HI", COMPRESSED, MAX_MESSAGE + 1), 1000)


def test_other_events_pass() -> None:
    channel = vmc()
    channel.receive_data(memoryview(message(6, struct.pack("<QI", 1, 0))))
    assert isinstance(channel.next_event(), Disconnecting)


TEXT, NOISE = b"compressible " * 100, os.urandom(2000)
MIB = 1 << 20


@pytest.mark.parametrize(
    ("buffers", "channel", "kinds"),
    [
        ([TEXT], vmc(), [COMPRESSED]),
        ([b"head", memoryview(TEXT)], vmc(), [COMPRESSED]),
        ([TEXT[:1000]], vmc(), [DATA]),
        ([TEXT[:1001]], vmc(), [COMPRESSED]),
        ([NOISE], vmc(), [DATA]),
        ([TEXT], vmc(server_compresses=False), [DATA]),
        ([TEXT], vmc(may_compress=False), [DATA]),
        ([b"head", bytes(MIB)], vmc(), [COMPRESSED]),
        ([b"head", os.urandom(MIB)], vmc(), [DATA]),
        ([os.urandom(70_000) + bytes(MIB - 70_000)], vmc(), [DATA]),  # the trial sees noise
        ([os.urandom(MAX_SENT)], vmc(), [DATA]),
        ([os.urandom(MAX_SENT + 1)], vmc(), [DATA, DATA]),
        ([b"x" * 40, os.urandom(MAX_SENT), b"y" * 40, os.urandom(2 * MAX_SENT)], vmc(), [DATA] * 4),
        ([bytes(3 * MAX_SENT)], vmc(), [COMPRESSED] * 3),
        ([os.urandom(2 * MAX_SENT)], vmc(), [DATA] * 2),
        ([os.urandom(MAX_SENT), b"", os.urandom(1)], vmc(), [DATA] * 2),
        ([], vmc(), []),
        ([b"", b""], vmc(), []),
    ],
)
def test_send(buffers: list[Buffer], channel: VmcChannel, kinds: list[int]) -> None:
    channel.send_data(buffers)
    sent = messages(channel.data_to_send())
    assert [kind for kind, _ in sent] == kinds
    stream = b""
    for kind, body in sent:
        if kind == COMPRESSED:
            assert body[0] == 1
            payload = lz4.block.decompress(body[5:], uncompressed_size=struct.unpack_from("<I", body, 1)[0])
            assert len(body) < len(payload)
        else:
            payload = body
        assert len(payload) <= MAX_SENT
        stream += payload
    assert stream == b"".join(buffers)


def test_compression_can_be_turned_off() -> None:
    channel = vmc()
    channel.compress = False
    channel.send_data([TEXT])
    assert messages(channel.data_to_send()) == [(DATA, TEXT)]


def test_large_buffers_are_not_copied() -> None:
    payload = os.urandom(MIB)
    channel = vmc()
    channel.send_data([b"head", payload])
    assert any(buffer is payload for buffer in channel.data_to_send())


def test_full_header() -> None:
    channel = vmc(mini_header=False)
    channel.send_data([b"one"])
    channel.send_data([b"two"])
    assert b"".join(channel.data_to_send()) == (
        struct.pack("<QHII", 1, DATA, 3, 0) + b"one" + struct.pack("<QHII", 2, DATA, 3, 0) + b"two"
    )
