"""``farplug run`` in a real guest: the userland is Debian's, with the login of its packages on the screen, and farplug
has nothing of it but ports for USB devices.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from tests.guest.conftest import Guests
from tests.guest.plugging import GUEST_TIMEOUT, console_font
from tests.long import LONG

from farplug.testing import GuestConfig, QemuGuest, SpicePort, TcpPort

CONFIG = GuestConfig(
    ports=(TcpPort(), SpicePort()),
    kernel_arguments=("console=tty0",),
    modules=("bochs", "usbhid", "hid_generic", "evdev", "cdc_acm"),
    machine=True,
    memory=512,
    extra_arguments=("-device", "VGA"),
)
COMMAND = (sys.executable, "-c", "from farplug.cli.script import main; main()")
SECRET = "pass word 1!"
MIB = 1 << 20


class Runner:
    """Runs ``farplug`` with sessions of its own."""

    def __init__(self, runtime: str) -> None:
        self.environment = {**os.environ, "XDG_RUNTIME_DIR": runtime, "XDG_STATE_HOME": runtime}

    async def start(self, *arguments: object) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *COMMAND,
            *map(str, arguments),
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    async def __call__(self, *arguments: object, stdin: bytes = b"") -> tuple[int | None, bytes, bytes]:
        process = await self.start(*arguments)
        try:
            async with asyncio.timeout(GUEST_TIMEOUT):
                out, err = await process.communicate(stdin)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        return process.returncode, out, err


@pytest.fixture(scope="module")
def runtime() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="farplug-") as folder:  # short: for sockets
        yield folder


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def guest(session_guests: Guests) -> AsyncIterator[QemuGuest]:
    """Return a guest whose screen asks for a name: agetty, login with PAM, bash, of the packages of this machine."""
    async with session_guests.lent(CONFIG) as guest:
        await guest.check("busybox loadfont", stdin=console_font())
        await guest.check(
            "mkdir -p /home/user; hash=$(openssl passwd -6 -stdin)\n"
            'sed -i "s|^root:.*|root:$hash:0:0:root:/home/user:/bin/bash|" /etc/passwd\n'
            "cat >/tmp/getty.sh <<'END'\nwhile :; do agetty tty1 linux; sleep 0.2; done\nEND\n"
            "setsid sh /tmp/getty.sh </dev/null >/dev/null 2>&1 &",
            stdin=SECRET.encode(),
        )
        yield guest


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def farplug(guest: QemuGuest, runtime: str) -> AsyncIterator[Runner]:
    """Return what runs commands, with a session ``vm`` in which a user has logged in."""
    runner = Runner(runtime)
    code, _, err = await runner("connect", guest.targets[0], "--detach", "--name", "vm")
    assert code == 0, err
    try:
        yield runner
    finally:
        await runner("stop", "-s", "vm")


@pytest.fixture
def login(tmp_path: Path) -> tuple[object, ...]:
    """Return the options of a login."""
    secret = tmp_path / "secret"
    secret.write_text(f"{SECRET}\n")
    return "--user", "root", "--secret-file", secret


async def test_from_a_login_that_is_found_on_the_screen(
    guest: QemuGuest, runtime: str, login: tuple[object, ...], tmp_path: Path
) -> None:
    run = Runner(runtime)
    vv, wrong = tmp_path / "vm.vv", tmp_path / "wrong"
    vv.write_text(guest.spice.vv)
    wrong.write_text("wrong")
    code, out, err = await run("run", vv, "--user", "root", "--secret-file", wrong, "-n", "--", "true")
    assert (code, out) == (123, b"")
    assert b"the VM refused the login of root" in err
    code, out, err = await run("run", vv, *login, "--via", "spice", "--", "sh", "-c", "uname; cat", stdin=b"input")
    assert (code, out) == (0, b"Linux\ninput"), err
    code, _, err = await run("type", "exit\n", vv, "--via", "spice")  # the next test logs in again
    assert code == 0, err


async def test_from_the_prompt_of_a_login(farplug: Runner, login: tuple[object, ...]) -> None:
    delay = ("--login-delay", 15)  # this target has no screen
    code, out, err = await farplug("run", "-s", "vm", *login, *delay, "-n", "--", "uname", "-a")
    assert (code, err) == (0, b"")
    assert out.startswith(b"Linux ")
    code, out, err = await farplug("run", "-s", "vm", "-n", "--", "id", "-u")
    assert (code, out, err) == (0, b"0\n", b""), "the prompt came back"


async def test_exit_codes_signals_and_outputs(farplug: Runner) -> None:
    for script, expected in (
        ("exit 3", (3, b"", b"")),
        ("printf end; printf err >&2; kill -TERM $$", (128 + signal.SIGTERM, b"end", b"err")),
        ("cat; printf .", (0, bytes(range(256)) + b".", b"")),
    ):
        assert await farplug("run", "-s", "vm", "--", "sh", "-c", script, stdin=bytes(range(256))) == expected
    data = random.Random(1).randbytes(MIB if LONG else MIB // 4)
    code, out, err = await farplug("run", "-s", "vm", "--", "sh", "-c", "tee /proc/self/fd/2", stdin=data)
    assert (code, out == data, err == data) == (0, True, True)
    code, out, err = await farplug("run", "-s", "vm", "-n", "--timeout", "1", "--", "sleep", "600")
    assert (code, out) == (124, b"")
    assert b"did not end within 1 s" in err


async def test_files(farplug: Runner, guest: QemuGuest, tmp_path: Path) -> None:
    data = random.Random(2).randbytes(10 * MIB if LONG else MIB // 2)
    path, back = tmp_path / "in.bin", tmp_path / "out.bin"
    path.write_bytes(data)
    path.chmod(0o640)
    assert await farplug("run", "-s", "vm", "--copy-in", f"{path}:/tmp/copied") == (0, b"", b"")
    assert hashlib.sha256(data).hexdigest() in await guest.check("sha256sum /tmp/copied; stat -c %a /tmp/copied")
    assert "640" in await guest.check("stat -c %a /tmp/copied")
    assert await farplug("run", "-s", "vm", "--copy-out", f"/tmp/copied:{back}") == (0, b"", b"")
    assert back.read_bytes() == data
    code, _, err = await farplug("run", "-s", "vm", "--copy-out", f"/tmp/missing:{back}")
    assert (code, b"missing" in err) == (125, True)
    assert back.read_bytes() == data


async def test_ctrl_c_and_a_command_that_is_killed(farplug: Runner, guest: QemuGuest) -> None:
    traps = "trap 'echo got it; exit 9' INT; trap 'echo hangup >/tmp/hangup; exit' HUP"
    script = f"{traps}; echo begun; while :; do sleep 0.1; done"
    process = await farplug.start("run", "-s", "vm", "-n", "--", "sh", "-c", script)
    assert process.stdout is not None
    async with asyncio.timeout(GUEST_TIMEOUT):
        assert await process.stdout.readline() == b"begun\n"
        process.send_signal(signal.SIGINT)
        out, err = await process.communicate()
    assert (process.returncode, out, err) == (9, b"got it\n", b"")
    process = await farplug.start("run", "-s", "vm", "-n", "--", "sh", "-c", script)
    assert process.stdout is not None
    async with asyncio.timeout(GUEST_TIMEOUT):
        assert await process.stdout.readline() == b"begun\n"
        process.kill()
        await process.communicate()
        while "hangup" not in await guest.check("cat /tmp/hangup 2>/dev/null; :"):
            await asyncio.sleep(0.2)
    assert await farplug("run", "-s", "vm", "-n", "--", "echo", "still there") == (0, b"still there\n", b"")
    _, status, _ = await farplug("status", "-s", "vm")
    assert b"shell" not in status, "nothing stays plugged in"


async def test_a_terminal(farplug: Runner) -> None:
    master, slave = os.openpty()
    process = await asyncio.create_subprocess_exec(
        *(*COMMAND, "run", "-s", "vm", "--shell"),
        env={**farplug.environment, "TERM": "vt220"},
        stdin=slave,
        stdout=slave,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    os.close(slave)
    shown = b""

    async def until(text: bytes) -> None:
        nonlocal shown
        while text not in shown:
            shown += await asyncio.to_thread(os.read, master, 4096)

    try:
        async with asyncio.timeout(GUEST_TIMEOUT):
            await until(b"# ")
            os.write(master, b"echo $TERM $((40+2)) $(tty </dev/tty)\r")
            await until(b"vt220 42 /dev/tty")
            os.write(master, b"echo begun; while read x; do echo $x$x; done\r")
            await until(b"\rbegun\r\n")  # a line for a shell that still edits its own has another end
            os.write(master, b"some text\r")
            await until(b"some textsome text\r\n")
            os.write(master, b"\x03")
            await until(b"^C\r\n")
            shown = shown.rpartition(b"^C")[2]
            await until(b"# ")
            os.write(master, b"exit 7\r")
            _, err = await process.communicate()
        assert (process.returncode, err) == (7, b""), shown
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(master)
    assert await farplug("run", "-s", "vm", "-n", "--", "echo", "prompt") == (0, b"prompt\n", b"")


async def test_no_shell_answers(farplug: Runner, guest: QemuGuest) -> None:
    assert (await farplug("type", "-s", "vm", "exec tail -f /dev/null\n"))[0] == 0
    try:
        code, out, err = await farplug("run", "-s", "vm", "-n", "--prompt-timeout", "1", "--", "true")
        assert (code, out) == (123, b"")
        assert b"no shell in the VM answered" in err
    finally:
        await guest.check("until kill $(pidof tail); do sleep 0.1; done")
