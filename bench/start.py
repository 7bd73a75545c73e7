"""Measure what it costs to start farplug: the processor time of commands, and the memory of many ports in one process.

``connect`` is measured until its hello is at the VM's end of the socket. The processor time is that of the process, in
user space and in the kernel: the median and the lowest of the rounds, each of which starts all commands once. Processes
that run beside it add to it; the lowest is nearest to a quiet machine. ``--against TREE`` starts those of another
checkout in turns with this one's.

Ports are TCP sockets, each with a disk that the guest has configured. What one port more takes is the difference
between 64 and 8, divided by 56: the first ports fill memory that the imports left, and what a process keeps for
payloads.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import statistics
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from farplug.usbredir import Connection, Role, packets
from rows import Row, add_rows_option, write_rows
from socketpair import TREE, default_python

FEW_PORTS, PORTS = 8, 64
MEMORY_ROUNDS = 3
TIMEOUT = 60.0
COMMAND = "from farplug.cli.script import main; main()"
SERVED_PORTS = "from served_ports import main; main()"
KIB, MIB = 2**10, 2**20


@dataclass(frozen=True, slots=True)
class Started:
    """Starts processes of a checkout of farplug.

    Args:
        tree: the checkout.
        python: the interpreter.
        folder: for sockets and images.
    """

    tree: Path
    python: str
    folder: Path

    def start(self, code: str, *arguments: object) -> subprocess.Popen[bytes]:
        """Start the interpreter with code."""
        # Not PYTHONPATH: Python's site module may import packages that it finds there.
        path = [str(self.tree / "src"), str(Path(__file__).parent), sysconfig.get_path("purelib")]
        return subprocess.Popen(
            [self.python, "-c", f"import sys; sys.path[:0] = {path!r}; {code}", *map(str, arguments)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "XDG_RUNTIME_DIR": str(self.folder)},  # no sessions but those of this measurement
        )

    def milliseconds(self, code: str, *arguments: object) -> float:
        """Return the processor time of a process that ends by itself."""
        process = self.start(code, *arguments)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"{code} {' '.join(map(str, arguments))} ended with {process.returncode}")
        return (usage.ru_utime + usage.ru_stime) * 1e3

    def connect(self) -> float:
        """Return the processor time of ``farplug connect`` until its hello arrives."""
        image = self.folder / "disk.raw"
        image.write_bytes(bytes(MIB))
        path = self.folder / "vm.sock"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            listener.settimeout(TIMEOUT)
            process = self.start(COMMAND, "connect", f"unix:{path}", "--usb-disk", image)
            try:
                guest, _ = listener.accept()
                with guest:
                    guest.recv(1)
                    return time.clock_gettime(~process.pid << 3 | 2) * 1e3  # clock_getcpuclockid(3)
            finally:
                path.unlink()
                process.terminate()
                process.wait(TIMEOUT)

    def memory(self, ports: int) -> int:
        """Return the resident memory of a process with a configured disk in each of several ports, in bytes."""
        images = [self.folder / f"{number}.raw" for number in range(ports)]
        for image in images:
            image.write_bytes(bytes(MIB))
        with ExitStack() as stack:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=ports))
            listener.settimeout(TIMEOUT)
            process = self.start(SERVED_PORTS, *listener.getsockname(), *images)
            stack.callback(process.wait, TIMEOUT)
            stack.callback(process.terminate)
            for _ in images:
                guest, _ = listener.accept()
                configure(stack.enter_context(guest))
            found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
            assert found
            return int(found[1]) * KIB


def configure(sock: socket.socket) -> None:
    """Set a configuration of the device that the usb-host at the other end offers."""
    sock.settimeout(TIMEOUT)
    connection = Connection(Role.GUEST)
    connection.start()

    def wait(kind: type[packets.Packet]) -> None:
        sock.sendall(b"".join(map(bytes, connection.data_to_send())))
        while True:
            while (event := connection.next_event()) is not None:
                if type(event) is kind:
                    return
            connection.receive_data(sock.recv(65536))

    wait(packets.DeviceConnect)
    connection.send(packets.SetConfiguration(id=1, configuration=1))
    wait(packets.ConfigurationStatus)


@dataclass(slots=True)
class Figures:
    """What was measured of one tree: milliseconds of processor time of each command, and bytes with 8 and 64 ports."""

    commands: dict[str, list[float]] = field(default_factory=dict)
    few_ports: list[int] = field(default_factory=list)
    all_ports: list[int] = field(default_factory=list)

    def rows(self) -> dict[str, tuple[float, float]]:
        """Return the median and the lowest value of each figure."""
        rows = {f"{name}, ms": (statistics.median(values), min(values)) for name, values in self.commands.items()}
        each = [
            (every - few) / (PORTS - FEW_PORTS) / KIB for few, every in zip(self.few_ports, self.all_ports, strict=True)
        ]
        rows["memory of one port more, KiB"] = (statistics.median(each), min(each))
        rows[f"memory of {PORTS} ports, MiB"] = (statistics.median(self.all_ports) / MIB, min(self.all_ports) / MIB)
        return rows


def measure(started: Sequence[Started], rounds: int) -> list[Figures]:
    """Measure several trees in turns."""
    results = [Figures() for _ in started]
    for number in range(rounds + 1):
        for one, figures in zip(started, results, strict=True):
            round_of = {
                "python": one.milliseconds("pass"),
                "farplug --version": one.milliseconds(COMMAND, "--version"),
                "farplug --help": one.milliseconds(COMMAND, "--help"),
                "farplug ls": one.milliseconds(COMMAND, "ls"),
                "farplug connect, to its hello": one.connect(),
            }
            if number == 0:
                continue  # Python compiles the modules
            for name, value in round_of.items():
                figures.commands.setdefault(name, []).append(value)
    for one, figures in list(zip(started, results, strict=True)) * MEMORY_ROUNDS:
        figures.few_ports.append(one.memory(FEW_PORTS))
        figures.all_ports.append(one.memory(PORTS))
    return results


def table(results: Sequence[Figures]) -> str:
    """Return the figures as text; those of another tree beside them, and how much less this tree needs."""
    ours, *others = [result.rows() for result in results]
    heading = f"{'':34}{'median':>8}{'lowest':>8}"
    lines = [heading + (f"{'other':>8}{'lowest':>8}{'ratio':>8}" if others else "")]
    for name, (median, lowest) in ours.items():
        other = "".join(f"{one[name][0]:8.0f}{one[name][1]:8.0f}{one[name][0] / median:8.2f}" for one in others)
        lines.append(f"{name:34}{median:8.0f}{lowest:8.0f}{other}")
    return "\n".join(lines)


def main() -> None:
    """Measure, and print a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, metavar="TREE", help="compare with another checkout of farplug")
    parser.add_argument("--rounds", type=int, default=11, help="starts of each command (default: %(default)s)")
    parser.add_argument("--python", default=default_python(), help="the interpreter to measure (default: %(default)s)")
    add_rows_option(parser)
    options = parser.parse_args()
    trees = [TREE, *([options.against] if options.against else [])]
    version = subprocess.run([options.python, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory(prefix="farplug-bench-") as folder:
        results = measure([Started(tree, options.python, Path(folder)) for tree in trees], options.rounds)
    print(f"{options.python}, {version}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    print(table(results))
    part, lines = "processor time of a start, and memory", []
    for name, (median, _) in results[0].rows().items():
        what, _, unit = name.rpartition(", ")
        lines.append(Row(part, what, f"{median:.0f} {unit}"))
    write_rows(options.rows, lines)


if __name__ == "__main__":
    main()
