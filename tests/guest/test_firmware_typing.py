"""A USB keyboard in firmware, in a boot loader and in Linux, plugged in once, before the machine starts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from tests.guest.conftest import Guests
from tests.guest.plugging import GUEST_TIMEOUT, comes, read_line
from tests.guest.test_auto import grub_image
from tests.guest.test_typing import connected
from tests.long import LONG

from farplug.app.commands import Via
from farplug.app.guest import Guest
from farplug.app.settings import Source
from farplug.app.typing import Typed
from farplug.testing import Boot, GuestConfig, QemuGuest, TcpPort

LINE = (
    "The quick brown fox jumps 0123456789 over the lazy dog ABCDEFGHIJKLMNOPQR stuvwxyz and again 9876543210 STUVWXYZ"
)
"""More than a hundred characters, which GRUB and the shell of UEFI print as they are."""
GRUB_LINE = LINE if LONG else LINE[:40]
"""More characters than the buffer of a BIOS has, 16. GRUB takes a tenth of a second for each."""

UNCONFIRMED, CONFIRMED = Typed(Via.USB, False), Typed(Via.USB, True)

GRUB_SETTINGS = """\
serial --unit=0
terminal_input console
terminal_output serial
set timeout=-1
menuentry "stay here" { true }
menuentry "the next device" { exit }
"""


@asynccontextmanager
async def with_keyboard(guest: QemuGuest) -> AsyncIterator[Guest]:
    """Plug in a keyboard, and let the machine start."""
    async with connected(guest.targets[0]) as farplug:
        plugging = asyncio.ensure_future(farplug.attach([Source.keyboard()]))
        await guest.qmp.execute("set-action", {"reboot": "reset"})
        await guest.qmp.execute("cont")
        await plugging
        yield farplug


def plain(console: str) -> str:
    return console.replace("\r", "")


async def test_a_text_in_the_shell_of_uefi(guests: Guests) -> None:
    config = GuestConfig(ports=(TcpPort(),), boot=Boot.UEFI, paused=True)
    async with guests.fresh(config) as guest, with_keyboard(guest) as farplug:
        await guest.wait_for_console("seconds to skip")  # its script
        assert await farplug.typing.press("Escape", via=Via.USB) == UNCONFIRMED
        await guest.wait_for_console("Shell>")
        assert await farplug.typing.type(f"echo {LINE}\n", via=Via.USB) == UNCONFIRMED
        await comes(lambda: f"\n{LINE}" in plain(guest.console))


async def test_seabios_grub_linux_and_a_restart(guests: Guests, tmp_path: Path) -> None:
    """Choose from the menus of SeaBIOS and GRUB, type in Linux, restart, choose again, type in GRUB."""
    disk = grub_image(tmp_path, "serial normal echo minicmd", GRUB_SETTINGS)
    log = tmp_path / "firmware"
    config = GuestConfig(
        ports=(TcpPort(),),
        modules=("usbhid", "hid_generic"),
        paused=True,
        extra_arguments=(
            *("-drive", f"file={disk},format=raw,if=ide,snapshot=on", "-boot", "menu=on,splash-time=60000"),
            *("-chardev", f"file,id=log,path={log}", "-device", "isa-debugcon,iobase=0x402,chardev=log"),
        ),
    )

    def printed(text: str, times: int) -> Callable[[], bool]:
        return lambda: log.read_text(errors="replace").count(text) == times

    async with guests.fresh(config) as guest, with_keyboard(guest) as farplug:
        typing = farplug.typing
        for start in (1, 2):
            await comes(printed("Press ESC for boot menu", start))
            assert await typing.press("Escape", via=Via.USB) == UNCONFIRMED
            await comes(printed("\n2. ata0-0", start))
            await typing.press("2", via=Via.USB)
            await comes(lambda start=start: guest.console.count("the next device") == start)  # type: ignore[misc]
            if start == 1:
                await typing.press("Down", via=Via.USB)
                await typing.press("Return", via=Via.USB)
            else:
                await typing.press("c", via=Via.USB)
                await guest.wait_for_console("grub> ")
                assert await typing.type(f"echo {GRUB_LINE}\n", via=Via.USB) == UNCONFIRMED
                await comes(lambda: f"\n{GRUB_LINE}" in plain(guest.console).replace("stuvw\n", "stuvw"))  # 80 columns
                if not LONG:
                    break
                await typing.type("exit\n", via=Via.USB)
            await guest.run(":", timeout=GUEST_TIMEOUT)

            async def write() -> None:
                assert await typing.type(LINE + "\n", via=Via.USB) == CONFIRMED

            assert await read_line(guest, write) == LINE
            # As "reboot -f" in the guest does, which might happen before the reply of the guest's agent.
            await guest.qmp.execute("system_reset")
