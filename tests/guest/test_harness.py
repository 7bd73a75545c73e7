"""The throw-away guest itself."""

from __future__ import annotations

import asyncio
import os
import signal
import ssl
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from tests.guest.plugging import GUEST_TIMEOUT, LABORATORY, comes

from farplug.testing import (
    CommandFailed,
    Controller,
    GuestConfig,
    GuestCrashed,
    GuestTimeout,
    QemuGuest,
    QmpError,
    Spice,
    SpicePort,
    SpiceTransport,
    TcpClientPort,
    UnixPort,
    UsbDisk,
)
from farplug.vm import qemu

if TYPE_CHECKING:
    from tests.guest.conftest import Guests

HELLO = b"qemu usb-redir guest"


async def read_hello(target: str) -> bytes:
    """Return the first packet of QEMU's usb-redir."""
    kind, _, address = target.partition(":")
    if kind == "unix":
        reader, writer = await asyncio.open_unix_connection(address)
    else:
        host, _, port = address.removeprefix("//").rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
    async with asyncio.timeout(GUEST_TIMEOUT):
        hello = await reader.readexactly(80)
    writer.close()
    await writer.wait_closed()
    return hello


async def test_output_and_exit_code_are_exact(guest: QemuGuest) -> None:
    result = await guest.run("printf 'one\\r\\n\\377\\000two'; echo three >&2; exit 7")
    assert result.exit_code == 7
    assert result.data == b"one\r\n\xff\0twothree\n"
    with pytest.raises(CommandFailed, match="the guest's command 'echo no; exit 3' failed with exit code 3: no"):
        await guest.check("echo no; exit 3")


async def test_megabytes_go_in_and_out(guest: QemuGuest) -> None:
    content = os.urandom(3 << 20)
    result = await guest.run("cat", stdin=content)
    assert result.exit_code == 0
    assert result.data == content


async def test_a_full_root_file_system_leaves_room_for_commands(guest: QemuGuest) -> None:
    full = await guest.run("cat /dev/zero >/tmp/full")
    assert full.exit_code == 1
    assert "No space left on device" in full.output
    result = await guest.run("echo here; exit 3")
    assert (result.exit_code, result.output) == (3, "here\n")
    await guest.check("rm /tmp/full")


async def test_commands_run_side_by_side_and_a_stuck_one_holds_up_no_other(guest: QemuGuest) -> None:
    # Each of the two ends only if the other runs at the same time.
    write = guest.check("mkfifo /tmp/a 2>/dev/null; echo ping >/tmp/a")
    read = guest.check("mkfifo /tmp/a 2>/dev/null; cat /tmp/a")
    assert (await asyncio.gather(write, read))[1] == "ping\n"
    with pytest.raises(GuestTimeout, match=r"did not end within 0\.2 s") as error:
        await guest.run("echo $$ >/tmp/stuck; exec cat /dev/zero >/dev/null", timeout=0.2)
    assert "the guest's console ends:" in "".join(error.value.__notes__)
    kill = "until kill -9 $(cat /tmp/stuck 2>/dev/null) 2>/dev/null; do sleep 0.1; done; echo alive"
    assert await guest.check(kill) == "alive\n"


async def test_a_failed_assertion_shows_the_console() -> None:
    async def fail() -> None:
        async with QemuGuest() as guest:
            await guest.booted(GUEST_TIMEOUT)
            await guest.check("echo 'the last words' >/dev/kmsg")
            await guest.wait_for_console("the last words")
            raise AssertionError

    with pytest.raises(AssertionError) as caught:
        await fail()
    (note,) = caught.value.__notes__
    assert "the last words" in note


async def test_ports_reach_usb_redir(guest: QemuGuest) -> None:
    assert guest.targets[0] == guest.targets[1] == guest.spice.target
    for target in guest.targets[2:]:
        assert HELLO in await read_hello(target)
    assert (await guest.qmp.human("info usb")).count("USB Redirection Device") == len(guest.targets)


async def test_monitor(guest: QemuGuest) -> None:
    assert (await guest.qmp.execute("query-status"))["status"] == "running"
    with pytest.raises(QmpError, match=r"QEMU refused no-such-command: .* has not been found"):
        await guest.qmp.execute("no-such-command")
    await asyncio.gather(guest.qmp.execute("stop"), guest.qmp.execute("cont"))
    assert [(await guest.qmp.event(name))["event"] for name in ("STOP", "RESUME")] == ["STOP", "RESUME"]


async def test_kernel_messages_are_kept(guest: QemuGuest) -> None:
    assert guest.console.startswith("[    0.000000] Linux version")
    await guest.check("dmesg -n 1; echo marked >/dev/ttyS0")  # the kernel would write in the middle of it
    await guest.wait_for_console("marked\n")
    await guest.check("dmesg -n 7")


async def test_paused_guest_with_a_disk_on_ehci_and_a_port_that_connects_to_us(guests: Guests, tmp_path: Path) -> None:
    hello: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = await reader.readexactly(80)
        writer.close()
        if not hello.done():
            hello.set_result(data)

    image = tmp_path / "a,b.raw"
    image.write_bytes(b"from the host".ljust(8 << 20, b"\0"))
    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        config = GuestConfig(
            ports=(TcpClientPort(port=port),),
            disks=(UsbDisk(image=image),),
            controller=Controller.EHCI,
            paused=True,
        )
        async with guests.fresh(config) as guest:
            assert guest.targets == (f"tcp-listen://127.0.0.1:{port}",)
            await asyncio.sleep(0.2)
            assert not hello.done(), "a paused guest sends nothing"
            await guest.qmp.execute("cont")
            await guest.booted()
            assert HELLO in await asyncio.wait_for(hello, GUEST_TIMEOUT)
            script = "until head -c 13 /dev/sda 2>/dev/null; do sleep 0.1; done; lsusb"
            assert "from the host" in (output := await guest.check(script))
            assert "EHCI Host Controller" in output
            for make, check in (("mkfs.ext4 -q", "e2fsck -fn"), ("mkfs.vfat -I", "fsck.vfat -n")):
                output = await guest.check(f"""
                    set -e
                    {make} /dev/sda
                    mount /dev/sda /mnt; echo kept >/mnt/file; umount /mnt
                    {check} /dev/sda
                    mount /dev/sda /mnt; cat /mnt/file; umount /mnt
                """)
                assert output.endswith("kept\n")


async def test_spice_over_tls_asks_for_our_authority(guests: Guests) -> None:
    spice = Spice(transport=SpiceTransport.TLS_REQUIRED, ticket="a,b/c")
    async with guests.fresh(GuestConfig(ports=(SpicePort(),), spice=spice, paused=True)) as guest:
        address = guest.spice
        assert address.target == f"spice://:a%2Cb%2Fc@127.0.0.1:{address.port}"
        context = ssl.create_default_context(cafile=str(address.ca_file))
        _, writer = await asyncio.open_connection("127.0.0.1", address.tls_port, ssl=context)
        writer.close()
        await writer.wait_closed()
        text = await guest.qmp.human("info spice")
        assert f"{address.tls_port} [tls]" in text
        assert "auth: spice" in text


async def test_two_guests_side_by_side_and_nothing_left_afterwards(guests: Guests) -> None:
    before = set(os.listdir("/proc/self/fd"))
    config = replace(LABORATORY, ports=(UnixPort(), SpicePort()))
    async with guests.fresh(config) as first, guests.fresh(config) as second:
        folders = [Path(guest.targets[0].removeprefix("unix:")).parent for guest in (first, second)]
        assert await first.check("echo 1 >/tmp/n; cat /tmp/n") == "1\n"
        assert (await second.run("cat /tmp/n")).exit_code != 0
    assert not first.alive
    assert "Linux version" in first.console
    assert not any(folder.exists() for folder in folders)
    await comes(lambda: set(os.listdir("/proc/self/fd")) <= before)


async def test_clock_of_a_guest_that_starts_from_a_snapshot(guests: Guests, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 2_000_000_000
    monkeypatch.setattr(qemu, "time", SimpleNamespace(time=lambda: now, monotonic=time.monotonic))
    async with guests.fresh(LABORATORY) as guest:
        assert now <= int(await guest.check("date +%s")) < now + 1000


async def test_qemu_that_crashes_says_so(guests: Guests) -> None:
    async with guests.fresh(LABORATORY) as guest:
        stuck = asyncio.create_task(guest.run("sleep 60"))
        await asyncio.sleep(0.2)
        os.kill(guest.pid, signal.SIGABRT)
        with pytest.raises(GuestCrashed, match="QEMU was killed by SIGABRT"):
            await stuck
        with pytest.raises(GuestCrashed, match="QEMU was killed by SIGABRT"):
            await guest.run("true")
        assert not guest.alive


async def test_configuration_that_qemu_refuses() -> None:
    with pytest.raises(GuestCrashed, match=r"ended with exit code 1: .*Property 'usb-redir.nonsense' not found"):
        await QemuGuest(GuestConfig(ports=(UnixPort(properties=("nonsense=1",)),))).__aenter__()


def test_qemu_dies_with_its_test_process() -> None:
    program = """
import asyncio
from farplug.testing import GuestConfig, QemuGuest, UnixPort

async def main():
    async with QemuGuest(GuestConfig(ports=(UnixPort(),))) as guest:
        print(guest.pid, guest.targets[0], flush=True)
        await asyncio.sleep(100)

asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid, target = process.stdout.readline().split()
        process.kill()
    while is_running(int(pid)):  # until the limit of the test
        time.sleep(0.05)
    # After a SIGKILL the folder remains: only small files and sockets may be in it.
    folder = Path(target.removeprefix("unix:")).parent
    files = list(folder.iterdir())
    assert sum(file.stat().st_size for file in files) < 100_000
    for file in files:
        file.unlink()
    folder.rmdir()


def is_running(pid: int) -> bool:
    """Return whether the process exists and is not a zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
