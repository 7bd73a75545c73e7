"""The channels of a SPICE session for the screen, the pointer and the inputs: linked while they are used.

A channel is linked at its first use, and closed :data:`LINGER` seconds after the last one. A session that carries disks
has none of them.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Protocol

from farplug.errors import FarplugError, GuestGoneError, InternalError, Reason, RemoteProtocolError, TargetError
from farplug.rate_limit import limited_logger
from farplug.spice.channel import Channel, Message
from farplug.spice.cursor import Cursor, CursorChannel
from farplug.spice.display import CAPABILITIES, MESSAGE_WORK, Display, DisplayChannel
from farplug.spice.framebuffer import Framebuffer
from farplug.spice.images import Unsupported, decode_image
from farplug.spice.inputs import SCANCODE_CAPABILITY, InputsChannel, MouseMode
from farplug.spice.link import SERVER_LOG, LinkFailure, LinkResult
from farplug.spice.messages import Disconnecting, Migrate, Notify
from farplug.spice.types import ChannelType
from farplug.transport.dialer import ChannelDialer, LinkedChannel
from farplug.transport.spice_port import BUSY_RETRIES, describe_broken, log_notice
from farplug.usb.types import Buffer

log = limited_logger(__name__)

LINGER = 30.0
"""Seconds from the last use of a channel until it is closed."""
RELINK_INTERVAL = 1.0
"""Seconds from one link of a display to the next, at least."""
TURN_WORK = 2 << 20
"""Work of a channel in one turn of the event loop, in bytes of pixels that are drawn: devices and PONGs wait for it."""
PICTURE_TIMEOUT = 10.0
"""Seconds from the link of a display until its picture is complete."""


class SideSession(Protocol):
    """The session of a channel, a :class:`~farplug.transport.spice_session.SpiceSession`."""

    session_id: int
    ended: asyncio.Future[FarplugError | None]

    def moved(self) -> None:
        """End the session: the VM migrated."""

    def prefer_client_mouse(self) -> None:
        """Ask for the mouse mode CLIENT, if the server supports it."""


class SideChannel(ABC):
    """A channel that is linked while it is used.

    Attributes:
        name: for logs and errors.
        number: of the channel among those of its type.
    """

    kind: ChannelType
    capabilities: tuple[int, ...] = ()

    def __init__(self, number: int, session: SideSession, dialer: ChannelDialer) -> None:
        self.name = f"{self.kind} {number}"
        self.number = number
        self._session = session
        self._dialer = dialer
        self._linked: LinkedChannel | None = None
        self._channel: Channel | None = None
        self._linking: asyncio.Task[None] | None = None
        self._was_linked = False
        self._users = 0
        self._linger: asyncio.TimerHandle | None = None
        self._error: FarplugError | None = None
        """Why the channel has ended, if we did not close it."""
        self._closed = False
        """The session is closed."""
        self._changed = asyncio.Event()
        self._resumes: LinkedChannel | None = None
        """The link whose received bytes are processed further later, and which is read from then."""

    @property
    def is_linked(self) -> bool:
        """Return whether the channel is linked."""
        return self._linked is not None

    @property
    def error(self) -> FarplugError | None:
        """Return why the channel has ended; None: it is in use, or was closed."""
        return self._error

    @asynccontextmanager
    async def used(self) -> AsyncIterator[None]:
        """Return a context manager that keeps the channel linked.

        Raises:
            TargetError: the channel cannot be linked.
            GuestGoneError: the session has ended.
        """
        self._users += 1
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        try:
            await self._link()
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._unused()
                self._linger = asyncio.get_running_loop().call_later(LINGER, self.close)

    def _unused(self) -> None:
        """Take note that the channel is not used now."""

    async def _link(self) -> None:
        if self._linked is None and self._linking is None:
            self._error = None
        while self._linked is None:
            self._check_session()
            if self._linking is None:
                self._start_linking(0)
            linking = self._linking
            assert linking is not None
            await asyncio.wait([linking])  # the link is not cancelled with one of those who wait for it
            if not linking.cancelled():  # by close(), which was called before this use
                linking.result()
            if self._error is not None:
                raise self._error

    def _start_linking(self, delay: float) -> None:
        self._linking = asyncio.ensure_future(self._link_once(delay))
        self._linking.add_done_callback(self._linking_done)

    def _linking_done(self, task: asyncio.Task[None]) -> None:
        self._linking = None
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._error = error if isinstance(error, FarplugError) else InternalError(error)
        self._linked_or_not()
        self._notify()

    def _linked_or_not(self) -> None:
        """Take note that a link has ended, one way or the other."""

    async def _link_once(self, delay: float) -> None:
        await asyncio.sleep(delay)
        tries = 1 + (BUSY_RETRIES if self._was_linked else 0)
        while True:
            self._check_session()
            tries -= 1
            try:
                linked = await self._dialer.link(
                    self.kind,
                    self.number,
                    connection_id=self._session.session_id,
                    capabilities=self.capabilities,
                    opening=self._opening,
                )
                break
            except LinkFailure as error:
                if error.error is not None or not tries:
                    raise
            await asyncio.sleep(0.1)  # the server may not have noticed yet that we closed the channel
        try:
            self._check_session()
        except BaseException:
            linked.connection.abort()
            raise
        self._was_linked = True
        self._linked = linked
        self._channel = self._made(linked.link)
        linked.start(self, self._lost)

    def _check_session(self) -> None:
        ended = self._session.ended
        if ended.done():
            raise ended.result() or GuestGoneError(f"{self.name}: the session is closed")
        if self._closed:
            raise GuestGoneError(f"{self.name}: the session is closed")

    @property
    def _opening(self) -> Callable[[LinkResult], list[Buffer]] | None:
        """Return what makes the first messages; None: there are none."""
        return None

    @abstractmethod
    def _made(self, link: LinkResult) -> Channel:
        """Return the channel of a link."""

    @abstractmethod
    def _handle(self, message: Message) -> int:
        """Process a message; return its work, in bytes of pixels."""

    def close(self) -> None:
        """Close the channel, if it is linked. It must not be in use."""
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        if self._linking is not None:
            self._linking.cancel()
        linked, self._linked, self._channel = self._linked, None, None
        if linked is not None:
            linked.connection.abort()
        self._notify()

    def session_closed(self) -> None:
        """Close the channel for good: the session is closed, or has ended."""
        self._closed = True
        if self._error is None:
            self._error = GuestGoneError(f"{self.name}: the session is closed")
            if self._session.ended.done():
                self._error = self._session.ended.result() or self._error
        self.close()

    async def finished(self) -> None:
        """Wait until a link that was cancelled has ended."""
        if self._linking is not None:
            await asyncio.wait([self._linking])

    # Waiting

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def changed(self) -> None:
        """Wait for the next change of what the channel reports.

        Raises:
            FarplugError: the channel has ended.
        """
        if self._linked is None and self._linking is None:
            raise self._error or GuestGoneError(f"{self.name}: the channel is closed")
        await self._changed.wait()
        if self._error is not None:
            raise self._error

    # The channel

    def data_received(self, data: memoryview) -> None:
        """Process bytes of the channel."""
        if self._channel is not None:
            self._channel.receive_data(data)
            self._drain()

    def _drain(self) -> None:
        channel, linked = self._channel, self._linked
        if channel is None or linked is None:
            return
        work = 0
        try:
            while self._linked is linked and self._resumes is not linked:
                if work >= TURN_WORK:
                    self._pause(linked)
                    asyncio.get_running_loop().call_soon(self._resume, linked)
                    break
                event = channel.next_event()
                if event is None:
                    break
                match event:
                    case Message():
                        work += self._handle(event)
                    case Notify():
                        log_notice(self.name, event)
                    case Migrate():
                        linked.connection.write(channel.data_to_send())
                        self._session.moved()
                    case Disconnecting():
                        log.debug("%s: the server closes the channel: %s", self.name, event.reason)
        except RemoteProtocolError as error:
            self._fail(error)
        linked.connection.write(channel.data_to_send())
        self._notify()

    def _pause(self, linked: LinkedChannel) -> None:
        """Process nothing more of a link until :meth:`_resume`."""
        self._resumes = linked
        linked.connection.pause_reading()

    def _resume(self, linked: LinkedChannel) -> None:
        if self._resumes is linked:
            self._resumes = None
        if self._linked is linked:
            self._drain()
            if self._resumes is not linked and self._linked is linked:
                linked.connection.resume_reading()

    def pause_writing(self) -> None:
        """End the channel: the server does not read our answers, and goes on to send."""
        self._fail(RemoteProtocolError(f"{self.name}: the server does not read what the client sends"))

    def resume_writing(self) -> None:
        """Do nothing: :meth:`pause_writing` has ended the channel."""

    def flush(self) -> None:
        """Send the queued messages."""
        if self._channel is not None and self._linked is not None:
            self._linked.connection.write(self._channel.data_to_send())

    def _fail(self, error: FarplugError) -> None:
        self._error = error
        linked, self._linked, self._channel = self._linked, None, None
        if linked is not None:
            linked.connection.abort()
        self._notify()

    def _lost(self, error: Exception | None) -> None:
        if self._linked is None or not self._linked.connection.lost:
            return  # we have closed that connection
        if isinstance(error, InternalError):
            self._fail(error)
            return
        how = "the SPICE server closed the channel" if error is None else describe_broken(error)
        self._fail(GuestGoneError(f"{self.name}: {how}", remedy=f"check that the VM still runs; {SERVER_LOG}"))


class SpiceDisplay(SideChannel):
    """A display of the VM.

    Attributes:
        display: what it shows.
    """

    kind = ChannelType.DISPLAY
    capabilities = CAPABILITIES

    def __init__(self, number: int, session: SideSession, dialer: ChannelDialer) -> None:
        super().__init__(number, session, dialer)
        self.display = Display()
        self._linked_at = 0.0
        self._reported: set[str] = set()
        self._again = False
        """The channel was closed to be linked again."""
        self._opened: DisplayChannel | None = None
        self._decoding: set[asyncio.Task[None]] = set()

    async def finished(self) -> None:
        await super().finished()
        if self._decoding:
            await asyncio.wait(self._decoding)

    async def picture(self) -> Framebuffer:
        """Return the picture, when the server has sent the whole of it. The channel must be in use.

        Raises:
            TargetError: the server sends none within PICTURE_TIMEOUT.
            GuestGoneError: the channel has ended.
        """
        try:
            async with asyncio.timeout(PICTURE_TIMEOUT):
                while not self.display.complete or self.display.shown is None:
                    await self.changed()
        except TimeoutError:
            uses = f": it uses {', '.join(sorted(self._reported))}" if self._reported else ""
            raise TargetError(
                f"{self.name}: the VM sent no picture within {PICTURE_TIMEOUT:g} s{uses}",
                reason=Reason.TIMED_OUT,
                remedy="check that the VM has started its display",
            ) from None
        return self.display.shown

    @property
    def _opening(self) -> Callable[[LinkResult], list[Buffer]]:
        def opening(link: LinkResult) -> list[Buffer]:
            self._opened = DisplayChannel(self.name, link)
            return self._opened.data_to_send()

        return opening

    def _made(self, link: LinkResult) -> Channel:
        assert self._opened is not None
        self._linked_at = asyncio.get_running_loop().time()
        self.display.begin()
        return self._opened

    def _handle(self, message: Message) -> int:
        linked = self._linked
        assert linked is not None
        self.display.work = 0
        try:
            offset = self.display.handle(message, decode=False)
        except Unsupported as error:
            self._relink(str(error))
        else:
            if offset is not None:
                self._pause(linked)
                task = asyncio.ensure_future(self._decode(linked, message, offset))
                self._decoding.add(task)
                task.add_done_callback(self._decoding.discard)
        return self.display.work

    async def _decode(self, linked: LinkedChannel, message: Message, offset: int) -> None:
        """Decode a large image in a thread, and draw it; nothing more of the link is processed meanwhile.

        The bytes of the message stay as they are: reading is paused.
        """
        try:
            picture = await asyncio.to_thread(decode_image, message.body, offset)
            if self._linked is linked:
                self.display.draw(message, picture)
            del picture  # its memory
        except Unsupported as error:
            if self._linked is linked:
                self._relink(str(error))
        except Exception as error:
            if self._linked is linked:
                self._fail(error if isinstance(error, FarplugError) else InternalError(error))
        asyncio.get_running_loop().call_soon(self._resume, linked)  # drawing was the work of this turn

    def _relink(self, what: str) -> None:
        """Link the channel again: the server then sends the whole picture."""
        if what not in self._reported and len(self._reported) < 16:
            self._reported.add(what)
            log.info("%s: the VM draws with %s: the picture is sent again", self.name, what)
        linked, self._linked, self._channel = self._linked, None, None
        if linked is not None:
            linked.connection.abort()
        self._again = True
        if self._linking is None:  # otherwise this is called by the link itself
            self._linked_or_not()

    def _linked_or_not(self) -> None:
        again, self._again = self._again, False
        if again and self._users and not self._closed:
            since = asyncio.get_running_loop().time() - self._linked_at
            self._start_linking(max(0.0, RELINK_INTERVAL - since))

    def close(self) -> None:
        super().close()
        self.display = Display()  # its memory


class SpiceCursor(SideChannel):
    """The pointer of a display.

    Attributes:
        cursor: the pointer.
    """

    kind = ChannelType.CURSOR

    def __init__(self, number: int, session: SideSession, dialer: ChannelDialer) -> None:
        super().__init__(number, session, dialer)
        self.cursor = Cursor()

    def _made(self, link: LinkResult) -> Channel:
        self.cursor = Cursor()
        return CursorChannel(self.name, link)

    def _handle(self, message: Message) -> int:
        self.cursor.handle(message)
        return MESSAGE_WORK + len(message.body)


class SpiceInputs(SideChannel):
    """The keyboard and the mouse of the VM.

    Attributes:
        channel: what is sent; None while the channel is not linked. Call :meth:`flush` after each change.
    """

    kind = ChannelType.INPUTS
    capabilities = (SCANCODE_CAPABILITY,)

    def __init__(self, number: int, session: SideSession, dialer: ChannelDialer) -> None:
        super().__init__(number, session, dialer)
        self.channel: InputsChannel | None = None
        self.mouse_modes = 0
        """SPICE_MOUSE_MODE_* that the server supports, a mask."""
        self.mouse_mode = 0

    def _made(self, link: LinkResult) -> Channel:
        self.channel = InputsChannel(self.name, link)
        self._session.prefer_client_mouse()
        return self.channel

    def _handle(self, message: Message) -> int:
        """Do nothing: the channel processes its messages itself."""
        return MESSAGE_WORK

    def _unused(self) -> None:
        self.release_all()

    def release_all(self) -> None:
        """Release all keys and buttons that are held."""
        if self.channel is not None:
            self.channel.release_all()
            self.flush()

    def set_mouse_mode(self, supported: int, current: int) -> None:
        """Take note of the mouse modes that the server reported."""
        self.mouse_modes, self.mouse_mode = supported, current
        if self.is_linked:
            self._session.prefer_client_mouse()
        self._notify()

    @property
    def is_absolute(self) -> bool:
        """Return whether the pointer is moved to positions."""
        return self.mouse_mode == MouseMode.CLIENT

    def close(self) -> None:
        self.release_all()
        super().close()
        self.channel = None
