"""A display that a client watches: its changes, its pointer and the inputs, sent no faster than the client takes them.

What is sent is made when the connection accepts it, of the picture as it is then. So a slow client costs frames, never
memory: of each kind of event at most one waits, without its data. Events for it have few pixels: little is made, and
compressed by the page, that the client does not take soon.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

from farplug.app.outlet import ClientEvent, Outlet
from farplug.errors import FarplugError, GuestGoneError, Reason, UsageError
from farplug.spice.cursor import Cursor, Shape
from farplug.spice.framebuffer import PIXEL, Framebuffer, Rect
from farplug.spice.inputs import Locks

if TYPE_CHECKING:
    from farplug.app.events import Event
    from farplug.app.guest import Guest

MAX_BAND: Final = 4 << 20
"""Bytes of pixels in one event ``screen``: a row of cells of any picture fits. A larger change is several events."""
MIN_BAND: Final = 256 << 10
"""The same for a client whose acknowledgements take long, and for the first event; but at least one rectangle."""
SOON: Final = 0.5
"""Seconds in which an acknowledgement shows that a client takes twice the bytes; after a later one it gets half."""
MAX_UNACKNOWLEDGED: Final = 2
"""Events ``screen`` of a client that it has not acknowledged; later changes are merged."""
FRAME_INTERVAL: Final = 0.033
"""Seconds from the begin of one update of a picture to the next, at least."""
RETRY_INTERVAL: Final = 5.0
"""Seconds until a channel that failed, of a VM that is there, is linked again."""


class Pacing:
    """Counts the events ``screen`` that a client has not acknowledged, and determines their size.

    Args:
        clock: returns the time in seconds.

    Attributes:
        band: bytes of pixels of the next event: from :data:`MIN_BAND` to :data:`MAX_BAND`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.band = MIN_BAND
        self._clock = clock
        self._unacknowledged: deque[tuple[int, float]] = deque()
        self._newest = 0
        self._waiting: dict[Callable[[], None], None] = {}

    @property
    def may_send(self) -> bool:
        """Return whether another event may be sent."""
        return len(self._unacknowledged) < MAX_UNACKNOWLEDGED

    def sent(self, serial: int) -> None:
        """Take note that an event was sent."""
        self._unacknowledged.append((serial, self._clock()))
        self._newest = max(self._newest, serial)

    def wait(self, resume: Callable[[], None]) -> None:
        """Call ``resume`` once when another event may be sent."""
        self._waiting[resume] = None

    def acknowledge(self, serial: int) -> None:
        """Take note that the client has acknowledged an event.

        Raises:
            UsageError: no event had this serial.
        """
        sent_at = self._take(serial)
        if sent_at is not None:
            late = self._clock() - sent_at > SOON
            self.band = max(self.band // 2, MIN_BAND) if late else min(self.band * 2, MAX_BAND)
        elif not 0 < serial <= self._newest:
            raise UsageError(f"no screen with the serial {serial} was sent", reason=Reason.BAD_SETTING)
        self._resume()

    def forget(self, serials: list[int]) -> None:
        """Do not wait for the acknowledgements of events of a display that is not watched any more."""
        for serial in serials:
            self._take(serial)
        self._resume()

    def _take(self, serial: int) -> float | None:
        """Remove the oldest event with a serial; return when it was sent, or None: there is none."""
        for index, (one, sent_at) in enumerate(self._unacknowledged):
            if one == serial:
                del self._unacknowledged[index]
                return sent_at
        return None

    def _resume(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for resume in waiting:
            resume()


class Follower:
    """Follows a channel of a guest while it is there, again and again.

    Args:
        guest: the guest.
        use: uses the channel, and returns only by an error.
        failed: called with why the channel cannot be followed; None: the VM was not reached yet. It is called again
            only after another :attr:`use`.
    """

    def __init__(
        self, guest: Guest, use: Callable[[], Awaitable[object]], failed: Callable[[FarplugError | None], None]
    ) -> None:
        self._guest = guest
        self._use = use
        self._failed = failed
        self._wake = asyncio.Event()
        self._unsubscribe = guest.stream.subscribe(self._happened)
        self._task = asyncio.ensure_future(self._run())

    def _happened(self, event: Event) -> None:
        if event.guest == self._guest.id and event.name in ("connected", "closed"):
            self._wake.set()

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            timeout: float | None = None
            if not self._guest.reached:
                self._failed(None)
            elif self._guest.session.over:
                self._failed(await self._guest.session.closed() or GuestGoneError("the connection to the VM is closed"))
            else:
                try:
                    await self._use()
                except FarplugError as error:
                    self._failed(error)
                    timeout = None if self._guest.session.over else RETRY_INTERVAL
            try:
                async with asyncio.timeout(timeout):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def close(self) -> None:
        """Follow no more; wait until the channel is not used any more."""
        self._unsubscribe()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


class ScreenWatch:
    """The watch of one display.

    Args:
        guest: the guest.
        number: of the display.
        outlet: the connection of the client.
        pacing: of the client, for all displays that it watches.
    """

    def __init__(self, guest: Guest, number: int, outlet: Outlet, pacing: Pacing) -> None:
        self._screen = guest.screen_of(number)
        self._number = number
        self._outlet = outlet
        self._pacing = pacing
        self._closed = False
        # The picture
        self._picture: Framebuffer | None = None
        self._size = (0, 0)
        """The size of the picture that the client has."""
        self._serial = 0
        """The client's picture is complete up to this change."""
        self._rects: deque[Rect] = deque()
        """What is to be sent until the client's picture is complete up to :attr:`_target`."""
        self._target = 0
        self._sent: deque[int] = deque(maxlen=MAX_UNACKNOWLEDGED)
        self._next_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._state: dict[str, Any] = {}
        # The pointer
        self._cursor = Cursor()
        self._shape: Shape | None = None
        self._pixels = b""
        self._shape_sent: Shape | None = None
        self._converting: asyncio.Task[None] | None = None
        self._followers = (
            Follower(guest, lambda: self._screen.follow(self._changed), self._failed),
            Follower(guest, lambda: self._screen.follow_pointer(self._pointer_changed), lambda error: None),
        )

    @property
    def result(self) -> dict[str, int]:
        """Return the size and the serial of the picture as it is now; zeros: there is none."""
        try:
            picture = self._screen.shown()
        except FarplugError:
            picture = None
        if picture is None:
            return {"width": 0, "height": 0, "serial": 0}
        return {"width": picture.width, "height": picture.height, "serial": picture.serial}

    async def close(self) -> None:
        """End the watch; wait until the channels are not used any more."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._converting is not None:
            self._converting.cancel()
        self._pacing.forget([*self._sent])
        await asyncio.gather(*(follower.close() for follower in self._followers))
        self._picture = None  # its memory: the cancelled followers and the watch hold each other

    # The state

    def _failed(self, error: FarplugError | None) -> None:
        if error is None:
            self._set_state("connecting")
        elif isinstance(error, GuestGoneError):
            self._set_state("lost", error)
        elif error.reason is Reason.NO_DISPLAY:
            self._set_state("no-display", error)
        else:
            self._set_state("no-picture", error)

    def _set_state(self, state: str, error: FarplugError | None = None) -> None:
        data: dict[str, Any] = {"display": self._number, "state": state}
        if error is not None:
            data |= {"reason": str(error.reason), "message": error.message, **error.remedy.as_dict()}
        if data != self._state:
            self._state = data
            self._outlet.post(("screen-state", self), lambda: ClientEvent("screen-state", self._state))

    # The picture

    def _changed(self, picture: Framebuffer | None, error: FarplugError | None) -> None:
        """Take note of a change of the picture; None: the VM sends none, for a reason."""
        if picture is None:
            self._failed(error)
            return
        self._set_state("shown")
        self._picture = picture
        if self._rects or (picture.serial <= self._serial and self._size == (picture.width, picture.height)):
            return  # the rest of an update is on its way, and the next one follows it; or nothing has changed
        loop = asyncio.get_running_loop()
        if self._timer is None:
            self._timer = loop.call_at(max(self._next_at, loop.time()), self._begin)

    def _begin(self) -> None:
        self._timer = None
        self._next_at = asyncio.get_running_loop().time() + FRAME_INTERVAL
        self._request()

    def _request(self) -> None:
        if self._closed:
            return
        if self._pacing.may_send:
            self._outlet.post(("screen", self), self._make)
        else:
            self._pacing.wait(self._request)

    def _make(self) -> ClientEvent | None:
        picture = self._picture
        if self._closed or picture is None:
            return None
        if not self._pacing.may_send:
            self._pacing.wait(self._request)
            return None
        size = picture.width, picture.height
        if size != self._size:
            self._size, self._serial = size, 0
            self._rects.clear()
        if not self._rects:
            self._rects.extend(picture.changed_since(self._serial))
            self._target = picture.serial
            if not self._rects:
                return None
        rects = [self._rects.popleft()]
        room = self._pacing.band - rects[0].area * PIXEL
        while self._rects and self._rects[0].area * PIXEL <= room:
            rects.append(self._rects.popleft())
            room -= rects[-1].area * PIXEL
        last = not self._rects
        self._pacing.sent(self._target)
        self._sent.append(self._target)
        if last:
            self._serial = self._target
            self._changed(picture, None)
        else:
            self._request()
        data = {
            "display": self._number,
            "width": picture.width,
            "height": picture.height,
            "serial": self._target,
            "rects": [[one.left, one.top, one.right - one.left, one.bottom - one.top] for one in rects],
            "last": last,
        }
        return ClientEvent("screen", data, b"".join(part for rect in rects for part in picture.rows(rect)))

    # The pointer

    def _pointer_changed(self, cursor: Cursor) -> None:
        self._cursor = cursor
        if cursor.shape is self._shape:
            self._outlet.post(("cursor", self), self._make_cursor)
        elif self._converting is None or self._converting.done():
            self._converting = asyncio.ensure_future(self._convert())

    async def _convert(self) -> None:
        """Convert the pixels of a new shape, in a thread: a large one takes a tenth of a second."""
        while (shape := self._cursor.shape) is not self._shape:
            pixels = b"" if shape is None else await asyncio.to_thread(straight, shape.pixels)
            self._shape, self._pixels = shape, pixels
        self._outlet.post(("cursor", self), self._make_cursor)

    def _make_cursor(self) -> ClientEvent | None:
        if self._closed:
            return None
        cursor, shape = self._cursor, self._shape
        data: dict[str, Any] = {"display": self._number, "visible": cursor.visible, "x": cursor.x, "y": cursor.y}
        if shape is self._shape_sent:
            return ClientEvent("cursor", data)
        self._shape_sent = shape
        if shape is None:
            return ClientEvent("cursor", {**data, "width": 0, "height": 0, "hot_x": 0, "hot_y": 0}, b"")
        form = {"width": shape.width, "height": shape.height, "hot_x": shape.hot_x, "hot_y": shape.hot_y}
        return ClientEvent("cursor", {**data, **form}, self._pixels)


class InputsWatch:
    """The watch of the lock keys and of the mode of the mouse of a guest.

    Args:
        guest: the guest.
        outlet: the connection of the client.
    """

    def __init__(self, guest: Guest, outlet: Outlet) -> None:
        self._guest = guest
        self._outlet = outlet
        self._data: dict[str, Any] = {}
        self._follower = Follower(guest, lambda: guest.inputs.follow(self._changed), self._failed)

    def _changed(self, locks: Locks, absolute: bool) -> None:
        self._set([name for name, lock in _LOCKS if lock in locks], "absolute" if absolute else "relative")

    def _failed(self, error: FarplugError | None) -> None:
        self._set([], "none")

    def _set(self, locks: list[str], mouse: str) -> None:
        data = {"guest": self._guest.id, "locks": locks, "mouse": mouse}
        if data != self._data:
            self._data = data
            self._outlet.post(("inputs", self), lambda: ClientEvent("inputs", self._data))

    async def close(self) -> None:
        """End the watch; wait until the channel is not used any more."""
        await self._follower.close()


_LOCKS: Final = (("num", Locks.NUM), ("caps", Locks.CAPS), ("scroll", Locks.SCROLL))


def straight(pixels: bytes) -> bytes:
    """Return BGRA pixels, not premultiplied, of premultiplied ones."""
    alphas = pixels[3::4]
    if not set(alphas) - {0, 255}:
        return pixels
    result = bytearray(pixels)
    for at, alpha in enumerate(alphas):
        if 0 < alpha < 255:
            start = at * PIXEL
            for index in range(start, start + 3):
                result[index] = min(255, (pixels[index] * 255 + alpha // 2) // alpha)
    return bytes(result)
