"""Fuzz the parsers of descriptors: they never raise, and their result is consistent."""

from __future__ import annotations

import random

from farplug.usb.descriptors import (
    BosDescriptor,
    ConfigurationDescriptor,
    DeviceDescriptor,
    DeviceQualifier,
    parse_string,
    string_descriptor,
)
from harness import run

TYPES = (1, 2, 3, 4, 5, 6, 7, 11, 15, 16, 36, 37, 48, 255)
LENGTHS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 18, 20, 255)


def garbage(source: random.Random) -> bytes:
    """Return a chain of descriptors, mostly invalid, that the parsers do not reject at once."""
    data = bytearray()
    for _ in range(source.randrange(12)):
        length = source.choice(LENGTHS)
        body = source.randbytes(max(0, length - 2 + source.choice((0, 0, 0, 0, -1, 1))))
        data += bytes((length, source.choice(TYPES))) + body
    if source.random() < 0.001:  # more interfaces than bNumInterfaces can count
        data += b"".join(bytes((9, 4, number, 0, 0, 255, 0, 0, 0)) for number in range(source.randrange(250, 257)))
    head = source.choice((b"", b"\x09\x02", b"\x05\x0f", b"\x12\x01"))
    total = source.choice((len(data) + 9, source.randrange(65536))).to_bytes(2, "little")
    return head + total + source.randbytes(5) + data if head else source.randbytes(source.randrange(300))


def one_case(source: random.Random) -> None:
    data = garbage(source)
    bytes(DeviceDescriptor.parse(data))
    bytes(DeviceQualifier.parse(data))
    bos = BosDescriptor.parse(data)
    assert BosDescriptor.parse(bytes(bos)) == bos
    parse_string(string_descriptor(parse_string(data)))
    configuration = ConfigurationDescriptor.parse(data)
    try:
        built = bytes(configuration)
    except ValueError:
        assert len({interface.number for interface in configuration.interfaces}) > 255
        return
    again = ConfigurationDescriptor.parse(built)
    assert again.select() == configuration.select()
    for interface in configuration.interfaces:
        chosen = configuration.select({interface.number: interface.alternate})
        addresses = [endpoint.address for one in chosen for endpoint in one.endpoints]
        assert len(addresses) == len(set(addresses))


if __name__ == "__main__":
    run("descriptors", one_case)
