"""The throw-away guest: a small Linux in QEMU, made of this machine's packages, gone without a trace afterwards.

::

    config = GuestConfig(ports=(SpicePort(), SpicePort(), TcpPort()))
    async with QemuGuest(config) as guest:
        await guest.booted()
        ...  # plug a device into guest.targets[0]
        print((await guest.run("cat /proc/partitions")).output)

QEMU's descriptors, sockets and files are private to the guest. QEMU dies with the thread that started the guest,
however that ends, and everything else goes with the ``async with`` block. An exception that leaves the block, such as
that of a failed assertion, gets the last lines of the guest's console as a note.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from farplug.errors import FarplugError, GuestGoneError, Reason, SetupError, UsageError
from farplug.programs import QEMU, find_program, output_of
from farplug.vm.agent import CHANNELS, INIT_FILES, MACHINE_FILES, Agent, CommandFailed, CommandResult, GuestTimeout
from farplug.vm.certificates import write_certificates
from farplug.vm.guest_image import build_initramfs
from farplug.vm.guest_kernel import fetch_kernel
from farplug.vm.qemu_config import (
    LOOPBACK,
    Boot,
    GuestConfig,
    Resources,
    Spice,
    SpiceAddress,
    SpiceTransport,
    TcpClientPort,
    TcpPort,
    UnixPort,
    UsbPort,
    command_line,
)
from farplug.vm.qmp import Qmp

SPICE_PORT_ATTEMPTS = 5
"""SPICE takes no listening descriptor: somebody may take the port between our choice and QEMU's."""

STOP_TIMEOUT = 3.0
"""Seconds that QEMU has to end by itself before it is killed."""

CONSOLE_TAIL = 2000
"""Characters of the console that an exception shows."""
_CONSOLE_ENDS = "the guest's console ends:"

OVMF_FILES = (("OVMF_CODE_4M.fd", "OVMF_VARS_4M.fd"), ("OVMF_CODE.fd", "OVMF_VARS.fd"))
OVMF_FOLDER = Path("/usr/share/OVMF")

_SOCKET_PATH_ROOM = 60
"""Longest folder name that leaves room for the sockets in it: a UNIX socket's path has at most 107 bytes."""

_MISSING_PACKAGE = re.compile(r"do you want to install (\S+) package")
_MISSING_PART = re.compile(r"'(?:usb-redir|spicevmc)' is not a valid|no option group 'spice'|-spice: invalid option")


class GuestCrashed(GuestGoneError):
    """QEMU ended by itself. What it wrote to its standard error stands in the message."""


class QemuGuest:
    """A throw-away guest. Used with ``async with``, on one event loop.

    Attributes:
        config: what it is made of.
        qmp: QEMU's monitor.
        boot_seconds: from QEMU's start to the first command's end, once :meth:`booted` returned.
    """

    def __init__(self, config: GuestConfig | None = None) -> None:
        self.config = config or GuestConfig()
        self.qmp = Qmp()
        self.boot_seconds: float | None = None
        self._agent = Agent()
        self._process: asyncio.subprocess.Process | None = None
        self._folder: Path | None = None
        self._started = 0.0
        self._targets: tuple[str, ...] = ()
        self._spice: SpiceAddress | None = None
        self._kept = {"console": "", "firmware": "", "stderr": ""}

    async def __aenter__(self) -> Self:
        """Start QEMU. The guest boots then, or stands still if it is ``paused``.

        Raises:
            SetupError: a program, a package or a file is missing on this machine.
            GuestCrashed: QEMU does not take this configuration.
        """
        try:
            await self._start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
        if isinstance(error, Exception):
            self._note_console(error)

    # --- what it is ---------------------------------------------------------------------------------------------------

    @property
    def targets(self) -> tuple[str, ...]:
        """Where each port of the configuration is reached. Channels of one SPICE server share their target."""
        return self._targets

    @property
    def spice(self) -> SpiceAddress:
        """Where its SPICE server listens.

        Raises:
            UsageError: it has none.
        """
        if self._spice is None:
            raise UsageError("this guest has no SPICE server", reason=Reason.BAD_OPTION)
        return self._spice

    @property
    def pid(self) -> int:
        """QEMU's process id; 0 before it starts."""
        return self._process.pid if self._process is not None else 0

    @property
    def alive(self) -> bool:
        """Whether QEMU runs."""
        return self._process is not None and self._process.returncode is None

    @property
    def console(self) -> str:
        """All that came out of the first serial line: the kernel's messages, or the firmware's console."""
        return self._read("console")

    @property
    def firmware_log(self) -> str:
        """The firmware's debug messages (firmware boots only)."""
        return self._read("firmware")

    @property
    def stderr(self) -> str:
        """What QEMU wrote to its standard output and standard error."""
        return self._read("stderr")

    # --- what it does -------------------------------------------------------------------------------------------------

    async def booted(self, timeout: float = 60) -> None:
        """Wait until commands can run; all modules are loaded then.

        Raises:
            GuestTimeout: it did not boot within ``timeout`` seconds.
            GuestCrashed: QEMU ended.
        """
        await self.run(":", timeout=timeout)
        if self.boot_seconds is None:
            self.boot_seconds = time.monotonic() - self._started

    async def run(self, command: str, *, stdin: bytes = b"", timeout: float = 30) -> CommandResult:
        """Run a script with the guest's ``sh`` (busybox, as root), and return all that it wrote.

        Up to eight run side by side. One whose time is over goes on in the guest, without disturbing the others.

        Raises:
            GuestTimeout: it did not end within ``timeout`` seconds.
            GuestCrashed: QEMU ended.
        """
        if self.config.boot is not Boot.KERNEL:
            raise UsageError(
                f"a guest that boots from its {self.config.boot} runs no commands", reason=Reason.BAD_OPTION
            )
        try:
            return await self._agent.run(command, stdin=stdin, timeout=timeout)
        except GuestTimeout as error:
            self._note_console(error)
            raise
        except GuestGoneError as error:
            raise await self._crashed() from error

    async def check(self, command: str, *, stdin: bytes = b"", timeout: float = 30) -> str:
        """Run a command that must succeed, and return its output.

        Raises:
            CommandFailed: its exit code is not 0.
            GuestTimeout: it did not end within ``timeout`` seconds.
            GuestCrashed: QEMU ended.
        """
        result = await self.run(command, stdin=stdin, timeout=timeout)
        if result.exit_code != 0:
            raise CommandFailed(command, result)
        return result.output

    async def wait_for_console(self, text: str, timeout: float = 60) -> None:
        """Wait until the console, or the firmware's debug log, shows a text.

        Raises:
            GuestTimeout: it did not within ``timeout`` seconds.
            GuestCrashed: QEMU ended.
        """
        deadline = time.monotonic() + timeout
        while text not in self.console and text not in self.firmware_log:
            if not self.alive:
                raise await self._crashed()
            if time.monotonic() > deadline:
                error = GuestTimeout(f"the guest's console did not show {text!r} within {timeout:g} s")
                self._note_console(error)
                raise error
            await asyncio.sleep(0.05)

    async def close(self) -> None:
        """Stop QEMU and remove everything; the console and the like stay readable. Does nothing the second time."""
        await self._stop()
        if self._folder is not None:
            self._kept = {name: self._read(name) for name in self._kept}
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    # --- starting -----------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        config = self.config
        find_program(QEMU)
        find_program("setpriv")
        self._folder = private_folder()
        kernel, initramfs, firmware, version = None, b"", None, (0, 0)
        if config.boot is Boot.KERNEL:
            kernel = await asyncio.to_thread(fetch_kernel)
            initramfs = await asyncio.to_thread(
                build_initramfs,
                kernel,
                init_files=INIT_FILES | (MACHINE_FILES if config.machine else {}),
                modules=config.boot_modules,
                programs=config.programs,
                python=config.python,
                files=config.files,
            )
        elif config.boot is Boot.UEFI:
            firmware = copy_firmware(self._folder)
        if any(isinstance(port, TcpClientPort) for port in config.ports):
            version = await asyncio.to_thread(qemu_version)
        for attempt in range(1, SPICE_PORT_ATTEMPTS + 1):
            self._spice = self._spice_address(config.spice_server) if config.spice_server else None
            try:
                await self._launch(
                    kernel=kernel.image if kernel else None, initramfs=initramfs, firmware=firmware, version=version
                )
            except GuestCrashed:
                await self._stop()
                if attempt == SPICE_PORT_ATTEMPTS or not port_was_taken(self.stderr):
                    raise setup_problem(self.stderr) or await self._crashed() from None
            else:
                return

    async def _launch(
        self, *, kernel: Path | None, initramfs: bytes, firmware: tuple[Path, Path] | None, version: tuple[int, int]
    ) -> None:
        """Start QEMU once, and connect to its monitor and to the agent's channels."""
        assert self._folder is not None
        self._agent, self.qmp = Agent(), Qmp()
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
            pairs = [socket.socketpair() for _ in range(1 + (CHANNELS if kernel else 0))]
            for mine, other in pairs:
                ours.enter_context(mine)
                theirs.enter_context(other)
            listeners: dict[int, socket.socket] = {}
            for index, port in enumerate(self.config.ports):
                if isinstance(port, TcpPort):
                    listeners[index] = theirs.enter_context(socket.create_server((LOOPBACK, 0)))
            if kernel is not None:
                image = theirs.enter_context(os.fdopen(os.memfd_create("initramfs"), "wb", buffering=0))
                image.write(initramfs)
            resources = Resources(
                folder=self._folder,
                monitor=pairs[0][1].fileno(),
                channels=tuple(other.fileno() for _, other in pairs[1:]),
                listeners={index: listener.fileno() for index, listener in listeners.items()},
                kernel=kernel,
                initramfs=image.fileno() if kernel else None,
                spice=self._spice,
                firmware=firmware,
                qemu_version=version,
            )
            descriptors = [resources.monitor, *resources.channels, *resources.listeners.values()]
            if resources.initramfs is not None:
                descriptors.append(resources.initramfs)
            self._targets = tuple(
                self._target(index, port, listeners, resources) for index, port in enumerate(self.config.ports)
            )
            with (self._folder / "stderr").open("wb") as output:
                self._started = time.monotonic()
                # setpriv: the kernel kills QEMU when the thread that started it ends, even by SIGKILL.
                self._process = await asyncio.create_subprocess_exec(
                    *(str(find_program("setpriv")), "--pdeathsig", "KILL", "--"),
                    *(str(find_program(QEMU)), *command_line(self.config, resources)),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=descriptors,
                    start_new_session=True,
                )
            ours.pop_all()
        await self._agent.connect([mine for mine, _ in pairs[1:]])
        try:
            await self.qmp.connect(pairs[0][0])
        except GuestGoneError as error:
            raise await self._crashed() from error

    def _spice_address(self, server: Spice) -> SpiceAddress:
        assert self._folder is not None
        (self._folder / "ticket").write_text(server.ticket)
        if server.transport is SpiceTransport.UNIX:
            return SpiceAddress(socket=self._folder / "spice", ticket=server.ticket)
        if server.transport is SpiceTransport.TCP:
            return SpiceAddress(port=unused_port(), ticket=server.ticket)
        return SpiceAddress(
            port=unused_port() if server.transport is SpiceTransport.TLS_REQUIRED else None,
            tls_port=unused_port(),
            ticket=server.ticket,
            host_subject=write_certificates(self._folder, server.host_names),
            ca_file=self._folder / "ca-cert.pem",
        )

    def _target(self, index: int, port: UsbPort, listeners: dict[int, socket.socket], resources: Resources) -> str:
        match port:
            case TcpPort():
                return f"tcp://{LOOPBACK}:{listeners[index].getsockname()[1]}"
            case UnixPort():
                return f"unix:{resources.port_socket(index)}"
            case TcpClientPort():
                return f"tcp-listen://{port.host}:{port.port}"
            case _:
                return self.spice.target

    # --- ending -------------------------------------------------------------------------------------------------------

    async def _stop(self) -> None:
        process = self._process
        if process is not None and process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(STOP_TIMEOUT):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
        await self._agent.close()
        await self.qmp.close()

    async def _crashed(self) -> FarplugError:
        """What to raise when a connection to QEMU closed by itself."""
        if self._process is None:
            return GuestGoneError("the guest was not started")
        try:
            async with asyncio.timeout(STOP_TIMEOUT):
                code = await self._process.wait()
        except TimeoutError:
            return GuestGoneError("QEMU runs, but closed the connection")
        error = GuestCrashed(f"QEMU {describe_exit(code)}: {self.stderr.strip()[-1000:] or 'without a message'}")
        self._note_console(error)
        return error

    def _note_console(self, error: Exception) -> None:
        """Add the last lines of the console to an exception, once."""
        console = self.console.rstrip()
        tail = console[-CONSOLE_TAIL:]
        if len(console) > CONSOLE_TAIL:
            tail = tail.partition("\n")[2]  # whole lines
        if not any(note.startswith(_CONSOLE_ENDS) for note in getattr(error, "__notes__", ())):
            error.add_note(f"{_CONSOLE_ENDS}\n{tail or '(it is empty)'}")

    def _read(self, name: str) -> str:
        if self._folder is None:
            return self._kept[name]
        try:
            return (self._folder / name).read_bytes().decode(errors="replace").replace("\r\n", "\n")
        except FileNotFoundError:
            return ""


def describe_exit(code: int) -> str:
    """How a process ended, by its return code."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def port_was_taken(stderr: str) -> bool:
    """Whether QEMU did not start because somebody else listens on the SPICE port."""
    return "in use" in stderr or "failed to initialize spice server" in stderr


def setup_problem(stderr: str) -> SetupError | None:
    """What is missing on this machine, by what a QEMU that did not start wrote; None if something else is wrong."""
    package = _MISSING_PACKAGE.search(stderr)
    if package is None and not _MISSING_PART.search(stderr):
        return None
    packages = package[1] if package else "qemu-system-x86 qemu-system-modules-spice"
    return SetupError(
        f"QEMU lacks a part: {stderr.strip().splitlines()[-1]}",
        reason=Reason.MISSING_PROGRAM,
        remedy=f"sudo apt-get install {packages}",
    )


def private_folder() -> Path:
    """A new folder that only we may enter, with a name short enough for sockets in it."""
    base = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="farplug-", dir=base if len(base) <= _SOCKET_PATH_ROOM else "/tmp"))


def unused_port() -> int:
    """A TCP port of the loopback address that nobody listens on now."""
    with socket.create_server((LOOPBACK, 0)) as probe:
        return int(probe.getsockname()[1])


def qemu_version() -> tuple[int, int]:
    """QEMU's major and minor version."""
    output = output_of(str(find_program(QEMU)), "--version") or ""
    match = re.search(r"version (\d+)\.(\d+)", output)
    if match is None:
        raise SetupError(f"{QEMU} --version says {output[:80]!r}", reason=Reason.MISSING_PROGRAM)
    return int(match[1]), int(match[2])


def copy_firmware(folder: Path) -> tuple[Path, Path]:
    """OVMF's code, and a private copy of its variables.

    Raises:
        SetupError: OVMF is not installed.
    """
    for code, variables in OVMF_FILES:
        if (OVMF_FOLDER / code).exists() and (OVMF_FOLDER / variables).exists():
            return OVMF_FOLDER / code, Path(shutil.copy(OVMF_FOLDER / variables, folder / "variables"))
    raise SetupError(
        f"no {' or '.join(code for code, _ in OVMF_FILES)} in {OVMF_FOLDER}",
        reason=Reason.MISSING_PROGRAM,
        remedy="sudo apt-get install ovmf",
    )
