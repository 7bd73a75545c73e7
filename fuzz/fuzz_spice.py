"""Fuzz the input from SPICE servers: link replies, channel streams, SpiceVMC, ``.vv`` files.

FarplugError is expected. Any other exception is a bug. A valid SpiceVMC stream must be decoded completely, however the
stream is cut.
"""

from __future__ import annotations

import random
import struct

import lz4.block
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from farplug.errors import FarplugError, RemoteProtocolError, UsageError
from farplug.spice.channel import Channel, Message
from farplug.spice.link import LinkClient, LinkReply, LinkResult
from farplug.spice.messages import MainInit, SwitchHost, parse_channels_list, parse_name, parse_uuid
from farplug.spice.types import ChannelType, LinkError
from farplug.spice.vmc import VmcChannel
from farplug.spice.vv import VvFile
from harness import check, run

PUBLIC_KEY = (
    rsa.generate_private_key(65537, 1024).public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
)
DATA, COMPRESSED = 101, 102
VV = (
    b"[virt-viewer]\r\ntype=spice\nhost=vmhost\nport=5900\ntls-port=5901\npassword=a\\\\b%%\\s\n"
    b"ca=-----BEGIN CERTIFICATE-----\\nAA\\n\nhost-subject=O=a\\, b,CN=c\nproxy=http://p:3128\ndelete-this-file=1\n"
    b"secure-channels=main;inputs\n# comment\n[other]\nx=y\n"
)


def damage(rng: random.Random, data: bytes) -> bytes:
    """Return the data with some bytes changed, removed or added; or unchanged."""
    damaged = bytearray(data)
    for _ in range(rng.choice((0, 0, 1, 2, 5))):
        at = rng.randrange(len(damaged) + 1)
        match rng.randrange(3):
            case 0:
                damaged[at : at + 1] = rng.randbytes(1)
            case 1:
                del damaged[at : at + rng.randrange(20)]
            case _:
                damaged[at:at] = rng.choice((rng.randbytes(rng.randrange(20)), b"\xff" * 4, bytes(4)))
    return bytes(damaged)


def pieces(rng: random.Random, data: bytes) -> list[bytes]:
    step = rng.choice((1, 7, 100, 1 << 20))
    return [data[at : at + step] for at in range(0, len(data), step)]


def message(kind: int, body: bytes, mini: bool) -> bytes:
    return (struct.pack("<HI", kind, len(body)) if mini else struct.pack("<QHII", 1, kind, len(body), 0)) + body


def fuzz_link(rng: random.Random) -> None:
    link = LinkClient.for_channel(ChannelType.MAIN, 0, connection_id=0, capabilities=[1], password="secret")
    caps = tuple(rng.choice((0b1011, 0b1010, 0, rng.getrandbits(32))) for _ in range(rng.randrange(3)))
    error = LinkError(rng.choice((0, 0, 0, rng.randrange(12), rng.getrandbits(32))))
    reply = bytes(LinkReply(error, PUBLIC_KEY, caps, caps)) + struct.pack("<I", rng.choice((0, 7)))
    try:
        for piece in pieces(rng, damage(rng, reply)):
            link.receive_data(piece)
            link.data_to_send()
    except FarplugError as refused:
        check("secret" not in str(refused))
    link.receive_eof()


def fuzz_channel(rng: random.Random) -> None:
    mini = rng.random() < 0.7
    channel = Channel("main", mini_header=mini, stored={103: 256, 104: 1000, 113: 1000, 114: 64, 111: 1000})
    parsers = {
        103: MainInit.parse,
        104: parse_channels_list,
        111: SwitchHost.parse,
        113: parse_name,
        114: parse_uuid,
    }
    stream = b"".join(
        message(
            rng.choice((*range(1, 8), *parsers, 200)), rng.randbytes(rng.choice((0, 4, 8, 12, 16, 24, 32, 100))), mini
        )
        for _ in range(rng.randrange(12))
    )
    try:
        for piece in pieces(rng, damage(rng, stream)):
            channel.receive_data(memoryview(piece))
            while (event := channel.next_event()) is not None:
                if isinstance(event, Message):
                    parsers[event.kind](event.body)
            assert sum(map(len, channel.data_to_send())) <= 24 + 6 * len(piece)
    except RemoteProtocolError as refused:
        check(len(str(refused)) < 300)


def fuzz_vmc(rng: random.Random) -> None:
    mini = rng.random() < 0.7
    channel = VmcChannel("usbredir 0", LinkResult(mini, (), (1,), b""), may_compress=True)
    stream = plain = b""
    for _ in range(rng.randrange(8)):
        data = rng.choice((rng.randbytes, bytes))(rng.choice((0, 1, 100, 3000)))
        plain += data
        if rng.random() < 0.5:
            body = struct.pack("<BI", 1, len(data)) + lz4.block.compress(data, store_size=False)
            stream += message(COMPRESSED, body, mini)
        else:
            stream += message(DATA, data, mini)
    damaged = damage(rng, stream)
    received = b""
    try:
        for piece in pieces(rng, damaged):
            channel.receive_data(memoryview(piece))
            while (event := channel.next_event()) is not None:
                if isinstance(event, memoryview):
                    received += event
    except RemoteProtocolError:
        assert damaged != stream
    if damaged == stream:
        assert received == plain


def fuzz_vv(rng: random.Random) -> None:
    lines = VV.split(b"\n")
    rng.shuffle(lines)
    data = damage(rng, rng.choice((VV, b"\n".join(lines), b"[virt-viewer]\n" + b"\n".join(lines))))
    try:
        vv = VvFile.parse(data, path="fuzz.vv")
    except UsageError as refused:
        check(str(refused).startswith("fuzz.vv"))
    else:
        assert vv.host
        assert any(port is not None and 0 < port < 65536 for port in (vv.port, vv.tls_port))


def one_case(rng: random.Random) -> None:
    rng.choice((fuzz_link, fuzz_channel, fuzz_vmc, fuzz_vv))(rng)


if __name__ == "__main__":
    run("spice", one_case)
