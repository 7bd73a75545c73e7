"""Runs in the near guest: farplug as a library, led over a connection to the tests.

``plugger.py HOST PORT`` connects, does what each line asks for, side by side, and answers with a line. A request is a
JSON list: its number, the name of a method of :class:`Plugger`, and arguments. An answer is the number and the result,
or the number, null and the error. An event comes as "event", the device, the kind of event, and its words.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import asdict
from typing import Any

from farplug.errors import FarplugError
from farplug.events import PortEvent
from farplug.guest import connect
from farplug.hub import Attachment, Hub
from farplug.physical import find_device
from farplug.target import parse_target


class Plugger:
    """Plugs devices in and out; its public methods are the requests."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._hubs: dict[str, Hub] = {}
        self._attachments: dict[int, Attachment] = {}

    async def connect(self, target: str) -> None:
        """Connect to a guest."""
        hub = self._hubs[target] = Hub(await connect(parse_target(target)))

        def happened(attachment: Attachment, event: PortEvent) -> None:
            self._say("event", str(attachment.device.identity), type(event).__name__, str(event))

        hub.subscribe(happened)

    async def leave(self, target: str) -> None:
        """Unplug everything from a guest, and leave it; does nothing the second time."""
        if hub := self._hubs.pop(target, None):
            await hub.close()

    async def plug(self, number: int, target: str, place: str) -> None:
        """Plug in the device at BUS-NUMBER, as device ``number`` of the tests; done when it is configured."""
        device = find_device(*map(int, place.split("-")))
        attachment = self._attachments[number] = await self._hubs[target].plug(device)
        await attachment.configured()

    async def unplug(self, number: int) -> None:
        """Take device ``number`` out."""
        await self._attachments.pop(number).unplug()

    async def figures(self, number: int) -> dict[str, dict[str, int]]:
        """What moved through each endpoint of device ``number``."""
        return {f"{one.endpoint:02x}": asdict(one) for one in self._attachments[number].figures}

    async def descriptors(self) -> list[str]:
        """What this process has open."""
        folder = "/proc/self/fd"
        links = []
        for name in os.listdir(folder):
            try:
                links.append(os.readlink(f"{folder}/{name}"))
            except FileNotFoundError:
                pass  # the listing's own
        return sorted(links)

    async def do(self, line: bytes) -> None:
        """Do what a line asks for, and answer."""
        number, name, *arguments = json.loads(line)
        try:
            result: Any = await getattr(self, name)(*arguments)
        except FarplugError as error:
            self._say(number, None, f"{error.reason}: {error}")
        except Exception as error:
            self._say(number, None, repr(error))
        else:
            self._say(number, result)

    def _say(self, *words: object) -> None:
        self._writer.write(json.dumps(words).encode() + b"\n")


async def main() -> None:
    reader, writer = await asyncio.open_connection(sys.argv[1], int(sys.argv[2]))
    plugger = Plugger(writer)
    tasks = set()
    while line := await reader.readline():
        task = asyncio.create_task(plugger.do(line))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


if __name__ == "__main__":
    asyncio.run(main())
