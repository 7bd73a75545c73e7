"""``farplug demo``: plug an image file into a throw-away VM as a USB disk, step by step; show the VM in a browser."""

from __future__ import annotations

import asyncio
import signal
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from farplug.app import requirements
from farplug.errors import DeviceError, Reason, SetupError
from farplug.exit_codes import ExitCode
from farplug.programs import child_environment, search_path

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from farplug.app.events import Event
    from farplug.vm.qemu import QemuGuest

IMAGE_SIZE = 64_000_000
GREETING = "Hello from the image on the host.\n"
ANSWER = "Written by the VM through a USB disk that farplug made.\n"
SHELL = "while true; do setsid -c sh </dev/tty1 >/dev/tty1 2>&1; sleep 1; done"
"""A shell on the VM's screen."""
DISK_TIMEOUT = 60.0
"""Seconds until the VM must show the disk."""


def demo(
    page: Annotated[
        bool | None,
        typer.Option(
            "--page/--no-page",
            help="At the end, serve the page of the VM until Ctrl-C. By default on a terminal.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Boot a small VM, plug in an image, read and write a file; then show the VM in the browser.

    Needs QEMU and a few small programs, and downloads a kernel the first time. Leaves nothing behind.
    """
    requirements.check_demo()
    if page is None:
        page = sys.stdin.isatty() and sys.stdout.isatty()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the VM ends with this process
    raise typer.Exit(asyncio.run(_demo(page=page)))


async def _demo(*, page: bool) -> ExitCode:
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory(prefix="farplug-demo-") as folder:
        return await _Demo(Path(folder)).run(page=page)


class _Demo:
    def __init__(self, folder: Path) -> None:
        from rich.console import Console

        self._console = Console(highlight=False, soft_wrap=True)
        self._folder = folder
        self._step = 0

    async def run(self, *, page: bool) -> ExitCode:
        self._print("An image file on this machine becomes a USB disk in a virtual machine.")
        await self._make_image()
        async with self._boot() as guest:
            await self._plug_in(guest)
            await self._check_image()
            if page:
                await self._show_page(guest)
        self._print(
            "\nNow with a VM of your own, from its .vv file or its SPICE address:\n"
            "  farplug connect vm.vv --usb-disk drivers.raw\n"
            "  farplug connect spice://vmhost:5900 --usb-disk-ro installer.raw --usb-disk scratch.raw\n"
            "  farplug page -s vm.vv"
        )
        return ExitCode.OK

    async def _check_image(self) -> None:
        written = ANSWER.encode()
        self._print_step("What the VM wrote is in the image on this machine")
        read = await self._run_here("mtype", "-i", "demo.raw", "::answer.txt")
        if read != written:
            raise DeviceError(
                f"the VM wrote {len(written)} bytes, but the image contains {len(read)} different ones",
                reason=Reason.DEVICE_FAULT,
            )
        self._print("")
        self._print_success(f"the same {len(read)} bytes that the VM wrote. It works.")

    async def _make_image(self) -> None:
        self._print_step("A RAW image with a filesystem and a file on it")
        (self._folder / "hello.txt").write_text(GREETING)
        await self._run_here("truncate", "-s", str(IMAGE_SIZE), "demo.raw")
        await self._run_here("mkfs.vfat", "-n", "FARPLUG", "demo.raw")
        await self._run_here("mcopy", "-i", "demo.raw", "hello.txt", "::")

    def _boot(self) -> AbstractAsyncContextManager[QemuGuest]:
        from contextlib import asynccontextmanager

        from farplug.vm.guest_kernel import download_size
        from farplug.vm.qemu import BOOT_TIMEOUT, QemuGuest
        from farplug.vm.qemu_config import GuestConfig, Spice, SpicePort

        @asynccontextmanager
        async def booted() -> AsyncIterator[QemuGuest]:
            self._print_step("A small Linux VM, made of this machine's packages, with a SPICE server")
            megabytes = (await asyncio.to_thread(download_size)) / 1e6
            if megabytes:
                self._print(f"  downloading its kernel, {megabytes:.0f} MB, only the first time (apt-get download) ...")
            config = GuestConfig(
                ports=(SpicePort(), SpicePort(), SpicePort()),
                spice=Spice(ticket="sesame"),
                programs=("blkid",),
                modules=("bochs", "usbhid", "hid_generic"),
                kernel_arguments=("console=tty0",),
                extra_arguments=("-name", "demo", "-device", "VGA", "-device", "usb-tablet,bus=usb.0"),
            )
            async with QemuGuest(config) as guest:
                self._print_command(
                    "qemu-system-x86_64 ... -device qemu-xhci -chardev spicevmc,name=usbredir,id=redir0 "
                    "-device usb-redir,chardev=redir0"
                )
                await guest.booted(BOOT_TIMEOUT)
                release = (await guest.check("uname -r")).strip()
                self._print_success(f"Linux {release} booted in {guest.boot_seconds:.1f} s")
                yield guest

        return booted()

    async def _plug_in(self, guest: QemuGuest) -> None:
        from farplug.app.app import App
        from farplug.app.settings import GuestSettings, Source, TargetSettings
        from farplug.cli.output import figures_text

        self._print_step("farplug plugs the image into the VM, over its SPICE console")
        address = guest.spice
        self._print_command(f"farplug connect spice://{address.host}:{address.port} --usb-disk demo.raw")
        async with App() as app:
            app.subscribe(self._happened)
            vm = await app.connect(GuestSettings(TargetSettings(guest.targets[0])))
            async with vm.plug(Source.disk(self._folder / "demo.raw")) as attachment:
                await attachment.configured()
                await self._use(guest, attachment.device.identity.serial_number)
            self._print(f"  {figures_text(asdict(attachment.figures))}")

    async def _use(self, guest: QemuGuest, serial_number: str) -> None:
        disk = await _disk(guest, serial_number)
        self._print_step("What the VM sees")
        await self._run_in_vm(
            guest, f"dmesg | grep -E 'usb 2-.*(new|Product|Manu)|[[]{disk}[]].*(blocks|disk)' | cut -c 16-"
        )
        await self._run_in_vm(guest, f"blkid /dev/{disk}")
        self._print_step("The VM reads a file and writes one")
        await self._run_in_vm(guest, f"mount -t vfat /dev/{disk} /mnt && cat /mnt/hello.txt")
        await self._run_in_vm(guest, f"echo '{ANSWER.rstrip()}' >/mnt/answer.txt && sync && ls -l /mnt")
        await self._run_in_vm(guest, "umount /mnt")

    async def _show_page(self, guest: QemuGuest) -> None:
        """Plug the image in once more, and serve the page of the VM until a signal comes."""
        from farplug.app.app import App
        from farplug.app.settings import GuestSettings, Source, TargetSettings
        from farplug.control import names
        from farplug.control.server import Server
        from farplug.web.server import Page, PageSettings

        self._print_step("The VM in your browser")
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, ended.set)
        shell = asyncio.ensure_future(guest.check(SHELL))
        try:
            async with App() as app:
                vm = await app.connect(GuestSettings(TargetSettings(guest.targets[0])))
                server = Server(app, names.reserve(None, "demo"), target=guest.targets[0])
                await server.start()
                try:
                    async with (
                        vm.plug(Source.disk(self._folder / "demo.raw")),
                        Page.serve(PageSettings(server.hello.session, web_root=str(self._folder))) as page,
                    ):
                        self._print_command(f"farplug page -s {server.hello.session} --web-root .")
                        self._print(f"  {page.url}")
                        self._print_success("click the picture to type into the VM; Ctrl-C here ends the demo")
                        await ended.wait()
                finally:
                    await server.close()
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
            shell.cancel()
            await asyncio.gather(shell, return_exceptions=True)

    def _happened(self, event: Event) -> None:
        shown = event.attachment is not None and event.level in ("good", "info")
        if shown and event.name not in ("opened", "port-reset"):
            self._print_success(event.message)

    # Output -------------------------------------------------------------------------------------------------------

    def _print(self, text: str, style: str = "") -> None:
        self._console.print(text, markup=False, style=style)

    def _print_step(self, text: str) -> None:
        self._step += 1
        self._print(f"\n{self._step}. {text}", "bold")

    def _print_command(self, text: str, prompt: str = "$") -> None:
        self._print(f"  {prompt} {text}", "cyan")

    def _print_success(self, text: str) -> None:
        from rich.text import Text

        from farplug.text import printable

        mark = "✓" if self._console.encoding.startswith("utf") else "ok:"
        self._console.print(Text.assemble("  ", (mark, "green"), " ", printable(text)))

    def _print_output(self, text: str) -> None:
        from farplug.text import printable

        for line in text.splitlines():
            self._print(f"  {printable(line.expandtabs()).rstrip()}")

    async def _run_here(self, *command: str) -> bytes:
        """Run a command on this machine, in the folder of the image; show the command and its output."""
        self._print_command(" ".join(command))
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=self._folder,
            env=child_environment(PATH=search_path()),  # mkfs.vfat is in /usr/sbin
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, errors = await process.communicate()
        if process.returncode != 0:
            raise SetupError(
                f"{command[0]} failed: {errors.decode(errors='replace').strip()[-300:]}", reason=Reason.MISSING_PROGRAM
            )
        self._print_output(output.decode(errors="replace"))
        return output

    async def _run_in_vm(self, guest: QemuGuest, command: str) -> None:
        """Run a command in the VM; show the command and its output."""
        self._print_command(command, "vm#")
        self._print_output(await guest.check(command))


async def _disk(guest: QemuGuest, serial_number: str) -> str:
    """Return the VM's name for the disk, once the disk can be read."""
    script = (
        "for block in /sys/block/sd*; do"
        f' [ "$(cat $block/device/../../../../serial 2>/dev/null)" = {serial_number} ] &&'
        " head -c 1 /dev/${block##*/} >/dev/null 2>&1 && echo ${block##*/}; done; :"
    )
    deadline = asyncio.get_running_loop().time() + DISK_TIMEOUT
    while asyncio.get_running_loop().time() < deadline:
        name = (await guest.check(script)).strip()
        if name:
            return name
        await asyncio.sleep(0.1)
    raise DeviceError(f"the disk did not appear in the VM within {DISK_TIMEOUT:g} s", reason=Reason.TIMED_OUT)
