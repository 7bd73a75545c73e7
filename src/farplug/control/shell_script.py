"""What runs in the guest for :mod:`farplug.control.shell`: scripts for a POSIX shell, and how their output is read.

The guest has three serial lines of one device: *streams* (the standard input and output of commands), *errors* (their
standard error), and *control*. A typed line, :func:`bootstrap`, opens them as the descriptors 3, 4 and 5, and executes
the scripts that arrive on the control line. It needs ``sh``, ``stty``, ``dd``, ``grep``, ``ls``, ``sleep`` and ``cat``.

* The host sends records: texts that newlines fill up to 16 bytes, which a shell removes when dd has read them. (read
  does not read them: that of bash takes more than a line from a terminal.)
* Scripts and standard input arrive in chunks: a record with the number of bytes in decimal, then the bytes. 0 ends the
  input.
* Standard output and standard error leave unchanged; a marker, which no one else has, ends each of them.
* On the control line the guest sends lines: ``ok`` when it reads scripts, ``begun`` when a command has begun,
  ``exit N`` when the command has ended. The host sends names of signals meanwhile, and ``end`` after ``exit``, as
  records.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from shlex import quote
from typing import Final

READY: Final = "ok"
BEGUN: Final = "begun"
EXIT: Final = "exit"
END: Final = "end"
"""Words of the control line."""

RECORD: Final = 16
"""Bytes of a record."""

CHUNK: Final = 64 << 10
"""Bytes of a chunk, at most."""

DRIVER_SECONDS: Final = 9
"""Seconds in which the guest loads the driver of the serial lines."""

_INTERFACES: Final = (0, 2, 4)
"""Numbers of the control interfaces of the three lines: they are the first functions of the device."""


def bootstrap(serial_number: str, *, sys: str = "/sys", dev: str = "/dev") -> str:
    """Return the line to type at a prompt of a shell, without a newline at the end.

    It begins with a space, which keeps it out of the history of many shells, and has no exclamation mark, which bash
    would expand.

    Args:
        serial_number: of the device, without characters that a shell or grep interprets.
        sys: where sysfs is.
        dev: where the device nodes are.
    """
    streams, errors, control = _INTERFACES
    return (
        f" sh -c 'modprobe cdc_acm;for d in {sys}/bus/usb/devices/*;do grep -qs {serial_number} $d/serial&&break;done;"
        f"for i in {' '.join(map(str, range(DRIVER_SECONDS)))};do [ -e $d:1.{control}/tty ]&&break;sleep 1;done;"
        f"t(){{ echo {dev}/$(ls $d:1.$1/tty);}};"
        f"exec 3<>$(t {streams}) 4<>$(t {errors}) 5<>$(t {control});"
        "for i in 3 4 5;do stty raw -echo<&$i;done;"
        f"echo {READY}>&5;"
        f'while n=$(dd bs=1 count={RECORD}<&5);[ $n ];do eval "$(dd bs=1 count=$n<&5)";done\' 2>/dev/null'
    )


_PRELUDE: Final = r"""
M={marker}
B='echo begun >&5; echo $$ >&8; exec >&6 2>&7 3>&- 4>&- 5>&- 6>&- 7>&- 8>&-; exec "$@"'
S= C=
command -v setsid >/dev/null && { S=setsid; setsid --help 2>&1 | grep -q -e '-c' && C='setsid -c'; }

feed() {
    while n=$(dd bs=1 count={record} <&3); [ "${n:-0}" != 0 ]; do
        dd bs="$n" count=1 iflag=fullblock <&3
    done
}

watch() {
    read -r p
    while s=$(dd bs=1 count={record} <&5); [ "$s" ]; do
        [ "$s" = end ] && return
        kill -"$s" -"$p" || kill -"$s" "$p"
    done
    kill -HUP -"$p" || kill -HUP "$p"
}

run() {
    {
        {
            {
                feed | {
                    sh -c "$B" sh $S "$@"
                    echo "exit $?" >&5
                }
            } 7>&1 | cat >&4
        } 6>&1 | cat >&3
    } 8>&1 | watch
    printf %s "$M" >&3
    printf %s "$M" >&4
}

terminal() {
    stty sane rows "$1" cols "$2" <&3
    echo begun >&5
    TERM=$3 $C sh -c '"$@" 3>&- 4>&- 5>&-; c=$?; stty raw -echo; printf %s "$0"; stty raw -echo; exit $c' \
        "$M" "${SHELL:-sh}" -i <&3 >&3 2>&3
    echo "exit $?" >&5
}
"""
# dd reads a whole chunk before it writes, so that a command that reads nothing leaves no part of a chunk on the line.
# setsid makes a process group, which signals reach as a whole. A terminal that its session leader leaves is hung up,
# what it has not sent is lost: the second stty waits until everything is sent.

_COPY_IN: Final = r"""
d=$1; [ -d "$d" ] && d=${d%/}/$2
t=$d.$3
cat >"$t" && s=$(sha256sum <"$t") || { rm -f "$t"; exit 1; }
[ "${s%% *}" = "$4" ] || { rm -f "$t"; echo "the checksum of what arrived differs" >&2; exit 1; }
chmod "$5" "$t" && mv -f "$t" "$d" || { rm -f "$t"; exit 1; }
"""
_COPY_OUT: Final = r"""
[ -d "$1" ] && { echo "$1 is a folder" >&2; exit 1; }
cat <"$1" && sha256sum <"$1" >&2
"""

_SUM: Final = re.compile(rb"([0-9a-f]{64})\s+-?\s*$")


def prelude(marker: str) -> str:
    """Return the functions that the other scripts use."""
    return _PRELUDE.replace("{marker}", marker).replace("{record}", str(RECORD))


def run(command: Sequence[str]) -> str:
    """Return the script that runs a command."""
    return f"run {' '.join(map(quote, command))}"


def terminal(rows: int, columns: int, kind: str) -> str:
    """Return the script that runs an interactive shell on the line of the streams."""
    return f"terminal {rows} {columns} {quote(kind)}"


def copy_in(destination: str, name: str, suffix: str, checksum: str, mode: int) -> list[str]:
    """Return the command that writes its standard input to a file, in the place of one that is there.

    Args:
        destination: the path of the file, or of the folder in which it will be.
        name: of the file in a folder.
        suffix: of the temporary file beside it.
        checksum: SHA-256 of the content, in hexadecimal.
        mode: its permissions.
    """
    return ["sh", "-c", _COPY_IN, "sh", _path(destination), name, suffix, checksum, f"{mode & 0o777:o}"]


def copy_out(path: str) -> list[str]:
    """Return the command that writes a file to standard output, and its checksum to standard error."""
    return ["sh", "-c", _COPY_OUT, "sh", _path(path)]


def checksum_of(errors: bytes) -> str | None:
    """Return the checksum that :func:`copy_out` has written; None: it failed."""
    found = _SUM.fullmatch(errors)
    return None if found is None else found[1].decode()


def _path(path: str) -> str:
    """Return a path that no program takes for an option."""
    return f"./{path}" if path.startswith("-") else path


def encode(text: str) -> bytes:
    """Return the bytes of a script or an argument, also of one that is not valid UTF-8."""
    return text.encode("utf-8", "surrogateescape")


def record(text: str) -> bytes:
    """Return a record. A text has at most 15 characters."""
    return text.encode().ljust(RECORD, b"\n")


def chunk(data: bytes) -> bytes:
    """Return a chunk, from 1 byte to :data:`CHUNK` bytes for standard input."""
    return record(str(len(data))) + data


END_OF_INPUT: Final = record("0")


class UntilMarker:
    """Takes a stream apart at its marker. Holds back only what may be the beginning of the marker.

    Attributes:
        ended: the marker was found.
    """

    def __init__(self, marker: str) -> None:
        self.ended = False
        self._marker = encode(marker)
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """Take bytes; return those that certainly come before the marker. What follows the marker is dropped."""
        data = self._held + data
        place = data.find(self._marker)
        if place >= 0:
            self.ended = True
            self._held = b""
            return data[:place]
        held = next(n for n in range(min(len(self._marker) - 1, len(data)), -1, -1) if data.endswith(self._marker[:n]))
        self._held = data[len(data) - held :]
        return data[: len(data) - held]
