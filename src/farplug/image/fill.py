"""Fill disk images in a throw-away guest: no other tool copies files into exFAT and NTFS without root.

The guest's kernel writes the names and the structures, as any Linux does. The files are sent as a tar stream through a
virtio-serial port: nothing is stored twice, and a file that changes meanwhile is detected.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shlex
import shutil
import socket
import tarfile
from collections.abc import Coroutine
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from farplug.errors import ImageError, Reason, SetupError
from farplug.image.tools import PROGRESS_INTERVAL, ImageBuild, check_room, no_space_error
from farplug.image.tree import Entry, Tree, changed_error, open_file, opened_root, show
from farplug.image.volume import ALIGNMENT, Format, Volume
from farplug.programs import QEMU, install_remedy, search_path
from farplug.vm.agent import CommandFailed
from farplug.vm.guest_image import PROGRAMS
from farplug.vm.qemu import QemuGuest, private_folder
from farplug.vm.qemu_config import GuestConfig, option

BOOT_TIMEOUT = 300
FILL_TIMEOUT = 7 * 24 * 3600
"""Seconds. A disk of some TB takes days; the user sees the progress and can cancel."""

_MIN_HOST_SPACE = 16 << 20
"""Bytes. With less free space on this machine, an I/O error in the guest means that this machine's disk is full."""

_BUFFER = 1 << 20
_PORT = "farplug.tar"
_LOCALE = Path("/usr/lib/locale/C.utf8/LC_CTYPE")
"""Labels are UTF-8."""

_MAKE = {
    Format.FAT32: ":",  # already made
    Format.EXFAT: "mkfs.exfat -c {cluster} -L {label} /dev/vda1",
    Format.NTFS: "mkntfs -q -F -f -c {cluster} -L {label} -p {start} -H 255 -S 63 /dev/vda1",
}
_MOUNT = {
    Format.FAT32: "mount -t vfat -o utf8=1,tz=UTC",
    Format.EXFAT: "mount -t exfat -o iocharset=utf8",
    Format.NTFS: "ntfs-3g -o big_writes",  # not ntfs3, which Debian 12's kernel lacks
}
_MODULES = {Format.FAT32: "vfat", Format.EXFAT: "exfat", Format.NTFS: "fuse"}
# GNU tar writes 1 MiB at a time, busybox 4 KiB.
_PROGRAMS = {
    Format.FAT32: ("tar",),
    Format.EXFAT: ("tar", "mkfs.exfat"),
    Format.NTFS: ("tar", "mkntfs", "ntfs-3g"),
}

_SCRIPT = """
set -e
export LC_ALL=C.UTF-8
n=0
until [ -b /dev/vda1 ]; do
    [ $n -lt 100 ] || {{ echo "the guest finds no partition"; exit 1; }}
    n=$((n + 1))
    sleep 0.1
done
{make}
[ {entries} -gt 0 ] || exit 0
{mount} /dev/vda1 /mnt
for port in /sys/class/virtio-ports/*; do
    [ "$(cat "$port/name")" = {port} ] && tar -x -o -B -b 2048 -f "/dev/${{port##*/}}" -C /mnt
done
count=$(find /mnt -mindepth 1 | wc -l)
umount /mnt
[ "$count" = {entries} ] || {{ echo "$count files and folders arrived, not {entries}"; exit 1; }}
"""


def fill_in_guest(build: ImageBuild, volume: Volume) -> None:
    """Make the filesystem in a volume's partition (FAT32 is already made), and copy the tree into it. Blocks.

    Raises:
        SetupError: QEMU or another program is not installed, or no kernel can be downloaded.
        ImageError: NO_SPACE, CHANGED, TOO_LARGE for the image, or IO_ERROR.
    """
    _check_programs(volume.format)
    asyncio.run(_fill(build, volume))


def _check_programs(format: Format) -> None:
    """Check all programs, so that one error names all that are missing."""
    missing = [
        program
        for program in dict.fromkeys((QEMU, "busybox", *PROGRAMS, *_PROGRAMS[format]))
        if shutil.which(program, path=search_path()) is None
    ]
    if missing:
        which = "FAT32 with some of these names" if format is Format.FAT32 else format.full_name
        raise SetupError(
            f"{which} is made in a throw-away virtual machine, which needs {', '.join(missing)}",
            reason=Reason.MISSING_PROGRAM,
            remedy=install_remedy(*missing),
        )


async def _fill(build: ImageBuild, volume: Volume) -> None:
    folder = private_folder()
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / "tar"))
            listener.listen(1)
            sender: asyncio.Task[None] | None = None
            try:
                async with QemuGuest(_config(build, volume, folder / "tar")) as guest:
                    connection, _ = listener.accept()  # QEMU connects before it starts the guest
                    sender = asyncio.create_task(asyncio.to_thread(_send, connection, build.tree))
                    await _wait_reporting(build, guest.booted(BOOT_TIMEOUT))
                    try:
                        await _wait_reporting(build, guest.check(_script(build, volume), timeout=FILL_TIMEOUT))
                    except CommandFailed as error:
                        # If a file could not be read, the stream ended too early.
                        done, _ = await asyncio.wait([sender], timeout=1)
                        for task in done:
                            task.result()
                        raise _fill_error(build, error.result.output) from error
                    await _check_written(guest)
            finally:
                # QEMU is gone: the sender finds the connection closed.
                if sender is not None:
                    await asyncio.wait([sender])
                    sender.exception()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _config(build: ImageBuild, volume: Volume, port: Path) -> GuestConfig:
    drive = option(
        id="image",
        file=f"/proc/{os.getpid()}/fd/{build.fd}",
        format="raw",
        cache="unsafe",  # after a crash the incomplete image is useless anyway
        werror="report",
        **{"if": "none"},
    )
    block = volume.block_size
    return GuestConfig(
        modules=("virtio_blk", _MODULES[volume.format]),
        programs=_PROGRAMS[volume.format],
        files=((str(_LOCALE), _LOCALE),) if _LOCALE.exists() else (),
        extra_arguments=(
            *("-drive", drive),
            *("-device", f"virtio-blk-pci,drive=image,logical_block_size={block},physical_block_size={block}"),
            *("-chardev", option("socket", id="tar", path=port)),
            *("-device", "virtio-serial-pci,id=tar"),
            *("-device", option("virtserialport", bus="tar.0", chardev="tar", name=_PORT)),
        ),
    )


def _script(build: ImageBuild, volume: Volume) -> str:
    make = _MAKE[volume.format].format(
        cluster=volume.cluster_size, label=shlex.quote(volume.label), start=ALIGNMENT // volume.block_size
    )
    entries = len(build.tree.entries) if build.tree is not None else 0
    return _SCRIPT.format(make=make, mount=_MOUNT[volume.format], port=_PORT, entries=entries)


async def _wait_reporting(build: ImageBuild, work: Coroutine[Any, Any, object]) -> None:
    """Wait for work in the guest, and report the progress."""
    task = asyncio.create_task(work)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=PROGRESS_INTERVAL)
            build.report_progress()
        task.result()
    finally:
        task.cancel()


def _send(connection: socket.socket, tree: Tree | None) -> None:
    """Send a tree as a tar stream. Runs in a thread."""
    with connection:
        if tree is None:
            return
        with (
            ExitStack() as stack,
            connection.makefile("wb", buffering=_BUFFER) as stream,
            tarfile.open(mode="w|", fileobj=stream, format=tarfile.GNU_FORMAT, bufsize=_BUFFER) as archive,
        ):
            root_fd = stack.enter_context(opened_root(tree))
            for entry in tree.entries:
                info = tarfile.TarInfo(entry.path)
                info.mtime = entry.modified // 10**9
                if entry.is_folder:
                    info.type, info.mode = tarfile.DIRTYPE, 0o755
                    archive.addfile(info)
                    continue
                info.size = entry.size
                try:
                    with open(open_file(tree, root_fd, entry), "rb") as file:
                        archive.addfile(info, file)
                except ConnectionError:
                    raise
                except OSError as error:
                    raise _read_error(tree, entry, error) from error
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)  # until QEMU has read all and hangs up


def _read_error(tree: Tree, entry: Entry, error: OSError) -> ImageError:
    if error.errno in (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR):  # None: it ends early
        return changed_error(tree.root, [entry.path])
    return ImageError(f"{show(entry.path)} cannot be read: {(error.strerror or '').lower()}", reason=Reason.IO_ERROR)


async def _check_written(guest: QemuGuest) -> None:
    """Check for write errors in QEMU: the guest's kernel writes late, and umount reports no error."""
    await guest.qmp.execute("query-status")  # QEMU sends its events before this reply
    try:
        event = await guest.qmp.event("BLOCK_IO_ERROR", timeout=0)
    except TimeoutError:
        return
    why = f"{QEMU}: {event['data'].get('reason', 'I/O error')}"
    if "o space left" in why:
        raise no_space_error(why)
    raise ImageError(f"the image cannot be written ({why})", reason=Reason.IO_ERROR)


def _fill_error(build: ImageBuild, output: str) -> ImageError:
    """Return the error for a command that failed in the guest."""
    if "o space left" in output:
        return ImageError(
            "the image is full: the folder does not fit", reason=Reason.TOO_LARGE, remedy="make the image larger"
        )
    check_room(build.fd, _MIN_HOST_SPACE, "the folder of the image")
    lines = output.strip().splitlines()
    return ImageError(f"the guest cannot fill the image: {lines[-1] if lines else 'no output'}", reason=Reason.IO_ERROR)
