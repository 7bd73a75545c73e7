"""Plug an image into a VM from Python, wait until its driver took it, and leave after a while.

python examples/plug.py spice://127.0.0.1:5900 drivers.raw
"""

from __future__ import annotations

import asyncio
import sys

from farplug.guest import connect
from farplug.hub import Hub
from farplug.target import parse_target
from farplug.virtual.disk import disk_device


async def main(target: str, image: str) -> None:
    """Plug ``image`` into the VM at ``target`` for ten seconds."""
    device = disk_device(image)
    hub = Hub(await connect(parse_target(target)))
    hub.subscribe(lambda attachment, event: print(f"{attachment.port.name}: {event}"))
    try:
        attachment = await hub.plug(device)
        await attachment.configured()
        await asyncio.sleep(10)
    finally:
        await hub.close()
        await device.dispose()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
