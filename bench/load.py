"""Measure sessions under load: Locust, the example locustfile, VMs in memory; direct and through the proxy kerbside.

One Locust master, two workers with a load agent each, the VMs and the proxy share this machine. So the figures say what
each part costs, and which part is the first limit here; the rate of sessions is that of all parts together.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import AsyncExitStack
from pathlib import Path

from tests.guest.kerbside import PROXY, Kerbside
from tests.load.vms import target

from disk import QUIET_LOAD, machine
from farplug.vm.qemu_config import SpiceAddress

ROOT = Path(__file__).resolve().parents[1]
TICKS = os.sysconf("SC_CLK_TCK")
NAMES = ("link", "hello", "connect", "attach", "read 1 MiB", "write 1 MiB", "detach", "close")
PERCENTILES = ("50%", "95%", "99%")


def family(pid: int) -> list[int]:
    """Return a process and its descendants."""
    try:
        words = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return [pid]
    return [pid, *(one for word in words for one in family(int(word)))]


def usage(pid: int) -> tuple[str, float, float] | None:
    """Return the command line, seconds of processor time and the peak of memory, in MiB, of a process."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        peak = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return None
    if not command:  # it has ended
        return None
    return command, (int(fields[11]) + int(fields[12])) / TICKS, int(peak[1]) / 1024 if peak else 0.0


def part_of(command: str) -> str:
    """Return which part of the load a process is."""
    for text, part in (("load.agent", "agents"), ("kerbside-proxy", "kerbside-proxy"), ("load.vms", "VMs in memory")):
        if text in command:
            return part
    return "kerbside's control plane (test)" if "kerbside_control" in command else "Locust"


async def sample(pids: list[int], seen: dict[int, tuple[str, float, float]]) -> None:
    """Record the usage of processes and their descendants until cancelled."""
    while True:
        for pid in [one for parent in pids for one in family(parent)]:
            if (found := usage(pid)) is not None:
                seen[pid] = found
        await asyncio.sleep(0.2)


async def run(options: argparse.Namespace, through_proxy: bool) -> None:
    """Run Locust once, and print the figures."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="farplug-bench-")))
        vms = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.load.vms", "--pause", "3600"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=ROOT,
        )
        assert vms.stdin is not None
        assert vms.stdout is not None
        stack.push_async_callback(vms.wait)
        stack.callback(vms.stdin.close)
        port = int(await vms.stdout.readline())
        targets: Iterable[object] = [target(number, port) for number in range(options.users)]
        pids = [vms.pid]
        if through_proxy:
            kerbside = await stack.enter_async_context(Kerbside())
            spice = SpiceAddress(port=port)
            targets = [
                await kerbside.allow(spice, token=f"token-of-{number}", session=f"session-{number}")
                for number in range(options.users)
            ]
            pids.append(kerbside.proxy_pid)
        listed = folder / "targets"
        listed.write_text("".join(f"{one}\n" for one in targets))
        command = f"{sys.executable} -m locust -f {ROOT}/examples/locustfile.py --headless --only-summary --processes 2"
        locust = await asyncio.create_subprocess_exec(
            *command.split(),
            *("--csv", str(folder / "run"), "-u", str(options.users), "-r", str(options.rate)),
            *("--farplug-targets", str(listed), "--farplug-sessions", str(options.sessions)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "READS": "1"},
        )
        seen: dict[int, tuple[str, float, float]] = {}
        sampling = asyncio.create_task(sample([*pids, locust.pid], seen))
        begun = time.monotonic()
        output = (await locust.communicate())[0].decode()
        seconds = time.monotonic() - begun
        sampling.cancel()
        print(
            f"\n{'through kerbside' if through_proxy else 'direct'}: {options.sessions} sessions, {options.users} users"
        )
        if locust.returncode:
            print(output)
        report(folder, options.sessions, seconds, seen)
        for line in re.findall(r"load agent \d+: (\d+ sessions.*)", output):
            print(f"  an agent: {line}")


def report(folder: Path, sessions: int, seconds: float, seen: dict[int, tuple[str, float, float]]) -> None:
    """Print the figures of a run."""
    with (folder / "run_stats.csv").open(newline="") as file:
        rows = {row["Name"]: row for row in csv.DictReader(file)}
    rate = float(rows["close"]["Requests/s"]) if "close" in rows else 0.0
    print(f"  {rate:.1f} sessions a second; {seconds:.0f} s in all")
    print(f"  {'':<14}" + "".join(f"{'p' + name[:-1]:>9}" for name in PERCENTILES) + f"{'failures':>10}")
    for name in NAMES:
        if name in rows:
            times = "".join(f"{rows[name][column]:>6} ms" for column in PERCENTILES)
            print(f"  {name:<14}{times}{rows[name]['Failure Count']:>10}")
    parts: dict[str, list[tuple[float, float]]] = {}
    for command, cpu, memory in seen.values():
        parts.setdefault(part_of(command), []).append((cpu, memory))
    for part, values in sorted(parts.items(), key=lambda item: -sum(cpu for cpu, _ in item[1])):
        cpu = sum(cpu for cpu, _ in values)
        memory = sum(memory for _, memory in values)
        print(
            f"  {part:<32}{len(values)} processes{cpu:>8.1f} s of processor time{1000 * cpu / sessions:>8.1f} ms "
            f"a session{memory:>7.0f} MiB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=200, help="sessions in all (default: 200)")
    parser.add_argument("--users", type=int, default=200, help="users (default: 200)")
    parser.add_argument("--rate", type=int, default=20, help="users that begin in a second (default: 20)")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    print(machine(), flush=True)
    if load > QUIET_LOAD:
        print(f"The machine is busy (load {load:.1f}): times are longer than usual, and sessions fail sooner.")
    asyncio.run(run(options, False))
    if PROXY.exists():
        asyncio.run(run(options, True))
    print(f"\nload {load:.1f} before and {os.getloadavg()[0]:.1f} after")


if __name__ == "__main__":
    main()
