"""A VM that is paused survives every order of what clients do meanwhile, and what they leave behind.

QEMU hands the first message that a client sent into a pause to the next client's parser, and aborts when that parser
does not understand the message. The VM here has no operating system: QEMU's side is what is tried.
"""

from __future__ import annotations

import asyncio
import signal
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.guest.command import farplug
from tests.guest.plugging import GUEST_TIMEOUT, MIB, Plugged, beside, blank, disk_of, disk_with, plugged
from tests.long import LONG

from farplug.exit_codes import ExitCode
from farplug.redirection import Redirection, engine, events, port_protocol, reminder
from farplug.store import MemoryStore
from farplug.store.image import serial_number
from farplug.target import open_session, parse_target
from farplug.testing import Boot, GuestConfig, QemuGuest, SpicePort, UnixPort
from farplug.transport.spice_session import SpiceSession
from farplug.virtual.disk import disk_device

if TYPE_CHECKING:
    from tests.guest.conftest import Guests

ORDER = 4 if LONG else 3
"""Steps of which every order is tried."""

SPICE = GuestConfig(ports=(SpicePort(),), boot=Boot.BIOS, memory=64)
UNIX = replace(SPICE, ports=(UnixPort(),))


class Step(StrEnum):
    STOP = "stop"
    CONT = "cont"
    DOCTOR = "doctor"
    CONNECT = "connect"
    LEAVE = "leave"
    LEAVE_TWICE = "leave twice"
    KILL = "kill"


ENDS = (Step.LEAVE, Step.LEAVE_TWICE, Step.KILL)
State = tuple[bool, bool]
"""Whether the VM is paused, and whether a client is connected."""


def steps(state: State) -> tuple[Step, ...]:
    """Return the possible next steps."""
    paused, connected = state
    toggle = Step.CONT if paused else Step.STOP
    return (toggle, *ENDS) if connected else (toggle, Step.DOCTOR, Step.CONNECT)


def after(state: State, step: Step) -> State:
    paused, connected = state
    match step:
        case Step.STOP | Step.CONT:
            return not paused, connected
        case Step.DOCTOR:
            return state
        case _:
            return paused, step is Step.CONNECT


def orders(state: State, length: int) -> Iterator[tuple[Step, ...]]:
    """Yield every order of ``length`` steps."""
    if not length:
        yield ()
        return
    for step in steps(state):
        for rest in orders(after(state, step), length - 1):
            yield (step, *rest)


def walk(state: State, length: int) -> list[Step]:
    """Steps among which every order of ``length`` steps is found, whatever the state that it begins in."""
    states = [(paused, connected) for paused in (False, True) for connected in (False, True)]
    todo = {(begin, order) for begin in states for order in orders(begin, length)}
    walked: list[Step] = []
    trail = [state]
    while todo:
        found = _nearest(trail, walked, length, todo)
        for step in found:
            walked.append(step)
            trail.append(after(trail[-1], step))
            if len(walked) >= length:
                todo.discard((trail[-1 - length], tuple(walked[-length:])))
    return walked


def _nearest(
    trail: list[State], walked: list[Step], length: int, todo: set[tuple[State, tuple[Step, ...]]]
) -> tuple[Step, ...]:
    """The fewest steps to an order that was not tried."""
    queue: deque[tuple[Step, ...]] = deque([()])
    while True:
        path = queue.popleft()
        states = trail[-length:]
        for step in path:
            states.append(after(states[-1], step))
        recent = (*walked[-length:], *path)[-length:]
        if path and len(recent) == length and (states[-1 - length], recent) in todo:
            return path
        queue.extend((*path, step) for step in steps(states[-1]))


class Operator:
    """Does the steps, in this process: as the commands do, but in milliseconds."""

    def __init__(self, guest: QemuGuest) -> None:
        self.guest = guest
        self.paused = guest.config.paused
        self.reminded = asyncio.Event()
        self._hub: Plugged | None = None
        self._plugging: asyncio.Task[object] | None = None

    async def do(self, step: Step) -> None:
        async with asyncio.timeout(GUEST_TIMEOUT):
            match step:
                case Step.STOP | Step.CONT:
                    await self.guest.qmp.execute(step.value)
                    self.paused = step is Step.STOP
                    await self._settled()
                case Step.DOCTOR:
                    await self._doctor()
                case Step.CONNECT:
                    await self._connect()
                    await self._settled()
                case Step.LEAVE:
                    await self._leave()
                case Step.LEAVE_TWICE | Step.KILL:
                    if step is Step.LEAVE_TWICE and self._hub is not None:
                        leaving = asyncio.ensure_future(self._hub.close())
                        await asyncio.sleep(0)  # what it has to say is on its way
                        leaving.add_done_callback(lambda task: task.exception())
                    self._kill()
                    await self._leave()

    async def _connect(self) -> None:
        self._hub = hub = Plugged(await open_session(parse_target(self.guest.targets[0])))
        opened = asyncio.Event()
        hub.stream.subscribe(lambda event: opened.set() if event.name == "opened" else None)
        self._plugging = asyncio.ensure_future(hub.plug(disk_device(MemoryStore(8 * MIB))))
        await beside(self._plugging, opened.wait())

    async def _settled(self) -> None:
        """A connected client has a device in a VM that runs; into a pause it has sent a reminder, if it ever does."""
        if self._hub is None or self._plugging is None:
            return
        if not self.paused:
            await self._plugging
        if self._plugging.done() and self._hub.session.exclusive:
            self.reminded.clear()
            await beside(self._plugging, self.reminded.wait())

    async def _doctor(self) -> None:
        session = await open_session(parse_target(self.guest.targets[0]))
        ready = asyncio.Event()
        redirection = Redirection(
            session.ports[0], lambda event: ready.set() if isinstance(event, events.GuestReady) else None
        )
        await redirection.open()
        try:
            await asyncio.wait_for(ready.wait(), 0.05 if self.paused else None)
        except TimeoutError:
            assert self.paused
        await redirection.close()
        await session.close()

    async def _leave(self) -> None:
        assert self._hub is not None
        hub, self._hub = self._hub, None
        plugging, self._plugging = self._plugging, None
        await hub.close()
        if plugging is not None:
            await asyncio.gather(plugging, return_exceptions=True)

    def _kill(self) -> None:
        """Close the sockets without a word, as the kernel does for a process that is killed."""
        assert self._hub is not None
        session = self._hub.session
        for port in session.ports:
            port.abort()
        if isinstance(session, SpiceSession):
            session._connection.abort()


@pytest.fixture(autouse=True)
def _short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reminder, "FIRST_DELAY", 0.02)
    monkeypatch.setattr(reminder, "MAX_DELAY", 0.02)
    monkeypatch.setattr(engine, "ACK_TIMEOUT", 0.05)


@asynccontextmanager
async def operator(guests: Guests, config: GuestConfig, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Operator]:
    async with guests.fresh(config) as guest:
        one = Operator(guest)
        send_reminder = port_protocol.PortProtocol._send_reminder

        def reminded(self: port_protocol.PortProtocol) -> None:
            send_reminder(self)
            one.reminded.set()

        monkeypatch.setattr(port_protocol.PortProtocol, "_send_reminder", reminded)
        yield one


async def run(one: Operator, todo: list[Step]) -> None:
    """Do the steps, then see that the VM runs and takes a device."""
    done: list[Step] = []
    try:
        for step in todo:
            await one.do(step)
            done.append(step)
        if one.paused:
            await one.do(Step.CONT)
        if one._hub is not None:
            await one.do(Step.LEAVE)
        await one.do(Step.CONNECT)
        await one.do(Step.LEAVE)
    except BaseException as error:
        error.add_note(f"after: {', '.join(done[-10:])}")
        raise
    assert one.guest.alive


@pytest.mark.parametrize(("config", "length"), [(SPICE, ORDER), (UNIX, ORDER - 1)], ids=["spice", "unix"])
async def test_every_order(guests: Guests, config: GuestConfig, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async with operator(guests, config, monkeypatch) as one:
        await run(one, walk((False, False), length))


BEFORE = [order for length in range(1, ORDER) for order in orders((True, False), length) if Step.CONT not in order]


@pytest.mark.parametrize("config", [SPICE, UNIX], ids=["spice", "unix"])
async def test_every_order_before_a_vm_runs_for_the_first_time(
    guests: Guests, config: GuestConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for order in BEFORE:
        async with operator(guests, replace(config, paused=True), monkeypatch) as one:
            await run(one, [*order, Step.CONT])


async def test_the_commands_themselves(guests: Guests, tmp_path: Path) -> None:
    """The orders in which people met the fault."""
    image = blank(tmp_path / "disk.raw")
    async with guests.fresh(replace(SPICE, paused=True)) as guest:
        connecting = ("connect", guest.targets[0], "--usb-disk", image)
        async with farplug("doctor", guest.targets[0]) as doctor:
            await doctor.end()
        async with farplug(*connecting) as first:
            await first.until("waiting")
            await guest.qmp.execute("cont")
            await first.until("attached")
            await guest.qmp.execute("stop")
            await asyncio.sleep(2.5)  # reminders
            first.process.send_signal(signal.SIGINT)
            code, _, stderr = await first.end()
            assert code == ExitCode.OK, stderr
        async with farplug("doctor", guest.targets[0]) as doctor:
            await doctor.end()
        await guest.qmp.execute("cont")
        async with farplug(*connecting) as second:
            await second.until("attached")
            await guest.qmp.execute("stop")
            await asyncio.sleep(2.5)  # reminders
            second.process.kill()
        async with farplug(*connecting) as third:
            await third.until("waiting")
            await guest.qmp.execute("cont")
            await third.until("attached")
            third.process.send_signal(signal.SIGINT)
            code, _, stderr = await third.end()
            assert code == ExitCode.OK, stderr
        assert guest.alive


@pytest.mark.parametrize("end", ["leave", "kill"])
async def test_replies_that_lie_unread(guest: QemuGuest, tmp_path: Path, end: str) -> None:
    """A pause in the middle of a read of Linux: what its next client finds are replies of 1 MiB."""
    image = blank(tmp_path / "disk.raw", 64 * MIB)
    for _ in range(3):
        async with farplug("connect", guest.targets[0], "--usb-disk", image, "--json") as one:
            disk = await disk_with(guest, serial_number(image))
            reading = asyncio.ensure_future(
                guest.run(f"while dd if={disk} of=/dev/null bs=1M iflag=direct; do :; done 2>/dev/null")
            )
            await one.until('"figures"')
            await guest.qmp.execute("stop")
            if end == "leave":
                one.process.send_signal(signal.SIGINT)
                await one.end()
            else:
                one.process.kill()
                await one.process.wait()
        device = disk_device(MemoryStore(16 * MIB))
        resuming = asyncio.ensure_future(guest.qmp.execute("cont"))
        async with plugged(guest.targets[0], device):
            await resuming
            await reading
            assert guest.alive
            await guest.check(f"dd if={await disk_of(guest, device)} of=/dev/null bs=1M count=8 iflag=direct")
        await device.dispose()
