"""A network adapter in Linux: this machine's network through passt, frames over a socket, an interface of its own."""

from __future__ import annotations

import asyncio
import hashlib
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.guest.command import farplug
from tests.guest.plugging import FUNCTIONS, GUEST_TIMEOUT
from tests.guest.test_serial import TTY, echo_in, has
from tests.long import LONG

from farplug.testing import QemuGuest

if TYPE_CHECKING:
    from tests.guest.conftest import Guests


MAC = "02:fa:71:00:00:01"
DOWNLOAD = 100_000_000 if LONG else 20_000_000
"""Bytes."""

LEASE = """#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add $ip/$mask dev $interface
ip route add default via $router
echo "$ip $router" >/tmp/lease
"""
"""What udhcpc runs."""


async def interface_of(guest: QemuGuest) -> str:
    """Return the guest's interface, once it exists; it is up then."""
    script = f"for one in /sys/class/net/*; do grep -q {MAC} $one/address && basename $one; done 2>/dev/null; :"
    async with asyncio.timeout(GUEST_TIMEOUT):
        while not (name := (await guest.check(script)).strip()):
            await asyncio.sleep(0.1)
    await guest.check(f"ip link set {name} up")
    return name


async def without_interface(guest: QemuGuest) -> None:
    """Wait until the guest has no interface with this address."""
    async with asyncio.timeout(GUEST_TIMEOUT):
        while (await guest.run(f"cat /sys/class/net/*/address | grep {MAC}")).exit_code == 0:
            await asyncio.sleep(0.1)


async def carrier(guest: QemuGuest, name: str, on: bool) -> None:
    """Wait until the guest sees a carrier, or none. Linux drops what is sent before the state of the link follows."""
    await has(guest, f"cat /sys/class/net/{name}/carrier", str(int(on)))
    if on:
        await has(guest, f"ip link show dev {name} | grep -q NO-CARRIER || echo running", "running")


@contextmanager
def served(folder: Path) -> Iterator[int]:
    """Serve a folder over HTTP at this machine's loopback address; yield the port."""
    server = subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert server.stdout is not None
        yield int(server.stdout.readline().split("port ")[1].split()[0])
    finally:
        server.kill()
        server.communicate()


@asynccontextmanager
async def leased(guest: QemuGuest, target: str, end: str) -> AsyncIterator[str]:
    """Plug an adapter in, and get an address for it; yield that of the gateway."""
    async with farplug("connect", target, "--usb-network", end, "--network-mac", MAC) as running:
        assert f"passt, {MAC}" in await running.until("port 0")
        name = await interface_of(guest)
        await carrier(guest, name, True)
        await guest.check("cat >/tmp/lease.sh; chmod +x /tmp/lease.sh; rm -f /tmp/lease", stdin=LEASE.encode())
        await guest.check(f"udhcpc -i {name} -n -q -t 20 -T 1 -s /tmp/lease.sh", timeout=GUEST_TIMEOUT)
        yield (await guest.check("cat /tmp/lease")).split()[1]
    await without_interface(guest)


@pytest.mark.usefixtures("passt")
@pytest.mark.parametrize("port", [0, 1], ids=["tcp", "spice"])
async def test_a_lease_and_a_download_through_passt(guests: Guests, port: int, tmp_path: Path) -> None:
    guest = await guests.get(FUNCTIONS)
    data = random.Random(port).randbytes(DOWNLOAD if not port else DOWNLOAD // 10)
    (tmp_path / "data").write_bytes(data)
    with served(tmp_path) as http:
        async with leased(
            guest, guest.targets[port], "passt:"
        ) as gateway:  # with this machine at the gateway's address
            digest = await guest.check(f"wget -q -O - http://{gateway}:{http}/data | sha256sum", timeout=GUEST_TIMEOUT)
            assert digest.split()[0] == hashlib.sha256(data).hexdigest()
        async with leased(guest, guest.targets[port], "passt") as gateway:
            refused = await guest.run(f"busybox timeout 5 wget -q -O /tmp/data http://{gateway}:{http}/data")
            assert refused.exit_code in (1, 143), "services of this machine's loopback address can be reached"


async def test_a_carrier_follows_the_peer_and_all_share_a_port(guests: Guests, tmp_path: Path) -> None:
    """A keyboard, a serial line and a network adapter in one device; the two ends are UNIX sockets."""
    guest = await guests.get(FUNCTIONS)
    options = ["--usb-keyboard", "--usb-serial", f"unix-listen:{tmp_path}/serial"]
    options += ["--usb-network", f"unix-listen:{tmp_path}/net", "--network-mac", MAC]
    async with farplug("connect", guest.targets[0], *options) as running:
        await running.until("configured by the guest")
        name = await interface_of(guest)
        await has(guest, "ls -d /sys/bus/hid/devices/*:1D6B:0104.*", "1D6B:0104")
        reader, writer = await asyncio.open_unix_connection(tmp_path / "serial")
        await echo_in(guest, 5)
        writer.write(b"hello")
        async with asyncio.timeout(GUEST_TIMEOUT):
            assert await reader.readexactly(5) == b"hello"
        writer.close()
        await carrier(guest, name, False)
        for _ in range(2):
            reader, writer = await asyncio.open_unix_connection(tmp_path / "net")
            await carrier(guest, name, True)
            await guest.check(f"arping -q -c 1 -w 1 -I {name} 10.9.8.7; :")
            async with asyncio.timeout(GUEST_TIMEOUT):
                while True:
                    frame = await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))
                    if frame[12:14] == b"\x08\x06" and frame[38:42] == bytes((10, 9, 8, 7)):
                        break
            assert frame[6:12] == bytes.fromhex(MAC.replace(":", ""))
            writer.close()
            await carrier(guest, name, False)
    await without_interface(guest)
    assert (await guest.run(f"test -e {TTY}")).exit_code != 0


IN_OWN_NETWORK = (
    "unshare",
    "--net",
    "sh",
    "-ec",
    'ip tuntap add dev tap7 mode tap; ip addr add 10.209.8.1/24 dev tap7; ip link set dev tap7 up; exec "$@"',
    "sh",
)
"""Runs a program in a network of its own with a TAP interface: browsers stop loading when the machine gets one."""


async def test_an_interface_of_this_machine(guests: Guests) -> None:
    made = subprocess.run([*IN_OWN_NETWORK, "true"], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no TAP interface can be made: {made.stderr.strip()}")
    guest = await guests.get(FUNCTIONS)
    options = ("--usb-network", "tap:tap7", "--network-mac", MAC)
    async with farplug("connect", guest.targets[3], *options, by=IN_OWN_NETWORK) as running:
        await running.until("configured by the guest")
        name = await interface_of(guest)
        await carrier(guest, name, True)
        await guest.check(f"ip addr add 10.209.8.2/24 dev {name}")
        for size in (0, 56, 1472):
            await guest.check(f"ping -c 3 -s {size} 10.209.8.1", timeout=GUEST_TIMEOUT)
    await without_interface(guest)
