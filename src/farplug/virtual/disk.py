"""Disks: mass storage over stores."""

from __future__ import annotations

import os
from collections.abc import Sequence

from farplug.scsi.disk import DiskUnit
from farplug.scsi.inquiry import PRODUCT
from farplug.store import BLOCK_SIZE, FileStore, Store
from farplug.usb.types import Speed
from farplug.virtual.device import VirtualDevice
from farplug.virtual.storage import MassStorage
from farplug.virtual.storage_transport import StorageTransport
from farplug.virtual.unit import LogicalUnit


class Disk(MassStorage):
    """Disks, each a logical unit: 1 to 16. The function owns the stores and closes them in :meth:`dispose`."""

    def __init__(self, *stores: Store, transport: StorageTransport = StorageTransport.AUTO) -> None:
        super().__init__(
            *(LogicalUnit(DiskUnit(store, luns=len(stores)), store) for store in stores), transport=transport
        )


def disk_device(
    *images: str | os.PathLike[str] | Store,
    read_only: bool = False,
    block_size: int = BLOCK_SIZE,
    speeds: Sequence[Speed] = (Speed.SUPER, Speed.HIGH),
    transport: StorageTransport = StorageTransport.AUTO,
) -> VirtualDevice:
    """Make a USB disk of an image, or of several images: one logical unit for each.

    Args:
        images: the path of a RAW image or a block device, which is opened and locked; or a store.
        read_only: open the images read-only. Ignored for stores.
        block_size: bytes in a block of the images, 512 or 4096. Ignored for stores.
        speeds: the speeds that the disk can run at, the best first.
        transport: the USB transports that the disk offers.

    Returns:
        The device. Call its :meth:`~farplug.virtual.device.VirtualDevice.dispose` when it is no longer needed.

    Raises:
        ImageError: an image cannot be used.
        ValueError: no image, or more than 16.
    """
    opened: list[FileStore] = []
    stores: list[Store] = []
    try:
        for image in images:
            if isinstance(image, Store):
                stores.append(image)
            else:
                opened.append(FileStore.open(image, read_only=read_only, block_size=block_size))
                stores.append(opened[-1])
        disk = Disk(*stores, transport=transport)
        return VirtualDevice(disk, product=PRODUCT, serial_number=stores[0].serial_number, speeds=speeds)
    except BaseException:
        for store in opened:
            store.abandon()
        raise
