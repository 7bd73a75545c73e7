"""The Lua dissector: each type of packet, and how it is installed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from tests.capture import wireshark

from farplug.capture.dissector import FILE_NAME, dissector, install_dissector, plugin_folder
from farplug.capture.recording import Recording
from farplug.errors import Reason, SetupError
from farplug.usb.transfer import Status
from farplug.usbredir import envelope
from farplug.usbredir import packets as p
from farplug.usbredir.caps import ALL_CAPS, Cap
from farplug.usbredir.protocol import Connection, Role

OK = Status.SUCCESS
INTERFACES = p.InterfaceInfo(interfaces=(p.InterfaceEntry(0, 8, 6, 80), p.InterfaceEntry(2, 3, 1, 1)))
ENDPOINTS = p.EndpointInfo(
    endpoints=(
        p.EndpointEntry(type=0),
        p.EndpointEntry(),
        p.EndpointEntry(2, 0, 1, 1024, 16),
        *[p.EndpointEntry()] * 29,
    )
)
TO_GUEST: list[tuple[p.Packet, str]] = [
    (
        p.DeviceConnect(
            speed=3, device_class=0, device_subclass=0, device_protocol=0, vendor_id=0x1D6B, product_id=0x104
        ),
        "device_connect super 1d6b 0104",
    ),
    (INTERFACES, "interface_info 2 interfaces"),
    (ENDPOINTS, "ep_info ep 00 02"),
    (p.ConfigurationStatus(id=1, status=OK, configuration=1), "configuration_status success 1"),
    (p.AltSettingStatus(id=2, status=Status.STALL, interface=3, alt=4), "alt_setting_status stall interface 3 alt 4"),
    (p.IsoStreamStatus(id=3, status=OK, endpoint=0x83), "iso_stream_status success ep 83"),
    (
        p.InterruptReceivingStatus(id=4, status=Status.IO_ERROR, endpoint=0x81),
        "interrupt_receiving_status ioerror ep 81",
    ),
    (p.BulkStreamsStatus(id=5, endpoints=6, streams=32, status=OK), "bulk_streams_status 32 streams success"),
    (p.BulkReceivingStatus(id=6, stream_id=0, endpoint=0x82, status=OK), "bulk_receiving_status ep 82 success"),
    (
        p.ControlPacket(
            id=7, endpoint=0x80, request=6, request_type=0x80, status=OK, value=0x100, index=0, length=3, data=b"abc"
        ),
        "control_packet ep 80 06 80 success 0100 0000 3 bytes",
    ),
    (
        p.BulkPacket(id=8, endpoint=0x81, status=OK, length=70_000, stream_id=9, data=bytes(70_000)),
        "bulk_packet ep 81 70000 bytes stream 9 success",
    ),
    (p.IsoPacket(id=9, endpoint=0x83, status=OK, length=2, data=b"xy"), "iso_packet ep 83 success 2 bytes"),
    (
        p.InterruptPacket(id=10, endpoint=0x81, status=OK, length=1, data=b"z"),
        "interrupt_packet ep 81 success 1 bytes",
    ),
    (
        p.BufferedBulkPacket(id=11, stream_id=0, length=1, endpoint=0x82, status=OK, data=b"z"),
        "buffered_bulk_packet 1 bytes ep 82 success",
    ),
    (p.DeviceDisconnect(), "device_disconnect"),
]
TO_HOST: list[tuple[p.Packet, str]] = [
    (p.Reset(), "reset"),
    (p.SetConfiguration(id=1, configuration=1), "set_configuration 1"),
    (p.GetConfiguration(id=1), "get_configuration"),
    (p.SetAltSetting(id=2, interface=3, alt=4), "set_alt_setting interface 3 alt 4"),
    (p.GetAltSetting(id=2, interface=3), "get_alt_setting interface 3"),
    (p.StartIsoStream(id=3, endpoint=0x83, packets_per_urb=8, urbs=4), "start_iso_stream ep 83"),
    (p.StopIsoStream(id=3, endpoint=0x83), "stop_iso_stream ep 83"),
    (p.StartInterruptReceiving(id=4, endpoint=0x81), "start_interrupt_receiving ep 81"),
    (p.StopInterruptReceiving(id=4, endpoint=0x81), "stop_interrupt_receiving ep 81"),
    (p.AllocBulkStreams(id=5, endpoints=6, streams=32), "alloc_bulk_streams 32 streams"),
    (p.FreeBulkStreams(id=5, endpoints=6), "free_bulk_streams"),
    (p.CancelDataPacket(id=6), "cancel_data_packet"),
    (p.FilterReject(), "filter_reject"),
    (p.FilterFilter(filter="-1,-1,-1,-1,1"), "filter_filter -1,-1,-1,-1,1"),
    (p.DeviceDisconnectAck(), "device_disconnect_ack"),
    (
        p.StartBulkReceiving(id=6, stream_id=0, bytes_per_transfer=512, endpoint=0x82, transfers=4),
        "start_bulk_receiving ep 82",
    ),
    (p.StopBulkReceiving(id=6, stream_id=0, endpoint=0x82), "stop_bulk_receiving ep 82"),
]


def ends(caps: Cap = ALL_CAPS) -> tuple[Connection, Connection, bytes, bytes]:
    """Return the host and the guest after their hellos, and the hellos."""
    host, guest = Connection(Role.HOST, caps=caps), Connection(Role.GUEST, caps=caps)
    host.start()
    guest.start()
    hellos = b"".join(host.data_to_send()), b"".join(guest.data_to_send())
    host.receive_data(hellos[1])
    guest.receive_data(hellos[0])
    assert host.next_event() is not None
    assert guest.next_event() is not None
    return host, guest, *hellos


def column(path: Path) -> list[str]:
    return [row[0] for row in wireshark.rows(path, "usbredir", "_ws.col.Info")]


async def test_every_type_of_packet_has_its_line(tmp_path: Path) -> None:
    path = tmp_path / "trace.pcapng"
    host, guest, *hellos = ends()
    async with Recording(str(path)) as recording:
        wire = recording.tap("x")
        wire.sent([hellos[0]])
        wire.received(memoryview(hellos[1]))
        for packet, _ in TO_GUEST:
            host.send(packet)
            wire.sent(host.data_to_send())
        for packet, _ in TO_HOST:
            guest.send(packet)
            wire.received(memoryview(b"".join(guest.data_to_send())))
        wire.closed()
    lines = column(path)
    expected = [text for _, text in (*TO_GUEST, *TO_HOST)]
    assert [line for line in lines[2:] if line != "usbredir, part of a packet"] == expected
    assert all(line.startswith("hello 'farplug") for line in lines[:2])
    kinds = {type(packet) for packet, _ in (*TO_GUEST, *TO_HOST)}
    assert kinds == {*p.PACKETS} - {p.Hello}
    assert not wireshark.count(path, "_ws.malformed || _ws.lua.error")
    ids = wireshark.rows(path, "usbredir.type == 101", "usbredir.id", "usbredir.data_length", "usbredir.stream_id")
    assert [[int(value, 0) for value in row] for row in ids] == [[8, 70_000, 9]]


async def test_packets_that_are_cut_anywhere_and_glued(tmp_path: Path) -> None:
    path = tmp_path / "trace.pcapng"
    host, _guest, *hellos = ends()
    for packet, _ in TO_GUEST:
        host.send(packet)
    data = hellos[0] + b"".join(host.data_to_send())
    async with Recording(str(path)) as recording:
        wire = recording.tap("x")
        wire.received(memoryview(hellos[1]))
        for at in range(0, 1000, 77):
            wire.sent([data[at : at + 77]])
        wire.sent([data[at + 77 :]])
        wire.closed()
    types = ",".join(row[0] for row in wireshark.rows(path, "usbredir.type", "usbredir.type")).split(",")
    assert [int(number) for number in types] == [0, 0, *(packet.TYPE for packet, _ in TO_GUEST)]


async def test_ids_of_32_bits_and_an_envelope(tmp_path: Path) -> None:
    path = tmp_path / "trace.pcapng"
    host, _, *hellos = ends(Cap.NONE)
    wide, _, *wide_hellos = ends()
    async with Recording(str(path)) as recording:
        for side, both in ((host, hellos), (wide, wide_hellos)):
            wire = recording.tap("x")
            wire.sent([both[0]])
            wire.received(memoryview(both[1]))
            side.send(p.ConfigurationStatus(id=0x12345678, status=OK, configuration=1))
            size = side.unsent
            buffers = side.data_to_send()
            wire.sent(envelope.enclose(buffers, size) if side is wide else buffers)
    rows = wireshark.rows(path, "usbredir.type == 8", "usbredir.id", "_ws.col.Info")
    assert [row[0].split(",")[-1 if len(row[0]) < 20 else 3] for row in rows] == ["0x0000000012345678"] * 2
    assert [row[1] for row in rows] == ["configuration_status success 1"] * 2


@pytest.mark.parametrize("first", [b"\0" * 100, b"\0\0\0\0\x45\0\0\0" + bytes(80), b"GET / HTTP/1.1\r\n" + bytes(80)])
async def test_another_protocol_is_left_alone(tmp_path: Path, first: bytes) -> None:
    path = tmp_path / "trace.pcapng"
    async with Recording(str(path)) as recording:
        recording.tap("x").sent([first])
    assert column(path) == []


def test_only_arithmetic_that_all_versions_of_lua_have() -> None:
    code = re.sub(r"--.*|\"[^\"]*\"", "", dissector().decode())
    assert not re.findall(r"//|>>|<<|[&|]|bit32|bit\.|\bgoto\b|<const>|unpack|loadstring|setfenv", code)


def test_the_dissector_is_installed_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = install_dissector()
    assert path == plugin_folder() / FILE_NAME
    assert path.read_bytes() == dissector()
    path.write_bytes(dissector() + b"-- an older version")
    install_dissector()
    assert path.read_bytes() == dissector()


def test_wireshark_loads_it_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tshark = wireshark.program("tshark")
    monkeypatch.setenv("HOME", str(tmp_path))
    install_dissector()
    done = subprocess.run([tshark, "-G", "protocols"], capture_output=True, text=True, check=True)
    assert "USB Redirection\tUSBREDIR\tusbredir\n" in done.stdout


def test_another_file_of_this_name_stays(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text("-- my own program")
    with pytest.raises(SetupError) as raised:
        install_dissector(tmp_path)
    assert raised.value.reason is Reason.EXISTS
    assert (tmp_path / FILE_NAME).read_text() == "-- my own program"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError) as raised:
        install_dissector(tmp_path / "file" / "plugins")
    assert raised.value.reason in (Reason.NOT_FOUND, Reason.EXISTS)
