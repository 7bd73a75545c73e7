"""The SPICE proxy kerbside between a test and a guest: the real proxy, with a control plane for tests."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
from tests.docs import ROOT
from tests.guest.plugging import GUEST_TIMEOUT
from tests.transport.fake_spice import free_port

from farplug.vm.certificates import write_certificates
from farplug.vm.qemu_config import LOOPBACK, SpiceAddress

PYTHON = ROOT / ".venv-kerbside/bin/python"
PROXY = PYTHON.with_name("kerbside-proxy")
DIES_WITH_THE_TEST = ("setpriv", "--pdeathsig", "KILL", "--")
"""The proxy would outlive a test process that is killed. The control plane ends with its standard input."""

TOKEN = "a-console-token-of-48-characters-as-kerbside-has"
SESSION = "the-session"


def require_kerbside() -> None:
    """Skip the test if kerbside is not installed. With FARPLUG_REQUIRE_ALL=1, fail."""
    if not PROXY.exists():
        reason = "kerbside is not installed in .venv-kerbside: scripts/setup dev"
        if os.environ.get("FARPLUG_REQUIRE_ALL") == "1":
            pytest.fail(reason)
        pytest.skip(reason)


class Kerbside:
    """The proxy and its control plane, as ``async with``. They listen on the loopback address.

    Attributes:
        port: the proxy's TLS port.
        plain_port: the proxy's plain port, on which it requires TLS.
        subject: the subject of its certificate.
        records: what the control plane recorded, in order.
    """

    def __init__(self) -> None:
        self.port, self.plain_port, self._metrics_port = free_port(), free_port(), free_port()
        self.subject = ""
        self.records: list[dict[str, Any]] = []
        self._recorded = asyncio.Event()
        self._folder = tempfile.TemporaryDirectory(prefix="kerbside-")  # a short path: it holds a UNIX socket
        self._control: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._proxy: asyncio.subprocess.Process | None = None

    @property
    def folder(self) -> Path:
        """Return the folder with certificates, ``.vv`` files and the proxy's log."""
        return Path(self._folder.name)

    async def __aenter__(self) -> Self:
        self.subject = write_certificates(self.folder, ("localhost", LOOPBACK))
        try:
            await self._start_control()
            await self.start_proxy()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            error.add_note(f"the log of kerbside-proxy ends:\n{self.log[-3000:]}")
        await self._stop()

    @property
    def log(self) -> str:
        """Return the proxy's log."""
        path = self.folder / "proxy.log"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def proxy_pid(self) -> int:
        """Return the process id of the proxy."""
        assert self._proxy is not None
        return self._proxy.pid

    async def start_proxy(self) -> None:
        """Start the proxy, and wait until it listens."""
        since = len(self.records)
        options = {
            "vdi-address": LOOPBACK,
            "secure-port": self.port,
            "insecure-port": self.plain_port,
            "prometheus-port": self._metrics_port,
            "cert": self.folder / "server-cert.pem",
            "cert-key": self.folder / "server-key.pem",
            "cacert": self.folder / "ca-cert.pem",
            "api-socket": self.folder / "control",
        }
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        with (self.folder / "proxy.log").open("ab") as log:
            self._proxy = await asyncio.create_subprocess_exec(
                *DIES_WITH_THE_TEST, PROXY, *words, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
            )
        await self.recorded(lambda record: record.get("call") == "ProxyControl", since)
        for port in (self.port, self.plain_port):
            await self._listens(port)

    async def kill_proxy(self) -> None:
        """Kill the proxy with SIGKILL."""
        assert self._proxy is not None
        if self._proxy.returncode is None:
            self._proxy.kill()
        await self._proxy.wait()

    async def stop_control(self) -> None:
        """End the control plane. The proxy still runs, and does not connect to a new control plane."""
        if self._control is not None:
            assert self._control.stdin is not None
            assert self._reader is not None
            self._control.stdin.close()
            await self._control.wait()
            await self._reader
            self._control = None

    async def allow(
        self, spice: SpiceAddress, *, host: str = LOOPBACK, token: str = TOKEN, session: str = SESSION
    ) -> Path:
        """Accept a token for a SPICE server, which needs a plain port. Return a ``.vv`` file; ``host``: the proxy."""
        target: dict[str, object] = {
            "hypervisor": LOOPBACK,
            "hypervisor_ip": LOOPBACK,
            "insecure_port": spice.port,
            "ticket": spice.ticket,
            "session_id": session,
        }
        if spice.ca_file is not None:
            target |= {"secure_port": spice.tls_port, "host_subject": spice.host_subject}
            target["ca_cert"] = spice.ca_file.read_text()
        await self.request("allow", token=token, target=target)
        return self.vv(host=host, token=token, name=f"{session}.vv")

    async def revoke(self, token: str = TOKEN) -> None:
        """Refuse a token from now on: its life is over."""
        await self.request("revoke", token=token)

    def vv(self, *, host: str = LOOPBACK, token: str = TOKEN, subject: str = "", name: str = "console.vv") -> Path:
        """Write a ``.vv`` file as kerbside's REST API returns it.

        Args:
            host: the proxy's address.
            token: the console token.
            subject: ``host-subject``; empty: that of the proxy's certificate.
            name: of the file.
        """
        ca = (self.folder / "ca-cert.pem").read_text().replace("\n", "\\n")
        path = self.folder / name
        path.write_text(
            f"[virt-viewer]\ntype=spice\nhost={host}\nport={self.plain_port}\ntls-port={self.port}\n"
            f"password={token}\nhost-subject={subject or self.subject}\nca={ca}\ndelete-this-file=0\n"
        )
        return path

    async def request(self, do: str, **fields: object) -> None:
        """Send a request to the control plane, and wait until it was executed."""
        assert self._control is not None
        assert self._control.stdin is not None
        since = len(self.records)
        self._control.stdin.write(json.dumps({"do": do, **fields}).encode() + b"\n")
        await self.recorded(lambda record: record.get("done") == do, since)

    def authorized(self, since: int = 0) -> list[tuple[list[object], bool]]:
        """Return the channels that the proxy asked for: type and number, and whether the token was accepted."""
        return [
            (record["channel"], record["accepted"])
            for record in self.records[since:]
            if record.get("call") == "AuthorizeConnection"
        ]

    async def recorded(self, condition: Callable[[dict[str, Any]], bool], since: int = 0) -> None:
        """Wait for a record of the control plane."""
        async with asyncio.timeout(GUEST_TIMEOUT):
            while not any(map(condition, self.records[since:])):
                assert self._reader is None or not self._reader.done(), "the control plane ended"
                self._recorded.clear()
                await self._recorded.wait()

    async def _start_control(self) -> None:
        self._control = await asyncio.create_subprocess_exec(
            *(PYTHON, "-P", Path(__file__).with_name("kerbside_control.py"), self.folder / "control"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        self._reader = asyncio.create_task(self._read(self._control))
        await self.recorded(lambda record: record.get("call") == "Listening")

    async def _read(self, control: asyncio.subprocess.Process) -> None:
        assert control.stdout is not None
        try:
            async for line in control.stdout:
                self.records.append(json.loads(line))
                self._recorded.set()
        finally:
            self._recorded.set()

    async def _listens(self, port: int) -> None:
        async with asyncio.timeout(GUEST_TIMEOUT):
            while True:
                assert self._proxy is not None
                assert self._proxy.returncode is None, self.log[-3000:]
                try:
                    _, writer = await asyncio.open_connection(LOOPBACK, port)
                except OSError:
                    await asyncio.sleep(0.01)
                else:
                    writer.close()
                    await writer.wait_closed()
                    return

    async def _stop(self) -> None:
        if self._proxy is not None:
            await self.kill_proxy()
        await self.stop_control()
        self._folder.cleanup()
