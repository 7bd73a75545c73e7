"""A serial line, a network adapter, a security key and a camera on one port of Linux: they leave in the middle of their
work, are reset again and again, and come back."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.guest.command import farplug
from tests.guest.plugging import (
    FUNCTIONS,
    GUEST_TIMEOUT,
    MIB,
    SPICE,
    TCP,
    Plugged,
    Port,
    until,
    usb_folder_by_name,
    usb_node,
)
from tests.guest.test_camera import CHOSEN, digest, read
from tests.guest.test_network import LEASE, MAC, served
from tests.guest.test_security_key import HASH, SITE, USER_ID, register, write
from tests.guest.test_serial import TTY, echo_in, has
from tests.leaks import Left, children, no_more_than
from tests.long import ATTACH_ROUNDS, LONG, in_full

from farplug.app.settings import Source
from farplug.target import open_session, parse_target
from farplug.testing import QemuGuest
from farplug.virtual import NetworkAdapter, SerialLine, VirtualDevice
from farplug.virtual.events import FunctionRaised
from farplug.virtual.fido import Presence, SecurityKey
from farplug.virtual.fido.key_file import KeyFile
from farplug.virtual.video import Camera
from farplug.virtual.video.pattern import picture

if TYPE_CHECKING:
    from tests.guest.conftest import Guests

RESETS = 10 if LONG else 5
"""Resets of each kind of a storm."""

LOOPS = f"""
cat >/tmp/lease.sh <<'END'
{LEASE}END
chmod +x /tmp/lease.sh
{write("/tmp/new", HASH, SITE, "alice", USER_ID)}
cat >/tmp/loop.sh <<'END'
line() {{
    for tty in /dev/ttyACM*; do
        python3 /scripts/serial_line.py echo $tty 1000000000 >/tmp/line
    done
}}
network() {{
    for one in /sys/class/net/*; do
        grep -q {MAC} $one/address || continue
        ip link set ${{one##*/}} up
        udhcpc -i ${{one##*/}} -n -q -t 20 -T 1 -s /tmp/lease.sh || continue
        read -r address router </tmp/lease
        busybox timeout 20 wget -q -O /dev/null http://$router:$PORT/big
    done
}}
key() {{
    for node in /dev/hidraw*; do
        fido2-cred -M -i /tmp/new $node
    done
}}
camera() {{
    for node in /dev/video*; do
        v4l2-ctl -d $node --stream-mmap --stream-to=/dev/null
    done
}}
while :; do
    $1
    busybox sleep 0.1
done
END
rm -f /tmp/line
for one in line network key camera; do
    setsid sh /tmp/loop.sh $one >/dev/null 2>&1 &
    echo $!
done >/tmp/loops
"""
"""Use the functions in the guest, each again when it has ended. /tmp/loops has the process groups."""

STOPPED = """[ $(for one in $(cat /tmp/loops); do kill -9 -$one 2>&1; done | grep -c 'No such process') = 4 ]"""
INTERFACE = "/sys/class/net/usb0"
FARPLUG = "busybox grep -qsx farplug /sys/bus/usb/devices/*/manufacturer"
BOUND = f"[ -c {TTY} ] && [ -c /dev/hidraw0 ] && [ -c /dev/video0 ] && [ -d {INTERFACE} ]"
UNBOUND = f"! {{ [ -e {TTY} ] || [ -e /dev/hidraw0 ] || [ -e /dev/video0 ] || [ -d {INTERFACE} ] || {FARPLUG}; }}"


@dataclass
class Together:
    """The four functions while they are plugged in, and where they lead.

    Attributes:
        guest: the guest.
        hub: what they are plugged into.
        folder: has the socket of the serial line and the file of the key.
        network: the end of the network adapter.
    """

    guest: QemuGuest
    hub: Plugged
    folder: Path
    network: str = "passt:"

    @property
    def sources(self) -> tuple[Source, ...]:
        return (
            Source.serial(f"unix-listen:{self.folder}/line.sock"),
            Source.network(self.network, mac=MAC),
            Source.fido(self.folder / "keys.json", Presence.ASK),
            Source.camera(),
        )

    async def attach(self) -> None:
        """Plug them in, as one device, and wait until the guest has a driver for each."""
        (attachment,) = await self.hub.attach(self.sources)
        assert isinstance(attachment.device, VirtualDevice)
        line, network, key, camera = attachment.device.functions
        assert isinstance(line, SerialLine)
        assert isinstance(network, NetworkAdapter)
        assert isinstance(key, SecurityKey)
        assert isinstance(camera, Camera)
        self.line, self.adapter, self.key, self.camera = line, network, key, camera
        await until(self.guest, BOUND)

    async def detach(self) -> None:
        """Unplug them, and wait until the guest has taken note."""
        async with asyncio.timeout(GUEST_TIMEOUT):
            await self.hub.detach("all")
        await until(self.guest, UNBOUND)

    async def busy(self, http: int) -> None:
        """Use all of them at once, until each moves data, or asks.

        Args:
            http: the port of a server that has the file ``big``.
        """
        await self.guest.check(f"export PORT={http}\n{LOOPS}")
        await has(self.guest, "cat /tmp/line", "ready")
        reader, writer = await asyncio.open_unix_connection(self.folder / "line.sock")
        data = random.Random(0).randbytes(4096)
        writer.write(data)
        async with asyncio.timeout(GUEST_TIMEOUT):
            assert await reader.readexactly(len(data)) == data
            moved = asyncio.Event()
            self.moving = asyncio.ensure_future(_move(reader, writer, moved))
            while self.camera.frames < 3 or self.key.question is None:
                await asyncio.sleep(0.01)
            await moved.wait()
        await until(self.guest, f"[ $(cat {INTERFACE}/statistics/rx_bytes) -gt 3000000 ]")

    async def moved(self) -> int:
        """Return how many bytes came back over the serial line, when its connection is lost."""
        return await asyncio.wait_for(self.moving, GUEST_TIMEOUT)

    async def stop(self) -> None:
        """Stop the programs of the guest: none waits forever in the kernel."""
        await until(self.guest, STOPPED)

    async def each_works(self, http: int, expected: str) -> None:
        """Use each function once, from the beginning to the end.

        Args:
            http: the port of a server that has the file ``data``.
            expected: the digest of this file.
        """
        await until(self.guest, BOUND)
        data = random.Random(1).randbytes(100_000)
        reader, writer = await asyncio.open_unix_connection(self.folder / "line.sock")
        await echo_in(self.guest, 1_000_000_000)
        writer.write(data)
        back = b""
        async with asyncio.timeout(GUEST_TIMEOUT):
            while not back.endswith(data):  # what the last peer sent may come first
                part = await reader.read(65536)
                assert part
                back += part
        await self.guest.check("kill $(pidof python3)")
        writer.close()
        await self.guest.check(
            f"""
            set -e
            ip link set usb0 up
            udhcpc -i usb0 -n -q -t 20 -T 1 -s /tmp/lease.sh
            read -r address router </tmp/lease
            wget -q -O - http://$router:{http}/data | sha256sum | grep {expected}
            """
        )
        registering = asyncio.ensure_future(self.guest.check("set -e; cd /tmp\n" + register("/dev/hidraw0")))
        async with asyncio.timeout(GUEST_TIMEOUT):
            while self.key.question is None:
                await asyncio.sleep(0.01)
        self.key.answer(True)
        await registering
        mode = CHOSEN[0]
        found = await read(self.guest, "/dev/video0", mode.width, mode.height, mode.encoding, 30)
        assert found == [digest(picture(mode, number)) for number in range(30)]

    async def check_released(self) -> None:
        """Check that the ends are closed: no socket, no passt, no lock."""
        assert not list(self.folder.glob("*.sock"))
        assert children("passt") == 0
        await KeyFile.open(self.folder / "keys.json").close()


async def _move(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, moved: asyncio.Event) -> int:
    """Send data, as much as is taken, until the connection is lost; return the number of bytes that came back.

    ``moved`` is set when the first of them have.
    """

    async def send() -> None:
        data = random.Random(2).randbytes(4096)
        with suppress(ConnectionError):
            while True:
                writer.write(data)
                await writer.drain()

    sending = asyncio.ensure_future(send())
    count = 0
    try:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                count += len(data)
                moved.set()
    finally:
        sending.cancel()
        await asyncio.wait([sending])
        writer.transport.abort()
    return count


@asynccontextmanager
async def together(guest: QemuGuest, port: int, folder: Path, network: str = "passt:") -> AsyncIterator[Together]:
    hub = Plugged(await open_session(parse_target(guest.targets[port])))
    try:
        yield Together(guest, hub, folder, network)
    finally:
        await hub.close()


async def storm(guest: QemuGuest) -> None:
    """Reset the device again and again: as a program does, and as an administrator who forbids and permits it."""
    folder = await usb_folder_by_name(guest, "1d6b:0104 *")
    node = await usb_node(guest, folder)  # stays the same
    pauses = "0 0.05 0.2 0 0.5"
    await guest.check(
        f"""
        for round in $(seq {RESETS // 5}); do
            for pause in {pauses}; do
                usbreset {node[-7:]} >/dev/null
                busybox sleep $pause
            done
            for pause in {pauses}; do
                echo 0 >{folder}/authorized
                busybox sleep $pause
                echo 1 >{folder}/authorized
                busybox sleep $pause
            done
        done""",
        timeout=2 * GUEST_TIMEOUT,
    )


async def forbid(guest: QemuGuest) -> None:
    """Let the guest's drivers leave the device, and come back."""
    folder = await usb_folder_by_name(guest, "1d6b:0104 *")
    await guest.check(f"echo 0 >{folder}/authorized; echo 1 >{folder}/authorized")


async def trouble(guest: QemuGuest) -> str:
    """Return the kernel's complaints."""
    return await guest.check("dmesg | grep -E 'BUG|WARNING|Oops|Call Trace|blocked for more'; :")


def complaints(caplog: pytest.LogCaptureFixture, *hubs: Plugged) -> list[object]:
    """Return what farplug and asyncio have logged, and what functions have raised."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] + [
        report for hub in hubs for report in hub.reports() if isinstance(report, FunctionRaised)
    ]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, str]:
    """Return a folder to serve with files that are long and short, and the digest of the short one."""
    folder = tmp_path / "served"
    folder.mkdir()
    with (folder / "big").open("wb") as file:
        file.truncate(1 << 40)
    data = random.Random(3).randbytes(2 * MIB)
    (folder / "data").write_bytes(data)
    return folder, hashlib.sha256(data).hexdigest()


@asynccontextmanager
async def used(
    guest: QemuGuest, port: int, folder: Path, caplog: pytest.LogCaptureFixture
) -> AsyncIterator[tuple[Together, Left]]:
    """Yield the four functions, not plugged in, and the numbers with an open port; then check for leaks."""
    async with together(guest, port, folder) as one:
        await one.attach()
        await one.detach()
        before = Left.now()  # with an open port
        yield one, before
        await one.check_released()
        await no_more_than(before)
    assert complaints(caplog, one.hub) == []
    assert await trouble(guest) == ""


@pytest.mark.usefixtures("passt")
@pytest.mark.parametrize("port", [TCP, *in_full(SPICE)], ids=str)
async def test_detached_in_the_middle(
    guests: Guests, tmp_path: Path, port: Port, files: tuple[Path, str], caplog: pytest.LogCaptureFixture
) -> None:
    guest = await guests.get(FUNCTIONS)
    with served(files[0]) as http:
        async with used(guest, port, tmp_path, caplog) as (one, before):
            for _ in range(2):
                await one.attach()
                await one.busy(http)
                await one.detach()
                assert await one.moved() > 0
                assert one.key.question is None
                await one.stop()
                await one.check_released()
                await no_more_than(before)
                assert complaints(caplog, one.hub) == []


@pytest.mark.usefixtures("passt")
@pytest.mark.parametrize("port", [SPICE, *in_full(TCP)], ids=str)
async def test_reset_in_the_middle(
    guests: Guests, tmp_path: Path, port: Port, files: tuple[Path, str], caplog: pytest.LogCaptureFixture
) -> None:
    guest = await guests.get(FUNCTIONS)
    with served(files[0]) as http:
        async with used(guest, port, tmp_path, caplog) as (one, _):
            await one.attach()
            await one.busy(http)
            await storm(guest)
            await one.stop()
            one.moving.cancel()
            await asyncio.wait([one.moving])
            await forbid(guest)  # the numbers of the guest's devices begin with 0 again
            await one.each_works(http, files[1])
            await one.detach()


async def test_rounds_of_attach_and_detach_leak_nothing(
    guests: Guests, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rounds of all four; tests/virtual/test_together.py has a hundred in memory."""
    guest = await guests.get(FUNCTIONS)
    async with AsyncExitStack() as stack:
        each = []
        for port, name in ((TCP, "tcp"), (SPICE, "spice")):
            (folder := tmp_path / name).mkdir()
            each.append(
                await stack.enter_async_context(together(guest, port, folder, f"unix-listen:{folder}/net.sock"))
            )
        before = None
        for number in range(ATTACH_ROUNDS):
            one = each[number % 2]
            await one.attach()
            peers = [await asyncio.open_unix_connection(one.folder / f"{name}.sock") for name in ("line", "net")]
            await one.detach()
            for reader, writer in peers:
                assert await reader.read() == b""
                writer.close()
            await one.check_released()
            if number == 1:  # once over each port
                before = Left.now()
        assert before is not None
        await no_more_than(before)
    assert complaints(caplog, *(one.hub for one in each)) == []
    assert await trouble(guest) == ""


async def test_separate_devices_have_a_port_each(guests: Guests, tmp_path: Path) -> None:
    """A VM with two ports takes two devices; a third one, and two in a VM with one port, are refused."""
    guest = await guests.get(FUNCTIONS)
    options = ("--usb-serial", f"unix-listen:{tmp_path}/line.sock", "--usb-camera", "pattern", "--separate")
    async with farplug("connect", guest.targets[SPICE], *options) as running:
        await running.until("configured by the guest")
        await running.until("configured by the guest")
        await until(guest, f"[ -c {TTY} ] && [ -c /dev/video0 ]")
        folders = [f"$(readlink -f /sys/class/{name}/device/..)" for name in ("tty/ttyACM0", "video4linux/video0")]
        products = await guest.check("cat " + " ".join(f"{folder}/product" for folder in folders))
        assert products.splitlines() == ["Virtual Serial Port", "Virtual Camera"]
        running.process.send_signal(signal.SIGINT)
        assert await running.exit_code() == 0
    await until(guest, UNBOUND)
    for target, more, ports in (
        (TCP, (), "2 devices need a port each, but the VM has 1 for them"),
        (SPICE, ("--usb-tablet",), "3 devices need a port each, but the VM has 2 for them"),
    ):
        async with farplug("connect", guest.targets[target], *options, *more) as running:
            code, _, text = await running.end()
            assert code == 7
            assert ports in text
            assert "let them share a port" in text
    assert (await guest.run(FARPLUG)).exit_code != 0
    assert not (tmp_path / "line.sock").exists()
