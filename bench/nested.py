"""Compare farplug with ``usbredirect``, the C program, on a real device, in two guests, in one run.

The near guest has the device, QEMU's usb-storage, and runs both programs alternately; the far guest gets the device
over TCP and measures. Both guests are emulated, and so are both programs: only ratios are meaningful.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import farplug
from disk import Figure, machine, pairs, report
from farplug.errors import FarplugError
from farplug.programs import find_program
from farplug.vm.qemu import QemuGuest
from farplug.vm.qemu_config import GATEWAY, LOOPBACK, GuestConfig, TcpPort, UsbDisk
from jobs import JOBS, MIB, Job, measure, prepare
from rows import Row, add_rows_option, write_rows

SIZE = 256 * MIB
TIMEOUT = 120.0
"""Seconds until the disk must appear in the far guest, or disappear."""
DEVICE = "46f4:0001"

GOALS = {"sequential read 1 MiB": 1.0, "4 KiB read": 0.9}


@dataclass(frozen=True, slots=True)
class Program:
    """A program that redirects a real device.

    Attributes:
        name: the name in the table.
        command: the command for the near guest's shell.
    """

    name: str
    command: str

    @asynccontextmanager
    async def run(self, near: QemuGuest, far: QemuGuest) -> AsyncIterator[str]:
        """Run the program while the far guest has the disk; yield its process id in the near guest."""
        task = asyncio.create_task(near.run(f"echo $$ >/run/program; exec env {self.command}", timeout=3600))
        try:
            await until(far, "test -e /dev/sda && head -c 512 /dev/sda | grep -q ''", task)
            pid = (await near.check("cat /run/program")).strip()
            yield pid
            await near.check(f"kill -INT {pid}")
            await until(far, "test ! -e /dev/sda")
            await task
        finally:
            task.cancel()


async def until(guest: QemuGuest, condition: str, program: asyncio.Task[object] | None = None) -> None:
    """Wait until a command in the guest succeeds."""
    async with asyncio.timeout(TIMEOUT):
        while (await guest.run(condition)).exit_code != 0:
            if program is not None and program.done():
                sys.exit(f"bench: the program ended: {program.result()}")
            await asyncio.sleep(0.1)


async def cpu_seconds(guest: QemuGuest, pid: str) -> float:
    """Return the processor time of all threads of a process, in seconds."""
    lines = await guest.check(f"cat /proc/{pid}/task/*/schedstat")
    return sum(int(line.split()[0]) for line in lines.splitlines()) / 1e9


async def bench(rounds: int) -> list[Figure]:
    """Measure everything."""
    jobs = [replace(job, goal=GOALS[job.name]) for job in JOBS if job.name in GOALS]
    figures = {job: Figure("nested", "usbredirect", "farplug", job.name, job.goal) for job in jobs}
    with tempfile.NamedTemporaryFile(prefix="farplug-bench-") as image:
        image.write(os.urandom(SIZE))
        image.flush()
        near_config = GuestConfig(machine=True, network=True, memory=768, disks=(UsbDisk(image=Path(image.name)),))
        far_config = GuestConfig(ports=(TcpPort(),), memory=768)
        async with QemuGuest(near_config) as near, QemuGuest(far_config) as far:
            await near.booted()
            await far.booted()
            await prepare(far)
            await until(near, f"lsusb -d {DEVICE}")
            target = far.targets[0].replace(LOOPBACK, GATEWAY)
            path = os.environ.get("PYTHONPATH") or Path(farplug.__file__).parents[1]
            peer = Program(
                "usbredirect", f"{find_program('usbredirect')} --device {DEVICE} --to {target.removeprefix('tcp://')}"
            )
            ours = Program(
                "farplug",
                f"PYTHONPATH={path} {sys.executable} -c 'from farplug.cli.main import main; main()' "
                f"connect {target} --usb-device {DEVICE}",
            )
            for _ in range(rounds + 1):
                for program in (peer, ours):
                    async with program.run(near, far) as pid:
                        for job, figure in figures.items():
                            await take(near, far, pid, job, figure, ours=program is ours)
    for figure in figures.values():
        figure.drop_first()
        report(figure)
    return list(figures.values())


async def take(near: QemuGuest, far: QemuGuest, pid: str, job: Job, figure: Figure, *, ours: bool) -> None:
    """Run one job with one program, and append the results."""
    before = await cpu_seconds(near, pid)
    speed, size = await measure(far, job, "/dev/sda")
    cpu = (await cpu_seconds(near, pid) - before) / size * 2**30
    (figure.ours if ours else figure.theirs).append(speed)
    (figure.our_cpu if ours else figure.their_cpu).append(cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="pairs after the warm-up (default: 3)")
    add_rows_option(parser)
    options = parser.parse_args()
    print(machine(), flush=True)
    started = time.monotonic()
    try:
        figures = asyncio.run(bench(options.rounds))
    except FarplugError as error:
        sys.exit(f"bench: {error}")
    print(f"Compared with usbredirect (C): usb-storage in nested guests over TCP, median of {options.rounds} pairs")
    jobs = {job.name: job for job in JOBS}
    print("\n".join(pairs(figures, jobs)))
    part, lines = "a real device of an emulated machine over TCP; beside usbredirect", []
    for figure in figures:
        ours, theirs = (jobs[figure.job].show(statistics.median(values)) for values in (figure.ours, figure.theirs))
        lines.append(Row(part, figure.job, ours, theirs, figure.ratio, figure.goal))
    write_rows(options.rows, lines)
    print(f"\n{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
