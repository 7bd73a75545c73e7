"""Plug an image into a VM until Ctrl-C, and print what happens.

python examples/plug.py spice://127.0.0.1:5900 drivers.raw
"""

from __future__ import annotations

import asyncio
import contextlib
import sys

from farplug.app.guest import Hub
from farplug.target import open_session, parse_target
from farplug.virtual.disk import disk_device


async def main(target: str, image: str) -> None:
    """Plug ``image`` into the VM at ``target``, and stay until the VM ends or this task is cancelled."""
    device = disk_device(image)
    try:
        async with Hub(await open_session(parse_target(target))) as hub:
            hub.subscribe(lambda attachment, event: print(f"{attachment.port.name}: {event}", flush=True))
            attachment = await hub.plug(device)
            await attachment.configured()  # the VM's driver works with it
            await attachment.ended()
    finally:
        await device.dispose()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(*sys.argv[1:]))
