"""Commands: what a client can ask a running application to do, as plain data.

A command comes from JSON (:func:`from_json`) or from words (:func:`from_words`); :meth:`farplug.app.app.App.do` carries
it out. Each has a stable name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar, Final

from farplug.app.codec import decode
from farplug.app.settings import DeviceRules, Source, StorageSettings
from farplug.errors import Reason, UsageError
from farplug.keymap.layout import DEFAULT
from farplug.text import shown


@dataclass(frozen=True, slots=True)
class Command:
    """What a client asks for.

    Attributes:
        name: of this kind of command; stable.
        help: how it is written in words, and what it does; empty: it cannot be written in words.
        takes_payload: a client sends raw bytes with it.
    """

    name: ClassVar[str]
    help: ClassVar[tuple[str, str]] = ("", "")
    takes_payload: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class Attach(Command):
    """Plug sources into the guest. The result has their ``attachments``; what is plugged in already is among them.

    Attributes:
        sources: what to plug, in this order.
        storage: how images and folders are plugged; None: as the guest's settings say.
        rules: which USB devices of this machine are plugged besides the sources; None: no others.
        separate: each source has a port of its own; otherwise they share one if there are too few.
        wait: wait until the guest has configured the devices; otherwise only until they are being plugged in.
        port: the number of the port for the only source, from 0; None: the first free one.
        guest: the guest's id; None: the only one.
    """

    name = "attach"

    sources: tuple[Source, ...] = ()
    storage: StorageSettings | None = None
    rules: DeviceRules | None = None
    separate: bool = False
    wait: bool = True
    port: int | None = None
    guest: str | None = None


@dataclass(frozen=True, slots=True)
class Detach(Command):
    """Unplug a device. The result has the labels of what was ``detached``: none if it was not plugged in.

    Attributes:
        device: its label, id or path, see :meth:`farplug.app.guest.Guest.find`; ``all``: all devices.
        guest: the guest's id; None: the only one.
    """

    name = "detach"

    device: str
    guest: str | None = None


@dataclass(frozen=True, slots=True)
class Insert(Command):
    """Insert a medium into a CD-ROM drive, in place of the one that is there.

    Attributes:
        path: of the ISO image.
        drive: the drive, by its label or by the medium in it; None: the only one.
        force: eject a medium that the guest has locked; take a file that is not an ISO image.
        guest: the guest's id; None: the only one.
    """

    name = "insert"
    help = ("insert [DRIVE] PATH", "put a medium in, in place of the one that is there")

    path: str
    drive: str | None = None
    force: bool = False
    guest: str | None = None


@dataclass(frozen=True, slots=True)
class Eject(Command):
    """Take the medium out of a CD-ROM drive.

    Attributes:
        drive: the drive, by its label or by the medium in it; None: the only one.
        force: also a medium that the guest has locked.
        guest: the guest's id; None: the only one.
    """

    name = "eject"
    help = ("eject [DRIVE]", "take the medium out")

    drive: str | None = None
    force: bool = False
    guest: str | None = None


@dataclass(frozen=True, slots=True)
class ListDrives(Command):
    """Report the CD-ROM drives and what is in them. The result is an array of drives.

    Attributes:
        guest: the guest's id; None: the only one.
    """

    name = "list"
    help = ("list", "show the drives (cdrom0, cdrom1, ...) and what is in them")

    guest: str | None = None


@dataclass(frozen=True, slots=True)
class Capture(Command):
    """Begin to capture what moves between the guest and its devices: see :meth:`farplug.app.guest.Guest.start_capture`.

    Attributes:
        path: of the file, or of a named pipe.
        bytes: how much of each transfer is kept; None: everything.
        guest: the guest's id; None: the only one.
    """

    name = "capture"
    help = ("capture PATH", "capture what moves between the VM and its devices, for Wireshark")

    path: str
    bytes: int | None = None
    guest: str | None = None


@dataclass(frozen=True, slots=True)
class StopCapture(Command):
    """End the capture.

    Attributes:
        guest: the guest's id; None: the only one.
    """

    name = "stop-capture"
    help = ("stop-capture", "end the capture")

    guest: str | None = None


class Via(StrEnum):
    """How keys and clicks reach the guest."""

    AUTO = "auto"
    """on a USB keyboard if the guest uses one, or a port is free for it; otherwise through SPICE"""
    USB = "usb"
    SPICE = "spice"


class ButtonName(StrEnum):
    """A button of the mouse."""

    LEFT = "left"
    MIDDLE = "middle"
    RIGHT = "right"


@dataclass(frozen=True, slots=True)
class Screenshot(Command):
    """Write the picture of a display to a PNG file. The result has its ``path``, ``width`` and ``height``.

    Attributes:
        path: of the file. An existing PNG file is replaced; any other file is not.
        display: the number of the display, from 0.
        guest: the guest's id; None: the only one.
    """

    name = "screenshot"
    help = ("screenshot PATH", "write the VM's screen to a PNG file")

    path: str
    display: int = 0
    guest: str | None = None


@dataclass(frozen=True, slots=True)
class ScreenText(Command):
    """Read the text console that a display shows: see :meth:`farplug.app.screen.Screen.text`.

    The result has ``lines`` from the top, ``columns``, and ``unknown``: the number of cells with something else than a
    character, each of which is U+FFFD in the lines.

    Attributes:
        display: the number of the display, from 0.
        guest: the guest's id; None: the only one.
    """

    name = "screen-text"
    help = ("screen-text", "read the text console on the VM's screen")

    display: int = 0
    guest: str | None = None


@dataclass(frozen=True, slots=True)
class TypeText(Command):
    """Type a text: see :meth:`farplug.app.typing.Typing.type`.

    The result has ``confirmed``, whether the guest has confirmed that it took all of the text, and ``via``.

    Attributes:
        text: what to type; a newline is the Return key.
        layout: the keyboard layout of the guest: ``us``, ``de``, or another one of ``layouts``.
        via: how.
        hidden: the text is in no event, and errors do not quote it.
        guest: the guest's id; None: the only one.
    """

    name = "type"
    help = ("type TEXT", "type a text on the VM's keyboard")

    text: str = field(repr=False)
    layout: str = DEFAULT
    via: Via = Via.AUTO
    hidden: bool = False
    guest: str | None = None


@dataclass(frozen=True, slots=True)
class Layouts(Command):
    """Report the keyboard layouts.

    The result has ``layouts``, an array, each with ``name`` and ``title``, and ``current``, the name of the last one
    that was used. Those of this machine that the package does not have are not in the array.

    Attributes:
        guest: the guest's id; None: the only one.
    """

    name = "layouts"

    guest: str | None = None


@dataclass(frozen=True, slots=True)
class CheckText(Command):
    """Report what of a text a keyboard layout lacks.

    The result has ``missing``, an array: each with ``index`` in the text, from 0, ``char``, the character, and
    ``layouts``, the names of those that have it.

    Attributes:
        text: what would be typed.
        layout: the keyboard layout.
    """

    name = "check-text"

    text: str = field(repr=False)
    layout: str = DEFAULT


@dataclass(frozen=True, slots=True)
class Press(Command):
    """Press keys together, and release them: see :meth:`farplug.app.typing.Typing.press`.

    The result has ``confirmed`` and ``via``, as that of ``type``.

    Attributes:
        keys: names of X keysyms with ``+`` between them.
        via: how.
        guest: the guest's id; None: the only one.
    """

    name = "press"
    help = ("press KEYS", "press keys together, such as ctrl+alt+Delete")

    keys: str
    via: Via = Via.AUTO
    guest: str | None = None


@dataclass(frozen=True, slots=True)
class Click(Command):
    """Click at a position on a display, or after the pointer was moved by a distance. The result has ``via``.

    Attributes:
        x: the column of the position, or the distance to the right.
        y: the row of the position, or the distance down.
        button: which one.
        relative: ``x`` and ``y`` are a distance: for a VM without a tablet.
        display: the number of the display, from 0.
        via: how; a USB tablet clicks at positions of a single display.
        guest: the guest's id; None: the only one.
    """

    name = "click"
    help = ("click X Y", "click with the VM's mouse at a position")

    x: int
    y: int
    button: ButtonName = ButtonName.LEFT
    relative: bool = False
    display: int = 0
    via: Via = Via.AUTO
    guest: str | None = None


class PresenceAnswer(StrEnum):
    """What a user answers to a security key."""

    ALLOW = "allow"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class Presence(Command):
    """Answer for the user of a security key, which a program in the VM waits for. The result has the question.

    Attributes:
        answer: allow what the program asks for, as a touch of the key does, or refuse it.
        attachment: the key, by its label, id or path; None: the one that asks.
        request: the number of the question; None: the one that waits.
        guest: the guest's id; None: the only one.
    """

    name = "presence"
    help = ("touch [KEY]", "touch a security key: allow what a program in the VM asks for")

    answer: PresenceAnswer = PresenceAnswer.ALLOW
    attachment: str | None = None
    request: int | None = None
    guest: str | None = None


# Commands of one client: what they do belongs to its connection, and ends with it.


@dataclass(frozen=True, slots=True)
class WatchScreen(Command):
    """Send the picture of a display, its pointer and the state of the inputs to this client, and each change of them.

    The result has ``width``, ``height`` and ``serial``: zeros while there is no picture.

    Attributes:
        display: the number of the display, from 0.
        guest: the guest's id; None: the only one.
    """

    name = "watch-screen"

    display: int = 0
    guest: str | None = None


@dataclass(frozen=True, slots=True)
class UnwatchScreen(Command):
    """Send a display to this client no more.

    Attributes:
        display: the number of the display, from 0.
        guest: the guest's id; None: the only one.
    """

    name = "unwatch-screen"

    display: int = 0
    guest: str | None = None


@dataclass(frozen=True, slots=True)
class ScreenAck(Command):
    """Acknowledge one event ``screen``.

    Attributes:
        serial: of the event.
    """

    name = "screen-ack"

    serial: int


@dataclass(frozen=True, slots=True)
class Drive(Command):
    """Take the keyboard and the mouse, or release them. The result has the name of the ``holder``, or null.

    Attributes:
        take: take them, from any client that holds them; otherwise release them.
        client: the name of this client, for the others; empty: as it was.
        if_free: do not take them from another client.
        guest: the guest's id; None: the only one.
    """

    name = "drive"

    take: bool
    client: str = ""
    if_free: bool = False
    guest: str | None = None


@dataclass(frozen=True, slots=True)
class Key(Command):
    """Press a physical key, and hold it, or release it.

    Attributes:
        code: of the key, see :func:`farplug.spice.physical_keys.physical_key`.
        down: press it; otherwise release it.
        guest: the guest's id; None: the only one.
    """

    name = "key"

    code: str
    down: bool
    guest: str | None = None


@dataclass(frozen=True, slots=True)
class KeysUp(Command):
    """Release all keys and buttons of this client.

    Attributes:
        guest: the guest's id; None: the only one.
    """

    name = "keys-up"

    guest: str | None = None


@dataclass(frozen=True, slots=True)
class Pointer(Command):
    """Move the pointer, hold its buttons, and turn its wheel.

    Attributes:
        x: the column of a position on the display; None: the pointer is not moved to a position.
        y: its row.
        dx: the distance to the right; None: the pointer is not moved by a distance.
        dy: the distance down.
        buttons: those that are down now; None: as before.
        wheel: its steps, away from the user if the number is negative.
        display: the number of the display, from 0.
        guest: the guest's id; None: the only one.
    """

    name = "pointer"

    x: int | None = None
    y: int | None = None
    dx: int | None = None
    dy: int | None = None
    buttons: tuple[ButtonName, ...] | None = None
    wheel: int = 0
    display: int = 0
    guest: str | None = None


@dataclass(frozen=True, slots=True)
class StopTyping(Command):
    """Interrupt what this client types."""

    name = "stop-typing"


@dataclass(frozen=True, slots=True)
class MediaOffer(Command):
    """Offer a file of this client, read-only. The result has ``media``, its id.

    It is plugged as a CD-ROM or a read-only disk with the path ``client:ID``.

    Attributes:
        file: its name.
        size: in bytes.
        modified: when it was changed last, in any form; empty: unknown.
    """

    name = "media-offer"

    file: str
    size: int
    modified: str = ""


@dataclass(frozen=True, slots=True)
class MediaData(Command):
    """Answer an event ``media-read``. The payload has the bytes that were asked for.

    Attributes:
        media: the id of the file.
        read: the number of the question.
        error: why the bytes cannot be read, for people; None: they are there.
    """

    name = "media-data"
    takes_payload = True

    media: str
    read: int
    error: str | None = None


@dataclass(frozen=True, slots=True)
class MediaWithdraw(Command):
    """End an offer: drives eject the medium, and reads of a disk fail.

    Attributes:
        media: the id of the file.
    """

    name = "media-withdraw"

    media: str


@dataclass(frozen=True, slots=True)
class PlugShell(Command):
    """Plug in a keyboard and three serial lines, as one device, for commands in the guest. It goes with the client.

    Attributes:
        lines: the path of UNIX sockets without its last digit: ``0`` is the end of the first line, up to ``2``.
        serial_number: of the device, by which the guest finds it.
        guest: the guest's id; None: the only one.
    """

    name = "plug-shell"

    lines: str
    serial_number: str
    guest: str | None = None


@dataclass(frozen=True, slots=True)
class SerialOpen(Command):
    """Open a serial line with the end ``client``: events ``serial`` follow.

    The result has the number of the ``line``, for the other methods, and the ``position`` of the next byte.

    Attributes:
        device: the label of the serial line.
        guest: the guest's id; None: the only one.
    """

    name = "serial-open"

    device: str
    guest: str | None = None


@dataclass(frozen=True, slots=True)
class SerialWrite(Command):
    """Send the raw bytes of the request to the guest. The reply comes when the line takes more.

    Attributes:
        line: its number.
    """

    name = "serial-write"
    takes_payload = True

    line: int


@dataclass(frozen=True, slots=True)
class SerialAck(Command):
    """Acknowledge what the guest has sent: without acknowledgements it waits.

    Attributes:
        line: its number.
        position: of the first byte that is not acknowledged.
    """

    name = "serial-ack"

    line: int
    position: int


@dataclass(frozen=True, slots=True)
class SerialClose(Command):
    """Close a serial line. The guest does not see that.

    Attributes:
        line: its number.
    """

    name = "serial-close"

    line: int


@dataclass(frozen=True, slots=True)
class Devices(Command):
    """List the USB devices of this machine. The result has the name of the ``machine`` and the ``devices``."""

    name = "devices"


@dataclass(frozen=True, slots=True)
class Status(Command):
    """Return the state of the application: :meth:`farplug.app.app.App.snapshot`."""

    name = "status"


@dataclass(frozen=True, slots=True)
class Reconnect(Command):
    """Connect to a VM that is lost at once, without the delay before the next attempt; or make no more attempts.

    Attributes:
        give_up: make no more attempts: the guest is gone.
        guest: the guest's id; None: the only one.
    """

    name = "reconnect"

    give_up: bool = False
    guest: str | None = None


@dataclass(frozen=True, slots=True)
class Quit(Command):
    """Detach everything and leave."""

    name = "quit"
    help = ("quit", "detach everything and leave, as Ctrl-C does")


COMMANDS: Final[Mapping[str, type[Command]]] = {
    kind.name: kind
    for kind in (
        *(Attach, Detach, Insert, Eject, Capture, StopCapture),
        *(
            Screenshot,
            ScreenText,
            TypeText,
            Press,
            Click,
            Layouts,
            CheckText,
            Presence,
            ListDrives,
            Devices,
            Status,
            Reconnect,
            Quit,
        ),
    )
}
"""All commands of the application, by their names."""
CLIENT_COMMANDS: Final[Mapping[str, type[Command]]] = {
    kind.name: kind
    for kind in (
        *(WatchScreen, UnwatchScreen, ScreenAck, Drive, Key, KeysUp, Pointer, StopTyping),
        *(MediaOffer, MediaData, MediaWithdraw, PlugShell),
        *(SerialOpen, SerialWrite, SerialAck, SerialClose),
    )
}
"""The commands of one client, by their names: see :class:`farplug.app.client.AppClient`."""

MORE: Final = (
    ("force insert ...", "also in place of a medium that the guest has locked, and a file that is not an ISO image"),
    ("force eject ...", "also while the guest has the medium locked"),
    ("refuse [KEY]", "refuse what a program in the VM asks a security key for"),
)
HELP: Final = ("help", "show this")


def from_json(
    name: object,
    data: object,
    known: Mapping[str, type[Command]] = COMMANDS,
    *,
    ignore_unknown: bool = False,
) -> Command:
    """Return the command with a name and its fields.

    Args:
        name: of the command, as the JSON parser returned it.
        data: an object of JSON's types with the fields.
        known: the commands that there are.
        ignore_unknown: ignore fields that the command does not have; see :func:`~farplug.app.codec.decode`.

    Raises:
        UsageError: there is no such command, or a field is not valid.
    """
    kind = known.get(name) if isinstance(name, str) else None
    if kind is None:
        raise UsageError(
            f"{shown(name)} is not a command", reason=Reason.UNKNOWN_COMMAND, remedy=f"commands: {', '.join(known)}"
        )
    return decode(kind, data, ignore_unknown=ignore_unknown)


def from_words(words: Sequence[str]) -> Command | None:
    """Return the command that words ask for; None if they are not a command that can be written in words."""
    force = words[:1] == ["force"]
    match words[force:]:
        case ["insert", path]:
            return Insert(path, force=force)
        case ["insert", drive, path]:
            return Insert(path, drive, force=force)
        case ["eject"]:
            return Eject(force=force)
        case ["eject", drive]:
            return Eject(drive, force=force)
        case ["capture", path] if not force:
            return Capture(path)
        case ["stop-capture"] if not force:
            return StopCapture()
        case ["screenshot", path] if not force:
            return Screenshot(path)
        case ["screen-text"] if not force:
            return ScreenText()
        case ["type", text] if not force:
            return TypeText(text)
        case ["press", keys] if not force:
            return Press(keys)
        case ["click", x, y] if not force and _is_number(x) and _is_number(y):
            return Click(int(x), int(y))
        case ["touch", *key] if not force and len(key) < 2:
            return Presence(attachment=key[0] if key else None)
        case ["refuse", *key] if not force and len(key) < 2:
            return Presence(PresenceAnswer.REFUSE, key[0] if key else None)
        case ["list"] if not force:
            return ListDrives()
        case ["quit"] if not force:
            return Quit()
    return None


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdecimal() and len(word) < 7


def help_lines() -> list[str]:
    """Return a line for each command that can be written in words."""
    written = [kind.help for kind in COMMANDS.values() if kind.help[0]]
    return [f"{usage:<21} {text}" for usage, text in (*written[:-2], *MORE, *written[-2:], HELP)]
