"""The example locustfile under the real Locust: a master and two workers, each with a load agent.

The VMs are guests in memory behind real SPICE links; most tests reach them through the real SPICE proxy kerbside.
"""

from __future__ import annotations

import asyncio
import csv
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

from tests.docs import ROOT
from tests.guest.kerbside import Kerbside, require_kerbside
from tests.load.vms import serving, target
from tests.transport.fake_spice import free_port

from farplug.vm.qemu_config import SpiceAddress

SESSIONS = int(os.environ.get("FARPLUG_LOAD_SESSIONS", "30"))
USERS = SESSIONS // 5
TIMEOUT = 240
LOCUST = (sys.executable, "-m", "locust", "-f", str(ROOT / "examples/locustfile.py"), "--headless", "--only-summary")
REQUESTS = {
    *(("session", name) for name in ("connect", "attach", "read 1 MiB", "write 1 MiB", "detach", "close")),
    *(("stage", name) for name in ("link", "hello")),
}


class Run:
    """A run of Locust.

    Attributes:
        process: its master.
        output: all lines so far, of master and workers.
    """

    def __init__(self, process: asyncio.subprocess.Process, folder: Path) -> None:
        self.process = process
        self.output = ""
        self._folder = folder

    async def until(self, text: str) -> None:
        """Wait for a text in the output."""
        assert self.process.stdout is not None
        async with asyncio.timeout(TIMEOUT):
            while text not in self.output:
                line = await self.process.stdout.readline()
                assert line, self.output
                self.output += line.decode()

    async def end(self) -> int:
        """Wait for the end; return the exit code."""
        async with asyncio.timeout(TIMEOUT):
            self.output += (await self.process.communicate())[0].decode()
        assert self.process.returncode is not None
        return self.process.returncode

    def _rows(self, kind: str) -> list[dict[str, str]]:
        with (self._folder / f"run_{kind}.csv").open(newline="") as file:
            return [*csv.DictReader(file)]

    @property
    def counts(self) -> dict[tuple[str, str], int]:
        """Return how often each request succeeded."""
        return {
            (row["Type"], row["Name"]): int(row["Request Count"]) - int(row["Failure Count"])
            for row in self._rows("stats")
            if row["Name"] != "Aggregated"
        }

    @property
    def failures(self) -> list[tuple[str, str, int]]:
        """Return the failures as Locust groups them: the request, the error, how often."""
        return [(row["Name"], row["Error"], int(row["Occurrences"])) for row in self._rows("failures")]


@asynccontextmanager
async def locust(
    folder: Path, targets: Iterable[str | Path], *options: object, sessions: int, reads: int = 1
) -> AsyncIterator[Run]:
    """Run the example, with two workers."""
    listed = folder / "targets"
    listed.write_text("".join(f"{one}\n" for one in targets))
    port = free_port()  # not Locust's usual one, which another run on this machine may have
    words = [
        "--processes",
        "2",
        "--master-bind-port",
        port,
        "--master-port",
        port,
        "--csv",
        folder / "run",
        "--farplug-targets",
        listed,
        "--farplug-sessions",
        sessions,
    ]
    process = await asyncio.create_subprocess_exec(
        *LOCUST,
        *map(str, [*words, *options]),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "READS": str(reads)},
        start_new_session=True,
    )
    try:
        yield Run(process, folder)
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


async def consoles(kerbside: Kerbside, port: int, count: int) -> list[Path]:
    """Return the ``.vv`` files of VMs behind the proxy, each with its own token."""
    return [
        await kerbside.allow(SpiceAddress(port=port), token=f"token-of-{number}", session=f"session-{number}")
        for number in range(count)
    ]


async def test_many_sessions_through_kerbside(tmp_path: Path) -> None:
    require_kerbside()
    async with serving() as port, Kerbside() as kerbside:
        targets = await consoles(kerbside, port, SESSIONS)
        async with locust(tmp_path, targets, "-u", USERS, "-r", USERS, sessions=SESSIONS) as run:
            assert await run.end() == 0, run.output
        assert run.failures == []
        assert run.counts == dict.fromkeys(REQUESTS, SESSIONS)
        assert len(re.findall(r"load agent \d+: [1-9]\d* sessions", run.output)) == 2, "both workers take part"
        channels = [tuple(channel) for channel, accepted in kerbside.authorized() if accepted]
        assert channels.count(("main", 0)) == channels.count(("usbredir", 0)) == SESSIONS


async def test_tokens_that_run_out_in_the_middle_of_a_ramp(tmp_path: Path) -> None:
    require_kerbside()
    async with serving() as port, Kerbside() as kerbside:
        targets = await consoles(kerbside, port, 10)
        # Two users take the targets in their order. These tokens are over before their turn, however fast users are.
        for number in (6, 7, 8):
            await kerbside.revoke(f"token-of-{number}")
        async with locust(tmp_path, targets, "-u", 2, "-r", 2, sessions=10) as run:
            assert await run.end() == 1
    assert run.counts == dict.fromkeys(REQUESTS, 7)
    ((name, error, count),) = run.failures
    assert (name, count) == ("connect", 3)
    assert error == "wrong-password: the password is wrong or has expired: link error 7 (PERMISSION_DENIED)"
    assert len(re.findall(r"WARNING.*connect: the password is wrong or has expired.* \(.+\)", run.output)) == 3


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def gone(pid: int) -> None:
    async with asyncio.timeout(60):
        while Path(f"/proc/{pid}").exists() and "(zombie)" not in Path(f"/proc/{pid}/status").read_text():
            await asyncio.sleep(0.05)


async def begun(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.05)


async def test_an_agent_and_a_worker_that_die(tmp_path: Path) -> None:
    """Kill the agent of 4 users, who go on with another one; then the worker of the other 4."""
    async with serving(pause=5) as port:
        targets = [target(number, port) for number in range(8)]
        async with locust(tmp_path, targets, "-u", 8, "-r", 8, sessions=16, reads=2) as run:
            # Each session lasts until the second burst of its guest: it is open for 5 s.
            await begun(lambda: len([one for worker in children(run.process.pid) for one in children(worker)]) == 2)
            first, second = children(run.process.pid)
            (agent,), (other,) = children(first), children(second)
            await begun(lambda: len(os.listdir(f"/proc/{agent}/fd")) > 10 and len(os.listdir(f"/proc/{other}/fd")) > 10)
            os.kill(agent, signal.SIGKILL)
            await run.until("the load agent ended with signal SIGKILL")
            os.kill(second, signal.SIGKILL)
            await gone(other)
            await run.until("has died, are free again")
            await begun(lambda: children(first) not in ([], [agent]))
            assert await run.end() == 1, run.output
    assert run.failures
    assert {error for _, error, _ in run.failures} == {
        "session-gone: the load agent ended with signal SIGKILL, and all its sessions"
    }
    assert run.counts["session", "close"] >= 4


def refused(*options: object, code: str = "") -> tuple[int, str]:
    """Return the exit code and the output of a run without workers that cannot begin."""
    command = [sys.executable, "-c", code] if code else [*LOCUST, "-u", "1", *map(str, options)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    return run.returncode, run.stdout + run.stderr


def test_targets_that_cannot_be_used(tmp_path: Path) -> None:
    empty = tmp_path / "targets"
    empty.write_text("# none\n")
    code, output = refused("--farplug-targets", empty)
    assert code == 2
    assert "the list of targets is empty (write one target a line" in output
    code, output = refused()
    assert code == 2
    assert "a load test needs a list of targets (name a file with one target a line" in output


HIDDEN = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name == "locust":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
from farplug.errors import FarplugError
try:
    import farplug.load.user
except FarplugError as error:
    print(error.reason, error, error.remedy, error.remedy.command)
"""


def test_locust_is_not_installed() -> None:
    _, output = refused(code=HIDDEN)
    assert output == (
        "missing-program load tests need the Python package locust, which is not installed install it: "
        "pip install 'farplug[load]'\n"
    )


def test_the_user_outside_of_locust() -> None:
    _, output = refused(code=HIDDEN.replace("sys.meta_path", "[]"))
    assert output.startswith("wrong-state farplug.load.user is for locustfiles")
