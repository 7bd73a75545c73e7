"""Measure farplug's disk and its peers, in one guest, in one run.

Three parts: ``qemu`` (QEMU's own usb-storage and usb-uas on the same controller), ``cd`` (the emulated CD of spice-gtk,
the C client, over the same SPICE channel), ``line`` (farplug and spice-gtk on a line with a round trip of 20 ms). All
disks have the same random content. Measurements alternate: peer, farplug, peer, farplug. The first pair is a warm-up
and is dropped, and the ratio is the median of the other pairs, because a single time depends too much on the machine.

``--against SRC`` measures a change of farplug: instead of the three parts, the peer is another source tree of farplug
(the ``src`` of a worktree), plugged into the same guest over the same transport.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path

from contenders import Contender, Plugged, farplug, qemu_disk, spice_cd
from farplug import __version__
from farplug.errors import FarplugError
from farplug.programs import QEMU, output_of
from farplug.vm.qemu import QemuGuest
from farplug.vm.qemu_config import GuestConfig, SpicePort, TcpPort, UnixPort, UsbDisk
from jobs import JOBS, LINE_BUFFERED_GOAL, LINE_JOBS, MIB, Job, measure, prepare
from relay import Relay
from rows import Row, add_rows_option, write_rows

SIZE = 256 * MIB
VOLUME_DESCRIPTOR = 16 * 2048
"""Offset of the primary volume descriptor of a CD image (ECMA-119, chapter 8.4)."""
DELAY = 0.010
"""Delay of the line, in seconds each way."""
QUIET_LOAD = 0.5
"""Maximum load average of an idle machine."""
PARTS = ("qemu", "cd", "line")
TRANSPORTS = ("spice", "tcp", "unix")
SPEEDS = ("super", "high")
STORAGES = ("auto", "bot", "uas")
CD_OPTIONS = ("usb-disk-ro", "usb-cdrom")


@dataclass(frozen=True, slots=True)
class Setup:
    """How farplug's disk is plugged in.

    Attributes:
        transport: one of TRANSPORTS.
        speed: one of SPEEDS.
        storage: one of STORAGES.
    """

    transport: str
    speed: str
    storage: str = "auto"

    def __str__(self) -> str:
        words = [self.transport, self.speed, *([] if self.storage == "auto" else [self.storage])]
        return " ".join(words)

    @property
    def options(self) -> tuple[str, ...]:
        """Return the options of ``farplug connect``."""
        storage = () if self.storage == "auto" else ("--usb-storage", self.storage)
        return ("--usb-speed", self.speed, *storage)


MAIN_SETUP = Setup("spice", "super")
"""The setup for the comparison with the other SPICE client."""
UNIX_SETUP = Setup("unix", "super")
SETUPS = (
    MAIN_SETUP,
    Setup("spice", "super", "bot"),
    Setup("tcp", "super"),
    UNIX_SETUP,
    Setup("spice", "high"),
)


@dataclass(slots=True)
class Figure:
    """The results of one job for farplug and a peer.

    Attributes:
        part: the part of the benchmark.
        peer: name of the peer.
        column: how farplug's disk was plugged in.
        job: name of the job.
        goal: the goal for the ratio; None: no goal.
        theirs: bytes per second of the peer, by round.
        ours: bytes per second of farplug, by round.
        their_cpu: processor time of the peer's process, in seconds per GiB; 0: the peer is QEMU.
        our_cpu: processor time of farplug, in seconds per GiB.
    """

    part: str
    peer: str
    column: str
    job: str
    goal: float | None = None
    theirs: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)
    their_cpu: list[float] = field(default_factory=list)
    our_cpu: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return statistics.median(ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=True))

    def drop_first(self) -> None:
        for values in (self.theirs, self.ours, self.their_cpu, self.our_cpu):
            del values[0]


async def take(guest: QemuGuest, job: Job, plugged: Plugged, speeds: list[float], cpu: list[float]) -> None:
    """Measure one disk once, and append the results."""
    before = plugged.cpu_seconds()
    speed, size = await measure(guest, job, plugged.disk)
    speeds.append(speed)
    cpu.append((plugged.cpu_seconds() - before) / size * 2**30)


async def compare(guest: QemuGuest, figure: Figure, job: Job, theirs: Plugged, ours: Plugged, rounds: int) -> Figure:
    """Measure two disks that are both plugged in, alternately."""
    for _ in range(rounds + 1):
        await take(guest, job, theirs, figure.theirs, figure.their_cpu)
        await take(guest, job, ours, figure.ours, figure.our_cpu)
    figure.drop_first()
    report(figure)
    return figure


def report(figure: Figure) -> None:
    """Print a result, to show progress."""
    print(f"  {figure.column} : {figure.peer}, {figure.job}: {figure.ratio:.2f}", file=sys.stderr, flush=True)


class Bench:
    """One run.

    Args:
        options: the options of the command line.

    Attributes:
        figures: the results.
        memory: peak memory in bytes, by program.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.jobs: Sequence[Job] = [job for job in JOBS if not options.job or re.search(options.job, job.name)]
        self.figures: list[Figure] = []
        self.memory: dict[str, float] = {}
        self._targets: dict[str, str] = {}
        self._images: list[Path] = []

    async def run(self) -> None:
        """Measure the selected parts."""
        against = self.options.against
        with tempfile.TemporaryDirectory(prefix="farplug-bench-") as folder:
            self._images = [Path(folder, name) for name in ("ours", "usb-storage", "usb-uas")]
            noise = bytearray(os.urandom(SIZE))
            noise[VOLUME_DESCRIPTOR : VOLUME_DESCRIPTOR + 7] = b"\1CD001\1"
            for image in self._images:
                image.write_bytes(noise)
            _, storage, uas = self._images
            config = GuestConfig(
                ports=(SpicePort(), TcpPort(), UnixPort()),
                disks=() if against else (UsbDisk(image=storage),),
                programs=("fio",),
                memory=768,
                extra_arguments=() if against else usb_uas(uas),
            )
            async with QemuGuest(config) as guest:
                await guest.booted()
                await prepare(guest)
                self._targets = dict(zip(TRANSPORTS, guest.targets, strict=True))
                if against:
                    await self._beside_other_sources(guest)
                else:
                    for part in self.options.part or PARTS:
                        await {"qemu": self._beside_qemu, "cd": self._beside_cd, "line": self._on_a_line}[part](guest)

    # --- the parts ----------------------------------------------------------------------------------------------------

    async def _beside_qemu(self, guest: QemuGuest) -> None:
        storage, uas = await qemu_disk(guest, "QEMU HARDDISK"), await qemu_disk(guest, "QEMU UAS")
        for job in self.jobs:
            figure = Figure("qemu", "QEMU usb-storage", "QEMU usb-uas", job.name)
            self.figures.append(await compare(guest, figure, job, storage, uas, self.options.rounds))
        for setup in self._setups():
            disk = farplug(str(setup), self._targets[setup.transport], *setup.options, "--usb-disk", self._images[0])
            async with disk.plug(guest) as ours:
                for job in self.jobs:
                    goal = {MAIN_SETUP: job.goal, UNIX_SETUP: job.unix_goal}.get(setup)
                    figure = Figure("qemu", "QEMU usb-storage", disk.name, job.name, goal)
                    self.figures.append(await compare(guest, figure, job, storage, ours, self.options.rounds))
                self._remember(disk.name, ours)

    async def _beside_cd(self, guest: QemuGuest) -> None:
        jobs = [job for job in self.jobs if job.cd_goal is not None]
        await self._beside_spice_gtk(guest, "cd", jobs, self._targets["spice"], self.options.rounds)

    async def _on_a_line(self, guest: QemuGuest) -> None:
        jobs = [job for job in LINE_JOBS if not self.options.job or re.search(self.options.job, job.name)]
        assert guest.spice.port is not None
        async with Relay(guest.spice.host, guest.spice.port, DELAY) as relay:
            target = f"spice://{guest.spice.host}:{relay.listen}"
            await self._beside_spice_gtk(guest, "line", jobs, target, 2)

    async def _beside_spice_gtk(
        self, guest: QemuGuest, part: str, jobs: Sequence[Job], target: str, rounds: int
    ) -> None:
        image = self._images[0]
        disk = farplug(str(MAIN_SETUP), target, *MAIN_SETUP.options, f"--{self.options.cd_as}", image)
        peer = spice_cd(target, image)
        figures = {job: Figure(part, peer.name, disk.name, job.name, job.cd_goal) for job in jobs}
        await self._alternate(guest, figures, peer, disk, rounds)

    async def _beside_other_sources(self, guest: QemuGuest) -> None:
        source = self.options.against
        for setup in self._setups():
            target = self._targets[setup.transport]
            options: tuple[str | Path, ...] = (*setup.options, "--usb-disk", self._images[0])
            disk = farplug(str(setup), target, *options)
            other = farplug(f"{setup}, other", target, *options, source=source)
            figures = {job: Figure("against", f"farplug of {source}", disk.name, job.name) for job in self.jobs}
            await self._alternate(guest, figures, other, disk, self.options.rounds)

    async def _alternate(
        self, guest: QemuGuest, figures: dict[Job, Figure], peer: Contender, disk: Contender, rounds: int
    ) -> None:
        """Run all jobs with the peer, then with farplug, and so on: a SPICE server serves one client at a time."""
        for _ in range(rounds + 1):
            async with peer.plug(guest) as theirs:
                for job, figure in figures.items():
                    await take(guest, job, theirs, figure.theirs, figure.their_cpu)
                self._remember(peer.name, theirs)
            async with disk.plug(guest) as ours:
                for job, figure in figures.items():
                    await take(guest, job, ours, figure.ours, figure.our_cpu)
                self._remember(disk.name, ours)
        for figure in figures.values():
            figure.drop_first()
            report(figure)
        self.figures += figures.values()

    # --- helpers ------------------------------------------------------------------------------------------------------

    def _setups(self) -> list[Setup]:
        """Return the selected setups, or the default ones."""
        options = self.options
        if not (options.transport or options.speed or options.storage):
            return [*SETUPS]
        chosen = product(options.transport or ["spice"], options.speed or ["super"], options.storage or ["auto"])
        return [Setup(*words) for words in chosen]

    def _remember(self, name: str, plugged: Plugged) -> None:
        self.memory[name] = max(self.memory.get(name, 0.0), plugged.peak_memory())


def usb_uas(image: Path) -> tuple[str, ...]:
    """Return QEMU's arguments for a usb-uas device with one disk whose model is "UAS"."""
    drive = f"if=none,id=uas-drive,format=raw,cache=writeback,file={str(image).replace(',', ',,')}"
    disk = "scsi-hd,bus=uas.0,drive=uas-drive,vendor=QEMU,product=QEMU UAS"
    return ("-drive", drive, "-device", "usb-uas,id=uas,bus=usb.0", "-device", disk)


# --- the tables -------------------------------------------------------------------------------------------------------


def machine(python: str = platform.python_version()) -> str:
    """Return a description of the machine.

    Args:
        python: the version of the Python that is measured.
    """
    processor = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    qemu = re.search(r"version (\S+)", output_of(QEMU, "--version") or "")
    return (
        f"{processor[1] if processor else platform.machine()}, {os.cpu_count()} cores; "
        f"Linux {platform.release()}; QEMU {qemu[1] if qemu else '?'} (tcg); "
        f"Python {python}; farplug {__version__}{commit()}"
    )


def commit() -> str:
    """Return the commit of this tree, if this is a git repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return f" ({result.stdout.strip()})" if result.returncode == 0 else ""


def against_goal(value: float, goal: float | None) -> str:
    if goal is None:
        return ""
    return f"{goal:6.2f}  {'met' if value >= goal else 'MISSED'}"


def tables(bench: Bench) -> str:
    """Return all results as text."""
    lines: list[str] = []
    jobs = {job.name: job for job in (*JOBS, *LINE_JOBS)}
    for part, title in (
        ("qemu", "Ratios to QEMU's own usb-storage (Bulk-Only Transport, in QEMU itself)"),
        ("against", f"Ratios to farplug of {bench.options.against}"),
    ):
        figures = [figure for figure in bench.figures if figure.part == part]
        if figures:
            lines += ["", f"{title}, median of {bench.options.rounds} pairs", *ratios(figures, jobs)]
    for part, title in (
        ("cd", "Compared with spice-gtk's emulated CD (C), over SPICE"),
        ("line", f"The same on a line with a round trip of {2000 * DELAY:.0f} ms"),
    ):
        figures = [figure for figure in bench.figures if figure.part == part]
        if figures:
            lines += ["", f"{title}, median of {len(figures[0].ours)} pairs", *pairs(figures, jobs)]
    if bench.memory:
        lines += ["", "Peak memory, MiB"]
        lines += [f"  {name:<30}{size / MIB:>10.0f}" for name, size in bench.memory.items()]
    return "\n".join(lines[1:])


def ratios(figures: Sequence[Figure], jobs: dict[str, Job]) -> list[str]:
    """Return a table with a line for each job, and a column for each setup."""
    columns = list(dict.fromkeys(figure.column for figure in figures))
    cells = {(figure.job, figure.column): figure for figure in figures}
    lines = [f"  {'':<32}{'peer':>14}" + "".join(f"{name:>17}" for name in columns) + f"{'goal':>8}"]
    for job in dict.fromkeys(figure.job for figure in figures):
        row = [cells[job, column] for column in columns]
        peer = statistics.median(speed for figure in row for speed in figure.theirs)
        goals = [against_goal(figure.ratio, figure.goal) for figure in row if figure.goal is not None]
        values = "".join(f"{figure.ratio:>17.2f}" for figure in row)
        lines.append(f"  {job:<32}{jobs[job].show(peer):>14}{values}  {''.join(goals)}".rstrip())
    lines.append("  farplug's processor time, s/GiB")
    for job in dict.fromkeys(figure.job for figure in figures):
        row = [cells[job, column] for column in columns]
        values = "".join(f"{statistics.median(f.our_cpu):>17.2f}" if any(f.our_cpu) else f"{'-':>17}" for f in row)
        theirs = [value for figure in row for value in figure.their_cpu]
        peer_cpu = f"{statistics.median(theirs):.2f}" if any(theirs) else "-"
        lines.append(f"  {job:<32}{peer_cpu:>14}{values}")
    return lines


def pairs(figures: Sequence[Figure], jobs: dict[str, Job]) -> list[str]:
    """Return a table with a line for each job: peer, farplug, ratio, goal, processor time."""
    lines = [
        f"  {'':<32}{figures[0].peer:>14}{'farplug':>14}{'ratio':>8}{'goal':>8}{'':8}"
        f"{'CPU s/GiB':>12}{figures[0].peer:>14}{'farplug':>10}"
    ]
    for figure in figures:
        job = jobs[figure.job]
        theirs, ours = statistics.median(figure.theirs), statistics.median(figure.ours)
        lines.append(
            f"  {figure.job:<32}{job.show(theirs):>14}{job.show(ours):>14}{figure.ratio:>8.2f}"
            f"{against_goal(figure.ratio, figure.goal):<18}"
            f"{'':<10}{statistics.median(figure.their_cpu):>14.2f}{statistics.median(figure.our_cpu):>10.2f}"
        )
        if figure.part == "line" and figure.job == "buffered read":
            met = "met" if ours >= LINE_BUFFERED_GOAL else "MISSED"
            lines.append(f"    at least {LINE_BUFFERED_GOAL / 1e6:.0f} MB/s: {met}")
    return lines


def table_rows(figures: Sequence[Figure]) -> list[Row]:
    """Return the rows of make bench's table."""
    parts = {"cd": "a CD over {}", "line": f"the same over {{}}, {2000 * DELAY:.0f} ms round trip"}
    words = {
        "spice": "SPICE",
        "unix": "a UNIX socket",
        "tcp": "TCP",
        "super": "",
        "high": ", high speed",
        "bot": ", Bulk-Only",
    }
    jobs = {job.name: job for job in (*JOBS, *LINE_JOBS)}
    return [
        Row(
            parts.get(figure.part, "a disk over {}").format(
                "".join(words.get(one, one) for one in figure.column.split())
            )
            + f"; beside {figure.peer}",
            figure.job,
            jobs[figure.job].show(statistics.median(figure.ours)),
            jobs[figure.job].show(statistics.median(figure.theirs)),
            figure.ratio,
            figure.goal,
            chart=True,
        )
        for figure in figures
        if figure.column != "QEMU usb-uas"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="measure this part (may be repeated)")
    parser.add_argument("--transport", choices=TRANSPORTS, action="append", help="instead of the default setups")
    parser.add_argument("--speed", choices=SPEEDS, action="append", help="instead of the default setups")
    parser.add_argument("--storage", choices=STORAGES, action="append", help="instead of the default setups")
    parser.add_argument(
        "--cd-as", choices=CD_OPTIONS, default=CD_OPTIONS[0], help="option for farplug, compared with the CD"
    )
    parser.add_argument("--job", metavar="REGEX", help="measure the jobs whose names match")
    parser.add_argument("--rounds", type=int, default=3, help="pairs after the warm-up (default: 3)")
    parser.add_argument("--against", type=Path, metavar="SRC", help="compare with another source tree of farplug")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    add_rows_option(parser)
    options = parser.parse_args()
    print(machine(), flush=True)
    load = os.getloadavg()[0]
    if load > QUIET_LOAD:
        print(f"The machine is busy (load {load:.1f}): disks that need more than one process are slower than usual.")
    started = time.monotonic()
    bench = Bench(options)
    try:
        asyncio.run(bench.run())
    except FarplugError as error:
        sys.exit(f"bench: {error}")
    print(tables(bench))
    print(f"\n{time.monotonic() - started:.0f} s, load {load:.1f} before and {os.getloadavg()[0]:.1f} after")
    write_rows(options.rows, table_rows(bench.figures))
    if options.json:
        options.json.write_text(
            json.dumps({"machine": machine(), "figures": [asdict(figure) for figure in bench.figures]}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
