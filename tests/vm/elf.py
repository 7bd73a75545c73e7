"""A minimal ELF file, to stand for kernels and modules."""

from __future__ import annotations

import struct


def elf(**sections: bytes) -> bytes:
    """An ELF file of 64 bits with sections of these names (a leading dot is added)."""
    names = bytearray(b"\0")
    body = bytearray(64)
    headers = [struct.pack("<IIQQQQIIQQ", 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)]
    for name, content in (*sections.items(), ("shstrtab", b"")):
        name_offset = len(names)
        names += b"." + name.encode() + b"\0"
        data = bytes(names) if name == "shstrtab" else content
        headers.append(struct.pack("<IIQQQQIIQQ", name_offset, 1, 0, 0, len(body), len(data), 0, 0, 1, 0))
        body += data
    table = len(body)
    body[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<Q", body, 0x28, table)
    struct.pack_into("<HHH", body, 0x3A, 64, len(headers), len(headers) - 1)
    return bytes(body) + b"".join(headers)


def module(depends: str = "", *aliases: str) -> bytes:
    """A kernel module that needs others."""
    lines = [f"depends={depends}", *(f"alias={alias}" for alias in aliases), "license=GPL"]
    return elf(text=b"\x90" * 10, modinfo="\0".join([*lines, ""]).encode())
