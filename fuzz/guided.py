"""Fuzz each parser of hostile input guided by coverage, with atheris.

An input that reaches new branches of farplug is kept in ``build/fuzz/PARSER`` and is changed further, also by later
runs. An input that makes a parser raise an unexpected exception is saved beside this folder; ``--input`` repeats it,
without atheris.

    python fuzz/guided.py [--seconds SECONDS] [PARSER ...]
    python fuzz/guided.py --input FILE PARSER
    python fuzz/guided.py --seeds [PARSER ...]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

Parse: TypeAlias = Callable[[bytes], None]
"""Parses one input; an exception is a bug."""

CORPUS = Path(__file__).parents[1] / "build/fuzz"
INPUT_LIMIT = 30
"""Seconds after which the parser has failed on an input."""
MEMORY_LIMIT = 1024
"""MiB of the process above which the parser has failed."""


# Each function imports its parser when it is called: atheris instruments what is imported then.


def usbredir() -> Parse:
    from farplug.usbredir.packets import DataPacket
    from farplug.usbredir.protocol import Connection, Role

    def parse(data: bytes) -> None:
        for role in Role:
            connection = Connection(role, max_payload=4096)
            for at in range(0, len(data), 100):
                connection.receive_data(data[at : at + 100])
                while (event := connection.next_event()) is not None:
                    assert len(str(event)) < 100_000
                    assert not isinstance(event, DataPacket) or len(event.data) <= min(4096, len(data))

    return parse


def usbip() -> Parse:
    from farplug.errors import RemoteProtocolError
    from farplug.usbip import messages

    urbs = (messages.Submit(0, 1, 0x81, 4096), messages.Submit(1, 1, 0x02, 64, packets=(messages.IsoPacket(0, 64),)))
    parsers: tuple[Callable[[], messages.Parser[Any]], ...] = (
        messages.RequestParser,
        messages.ImportParser,
        messages.CommandParser,
        lambda: messages.ReplyParser(lambda number: urbs[number % 2]),
    )

    def parse(data: bytes) -> None:
        for make in parsers:
            parser = make()
            with contextlib.suppress(RemoteProtocolError):
                for at in range(0, len(data), 100):
                    parser.receive_data(data[at : at + 100])
                    while parser.next_message() is not None:
                        pass

    return parse


def spice_link() -> Parse:
    from farplug.errors import FarplugError
    from farplug.spice.link import LinkClient
    from farplug.spice.types import ChannelType

    def parse(data: bytes) -> None:
        client = LinkClient.for_channel(ChannelType.MAIN, 0, connection_id=0, capabilities=[1], password="secret")
        try:
            client.receive_data(data)
            client.data_to_send()
        except FarplugError as refused:
            _check("secret" not in str(refused))
        client.receive_eof()

    return parse


def spice_messages() -> Parse:
    from farplug.errors import RemoteProtocolError
    from farplug.spice.channel import Channel, Message
    from farplug.spice.link import LinkResult
    from farplug.spice.messages import MainInit, SwitchHost, parse_channels_list, parse_name, parse_uuid
    from farplug.spice.vmc import VmcChannel

    parsers: dict[int, Callable[[memoryview], object]] = {
        103: MainInit.parse,
        104: parse_channels_list,
        111: SwitchHost.parse,
        113: parse_name,
        114: parse_uuid,
    }

    def parse(data: bytes) -> None:
        mini = not data[:1] or not data[0] & 1
        channel = Channel("main", mini_header=mini, stored=dict.fromkeys(parsers, 1 << 16))
        vmc = VmcChannel("usbredir 0", LinkResult(mini, (), (1,), b""), may_compress=True)
        for one in (channel, vmc):
            try:
                one.receive_data(memoryview(data)[1:])
                while (event := one.next_event()) is not None:
                    if isinstance(event, Message):
                        parsers[event.kind](event.body)
            except RemoteProtocolError as refused:
                _check(len(str(refused)) < 300)

    return parse


def vv_file() -> Parse:
    from farplug.errors import FarplugError
    from farplug.target import parse_vv

    def parse(data: bytes) -> None:
        try:
            target = parse_vv(data)
        except FarplugError as refused:
            _check(str(refused).isprintable())
        else:
            assert target.host

    return parse


def transfer_blocks() -> Parse:
    from farplug.virtual.ntb import BlockReader, BlockWriter

    def parse(data: bytes) -> None:
        try:
            frames = BlockReader(1514).frames(data)
        except ValueError:
            return
        assert sum(map(len, frames)) <= len(data)
        assert all(14 <= len(frame) <= 1514 for frame in frames)
        again = [frame for block in BlockWriter().blocks(frames, 16384) for frame in BlockReader(1514).frames(block)]
        assert again == frames

    return parse


def frame_stream() -> Parse:
    from farplug.ends.frames import FrameReader

    def parse(data: bytes) -> None:
        reader = FrameReader()
        size = 0
        with contextlib.suppress(ValueError):
            for at in range(0, len(data), 7):
                size += sum(4 + len(frame) for frame in reader.feed(data[at : at + 7]))
        assert size <= len(data)

    return parse


def descriptors() -> Parse:
    from farplug.usb.descriptors import (
        BosDescriptor,
        ConfigurationDescriptor,
        DeviceDescriptor,
        DeviceQualifier,
        parse_string,
        string_descriptor,
    )

    def parse(data: bytes) -> None:
        bytes(DeviceDescriptor.parse(data))
        bytes(DeviceQualifier.parse(data))
        bos = BosDescriptor.parse(data)
        assert BosDescriptor.parse(bytes(bos)) == bos
        parse_string(string_descriptor(parse_string(data)))
        ConfigurationDescriptor.parse(data).select()

    return parse


def scsi_commands() -> Parse:
    from farplug.scsi.cdrom import CdromUnit
    from farplug.scsi.disk import DiskUnit
    from farplug.store import MemoryStore

    disk, cdrom = MemoryStore(1 << 15), MemoryStore(1 << 15, block_size=2048, read_only=True)

    def parse(data: bytes) -> None:
        units = (DiskUnit(disk), CdromUnit(cdrom, serial_number="1"))
        for at in range(0, len(data), 16):
            for unit in units:
                unit.execute(data[at : at + 16])

    return parse


def snapshot_header() -> Parse:
    from farplug.errors import ImageError
    from farplug.store import overlay_format
    from farplug.store.overlay_format import HEADER_SIZE, Header

    def parse(data: bytes) -> None:
        header = bytearray((overlay_format.MAGIC + data)[:HEADER_SIZE].ljust(HEADER_SIZE, b"\0"))
        header[12:16] = overlay_format._crc(bytes(header)).to_bytes(4, "little")
        try:
            parsed = Header.parse(bytes(header), Path("snapshot"))
        except ImageError as refused:
            _check(str(refused).isprintable())
        else:
            assert bytes(parsed)[16:] == bytes(header)[16:] or b"\0" in data
            assert parsed.map_sectors <= overlay_format.MAX_CLUSTERS // 8 // overlay_format.CONTENT_SIZE + 1

    return parse


def control_messages() -> Parse:
    from farplug.control.messages import MAX_LINE, MAX_PAYLOAD, Hello, Receiver, Reply, parse_reply, parse_request
    from farplug.errors import RemoteProtocolError

    def parse(data: bytes) -> None:
        for parser in (parse_request, parse_reply):
            receiver: Receiver[Any] = Receiver(parser, MAX_PAYLOAD)
            try:
                receiver.receive_data(data)
                while (message := receiver.next_message()) is not None:
                    if isinstance(message, Reply):
                        Hello.parse(message.result)
                receiver.receive_eof()
            except RemoteProtocolError as refused:
                _check(len(str(refused)) < 500 and str(refused).isprintable())
            assert len(receiver._buffer) <= MAX_LINE + MAX_PAYLOAD + len(data)

    return parse


def device_filter() -> Parse:
    from farplug.errors import UsageError
    from farplug.usbredir.filter import Filter
    from farplug.usbredir.rules import parse_rules

    def parse(data: bytes) -> None:
        text = data.decode("utf-8", "surrogateescape")
        try:
            rules = Filter.parse(text)
        except ValueError as refused:
            _check(len(str(refused)) < 500)
        else:
            assert Filter.parse(str(rules)) == rules
        with contextlib.suppress(UsageError):
            parse_rules(text)

    return parse


def target_text() -> Parse:
    from farplug.errors import FarplugError
    from farplug.target import parse_target

    def parse(data: bytes) -> None:
        text = data.decode("utf-8", "surrogateescape")
        if ":" not in text:
            return  # the path of a file
        try:
            parse_target(text, keep_file=True)
        except FarplugError as refused:
            is_password = re.search("[?&]password=sesame(&|$)", text) and text.count("sesame") == 1
            _check(not is_password or "sesame" not in str(refused))

    return parse


def fido_cbor() -> Parse:
    from farplug.virtual.fido import cbor

    def parse(data: bytes) -> None:
        try:
            value = cbor.decode(data)
        except cbor.CborError as refused:
            _check(len(str(refused)) < 200)
        else:
            assert cbor.encode(value) == data

    return parse


def jpeg() -> Parse:
    from farplug.virtual.video.jpeg import Finder, JpegError

    def parse(data: bytes) -> None:
        try:
            found = Finder(data).image(0)
        except JpegError as refused:
            _check(str(refused).isprintable())
        else:
            assert found.end <= len(data)

    return parse


def _check(holds: bool) -> None:
    assert holds


@dataclass(frozen=True)
class Parser:
    """A parser, and inputs to begin with."""

    make: Callable[[], Parse]
    seeds: tuple[bytes, ...]


_HELLO = bytes.fromhex("00000000 44000000 00000000") + b"peer".ljust(64, b"\0") + bytes.fromhex("ff000000")

PARSERS = {
    "usbredir": Parser(
        usbredir,
        (
            _HELLO,
            _HELLO + bytes.fromhex("64000000 0a000000 0100000000000000 80060001 00001200 1200"),
            _HELLO + bytes.fromhex("65000000 0a000000 0200000000000000 8100 0002 00000000 0000"),
            _HELLO + bytes.fromhex("17000000 10000000 0300000000000000") + b"-1,-1,-1,-1,1|\0\0",
        ),
    ),
    "usbip": Parser(
        usbip,
        (
            bytes.fromhex("0111 8005 00000000"),
            bytes.fromhex("0111 8003 00000000") + b"1-1".ljust(32, b"\0"),
            bytes.fromhex("0111 0005 00000000 00000001")
            + bytes(299)
            + bytes.fromhex("03")
            + bytes(11)
            + b"\1\xff\0\0\0",
            bytes.fromhex("00000001 00000001 00010001 00000000 00000001 00000000 00000004") + bytes(20) + b"data",
            bytes.fromhex("00000003 00000000 00000000 00000000 00000000 00000000 00000004") + bytes(20) + b"data",
            bytes.fromhex("00000002 00000002 00010001 00000000 00000000 00000001") + bytes(24),
        ),
    ),
    "spice-link": Parser(
        spice_link,
        (
            b"REDQ" + bytes.fromhex("02000000 02000000 ba000000 00000000") + bytes(162) + bytes.fromhex("01" * 16),
            b"REDQ" + bytes.fromhex("02000000 02000000 04000000 05000000"),
        ),
    ),
    "spice-messages": Parser(
        spice_messages,
        (
            b"\0" + bytes.fromhex("6700 20000000") + bytes(32) + bytes.fromhex("6800 06000000 01000000 0900"),
            b"\0" + bytes.fromhex("6f00 1a000000 0c170d17 06000000 14000000 00000000 00000000") + b"vmhost",
            b"\0" + bytes.fromhex("7100 07000000 03000000") + b"vm\0" + bytes.fromhex("0700 18000000") + bytes(24),
            b"\0" + bytes.fromhex("6600 0b000000 01 05000000 50") + b"hello",
            b"\1" + bytes.fromhex("0100000000000000 0400 0c000000 00000000") + bytes(12),
        ),
    ),
    "vv-file": Parser(
        vv_file,
        (
            b"[virt-viewer]\ntype=spice\nhost=vmhost\nport=5900\ntls-port=5901\npassword=a\\sb\nhost-subject=O=a,CN=b\n",
            b"[virt-viewer]\r\ntype=spice\nhost=::1\ntls-port=1\nproxy=http://p:3128\nsecure-channels=main;usbredir\n",
        ),
    ),
    "transfer-blocks": Parser(
        transfer_blocks,
        (
            bytes.fromhex("4e434d48 0c000000 2a000c00 4e434d30 10000000 1c000e00 00000000") + bytes(14),
            bytes.fromhex("4e434d48 0c000000 00001c00")
            + bytes(16)
            + bytes.fromhex("4e434d30 10000c00 0c000e00 00000000"),
        ),
    ),
    "frame-stream": Parser(frame_stream, (bytes.fromhex("0000000e") + bytes(14) + bytes.fromhex("00000000 0000ffff"),)),
    "descriptors": Parser(
        descriptors,
        (
            bytes.fromhex("12010002 00000040 6b1d0401 00010102 0301"),
            bytes.fromhex("09022000 01010080 32 09040000 02080650 00 07058102 000200 07050202 000200"),
            bytes.fromhex("050f1600 02 07100206 000000 0a100300 0e000100 0000"),
            bytes.fromhex("0a034100 e9003dd8 00de"),
        ),
    ),
    "scsi-commands": Parser(
        scsi_commands,
        (
            bytes.fromhex("28000000 00000000 01000000 00000000 9e100000 00000000 00000000 00200000"),
            bytes.fromhex("12018000 ff000000 00000000 00000000 1a003f00 ff000000 00000000 00000000"),
            bytes.fromhex("42000000 00000000 18000000 00000000 43020000 00000000 ff000000 00000000"),
        ),
    ),
    "snapshot-header": Parser(
        snapshot_header,
        (
            bytes.fromhex("01000000 00000000")
            + bytes(16)
            + bytes.fromhex("0000100000000000 00020000 00100000")
            + bytes(40)
            + b"\x08\0/tmp/raw",
        ),
    ),
    "control-messages": Parser(
        control_messages,
        (
            b'{"id":1,"method":"attach","params":{"sources":[{"kind":"disk","path":"/a"}]}}\n',
            b'{"id":1,"ok":true,"result":{"protocol_version":"1.0","pid":1}}\n{"event":"note","message":"x"}\n',
            b'{"id":1,"ok":false,"error":{"code":"bad-setting","message":"x","remedy":{"text":"y"}}}\n',
        ),
    ),
    "device-filter": Parser(
        device_filter,
        (b"0x03,-1,-1,-1,0|-1,-1,-1,-1,1", b"allow class=storage; deny vendor=0x1d6b product=0x0104", b"3,,,,1"),
    ),
    "fido-cbor": Parser(
        fido_cbor,
        (
            bytes.fromhex("a3 01 44 00010203 02 a1 62 6964 6b 6578616d706c652e636f6d 03 83 20 f5 19 0100"),
            bytes.fromhex("a1 04 a2 62 726b f5 64 706c6174 f4"),
        ),
    ),
    "jpeg": Parser(
        jpeg,
        (bytes.fromhex("ffd8 fffe000468 69 ffc0000b08 0010 0010 01 011100 ffda0008 01 0100 003f00 1fff00ffd012 ffd9"),),
    ),
    "target-text": Parser(
        target_text,
        (
            b"spice://[fe80::1%25eth0]:5900?tls-port=5901&password=sesame",
            b"spice+tls://vmhost:5901",
            b"spice+unix:///run/vm.sock",
            b"tcp://localhost:4000",
            b"tcp-listen://0.0.0.0:0",
            b"unix:/run/usb.sock",
        ),
    ),
}


def main() -> int:
    arguments = _arguments()
    names = arguments.parsers or list(PARSERS)
    if arguments.input is not None:
        for name in names:
            PARSERS[name].make()(arguments.input.read_bytes())
        return 0
    if arguments.seeds:
        for name in names:
            parse = PARSERS[name].make()
            for seed in PARSERS[name].seeds:
                for length in range(len(seed) + 1):
                    parse(seed[:length])
        return 0
    if importlib.util.find_spec("atheris") is None:
        print("guided: skipped: atheris is not installed: .venv/bin/pip install -e '.[fuzz]'")  # noqa: T201
        return int(os.environ.get("FARPLUG_REQUIRE_ALL") == "1")
    if arguments.libfuzzer is not None:
        _fuzz(names[0], arguments.libfuzzer)
    return max(_run(name, arguments.seconds) for name in names)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fuzz parsers, guided by coverage.")
    parser.add_argument("parsers", nargs="*", choices=[*PARSERS, []], metavar="PARSER", help=", ".join(PARSERS))
    parser.add_argument("--seconds", type=int, default=20, help="how long to run for each parser")
    parser.add_argument("--input", type=Path, help="only parse this file")
    parser.add_argument("--seeds", action="store_true", help="only parse the first inputs, and their beginnings")
    parser.add_argument("--libfuzzer", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser.parse_args()


def _run(name: str, seconds: int) -> int:
    """Fuzz a parser in a process of its own, which libFuzzer ends. Return its exit code."""
    corpus = CORPUS / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(PARSERS[name].seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    options = (
        f"-max_total_time={seconds}",
        f"-timeout={INPUT_LIMIT}",
        f"-rss_limit_mb={MEMORY_LIMIT}",
        "-max_len=4096",
        f"-artifact_prefix={CORPUS}/{name}-",
        "-verbosity=0",
        "-print_final_stats=1",
    )
    command = [sys.executable, __file__, name, "--libfuzzer", *options, str(corpus)]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    output = result.stdout + result.stderr
    cases = next((line.split()[1] for line in output.splitlines() if "number_of_executed_units" in line), "0")
    if result.returncode:
        print(output, file=sys.stderr)  # noqa: T201
        failing = next((line.split()[-1] for line in output.splitlines() if "Test unit written to" in line), "FILE")
        print(f"{name}: failed; repeat with: python {sys.argv[0]} --input {failing} {name}", file=sys.stderr)  # noqa: T201
        return 1
    kept = len(list(corpus.iterdir()))
    print(f"{name}: {cases} cases in {seconds} s, {kept} inputs of the corpus, no failure")  # noqa: T201
    return 0


def _fuzz(name: str, options: list[str]) -> None:
    """Fuzz a parser in this process. Does not return."""
    import atheris

    with atheris.instrument_imports(include=["farplug"]):
        parse = PARSERS[name].make()
    atheris.Setup([sys.argv[0], *options], parse)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
