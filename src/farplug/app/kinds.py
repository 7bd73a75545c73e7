"""Kinds of sources: how each is opened, and what it becomes.

To add a kind: a member of :class:`~farplug.app.settings.SourceKind` (and what its path names), an opener, a row of
:data:`KINDS`, and an option in ``cli/device_options.py``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Final, TypeAlias

from farplug.app.media import Media, Offer, eject_with_client
from farplug.app.settings import PATTERN, FolderFormat, Names, Source, SourceKind, StorageSettings
from farplug.errors import Reason, Remedy, UsageError
from farplug.scsi.disk import DiskUnit
from farplug.scsi.inquiry import CDROM_PRODUCT, PRODUCT
from farplug.store import FileStore, OverlayStore, Store, open_iso
from farplug.store.remote import open_remote_disk, open_remote_iso
from farplug.usb.device import Device
from farplug.virtual.cdrom import CdromDrive
from farplug.virtual.fido.presence import Presence
from farplug.virtual.function import Function
from farplug.virtual.unit import LogicalUnit


@dataclass(slots=True, eq=False)
class Medium:
    """A source of blocks that is open: it becomes a logical unit, alone or beside others.

    Attributes:
        store: its blocks.
        cdrom: it is in a CD-ROM drive.
        unit: the logical unit that it became; None: none yet.
    """

    store: Store
    cdrom: bool = False
    unit: LogicalUnit | None = None

    @property
    def product(self) -> str:
        """Return the product name that the guest sees."""
        return CDROM_PRODUCT if self.cdrom else PRODUCT

    @property
    def detail(self) -> str:
        """Return nothing: its label names the image."""
        return ""

    def make_unit(self, luns: int) -> LogicalUnit:
        """Make the source one of ``luns`` logical units."""
        if self.cdrom:
            self.unit = drive = CdromDrive(self.store, luns=luns)
            eject_with_client(drive, self.store)
        else:
            self.unit = LogicalUnit(DiskUnit(self.store, luns=luns), self.store)
        return self.unit

    async def close(self) -> None:
        """Close the store; a second call has no effect."""
        await self.store.close()


async def _nothing_shared() -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """A source of another kind that is open: functions of a virtual device.

    Attributes:
        functions: what the guest sees; each releases what it uses in its ``dispose``, of which a second call has no
            effect: the device that they become calls it, too.
        product: the product name that the guest sees, if nothing else is in the device.
        detail: what a user must know to use the other end, such as the path of a terminal; empty: nothing.
        release: releases what the functions share, after them; a second call has no effect.
    """

    functions: Sequence[Function]
    product: str
    detail: str = ""
    release: Callable[[], Awaitable[None]] = _nothing_shared

    async def close(self) -> None:
        """Release what the functions use, also if they became no device; a second call has no effect."""
        async with AsyncExitStack() as steps:  # from the last one to the first one, each in any case
            steps.push_async_callback(self.release)
            for function in self.functions:
                steps.push_async_callback(function.dispose)


@dataclass(frozen=True, slots=True, eq=False)
class Whole:
    """A source that is a device of its own, and shares no port.

    Attributes:
        device: what the guest sees.
        close: releases the device; a second call has no effect.
    """

    device: Device
    close: Callable[[], Awaitable[None]]

    @property
    def product(self) -> str:
        """Return the product name that the guest sees."""
        return self.device.identity.product

    @property
    def detail(self) -> str:
        """Return the identity: the label is only the device's place."""
        return str(self.device.identity)


SourceContent: TypeAlias = Medium | Parts | Whole
"""What a source becomes."""


@dataclass(frozen=True, slots=True)
class Opening:
    """What an opener may need besides the source.

    Attributes:
        storage: how images and folders are opened.
        copying: called on the event loop while a folder is copied: bytes copied, bytes in all.
        identity: the same each time that the source is opened, and another one for each source of each guest.
        media: the files that clients offer; None: there are no clients.
    """

    storage: StorageSettings
    copying: Callable[[int, int], None]
    identity: str = ""
    media: Media | None = None

    def offered(self, source: Source) -> Offer | None:
        """Return the file of a client that a source is; None: it is one of this machine."""
        return None if self.media is None else self.media.find(source.path)


Opener: TypeAlias = Callable[[Source, Opening], Awaitable[SourceContent]]
"""Opens a source. Raises a :class:`~farplug.errors.FarplugError` if the source cannot be used."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of source.

    Attributes:
        open: opens a source of this kind.
        label: its sources are named ``label0``, ``label1`` and so on; empty: after the file.
        repeatable: the same source twice is two devices; otherwise the second one is plugged in already.
        of_clients: its sources may be files that clients offer.
    """

    open: Opener
    label: str = ""
    repeatable: bool = False
    of_clients: bool = False

    def check(self, source: Source, opening: Opening) -> None:
        """Check that a source is not a file of a client, if the kind makes nothing of these.

        Raises:
            UsageError: it is one, or one that is not offered any more.
        """
        if self.of_clients or source.kind.names is not Names.FILE:
            return
        if (offer := opening.offered(source)) is not None:
            raise UsageError(
                f"{offer.file.name} is a file of a client: only CD-ROM drives and read-only disks are made of these",
                reason=Reason.BAD_SETTING,
                remedy=Remedy("plug it in read-only", setting="usb_disk_ro", value=source.path),
            )


# Images and folders -----------------------------------------------------------------------------------------------


async def _open_disk(source: Source, opening: Opening) -> Medium:
    storage = opening.storage
    if storage.snapshot or source.snapshot is not None:
        return Medium(
            OverlayStore.open(
                source.path,
                source.snapshot,
                block_size=int(storage.block_size),
                cache=storage.cache,
                force=storage.force,
            )
        )
    return _open_image(source, storage, read_only=False)


async def _open_read_only_disk(source: Source, opening: Opening) -> Medium:
    if (offer := opening.offered(source)) is not None:
        storage = opening.storage
        return Medium(
            await open_remote_disk(offer.file, offer.path, block_size=int(storage.block_size), force=storage.force)
        )
    return _open_image(source, opening.storage, read_only=True)


def _open_image(source: Source, storage: StorageSettings, *, read_only: bool) -> Medium:
    block_size = int(storage.block_size)
    return Medium(
        FileStore.open(
            source.path, read_only=read_only, block_size=block_size, cache=storage.cache, force=storage.force
        )
    )


async def _open_cdrom(source: Source, opening: Opening) -> Medium:
    if (offer := opening.offered(source)) is not None:
        return Medium(await open_remote_iso(offer.file, offer.path, force=opening.storage.force), cdrom=True)
    return Medium(open_iso(source.path, force=opening.storage.force), cdrom=True)


class _Abandoned(Exception):
    """The copy was cancelled."""


async def _open_folder(source: Source, opening: Opening) -> Medium:
    """Copy a folder in a thread. When the call is cancelled, the thread ends soon."""
    from farplug.image import Format, folder_store

    loop = asyncio.get_running_loop()
    abandoned = Event()
    storage = opening.storage

    def report(done: int, total: int) -> None:
        if abandoned.is_set():
            raise _Abandoned
        loop.call_soon_threadsafe(opening.copying, done, total)

    copy = asyncio.ensure_future(
        asyncio.to_thread(
            folder_store,
            Path(source.path),
            format=None if storage.folder_format is FolderFormat.AUTO else Format(storage.folder_format),
            block_size=int(storage.block_size),
            progress=report,
        )
    )
    try:
        return Medium(await asyncio.shield(copy))
    except asyncio.CancelledError:
        abandoned.set()
        await asyncio.wait([copy])
        if copy.exception() is None:
            await copy.result().close()
        raise


# Input devices ----------------------------------------------------------------------------------------------------


def _input(name: str) -> Kind:
    """Return the kind of a human interface device.

    Args:
        name: of its class in :mod:`farplug.virtual.hid`.
    """

    async def open(source: Source, opening: Opening) -> Parts:
        from farplug.virtual import hid

        function: type[Function] = getattr(hid, name)
        return Parts([function()], f"Virtual {name}")

    return Kind(open, name.lower(), repeatable=True)


# Ends on this machine -----------------------------------------------------------------------------------------------


async def _open_serial(source: Source, opening: Opening) -> Parts:
    from farplug.ends import parse_serial_end
    from farplug.virtual.serial import SerialLine

    end = parse_serial_end(source.path)
    await end.open()
    return Parts([SerialLine(end)], "Virtual Serial Port", end.address)


async def _open_network(source: Source, opening: Opening) -> Parts:
    from farplug.ends import parse_network_end
    from farplug.virtual.network import NetworkAdapter, parse_mac, stable_mac

    try:
        mac = stable_mac(opening.identity) if source.mac is None else parse_mac(source.mac)
    except ValueError as error:
        raise UsageError(str(error), reason=Reason.BAD_SETTING) from error
    end = parse_network_end(source.path)
    await end.open()
    return Parts([NetworkAdapter(end, mac=mac)], "Virtual Network Adapter", f"{end.address}, {mac.hex(':')}")


# Devices of other machines ----------------------------------------------------------------------------------------


async def _open_remote(source: Source, opening: Opening) -> Whole:
    from farplug.remote import RemoteDevice, parse_remote

    device = await RemoteDevice.connect(*parse_remote(source.path))
    return Whole(device, device.dispose)


# Security keys ----------------------------------------------------------------------------------------------------


async def _open_fido(source: Source, opening: Opening) -> Parts:
    from farplug.virtual.fido.key import PRODUCT as KEY_PRODUCT
    from farplug.virtual.fido.key import SecurityKey
    from farplug.virtual.fido.key_file import KeyFile

    presence = source.presence or Presence.AUTO
    detail = f"{Path(source.path).name}, presence: {presence}"
    return Parts([SecurityKey(KeyFile.open(source.path), presence)], KEY_PRODUCT, detail)


# Cameras ----------------------------------------------------------------------------------------------------------


async def _open_camera(source: Source, opening: Opening) -> Parts:
    from farplug.virtual.video.camera import PRODUCT as CAMERA_PRODUCT
    from farplug.virtual.video.camera import Camera
    from farplug.virtual.video.frames import open_frames
    from farplug.virtual.video.pattern import Pattern

    frames = Pattern() if source.path == PATTERN else await asyncio.to_thread(open_frames, source.path)
    return Parts([Camera(frames)], CAMERA_PRODUCT)


KINDS: Final[dict[SourceKind, Kind]] = {
    SourceKind.DISK: Kind(_open_disk),
    SourceKind.READ_ONLY_DISK: Kind(_open_read_only_disk, repeatable=True, of_clients=True),
    SourceKind.CDROM: Kind(_open_cdrom, "cdrom", repeatable=True, of_clients=True),
    SourceKind.FOLDER: Kind(_open_folder, repeatable=True),
    SourceKind.REMOTE_DEVICE: Kind(_open_remote),
    SourceKind.KEYBOARD: _input("Keyboard"),
    SourceKind.TABLET: _input("Tablet"),
    SourceKind.MOUSE: _input("Mouse"),
    SourceKind.TOUCHSCREEN: _input("Touchscreen"),
    SourceKind.GAMEPAD: _input("Gamepad"),
    SourceKind.SERIAL: Kind(_open_serial, "serial", repeatable=True),
    SourceKind.NETWORK: Kind(_open_network, "network", repeatable=True),
    SourceKind.FIDO: Kind(_open_fido, "fido"),
    SourceKind.CAMERA: Kind(_open_camera, "camera", repeatable=True),
}
"""How sources are opened; USB devices of this machine are chosen instead (:mod:`farplug.app.auto`)."""
