"""Run in the near guest: farplug as a library, controlled by the tests over a connection.

``plugger.py HOST PORT`` connects, and executes each line as a request, in parallel. A request is a JSON list: its
number, the name of a method of :class:`Plugger`, and arguments. The reply is the number and the result, or the number,
null and the error. An event is "event", the device, the kind of event, and its text.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pwd
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests import starter

from farplug.app.attachment import Attachment
from farplug.app.auto import AutoListener, AutoPlugger
from farplug.app.events import Event
from farplug.app.guest import Guest
from farplug.app.policy import Policy, Rules
from farplug.app.settings import Follow
from farplug.cli import connect, devices, main, session  # noqa: F401  (what copies of this process run)
from farplug.errors import FarplugError
from farplug.machine.choose import Choice
from farplug.physical import find_device
from farplug.target import open_session, parse_target

PACKETS = logging.getLogger("farplug.redirection.port_protocol")


class Records(logging.Handler):
    """Records messages."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


class Notes(AutoListener):
    """Sends the notes of a keeper to the tests, as events of kind "note"."""

    def __init__(self, say: Callable[..., None]) -> None:
        self._say = say

    def note(self, text: str) -> None:
        self._say("event", "", "note", text)

    def skipped(self, error: FarplugError) -> None:
        self._say("event", "", "skipped", str(error))


class Plugger:
    """Plugs devices in and out; its public methods are the requests."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._hubs: dict[str, Guest] = {}
        self._attachments: dict[int, Attachment] = {}
        self._records = Records()

    async def connect(self, target: str) -> None:
        """Connect to a guest."""
        hub = self._hubs[target] = Guest(session=await open_session(parse_target(target)))

        def happened(event: Event) -> None:
            if event.source is not None:
                attachment = hub.find(event.attachment or "")
                assert attachment is not None
                self._say("event", str(attachment.device.identity), type(event.source).__name__, event.message)

        hub.stream.subscribe(happened)

    async def leave(self, target: str) -> None:
        """Unplug everything from a guest, and disconnect; a second call does nothing."""
        if hub := self._hubs.pop(target, None):
            await hub.close()

    async def offer(self, number: int, target: str, place: str) -> list[str]:
        """Plug in the device at BUS-NUMBER, as device ``number`` of the tests; return the warnings about it."""
        device = find_device(*map(int, place.split("-")))
        self._attachments[number] = await self._hubs[target].plug(device)
        return list(device.warnings)

    async def plug(self, number: int, target: str, place: str) -> None:
        """Offer a device, and wait until the guest has configured it."""
        await self.offer(number, target, place)
        await self._attachments[number].configured()

    async def unplug(self, number: int) -> None:
        """Unplug device ``number``."""
        await self._attachments.pop(number).unplug()

    async def keep(self, target: str, choice: str, follow: str) -> None:
        """Plug in what a choice names, and keep it plugged as long as :meth:`let_go` is not asked for."""
        policy = Policy(Rules(choices=[Choice.parse(choice)], follow=Follow(follow)))
        self._keeper = AutoPlugger(policy, Notes(self._say))
        await self._keeper.prepare()
        self._keeping = asyncio.ensure_future(self._keeper.run(self._hubs[target]))

    async def let_go(self) -> None:
        """Keep nothing any more."""
        self._keeping.cancel()
        await asyncio.wait([self._keeping])
        await self._keeper.close()

    async def figures(self, number: int) -> dict[str, dict[str, int]]:
        """Return the figures of each endpoint of device ``number``."""
        return {f"{one.endpoint:02x}": asdict(one) for one in self._attachments[number].endpoints}

    async def record(self) -> None:
        """Record the packets of devices that are plugged in from now on."""
        self._records.messages.clear()
        PACKETS.addHandler(self._records)
        PACKETS.setLevel(logging.DEBUG)

    async def recorded(self) -> list[str]:
        """Stop recording, and return the packets as text."""
        PACKETS.removeHandler(self._records)
        PACKETS.setLevel(logging.NOTSET)
        return self._records.messages

    async def memory(self) -> int:
        """Return the resident memory of this process, in bytes."""
        pages = Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    async def descriptors(self) -> list[str]:
        """Return the open files of this process."""
        folder = "/proc/self/fd"
        links = []
        for name in os.listdir(folder):
            try:
                links.append(os.readlink(f"{folder}/{name}"))
            except FileNotFoundError:
                pass  # the descriptor of the listing
        return sorted(links)

    async def run(self, name: str, words: list[str], user: str | None) -> int:
        """Run the command line; its output is NAME.out, its process id NAME.pid. Return the exit code.

        With the rights of a user it has those of the groups that the user is in by now.
        """
        rights: dict[str, Any] = {}
        if user is not None:
            group = pwd.getpwnam(user).pw_gid
            rights = {"user": user, "group": group, "extra_groups": os.getgrouplist(user, group)}
        output = os.open(f"{name}.out", os.O_WRONLY | os.O_CREAT)
        try:
            process = starter.Popen(
                [*starter.COMMAND, *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **rights,
            )
        finally:
            os.close(output)
        new = Path(f"{name}.new")
        new.write_text(f"{process.pid}\n")
        new.rename(f"{name}.pid")
        return int(await asyncio.to_thread(process.wait))

    async def do(self, line: bytes) -> None:
        """Execute a request, and send the reply."""
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


async def serve() -> None:
    reader, writer = await asyncio.open_connection(sys.argv[1], int(sys.argv[2]))
    plugger = Plugger(writer)
    tasks = set()
    while line := await reader.readline():
        task = asyncio.create_task(plugger.do(line))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


if __name__ == "__main__":
    starter.prepare()
    asyncio.run(serve())
