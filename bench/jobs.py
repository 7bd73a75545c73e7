"""The jobs to measure in the guest, and the goals."""

from __future__ import annotations

import json
from dataclasses import dataclass

from farplug.vm.qemu import QemuGuest

KIB, MIB = 2**10, 2**20

NOISE = "/tmp/noise"
"""The data to write: incompressible, because SPICE compresses zeros to almost nothing."""
NOISE_SIZE = 100 * MIB
WRITES_AT = 128 * MIB
"""Reads stay below this offset of the disk, writes above it: the data to read remains incompressible."""

_NOW = "now() { { read _; read _; read _ _ t _; } </proc/timer_list; echo $t; }"
"""A shell function that prints the guest's clock in nanoseconds, without starting a program."""


@dataclass(frozen=True, slots=True)
class Job:
    """A job to measure.

    Attributes:
        name: the name in the table.
        command: a command for the guest's shell; ``$d`` is the disk.
        size: number of bytes that the command transfers; 0: the command is fio, which reports it.
        block: bytes per operation, to show operations per second; 0: show MB/s.
        goal: the goal for the ratio to QEMU's usb-storage, over SPICE.
        unix_goal: the same over a UNIX socket.
        cd_goal: the goal for the ratio to spice-gtk's emulated CD.
    """

    name: str
    command: str
    size: int = 0
    block: int = 0
    goal: float | None = None
    cd_goal: float | None = None
    unix_goal: float | None = None

    def show(self, speed: float) -> str:
        """Return a speed, given in bytes per second, as text."""
        return f"{speed / self.block:.0f} IOPS" if self.block else f"{speed / 1e6:.1f} MB/s"


def _dd(operands: str, size: int) -> str:
    block = 4 * KIB if "bs=4k" in operands else MIB
    return f"dd {operands} count={size // block} 2>/dev/null"


def _fio(arguments: str, *, seconds: int = 1) -> str:
    return (
        f"fio --name=bench --filename=$d --size={WRITES_AT} --ioengine=libaio --direct=1 --thread "
        f"--time_based --runtime={seconds} --output-format=json {arguments}"
    )


_WRITE = f"if={NOISE} of=$d oflag=direct conv=notrunc"

JOBS = (
    Job("sequential read 1 MiB", _dd("if=$d of=/dev/null bs=1M iflag=direct", 128 * MIB), 128 * MIB, 0, 0.78, 2.0),
    Job("buffered read", _dd("if=$d of=/dev/null bs=1M", 100 * MIB), 100 * MIB, 0, 1.0, 1.3, 0.7),
    Job("4 KiB read", _dd("if=$d of=/dev/null bs=4k iflag=direct", 6 * MIB), 6 * MIB, 4 * KIB, 0.6, 1.3, 0.72),
    Job(
        "4 KiB write",
        _dd(f"{_WRITE} bs=4k seek={WRITES_AT // KIB // 4}", 6 * MIB),
        6 * MIB,
        4 * KIB,
        0.62,
        unix_goal=0.72,
    ),
    Job("4 KiB random read, depth 16", _fio("--rw=randread --bs=4k --iodepth=16"), 0, 4 * KIB, 1.05, 3.0, 1.5),
    Job(
        "sequential write 1 MiB",
        _dd(f"{_WRITE} bs=1M seek={WRITES_AT // MIB}", NOISE_SIZE),
        NOISE_SIZE,
        0,
        0.88,
        unix_goal=0.78,
    ),
    Job("sequential read 1 MiB, depth 4", _fio("--rw=read --bs=1M --iodepth=4")),
)
"""Jobs without a delay on the line. Without depth: one operation after the other."""

LINE_JOBS = (
    Job("buffered read", _fio("--rw=read --bs=1M --direct=0 --ioengine=psync", seconds=3), 0, 0, None, 5.0),
    Job("4 KiB random read, depth 16", _fio("--rw=randread --bs=4k --iodepth=16", seconds=3), 0, 4 * KIB, None, 30.0),
)
"""Jobs for a line with a long round trip. They run for a time, not for a size."""

LINE_BUFFERED_GOAL = 25e6
"""The goal for buffered reading on the line with a long round trip, in bytes per second."""


async def prepare(guest: QemuGuest) -> None:
    """Prepare the guest for jobs: make the data to write, and turn off the delay before disks are scanned."""
    await guest.check(f"head -c {NOISE_SIZE} /dev/urandom >{NOISE}", timeout=120)
    await guest.check("echo 0 >/sys/module/usb_storage/parameters/delay_use")


async def measure(guest: QemuGuest, job: Job, disk: str) -> tuple[float, float]:
    """Run a job, and return bytes per second and the number of bytes."""
    await guest.check("echo 3 >/proc/sys/vm/drop_caches")
    if not job.size:
        output = await guest.check(f"d={disk}; {job.command}", timeout=120)
        result = json.loads(output[output.index("{") :])["jobs"][0]["read"]
        return float(result["bw_bytes"]), float(result["io_bytes"])
    before, after = (await guest.check(f"d={disk}; {_NOW}; now; {job.command} && now", timeout=120)).split()
    return job.size / (int(after) - int(before)) * 1e9, float(job.size)
