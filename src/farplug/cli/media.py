"""What a person names to be plugged in, opened, and put into devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

from farplug.store import BLOCK_SIZE, CacheMode, FileStore, OverlayStore, Store
from farplug.usb.types import Speed
from farplug.virtual.device import VirtualDevice
from farplug.virtual.disk import disk_device
from farplug.virtual.storage import StorageTransport


class Kind(Enum):
    """What a medium is for the guest."""

    DISK = auto()
    READ_ONLY_DISK = auto()


@dataclass(frozen=True, slots=True)
class Wish:
    """What a person names: a path, and what it is to be."""

    kind: Kind
    path: Path


@dataclass(frozen=True, slots=True)
class Manner:
    """How all of them are plugged.

    Attributes:
        speeds: what the devices may run at, the best first.
        transport: how the guest may talk to them.
        block_size: of disks, in bytes.
        cache: when what is written to disks is durable.
        force: also an image that this machine uses.
        snapshot: what is written to disks goes elsewhere, and the images do not change.
        snapshot_file: where to, if there is one disk; None: it is gone in the end.
    """

    speeds: Sequence[Speed] = (Speed.SUPER, Speed.HIGH)
    transport: StorageTransport = StorageTransport.AUTO
    block_size: int = BLOCK_SIZE
    cache: CacheMode = CacheMode.WRITEBACK
    force: bool = False
    snapshot: bool = False
    snapshot_file: Path | None = None


@dataclass(frozen=True, slots=True)
class Medium:
    """Something that was opened. ``label`` is what it is called in the output."""

    label: str
    store: Store


class Media:
    """What is to be plugged in: opened by :meth:`open`, put into devices by :meth:`devices`."""

    def __init__(self, wishes: Sequence[Wish], manner: Manner) -> None:
        self._wishes = wishes
        self._manner = manner
        self._media: list[Medium] = []

    def __len__(self) -> int:
        return len(self._wishes)

    async def open(self) -> None:
        """Open all of them.

        Raises:
            ImageError: one cannot be used. :meth:`close` closes the others.
        """
        for wish in self._wishes:
            name = wish.path.name
            label = str(wish.path) if any(medium.label == name for medium in self._media) else name
            self._media.append(Medium(label, self._open(wish)))

    def _open(self, wish: Wish) -> Store:
        manner = self._manner
        if wish.kind is Kind.DISK and manner.snapshot:
            return OverlayStore.open(
                wish.path,
                manner.snapshot_file,
                block_size=manner.block_size,
                cache=manner.cache,
                force=manner.force,
            )
        return FileStore.open(
            wish.path,
            read_only=wish.kind is Kind.READ_ONLY_DISK,
            block_size=manner.block_size,
            cache=manner.cache,
            force=manner.force,
        )

    def devices(self, ports: int) -> dict[VirtualDevice, str]:
        """Make devices of them, with a label each: one of each; if there are fewer ports, one of all."""
        groups = [self._media] if ports < len(self._media) else [[medium] for medium in self._media]
        return {
            disk_device(
                *(medium.store for medium in group), speeds=self._manner.speeds, transport=self._manner.transport
            ): ", ".join(medium.label for medium in group)
            for group in groups
        }

    async def close(self) -> None:
        """Give everything back. The devices are unplugged."""
        media, self._media = self._media, []
        for medium in media:
            await medium.store.close()
