"""A security key: FIDO2 and U2F over HID.

Source: CTAP 2.1, chapter 11.2 (USB HID).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from farplug.errors import Reason, UsageError
from farplug.usb.types import Speed
from farplug.virtual.async_function import Setting, interrupt_in, interrupt_out
from farplug.virtual.device import VirtualDevice
from farplug.virtual.fido.authenticator import Authenticator, Status
from farplug.virtual.fido.credentials import KeyStore, MemoryKeyStore
from farplug.virtual.fido.ctaphid import (
    CBOR_CAPABILITY,
    REPORT_SIZE,
    WINK_CAPABILITY,
    Cancelled,
    CtapHid,
    HidCommand,
    KeepaliveStatus,
    Request,
)
from farplug.virtual.fido.events import KeyUsed, PresenceAnswered, PresenceAsked
from farplug.virtual.fido.key_file import KeyFile
from farplug.virtual.fido.presence import Answer, AsksPresence, Presence, Question, Use
from farplug.virtual.fido.u2f import StatusWord, U2f
from farplug.virtual.hid.function import CLASS_HID, HidFunction

PRODUCT: Final = "Security key for tests"
PRESENCE_TIMEOUT: Final = 30.0
"""Seconds that a user has to answer (CTAP 2.1, chapter 6.1.2: user action timeout)."""
KEEPALIVE_INTERVAL: Final = 0.1
"""Seconds between two reports that a request is still being processed (chapter 11.2.9.1.5)."""
REPEAT_TIMEOUT: Final = 5.0
"""Seconds after which a U2F client that does not repeat its request has given up."""
READER_TIMEOUT: Final = 1.0
"""Seconds that reports wait for the guest to receive, then they are dropped: their client has closed the key."""


@dataclass(eq=False)
class PendingQuestion:
    """A question that waits for the answer of a user.

    Attributes:
        number: from 1, unique in the key.
        question: what the client asks for.
        due: when it times out, in the time of the event loop.
    """

    number: int
    question: Question
    due: float
    answer: asyncio.Future[Answer] = field(repr=False)

    @property
    def seconds(self) -> float:
        """Return the seconds that are left."""
        return max(0.0, self.due - asyncio.get_running_loop().time())


@dataclass(eq=False)
class _Repeated:
    """A request of a U2F client, which repeats it until the user has answered."""

    request: bytes
    last: float
    task: asyncio.Task[Answer]


class SecurityKey(HidFunction, AsksPresence):
    """A security key with FIDO2 (CTAP 2.1) and U2F, for tests: a program that can read its store can sign in with it.

    Each request is reported as a :class:`~farplug.virtual.fido.events.KeyUsed`.

    Args:
        store: where it keeps its state; None: a new key in memory. The function owns the store.
        presence: who touches the key.
        timeout: seconds that a user has to answer.
    """

    settings = (Setting(interface_class=CLASS_HID),)
    report_descriptor = bytes.fromhex(
        "06d0f1 0901 a101"  # FIDO Alliance, U2F HID authenticator: application collection
        "0920 1500 26ff00 7508 9540 8102"  # input: 64 bytes
        "0921 1500 26ff00 7508 9540 9102"  # output: 64 bytes
        "c0"
    )
    reports = interrupt_in(REPORT_SIZE, microseconds=1000)
    received = interrupt_out(REPORT_SIZE, microseconds=1000)

    def __init__(
        self,
        store: KeyStore | None = None,
        presence: Presence = Presence.AUTO,
        *,
        timeout: float = PRESENCE_TIMEOUT,
    ) -> None:
        self.store = store or MemoryKeyStore()
        self.presence = presence
        self._timeout = timeout
        self._pending: PendingQuestion | None = None
        self._questions = 0
        self._repeated: _Repeated | None = None

    # Questions

    @property
    def question(self) -> PendingQuestion | None:
        """Return the question that waits for an answer; None: there is none."""
        return None if self._pending is None or self._pending.answer.done() else self._pending

    @property
    def asks(self) -> Question | None:
        return None if self.question is None else self.question.question

    def answer(self, allow: bool, number: int | None = None) -> Question:
        pending = self.question
        if pending is None:
            raise UsageError("no program in the VM waits for the security key", reason=Reason.NOT_ASKED)
        if number not in (None, pending.number):
            raise UsageError(f"the security key does not wait for an answer to {number}", reason=Reason.NOT_ASKED)
        pending.answer.set_result(Answer.ALLOW if allow else Answer.REFUSE)
        return pending.question

    async def _ask(self, question: Question) -> Answer:
        if self.presence is not Presence.ASK:
            return Answer.ALLOW if self.presence is Presence.AUTO else Answer.REFUSE
        self._cancel_question()
        loop = asyncio.get_running_loop()
        self._questions += 1
        pending = PendingQuestion(self._questions, question, loop.time() + self._timeout, loop.create_future())
        self._pending = pending
        interface = self.host.numbers.interface(0)
        asked = PresenceAsked(
            interface=interface,
            request=pending.number,
            use=str(question.use),
            site=question.site,
            user=question.user,
            seconds=self._timeout,
            until=round(time.time() + self._timeout, 3),
        )
        self.host.report(asked)
        answer = Answer.CANCELLED
        try:
            await asyncio.wait([pending.answer], timeout=self._timeout)
            answer = pending.answer.result() if pending.answer.done() else Answer.TIMED_OUT
        finally:
            if self._pending is pending:
                self._pending = None
            pending.answer.cancel()
            self.host.report(PresenceAnswered(interface=interface, request=pending.number, answer=answer))
        return answer

    def _cancel_question(self) -> None:
        if self.question is not None:
            self.question.answer.set_result(Answer.CANCELLED)

    def _touched(self, question: Question, request: bytes) -> Answer | None:
        """Return what the user answered to the request of a U2F client, which repeats it."""
        if self.presence is not Presence.ASK:
            return Answer.ALLOW if self.presence is Presence.AUTO else Answer.REFUSE
        now = asyncio.get_running_loop().time()
        repeated = self._repeated
        if repeated is not None and repeated.request == request and now - repeated.last < REPEAT_TIMEOUT:
            repeated.last = now
            if not repeated.task.done():
                return None
            if repeated.task.cancelled() or repeated.task.result() is not Answer.ALLOW:
                return Answer.REFUSE
            self._repeated = None
            return Answer.ALLOW
        self._end_repeated()
        self._repeated = _Repeated(request, now, asyncio.create_task(self._ask_repeatedly(question)))
        return None

    async def _ask_repeatedly(self, question: Question) -> Answer:
        """Ask the user for as long as a U2F client repeats its request."""
        asking = asyncio.ensure_future(self._ask(question))
        try:
            while not asking.done():
                await asyncio.wait([asking], timeout=REPEAT_TIMEOUT)
                now = asyncio.get_running_loop().time()
                if self._repeated is None or now - self._repeated.last >= REPEAT_TIMEOUT:
                    break
            return asking.result() if asking.done() else Answer.CANCELLED
        finally:
            asking.cancel()

    def _end_repeated(self) -> None:
        repeated, self._repeated = self._repeated, None
        if repeated is not None:
            repeated.task.cancel()

    # The protocol

    async def run(self) -> None:
        """Process the reports of the guest."""
        loop = asyncio.get_running_loop()
        serving = _Serving(self, loop.time)
        try:
            await serving.receive()
        finally:
            self._end_repeated()
            await serving.end()

    def _used(self, question: Question, status: Status) -> None:
        name = status.name.lower().replace("_", "-")
        self.host.report(KeyUsed(str(question.use), question.site, question.user, name))

    async def _reply_to(self, request: Request, authenticator: Authenticator, u2f: U2f) -> bytes:
        """Execute a request, and return the reply."""
        try:
            match request.command:
                case HidCommand.CBOR:
                    return await authenticator.execute(request.data)
                case HidCommand.MSG:
                    return await u2f.execute(request.data)
            self._used(Question(Use.WINK), Status.SUCCESS)
            return b""
        except Exception as error:
            self.host.raised(error)  # the state could not be saved, for example: the client gets a reply nevertheless
            if request.command is HidCommand.CBOR:
                return bytes((Status.OTHER,))
            return StatusWord.INTERNAL_ERROR.to_bytes(2, "big")

    async def dispose(self) -> None:
        await self.store.close()


class _Serving:
    """One run of a key: from a configuration to the next reset."""

    def __init__(self, key: SecurityKey, clock: Callable[[], float]) -> None:
        self._key = key
        self._authenticator = Authenticator(key.store, self._ask, key._used, clock)
        self._u2f = U2f(key.store, key._touched, key._used)
        self._hid = CtapHid(WINK_CAPABILITY | CBOR_CAPABILITY)
        self._flushing = asyncio.Lock()
        self._executing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._executions: dict[Request, asyncio.Task[bytes]] = {}
        """The requests that are being executed or wait until another one ends."""
        self._request: Request | None = None
        """The request that is being executed."""
        self._cancelled: Request | None = None
        """The last one that its client cancelled, perhaps before it was executed."""

    async def receive(self) -> None:
        """Take reports until the run is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                async with asyncio.timeout_at(self._hid.due):
                    report = await self._key.received.read()
            except TimeoutError:
                self._hid.check_time(loop.time())
            else:
                match self._hid.receive(report, loop.time()):
                    case Request() as request:
                        self._start(request)
                    case Cancelled(request=request):
                        self._cancelled = request
                        if self._request is request:
                            self._key._cancel_question()
                        elif request in self._executions and not self._hid.is_current(request):
                            self._executions[request].cancel()
            await self._flush()

    def _start(self, request: Request) -> None:
        executing = self._executions[request] = asyncio.create_task(self._execute(request))
        executing.add_done_callback(lambda _: self._executions.pop(request))
        task = asyncio.create_task(self._process(request, executing))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._key.host.raised(error)

    async def end(self) -> None:
        """Cancel the requests, and wait until what is being saved is saved."""
        tasks = (*self._tasks, *self._executions.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _process(self, request: Request, executing: asyncio.Task[bytes]) -> None:
        """Send the reply to a request when it is executed; meanwhile a CTAP2 client gets keepalives."""
        try:
            while not (await asyncio.wait([executing], timeout=KEEPALIVE_INTERVAL))[0]:
                if request.command is HidCommand.CBOR:
                    waits = self._key.question is not None
                    status = KeepaliveStatus.USER_PRESENCE if waits else KeepaliveStatus.PROCESSING
                    self._hid.keep_alive(request, status)
                    await self._flush()
            if not executing.cancelled():
                self._hid.reply(request, executing.result())
                await self._flush()
        finally:
            executing.cancel()
            await asyncio.wait([executing])

    async def _execute(self, request: Request) -> bytes:
        async with self._executing:  # one that its client abandoned may still end
            self._request = request
            try:
                return await self._key._reply_to(request, self._authenticator, self._u2f)
            finally:
                self._request = None

    async def _ask(self, question: Question) -> Answer:
        if self._request is None or self._cancelled is self._request or not self._hid.is_current(self._request):
            return Answer.CANCELLED
        return await self._key._ask(question)

    async def _flush(self) -> None:
        """Send the reports that are queued, and no others between those of a message."""
        async with self._flushing:
            if not self._hid.has_reports:
                return
            try:
                async with asyncio.timeout(READER_TIMEOUT):
                    await self._key.reports.read_by_guest()
            except TimeoutError:
                self._hid.take_reports()
                return
            for report in self._hid.take_reports():
                await self._key.reports.write(report)


def security_key_device(
    file: str | os.PathLike[str] | None = None,
    *,
    presence: Presence = Presence.AUTO,
    speeds: Sequence[Speed] = (Speed.HIGH,),
) -> VirtualDevice:
    """Make a USB security key, for tests.

    Args:
        file: the file of the key, which is locked; it is made if it does not exist. None: a new key in memory.
        presence: who touches the key.
        speeds: the speeds that the device can run at, the best first.

    Returns:
        The device. Call its :meth:`~farplug.virtual.device.VirtualDevice.dispose` when it is no longer needed.

    Raises:
        ImageError: the file cannot be used.
    """
    store = None if file is None else KeyFile.open(file)
    return VirtualDevice(SecurityKey(store, presence), product=PRODUCT, speeds=speeds)
