"""Measure farplug's disk through the SPICE proxy kerbside and direct, in one guest, in one run.

Four ways to the same SPICE server take turns: plain, with TLS, through the proxy (clients use TLS) with a plain
connection behind it, and with TLS behind it. So the cost of TLS in farplug and QEMU (TLS to plain) and that of the
relay (proxy to TLS) are separate. The first round is a warm-up and is dropped; a ratio is the median of the ratios of
the other rounds.

The proxy is the one of ``.venv-kerbside`` (``scripts/setup``), with the control plane of the tests.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import re
import statistics
import struct
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.guest.kerbside import PROXY, Kerbside

from contenders import Plugged, farplug
from disk import QUIET_LOAD, SIZE, machine
from farplug.errors import FarplugError
from farplug.spice.link import LinkReply
from farplug.spice.types import LinkError
from farplug.vm.qemu import QemuGuest
from farplug.vm.qemu_config import LOOPBACK, GuestConfig, Spice, SpiceAddress, SpicePort, SpiceTransport
from jobs import JOBS, Job, measure, prepare
from rows import Row, add_rows_option, write_rows

NAMES = ("sequential read 1 MiB", "4 KiB read", "4 KiB random read, depth 16", "sequential write 1 MiB")
WAYS = ("plain", "TLS", "proxy, plain", "proxy, TLS")
RATIOS = (("TLS", "plain"), ("proxy, plain", "TLS"), ("proxy, TLS", "TLS"), ("proxy, plain", "plain"))
"""Of which way to which: TLS, the relay, the relay with TLS behind it, all that the proxy costs."""


class Figures:
    """Bytes per second, and processor time in seconds per GiB, by job and way; one value for each round."""

    def __init__(self) -> None:
        self.speeds: dict[tuple[str, str], list[float]] = {}
        self.farplug_cpu: dict[tuple[str, str], list[float]] = {}
        self.proxy_cpu: dict[tuple[str, str], list[float]] = {}

    async def take(self, guest: QemuGuest, job: Job, way: str, ours: Plugged, proxy: Plugged) -> None:
        """Measure a job once."""
        before = ours.cpu_seconds(), proxy.cpu_seconds()
        speed, size = await measure(guest, job, ours.disk)
        self.speeds.setdefault((job.name, way), []).append(speed)
        for figures, program, start in zip((self.farplug_cpu, self.proxy_cpu), (ours, proxy), before, strict=True):
            figures.setdefault((job.name, way), []).append((program.cpu_seconds() - start) / size * 2**30)

    def ratio(self, job: str, way: str, other: str) -> str:
        """Return the median of a ratio, with the smallest and the largest one."""
        pairs = zip(self.speeds[job, way][1:], self.speeds[job, other][1:], strict=True)
        values = [ours / theirs for ours, theirs in pairs]
        return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


@asynccontextmanager
async def requires_tls() -> AsyncIterator[int]:
    """Run a plain SPICE port that requires TLS, which kerbside asks before it uses the TLS port; return the port."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        size = struct.unpack("<4sIII", await reader.readexactly(16))[3]
        await reader.readexactly(size)
        writer.write(bytes(LinkReply(LinkError.NEED_SECURED)))
        writer.close()

    async with await asyncio.start_server(refuse, LOOPBACK, 0) as server:
        yield server.sockets[0].getsockname()[1]


async def run(jobs: list[Job], rounds: int) -> Figures:
    """Measure all jobs on all ways."""
    figures = Figures()
    config = GuestConfig(
        ports=(SpicePort(),),
        spice=Spice(transport=SpiceTransport.TLS_OPTIONAL, ticket="ticket"),
        programs=("fio",),
        memory=768,
    )
    with tempfile.TemporaryDirectory(prefix="farplug-bench-") as folder:
        image = Path(folder, "image")
        image.write_bytes(os.urandom(SIZE))
        async with QemuGuest(config) as guest, Kerbside() as kerbside, requires_tls() as refusing:
            await guest.booted()
            await prepare(guest)
            plain = dataclasses.replace(guest.spice, tls_port=None, ca_file=None)
            targets = {
                "plain": plain,
                "TLS": dataclasses.replace(guest.spice, port=None),
                "proxy, plain": plain,
                "proxy, TLS": dataclasses.replace(guest.spice, port=refusing),
            }
            for number in range(rounds + 1):
                for way, address in targets.items():
                    vv = await _console(kerbside, Path(folder, "direct.vv"), way, address)
                    proxy = Plugged("", kerbside.proxy_pid if way.startswith("proxy") else None)
                    async with farplug(way, str(vv), "--usb-disk", image).plug(guest) as ours:
                        for job in jobs:
                            await figures.take(guest, job, way, ours, proxy)
                print(f"  round {number} of {rounds}", file=sys.stderr, flush=True)
    return figures


async def _console(kerbside: Kerbside, direct: Path, way: str, address: SpiceAddress) -> Path:
    """Return the ``.vv`` file of a way."""
    if way.startswith("proxy"):
        return await kerbside.allow(address)
    direct.write_text(address.vv)
    return direct


def table(figures: Figures, jobs: list[Job]) -> str:
    """Return all results as text."""
    lines = [f"  {'':<32}" + "".join(f"{way:>16}" for way in WAYS)]
    for job in jobs:
        values = (statistics.median(figures.speeds[job.name, way][1:]) for way in WAYS)
        lines.append(f"  {job.name:<32}" + "".join(f"{job.show(value):>16}" for value in values))
    lines.append(f"  {'':<32}" + "".join(f"{way + ' / ' + other:>26}" for way, other in RATIOS))
    for job in jobs:
        values_of = (figures.ratio(job.name, way, other) for way, other in RATIOS)
        lines.append(f"  {job.name:<32}" + "".join(f"{value:>26}" for value in values_of))
    for program, cpu in (("farplug", figures.farplug_cpu), ("the proxy", figures.proxy_cpu)):
        lines.append(f"  processor time of {program}, s/GiB")
        for job in jobs:
            values = (statistics.median(cpu[job.name, way][1:]) for way in WAYS)
            lines.append(
                f"  {job.name:<32}" + "".join(f"{value:>16.2f}" if value else f"{'-':>16}" for value in values)
            )
    return "\n".join(lines)


def table_rows(figures: Figures, jobs: list[Job]) -> list[Row]:
    """Return the rows of make bench's table: what TLS costs, and the proxy."""
    lines = []
    for way, other, part in (
        ("TLS", "plain", "a disk over SPICE with TLS; beside SPICE without it"),
        ("proxy, TLS", "TLS", "a disk through kerbside; beside the same server direct"),
    ):
        for job in jobs:
            speeds, others = (figures.speeds[job.name, one][1:] for one in (way, other))
            ours, theirs = (job.show(statistics.median(values)) for values in (speeds, others))
            ratio = statistics.median(one / two for one, two in zip(speeds, others, strict=True))
            lines.append(Row(part, job.name, ours, theirs, ratio))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", metavar="REGEX", help="measure the jobs whose names match")
    parser.add_argument("--rounds", type=int, default=3, help="rounds after the warm-up (default: 3)")
    add_rows_option(parser)
    options = parser.parse_args()
    if not PROXY.exists():
        sys.exit("bench: kerbside is not installed in .venv-kerbside: scripts/setup dev")
    jobs = [job for job in JOBS if job.name in NAMES and (not options.job or re.search(options.job, job.name))]
    load = os.getloadavg()[0]
    print(machine(), flush=True)
    if load > QUIET_LOAD:
        print(f"The machine is busy (load {load:.1f}): the ways that need more processes are slower than usual.")
    try:
        figures = asyncio.run(run(jobs, options.rounds))
    except FarplugError as error:
        sys.exit(f"bench: {error}")
    print(table(figures, jobs))
    write_rows(options.rows, table_rows(figures, jobs))
    print(f"\nload {load:.1f} before and {os.getloadavg()[0]:.1f} after")


if __name__ == "__main__":
    main()
