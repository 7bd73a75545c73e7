"""Two guests for the tests of real devices: the near guest has them, and redirects them to the far guest.

The near guest is a machine with real USB devices: emulated by QEMU, and gadgets on dummy_hcd. It runs on this machine's
filesystem, so farplug runs in it from this checkout. The far guest is the usual throw-away guest with usb-redir ports,
which the near guest reaches through its network.
"""

from __future__ import annotations

import asyncio
import atexit
import itertools
import json
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
from tests.guest.plugging import GUEST_TIMEOUT, NO_SCAN_DELAY, SCRIPTS, until, usb_folder_by_name

import farplug
from farplug.testing import GATEWAY, GuestConfig, QemuGuest, SpicePort, TcpPort
from farplug.vm.qemu_config import LOOPBACK

DRIVERS = (
    "cdc_acm",
    "cdc_ether",
    "cdc_ncm",
    "evdev",
    "ftdi_sio",
    "hid_generic",
    "rndis_host",
    "snd_usb_audio",
    "usbhid",
)
"""Drivers for the devices in both guests, which do not load drivers by themselves."""

SPEAKER = Path(tempfile.mkdtemp(prefix="farplug-speaker-")) / "speaker.wav"
"""The output of a usb-audio of the near guest: 48,000 frames per second of two 16-bit samples."""
atexit.register(shutil.rmtree, SPEAKER.parent, ignore_errors=True)
WAV_HEADER = 44
"""Bytes before the samples."""

REAL_DEVICES = GuestConfig(
    machine=True,
    network=True,
    memory=768,
    modules=DRIVERS,
    kernel_arguments=(*NO_SCAN_DELAY, "dummy_hcd.is_super_speed=1"),
    extra_arguments=("-audiodev", f"wav,id=speaker,path={SPEAKER},out.frequency=48000"),
)
"""The near guest. Devices come and go by QMP (:meth:`Machine.device`)."""

FUNCTION_MODULES = {"SourceSink": "ss_lb", "Loopback": "ss_lb"}
"""Modules of gadget functions whose names differ from the functions."""

FAR = GuestConfig(
    ports=(*(TcpPort(),) * 6, *(SpicePort(),) * 8),
    memory=512,
    modules=DRIVERS,
    programs=("aplay", "usbreset"),
    python=True,
    files=tuple((f"/scripts/{path.name}", path) for path in sorted(SCRIPTS.glob("*.py"))),
    kernel_arguments=NO_SCAN_DELAY,
)
"""The far guest."""

PYTHON = (
    f"PYTHONPATH={Path(farplug.__file__).parents[1]}:{Path(__file__).parents[2]} PYTHONUNBUFFERED=1 {sys.executable}"
)
FARPLUG = f"{PYTHON} -c 'from farplug.cli.main import main; main()'"

_numbers = itertools.count(1)


def from_inside(target: str) -> str:
    """Return a target on this machine as the target for a guest with a network."""
    return target.replace(LOOPBACK, GATEWAY)


class Job:
    """A command that runs in a guest."""

    def __init__(self, guest: QemuGuest, task: asyncio.Task[int], name: str) -> None:
        self._guest = guest
        self._task = task
        self._name = name

    async def data(self) -> bytes:
        """Return the output so far."""
        return (await self._guest.run(f"cat {self._name}.out 2>/dev/null")).data

    async def output(self) -> str:
        """Return the output so far, as text."""
        return (await self.data()).decode(errors="replace")

    async def until(self, text: str, times: int = 1) -> str:
        """Wait until the output contains a text ``times`` times, and return the output.

        Raises:
            AssertionError: the command ended before.
            CommandFailed: the text did not appear in time.
        """
        setup = f"exec 3<{self._name}.out; text={shlex.quote(text)} count=0 line="
        # Commands of the shell only, and each line read once: this waits for programs that need the processor.
        condition = f"""{{
            kill -0 {await self.pid()} 2>/dev/null && over= || over=yes
            while IFS= read -r part <&3; do
                line=$line$part
                while [ "${{line#*"$text"}}" != "$line" ]; do count=$((count + 1)) line=${{line#*"$text"}}; done
                line=
            done
            line=$line$part
            [ "${{line#*"$text"}}" = "$line" ] || [ $((count + 1)) -lt {times} ] || over=yes
            [ -n "$over" ] || [ $count -ge {times} ]
        }}"""
        await until(self._guest, condition, setup=setup)
        output = await self.output()
        assert output.count(text) >= times, f"no {text!r} in the output of a command that ended: {output}"
        return output

    async def pid(self) -> int:
        """Return the process id in the guest."""
        return int(
            await self._guest.check(f"until busybox cat {self._name}.pid 2>/dev/null; do busybox sleep 0.05; done")
        )

    async def opened(self, node: str) -> None:
        """Wait until the command has opened a file."""
        script = f"until ls -l /proc/{await self.pid()}/fd | grep -q {node}; do busybox sleep 0.05; done"
        await self._guest.check(script)

    async def kill(self, signal: str = "INT") -> None:
        """Send a signal, without waiting for the end."""
        await self._guest.check(f"kill -{signal} {await self.pid()}")

    async def end(self) -> tuple[int, str]:
        """Wait for the end, and return the exit code and the output."""
        async with asyncio.timeout(GUEST_TIMEOUT):
            code = await asyncio.shield(self._task)
        return code, await self.output()


@asynccontextmanager
async def running(guest: QemuGuest, command: str) -> AsyncIterator[Job]:
    """Start a command in a guest; at the end interrupt it, and kill it if it does not end."""
    name = f"/run/job{next(_numbers)}"
    script = f": >{name}.out; echo $$ >{name}.new; mv {name}.new {name}.pid; exec env {command} >{name}.out 2>&1"

    async def run() -> int:
        return (await guest.run(script, timeout=600)).exit_code

    async with _job(guest, name, run()) as job:
        yield job


@asynccontextmanager
async def _job(guest: QemuGuest, name: str, run: Coroutine[Any, Any, int]) -> AsyncIterator[Job]:
    """Run a command, which writes its output to NAME.out and its process id to NAME.pid, for the block."""
    task = asyncio.create_task(run)
    job = Job(guest, task, name)
    try:
        yield job
    finally:
        if not task.done() and guest.alive:
            pid = await job.pid()
            await guest.run(
                f"kill -INT {pid}; timeout 10 sh -c 'while kill -0 {pid}; do sleep 0.1; done' || kill -KILL {pid}"
            )
            async with asyncio.timeout(GUEST_TIMEOUT):
                await asyncio.wait([task])
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class RealDevice:
    """A USB device of the near guest.

    Attributes:
        id: its id in QEMU.
        name: a pattern for its ids and product name (:func:`~tests.guest.plugging.usb_folder_by_name`).
        folder: in the near guest's /sys.
        bus: its bus and device number, ``B-D``.
        node: major and minor number of its node. They are valid during a reset, when Linux shows device number 0.
    """

    id: str
    name: str
    folder: str
    bus: str
    node: str


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()


class Machine:
    """The near guest and its hardware."""

    def __init__(self, guest: QemuGuest) -> None:
        self.guest = guest
        self.qmp = guest.qmp
        self.check = guest.check

    @asynccontextmanager
    async def device(self, driver: str, name: str, **properties: object) -> AsyncIterator[RealDevice]:
        """Plug in a device that QEMU emulates; unplug it at the end if the test has not."""
        real = await self.plug(driver, name, **properties)
        try:
            yield real
        finally:
            if self.guest.alive and real.id in await self.qmp.human("info usb"):
                await self.unplug(real)

    async def plug(self, driver: str, name: str, **properties: object) -> RealDevice:
        """Plug in a device that QEMU emulates, and wait until the kernel has it.

        The property ``drive`` of a usb-uas is the drive of its disk.
        """
        id = f"real{next(_numbers)}"
        arguments = {"driver": driver, "id": id, "bus": "usb.0"}
        if driver == "usb-uas":
            # A hot-plugged usb-uas stays detached until its units are added (QEMU, docs/system/devices/usb.rst).
            await self.qmp.execute("device_add", arguments)
            unit = {"driver": "scsi-hd", "id": f"{id}-unit", "bus": f"{id}.0", **properties}
            await self.qmp.execute("device_add", unit)
            await self.qmp.execute(
                "qom-set", {"path": f"/machine/peripheral/{id}", "property": "attached", "value": True}
            )
        else:
            await self.qmp.execute("device_add", arguments | properties)
        return await self.find(name, id)

    async def find(self, name: str, id: str = "") -> RealDevice:
        """Return a device, once the kernel has it."""
        folder = await usb_folder_by_name(self.guest, name)
        bus, node = (await self.check(f"cat {folder}/busnum {folder}/dev")).split()
        return RealDevice(id, name, folder, f"{bus}-{int(node.partition(':')[2]) % 128 + 1}", node)

    async def unplug(self, real: RealDevice) -> None:
        """Unplug a device, and wait until QEMU and the kernel have removed it."""
        await self.qmp.execute("device_del", {"id": real.id})
        while (await self.qmp.event("DEVICE_DELETED"))["data"].get("device") != real.id:
            pass
        await until(self.guest, f'[ "$(busybox cat {real.folder}/dev 2>/dev/null)" != {real.node} ]')

    async def drivers(self, real: RealDevice) -> dict[str, str]:
        """Return the driver of each interface: empty for none, ``usbfs`` for a program."""
        script = f"""
            for interface in {real.folder}/*:*; do
                echo ${{interface##*:}} $(basename $(readlink $interface/driver) 2>/dev/null)
            done"""
        lines = (await self.check(script)).splitlines()
        return {(words := line.split())[0]: " ".join(words[1:]) for line in lines}

    @asynccontextmanager
    async def gadget(self, ids: str, *configurations: str, setup: str = "") -> AsyncIterator[RealDevice]:
        """Make a gadget on dummy_hcd, a SuperSpeed device (Linux, Documentation/usb/gadget_configfs.rst).

        Args:
            ids: vendor and product, ``vvvv:pppp``.
            configurations: the functions of each configuration, such as ``acm.0 hid.0``.
            setup: commands that set the functions' attributes, run in the folder of functions.
        """
        modules = {
            f"usb_f_{FUNCTION_MODULES.get(kind, kind)}" for kind in re.findall(r"(\w+)\.", " ".join(configurations))
        }
        if (await self.guest.run(f"busybox modprobe -a dummy_hcd {' '.join(modules)}")).exit_code != 0:
            pytest.skip("the kernel of this distribution has no gadgets")
        vendor, product = ids.split(":")
        links = "\n".join(
            f"mkdir configs/c.{number}; for f in {functions}; do ln -s functions/$f configs/c.{number}/; done"
            for number, functions in enumerate(configurations, start=1)
        )
        await self.check(f"""
            set -e
            config=/sys/kernel/config
            mountpoint -q $config || mount -t configfs none $config
            mkdir $config/usb_gadget/gadget
            cd $config/usb_gadget/gadget
            echo 0x{vendor} >idVendor
            echo 0x{product} >idProduct
            mkdir strings/0x409
            echo Gadget >strings/0x409/product
            mkdir {" ".join(f"functions/{function}" for part in configurations for function in part.split())}
            (cd functions; {setup or ":"})
            {links}
            echo dummy_udc.0 >UDC""")
        try:
            yield await self.find(f"{ids} *")
        finally:
            if self.guest.alive:
                await self.check("""
                    cd /sys/kernel/config/usb_gadget/gadget
                    echo >UDC
                    rm configs/*/*.*
                    rmdir configs/* functions/* strings/*
                    cd ..
                    rmdir gadget""")

    @asynccontextmanager
    async def drive(self, image: Path) -> AsyncIterator[str]:
        """Add an image as a block device of QEMU; yield its name."""
        name = f"drive{next(_numbers)}"
        file = {"driver": "file", "filename": str(image)}
        await self.qmp.execute("blockdev-add", {"driver": "raw", "node-name": name, "file": file})
        try:
            yield name
        finally:
            if self.guest.alive:
                await self.qmp.execute("blockdev-del", {"node-name": name})

    @asynccontextmanager
    async def line(self, path: Path) -> AsyncIterator[str]:
        """Add a serial line of QEMU whose peer echoes; yield its name."""
        name = f"line{next(_numbers)}"
        server = await asyncio.start_unix_server(_echo, path)
        try:
            backend = {"addr": {"type": "unix", "data": {"path": str(path)}}, "server": False}
            await self.qmp.execute("chardev-add", {"id": name, "backend": {"type": "socket", "data": backend}})
            yield name
        finally:
            server.close()  # not with "async with": since Python 3.12 its end waits for all connections
            if self.guest.alive:
                await self.qmp.execute("chardev-remove", {"id": name})

    async def type(self, letters: Iterable[str]) -> None:
        """Press and release keys of the keyboard, one after the other."""
        for letter in letters:
            for down in (True, False):
                key = {"down": down, "key": {"type": "qcode", "data": letter}}
                await self.qmp.execute("input-send-event", {"events": [{"type": "key", "data": key}]})

    async def point(self, x: int, y: int) -> None:
        """Move the pointer of the tablet."""
        axes = [{"type": "abs", "data": {"axis": axis, "value": value}} for axis, value in (("x", x), ("y", y))]
        await self.qmp.execute("input-send-event", {"events": axes})

    async def cpu_seconds(self, pid: int) -> float:
        """Return the processor time of all threads of a process, in seconds."""
        lines = await self.check(f"cat /proc/{pid}/task/*/schedstat")
        return sum(int(line.split()[0]) for line in lines.splitlines()) / 1e9


class Plugger:
    """farplug in the near guest, as a library: ``scripts/plugger.py``.

    All tests share one, because Python needs seconds to start there.

    Attributes:
        events: the events since devices were plugged in last: device, kind of event, text.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.events: list[tuple[str, str, str]] = []
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._connected = asyncio.Event()

    @classmethod
    @asynccontextmanager
    async def started(cls, machine: Machine) -> AsyncIterator[Self]:
        """Start the script; it ends with the block."""
        self = cls(machine)
        server = await asyncio.start_server(self._serve, LOOPBACK, 0, limit=1 << 20)
        port = server.sockets[0].getsockname()[1]
        async with running(machine.guest, f"{PYTHON} {SCRIPTS / 'plugger.py'} {GATEWAY} {port}") as job:
            connected = asyncio.ensure_future(self._connected.wait())
            ended = asyncio.ensure_future(job.end())
            try:
                await asyncio.wait((connected, ended), return_when=asyncio.FIRST_COMPLETED)
                assert connected.done(), ended.result()
                yield self
            finally:
                connected.cancel()
                ended.cancel()
                server.close()
                assert self._writer is not None
                self._writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._connected.set()
        while line := await reader.readline():
            number, *rest = json.loads(line)
            if number == "event":
                device, kind, words = rest
                self.events.append((device, kind, words))
            elif len(rest) == 1:
                self._answers.pop(number).set_result(rest[0])
            else:
                self._answers.pop(number).set_exception(AssertionError(rest[1]))

    async def ask(self, method: str, *arguments: object, timeout: float = GUEST_TIMEOUT) -> Any:
        """Call a method of the script, and return its result.

        Raises:
            AssertionError: the method raised an exception.
        """
        assert self._writer is not None
        number = next(_numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        self._writer.write(json.dumps([number, method, *arguments]).encode() + b"\n")
        async with asyncio.timeout(timeout):
            return await answer

    @asynccontextmanager
    async def farplug(self, arguments: str, user: str | None = None) -> AsyncIterator[Job]:
        """Run the command line in the near guest for the block, with the rights of a user or root's.

        The process is a copy of one that has imported farplug, which takes Python seconds there.
        """
        name = f"/run/job{next(_numbers)}"
        run = self.ask("run", name, shlex.split(arguments), user, timeout=600)
        async with _job(self.machine.guest, name, run) as job:
            yield job

    @asynccontextmanager
    async def plugged(self, target: str, *devices: RealDevice) -> AsyncIterator[list[int]]:
        """Plug in devices for the block, wait until the far guest has configured them, and yield their numbers."""
        self.events.clear()
        target = from_inside(target)
        await self.ask("connect", target)
        try:
            numbers = [next(_numbers) for _ in devices]
            plugging = zip(numbers, devices, strict=True)
            await asyncio.gather(*(self.ask("plug", number, target, real.bus) for number, real in plugging))
            yield numbers
        finally:
            await self.ask("leave", target)

    async def happened(self, kind: str, timeout: float = GUEST_TIMEOUT) -> str:
        """Wait for an event of this kind, and return its text."""
        async with asyncio.timeout(timeout):
            while True:
                for _, what, words in self.events:
                    if what == kind:
                        return words
                await asyncio.sleep(0.05)
