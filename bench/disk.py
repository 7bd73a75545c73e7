"""Our disk beside QEMU's own usb-storage, in one guest, in one run.

Both disks hang on the same xHCI controller and hold the same random bytes. Each figure is taken in turns, theirs, ours,
theirs, ours, and the ratio is the median of the pairs: a single time says more about the machine than about us.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farplug.testing.qemu import QemuGuest
from farplug.testing.qemu_config import GuestConfig, SpicePort, TcpPort, UnixPort, UsbDisk

MIB = 2**20
SIZE = 256 * MIB


@dataclass(frozen=True, slots=True)
class Job:
    """One thing that is measured.

    Attributes:
        name: for the table.
        command: a shell command; ``$d`` is the disk.
        size: bytes that it moves.
        goal: the ratio over SPICE at SuperSpeed that we want to reach.
    """

    name: str
    command: str
    size: int
    goal: float


JOBS = (
    Job("sequential read 1 MiB", "dd if=$d of=/dev/null bs=1M count=200 iflag=direct", 200 * MIB, 0.75),
    Job("sequential write 1 MiB", "dd if=/dev/zero of=$d bs=1M count=100 oflag=direct", 100 * MIB, 0.50),
    Job("buffered read", "dd if=$d of=/dev/null bs=1M count=100", 100 * MIB, 0.85),
    Job("4 KiB direct read", "dd if=$d of=/dev/null bs=4k count=1500 iflag=direct", 1500 * 4096, 0.33),
    Job("4 KiB direct write", "dd if=/dev/zero of=$d bs=4k count=1500 oflag=direct", 1500 * 4096, 0.33),
)


async def measure(guest: QemuGuest, job: Job, disk: str) -> float:
    """Bytes a second."""
    await guest.check("echo 3 >/proc/sys/vm/drop_caches")
    script = f"d={disk}; now() {{ read t _ </proc/uptime; echo $t; }}; now; {job.command} 2>/dev/null && now"
    before, after = (await guest.check(script, timeout=120)).split()
    return job.size / max(float(after) - float(before), 0.01)


async def find_disk(guest: QemuGuest, vendor: str) -> str:
    """The block device whose vendor is this; waits for it."""
    script = f"for s in /sys/block/sd*; do grep -q {vendor} $s/device/vendor 2>/dev/null && basename $s; done; :"
    for _ in range(200):
        name = (await guest.check(script)).strip()
        if name and (await guest.run(f"dd if=/dev/{name} of=/dev/null count=1 2>/dev/null")).exit_code == 0:
            return f"/dev/{name}"
        await asyncio.sleep(0.1)
    raise RuntimeError(f"no disk of vendor {vendor} came up\n{guest.console[-2000:]}")


async def wait_gone(guest: QemuGuest, disk: str) -> None:
    """Wait until the guest has noticed that a disk left."""
    while (await guest.run(f"test -e {disk}")).exit_code == 0:
        await asyncio.sleep(0.05)


async def run_farplug(target: str, image: Path, speed: str) -> asyncio.subprocess.Process:
    """``farplug connect``, as a user runs it."""
    program = Path(sys.executable).with_name("farplug")
    return await asyncio.create_subprocess_exec(
        program, "connect", target, "--usb-disk", image, "--usb-speed", speed, "--json", stdout=asyncio.subprocess.PIPE
    )


def peak_memory(pid: int) -> float:
    """Peak resident memory of a process, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found
    return int(found[1]) / 1024


async def bench(transports: list[str], speeds: list[str], rounds: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="farplug-bench-") as folder:
        ours, theirs = Path(folder, "ours.raw"), Path(folder, "theirs.raw")
        block = os.urandom(MIB)
        for path in (ours, theirs):
            with path.open("wb") as file:
                for index in range(SIZE // MIB):
                    file.write(block[index:] + block[:index])
        config = GuestConfig(ports=(SpicePort(), TcpPort(), UnixPort()), disks=(UsbDisk(image=theirs),))
        async with QemuGuest(config) as guest:
            await guest.booted()
            peer = await find_disk(guest, "QEMU")
            targets = dict(zip(("spice", "tcp", "unix"), guest.targets, strict=True))
            for transport in transports:
                for speed in speeds:
                    process = await run_farplug(targets[transport], ours, speed)
                    disk = await find_disk(guest, "farplug")
                    for job in JOBS:
                        pairs = []
                        for _ in range(rounds + 1):
                            base = await measure(guest, job, peer)
                            pairs.append((await measure(guest, job, disk), base))
                        pairs = pairs[1:]  # the first one warms both up
                        row = {
                            "transport": transport,
                            "speed": speed,
                            "job": job.name,
                            "goal": job.goal if (transport, speed) == ("spice", "super") else None,
                            "ours": statistics.median(a for a, _ in pairs) / 1e6,
                            "theirs": statistics.median(b for _, b in pairs) / 1e6,
                            "ratio": statistics.median(a / b for a, b in pairs),
                        }
                        rows.append(row)
                        print_row(row)
                    memory = peak_memory(process.pid)
                    rows.append({"transport": transport, "speed": speed, "peak_memory_mib": memory})
                    print(f"{transport:<9}{speed:<8}peak memory of farplug connect: {memory:.0f} MiB", flush=True)
                    process.terminate()
                    await process.communicate()
                    await wait_gone(guest, disk)
    return rows


def print_row(row: Mapping[str, Any]) -> None:
    goal = f"   goal {row['goal']:.2f}" if row["goal"] else ""
    print(
        f"{row['transport']:<9}{row['speed']:<8}{row['job']:<24}{row['ours']:>8.1f} MB/s"
        f"{row['theirs']:>13.1f} MB/s{row['ratio']:>8.2f}{goal}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--transport", choices=("spice", "tcp", "unix"), action="append")
    parser.add_argument("--speed", choices=("super", "high"), action="append")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    print(f"{'over':<9}{'speed':<8}{'':<24}{'farplug':>13}{'QEMU usb-storage':>18}{'ratio':>8}")
    rows = asyncio.run(
        bench(options.transport or ["spice", "tcp", "unix"], options.speed or ["super", "high"], options.rounds)
    )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
