"""Sessions in the background, of a fake VM with several ports, for tests of the commands of sessions."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cli.support import Cli, FakeGuest, in_thread, wait_for
from tests.transport.fake_spice import Channel, FakeSpice, running

from farplug.control.names import folder


def nothing() -> None:
    """Do nothing when a device is configured."""


def fake_vm(ports: int = 2, make: Callable[[], FakeGuest] = lambda: FakeGuest(nothing), **options: Any) -> FakeSpice:
    """Return a SPICE server whose VM, "testvm", has this number of ports."""

    async def behave(channel: Channel) -> None:
        await make().behave(channel)

    channels = ((3, 0), *((9, number) for number in range(ports)))
    return FakeSpice(usbredir=behave, vmc_caps=0, channels=channels, **options)


@contextmanager
def vm(ports: int = 2, make: Callable[[], FakeGuest] = lambda: FakeGuest(nothing)) -> Iterator[str]:
    """Run a VM; return its target."""
    with in_thread(lambda: running(fake_vm(ports, make))) as port:
        yield f"spice://127.0.0.1:{port}"


@dataclass
class Session:
    """A session in the background."""

    cli: Cli
    name: str

    @property
    def status(self) -> dict[str, Any]:
        """Return what ``farplug status --json`` prints."""
        result = self.cli("status", "-s", self.name, "--json")
        assert (result.code, result.err) == (0, "")
        status: dict[str, Any] = json.loads(result.out)
        return status

    @property
    def devices(self) -> dict[str, str]:
        """Return the states of the devices, by their labels."""
        return {device["label"]: device["state"] for device in self.status["devices"]}

    @property
    def socket(self) -> Path:
        """Return the path of the control socket."""
        return folder() / f"{self.name}.sock"

    @property
    def log(self) -> str:
        """Return the text of the log."""
        return Path(os.environ["XDG_STATE_HOME"], "farplug", f"{self.name}.log").read_text()


@contextmanager
def background(cli: Cli, target: str, *options: object, name: str = "web1") -> Iterator[Session]:
    """Run a session in the background; stop it at the end, if it still runs."""
    result = cli("connect", target, "--detach", "--name", name, "--json", *options)
    assert (result.code, result.err) == (0, "")
    started = json.loads(result.out)
    assert started["name"] == name
    try:
        yield Session(cli, name)
    finally:
        try:
            os.kill(started["pid"], signal.SIGTERM)
        except ProcessLookupError:
            pass
        wait_for(lambda: not is_running(started["pid"]))


def is_running(pid: int) -> bool:
    """Return whether a process runs. A child of this process that has ended is waited for."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
