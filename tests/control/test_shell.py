"""Commands over serial lines, in shells of this machine: what they print, take and return, byte by byte."""

from __future__ import annotations

import asyncio
import random
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from tests.control.shells import SHELLS, TIMEOUT, local_shell

from farplug.control.shell import Shell
from farplug.control.shell_script import UntilMarker, bootstrap
from farplug.errors import DeviceError, FarplugError, GuestGoneError, Reason, TargetError, UsageError

BINARY = bytes(range(256)) * 64
MIB = 1 << 20


@pytest_asyncio.fixture(params=SHELLS)
async def shell(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Shell]:
    async with local_shell(tmp_path, request.param) as shell:
        yield shell


class Collected:
    """What a command writes."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.more = asyncio.Event()

    async def write(self, data: bytes) -> None:
        self.data += data
        self.more.set()

    async def until(self, text: bytes) -> None:
        while text not in self.data:
            await self.until_more()

    async def until_more(self) -> None:
        self.more.clear()
        await self.more.wait()


class Input:
    """Standard input in pieces."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = list(pieces)

    async def read(self) -> bytes:
        return self._pieces.pop(0) if self._pieces else b""


async def run(
    shell: Shell, *command: str, stdin: bytes = b"", timeout: float | None = None
) -> tuple[int, bytes, bytes]:
    out, err = Collected(), Collected()
    async with asyncio.timeout(TIMEOUT):
        code = await shell.run(command, stdin=Input(stdin).read, stdout=out.write, stderr=err.write, timeout=timeout)
    return code, bytes(out.data), bytes(err.data)


async def test_exit_codes_outputs_and_arguments(shell: Shell) -> None:
    assert await run(shell, "true") == (0, b"", b"")
    assert await run(shell, "sh", "-c", "exit 3") == (3, b"", b"")
    assert await run(shell, "printf", "no newline") == (0, b"no newline", b"")
    assert await run(shell, "sh", "-c", "echo out; echo err >&2; exit 200") == (200, b"out\n", b"err\n")
    arguments = ["", " ", "*", "$HOME", "`x`", "a'b\"c", "-n", "two\nlines\n", "\\", "!", "ü\udcff", "--"]
    code, out, err = await run(shell, "printf", "%s|", *arguments)
    assert (code, err) == (0, b"")
    assert out == b"".join(one.encode("utf-8", "surrogateescape") + b"|" for one in arguments)
    code, out, err = await run(shell, "sh", "-c", "kill -KILL $$")
    assert (code, out, err) == (128 + signal.SIGKILL, b"", b"")
    code, out, err = await run(shell, "farplug-no-such-program")
    assert (code, out) == (127, b"")
    assert b"farplug-no-such-program" in err
    assert await run(shell, "sh", "-c", "ls /proc/self/fd; test -t 1 || test -t 0 || echo no terminal") == (
        0,
        b"0\n1\n2\n3\nno terminal\n",
        b"",
    )


async def test_binary_input_and_output_are_exact(shell: Shell) -> None:
    assert await run(shell, "cat", stdin=BINARY) == (0, BINARY, b"")
    assert await run(shell, "sh", "-c", "cat >&2", stdin=BINARY) == (0, b"", BINARY)
    data = random.Random(1).randbytes(MIB + 1)
    assert await run(shell, "cat", stdin=data) == (0, data, b"")
    code, out, _ = await run(shell, "sh", "-c", "cat; printf end", stdin=b"line\n0\n12\n")
    assert (code, out) == (0, b"line\n0\n12\nend")


async def test_input_that_is_not_read_disturbs_nothing(shell: Shell) -> None:
    data = random.Random(2).randbytes(300_000)
    assert await run(shell, "true", stdin=data) == (0, b"", b"")
    assert await run(shell, "sh", "-c", "read line; echo $line", stdin=b"first\n" + data) == (0, b"first\n", b"")
    assert await run(shell, "cat", stdin=b"next") == (0, b"next", b"")


async def test_a_command_gets_input_while_it_writes_output(shell: Shell) -> None:
    out = Collected()
    steps = [b"one\n", b"two\n"]

    async def read() -> bytes:
        if len(steps) < 2:
            await out.until(b"got one")
        return steps.pop(0) if steps else b""

    async with asyncio.timeout(TIMEOUT):
        code = await shell.run(["sh", "-c", "while read line; do echo got $line; done"], stdin=read, stdout=out.write)
    assert (code, bytes(out.data)) == (0, b"got one\ngot two\n")


async def test_input_that_never_ends_ends_with_the_command(shell: Shell) -> None:
    async def forever() -> bytes:
        await asyncio.Event().wait()
        return b""

    async with asyncio.timeout(TIMEOUT):
        assert await shell.run(["true"], stdin=forever) == 0
    assert await run(shell, "cat", stdin=b"next") == (0, b"next", b"")


async def test_signals_reach_the_whole_command(shell: Shell) -> None:
    out = Collected()
    running = asyncio.ensure_future(
        shell.run(
            ["sh", "-c", "trap 'echo interrupted; exit 5' INT; echo ready; while :; do sleep 0.1; done"],
            stdout=out.write,
        )
    )
    async with asyncio.timeout(TIMEOUT):
        await out.until(b"ready")
        shell.signal("INT")
        assert await running == 5
    assert bytes(out.data) == b"ready\ninterrupted\n"
    shell.signal("INT")  # no command runs
    assert await run(shell, "echo", "still there") == (0, b"still there\n", b"")


async def test_a_timeout_ends_a_command_that_ignores_sigterm(shell: Shell) -> None:
    with pytest.raises(TargetError, match=r"did not end within 0\.5 s") as raised:
        await run(shell, "sh", "-c", "trap '' TERM; while :; do sleep 1; done", timeout=0.5)
    assert raised.value.reason is Reason.TIMED_OUT
    assert await run(shell, "echo", "still there") == (0, b"still there\n", b"")


async def test_an_output_that_no_program_takes_waits(shell: Shell) -> None:
    taken = asyncio.Event()
    seen = 0

    async def slow(data: bytes) -> None:
        nonlocal seen
        seen += len(data)
        await taken.wait()

    running = asyncio.ensure_future(shell.run(["sh", "-c", "yes | head -c 3000000; echo done >&2"], stdout=slow))
    await asyncio.sleep(0.5)
    assert seen <= 64 << 10
    taken.set()
    async with asyncio.timeout(TIMEOUT):
        assert await running == 0
    assert seen == 3_000_000


async def test_what_a_background_process_prints_is_waited_for(shell: Shell) -> None:
    assert await run(shell, "sh", "-c", "(sleep 0.3; echo late) & echo early") == (0, b"early\nlate\n", b"")


async def test_files_are_copied_with_their_mode(shell: Shell, tmp_path: Path) -> None:
    data = random.Random(3).randbytes(MIB)
    source = tmp_path / "-a b'c"
    source.write_bytes(data)
    source.chmod(0o750)
    home = tmp_path / "home"
    assert await shell.copy_in(source) == MIB
    assert (home / source.name).read_bytes() == data
    assert (home / source.name).stat().st_mode & 0o777 == 0o750
    assert await shell.copy_in(source, "-other") == MIB
    assert (home / "-other").read_bytes() == data
    (home / "folder").mkdir()
    source.write_bytes(b"")
    assert await shell.copy_in(source, "folder/") == 0
    assert (home / "folder" / source.name).read_bytes() == b""
    back = tmp_path / "back"
    assert await shell.copy_out("-other", back) == MIB
    assert back.read_bytes() == data
    assert await shell.copy_out("./-other", home / "folder") == MIB
    assert (home / "folder/-other").read_bytes() == data


async def test_a_copy_that_fails_leaves_nothing(shell: Shell, tmp_path: Path) -> None:
    back = tmp_path / "back"
    back.write_text("kept")
    with pytest.raises(DeviceError, match="missing"):
        await shell.copy_out("missing", back)
    with pytest.raises(DeviceError, match="is a folder"):
        await shell.copy_out(".", back)
    with pytest.raises(UsageError, match="no such file"):
        await shell.copy_in(tmp_path / "missing")
    with pytest.raises(UsageError, match="no such file"):
        await shell.copy_out("/dev/null", tmp_path / "none/back")
    with pytest.raises(DeviceError, match="none/here"):
        await shell.copy_in(back, "none/here")
    assert back.read_text() == "kept"
    assert [*(tmp_path / "home").iterdir()] == []
    assert sorted(one.name for one in tmp_path.iterdir() if "farplug" in one.name) == []
    assert await run(shell, "echo", "still there") == (0, b"still there\n", b"")


async def test_a_terminal(shell: Shell) -> None:
    out = Collected()
    typed: asyncio.Queue[bytes] = asyncio.Queue()
    running = asyncio.ensure_future(shell.terminal(typed.get, out.write, rows=33, columns=99, kind="vt220"))
    async with asyncio.timeout(TIMEOUT):
        typed.put_nowait(b"stty size; echo $TERM $((40+2)); test -t 0 && tty </dev/tty\r")
        await out.until(b"33 99\r\nvt220 42\r\n/dev/")
        typed.put_nowait(b"echo reads; while read x; do echo $x$x; done\r")
        await out.until(b"reads\r\n")  # what is typed before the shell has left the line's own mode may be dropped
        typed.put_nowait(b"some text\r")
        await out.until(b"some textsome text\r\n")
        typed.put_nowait(b"\x03")
        while not re.search(rb"\^C.*[#$] ", out.data, re.DOTALL):  # what is typed before the prompt may be dropped
            await out.until_more()
        typed.put_nowait(b"exit 7\r")
        assert await running == 7


@pytest.mark.parametrize("name", SHELLS)
async def test_when_the_device_is_gone_the_command_gets_a_hangup(name: str, tmp_path: Path) -> None:
    out = Collected()
    pid = tmp_path / "pid"
    async with local_shell(tmp_path, name, hang_up=True) as shell:
        running = asyncio.ensure_future(
            shell.run(
                [
                    "sh",
                    "-c",
                    f"echo $$ >{pid}; trap 'echo hangup >{pid}; exit' HUP; echo ready; while :; do sleep 0.1; done",
                ],
                stdout=out.write,
            )
        )
        await out.until(b"ready")
        shell.fail(GuestGoneError("taken out"))
        with pytest.raises(GuestGoneError, match="taken out"):
            await running
        assert pid.read_text() != "hangup\n"
    assert pid.read_text() == "hangup\n"


@pytest.mark.parametrize("command", [[], [""], ["a\0b"]])
async def test_a_command_that_cannot_be_run(command: list[str], tmp_path: Path) -> None:
    async with local_shell(tmp_path, "dash") as shell:
        with pytest.raises(UsageError):
            await shell.run(command)


def test_the_marker_is_found_wherever_it_is_cut() -> None:
    marker = "abcabd"
    data = b"x abcabcab" + b"abcabd" + b"dropped"
    for size in range(1, len(data) + 1):
        until = UntilMarker(marker)
        found = b"".join(until.feed(data[at : at + size]) for at in range(0, len(data), size) if not until.ended)
        assert (found, until.ended) == (b"x abcabcab", True), size
    until = UntilMarker(marker)
    assert until.feed(b"prompt> ") == b"prompt> ", "nothing is held back"
    assert (until.feed(b"ab"), until.feed(b"x"), until.ended) == (b"", b"abx", False)


def test_the_typed_line_is_short_and_plain() -> None:
    line = bootstrap("0123456789")
    assert len(line) < 500
    assert line.isascii()
    assert line.isprintable()
    assert "!" not in line


@pytest.mark.parametrize("answer", [b"what\n", b"begun x\n", b"begun 99999999999\n", b"x" * 100_000])
async def test_an_answer_that_is_not_valid_is_refused(answer: bytes, tmp_path: Path) -> None:
    from farplug.control.shell import Line

    reader = asyncio.StreamReader(limit=64 << 10)

    class Sink(asyncio.Transport):
        def write(self, data: object) -> None: ...

        def is_closing(self) -> bool:
            return True

    def line(reader: asyncio.StreamReader) -> Line:
        protocol = asyncio.StreamReaderProtocol(reader)
        return Line(reader, asyncio.StreamWriter(Sink(), protocol, None, asyncio.get_running_loop()))

    shell = Shell(line(asyncio.StreamReader()), line(asyncio.StreamReader()), line(reader))
    reader.feed_data(answer)
    with pytest.raises(FarplugError, match="in place of 'begun'"):
        await shell.run(["true"])
