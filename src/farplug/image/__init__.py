"""Make disk images of folders, with the standard tools: fdisk, mkfs, mtools, mke2fs, xorriso."""

from typing import TYPE_CHECKING

from farplug.lazy import lazy_import

if TYPE_CHECKING:
    from farplug.image.build import create_image, create_iso
    from farplug.image.folder import folder_store
    from farplug.image.volume import Format, Partition, Volume
    from farplug.store.base import ProgressCallback

__all__ = ["Format", "Partition", "ProgressCallback", "Volume", "create_image", "create_iso", "folder_store"]

lazy_import(
    globals(),
    {
        "Format": ".volume",
        "Partition": ".volume",
        "ProgressCallback": "..store.base",
        "Volume": ".volume",
        "create_image": ".build",
        "create_iso": ".build",
        "folder_store": ".folder",
    },
)
