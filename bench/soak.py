"""Let browsers come and go for an hour while a VM's screen scrolls and changes its size, and watch for growth.

Each cycle opens the page in one to three browsers (websockets, as in ``bench/page.py``), some of which drive, press
keys, plug a file in, or are slow; closes them, some without a closing handshake; and then samples the memory and the
open files of the session and of the page. The run fails if the medians of the last third of the samples exceed those
of the first third by more than :data:`MEMORY_GROWTH` or :data:`FILE_GROWTH`, if the VM is lost, or if a SPICE
connection of the devices did not stay.

Prints a line of JSON for each sample.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from disk import machine
from farplug.cli.demo import SHELL
from farplug.errors import FarplugError
from farplug.vm.qemu import QemuGuest
from farplug.vm.qemu_config import GuestConfig, SpicePort
from jobs import MIB
from page import TIMEOUT, Program, Viewer, channels, served, slow_line

MEMORY_GROWTH = 6 * MIB
"""Bytes of resident memory. The allocator of Python and of the C library reach their level in the first cycles."""
FILE_GROWTH = 2
"""Open files of a process."""
WARM_UP = 240.0
"""Seconds at the beginning that are not compared: modules are imported, caches are filled."""
MODES = ("defx=1024 defy=768", "defx=800 defy=600", "defx=640 defy=480")
SCROLL = "while :; do seq -s ' ' 300 >/dev/tty1; sleep 0.05; done 2>/dev/null"
SWITCH = (
    'for one in /sys/class/vtconsole/*; do grep -q "frame buffer" $one/name && echo 0 >$one/bind; done; '
    "rmmod bochs && insmod /lib/modules/*/bochs.ko"
)


@dataclass(frozen=True, slots=True)
class Sample:
    """What the session and the page have while no browser is there.

    Attributes:
        seconds: since the begin.
        cycles: that are over.
        frames: pictures that browsers got in all.
        modes: changes of the size of the screen in all.
        session: resident bytes of the session.
        page: those of the page.
        session_files: open files of the session.
        page_files: those of the page.
    """

    seconds: float
    cycles: int
    frames: int
    modes: int
    session: int
    page: int
    session_files: int
    page_files: int


class Soak:
    """A run.

    Args:
        guest: the VM.
        folder: has ``image.iso``.
        url: of the page.
        session: the session's process.
        page: the page's process.
        chance: the source of random numbers.
    """

    def __init__(
        self, guest: QemuGuest, folder: Path, url: str, session: Program, page: Program, chance: random.Random
    ) -> None:
        self.samples: list[Sample] = []
        self.faults: list[str] = []
        self._guest = guest
        self._image = (folder / "image.iso").read_bytes()
        self._url = url
        self._session = session
        self._page = page
        self._chance = chance
        self._frames = self._modes = 0

    async def run(self, seconds: float) -> None:
        """Run cycles for a time."""
        before = await channels(self._guest)
        await self._guest.check(f"({SCROLL}) </dev/null & :")
        begin = time.monotonic()
        switching = asyncio.ensure_future(self._switch())
        try:
            while (now := time.monotonic() - begin) < seconds:
                if switching.done():
                    break
                await self._cycle()
                await asyncio.sleep(self._chance.uniform(0.5, 3))
                self._sample(round(now, 1))
        finally:
            switching.cancel()
            (error,) = await asyncio.gather(switching, return_exceptions=True)
        if not isinstance(error, asyncio.CancelledError):
            self.faults.append(f"changing the size failed: {error}")
        if await channels(self._guest) != before:
            self.faults.append("a SPICE connection of the devices did not stay")

    def _sample(self, seconds: float) -> None:
        sample = Sample(
            seconds,
            len(self.samples) + 1,
            self._frames,
            self._modes,
            self._session.memory(),
            self._page.memory(),
            self._session.files(),
            self._page.files(),
        )
        self.samples.append(sample)
        print(json.dumps(asdict(sample)), flush=True)

    async def _switch(self) -> None:
        """Change the size of the screen, again and again."""
        while True:
            await asyncio.sleep(self._chance.uniform(4, 20))
            await self._guest.check(f"{SWITCH} {self._chance.choice(MODES)}", timeout=TIMEOUT)
            self._modes += 1

    async def _cycle(self) -> None:
        async with AsyncExitStack() as stack:
            viewers = [
                await stack.enter_async_context(self._browser(slow=number > 0 and self._chance.random() < 0.3))
                for number in range(self._chance.randint(1, 3))
            ]
            actions = [self._use(viewer) for viewer in viewers]
            await asyncio.gather(*actions)
        self._frames += sum(viewer.frames for viewer in viewers)
        self.faults += [one for viewer in viewers for one in viewer.lost]

    @asynccontextmanager
    async def _browser(self, *, slow: bool) -> AsyncIterator[Viewer]:
        async with AsyncExitStack() as stack:
            line = None
            if slow:
                port = int(self._url.partition("/#")[0].rpartition(":")[2])
                line = await stack.enter_async_context(slow_line(port))
            viewer = await stack.enter_async_context(Viewer.open(self._url, line))
            viewer.slow = slow
            yield viewer

    async def _use(self, viewer: Viewer) -> None:
        """Use the page for some seconds, as people do."""
        if viewer.slow:
            await viewer.send("watch-screen")
            await asyncio.sleep(self._chance.uniform(2, 10))
            return
        await viewer.call("subscribe")
        await viewer.watch()
        if self._chance.random() < 0.5:
            await viewer.call("drive", {"take": True})
            for code in ("KeyA", "Backspace"):
                await viewer.send("key", {"code": code, "down": True})
                await viewer.send("key", {"code": code, "down": False})
        if self._chance.random() < 0.3:
            await self._plug(viewer)
        await asyncio.sleep(self._chance.uniform(1, 8))
        if self._chance.random() < 0.3:
            await viewer.call("unwatch-screen")

    async def _plug(self, viewer: Viewer) -> None:
        """Plug a file of the browser in. In half the cases the page is closed with it."""
        offer = {"file": "image.iso", "size": len(self._image)}
        media = (await viewer.call("media-offer", offer))["media"]
        viewer.files[media] = self._image
        source = {"kind": "cdrom", "path": f"client:{media}"}
        with contextlib.suppress(RuntimeError):  # all sockets are taken
            (attachment,) = (await viewer.call("attach", {"sources": [source]}))["attachments"]
            await asyncio.sleep(self._chance.uniform(0, 3))
            if self._chance.random() < 0.5:
                await viewer.call("media-withdraw", {"media": media})
            await viewer.call("detach", {"device": attachment["id"]})

    def growth(self) -> list[str]:
        """Return what grew."""
        samples = [one for one in self.samples if one.seconds > WARM_UP]
        third = len(samples) // 3
        if not third:
            return ["too short: the run has nothing to compare"]
        limits = {
            "session": MEMORY_GROWTH,
            "page": MEMORY_GROWTH,
            "session_files": FILE_GROWTH,
            "page_files": FILE_GROWTH,
        }
        result = []
        for name, limit in limits.items():
            first, last = (
                statistics.median(getattr(one, name) for one in part) for part in (samples[:third], samples[-third:])
            )
            print(f"{name}: {first:.0f} in the first third, {last:.0f} in the last", flush=True)
            if last - first > limit:
                result.append(f"{name} grew by {last - first:.0f}")
        return result


async def soak(seconds: float, seed: int) -> list[str]:
    """Run; return what is wrong."""
    config = GuestConfig(
        ports=(SpicePort(), SpicePort()),
        modules=("bochs", "usbhid", "hid_generic"),
        memory=512,
        kernel_arguments=("console=tty0", "usb_storage.delay_use=0"),
        extra_arguments=("-device", "VGA,edid=off"),  # with EDID the driver ignores defx and defy
    )
    with tempfile.TemporaryDirectory(prefix="farplug-soak-") as name:
        folder = Path(name)
        image = bytearray(os.urandom(16 * MIB))
        image[16 * 2048 : 16 * 2048 + 7] = b"\1CD001\1"
        (folder / "image.iso").write_bytes(image)
        async with QemuGuest(config) as guest:
            await guest.booted(TIMEOUT)
            await guest.check("dmesg -n 1")
            shell = asyncio.ensure_future(guest.run(SHELL, timeout=seconds + 1000))
            try:
                async with served(guest.targets[0], folder) as (url, session, page):
                    run = Soak(guest, folder, url, session, page, random.Random(seed))
                    try:
                        await run.run(seconds)
                    except BaseException:
                        for log in folder.rglob("*.log"):
                            print(f"the log {log.name} ends:\n{log.read_text()[-4000:]}", file=sys.stderr)
                        raise
                    return run.faults + run.growth()
            finally:
                shell.cancel()
                await asyncio.gather(shell, return_exceptions=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600, help="for how long (default: 3600); at least 300")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default: 0)")
    options = parser.parse_args()
    print(machine(), flush=True)
    try:
        problems = asyncio.run(soak(options.seconds, options.seed))
    except FarplugError as error:
        sys.exit(f"soak: {error}")
    for problem in problems:
        print(f"soak: {problem}", file=sys.stderr)
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
