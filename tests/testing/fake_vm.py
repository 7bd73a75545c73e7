"""A guest in memory in place of QEMU, for tests of the pytest plugin."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, ClassVar, Self

from tests.app.test_screen import PICTURE
from tests.cli.support import FakeGuest
from tests.spice.test_display import fill
from tests.transport.fake_spice import Behaviour, Channel, FakeSpice, message, running
from tests.transport.test_spice_side import Inputs as FakeInputs
from tests.transport.test_spice_side import Screen as FakeScreen

from farplug.errors import FarplugError, Reason, Remedy, SetupError
from farplug.spice.framebuffer import Rect
from farplug.spice.types import ChannelType
from farplug.testing import lending
from farplug.vm.agent import CommandResult, GuestTimeout
from farplug.vm.qemu import TIMEOUT, GuestCrashed, QemuGuest
from farplug.vm.qemu_config import GuestConfig, SpiceAddress
from farplug.vm.qmp import Qmp

MISSING, DIES, NO_KVM, STUCK = "missing", "dies", "no-kvm", "stuck"
"""Words in the kernel's command line: QEMU is not installed; it crashes at the start; it does so with KVM; with KVM the
guest does not boot."""


class FakeQmp(Qmp):
    """A monitor that knows ``cont``."""

    def __init__(self, runs: asyncio.Event) -> None:
        super().__init__()
        self._runs = runs

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        assert command == "cont"
        self._runs.set()


class FakeVm(QemuGuest):
    """Commands run in a shell of this machine, ``echo`` to the file ``console`` excepted; devices are configured."""

    made: ClassVar[list[FakeVm]] = []

    def __init__(
        self, config: GuestConfig | None = None, *, timeout: float = TIMEOUT, snapshots: Path | None = None
    ) -> None:
        super().__init__(config, timeout=timeout, snapshots=snapshots)
        self.made.append(self)
        self.text = "booted\n"
        self.runs = asyncio.Event()
        self.closed = False
        self.usb = FakeGuest(lambda: None)
        self.display = FakeScreen(PICTURE)
        self.qmp = FakeQmp(self.runs)
        self._dead = False
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        words = self.config.kernel_arguments
        if MISSING in words:
            remedy = Remedy(command="sudo apt-get install qemu-system-x86")
            raise SetupError("QEMU is not installed", reason=Reason.MISSING_PROGRAM, remedy=remedy)
        if DIES in words or (NO_KVM in words and self.config.accelerator == "kvm"):
            self._dead = True
            raise await self._crashed()
        if STUCK in words and self.config.accelerator == "kvm":
            raise GuestTimeout("the guest did not boot")
        if not self.config.paused:
            self.runs.set()
        if self.config.spice_server is not None:
            channels = ((2, 0), (3, 0), *((9, number) for number in range(len(self.config.ports))))
            side: dict[ChannelType, Behaviour] = {
                ChannelType.DISPLAY: self.display.serve,
                ChannelType.INPUTS: FakeInputs().serve,
            }
            fake = FakeSpice(channels=channels, usbredir=self._usbredir, side=side)
            self._spice = SpiceAddress(port=await self._stack.enter_async_context(running(fake)))
            self._targets = (self._spice.target,) * len(self.config.ports)
        else:
            ports = [FakeGuest(lambda: None) for _ in self.config.ports]
            targets = [await self._stack.enter_async_context(port.listening()) for port in ports]
            self._targets = tuple(targets)
        return self

    async def _usbredir(self, channel: Channel) -> None:
        await self.runs.wait()
        await self.usb.behave(channel)

    def draw(self, rect: Rect, colour: int) -> None:
        """Fill a rectangle of the screen."""
        self.display.links[-1].send(message(302, fill(rect, colour)))

    @property
    def pid(self) -> int:
        return 4711

    @property
    def alive(self) -> bool:
        return not self._dead and not self.closed

    @property
    def console(self) -> str:
        return self.text

    @property
    def stderr(self) -> str:
        return "qemu: a warning\n"

    async def run(self, command: str, *, stdin: bytes = b"", timeout: float | None = None) -> CommandResult:
        if command == "die":
            self._dead = True
        if self._dead:
            raise await self._crashed()
        shell = await asyncio.create_subprocess_exec(
            *("sh", "-c", command), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        output, _ = await shell.communicate(stdin)
        if command.startswith("echo"):
            self.text += output.decode()
        assert shell.returncode is not None
        return CommandResult(shell.returncode, output)

    async def _crashed(self) -> FarplugError:
        return GuestCrashed("QEMU was killed by SIGABRT: an assertion failed")

    async def close(self) -> None:
        self.closed = True
        await self._stack.aclose()


def install() -> None:
    """Let the plugin use it. For processes of pytest-xdist; other tests use monkeypatch."""
    setattr(lending, "QemuGuest", FakeVm)  # noqa: B010  (a name that the module imports)
