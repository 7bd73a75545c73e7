"""Measure farplug's network adapter beside QEMU's own usb-net, in one guest, in one run.

Both are on the same USB controller, and lead to this machine's loopback address: farplug's through passt, QEMU's
through its user network. A download over HTTP alternates between both. The first round is a warm-up and is dropped; a
ratio is the median of the other rounds, because a single time depends too much on the machine.

``--against SRC`` adds the adapter of another source tree of farplug (the ``src`` of a worktree), to measure a change.
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
from dataclasses import dataclass, field
from pathlib import Path

from contenders import environment_of
from farplug.vm.qemu import QemuGuest
from farplug.vm.qemu_config import GuestConfig, TcpPort, UnixPort
from rows import Row, add_rows_option, write_rows

QEMU_MAC = "52:54:00:12:34:57"
TIMEOUT = 300
SCRIPT = """#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add $ip/$mask dev $interface
ip route add default via $router
echo $router >/tmp/router
"""
"""What udhcpc runs."""


@dataclass(slots=True)
class Adapter:
    """An adapter of the guest, and what was measured.

    Attributes:
        name: for the output.
        mac: its address.
        pid: process id of the farplug that emulates it; None: QEMU does.
        seconds: of each download.
        processor: seconds of processor time of farplug, in each download.
    """

    name: str
    mac: str
    pid: int | None = None
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def processor_time(self) -> float:
        """Return the processor time of all threads of farplug, in seconds."""
        if self.pid is None:
            return 0.0
        tasks = Path(f"/proc/{self.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


async def interface(guest: QemuGuest, mac: str) -> str:
    """Return the guest's interface with an address, once it exists."""
    script = f"for one in /sys/class/net/*; do grep -qi {mac} $one/address && basename $one; done 2>/dev/null; :"
    while not (name := (await guest.check(script)).strip()):
        await asyncio.sleep(0.1)
    return name


async def download(guest: QemuGuest, adapter: Adapter, port: int, size: int) -> None:
    """Measure a download through an adapter."""
    name = await interface(guest, adapter.mac)
    await guest.check(f"ip link set {name} up; udhcpc -i {name} -n -q -t 20 -T 1 -s /tmp/lease.sh", timeout=TIMEOUT)
    try:
        router = (await guest.check("cat /tmp/router")).strip()
        command = f"wget -q -O - http://{router}:{port}/data | wc -c"
        processor, begin = adapter.processor_time(), time.perf_counter()
        received = int(await guest.check(command, timeout=TIMEOUT))
        adapter.seconds.append(time.perf_counter() - begin)
        adapter.processor.append(adapter.processor_time() - processor)
        if received != size:
            raise SystemExit(f"{received} of {size} bytes arrived")
    finally:
        await guest.check(f"ip addr flush dev {name}; ip link set {name} down")


@contextlib.asynccontextmanager
async def plugged(target: str, name: str, mac: str, source: Path | None) -> AsyncIterator[Adapter]:
    """Plug farplug's adapter in, in a process of its own."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "from farplug.cli.main import main; main()", "connect", target),
        *("--usb-network", "passt:", "--network-mac", mac),
        stdout=asyncio.subprocess.DEVNULL,
        env=environment_of(source),
    )
    try:
        yield Adapter(name, mac, process.pid)
    finally:
        process.terminate()
        await process.wait()


async def measure(options: argparse.Namespace, port: int) -> Row:
    """Measure all adapters, print the results, and return that of this tree."""
    type_of_port = TcpPort if options.transport == "tcp" else UnixPort
    sources: list[tuple[str, Path | None]] = [("farplug", None)]
    if options.against:
        sources.append((f"farplug of {options.against}", options.against))
    config = GuestConfig(
        ports=tuple(type_of_port() for _ in sources),
        modules=("cdc_ncm", "cdc_ether", "rndis_host"),
        memory=512,
        extra_arguments=(
            *("-netdev", "user,id=user"),
            *("-device", f"usb-net,netdev=user,mac={QEMU_MAC},bus=usb.0"),
        ),
    )
    adapters = [Adapter("usb-net", QEMU_MAC)]
    async with QemuGuest(config) as guest, contextlib.AsyncExitStack() as stack:
        await guest.booted(TIMEOUT)
        await guest.check("cat >/tmp/lease.sh; chmod +x /tmp/lease.sh; ip link set lo up", stdin=SCRIPT.encode())
        for number, (target, (name, source)) in enumerate(zip(guest.targets, sources, strict=True), 1):
            running = plugged(target, name, f"02:fa:71:00:00:{number:02x}", source)
            adapters.append(await stack.enter_async_context(running))
        for turn in range(options.pairs + 1):
            for adapter in adapters:
                await download(guest, adapter, port, options.size)
            rates = (f"{one.name} {options.size / one.seconds[-1] / 1e6:.1f} MB/s" for one in adapters)
            print(f"{turn or 'warm-up'}: {', '.join(rates)}")
    theirs, *ours = adapters
    their_rate = options.size / statistics.median(theirs.seconds[1:]) / 1e6
    results = []
    for adapter in ours:
        ratio = statistics.median(a / b for a, b in zip(theirs.seconds[1:], adapter.seconds[1:], strict=True))
        rate = options.size / statistics.median(adapter.seconds[1:]) / 1e6
        results.append((ratio, rate))
        processor = statistics.median(adapter.processor[1:]) / options.size * 1e9
        print(
            f"{adapter.name}: median of {options.pairs} rounds over {options.transport}: {ratio:.2f} times usb-net, "
            f"{rate:.1f} MB/s, {processor:.1f} s of processor time for 1 GB"
        )
    if options.against:
        change = statistics.median(b / a for a, b in zip(ours[0].seconds[1:], ours[1].seconds[1:], strict=True))
        print(f"farplug: {change:.2f} times {ours[1].name}")
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}, Linux {platform.release()}")
    ratio, rate = results[0]
    part = f"a network adapter over {options.transport}; beside QEMU's usb-net"
    return Row(part, "download", f"{rate:.1f} MB/s", f"{their_rate:.1f} MB/s", ratio, chart=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=20_000_000, help="bytes of a download")
    parser.add_argument("--pairs", type=int, default=5, help="rounds after the warm-up")
    parser.add_argument("--transport", choices=("tcp", "unix"), default="unix")
    parser.add_argument("--against", type=Path, metavar="SRC", help="another source tree of farplug")
    add_rows_option(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "data").write_bytes(os.urandom(options.size))
        server = subprocess.Popen(
            [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline().split("port ")[1].split()[0])
            write_rows(options.rows, [asyncio.run(measure(options, port))])
        finally:
            server.kill()
            server.communicate()


if __name__ == "__main__":
    main()
