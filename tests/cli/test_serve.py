"""``farplug serve`` and ``--usb-device usbip://``, run as users run them; the peer is on another event loop."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.cli.support import Cli, FakeGuest, in_thread, interrupt
from tests.transport.fake_spice import free_port
from tests.usbip.client import Client, serving

from farplug.store import MemoryStore
from farplug.usb import Speed
from farplug.virtual import VirtualDevice, disk_device


@contextmanager
def interrupted_when_used(port: int, *, attaches: int) -> Iterator[None]:
    """Attach the device from another thread and leave, again and again; interrupt the server during the last attach."""

    async def use() -> None:
        count = 0
        while count < attaches:
            try:
                client = await Client.connect(port)
            except ConnectionRefusedError:
                await asyncio.sleep(0.02)
                continue
            count += await client.import_() == 0
            if count == attaches:
                interrupt()
            await client.close()

    thread = threading.Thread(target=lambda: asyncio.run(use()))
    thread.start()
    yield
    thread.join()


def test_a_client_comes_and_goes(cli: Cli, image: Path) -> None:
    port = free_port()
    with interrupted_when_used(port, attaches=2):
        result = cli("serve", "--listen", f"127.0.0.1:{port}", "--usb-disk", image)
    assert (result.code, result.err) == (0, "")
    assert f"listening on 127.0.0.1:{port} for USB/IP clients" in result.out
    assert f"usbip --tcp-port {port} attach -r 127.0.0.1 -b 1-1\n" in result.out
    assert len(re.findall(r"1-1: attached by the client 127\.0\.0\.1:\d+\n", result.out)) == 2
    assert re.search(r"1-1: the client 127\.0\.0\.1:\d+ has left\n", result.out)


def test_events_for_programs(cli: Cli, image: Path) -> None:
    port = free_port()
    with interrupted_when_used(port, attaches=1):
        result = cli("serve", "--listen", f"127.0.0.1:{port}", "--usb-disk-ro", image, "--json")
    events = [json.loads(line) for line in result.out.splitlines()]
    assert result.code == 0
    command = next(event["command"] for event in events if event["event"] == "note" and "command" in event)
    assert command.endswith("attach -r 127.0.0.1 -b 1-1")
    assert {"attached", "detached", "closed"} <= {event["event"] for event in events}


def test_others_reach_it(cli: Cli, image: Path) -> None:
    port = free_port()
    with interrupted_when_used(port, attaches=1):
        result = cli("serve", "--listen", f"0.0.0.0:{port}", "--usb-disk", image)
    assert result.code == 0
    assert "warning: USB/IP has no passwords and no encryption: anyone who reaches 0.0.0.0:" in result.out


@pytest.mark.parametrize(
    ("listen", "code", "message"),
    [
        ("127.0.0.1", 2, "'usbip-listen://127.0.0.1' is not a valid target: it has no port"),
        ("127.0.0.1:x", 2, "is not a valid target"),
        ("203.0.113.1:3240", 4, "cannot listen on 203.0.113.1:3240"),
    ],
)
def test_addresses_that_are_refused(cli: Cli, image: Path, listen: str, code: int, message: str) -> None:
    result = cli("serve", "--listen", listen, "--usb-disk", image)
    assert result.code == code
    assert message in result.err


def test_nothing_to_serve(cli: Cli) -> None:
    result = cli("serve")
    assert (result.code, "nothing to plug in" in result.err) == (2, True)


def remote_disk() -> VirtualDevice:
    return disk_device(MemoryStore(1 << 20), speeds=(Speed.HIGH,))


def test_a_device_of_another_machine(cli: Cli) -> None:
    with in_thread(lambda: serving(remote_disk())) as server, in_thread(FakeGuest().listening) as target:
        result = cli("connect", target, "--usb-device", f"usbip://127.0.0.1:{server.port}/1-1")
        assert (result.code, result.err) == (0, "")
        assert "port 0: 1-1 (1d6b:0104 farplug Virtual Disk)" in result.out
        assert "1-1: attached as 1d6b:0104 farplug Virtual Disk at High Speed" in result.out
        assert "1-1: configured by the guest (configuration 1)" in result.out


def test_a_device_of_another_machine_shares_no_port(cli: Cli, image: Path) -> None:
    with in_thread(lambda: serving(remote_disk())) as server, in_thread(FakeGuest().listening) as target:
        result = cli("connect", target, "--usb-device", f"usbip://127.0.0.1:{server.port}/1-1", "--usb-disk", image)
    assert result.code == 7
    assert "2 devices, but the VM has 1 port for them" in result.err


@pytest.mark.parametrize(
    ("device", "options", "code", "message"),
    [
        ("usbip://127.0.0.1", [], 2, "'usbip://127.0.0.1' is not a valid USB/IP device: it has no valid bus id"),
        ("usbip://127.0.0.1:1/1-1", [], 12, "the USB/IP server of 1-1: cannot connect to 127.0.0.1:1"),
        ("usbip://127.0.0.1:1/1-1", ["--wait"], 2, "--wait has no effect without --usb-device"),
    ],
)
def test_devices_of_other_machines_that_are_refused(
    cli: Cli, device: str, options: list[str], code: int, message: str
) -> None:
    result = cli("connect", "tcp://127.0.0.1:1", "--usb-device", device, *options)
    assert result.code == code
    assert message in result.err
