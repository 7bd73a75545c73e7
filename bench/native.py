"""Compare farplug with ``usbredirect``, the C program, on a real device, without QEMU and without hardware.

Both programs load a libusb of the bench (``stub_libusb.c``, built with gcc), which has one SuperSpeed disk over a file
in the page cache. A guest that costs little drives both over TCP, one transfer at a time as Linux does over Bulk-Only
Transport: READ(10) and WRITE(10) of 4 KiB and 1 MiB. What is compared is everything between libusb and the socket.

The programs are measured in turns; the one that does not have its turn is stopped, since usbredirect uses a processor
also when it has nothing to do. The ratios are medians over all pairs of turns: of speed, above 1 farplug is faster; of
processor time, below 1 farplug needs less. Before each turn the guest compares a few whole commands with the file.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import socketpair
from farplug.usb.transfer import Status
from rows import Row, add_rows_option, write_rows
from socketpair import (
    BULK,
    BULK_HEADER,
    BULK_SIZE,
    CSW_STATUS,
    HEADER,
    IMAGE_SIZE,
    KIB,
    MIB,
    command_text,
    default_python,
)

TREE = Path(__file__).parents[1]
SERVER = Path(__file__).with_name("served_device.py")
STUB = Path(__file__).with_name("stub_libusb.c")
DEVICE = "46f4:0001"
TIMEOUT = 20.0
"""Seconds until a program must be connected, and for each answer."""
CHECKED = 4
"""Commands before each turn whose data is compared with the file."""
SPEED_GOALS = {4 * KIB: 0.85, MIB: 1.0}
CPU_GOAL = 0.95


@dataclass(frozen=True, slots=True)
class Case:
    """A kind of command.

    Attributes:
        size: bytes of one command.
        write: it is a WRITE.
    """

    size: int
    write: bool

    @property
    def count(self) -> int:
        """Return how many commands one turn has."""
        return 200 if self.size < MIB else 20

    def __str__(self) -> str:
        return command_text(self.size, write=self.write)


CASES = [Case(size, write) for size in (4 * KIB, MIB) for write in (False, True)]


class Guest(socketpair.Guest):
    """The guest's end of the connection.

    Args:
        sock: connected, blocking.
        image: the file of the disk.
    """

    def __init__(self, sock: socket.socket, image: Path) -> None:
        super().__init__(sock, socketpair.Case("unix", "bot", 4 * KIB, write=False, depth=1))
        self._image = image
        self._random = random.Random(1)
        self._answer_buffer = memoryview(bytearray(BULK_SIZE + MIB))
        self._status_buffer = memoryview(bytearray(BULK_SIZE + 13))

    def close(self) -> None:
        """Close the connection."""
        self._sock.close()

    def execute(self, case: Case, count: int) -> None:
        """Execute ``count`` commands at random places. The length of each answer and the status are checked.

        Raises:
            RuntimeError: a command failed.
        """
        for _ in range(count):
            self._command(case, self._place(case))

    def check(self, case: Case, count: int) -> None:
        """Execute ``count`` commands, and compare their data with the file.

        Raises:
            RuntimeError: a command failed, or the data differs.
        """
        with self._image.open("rb") as image:
            for _ in range(count):
                place = self._place(case)
                self._noise = os.urandom(case.size)
                data = self._command(case, place)
                image.seek(place)
                if bytes(data) != image.read(case.size):
                    raise RuntimeError(f"{case}: the data at byte {place} is wrong")

    def _place(self, case: Case) -> int:
        return self._random.randrange(IMAGE_SIZE // case.size) * case.size

    def _command(self, case: Case, place: int) -> bytes | memoryview:
        """Execute a command, and return the data that was read or written."""
        size, flags = case.size, 0x00 if case.write else 0x80
        cdb = struct.pack(">BBIBHB", 0x2A if case.write else 0x28, 0, place // 512, 0, size // 512, 0)
        self._transfer(0x02, struct.pack("<4sIIBBB16s", b"USBC", 1, size, flags, 0, len(cdb), cdb))
        data: bytes | memoryview = self._noise
        if case.write:
            self._transfer(0x02, self._noise)
        else:
            data = self._receive(0x81, self._answer_buffer[: BULK_SIZE + size])
        if self._receive(0x81, self._status_buffer)[CSW_STATUS]:
            raise RuntimeError(f"{case}: the command at byte {place} failed")
        return data

    def _transfer(self, endpoint: int, data: bytes) -> None:
        """Send data to the device."""
        self._write(self._bulk(1, endpoint, 0, data=data))
        self._answered(self._status_buffer[:BULK_SIZE])

    def _receive(self, endpoint: int, buffer: memoryview) -> memoryview:
        """Receive data of the device, as much as fits into the buffer behind the packet's header, and return it."""
        self._write(self._bulk(1, endpoint, 0, length=len(buffer) - BULK_SIZE))
        self._answered(buffer)
        return buffer[BULK_SIZE:]

    def _answered(self, buffer: memoryview) -> None:
        """Receive the answer of a bulk transfer, which must fill the buffer."""
        if self._sock.recv_into(buffer, 0, socket.MSG_WAITALL) != len(buffer):
            raise RuntimeError("the program has ended")
        kind, length, _ = HEADER.unpack_from(buffer)
        status = BULK_HEADER.unpack_from(buffer, HEADER.size)[1]
        if (kind, length, status) != (BULK, len(buffer) - HEADER.size, Status.SUCCESS):
            raise RuntimeError(f"unexpected answer: {bytes(buffer[:BULK_SIZE]).hex()}")


class Program:
    """A running program, with its guest. It is stopped except during :meth:`turn`.

    Args:
        command: the program and its arguments, which are followed by the address of the guest.
        image: the file of the disk.
        library: the folder of the bench's libusb.
        tree: the checkout of farplug to run; None: the program is usbredirect.
    """

    def __init__(self, command: Sequence[str], image: Path, library: Path, tree: Path | None) -> None:
        path = os.pathsep.join((str((tree or TREE) / "src"), sysconfig.get_path("purelib")))
        environment = {**os.environ, "PYTHONPATH": path, "LD_LIBRARY_PATH": str(library), "STUB_IMAGE": str(image)}
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            address = str(port) if tree else f"127.0.0.1:{port}"
            self._process = subprocess.Popen([*command, address], env=environment, stdout=subprocess.DEVNULL)
            try:
                listener.settimeout(TIMEOUT)
                sock, _ = listener.accept()
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(TIMEOUT), 0))
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.guest = Guest(sock, image)
            except BaseException:
                self._process.kill()
                self._process.wait()
                raise
        self._clock = ~self._process.pid << 3 | 2  # clock_getcpuclockid(3)
        self._process.send_signal(signal.SIGSTOP)

    def turn(self, case: Case) -> tuple[float, float]:
        """Return the microseconds of a command on the clock, and those of processor time."""
        self._process.send_signal(signal.SIGCONT)
        self.guest.check(case, CHECKED)
        wall, cpu = time.perf_counter(), time.clock_gettime(self._clock)
        self.guest.execute(case, case.count)
        wall, cpu = time.perf_counter() - wall, time.clock_gettime(self._clock) - cpu
        self._process.send_signal(signal.SIGSTOP)
        return wall / case.count * 1e6, cpu / case.count * 1e6

    def close(self) -> None:
        """End the guest, and wait for the program."""
        self.guest.close()
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@dataclass(slots=True)
class Result:
    """What was measured of one case: pairs of turns, the peer's and farplug's, in microseconds of a command.

    Attributes:
        wall: on the clock.
        cpu: of processor time.
    """

    wall: list[tuple[float, float]] = field(default_factory=list)
    cpu: list[tuple[float, float]] = field(default_factory=list)

    @property
    def speed_ratio(self) -> float:
        """Return farplug's speed divided by the peer's."""
        return statistics.median(theirs / ours for theirs, ours in self.wall)

    @property
    def cpu_ratio(self) -> float:
        """Return farplug's processor time divided by the peer's."""
        return statistics.median(ours / theirs for theirs, ours in self.cpu)


def build(folder: Path) -> None:
    """Build the bench's libusb in a folder."""
    command = ["gcc", "-O2", "-shared", "-fPIC", "-pthread", "-o", str(folder / "libusb-1.0.so.0"), str(STUB)]
    subprocess.run(command, check=True)


def measure(options: argparse.Namespace, usbredirect: str, folder: Path) -> dict[Case, Result]:
    """Measure in rounds; each round has new processes."""
    farplug = [options.python, str(SERVER)]
    peer = farplug if options.against else [usbredirect, "--device", DEVICE, "--to"]
    build(folder)
    images = [folder / name for name in ("peer.raw", "farplug.raw")]
    for image in images:
        image.write_bytes(os.urandom(IMAGE_SIZE))
    results = {case: Result() for case in CASES}
    for _ in range(options.rounds):
        with ExitStack() as stack:
            programs = []
            for command, image, tree in ((peer, images[0], options.against), (farplug, images[1], TREE)):
                programs.append(Program(command, image, folder, tree))
                stack.callback(programs[-1].close)
            for case, result in results.items():
                for number in range(options.turns + 1):
                    (their_wall, their_cpu), (our_wall, our_cpu) = [program.turn(case) for program in programs]
                    if number:  # the first pair is a warm-up
                        result.wall.append((their_wall, our_wall))
                        result.cpu.append((their_cpu, our_cpu))
    return results


def table(results: dict[Case, Result], peer: str) -> str:
    """Return the results as text; the goals are those beside usbredirect."""
    lines = [f"{'':16}{peer:^22}{'farplug':^22}{'speed':>8}{'goal':>14}{'CPU':>8}{'goal':>14}"]
    lines.append(f"{'one command':16}" + 2 * f"{'wall, µs':>11}{'CPU, µs':>11}")
    for case, result in results.items():
        their_wall, our_wall = map(statistics.median, zip(*result.wall, strict=True))
        their_cpu, our_cpu = map(statistics.median, zip(*result.cpu, strict=True))
        goal = SPEED_GOALS[case.size]
        goals = ["", ""]
        if peer == "usbredirect":
            met = result.speed_ratio >= goal, result.cpu_ratio <= CPU_GOAL
            goals = [
                f"{value:.2f}  {'met' if one else 'MISSED'}" for value, one in zip((goal, CPU_GOAL), met, strict=True)
            ]
        lines.append(
            f"{case!s:16}{their_wall:11.0f}{their_cpu:11.0f}{our_wall:11.0f}{our_cpu:11.0f}"
            f"{result.speed_ratio:8.2f}{goals[0]:>14}{result.cpu_ratio:8.2f}{goals[1]:>14}".rstrip()
        )
    return "\n".join(lines)


def table_rows(results: dict[Case, Result]) -> list[Row]:
    """Return the rows of make bench's table; a ratio of processor time is inverted there."""
    part, lines = "a real device over TCP; beside usbredirect", []
    for case, result in results.items():
        theirs, ours = (f"{statistics.median(values):.0f} µs" for values in zip(*result.wall, strict=True))
        lines.append(Row(part, str(case), ours, theirs, result.speed_ratio, SPEED_GOALS[case.size], chart=True))
    for case, result in results.items():
        theirs, ours = (f"{statistics.median(values):.0f} µs" for values in zip(*result.cpu, strict=True))
        what = f"{case}, processor time"
        lines.append(Row(part, what, ours, theirs, 1 / result.cpu_ratio, round(1 / CPU_GOAL, 2)))
    return lines


def main() -> None:
    """Measure, and print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds, each with new processes (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=10, help="pairs of turns in a round (default: %(default)s)")
    parser.add_argument("--against", type=Path, metavar="TREE", help="another checkout of farplug is the peer")
    parser.add_argument("--python", default=default_python(), help="the interpreter to measure (default: %(default)s)")
    add_rows_option(parser)
    options = parser.parse_args()
    usbredirect = shutil.which("usbredirect")
    if usbredirect is None or shutil.which("gcc") is None:
        sys.exit("bench: usbredirect and gcc must be installed")
    version = subprocess.run([options.python, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory(prefix="farplug-bench-", dir="/var/tmp") as folder:
        results = measure(options, usbredirect, Path(folder))
    print(f"{options.python}, {version}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    print(table(results, "other checkout" if options.against else "usbredirect"))
    write_rows(options.rows, table_rows(results))


if __name__ == "__main__":
    main()
