"""Typing and clicking in a guest: on a USB keyboard and a USB tablet, or through SPICE.

A USB keyboard confirms what the guest has taken. Where none is plugged in, one is plugged into a free port, and stays
there until something else needs the port. While a call uses it, another call waits for the port.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from farplug.app.commands import Via
from farplug.app.settings import Source, SourceKind
from farplug.errors import DeviceError, FarplugError, GuestGoneError, Reason, RefusedError, TargetError, UsageError
from farplug.keymap import chord, find_layout
from farplug.keymap.layout import DEFAULT
from farplug.spice.inputs import Button
from farplug.threads import off_loop
from farplug.virtual.device import VirtualDevice
from farplug.virtual.endpoints import Detached
from farplug.virtual.hid import Button as UsbButton
from farplug.virtual.hid import HidFunction, Keyboard, Mouse, ReportsLost, Tablet
from farplug.virtual.hid.keyboard import READ_TIMEOUT
from farplug.virtual.hid.pointer import MAX_POSITION

if TYPE_CHECKING:
    from farplug.app.attachment import Attachment
    from farplug.app.guest import Guest

HidT = TypeVar("HidT", bound=HidFunction)

CONFIRM_TIMEOUT: Final = 2.0
"""Seconds in which a guest confirms a chord, if it does."""

_CONFIGURED_INTERVAL: Final = 0.05

_BUTTONS: Final = {Button.LEFT: UsbButton.LEFT, Button.MIDDLE: UsbButton.MIDDLE, Button.RIGHT: UsbButton.RIGHT}


@dataclass(frozen=True, slots=True)
class Typed:
    """What became of keys, or of a click.

    Attributes:
        via: :attr:`~farplug.app.commands.Via.USB` or :attr:`~farplug.app.commands.Via.SPICE`.
        confirmed: the guest has confirmed that it took everything.
    """

    via: Via
    confirmed: bool


@dataclass(frozen=True, slots=True)
class _Usable(Generic[HidT]):
    """A function of a device that is plugged in.

    Attributes:
        function: the function.
        attachment: its device.
    """

    function: HidT
    attachment: Attachment

    def cause(self, name: str) -> str:
        """Return why the guest has lost the device, of which ``name`` is the kind."""
        if self.attachment.unplugged:
            return f"the {name} was unplugged on this side: something else needed its port, or a user unplugged it"
        return f"the VM has reset or unplugged the {name}"


class _Devices:
    """Finds the USB devices that the guest uses, and plugs in those that are missing.

    Attributes:
        in_use: the devices that calls use now, once for each call.
    """

    def __init__(self, guest: Guest) -> None:
        self.in_use: Counter[Attachment] = Counter()
        self._released = asyncio.Event()
        self._guest = guest
        self._turn = asyncio.Lock()
        """One call plugs a device at a time: another one uses it then."""
        self._not_used: set[type[HidFunction]] = set()
        """Kinds of devices that the guest did not use: SPICE is asked first, until the guest uses one."""

    @asynccontextmanager
    async def use(self, kind: type[HidT], source: Source, via: Via) -> AsyncIterator[_Usable[HidT] | None]:
        """Return a context manager with the device to use; None: SPICE.

        A device that was plugged in for a call stays during the block, unless a user unplugs it or needs its port.

        Raises as :meth:`Typing.type`.
        """
        used = await self._choose(kind, source, via)
        if used is None:
            yield None
            return
        attachment = used.attachment
        self.in_use[attachment] += 1
        try:
            yield used
        finally:
            self.in_use -= Counter({attachment: 1})
            self._released.set()

    async def _choose(self, kind: type[HidT], source: Source, via: Via) -> _Usable[HidT] | None:
        if via is Via.SPICE:
            return None
        is_needed = via is Via.USB or not self._guest.inputs.are_there
        async with self._turn:
            plugged = self._plugged(kind)
            used = next((one for one in plugged if one.function.reports.is_read), None)
            if used is None and (is_needed or (not plugged and kind not in self._not_used)):
                try:
                    used = await self._use(kind, source, plugged)
                except FarplugError as error:
                    if error.reason is Reason.TIMED_OUT:
                        self._not_used.add(kind)
                    if is_needed:
                        raise
            if used is not None:
                self._not_used.discard(kind)
            return used

    def _plugged(self, kind: type[HidT]) -> list[_Usable[HidT]]:
        return [
            _Usable(function, attachment)
            for attachment in self._guest.attachments
            if not attachment.over and isinstance(attachment.device, VirtualDevice)
            for function in attachment.device.functions
            if isinstance(function, kind)
        ]

    async def _use(self, kind: type[HidT], source: Source, plugged: Sequence[_Usable[HidT]]) -> _Usable[HidT]:
        """Plug a device in unless one is, and wait until the guest reads from it."""
        while not plugged and self._guest.only_used_make_room:
            self._released.clear()
            await self._released.wait()
        try:
            async with asyncio.timeout(READ_TIMEOUT):
                if not plugged:
                    await self._guest.plug_on_demand(source)
                    plugged = self._plugged(kind)
                while plugged:
                    try:
                        await plugged[0].function.reports.read_by_guest()
                        return plugged[0]
                    except Detached:  # it is not configured yet
                        await asyncio.sleep(_CONFIGURED_INTERVAL)
                        plugged = self._plugged(kind)
        except TimeoutError:
            raise TargetError(
                f"the VM did not use the USB {source.name} within {READ_TIMEOUT:g} s",
                reason=Reason.TIMED_OUT,
                remedy=f"plug a {source.name} in before the VM starts: firmware looks for it then only; a VM that is "
                f"paused uses none{'' if kind is Keyboard else ', a text console no pointer'}",
            ) from None
        raise GuestGoneError(f"the {source.name} was unplugged before the VM used it")


class Typing:
    """Types and clicks in a guest.

    Args:
        guest: the guest.

    Attributes:
        layout: the name of the keyboard layout that was used last.
    """

    def __init__(self, guest: Guest) -> None:
        self.layout = DEFAULT
        self._guest = guest
        self._devices = _Devices(guest)

    def uses(self, attachment: Attachment) -> bool:
        """Return whether a call uses a device now."""
        return attachment in self._devices.in_use

    async def type(
        self,
        text: str,
        layout: str = DEFAULT,
        via: Via = Via.AUTO,
        progress: Callable[[int], None] = lambda _: None,
        begin: Callable[[], None] = lambda: None,
    ) -> Typed:
        """Type a text.

        Args:
            text: what to type; a newline is the Return key.
            layout: the name of the guest's keyboard layout: see :func:`farplug.keymap.find_layout`.
            via: on a USB keyboard, through SPICE, or on the keyboard if the guest uses one.
            progress: called with the number of characters that were typed.
            begin: called before the first key.

        Raises:
            UsageError: there is no such layout, or it lacks a character (``BAD_KEY``). Nothing was typed.
            DeviceError: the guest may have lost a part of the text (``UNCONFIRMED``); the message has the number of
                characters that are certain.
            PortError: the guest has no free port for the keyboard.
            TargetError: the guest does not use the keyboard, or has no inputs that SPICE reaches.
            GuestGoneError: the guest is gone.
        """
        total = len(await off_loop(find_layout(layout).type, text))  # before anything is plugged in
        self.layout = layout
        async with self._devices.use(Keyboard, Source.keyboard(), via) as keyboard:
            begin()
            if keyboard is not None:
                return Typed(Via.USB, await self._type_by_usb(keyboard, text, layout, total, progress))
        await self._guest.inputs.type(text, progress, layout=layout)
        return Typed(Via.SPICE, False)

    async def _type_by_usb(
        self, device: _Usable[Keyboard], text: str, layout: str, total: int, progress: Callable[[int], None]
    ) -> bool:
        keyboard = device.function
        done = 0

        def proceed(count: int) -> None:
            nonlocal done
            done = count
            progress(count)

        try:
            return await keyboard.type_text(text, layout, progress=proceed)
        except ReportsLost as error:
            raise _lost("the VM may have lost keys", error.confirmed, error.total) from error
        except Detached as error:
            certain = 0 if keyboard.boot_protocol else done
            raise _lost(device.cause("keyboard"), certain, total) from error

    async def press(self, keys: str, via: Via = Via.AUTO) -> Typed:
        """Press keys together, and release them. The arguments and errors are those of :meth:`type`.

        Args:
            keys: their names, with ``+`` between them: ``ctrl+alt+Delete``. See :func:`farplug.keymap.key_named`.
            via: as above.
        """
        pressed = chord(keys)
        async with self._devices.use(Keyboard, Source.keyboard(), via) as device:
            if device is not None:
                keyboard = device.function
                try:
                    await keyboard.tap(*pressed)
                    confirmed = not keyboard.boot_protocol and await keyboard.confirm(CONFIRM_TIMEOUT)
                except Detached:
                    confirmed = False  # the keys may have been those for a restart
                return Typed(Via.USB, confirmed)
        await self._guest.inputs.press(keys)
        return Typed(Via.SPICE, False)

    async def click(
        self, x: int, y: int, button: Button = Button.LEFT, *, display: int = 0, via: Via = Via.AUTO
    ) -> Typed:
        """Click at a position on a display, which is limited to its size.

        Through SPICE, if the VM has a tablet of its own; otherwise on a USB tablet, which covers the only display.

        Raises as :meth:`type`.
        """
        if via is not Via.USB:
            try:
                await self._guest.inputs.click(x, y, button, display=display)
            except RefusedError as error:
                if via is Via.SPICE or error.reason is not Reason.NO_TABLET or display:
                    raise
            else:
                return Typed(Via.SPICE, False)
        if display or button not in _BUTTONS:
            raise UsageError(
                "a USB tablet clicks on the first display, with the left, the middle or the right button",
                reason=Reason.BAD_SETTING,
            )
        width, height = await self._guest.screen_of(display).size()
        async with self._devices.use(Tablet, Source.tablet(), Via.USB) as device:
            assert device is not None
            try:
                await device.function.move_to(_scaled(x, width), _scaled(y, height))
                await device.function.click(_BUTTONS[button])
            except Detached as error:
                raise _not_clicked(device.cause("tablet")) from error
        return Typed(Via.USB, False)

    async def click_at_distance(self, x: int, y: int, button: Button = Button.LEFT, *, via: Via = Via.AUTO) -> Typed:
        """Move the pointer by a distance, which the guest may scale, and click.

        Through SPICE where it reaches a mouse, otherwise on a USB mouse. Raises as :meth:`type`.
        """
        if via is Via.SPICE or (via is Via.AUTO and self._guest.inputs.are_there):
            async with self._guest.inputs.used():
                await self._guest.inputs.move_by(x, y)
                await self._guest.inputs.press_button(button)
            return Typed(Via.SPICE, False)
        async with self._devices.use(Mouse, Source(SourceKind.MOUSE), Via.USB) as device:
            assert device is not None
            try:
                await device.function.move(x, y)
                await device.function.click(_BUTTONS[button])
            except Detached as error:
                raise _not_clicked(device.cause("mouse")) from error
        return Typed(Via.USB, False)


def _not_clicked(why: str) -> DeviceError:
    return DeviceError(f"{why}: the click may be lost", reason=Reason.UNCONFIRMED)


def _lost(what: str, certain: int, total: int) -> DeviceError:
    return DeviceError(
        f"{what}: {certain} of {total} characters are certain",
        reason=Reason.UNCONFIRMED,
        remedy="look at the screen of the VM before the rest is typed",
    )


def _scaled(position: int, size: int) -> int:
    """Return the position on a tablet of a pixel; of the nearest one, if there is no such pixel."""
    last = max(1, size - 1)
    return min(max(position, 0), last) * MAX_POSITION // last
