"""DuckyScript 1 as commands: ``STRING``, ``DELAY``, keys and ``REPEAT``. No I/O.

Source: the USB Rubber Ducky's documentation of DuckyScript 1.0 (Hak5).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from farplug.app.commands import Command, Press, TypeText, Via
from farplug.errors import FarplugError, Reason, UsageError
from farplug.keymap import chord, find_layout, key_named
from farplug.text import shown

MAX_SCRIPT: Final = 1 << 20
"""Characters of a script."""
MAX_STEPS: Final = 100_000
"""Steps of a script, repetitions among them."""
MAX_DELAY: Final = 3_600_000
"""Milliseconds."""
PIECE: Final = 250
"""Characters of a STRING that are typed with one command."""

_NAMES: Final = {
    "CONTROL": "ctrl",
    "COMMAND": "super",
    "OPTION": "alt",
    "UPARROW": "up",
    "DOWNARROW": "down",
    "LEFTARROW": "left",
    "RIGHTARROW": "right",
    "CAPSLOCK": "caps_lock",
    "NUMLOCK": "num_lock",
    "SCROLLLOCK": "scroll_lock",
    "APP": "menu",
}


@dataclass(frozen=True, slots=True)
class Delay:
    """A pause.

    Attributes:
        seconds: how long.
    """

    seconds: float


def parse_ducky(script: str, layout: str, via: Via, *, guest: str | None = None) -> list[Command | Delay]:
    """Return the steps of a script, all of which can be carried out.

    Args:
        script: the lines.
        layout: the keyboard layout of the guest.
        via: how keys reach the guest.
        guest: the guest's id; None: the only one.

    Raises:
        UsageError: a line is not valid, or the layout lacks a character; the message has the number of the line. Or the
            script is too long.
    """
    if len(script) > MAX_SCRIPT:
        raise UsageError(f"a script of {len(script)} characters: at most {MAX_SCRIPT}", reason=Reason.BAD_SETTING)
    steps: list[Command | Delay] = []
    last: list[Command | Delay] = []
    pause: list[Command | Delay] = []
    for number, line in enumerate(script.splitlines(), 1):
        word, _, rest = line.strip().partition(" ") if not line.startswith("STRING") else line.partition(" ")
        repeat = 1
        try:
            match word:
                case "" | "REM":
                    continue
                case "DEFAULT_DELAY" | "DEFAULTDELAY":
                    pause = [_delay(rest)]
                    continue
                case "REPEAT":
                    repeat = _number(rest, MAX_STEPS)
                    if not last:
                        raise _invalid("there is nothing to repeat")
                case "DELAY":
                    last = [_delay(rest)]
                case "STRING" | "STRINGLN":
                    text = rest + "\n" * (word == "STRINGLN")
                    find_layout(layout).type(text)
                    pieces = (text[at : at + PIECE] for at in range(0, len(text), PIECE))
                    last = [TypeText(piece, layout, via, guest=guest) for piece in pieces]
                case _:
                    last = [Press(_keys([word, *rest.split()]), via, guest=guest)]
        except FarplugError as error:
            raise UsageError(f"line {number}: {error.message}", reason=error.reason, remedy=error.remedy) from None
        if len(steps) + (len(last) + len(pause)) * repeat > MAX_STEPS:
            raise UsageError(f"line {number}: more than {MAX_STEPS} steps", reason=Reason.BAD_SETTING)
        for _ in range(repeat):
            steps += [*last, *pause]
    return steps


def _keys(words: Iterable[str]) -> str:
    """Return the keys of a line as a chord: ``CTRL-ALT DELETE`` and ``GUI r``."""
    names = [part for word in words for part in (word.split("-") if len(word) > 1 else [word])]
    names = [_NAMES.get(name, name) for name in names]
    for name in names:
        key_named(name)
    keys = "+".join(names)
    chord(keys)
    return keys


def _delay(text: str) -> Delay:
    return Delay(_number(text, MAX_DELAY) / 1000)


def _number(text: str, most: int) -> int:
    text = text.strip()
    if not (text.isascii() and text.isdecimal() and len(text) < 9 and int(text) <= most):
        raise _invalid(f"{shown(text)} is not a number from 0 to {most}")
    return int(text)


def _invalid(message: str) -> UsageError:
    return UsageError(message, reason=Reason.BAD_SETTING)
