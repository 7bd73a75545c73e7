"""Measure farplug's network adapter beside QEMU's own usb-net, in one guest, in one run.

Both are on the same USB controller, and lead to this machine's loopback address: farplug's through passt, QEMU's
through its user network. A download over HTTP alternates between both. The first pair is a warm-up and is dropped; the
ratio is the median of the other pairs, because a single time depends too much on the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

from farplug.app.guest import Guest
from farplug.app.settings import Source
from farplug.target import open_session, parse_target
from farplug.vm.qemu import QemuGuest
from farplug.vm.qemu_config import GuestConfig, TcpPort, UnixPort
from rows import Row, add_rows_option, write_rows

MAC = "02:fa:71:00:00:01"
QEMU_MAC = "52:54:00:12:34:57"
TIMEOUT = 300
SCRIPT = """#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add $ip/$mask dev $interface
ip route add default via $router
echo $router >/tmp/router
"""
"""What udhcpc runs."""


async def interface(guest: QemuGuest, mac: str) -> str:
    """Return the guest's interface with an address, once it exists."""
    script = f"for one in /sys/class/net/*; do grep -qi {mac} $one/address && basename $one; done 2>/dev/null; :"
    while not (name := (await guest.check(script)).strip()):
        await asyncio.sleep(0.1)
    return name


async def download(guest: QemuGuest, mac: str, port: int, size: int) -> float:
    """Return the seconds of a download through the interface with an address."""
    name = await interface(guest, mac)
    await guest.check(f"ip link set {name} up; udhcpc -i {name} -n -q -t 20 -T 1 -s /tmp/lease.sh", timeout=TIMEOUT)
    try:
        router = (await guest.check("cat /tmp/router")).strip()
        command = f"wget -q -O - http://{router}:{port}/data | wc -c"
        begin = time.perf_counter()
        received = int(await guest.check(command, timeout=TIMEOUT))
        seconds = time.perf_counter() - begin
        if received != size:
            raise SystemExit(f"{received} of {size} bytes arrived")
        return seconds
    finally:
        await guest.check(f"ip addr flush dev {name}; ip link set {name} down")


@contextlib.asynccontextmanager
async def plugged(target: str) -> AsyncIterator[None]:
    """Plug farplug's adapter in."""
    async with Guest(session=await open_session(parse_target(target))) as guest:
        attachment = await guest.plug(Source.network("passt:", mac=MAC))
        await attachment.configured()
        yield


async def measure(port: int, size: int, pairs: int, transport: str) -> Row:
    config = GuestConfig(
        ports=(TcpPort() if transport == "tcp" else UnixPort(),),
        modules=("cdc_ncm", "cdc_ether", "rndis_host"),
        memory=512,
        extra_arguments=(
            *("-netdev", "user,id=user"),
            *("-device", f"usb-net,netdev=user,mac={QEMU_MAC},bus=usb.0"),
        ),
    )
    ratios, rates, their_rates = [], [], []
    async with QemuGuest(config) as guest:
        await guest.booted(TIMEOUT)
        await guest.check("cat >/tmp/lease.sh; chmod +x /tmp/lease.sh; ip link set lo up", stdin=SCRIPT.encode())
        async with plugged(guest.targets[0]):
            for pair in range(pairs + 1):
                theirs = await download(guest, QEMU_MAC, port, size)
                ours = await download(guest, MAC, port, size)
                print(
                    f"{pair or 'warm-up'}: usb-net {size / theirs / 1e6:.1f} MB/s, farplug {size / ours / 1e6:.1f} MB/s"
                )
                if pair:
                    ratios.append(theirs / ours)
                    rates.append(size / ours / 1e6)
                    their_rates.append(size / theirs / 1e6)
    print(
        f"median of {pairs} pairs over {transport}: {statistics.median(ratios):.2f} times usb-net, "
        f"{statistics.median(rates):.1f} MB/s; "
        f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}, Linux {platform.release()}"
    )
    our_speed, their_speed = (f"{statistics.median(values):.1f} MB/s" for values in (rates, their_rates))
    part = f"a network adapter over {transport}; beside QEMU's usb-net"
    return Row(part, "download", our_speed, their_speed, statistics.median(ratios), chart=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the network adapter beside QEMU's usb-net.")
    parser.add_argument("--size", type=int, default=20_000_000, help="bytes of a download")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of downloads after the warm-up")
    parser.add_argument("--transport", choices=("tcp", "unix"), default="unix")
    add_rows_option(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "data").write_bytes(os.urandom(arguments.size))
        server = subprocess.Popen(
            [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline().split("port ")[1].split()[0])
            row = asyncio.run(measure(port, arguments.size, arguments.pairs, arguments.transport))
            write_rows(arguments.rows, [row])
        finally:
            server.kill()
            server.communicate()


if __name__ == "__main__":
    main()
