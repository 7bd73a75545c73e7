"""Measure what one command of a disk costs farplug, without QEMU: CPU time, system calls, turns of the event loop.

A minimal guest at one end of a socketpair sends the commands of a Linux guest: READ(10) and WRITE(10) of 4 KiB and 512
KiB over USB Attached SCSI (with streams; Linux makes two commands of a megabyte), of 4 KiB and 1 MiB over Bulk-Only
Transport, in usbredir's own framing (``unix``) and in that of a SPICE channel (``spice``). At the other end a process
(``bench/served_disk.py``) has the real engine and a disk in a file that the page cache holds. At depth 16 the guest
sends 16 commands at once and waits for all of them, so that batches do not depend on how the system schedules the
processes.

The processor time is that of farplug's process. Other programs change it less than the time on the clock, but do change
it: the figure is the minimum of all rounds. ``--against TREE`` measures another checkout in turns with this one; the
ratio is the median over the rounds, and above 1 this tree needs less. System calls are counted with strace in separate
runs; a turn of the event loop is one epoll_wait.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from farplug.usb.transfer import Status
from farplug.usbredir import Connection, Role, packets
from rows import Row, add_rows_option, write_rows

KIB, MIB = 2**10, 2**20
VMC_MESSAGE = 64 * KIB + 32
"""Bytes of the stream in one message of QEMU's SPICE server, at most (BUF_SIZE in spicevmc.cpp)."""
IMAGE_SIZE = 64 * MIB
TREE = Path(__file__).parents[1]
SERVER = Path(__file__).with_name("served_disk.py")
SYSTEM_PYTHON = "/usr/bin/python3"
"""The distribution's Python, which most users have. It is built with profile-guided optimization; others may not be."""

VMC_DATA = 101
BULK = 101
VMC_HEADER, HEADER, BULK_HEADER = struct.Struct("<HI"), struct.Struct("<IIQ"), struct.Struct("<BBHIH")
BULK_SIZE = HEADER.size + BULK_HEADER.size
COMMAND_PIPE, STATUS_PIPE, DATA_IN, DATA_OUT = 0x04, 0x83, 0x81, 0x02
STREAMS = 16
SENSE_STATUS = 6
"""The offset of the SCSI status in a SENSE IU."""
CSW_STATUS = 12
"""The offset of the status in a command status wrapper."""


def command_text(size: int, *, write: bool) -> str:
    """Return what a command does, as text: ``4 KiB read``."""
    count = f"{size // KIB} KiB" if size < MIB else f"{size // MIB} MiB"
    return f"{count} {'write' if write else 'read'}"


@dataclass(frozen=True, slots=True)
class Case:
    """A kind of command.

    Attributes:
        framing: ``unix`` or ``spice``.
        storage: ``uas`` or ``bot``.
        size: bytes of one command.
        write: it is a WRITE.
        depth: commands that the guest sends at once.
    """

    framing: str
    storage: str
    size: int
    write: bool
    depth: int

    @property
    def count(self) -> int:
        """Return how many commands one measurement has."""
        return 480 if self.size == 4 * KIB else 32

    def __str__(self) -> str:
        return f"{self.framing} {self.storage} {command_text(self.size, write=self.write)}, depth {self.depth}"


LOADS = [
    ("uas", 4 * KIB, (1, 16)),
    ("uas", 512 * KIB, (2, 16)),
    ("bot", 4 * KIB, (1,)),
    ("bot", MIB, (1,)),
]
"""Storage transports, the sizes of their commands, and how many of them are sent at once."""
CASES = [
    Case(framing, storage, size, write, depth)
    for framing in ("unix", "spice")
    for storage, size, depths in LOADS
    for write in (False, True)
    for depth in depths
]


class Guest:
    """The guest's end of the socketpair.

    Args:
        sock: connected, blocking.
        case: a case with the framing and the storage transport; :meth:`run` takes the rest.
    """

    def __init__(self, sock: socket.socket, case: Case) -> None:
        self._sock = sock
        self._spice = case.framing == "spice"
        self._uas = case.storage == "uas"
        self._received = memoryview(bytearray(2 * MIB))
        self._buffer = bytearray()
        self._in_message = 0
        self._seed = 1
        self._noise = os.urandom(MIB)
        self._enumerate()

    # --- set up, with the parser of farplug ---------------------------------------------------------------------------

    def _enumerate(self) -> None:
        connection = Connection(Role.GUEST)
        connection.start()

        def wait(kind: type[packets.Packet]) -> None:
            for buffer in connection.data_to_send():
                self._write(bytes(buffer))
            while True:
                while (event := connection.next_event()) is not None:
                    if type(event) is kind:
                        return
                self._fill()
                connection.receive_data(bytes(self._buffer))
                self._buffer.clear()

        wait(packets.DeviceConnect)
        connection.send(packets.SetConfiguration(id=1, configuration=1))
        wait(packets.ConfigurationStatus)
        if self._uas:
            connection.send(packets.SetAltSetting(id=2, interface=0, alt=1))
            wait(packets.AltSettingStatus)
            mask = 1 << 16 + (STATUS_PIPE & 15) | 1 << 16 + (DATA_IN & 15) | 1 << DATA_OUT
            connection.send(packets.AllocBulkStreams(id=3, endpoints=mask, streams=STREAMS))
            wait(packets.BulkStreamsStatus)
        while not self._test_unit_ready():
            pass

    def _test_unit_ready(self) -> bool:
        if self._uas:
            self._write(self._bulk(1, STATUS_PIPE, 1, length=64), self._iu(1, bytes(6)))
            return self._uas_end() is None
        return self._bot(bytes(6), 0, write=False)

    # --- commands -----------------------------------------------------------------------------------------------------

    def run(self, case: Case, count: int) -> None:
        """Send ``count`` commands, and check that each succeeds.

        Raises:
            RuntimeError: a command failed.
        """
        size, write = case.size, case.write
        for _ in range(count // case.depth):
            if not self._uas:
                if not self._bot(self._cdb(size, write), size, write=write):
                    raise RuntimeError(f"{case}: a command failed")
                continue
            for tag in range(1, case.depth + 1):
                data = (
                    self._bulk(4 * tag + 1, DATA_OUT, tag, data=self._noise[:size])
                    if write
                    else self._bulk(4 * tag + 1, DATA_IN, tag, length=size)
                )
                iu = self._iu(tag, self._cdb(size, write))
                self._write(self._bulk(4 * tag, STATUS_PIPE, tag, length=64), data, iu)
            for _ in range(case.depth):
                if (failed := self._uas_end()) is not None:
                    raise RuntimeError(f"{case}: a command failed: {failed.hex()}")

    def _cdb(self, size: int, write: bool) -> bytes:
        self._seed = self._seed * 6364136223846793005 + 1442695040888963407 & (1 << 64) - 1
        blocks = size // 512
        lba = (self._seed >> 33) % (IMAGE_SIZE // size) * blocks
        return struct.pack(">BBIBHB", 0x2A if write else 0x28, 0, lba, 0, blocks, 0)

    def _iu(self, tag: int, cdb: bytes) -> bytes:
        return self._bulk(4 * tag + 2, COMMAND_PIPE, 0, data=struct.pack(">BxHBxBx8s16s", 1, tag, 0, 0, bytes(8), cdb))

    @staticmethod
    def _bulk(id: int, endpoint: int, stream: int, *, length: int = 0, data: bytes = b"") -> bytes:
        length = length or len(data)
        head = HEADER.pack(BULK, BULK_HEADER.size + len(data), id)
        return head + BULK_HEADER.pack(endpoint, 0, length & 0xFFFF, stream, length >> 16) + data

    def _uas_end(self) -> bytes | None:
        """Receive until a SENSE IU. Return it if the command failed."""
        while True:
            endpoint, data = self._answer()
            if endpoint == STATUS_PIPE:
                return data if data[SENSE_STATUS] else None

    def _bot(self, cdb: bytes, size: int, *, write: bool) -> bool:
        """Execute a command over Bulk-Only Transport, with a transfer at a time as Linux does."""
        flags = 0x00 if write else 0x80
        self._write(self._bulk(1, 0x02, 0, data=struct.pack("<4sIIBBB16s", b"USBC", 1, size, flags, 0, len(cdb), cdb)))
        self._answer()
        if size:
            data = self._noise[:size]
            self._write(self._bulk(2, 0x02, 0, data=data) if write else self._bulk(2, 0x81, 0, length=size))
            self._answer()
        self._write(self._bulk(3, 0x81, 0, length=13))
        return self._answer()[1][CSW_STATUS] == 0

    # --- bytes --------------------------------------------------------------------------------------------------------

    def _write(self, *parts: bytes) -> None:
        """Write packets with one call; with SPICE each is a message of its own, or several, as QEMU's server has it."""
        if self._spice:
            pieces = (part[at : at + VMC_MESSAGE] for part in parts for at in range(0, len(part), VMC_MESSAGE))
            parts = tuple(VMC_HEADER.pack(VMC_DATA, len(piece)) + piece for piece in pieces)
        self._sock.sendall(b"".join(parts))

    def _answer(self) -> tuple[int, bytes]:
        """Receive packets until the answer of a bulk transfer. Return its endpoint and its first 64 bytes of data."""
        while True:
            kind, length, _ = HEADER.unpack(self._take(HEADER.size))
            if kind != BULK:
                self._take(length)
                continue
            endpoint, status, *_ = BULK_HEADER.unpack(self._take(BULK_HEADER.size))
            if status != Status.SUCCESS:
                raise RuntimeError(f"a transfer on endpoint {endpoint:02x} ended with status {status}")
            return endpoint, self._take(length - BULK_HEADER.size)

    def _take(self, size: int) -> bytes:
        buffer = self._buffer
        while len(buffer) < size:
            self._fill()
        data = bytes(buffer[:64] if size > 64 else buffer[:size])
        del buffer[:size]
        return data

    def _fill(self) -> None:
        """Receive what there is, without the headers of SPICE messages."""
        count = self._sock.recv_into(self._received)
        if not count:
            raise RuntimeError("farplug's process has ended")
        data = self._received[:count]
        if not self._spice:
            self._buffer += data
            return
        while data:
            if not self._in_message:
                head = bytes(data[: VMC_HEADER.size])
                while len(head) < VMC_HEADER.size:  # rare: a header that was cut
                    head += self._sock.recv(VMC_HEADER.size - len(head))
                kind, self._in_message = VMC_HEADER.unpack(head)
                assert kind == VMC_DATA, kind
                data = data[VMC_HEADER.size :]
                continue
            part = data[: self._in_message]
            self._buffer += part
            self._in_message -= len(part)
            data = data[len(part) :]


class Served:
    """A process of farplug with a disk, and its guest.

    Args:
        tree: a checkout of farplug.
        case: framing and storage transport.
        image: the file of the disk.
        python: the interpreter.
        prefix: a command that runs the process.
    """

    def __init__(self, tree: Path, case: Case, image: Path, python: str, prefix: Sequence[str] = ()) -> None:
        ours, theirs = socket.socketpair()
        path = os.pathsep.join((str(tree / "src"), sysconfig.get_path("purelib")))
        with theirs:
            arguments = [str(SERVER), str(theirs.fileno()), case.framing, case.storage, str(image)]
            environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"}
            self._process = subprocess.Popen([*prefix, python, *arguments], pass_fds=[theirs.fileno()], env=environment)
        self._socket = ours
        try:
            self.guest = Guest(ours, case)
        except BaseException:
            self.close()
            raise
        self._clock = ~self._process.pid << 3 | 2  # clock_getcpuclockid(3)

    def microseconds(self, case: Case) -> float:
        """Return the processor time of one command."""
        before = time.clock_gettime(self._clock)
        self.guest.run(case, case.count)
        return (time.clock_gettime(self._clock) - before) / case.count * 1e6

    def close(self) -> None:
        """End the guest, and wait for the process."""
        self._socket.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def served(*arguments: object, **options: object) -> Iterator[Served]:
    """Return a process of farplug for the time of a block; see :class:`Served`."""
    process = Served(*arguments, **options)  # type: ignore[arg-type]
    try:
        yield process
    finally:
        process.close()


@dataclass(slots=True)
class Result:
    """What was measured of one case.

    Attributes:
        ours: microseconds of processor time of a command, by round.
        theirs: those of the other tree.
        calls: system calls of a command; None: not counted.
        turns: turns of the event loop.
    """

    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    calls: float | None = None
    turns: float | None = None

    @property
    def ratio(self) -> float:
        """Return how much less this tree needs than the other: above 1 is better."""
        return statistics.median(theirs / ours for ours, theirs in zip(self.ours, self.theirs, strict=True))


def count_calls(case: Case, image: Path, python: str) -> tuple[float, float]:
    """Return the system calls, and the turns of the event loop, of one command."""
    totals = []
    more = case.count
    for count in (case.depth, case.depth + more):
        with tempfile.NamedTemporaryFile("r") as file:
            with served(TREE, case, image, python, ("strace", "-f", "-qq", "-c", "-o", file.name)) as process:
                process.guest.run(case, count)
            # % time, seconds, usecs/call, calls, errors (if there are any), syscall
            rows = [line.split() for line in file if line[:6].strip()[:1].isdigit()]
            counts = {row[-1]: int(row[3]) for row in rows}
        totals.append((counts["total"], counts["epoll_wait"]))
    (few_calls, few_turns), (many_calls, many_turns) = totals
    return (many_calls - few_calls) / more, (many_turns - few_turns) / more


def measure(cases: Sequence[Case], options: argparse.Namespace, folder: Path) -> dict[Case, Result]:
    """Measure the cases in rounds; each round has new processes."""
    trees = [TREE, *([options.against] if options.against else [])]
    images = [folder / f"{number}.raw" for number in range(len(trees))]
    for image in images:
        image.write_bytes(os.urandom(IMAGE_SIZE))
    results = {case: Result() for case in cases}
    for _ in range(options.rounds):
        for pair in dict.fromkeys((case.framing, case.storage) for case in cases):
            some = [case for case in cases if (case.framing, case.storage) == pair]
            with ExitStack() as stack:
                processes = [
                    stack.enter_context(served(tree, some[0], image, options.python))
                    for tree, image in zip(trees, images, strict=True)
                ]
                for case in some:
                    for process in processes:
                        process.guest.run(case, case.depth)
                    for _ in range(options.slices):
                        for process, values in zip(processes, (results[case].ours, results[case].theirs), strict=False):
                            values.append(process.microseconds(case))
    if options.calls:
        for case in cases:
            results[case].calls, results[case].turns = count_calls(case, images[0], options.python)
    return results


def table(results: dict[Case, Result]) -> str:
    """Return the results as text."""
    compared = any(result.theirs for result in results.values())
    lines = [
        f"{'one command':36}{'CPU, µs':>10}{'calls':>8}{'turns':>8}"
        + (f"{'other':>10}{'ratio':>8}" if compared else "")
    ]
    for case, result in results.items():
        calls = "".join(f"{'-' if value is None else f'{value:.2f}':>8}" for value in (result.calls, result.turns))
        other = f"{min(result.theirs):10.1f}{result.ratio:8.2f}" if compared else ""
        lines.append(f"{case!s:36}{min(result.ours):10.1f}{calls}{other}")
    return "\n".join(lines)


def default_python() -> str:
    """Return the distribution's Python if farplug runs with it, otherwise this one."""
    path = os.pathsep.join((str(TREE / "src"), sysconfig.get_path("purelib")))
    try:
        command = [SYSTEM_PYTHON, "-c", "import farplug.transport.spice_port"]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": path})
    except (OSError, subprocess.CalledProcessError):
        return sys.executable
    return SYSTEM_PYTHON


def main() -> None:
    """Measure, and print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, metavar="TREE", help="compare with another checkout of farplug")
    parser.add_argument("--case", metavar="REGEX", default="", help="measure the cases whose names match")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, each with new processes (default: %(default)s)")
    parser.add_argument(
        "--slices", type=int, default=5, help="measurements of a case in a round (default: %(default)s)"
    )
    parser.add_argument("--no-calls", dest="calls", action="store_false", help="do not count system calls")
    parser.add_argument("--python", default=default_python(), help="the interpreter to measure (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    add_rows_option(parser)
    options = parser.parse_args()
    if options.calls and shutil.which("strace") is None:
        print("strace is not installed: system calls are not counted")
        options.calls = False
    cases = [case for case in CASES if re.search(options.case, str(case))]
    version = subprocess.run([options.python, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory(prefix="farplug-bench-", dir="/var/tmp") as folder:
        results = measure(cases, options, Path(folder))
    print(f"{options.python}, {version}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    print(table(results))
    part = "what a command of a disk costs, without QEMU"
    write_rows(
        options.rows, [Row(part, str(case), f"{min(result.ours):.0f} µs CPU") for case, result in results.items()]
    )
    if options.json:
        figures = {
            str(case): {"us": min(result.ours), "calls": result.calls, "turns": result.turns}
            for case, result in results.items()
        }
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
