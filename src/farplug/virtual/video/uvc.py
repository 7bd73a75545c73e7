"""The descriptors and the negotiation of a USB camera. Sans-IO.

Source: USB Device Class Definition for Video Devices (UVC) 1.0, with the payload formats Uncompressed and MJPEG.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from farplug.usb.types import Buffer
from farplug.virtual.video.modes import Encoding, Mode

CLASS_VIDEO: Final = 0x0E
SUBCLASS_CONTROL, SUBCLASS_STREAMING, SUBCLASS_COLLECTION = 1, 2, 3

VERSION: Final = 0x0100
PAYLOAD_SIZE: Final = 16384
"""Bytes of a payload, header included: Linux queues transfers of at most 32 packets of 512 bytes."""
RATES: Final = (30, 15, 10, 5)
"""Frames a second, the default first."""
MAX_MODES: Final = 64
"""Modes of a camera. bFrameIndex is a byte, and a configuration has at most 65535 bytes."""

_CS_INTERFACE = 0x24
_HEADER, _INPUT_TERMINAL, _OUTPUT_TERMINAL = 1, 2, 3
_INPUT_HEADER, _UNCOMPRESSED, _UNCOMPRESSED_FRAME, _MJPEG, _MJPEG_FRAME, _COLOUR = 1, 4, 5, 6, 7, 0x0D
_CAMERA_TERMINAL, _STREAMING_TERMINAL = 0x0201, 0x0101
_CLOCK = 48_000_000
_YUY2_GUID: Final = bytes.fromhex("5955593200001000800000aa00389b71")
_BITS_PER_PIXEL = 16
_BT_709, _BT_601 = 1, 4
_TICKS = 10_000_000
"""Units of a second in dwFrameInterval."""
_PROBE = struct.Struct("<HBBIHHHHHII")
_END_OF_HEADER, _END_OF_FRAME = 0x80, 0x02
_PAYLOAD_HEADER = 2


class Request(IntEnum):
    """A request to a control (table A-8)."""

    SET_CUR = 0x01
    GET_CUR = 0x81
    GET_MIN = 0x82
    GET_MAX = 0x83
    GET_RES = 0x84
    GET_LEN = 0x85
    GET_INFO = 0x86
    GET_DEF = 0x87


class Control(IntEnum):
    """A control of the streaming interface (table A-14)."""

    PROBE = 1
    COMMIT = 2


@dataclass(frozen=True, slots=True)
class Stream:
    """What the guest chose.

    Attributes:
        mode: the encoding and the size.
        rate: frames a second.
    """

    mode: Mode
    rate: int


class Streaming:
    """The streaming interface of a camera: its formats, and the negotiation of one of them.

    Args:
        modes: what the camera offers, the default first. Modes of one encoding are a format.

    Raises:
        ValueError: there is no mode, or there are too many, or one is there twice.
    """

    def __init__(self, modes: Sequence[Mode]) -> None:
        if not 0 < len(modes) <= MAX_MODES or len(set(modes)) < len(modes):
            raise ValueError(f"a camera has 1 to {MAX_MODES} different modes, not {len(modes)}")
        encodings = list(dict.fromkeys(mode.encoding for mode in modes))
        self._formats = [(one, [mode for mode in modes if mode.encoding is one]) for one in encodings]
        self.probe = Stream(modes[0], RATES[0])
        """What is negotiated."""

    # Descriptors

    def control_descriptors(self, streaming_interface: int) -> bytes:
        """Return the class-specific descriptors of the control interface (chapter 3.7.2).

        Args:
            streaming_interface: the device's number of the streaming interface.
        """
        units = struct.pack(
            "<BBBBHBBHHHB3s", 18, _CS_INTERFACE, _INPUT_TERMINAL, 1, _CAMERA_TERMINAL, 0, 0, 0, 0, 0, 3, bytes(3)
        )
        units += struct.pack("<BBBBHBBB", 9, _CS_INTERFACE, _OUTPUT_TERMINAL, 2, _STREAMING_TERMINAL, 0, 1, 0)
        size = 13 + len(units)
        head = struct.pack("<BBBHHIBB", 13, _CS_INTERFACE, _HEADER, VERSION, size, _CLOCK, 1, streaming_interface)
        return head + units

    def streaming_descriptors(self, endpoint: int) -> bytes:
        """Return the class-specific descriptors of the streaming interface (chapter 3.9.2).

        Args:
            endpoint: the device's address of the bulk endpoint.
        """
        formats = b"".join(
            self._format(number, encoding, modes) for number, (encoding, modes) in enumerate(self._formats, 1)
        )
        count = len(self._formats)
        size = 13 + count
        head = struct.pack(
            "<BBBBHBBBBBBB", size, _CS_INTERFACE, _INPUT_HEADER, count, size + len(formats), endpoint, 0, 2, 0, 0, 0, 1
        )
        return head + bytes(count) + formats

    def _format(self, number: int, encoding: Encoding, modes: Sequence[Mode]) -> bytes:
        if encoding is Encoding.YUY2:
            head = struct.pack(
                "<BBBBB16sBBBBBB",
                *(27, _CS_INTERFACE, _UNCOMPRESSED, number, len(modes), _YUY2_GUID, _BITS_PER_PIXEL, 1, 0, 0, 0, 0),
            )
        else:
            head = bytes((11, _CS_INTERFACE, _MJPEG, number, len(modes), 0, 1, 0, 0, 0, 0))
        frames = b"".join(self._frame(place, mode) for place, mode in enumerate(modes, 1))
        return head + frames + bytes((6, _CS_INTERFACE, _COLOUR, _BT_709, _BT_709, _BT_601))

    def _frame(self, number: int, mode: Mode) -> bytes:
        kind = _UNCOMPRESSED_FRAME if mode.encoding is Encoding.YUY2 else _MJPEG_FRAME
        size = mode.largest_frame
        rates = [min(size * 8 * rate, 0xFFFFFFFF) for rate in (RATES[-1], RATES[0])]
        head = struct.pack(
            "<BBBBBHHIIIIB",
            *(26 + 4 * len(RATES), _CS_INTERFACE, kind, number, 0, mode.width, mode.height, *rates, size),
            *(_TICKS // RATES[0], len(RATES)),
        )
        return head + b"".join((_TICKS // rate).to_bytes(4, "little") for rate in RATES)

    # Negotiation (chapter 4.3.1.1)

    def set(self, data: bytes) -> None:
        """Take the parameters that the guest proposes. Values that the camera does not have are replaced."""
        _, chosen, place, interval, *_ = _PROBE.unpack(data[: _PROBE.size].ljust(_PROBE.size, b"\0"))
        _, modes = self._formats[min(max(chosen, 1), len(self._formats)) - 1]
        mode = modes[min(max(place, 1), len(modes)) - 1]
        rate = min(RATES, key=lambda rate: abs(_TICKS // rate - interval)) if interval else RATES[0]
        self.probe = Stream(mode, rate)

    def get(self, request: int) -> bytes | None:
        """Return the reply to a request; None if there is no such request."""
        match request:
            case Request.GET_LEN:
                return _PROBE.size.to_bytes(2, "little")
            case Request.GET_INFO:
                return b"\3"  # GET and SET
            case Request.GET_DEF:
                return self._parameters(Stream(self._formats[0][1][0], RATES[0]))
            case Request.GET_CUR | Request.GET_MIN | Request.GET_MAX | Request.GET_RES:
                return self._parameters(self.probe)
        return None

    def _parameters(self, stream: Stream) -> bytes:
        for number, (_, modes) in enumerate(self._formats, 1):
            if stream.mode in modes:
                interval = _TICKS // stream.rate
                place = modes.index(stream.mode) + 1
                size = stream.mode.largest_frame
                return _PROBE.pack(1, number, place, interval, 0, 0, 0, 0, 0, size, PAYLOAD_SIZE)
        raise AssertionError(stream)


def payloads(frame: Buffer, toggle: int) -> Iterator[bytes]:
    """Yield the payloads of a frame (chapter 2.4.3.3).

    Args:
        frame: its data, which is not empty.
        toggle: bit 0 of the header, which changes with each frame.
    """
    data = memoryview(frame).cast("B")
    step = PAYLOAD_SIZE - _PAYLOAD_HEADER
    for at in range(0, len(data), step):
        end = _END_OF_FRAME if at + step >= len(data) else 0
        yield bytes((_PAYLOAD_HEADER, _END_OF_HEADER | end | toggle)) + data[at : at + step]
