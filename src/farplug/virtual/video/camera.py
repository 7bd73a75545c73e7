"""A USB camera: UVC over a bulk endpoint.

The guest starts the stream with a COMMIT, and stops it by clearing the halt of the endpoint, as Linux and Windows do
with cameras that have a bulk endpoint.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Final

from farplug.errors import DeviceError, Reason
from farplug.usb.types import Buffer, Recipient, RequestType, Setup, Speed
from farplug.virtual.async_function import AsyncFunction, Setting, Stall, bulk_in, control_in, control_out
from farplug.virtual.device import VirtualDevice
from farplug.virtual.function import Numbers
from farplug.virtual.video import uvc
from farplug.virtual.video.frames import FrameSource, open_frames
from farplug.virtual.video.modes import Mode
from farplug.virtual.video.pattern import Pattern
from farplug.virtual.video.uvc import Control, Request, Stream, Streaming

PRODUCT: Final = "Virtual Camera"
MAX_DELAY: Final = 0.1
"""Seconds that a camera catches up after a guest that read too slowly."""
_CONTROL, _STREAMING = 0, 1
"""The interfaces."""
_CLASS, _INTERFACE = RequestType.CLASS, Recipient.INTERFACE


class Camera(AsyncFunction):
    """A camera without sound and without settings such as brightness.

    Args:
        source: makes the frames. The function owns it.

    Attributes:
        frames: how many frames the guest has taken.
    """

    settings = (
        Setting(_CONTROL, 0, uvc.CLASS_VIDEO, uvc.SUBCLASS_CONTROL, name=PRODUCT),
        Setting(_STREAMING, 0, uvc.CLASS_VIDEO, uvc.SUBCLASS_STREAMING),
    )
    association = (uvc.CLASS_VIDEO, uvc.SUBCLASS_COLLECTION, 0)
    video = bulk_in(interface=_STREAMING)

    def __init__(self, source: FrameSource) -> None:
        self.source = source
        self.frames = 0
        self._streaming = Streaming(source.modes)
        self._stream: Stream | None = None
        self._sending: asyncio.Task[None] | None = None

    @property
    def stream(self) -> Stream | None:
        """Return what the guest reads now; None: nothing."""
        return self._stream

    def class_descriptors(self, setting: Setting, numbers: Numbers) -> bytes:
        if setting.interface == _CONTROL:
            return self._streaming.control_descriptors(numbers.interface(_STREAMING))
        return self._streaming.streaming_descriptors(numbers.endpoint(self.video.address))

    # Requests

    @control_out(Request.SET_CUR, _CLASS, _INTERFACE)
    def _set(self, setup: Setup, data: bytes) -> None:
        control = _control(setup)
        self._streaming.set(data)
        if control is Control.COMMIT:
            self._start(self._streaming.probe)

    def _get(self, setup: Setup) -> bytes:
        _control(setup)
        reply = self._streaming.get(setup.request)
        if reply is None:
            raise Stall
        return reply

    _get = control_in(Request.GET_CUR, _CLASS, _INTERFACE)(_get)
    for _request in (
        Request.GET_MIN,
        Request.GET_MAX,
        Request.GET_RES,
        Request.GET_LEN,
        Request.GET_INFO,
        Request.GET_DEF,
    ):
        _get = control_in(_request, _CLASS, _INTERFACE)(_get)
    del _request

    # The stream

    def _start(self, stream: Stream | None) -> None:
        """Begin to send frames, or stop: with None."""
        self._stream = stream
        self._stop_sending()
        self.notify()

    def _stop_sending(self) -> None:
        if self._sending is not None and not self._sending.cancelling():  # a second one would interrupt a cleanup
            self._sending.cancel()

    def halt_cleared(self, endpoint: int) -> None:
        super().halt_cleared(endpoint)
        self._start(None)

    def reset(self, *, port_reset: bool) -> None:
        self._start(None)
        super().reset(port_reset=port_reset)

    def configured(self, speed: Speed) -> None:
        self._streaming = Streaming(self.source.modes)
        super().configured(speed)

    async def run(self) -> None:
        """Send the frames of one stream after the other. It ends when the source makes no frame any more."""
        try:
            while True:
                await self.until(lambda: self._stream is not None)
                stream = self._stream
                assert stream is not None
                sending = self._sending = asyncio.create_task(self._send(stream))
                await asyncio.wait([sending])
                self._sending = None
                if not sending.cancelled():
                    sending.result()
        finally:
            if self._sending is not None:
                self._stop_sending()
                await asyncio.wait([self._sending])
                self._sending = None

    async def _send(self, stream: Stream) -> None:
        """Send frames at the rate of a stream, until the task is cancelled."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        number, last = 0, b""
        while True:
            last = await self._frame(stream.mode, number, last)
            for payload in uvc.payloads(last, number & 1) if last else ():
                await self.video.write(payload)
            self.frames += bool(last)
            number += 1
            due = max(due + 1 / stream.rate, loop.time() - MAX_DELAY)
            await asyncio.sleep(max(0.0, due - loop.time()))

    async def _frame(self, mode: Mode, number: int, last: bytes) -> bytes:
        """Return a frame; the last one if the source cannot make it."""
        try:
            return _checked(mode, await self.source.frame(mode, number))
        except Exception as error:  # of a program that makes frames, or of a file
            self.host.raised(error)
            return last

    async def dispose(self) -> None:
        await self.source.close()


def _control(setup: Setup) -> Control:
    """Return the control of a request to the streaming interface. Raise :class:`Stall` for others."""
    entity, interface = setup.index >> 8, setup.index & 0xFF
    if entity or interface != _STREAMING or setup.value & 0xFF:
        raise Stall
    try:
        return Control(setup.value >> 8)
    except ValueError:
        raise Stall from None


def _checked(mode: Mode, frame: Buffer) -> bytes:
    """Return a frame if it fits its mode.

    Raises:
        DeviceError: it does not.
    """
    size, exact = len(frame), not mode.frame_size
    if size != mode.largest_frame if exact else not 0 < size <= mode.largest_frame:
        raise DeviceError(
            f"a frame of {mode} has {size} bytes, not {'' if exact else '1 to '}{mode.largest_frame}",
            reason=Reason.DEVICE_FAULT,
        )
    return bytes(frame)


def camera_device(
    source: str | os.PathLike[str] | FrameSource | None = None, *, speeds: Sequence[Speed] = (Speed.HIGH,)
) -> VirtualDevice:
    """Make a USB camera.

    Args:
        source: the path of a clip (JPEG images one after the other), or of a folder of JPEG images; or what makes the
            frames. None: a test picture with a counter.
        speeds: the speeds that the device can run at, the best first.

    Returns:
        The device. Call its :meth:`~farplug.virtual.device.VirtualDevice.dispose` when it is no longer needed.

    Raises:
        ImageError: the clip or the folder cannot be used.
    """
    if source is None:
        frames: FrameSource = Pattern()
    else:
        frames = source if isinstance(source, FrameSource) else open_frames(source)
    return VirtualDevice(Camera(frames), product=PRODUCT, speeds=speeds)
