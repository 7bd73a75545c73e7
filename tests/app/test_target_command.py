"""The command that prints a ``.vv`` file for each attempt to connect."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import pytest

from farplug.app import target_command
from farplug.app.target_command import run_target_command
from farplug.errors import Reason, TargetError
from farplug.spice.vv import MAX_VV_FILE


async def test_its_output() -> None:
    assert await run_target_command("printf 'a\\nb'; echo warning >&2") == b"a\nb"
    assert await run_target_command("cat; echo '[virt-viewer]'") == b"[virt-viewer]\n", "it has no standard input"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("exit 3", "ended with exit code 3"),
        ("echo first >&2; echo 'no such VM' >&2; exit 1", "ended with exit code 1: no such VM"),
        ("kill -9 $$", "was ended by signal 9"),
        ("/no/such/program", "ended with exit code 127: .*not found"),
        ("true", "printed nothing"),
        ("echo; echo quota >&2", "printed nothing: quota"),
        ("cat /dev/zero", f"printed more than {MAX_VV_FILE} bytes"),
        ("cat /dev/zero >&2; true", "did not end within 0.2 s"),
        ("sleep 1000", "did not end within 0.2 s"),
        ("exec >&- 2>&-; sleep 1000", "did not end within 0.2 s"),
    ],
)
async def test_a_command_that_fails(command: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "0.2 s" in message:
        monkeypatch.setattr(target_command, "COMMAND_TIMEOUT", 0.2)
    with pytest.raises(TargetError, match=f"^the target command {message}") as caught:
        await run_target_command(command)
    assert caught.value.reason is Reason.TARGET_COMMAND
    assert caught.value.remedy


def state(pid: int) -> str:
    """Return the state of a process; empty: there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


@pytest.mark.parametrize("end", ["timeout", "cancelled", "succeeds"])
async def test_its_children_end_with_it(end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid_file = tmp_path / "pid"
    last = "echo x" if end == "succeeds" else "wait"
    command = f"sleep 1000 >/dev/null 2>&1 & echo $! > {pid_file}.part; mv {pid_file}.part {pid_file}; {last}"
    if end == "timeout":
        monkeypatch.setattr(target_command, "COMMAND_TIMEOUT", 1.0)
    running = asyncio.ensure_future(run_target_command(command))
    while not pid_file.exists():
        await asyncio.sleep(0.01)
    if end == "cancelled":
        running.cancel()
    with suppress(TargetError, asyncio.CancelledError):
        await running
    pid = int(pid_file.read_text())
    while state(pid) not in ("", "Z"):  # Z: killed, and its new parent has not waited for it yet
        await asyncio.sleep(0.01)
