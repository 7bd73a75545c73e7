"""The command line in processes of its own, against real guests."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from urllib.request import urlopen

import pytest
from tests import starter
from tests.guest.command import farplug, farplug_on_terminal
from tests.guest.conftest import Guests
from tests.guest.plugging import GUEST_TIMEOUT, LABORATORY, MIB, blank, disk_with, gone, until
from tests.long import in_full

from farplug.store.image import serial_number
from farplug.target import open_session, parse_target
from farplug.testing import Boot, GuestConfig, QemuGuest, Spice, SpicePort


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_detaches_cleanly(guest: QemuGuest, tmp_path: Path, number: signal.Signals) -> None:
    image = blank(tmp_path / "disk.raw")
    async with farplug("connect", guest.targets[0], "--usb-disk", image) as running:
        await running.until("configured by the guest")
        disk = await disk_with(guest, serial_number(image))
        await guest.check(f"printf farplug | dd of={disk} conv=notrunc,fsync 2>/dev/null")
        running.process.send_signal(number)
        code, out, err = await running.end()
        assert (code, err) == (0, "")
        assert "disk.raw: detached (" in out
    assert image.read_bytes()[:7] == b"farplug"
    await gone(guest, disk)


@pytest.mark.parametrize("number", [signal.SIGTERM, *in_full(signal.SIGINT)])
async def test_unread_output_stops_neither_the_disk_nor_a_signal(
    guest: QemuGuest, tmp_path: Path, number: signal.Signals
) -> None:
    image = blank(tmp_path / "disk.raw")
    read, write = os.pipe()
    process = await asyncio.create_subprocess_exec(
        *starter.COMMAND,
        *("--debug", "connect", "--json"),
        *(guest.targets[0], "--usb-disk", image),
        stdout=write,
        stderr=write,
    )
    os.close(write)
    try:
        disk = await disk_with(guest, serial_number(image))
        # Each transfer is a line of --debug; a pipe holds 64 KiB of them.
        await guest.check(f"dd if={disk} of=/dev/null bs=4k count=200 iflag=direct 2>/dev/null")
        await guest.check(f"printf farplug | dd of={disk} conv=notrunc,fsync 2>/dev/null")
        process.send_signal(number)
        assert await process.wait() == 0
        assert len(os.read(read, 1 << 20)) > 32 << 10, "the pipe was full"
    finally:
        os.close(read)
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert image.read_bytes()[:7] == b"farplug"
    await gone(guest, disk)


async def test_the_second_interrupt_leaves_at_once(guest: QemuGuest, tmp_path: Path) -> None:
    # A VM that stands still does not acknowledge that the device left: the first Ctrl-C waits for that.
    async with farplug("connect", guest.targets[0], "--usb-disk", blank(tmp_path / "disk.raw")) as running:
        await running.until("configured by the guest")
        await guest.qmp.execute("stop")
        try:
            running.process.send_signal(signal.SIGINT)
            await running.until("Ctrl-C again")
            running.process.send_signal(signal.SIGINT)
            code, _, err = await running.end()
        finally:
            await guest.qmp.execute("cont")
    assert (code, err) == (130, "farplug: quit immediately, without waiting for the VM\n")


@pytest.mark.parametrize("transport", ["bot", "uas"])
async def test_leaving_a_disk_that_is_mounted_and_written_to(guest: QemuGuest, tmp_path: Path, transport: str) -> None:
    image = blank(tmp_path / "disk.raw")
    subprocess.run(["mkfs.vfat", image], check=True, stdout=subprocess.DEVNULL)
    asked = "the VM may not have finished writing to disk.raw: unmount it there first; interrupt again to leave"
    options = ("--usb-disk", image, "--usb-storage", transport)
    async with farplug_on_terminal("connect", guest.targets[0], *options) as running:
        await running.until("configured by the guest")
        disk = await disk_with(guest, serial_number(image))
        # The blocks of the large file are written now; its size, and the other file, stay in the guest's memory.
        await guest.check(
            f"mount -t vfat {disk} /mnt && dd if=/dev/zero of=/mnt/big.bin bs=1M count=3 oflag=direct 2>/dev/null"
            " && echo note >/mnt/note.txt"
        )
        running.process.send_signal(signal.SIGINT)
        await running.until(asked)
        await guest.check("echo more >>/mnt/note.txt && umount /mnt")
        # As "safely remove" does: this sends the flush that the FAT driver does not send.
        await guest.check(f"echo 1 >/sys/block/{disk[5:]}/device/delete")
        await gone(guest, disk)
        running.process.send_signal(signal.SIGINT)
        await running.until("detaching; press Ctrl-C again to quit immediately")
        await running.until("disk.raw: detached")
        assert await running.process.wait() == 0
        assert sum("may not have finished" in line for line in running.lines) == 1
    read = [
        subprocess.run(["mtype", "-i", image, f"::{name}"], check=True, capture_output=True).stdout
        for name in ("note.txt", "big.bin")
    ]
    assert read == [b"note\nmore\n", bytes(3 * MIB)]


async def test_an_unmounted_journaling_file_system_is_left_without_a_question(guest: QemuGuest, tmp_path: Path) -> None:
    image = blank(tmp_path / "disk.raw")
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    async with farplug_on_terminal("connect", guest.targets[1], "--usb-disk", image) as running:
        await running.until("configured by the guest")
        disk = await disk_with(guest, serial_number(image))
        await guest.check(f"mount -t ext4 {disk} /mnt && echo note >/mnt/note.txt && umount /mnt")
        running.process.send_signal(signal.SIGINT)
        await running.until("disk.raw: detached")
        assert await running.process.wait() == 0
    assert not any("may not have finished" in line for line in running.lines)


async def test_a_paused_vm_has_an_exit_code(guests: Guests, tmp_path: Path) -> None:
    async with guests.fresh(GuestConfig(ports=(SpicePort(),), paused=True)) as guest:
        async with farplug("doctor", guest.targets[0]) as running:
            code, out, err = await running.end()
        assert code == 13
        assert "  PAUSED  usbredir 0" in out
        assert err.startswith("farplug: the VM does not answer: it is paused")
        async with farplug("connect", guest.targets[0], "--usb-disk", blank(tmp_path / "disk.raw")) as running:
            await running.until("its VM may be paused")
            running.process.send_signal(signal.SIGINT)
            code, _, err = await running.end()
        assert (code, err) == (130, "farplug: interrupted\n")


@pytest.mark.parametrize("paused", [False, True])
async def test_ports_and_disks_have_the_order_of_the_command_line(guests: Guests, tmp_path: Path, paused: bool) -> None:
    (tmp_path / "content").mkdir()
    (tmp_path / "content" / "x").write_text("x")
    async with farplug(
        *("image", "create", "--format", "iso9660", "--from", tmp_path / "content", "-o", tmp_path / "x.iso")
    ) as running:
        assert await running.exit_code() == 0
    images = [blank(tmp_path / f"{name}.raw") for name in "cab"]
    options = [
        *("--usb-disk-ro", images[0], "--usb-cdrom", tmp_path / "x.iso"),
        *("--usb-disk", f"{images[1]},snapshot={tmp_path / 'a.snap'}", "--usb-disk", images[2]),
    ]
    config = replace(GuestConfig(paused=True) if paused else LABORATORY, ports=(SpicePort(),) * 4)
    async with guests.fresh(config) as guest, farplug("connect", guest.targets[0], "--json", *options) as running:
        if paused:
            waiting = json.loads(await running.until("waiting-for-guest"))
            assert "its VM may be paused" in waiting["message"]
            await guest.qmp.execute("cont")
            await guest.booted()
        for _ in range(4):
            await running.until('"configured"')
        events = [json.loads(line) for line in running.lines]
        ports = {event["number"]: event["units"] for event in events if event["event"] == "opened"}
        assert ports == {0: ["c.raw"], 1: ["cdrom0 (x.iso)"], 2: ["a.raw"], 3: ["b.raw"]}
        assert [event["device"] for event in events if event["event"] == "attached"] == [
            "c.raw",
            "cdrom0",
            "a.raw",
            "b.raw",
        ]
        await until(guest, '[ "$(ls -d /sys/block/sd* 2>/dev/null | wc -l)" = 3 ]')
        listed = await guest.check(
            "for b in /sys/block/sd*; do"
            " echo $(tail -c 16 $b/device/vpd_pg80) $(realpath $b/device | grep -o 'usb[0-9].*/[0-9]-[0-9]:'); done"
        )
        # By the ports of the controller: Linux probes disks at the same time, and the first one that is ready is sda.
        rows = sorted((line.split() for line in listed.splitlines()), key=lambda row: row[1])
        assert [row[0] for row in rows] == [serial_number(image) for image in images]
        running.process.send_signal(signal.SIGINT)
        code, out, err = await running.end()
        assert (code, err) == (0, "")
        assert [json.loads(line)["event"] for line in out.splitlines()].count("detached") == 4


async def test_a_plain_target_that_is_the_spice_server(guest: QemuGuest, tmp_path: Path) -> None:
    target = f"tcp://{guest.spice.host}:{guest.spice.port}"
    async with farplug("connect", target, "--usb-disk", blank(tmp_path / "disk.raw")) as running:
        code, _, err = await running.end()
    assert code == 10
    assert err.startswith(f"farplug: a SPICE server answers at {target.removeprefix('tcp://')}, not a usbredir chardev")


async def test_a_vm_without_an_operating_system_does_not_use_the_disk(guests: Guests, tmp_path: Path) -> None:
    async with guests.fresh(GuestConfig(ports=(SpicePort(),), boot=Boot.BIOS)) as guest:
        await guest.wait_for_console("No bootable device")
        async with farplug("connect", guest.targets[0], "--usb-disk", blank(tmp_path / "disk.raw")) as running:
            await running.until("disk.raw: attached")
            await running.until("disk.raw: the VM has not used the device yet: does an operating system run there")
            running.process.send_signal(signal.SIGINT)
            assert await running.exit_code() == 0
    assert not any("configured" in line for line in running.lines)


async def test_refused_by_the_vms_filter(guests: Guests, tmp_path: Path) -> None:
    config = GuestConfig(ports=(SpicePort(filter="0x08:-1:-1:-1:0|-1:-1:-1:-1:1"),), boot=Boot.BIOS)
    async with (
        guests.fresh(config) as guest,
        farplug("connect", guest.targets[0], "--usb-disk", blank(tmp_path / "disk.raw")) as running,
    ):
        code, _, err = await running.end()
    assert code == 8
    assert "filter" in err


async def test_no_usbredir_channel(guests: Guests, tmp_path: Path) -> None:
    async with guests.fresh(GuestConfig(spice=Spice(), boot=Boot.BIOS)) as guest:
        for command in (
            ("connect", guest.spice.target, "--usb-disk", blank(tmp_path / "disk.raw")),
            ("doctor", guest.spice.target),
        ):
            async with farplug(*command) as running:
                code, _, err = await running.end()
            assert code == 7
            assert "the VM has no usbredir channel" in err
            assert "<redirdev bus='usb' type='spicevmc'/>" in err


async def test_a_port_that_another_farplug_uses(guest: QemuGuest, tmp_path: Path) -> None:
    images = [blank(tmp_path / name) for name in ("a.raw", "b.raw")]
    async with farplug("connect", guest.targets[2], "--usb-disk", images[0]) as first:
        await first.until("configured by the guest")
        async with farplug("connect", guest.targets[2], "--usb-disk", images[0]) as second:
            code, _, err = await second.end()
            assert (code, "is in use" in err) == (3, True)
        async with farplug("connect", guest.targets[2], "--usb-disk", images[1]) as second:
            # QEMU serves one connection; the next one waits in its backlog, as with a paused VM.
            await second.until("its VM may be paused, or the port may serve another client; waiting")
            first.process.send_signal(signal.SIGINT)
            assert await first.exit_code() == 0
            await second.until("configured by the guest")
            second.process.send_signal(signal.SIGINT)
            assert await second.exit_code() == 0


async def test_a_console_and_farplug_together(guest: QemuGuest, tmp_path: Path) -> None:
    spice, _, tcp, unix, _ = guest.targets
    images = [blank(tmp_path / name) for name in ("spice.raw", "tcp.raw", "unix.raw")]
    async with (
        farplug("connect", spice, "--usb-disk", images[0]) as over_spice,
        farplug("connect", tcp, "--usb-disk", images[1]) as over_tcp,
        farplug("connect", unix, "--usb-disk", images[2]) as over_unix,
    ):
        await over_spice.until("SPICE serves one client at a time")
        for running in (over_spice, over_tcp, over_unix):
            await running.until("configured by the guest")
        console = await open_session(parse_target(spice))
        try:
            assert await over_spice.exit_code() == 9
            for running, image in ((over_tcp, images[1]), (over_unix, images[2])):
                disk = await disk_with(guest, serial_number(image))
                await guest.check(f"printf farplug | dd of={disk} conv=notrunc,fsync 2>/dev/null")
                running.process.send_signal(signal.SIGINT)
                code, out, _ = await running.end()
                assert code == 0
                assert "SPICE serves" not in "".join(running.lines) + out
                assert image.read_bytes()[:7] == b"farplug"
                await gone(guest, disk)
        finally:
            await console.close()


async def test_doctor(guest: QemuGuest) -> None:
    for target, port in ((guest.targets[0], "usbredir 1"), (guest.targets[2], "tcp"), (guest.targets[3], "unix")):
        async with farplug("doctor", target) as running:
            code, out, err = await running.end()
        assert (code, err) == (0, "")
        assert f"ok      {port:<20}ready: qemu usb-redir guest" in out


async def test_demo_with_its_page() -> None:
    async with farplug("demo", "--page") as running:
        link = (await running.until("#token=")).strip()
        before = "".join(running.lines)
        for text in ("$ mkfs.vfat", "SuperSpeed", 'TYPE="vfat"', "Hello from the image", "the same 56 bytes"):
            assert text in before
        page = await asyncio.to_thread(lambda: urlopen(link.partition("#")[0]).read())
        assert b"<title>farplug" in page
        running.process.send_signal(signal.SIGINT)
        code, out, err = await running.end()
    assert (code, err) == (0, "")
    assert "farplug page -s vm.vv" in out


async def test_demo_interrupted() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        async with farplug("demo") as running:
            await running.until("$ qemu-system")
            children = Path(f"/proc/{running.process.pid}/task/{running.process.pid}/children").read_text().split()
            assert len(children) == 1
            running.process.send_signal(number)
            code, _, err = await running.end()
            assert (code, err) == (130, "farplug: interrupted\n")
            assert not Path(f"/proc/{children[0]}").exists()


async def test_three_disks_on_one_port(guest: QemuGuest, tmp_path: Path) -> None:
    images = [tmp_path / f"{number}.raw" for number in range(3)]
    for image in images:
        image.write_bytes(os.urandom(MIB) * 8)
    before = [hashlib.md5(image.read_bytes()).hexdigest() for image in images]
    options = ["--usb-disk", images[0], "--usb-disk", images[1], "--usb-disk-ro", images[2]]
    async with farplug("connect", guest.targets[2], *options) as running:
        await running.until("the VM has 1 port for 3 devices: they are plugged as 3 logical units of one device")
        await running.until("0.raw, 1.raw, 2.raw: configured by the guest")
        await until(guest, '[ "$(ls -d /sys/block/sd* 2>/dev/null | wc -l)" = 3 ]')
        listed = await guest.check(
            "for b in /sys/block/sd*; do"
            " echo $(readlink $b/device | grep -o '[0-9]*$') $(cat $b/ro) $(tail -c 16 $b/device/vpd_pg80)"
            " $(md5sum </dev/${b##*/}); done"
        )
        assert sorted(line.split()[:4] for line in listed.splitlines()) == [
            [str(lun), str(int(lun == 2)), serial_number(image), before[lun]] for lun, image in enumerate(images)
        ]
        await guest.check(
            "for b in /sys/block/sd*; do lun=$(readlink $b/device | grep -o '[0-9]*$');"
            " [ $lun = 2 ] || printf unit-$lun | dd of=/dev/${b##*/} conv=notrunc,fsync 2>&1; done"
        )
        running.process.send_signal(signal.SIGINT)
        code, _, err = await running.end()
    assert (code, err) == (0, "")
    assert [image.read_bytes()[:6] for image in images[:2]] == [b"unit-0", b"unit-1"]
    assert hashlib.md5(images[2].read_bytes()).hexdigest() == before[2]


async def test_a_snapshot_is_continued_and_committed(guest: QemuGuest, tmp_path: Path) -> None:
    image, changes = blank(tmp_path / "disk.raw"), tmp_path / "changes"

    async def run(command: str, *options: object) -> str:
        disk_option = "--usb-disk" if options else "--usb-disk-ro"  # being written would spoil the snapshot
        async with farplug("connect", guest.targets[0], disk_option, image, *options) as running:
            await running.until("configured by the guest")
            disk = await disk_with(guest, serial_number(image))
            output = await guest.check(command.format(disk=disk))
            running.process.send_signal(signal.SIGINT)
            code, _, err = await running.end()
            assert (code, err) == (0, "")
        await gone(guest, disk)
        return output

    write = "printf snapshot | dd of={disk} bs=1 seek=70000 conv=notrunc,fsync 2>/dev/null"
    read = "dd if={disk} bs=1 skip=70000 count=8 2>/dev/null"
    await run(write, "--snapshot")
    assert not any(image.read_bytes())
    await run(write, "--snapshot-file", changes)
    assert not any(image.read_bytes())
    assert await run(read, "--snapshot-file", changes) == "snapshot"
    assert await run(read) == "\0" * 8
    async with farplug("image", "commit", changes, "--image", image) as running:
        code, out, err = await running.end()
    assert (code, err) == (0, "")
    assert "written to" in out
    assert not changes.exists()
    assert image.read_bytes()[70000:70008] == b"snapshot"


async def test_a_folder_and_a_cd_that_is_swapped(guest: QemuGuest, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "A long name.txt").write_text(f"This is {name}.")
        async with farplug(
            *("image", "create", "--format", "iso9660", "--from", tmp_path / name, "-o", tmp_path / f"{name}.iso")
        ) as running:
            assert await running.exit_code() == 0
    options = ["--usb-folder", tmp_path / "one", "--usb-cdrom", tmp_path / "one.iso", "--commands"]
    async with farplug("connect", guest.targets[2], *options, stdin=subprocess.PIPE) as running:
        stdin = running.process.stdin
        assert stdin is not None
        await running.until("they are plugged as 2 logical units of one device")
        await running.until("port 0: LUN 0 one, LUN 1 cdrom0 (one.iso)")
        await running.until("configured by the guest")
        read = "mount -o ro {} /mnt && cat '/mnt/A long name.txt'; umount /mnt 2>/dev/null"
        async with asyncio.timeout(GUEST_TIMEOUT):
            while await guest.check(f"{read.format('-t vfat /dev/sda1')}; :") != "This is one.":
                await asyncio.sleep(0.1)
            while await guest.check(f"{read.format('-t iso9660 /dev/sr0')}; :") != "This is one.":
                await asyncio.sleep(0.1)
        # Ubuntu's kernel does not lock the tray by default.
        await guest.check("echo 1 >/proc/sys/dev/cdrom/lock && mount -t iso9660 -o ro /dev/sr0 /mnt")
        stdin.write(b"eject\n")
        await running.until("one.iso is locked by the guest")
        await running.until("unmount it in the guest, or eject it by force")
        stdin.write(b"list\n")
        await running.until(f"cdrom0: {tmp_path}/one.iso, locked by the guest")
        await guest.check("umount /mnt")
        stdin.write(f"insert '{tmp_path}/two.iso'\n".encode())
        await running.until(f"cdrom0: {tmp_path}/two.iso inserted")
        assert await guest.check(read.format("-t iso9660 /dev/sr0")) == "This is two."
        stdin.write(b"eject two.iso\neject cdrom0\n")
        await running.until(f"cdrom0: {tmp_path}/two.iso ejected")
        await running.until("cdrom0 is empty")
        assert (await guest.run(read.format("-t iso9660 /dev/sr0"))).output != "This is two."
        stdin.write(b"quit\n")
        code, _, err = await running.end()
    assert (code, err) == (0, "")
