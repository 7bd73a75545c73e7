"""Sources: images and folders of this machine, keyboards and so on, opened, and made into USB devices."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeAlias

from farplug.app.kinds import KINDS, Medium, Opening, Parts, SourceContent, Whole
from farplug.app.media import Media
from farplug.app.settings import Names, Source, SourceKind, StorageSettings
from farplug.errors import ImageError, PortError, Reason, Remedy
from farplug.store import OverlayStore
from farplug.store.content import Content
from farplug.usb.device import Device
from farplug.usb.types import Speed
from farplug.virtual.device import VirtualDevice
from farplug.virtual.function import Function
from farplug.virtual.storage import MassStorage
from farplug.virtual.unit import LogicalUnit

Copying: TypeAlias = Callable[[str, int, int], None]
"""Called on the event loop while a folder is copied: its label, bytes copied, bytes in all."""


@dataclass(slots=True, eq=False)
class OpenSource:
    """A source that is open.

    Attributes:
        source: what was opened.
        label: what it is called: the name of the file, or ``cdrom0``.
        title: the label, and what is in it, or what a user must know of it: ``cdrom0 (installer.iso)``.
        content: what it becomes.
        place: its position among all sources.
    """

    source: Source
    label: str
    title: str
    content: SourceContent
    place: int = 0

    @property
    def unit(self) -> LogicalUnit | None:
        """Return the logical unit that it became; None: it is none, or none yet."""
        return self.content.unit if isinstance(self.content, Medium) else None

    @property
    def is_snapshot(self) -> bool:
        """Return whether what the guest writes goes to a snapshot."""
        return isinstance(self.content, Medium) and isinstance(self.content.store, OverlayStore)

    async def close(self) -> None:
        """Release what was opened; a second call has no effect."""
        await self.content.close()


@dataclass(slots=True, eq=False)
class Sources:
    """The sources of a guest that are open.

    Attributes:
        guest: the name of the guest, which no other one has.
        opened: those of its settings, in their order.
        media: the files that clients offer; None: there are no clients.
    """

    guest: str = ""
    opened: list[OpenSource] = field(default_factory=list)
    media: Media | None = None
    _labels: set[str] = field(default_factory=set)

    async def open(
        self,
        sources: Sequence[Source],
        storage: StorageSettings,
        copying: Copying,
        note: Callable[[str, Remedy], None] = lambda text, remedy: None,
    ) -> None:
        """Open all sources except USB devices. A folder is copied first.

        Args:
            sources: what to open.
            storage: how.
            copying: called while a folder is copied.
            note: called with what may be a mistake.

        Raises:
            ImageError: a source cannot be used. :meth:`close` closes the others.
        """
        for place, source in enumerate(sources):
            if source.kind is SourceKind.USB_DEVICE:
                continue
            opened = await open_source(source, storage, self, copying)
            opened.place = place
            self.opened.append(opened)
            if source.kind in (SourceKind.DISK, SourceKind.READ_ONLY_DISK) and _looks_like_iso(Path(source.path)):
                remedy = Remedy("to plug it in as a CD-ROM", setting="usb_cdrom", value=source.path)
                note(f"{opened.label} is an ISO image", remedy)

    def name(self, source: Source) -> tuple[str, str]:
        """Return a label that is not in use, and a title for a source."""
        path = Path(source.path)
        name = path.name or str(path)
        if prefix := KINDS[source.kind].label:
            number = next(n for n in range(len(self._labels) + 1) if f"{prefix}{n}" not in self._labels)
            label = f"{prefix}{number}"
            title = f"{label} ({name})" if source.kind.names is Names.FILE else label
        else:
            numbers = range(2, len(self._labels) + 3)
            labels = [name, *(f"{name}-{number}" for number in numbers)]
            label = title = next(label for label in labels if label not in self._labels)
        self._labels.add(label)
        return label, title

    def release(self, opened: OpenSource) -> None:
        """Take note that a source is closed: its label is free."""
        self.free(opened.label)
        if opened in self.opened:
            self.opened.remove(opened)

    def free(self, label: str) -> None:
        """Take note that no source has a label any more."""
        self._labels.discard(label)

    async def close(self) -> None:
        """Release all sources; releasing one twice has no effect."""
        opened, self.opened = self.opened, []
        await wait_for_all(one.close() for one in opened)


async def open_source(source: Source, storage: StorageSettings, sources: Sources, copying: Copying) -> OpenSource:
    """Open a source. A folder is copied first.

    Raises:
        FarplugError: the source cannot be used; for an image ``ImageError``.
    """
    label, title = sources.name(source)
    try:
        opening = Opening(storage, partial(copying, label), f"{sources.guest} {label}", sources.media)
        KINDS[source.kind].check(source, opening)
        content = await KINDS[source.kind].open(source, opening)
    except ImageError as error:
        sources.free(label)
        raise _explained(source, error, sources) from error
    except BaseException:
        sources.free(label)
        raise
    return OpenSource(source, label, f"{label} ({content.detail})" if content.detail else title, content)


def _explained(source: Source, error: ImageError, sources: Sources) -> ImageError:
    """Return the error of opening a source, with what the other sources explain."""
    before = [one.source.path for one in sources.opened]
    if error.reason is Reason.IN_USE and any(_same_file(source.path, path) for path in before):
        return ImageError(
            f"{source.path} is named twice: a disk that the VM writes to is the only one of its image",
            reason=error.reason,
            remedy="name it once; only read-only disks and disks with a snapshot share an image",
        )
    return error


def device_of(group: Sequence[OpenSource], storage: StorageSettings) -> Device:
    """Make one device of sources: images become its logical units, other sources functions of their own.

    A source that is a device of its own is alone in its group.

    Raises:
        PortError: the sources have more endpoints than a device can have.
    """
    if isinstance(whole := group[0].content, Whole):
        return whole.device
    media = [one.content for one in group if isinstance(one.content, Medium)]
    functions: list[Function] = []
    if media:
        functions.append(MassStorage(*(medium.make_unit(len(media)) for medium in media), transport=storage.transport))
    functions += (part for one in group if isinstance(one.content, Parts) for part in one.content.functions)
    products = {one.content.product for one in group}
    several = media[0].product if len(media) == len(group) else "Virtual Devices"
    try:
        return VirtualDevice(
            *functions,
            product=products.pop() if len(products) == 1 else several,
            serial_number=media[0].store.serial_number if media else "",
            speeds=storage.speed.speeds if media else (Speed.HIGH,),
        )
    except ValueError as error:
        raise PortError(
            f"{', '.join(one.label for one in group)} cannot share one port: {error}",
            reason=Reason.NO_FREE_PORT,
            remedy="plug fewer, or give the VM more ports",
        ) from error


def _same_file(one: str, other: str) -> bool:
    try:
        return Path(one).samefile(other)
    except OSError:
        return False


def _looks_like_iso(path: Path) -> bool:
    """Return whether an image is of a CD only: what boots as a disk, too, begins with a master boot record."""
    try:
        with path.open("rb") as file:
            content = Content.read(file.fileno())
    except OSError:
        return False
    return content.is_cd and not content.has_mbr


async def wait_for_all(calls: Iterable[Awaitable[object]]) -> None:
    """Wait for all calls, side by side; raise the first error when all have ended."""
    for result in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
