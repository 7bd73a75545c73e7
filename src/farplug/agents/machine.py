"""The VM as an agent sees it: a client of a session that follows the screen, and holds the keyboard and the mouse."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

from farplug.agents.picture import Box, Mark, Picture, Screen, fitted_size
from farplug.agents.serial import SerialLine
from farplug.control.client import Client
from farplug.control.messages import Notification
from farplug.control.shell import Shell, open_shell
from farplug.errors import (
    FarplugError,
    GuestGoneError,
    Reason,
    RemoteProtocolError,
    StateError,
    TargetError,
    UsageError,
)
from farplug.text import printable

PICTURE_TIMEOUT: Final = 15.0
"""Seconds for the first picture of a screen, and for the first report of who holds the keyboard."""
USE_TIMEOUT: Final = 10.0
"""Seconds in which the VM uses a device that was plugged in. Firmware looks for devices only when it starts."""
MAX_WHEEL: Final = 15
"""Steps of the wheel in one request."""
POINT: Final = 16
"""Pixels around a point that must look as in the last image: 33 x 33 are compared."""
SMALL: Final = 64
"""A change in a square of this size, in pixels, is small: the cursor of a text console blinks in one."""
DRAG_STEPS: Final = 8
"""Positions between the ends of a drag: programs begin one only when the pointer has moved some way."""
REPEAT_DELAY: Final = 0.5
REPEAT_INTERVAL: Final = 0.05
"""Seconds until a key that is held repeats, and from then on."""
TEXT_INTERVAL: Final = 0.2
"""Seconds from one look for a text to the next, at least."""
MAX_COLUMNS: Final = 2048
"""Characters of a line of a text console."""
MAX_NAME: Final = 64
_LEFT_BUTTON: Final = "left"


class Look:
    """An image that an agent got, to which its coordinates refer.

    Attributes:
        number: of the image, from 1.
        picture: of the whole screen, in its own size.
        size: of the image.
        mark: what has changed on the screen since.
    """

    def __init__(self, number: int, picture: Picture, mark: Mark) -> None:
        self.number = number
        self.picture = picture
        self.size = fitted_size(picture.width, picture.height)
        self.mark = mark

    def on_screen(self, x: int, y: int) -> tuple[int, int]:
        """Return the position on the screen of a pixel of the image.

        Raises:
            UsageError: it is outside the image.
        """
        width, height = self.size
        if not (0 <= x < width and 0 <= y < height):
            raise UsageError(
                f"({x}, {y}) is outside the last image, which has {width}x{height} pixels",
                reason=Reason.BAD_SETTING,
                remedy=f"x is 0 to {width - 1}, y is 0 to {height - 1}",
            )
        return (
            (2 * x + 1) * self.picture.width // (2 * width),
            (2 * y + 1) * self.picture.height // (2 * height),
        )


class Machine:
    """A VM, through a session of it. It connects at the first use, and again when the session has ended meanwhile.

    Args:
        path: of the session's socket.
        name: of this client, for people.
        display: the number of the display.
    """

    def __init__(self, path: Path, name: str, display: int = 0) -> None:
        self.display = display
        self.name = name
        self.screen = Screen()
        self.state: Mapping[str, Any] = {}
        """The last event ``screen-state``."""
        self.inputs: Mapping[str, Any] = {}
        """The last event ``inputs``."""
        self.look: Look | None = None
        self.position: tuple[int, int] | None = None
        """Where this client moved the pointer last, on the screen."""
        self._path = path
        self._looks = 0
        self._client: Client | None = None
        self._stack = AsyncExitStack()
        self._opening = asyncio.Lock()
        self._turn = asyncio.Lock()
        self._over: FarplugError | None = None
        self._holder: Mapping[str, Any] | None = None
        self._holder_is_known = False
        self._cursor: Mapping[str, Any] = {}
        self._buttons: list[str] = []
        self._line: SerialLine | None = None
        self._plugging = asyncio.Lock()
        self._changed = asyncio.Event()

    # The session --------------------------------------------------------------------------------------------------

    async def session(self) -> Client:
        """Return the connection to the session.

        Raises:
            FarplugError: the session does not run, or does not answer.
        """
        async with self._opening:
            if self._client is None or self._over is not None:
                await self._disconnect()
                self._stack = AsyncExitStack()
                client = await self._stack.enter_async_context(
                    Client.connect(self._path, name=self.name, listener=self._received)
                )
                self._over = None
                watching = asyncio.ensure_future(self._watch_end(client))
                self._stack.callback(watching.cancel)
                self._client = client
                try:
                    await client.call("watch-screen", {"display": self.display})
                except BaseException:
                    await self._disconnect()
                    raise
            return self._client

    @asynccontextmanager
    async def shell(self, **options: Any) -> AsyncIterator[Shell]:
        """Return a context manager that opens a shell in the VM, on a connection of its own.

        Args:
            options: those of :func:`~farplug.control.shell.open_shell`.

        Raises:
            FarplugError: as :meth:`hands`, and as that function.
        """
        async with (
            self.hands() as typist,
            Client.connect(self._path, name=self.name) as client,
            open_shell(client, typist=typist, **options) as shell,
        ):
            yield shell

    async def close(self) -> None:
        """Close the connection: the session releases the keyboard and the mouse. A second call has no effect."""
        async with self._opening:
            await self._disconnect()

    async def _disconnect(self) -> None:
        client, self._client = self._client, None
        line, self._line = self._line, None
        if client is not None and line is not None:
            await _unplug(client, line)
        self.screen.clear()
        self.state, self.inputs, self._cursor = {}, {}, {}
        self._holder, self._holder_is_known = None, False
        self._buttons = []
        await self._stack.aclose()

    async def _watch_end(self, client: Client) -> None:
        """Wait until the session ends, and wake those who wait for its screen."""
        over: FarplugError = GuestGoneError("the session has ended", reason=Reason.SESSION_GONE)
        try:
            async for _ in client.subscribe([]):
                pass
        except FarplugError as error:
            over = error
        self._over = over
        self._wake()

    def _received(self, event: Notification) -> None:
        data = event.data
        match event.event:
            case "screen":
                if data.get("display") != self.display:
                    return
                serial = data.get("serial")
                if type(serial) is not int:
                    raise RemoteProtocolError("a picture has no serial")
                self.screen.apply(data, event.payload)
                self._acknowledge(serial)
            case "screen-state":
                self.state = data
                if data.get("state") != "shown":
                    self.screen.clear()
            case "driving":
                holder = data.get("holder")
                self._holder = holder if isinstance(holder, dict) else None
                self._holder_is_known = True
            case "inputs":
                self.inputs = data
            case "cursor":
                self._cursor = data
        self._wake()

    def _acknowledge(self, serial: int) -> None:
        if self._client is not None:
            task = asyncio.ensure_future(self._client.call("screen-ack", {"serial": serial}))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _change(self) -> None:
        """Wait for the next event of the session.

        Raises:
            GuestGoneError: the session has ended.
        """
        if self._over is None:
            await self._changed.wait()
        if self._over is not None:
            raise self._over

    # Looking ------------------------------------------------------------------------------------------------------

    async def see(self) -> Picture:
        """Return the picture of the screen as it is now.

        Raises:
            TargetError: the VM sends none in PICTURE_TIMEOUT.
            FarplugError: the session is gone.
        """
        await self.session()
        try:
            async with asyncio.timeout(PICTURE_TIMEOUT):
                while not self.screen.complete:
                    await self._change()
        except TimeoutError:
            raise self._no_picture() from None
        return self.screen.picture()

    def _no_picture(self) -> TargetError:
        text = self.state.get("message")
        return TargetError(
            printable(text, 500) if isinstance(text, str) and text else "the VM sends no picture",
            reason=Reason.NO_DISPLAY if self.state.get("state") == "no-display" else Reason.TIMED_OUT,
            remedy="the VM may be off, or its screen may be blank: press a key, such as shift",
        )

    async def take_look(self) -> Look:
        """Return a new image, to which coordinates refer from now on. Raises as :meth:`see`."""
        picture = await self.see()
        if self.look is not None:
            self.screen.drop(self.look.mark)
        self._looks += 1
        self.look = Look(self._looks, picture, self.screen.mark())
        return self.look

    def last_look(self, number: int | None = None) -> Look:
        """Return the last image.

        Args:
            number: which image the agent refers to; None: the last one.

        Raises:
            StateError: there is no image yet.
            UsageError: ``SCREEN_CHANGED``: it is not the last one.
        """
        if self.look is None:
            raise StateError("there is no image yet to which coordinates refer", remedy="call screenshot first")
        if number is not None and number != self.look.number:
            raise UsageError(
                f"look {number} is not the last one, which is look {self.look.number}",
                reason=Reason.SCREEN_CHANGED,
                remedy="look again: call screenshot",
            )
        return self.look

    def check_unchanged(self, look: Look, x: int, y: int) -> None:
        """Check that the screen looks around a position as in an image.

        Raises:
            UsageError: ``SCREEN_CHANGED``.
        """
        width, height = look.picture.width, look.picture.height
        box = Box(max(0, x - POINT), max(0, y - POINT), min(width, x + POINT + 1), min(height, y + POINT + 1))
        if not self.screen.same(look.picture, box):
            raise UsageError(
                f"the screen changed at this point since look {look.number}",
                reason=Reason.SCREEN_CHANGED,
                remedy="look again: call screenshot; or use force",
            )

    async def wait_for_change(self, *, small: bool) -> None:
        """Wait until the screen differs from the last image; without one, from what is shown now.

        Args:
            small: changes in a square of SMALL pixels count too.
        """
        await self.see()
        mark = self.screen.mark()
        if self.look is not None:
            mark.changed = self.look.mark.changed
        try:
            while not _counts(mark.changed, small=small) or not self.screen.complete:
                await self._change()
        finally:
            self.screen.drop(mark)

    async def text(self) -> list[str]:
        """Return the lines of the text console that the screen shows.

        Raises:
            TargetError: ``NO_TEXT``: it shows none.
            FarplugError: the session is gone, or cannot read text.
        """
        await self.see()
        client = await self.session()
        result = await client.call("screen-text", {"display": self.display})
        lines = result.get("lines") if isinstance(result, dict) else None
        if not isinstance(lines, list):
            raise RemoteProtocolError("the session sent no lines of text")
        return [printable(str(line), MAX_COLUMNS) for line in lines]

    async def wait_for_text(self, text: str) -> list[str]:
        """Wait until a line of the text console has a text; return the lines. Raises as :meth:`text`, not NO_TEXT."""
        while True:
            await self.see()
            changed = self._changed
            try:
                lines = await self.text()
            except FarplugError as error:
                if error.reason is not Reason.NO_TEXT:
                    raise
                lines = []
            if any(text in line for line in lines):
                return lines
            await asyncio.sleep(TEXT_INTERVAL)
            if self._changed is changed or self._over is not None:
                await self._change()

    async def wait_until_still(self, seconds: float, *, small: bool) -> None:
        """Wait until the screen has not changed for a time.

        Args:
            seconds: the time.
            small: changes in a square of SMALL pixels count too.
        """
        await self.see()
        loop = asyncio.get_running_loop()
        mark = self.screen.mark()
        since = loop.time()
        try:
            while (left := since + seconds - loop.time()) > 0:
                with suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await self._change()
                if _counts(mark.changed, small=small) or not self.screen.complete:
                    mark.changed, since = None, loop.time()
        finally:
            self.screen.drop(mark)

    @property
    def pointer(self) -> tuple[int, int] | None:
        """Return where the pointer is on the screen, as far as it is known."""
        if self.position is not None:
            return self.position
        x, y = self._cursor.get("x"), self._cursor.get("y")
        return (x, y) if type(x) is int and type(y) is int and self._cursor.get("visible") is True else None

    # USB ----------------------------------------------------------------------------------------------------------

    async def attachments(self) -> dict[str, Mapping[str, Any]]:
        """Return what is plugged in, by ids."""
        client = await self.session()
        status = await client.call("status")
        guests = status.get("guests", {}) if isinstance(status, dict) else {}
        return {id: one for guest in guests.values() for id, one in guest.get("attachments", {}).items()}

    async def attach(self, params: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Plug sources in; return their attachments when the VM uses them, or has not used them in USE_TIMEOUT.

        Args:
            params: those of the method ``attach``.

        Raises:
            FarplugError: as :meth:`unheld`; or something cannot be plugged in.
        """
        client = await self.unheld()
        before = await self.attachments()
        try:
            async with asyncio.timeout(USE_TIMEOUT):
                result = await client.call("attach", params)
        except TimeoutError:
            note = "the VM does not use it yet: firmware looks for devices only when it starts"
            return [
                {**one, "id": id, "note": note} for id, one in (await self.attachments()).items() if id not in before
            ]
        return [*result["attachments"]] if isinstance(result, dict) else []

    async def serial(self) -> SerialLine:
        """Return the serial line of this client, which is plugged in at the first use, and again if it was unplugged.

        Raises:
            FarplugError: as :meth:`attach`.
        """
        async with self._plugging:
            client = await self.session()
            if self._line is None or not self._line.is_of_use:
                if self._line is not None:
                    await _unplug(client, self._line)
                self._line, line = None, SerialLine()
                try:
                    await line.open(self._path.parent, self.attach)
                except BaseException:
                    await _unplug(client, line)
                    raise
                self._line = line
            return self._line

    # Keyboard and mouse -------------------------------------------------------------------------------------------

    @property
    def holder(self) -> str | None:
        """Return the name of another client that holds the keyboard and the mouse; None: there is none."""
        if self._holder is None or self._holder.get("you") is True:
            return None
        name = self._holder.get("name")
        return printable(name, MAX_NAME) if isinstance(name, str) and name else "another client"

    @property
    def drives(self) -> bool:
        """Return whether this client holds the keyboard and the mouse."""
        return self._holder is not None and self._holder.get("you") is True

    async def unheld(self) -> Client:
        """Return the connection for an act that uses neither the keyboard nor the mouse.

        Raises:
            StateError: ``NOT_DRIVING``: another client holds the keyboard and the mouse.
            FarplugError: the session is gone.
        """
        client = await self.session()
        try:
            async with asyncio.timeout(PICTURE_TIMEOUT):
                while not self._holder_is_known:
                    await self._change()
        except TimeoutError:
            raise RemoteProtocolError("the session does not report who holds the keyboard") from None
        if self.holder is not None:
            raise self._taken()
        return client

    @asynccontextmanager
    async def hands(self) -> AsyncIterator[Client]:
        """Return a context manager for one act with the keyboard and the mouse, which are taken if they are free.

        Raises:
            StateError: ``NOT_DRIVING``: another client holds them, or has taken them meanwhile.
            FarplugError: the session is gone.
        """
        async with self._turn:
            client = await self.unheld()
            if not self.drives:
                self._buttons = []
                try:
                    await client.call("drive", {"take": True, "client": self.name, "if_free": True})
                except FarplugError as error:
                    raise self._explained(error) from error
                self._holder = {"name": self.name, "you": True}  # as the next event says
            try:
                yield client
            except FarplugError as error:
                raise self._explained(error) from error

    def _explained(self, error: FarplugError) -> FarplugError:
        """Return the error of an act: that a person took over, if that is why."""
        if error.reason in (Reason.NOT_DRIVING, Reason.INTERRUPTED):
            return self._taken()
        return error

    def _taken(self) -> StateError:
        return StateError(
            f"{self.holder or 'another client'} holds the keyboard and the mouse of the VM: nothing more was done",
            reason=Reason.NOT_DRIVING,
            remedy="a person took over: wait until they release them, or ask them; looking is still possible",
        )

    async def move(self, client: Client, x: int, y: int) -> None:
        """Move the pointer to a position on the screen."""
        await client.call("pointer", {"x": x, "y": y, "display": self.display})
        self.position = x, y

    async def button(self, client: Client, button: str, *, down: bool) -> None:
        """Press a button, and hold it, or release it."""
        self._buttons = [one for one in self._buttons if one != button] + ([button] if down else [])
        await client.call("pointer", {"buttons": self._buttons, "display": self.display})

    async def click(self, client: Client, button: str, count: int, place: tuple[int, int] | None) -> None:
        """Click once or several times.

        Args:
            client: that of :meth:`hands`.
            button: the name of the button.
            count: how often.
            place: the position on the screen; None: where the pointer is, which is not known.
        """
        for _ in range(count):
            if place is not None:
                # Watchers get an event; and a VM without a tablet gets a USB tablet.
                x, y = place
                await client.call("click", {"x": x, "y": y, "button": button, "display": self.display})
                self.position = place
                continue
            try:
                await self.button(client, button, down=True)
            finally:
                await _surely(self.button(client, button, down=False))

    async def drag(self, client: Client, start: tuple[int, int], end: tuple[int, int]) -> None:
        """Move the pointer to a position, press the left button, move to the other one, and release the button."""
        await self.move(client, *start)
        await self.button(client, _LEFT_BUTTON, down=True)
        try:
            for step in range(1, DRAG_STEPS + 1):
                x, y = (first + (last - first) * step // DRAG_STEPS for first, last in zip(start, end, strict=True))
                await self.move(client, x, y)
                await asyncio.sleep(0.02)
        finally:
            await _surely(self.button(client, _LEFT_BUTTON, down=False))

    async def type(self, client: Client, params: Mapping[str, Any]) -> Any:
        """Type a text; return what the session reports. If the caller is cancelled, the typing ends."""
        try:
            return await client.call("type", params)
        except asyncio.CancelledError:
            await _surely(client.call("stop-typing"))
            raise

    async def wheel(self, client: Client, steps: int) -> None:
        """Turn the wheel: away from the user if the number is negative."""
        while steps:
            some = max(-MAX_WHEEL, min(MAX_WHEEL, steps))
            await client.call("pointer", {"wheel": some, "display": self.display})
            steps -= some

    @asynccontextmanager
    async def held(self, client: Client, codes: list[str]) -> AsyncIterator[None]:
        """Return a context manager that holds physical keys down."""
        pressed: list[str] = []
        try:
            for code in codes:
                pressed.append(code)
                await client.call("key", {"code": code, "down": True})
            yield
        finally:
            await _surely(self._release(client, pressed))

    async def _release(self, client: Client, codes: list[str]) -> None:
        for code in reversed(codes):
            with suppress(FarplugError):  # the session releases the keys of a client that lost the keyboard
                await client.call("key", {"code": code, "down": False})

    async def hold(self, client: Client, codes: list[str], seconds: float) -> None:
        """Hold physical keys down for a time; the last one repeats, as that of a PC keyboard does."""
        loop = asyncio.get_running_loop()
        async with self.held(client, codes):
            end = loop.time() + seconds
            await asyncio.sleep(min(seconds, REPEAT_DELAY))
            while (left := end - loop.time()) > 0:
                await client.call("key", {"code": codes[-1], "down": True})
                await asyncio.sleep(min(left, REPEAT_INTERVAL))


async def _unplug(client: Client, line: SerialLine) -> None:
    await line.close()
    if line.attachment:
        with suppress(FarplugError):  # it was unplugged, or the session has ended
            await client.call("detach", {"device": line.attachment})


async def _surely(call: Coroutine[Any, Any, None]) -> None:
    """Carry a call out to its end, also if the caller is cancelled: the agent's program may cancel a tool."""
    task = asyncio.ensure_future(call)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    await asyncio.shield(task)


def _counts(changed: Box | None, *, small: bool) -> bool:
    if changed is None:
        return False
    return small or changed.width > SMALL or changed.height > SMALL
