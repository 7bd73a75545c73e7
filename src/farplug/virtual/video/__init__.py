"""A USB camera: MJPEG and uncompressed video, from files, a pattern, or frames made in Python."""

from typing import TYPE_CHECKING

from farplug.lazy import lazy_import

if TYPE_CHECKING:
    from farplug.virtual.video.camera import Camera, camera_device
    from farplug.virtual.video.frames import FrameSource, MjpegFile, MjpegFolder
    from farplug.virtual.video.pattern import Pattern
from farplug.virtual.video.modes import Encoding, Mode

__all__ = [
    "Camera",
    "Encoding",
    "FrameSource",
    "MjpegFile",
    "MjpegFolder",
    "Mode",
    "Pattern",
    "camera_device",
]

lazy_import(
    globals(),
    {
        "Camera": ".camera",
        "camera_device": ".camera",
        "FrameSource": ".frames",
        "MjpegFile": ".frames",
        "MjpegFolder": ".frames",
        "Pattern": ".pattern",
    },
)
