"""Plug disks into several ports from one process: that of which ``bench/start.py`` measures the memory.

Its arguments are HOST PORT IMAGE...: each image is a disk in a usbredir port of its own.
"""

from __future__ import annotations

import asyncio
import sys

from farplug.app.app import App
from farplug.app.settings import GuestSettings, Source, TargetSettings


async def _serve(target: str, images: list[str]) -> None:
    app = App()
    guests = [app.add(GuestSettings(TargetSettings(target), (Source.disk(image),))) for image in images]
    await asyncio.gather(*map(app.run, guests))


def main() -> None:
    """Serve the disks until the process is terminated."""
    host, port, *images = sys.argv[1:]
    asyncio.run(_serve(f"tcp://{host}:{port}", images))
