"""Run the throw-away guest: a small Linux in QEMU, made of this machine's packages, which leaves nothing behind.

::

    config = GuestConfig(ports=(SpicePort(), SpicePort(), TcpPort()))
    async with QemuGuest(config) as guest:
        await guest.booted()
        ...  # plug a device into guest.targets[0]
        print((await guest.run("cat /proc/partitions")).output)

QEMU's descriptors, sockets and files are private to the guest. The kernel kills QEMU when the thread that started the
guest ends, for whatever reason; the end of the ``async with`` block removes everything else. An exception that leaves
the block, such as a failed assertion, gets the last lines of the guest's console as a note.
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
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from farplug.errors import FarplugError, GuestGoneError, Reason, Remedy, SetupError, StateError
from farplug.programs import QEMU, child_environment, find_program, output_of
from farplug.vm.agent import CHANNELS, INIT_FILES, MACHINE_FILES, Agent, CommandFailed, CommandResult, GuestTimeout
from farplug.vm.certificates import write_certificates
from farplug.vm.guest_image import build_initramfs
from farplug.vm.guest_kernel import fetch_kernel
from farplug.vm.own_loop import OwnLoop, on_own_loop
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
from farplug.vm.snapshots import Snapshot, can_be_restored, saved_config

SPICE_PORT_ATTEMPTS = 5
"""Attempts to start QEMU with a free SPICE port: QEMU does not accept a listening socket for SPICE, so another program
may take the port first."""

STOP_TIMEOUT = 3.0
"""Seconds until QEMU is killed if it does not end by itself."""

TIMEOUT = 60.0
"""Seconds for an operation of a guest, unless the guest or the call has another timeout."""

BOOT_TIMEOUT = 120.0
"""Seconds for a guest to boot before it is saved, and to run the first command after it was restored."""

CONSOLE_TAIL = 2000
"""Characters of the console that are added to an exception."""
_CONSOLE_ENDS = "the guest's console ends:"

OVMF_FILES = (("OVMF_CODE_4M.fd", "OVMF_VARS_4M.fd"), ("OVMF_CODE.fd", "OVMF_VARS.fd"))
OVMF_FOLDER = Path("/usr/share/OVMF")

_SOCKET_PATH_ROOM = 60
"""Maximum length of a path of the folder for sockets: the path of a UNIX socket has at most 107 bytes."""

_MISSING_PACKAGE = re.compile(r"do you want to install (\S+) package")
_MISSING_PART = re.compile(r"'(?:usb-redir|spicevmc)' is not a valid|no option group 'spice'|-spice: invalid option")


class GuestCrashed(GuestGoneError):
    """QEMU ended by itself. The message contains its standard error."""


class QemuGuest(OwnLoop):
    """A throw-away guest. Use it with ``async with``.

    The event loop that starts the guest must run as long as the guest is used. Coroutines of the guest and of its
    monitor may be awaited on other loops too, in other threads: they run on the guest's.

    Args:
        config: the configuration; None: that of a Linux without ports.
        timeout: seconds for an operation whose call gives none.
        snapshots: a folder for snapshots of guests that have booted, which processes may share. A guest that boots a
            kernel starts from one, in a tenth of the processor time; without one for its configuration a guest boots
            first and leaves one there.

    Attributes:
        config, timeout: as above.
        qmp: QEMU's monitor.
        boot_seconds: time from QEMU's start to the end of the first command; None until :meth:`booted` returned.
    """

    def __init__(
        self, config: GuestConfig | None = None, *, timeout: float = TIMEOUT, snapshots: Path | None = None
    ) -> None:
        self.config = config or GuestConfig()
        self.timeout = timeout
        self._snapshots = snapshots
        self._saves: Snapshot | None = None
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
        """Start QEMU. The guest begins to boot, unless it is ``paused``.

        Raises:
            SetupError: a program, a package or a file is missing on this machine.
            GuestCrashed: QEMU does not accept this configuration.
        """
        self._loop = asyncio.get_running_loop()
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

    # --- state --------------------------------------------------------------------------------------------------------

    @property
    def targets(self) -> tuple[str, ...]:
        """Return the target of each port of the configuration. The channels of one SPICE server share their target."""
        return self._targets

    @property
    def spice(self) -> SpiceAddress:
        """Return the address of the SPICE server.

        Raises:
            StateError: the guest has no SPICE server.
        """
        if self._spice is None:
            raise StateError("this guest has no SPICE server")
        return self._spice

    @property
    def pid(self) -> int:
        """Return QEMU's process id; 0 before QEMU starts."""
        return self._process.pid if self._process is not None else 0

    @property
    def alive(self) -> bool:
        """Return whether QEMU runs."""
        return self._process is not None and self._process.returncode is None

    @property
    def console(self) -> str:
        """Return the output of the first serial port: the kernel's messages, or the firmware's console."""
        return self._read("console")

    @property
    def firmware_log(self) -> str:
        """Return the firmware's debug messages (firmware boots only)."""
        return self._read("firmware")

    @property
    def stderr(self) -> str:
        """Return QEMU's standard output and standard error."""
        return self._read("stderr")

    # --- operations ---------------------------------------------------------------------------------------------------

    @on_own_loop
    async def booted(self, timeout: float | None = None) -> None:
        """Wait until all modules are loaded and commands can run.

        Raises:
            GuestTimeout: the guest did not boot in time.
            GuestCrashed: QEMU ended.
        """
        await self.run(":", timeout=timeout)
        if self.boot_seconds is None:
            self.boot_seconds = time.monotonic() - self._started

    @on_own_loop
    async def run(self, command: str, *, stdin: bytes = b"", timeout: float | None = None) -> CommandResult:
        """Run a script with the guest's ``sh`` (dash, as root), and return its result.

        Up to eight commands run in parallel. After a timeout the command keeps running in the guest; it does not
        affect the others.

        Raises:
            GuestTimeout: the command did not end within ``timeout`` seconds, or those of the guest.
            GuestCrashed: QEMU ended.
            StateError: the guest boots firmware, not a kernel.
        """
        if self.config.boot is not Boot.KERNEL:
            raise StateError(f"a guest that boots with {self.config.boot} cannot run commands")
        try:
            return await self._agent.run(command, stdin=stdin, timeout=self._seconds(timeout))
        except GuestTimeout as error:
            self._note_console(error)
            raise
        except GuestGoneError as error:
            raise await self._crashed() from error

    async def check(self, command: str, *, stdin: bytes = b"", timeout: float | None = None) -> str:
        """Run a command that must succeed, and return its output.

        Raises:
            CommandFailed: the exit code is not 0.
            GuestTimeout: the command did not end within ``timeout`` seconds, or those of the guest.
            GuestCrashed: QEMU ended.
            StateError: the guest boots firmware, not a kernel.
        """
        result = await self.run(command, stdin=stdin, timeout=timeout)
        if result.exit_code != 0:
            raise CommandFailed(command, result)
        return result.output

    @on_own_loop
    async def wait_for_console(
        self, text: str | re.Pattern[str], timeout: float | None = None, *, since: int = 0
    ) -> re.Match[str]:
        """Wait until the console or the firmware's debug log contains a text, and return where it was found.

        Args:
            text: the text, or a pattern that is searched for.
            timeout: seconds; None: those of the guest.
            since: characters of the console that are not searched.

        Raises:
            GuestTimeout: the text did not appear in time.
            GuestCrashed: QEMU ended.
        """
        pattern = re.compile(re.escape(text)) if isinstance(text, str) else text
        seconds = self._seconds(timeout)
        deadline = time.monotonic() + seconds
        while not (found := pattern.search(self.console, since) or pattern.search(self.firmware_log)):
            if not self.alive:
                raise await self._crashed()
            if time.monotonic() > deadline:
                shown = text if isinstance(text, str) else text.pattern
                error = GuestTimeout(f"the guest's console did not show {shown!r} within {seconds:g} s")
                self._note_console(error)
                raise error
            await asyncio.sleep(0.05)
        return found

    @on_own_loop
    async def close(self) -> None:
        """Stop QEMU and remove its files. The logs remain readable. A second call does nothing."""
        await self._stop()
        if self._folder is not None:
            self._kept = {name: self._read(name) for name in self._kept}
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _seconds(self, timeout: float | None) -> float:
        return self.timeout if timeout is None else timeout

    # --- starting -----------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        config = self.config
        find_program(QEMU)
        find_program("setpriv")
        self._folder = private_folder()
        kernel, initramfs, firmware, version = None, None, None, (0, 0)
        snapshot = await self._snapshot()
        if config.boot is Boot.KERNEL:
            kernel = await asyncio.to_thread(fetch_kernel)
        if snapshot is not None:
            shutil.copy(snapshot.console, self._folder / "console")
        elif kernel is not None:
            initramfs = await asyncio.to_thread(
                build_initramfs,
                kernel,
                init_files=INIT_FILES | (MACHINE_FILES if config.machine else {}),
                modules=config.boot_modules,
                programs=config.programs,
                python=config.python,
                files=config.files,
            )
            if self._saves is not None:
                await asyncio.to_thread(self._saves.initramfs.write_bytes, initramfs)
        elif config.boot is Boot.UEFI:
            firmware = copy_firmware(self._folder)
        if any(isinstance(port, TcpClientPort) for port in config.ports):
            version = await asyncio.to_thread(qemu_version)
        for attempt in range(1, SPICE_PORT_ATTEMPTS + 1):
            self._spice = self._spice_address(config.spice_server) if config.spice_server else None
            try:
                await self._launch(
                    kernel=kernel.image if kernel else None,
                    initramfs=initramfs,
                    firmware=firmware,
                    version=version,
                    snapshot=snapshot,
                )
            except GuestCrashed:
                await self._stop()
                if attempt == SPICE_PORT_ATTEMPTS or not port_was_taken(self.stderr):
                    raise setup_problem(self.stderr) or await self._crashed() from None
            else:
                break
        if snapshot is not None:
            await self._restore(snapshot)

    async def _snapshot(self) -> Snapshot | None:
        """Return the snapshot to start from, made if there is none; None: the guest boots."""
        if self._snapshots is None or not can_be_restored(self.config):
            return None
        config = saved_config(self.config)
        snapshot = Snapshot.of(config, self._snapshots)
        async with snapshot.locked():
            if not snapshot.exists():
                guest = QemuGuest(config, timeout=self.timeout)
                guest._saves = snapshot
                async with guest:
                    await guest.booted(BOOT_TIMEOUT)
                    await snapshot.save(guest.qmp, guest.console)
        return snapshot

    async def _restore(self, snapshot: Snapshot) -> None:
        try:
            await snapshot.restore(self.qmp)
            # The clock stood still since the snapshot was made.
            await self._agent.run(f"busybox date -s @{time.time():.0f}", timeout=BOOT_TIMEOUT)
        except GuestGoneError as error:
            raise await self._crashed() from error

    async def _launch(
        self,
        *,
        kernel: Path | None,
        initramfs: bytes | None,
        firmware: tuple[Path, Path] | None,
        version: tuple[int, int],
        snapshot: Snapshot | None,
    ) -> None:
        """Start QEMU, and connect to its monitor and to the channels of the agent."""
        if sys.platform != "linux":
            raise SetupError("the throw-away VM runs on Linux only", reason=Reason.UNSUPPORTED_SYSTEM)
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
            image: IO[bytes] | None = None
            if snapshot is not None:
                image = theirs.enter_context(snapshot.initramfs.open("rb"))
            elif initramfs is not None:
                image = theirs.enter_context(os.fdopen(os.memfd_create("initramfs"), "wb", buffering=0))
                image.write(initramfs)
            memory = snapshot or self._saves
            resources = Resources(
                folder=self._folder,
                monitor=pairs[0][1].fileno(),
                channels=tuple(other.fileno() for _, other in pairs[1:]),
                listeners={index: listener.fileno() for index, listener in listeners.items()},
                kernel=kernel,
                initramfs=None if image is None else image.fileno(),
                spice=self._spice,
                firmware=firmware,
                qemu_version=version,
                memory=memory.memory if memory else None,
                restores=snapshot is not None,
            )
            descriptors = [resources.monitor, *resources.channels, *resources.listeners.values()]
            if resources.initramfs is not None:
                descriptors.append(resources.initramfs)
            self._targets = tuple(
                self._target(index, port, listeners, resources) for index, port in enumerate(self.config.ports)
            )
            with (self._folder / "stderr").open("wb") as output:
                self._started = time.monotonic()
                # setpriv: the kernel kills QEMU when the thread that started it ends, even after SIGKILL.
                self._process = await asyncio.create_subprocess_exec(
                    *(str(find_program("setpriv")), "--pdeathsig", "KILL", "--"),
                    *(str(find_program(QEMU)), *command_line(self.config, resources)),
                    env=child_environment(),
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
            return SpiceAddress(port=server.port or unused_port(), ticket=server.ticket)
        return SpiceAddress(
            port=None if server.transport is SpiceTransport.TLS else server.port or unused_port(),
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
        """Return the error to raise after a connection to QEMU closed by itself."""
        if self._process is None:
            return StateError("the guest was not started")
        try:
            async with asyncio.timeout(STOP_TIMEOUT):
                code = await self._process.wait()
        except TimeoutError:
            return GuestGoneError("QEMU closed the connection, but is still running")
        error = GuestCrashed(f"QEMU {describe_exit(code)}: {self.stderr.strip()[-1000:] or 'without a message'}")
        self._note_console(error)
        return error

    def _note_console(self, error: Exception) -> None:
        """Add the last lines of the console to an exception, unless it has them."""
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
    """Return how a process ended, from its return code."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def port_was_taken(stderr: str) -> bool:
    """Return whether QEMU did not start because another program uses the SPICE port."""
    return "in use" in stderr or "failed to initialize spice server" in stderr


def setup_problem(stderr: str) -> SetupError | None:
    """Return the error for a missing package, from QEMU's standard error; None if QEMU failed for another reason."""
    package = _MISSING_PACKAGE.search(stderr)
    if package is None and not _MISSING_PART.search(stderr):
        return None
    packages = package[1] if package else "qemu-system-x86 qemu-system-modules-spice"
    return SetupError(
        f"a part of QEMU is not installed: {stderr.strip().splitlines()[-1]}",
        reason=Reason.MISSING_PROGRAM,
        remedy=Remedy(command=f"sudo apt-get install {packages}"),
    )


def private_folder() -> Path:
    """Make a folder that only this user can access, with a path short enough for sockets in it; return the path."""
    base = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="farplug-", dir=base if len(base) <= _SOCKET_PATH_ROOM else "/tmp"))


def unused_port() -> int:
    """Return a TCP port of the loopback address that no program listens on now."""
    with socket.create_server((LOOPBACK, 0)) as probe:
        return int(probe.getsockname()[1])


def qemu_version() -> tuple[int, int]:
    """Return QEMU's major and minor version.

    Raises:
        SetupError: QEMU is not installed, or does not print its version.
    """
    output = output_of(str(find_program(QEMU)), "--version") or ""
    match = re.search(r"version (\d+)\.(\d+)", output)
    if match is None:
        raise SetupError(f"unknown version of {QEMU}: {output[:80]!r}", reason=Reason.MISSING_PROGRAM)
    return int(match[1]), int(match[2])


def copy_firmware(folder: Path) -> tuple[Path, Path]:
    """Return the paths of OVMF's code and of a private copy of its variables.

    Raises:
        SetupError: OVMF is not installed.
    """
    for code, variables in OVMF_FILES:
        if (OVMF_FOLDER / code).exists() and (OVMF_FOLDER / variables).exists():
            return OVMF_FOLDER / code, Path(shutil.copy(OVMF_FOLDER / variables, folder / "variables"))
    raise SetupError(
        f"OVMF is not installed: no {' or '.join(code for code, _ in OVMF_FILES)} in {OVMF_FOLDER}",
        reason=Reason.MISSING_PROGRAM,
        remedy=Remedy(command="sudo apt-get install ovmf"),
    )
