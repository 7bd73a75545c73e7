"""Plug an image into a VM until Ctrl-C, and print what happens.

python examples/plug.py spice://127.0.0.1:5900 drivers.raw
"""

from __future__ import annotations

import asyncio
import contextlib
import sys

import farplug


async def main(target: str, image: str) -> None:
    """Plug ``image`` into the VM at ``target``, and stay until the VM ends or this task is cancelled."""
    async with farplug.connect(target) as guest, guest.plug(farplug.disk(image)) as attachment:
        await attachment.configured()  # the VM's driver works with it
        print(f"{attachment.label}: {attachment.state}", flush=True)
        async for event in attachment.events():
            print(event, flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(*sys.argv[1:]))
