"""The whole of kerbside in front of a guest: its database, its daemon with the SPICE proxy, its REST interface."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.guest.kerbside import DIES_WITH_THE_TEST, PYTHON
from tests.guest.plugging import GUEST_TIMEOUT
from tests.transport.fake_spice import free_port

from farplug.vm.certificates import write_certificates
from farplug.vm.qemu_config import LOOPBACK, SpiceAddress

SOURCE = "local"
CONSOLE = "5f3d5a1e-0c5b-4a6e-9d2c-3a7d1f0e9b11"
"""UUID of the guest's console in kerbside."""

TOKEN_MINUTES = 1
"""Life of a console token: kerbside's default, and the shortest that it accepts."""

MARIADB = shutil.which("mariadbd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
INSTALL_DB = shutil.which("mariadb-install-db")


def missing() -> str:
    """Return what is missing on this machine; empty if nothing."""
    if not PYTHON.with_name("gunicorn").exists():
        return "the whole of kerbside is not installed in .venv-kerbside: scripts/setup kerbside"
    if MARIADB is None or INSTALL_DB is None:
        return "MariaDB is not installed: scripts/setup kerbside"
    return ""


@dataclass(frozen=True)
class Service:
    """The running service.

    Attributes:
        url: the address of its REST interface.
        jwt: a token for it.
    """

    url: str
    jwt: str

    async def console(self, folder: Path) -> Path:
        """Write the ``.vv`` file of a new session with the guest, as a user downloads it; return its path."""
        path = folder / "console.vv"
        path.write_bytes(await self._request("GET", f"/console/proxy/{SOURCE}/{CONSOLE}/console.vv"))
        return path

    async def terminate(self) -> None:
        """End all sessions with the guest."""
        await self._request("POST", f"/console/{SOURCE}/{CONSOLE}/terminate")

    async def is_ready(self) -> bool:
        """Return whether the console is known: the daemon has read its sources."""
        try:
            await self._request("GET", f"/console/{SOURCE}/{CONSOLE}")
        except (OSError, urllib.error.HTTPError):
            return False
        return True

    async def _request(self, method: str, path: str) -> bytes:
        headers = {"Authorization": f"Bearer {self.jwt}", "Accept": "application/json"}
        request = urllib.request.Request(self.url + path, headers=headers, method=method)

        def read() -> bytes:
            with urllib.request.urlopen(request, timeout=GUEST_TIMEOUT) as answer:
                return bytes(answer.read())

        return await asyncio.to_thread(read)


@asynccontextmanager
async def service(spice: SpiceAddress) -> AsyncIterator[Service]:
    """Run kerbside in front of a guest's SPICE server, with TLS on both sides if the server has it."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kerbside-")))
        sql = await stack.enter_async_context(_database(folder))
        subject = write_certificates(folder, ("localhost", LOOPBACK))
        (folder / "sources.yaml").write_text(_sources(spice))
        secure, plain, metrics, rest = (free_port() for _ in range(4))
        settings = {
            "SQL_URL": f"mysql+pymysql://kerbside:secret@{LOOPBACK}:{sql}/kerbside",
            "AUTH_SECRET_SEED": "a seed of more than 32 characters for the tests",
            "LOG_OUTPUT_PATH": "stdout",
            "SOURCES_PATH": folder / "sources.yaml",
            "CACERT_PATH": folder / "ca-cert.pem",
            "PROXY_HOST_CERT_PATH": folder / "server-cert.pem",
            "PROXY_HOST_CERT_KEY_PATH": folder / "server-key.pem",
            "PROXY_HOST_SUBJECT": subject,
            "PUBLIC_FQDN": LOOPBACK,
            "VDI_ADDRESS": LOOPBACK,
            "PUBLIC_SECURE_PORT": secure,
            "VDI_SECURE_PORT": secure,
            "PUBLIC_INSECURE_PORT": plain,
            "VDI_INSECURE_PORT": plain,
            "PROMETHEUS_METRICS_PORT": metrics,
            "API_SOCKET_PATH": folder / "api",
            "CONSOLE_TOKEN_DURATION": TOKEN_MINUTES,
        }
        env = {f"KERBSIDE_{name}": str(value) for name, value in settings.items()}
        env["PATH"] = f"{PYTHON.parent}:{os.environ['PATH']}"
        kerbside = PYTHON.with_name("kerbside")
        await _run(folder, kerbside, "db", "upgrade", env=env)
        await stack.enter_async_context(_running(folder, "daemon", kerbside, "daemon", "run", env=env))
        web = (PYTHON.with_name("gunicorn"), "--bind", f"{LOOPBACK}:{rest}", "kerbside.api:app")
        await stack.enter_async_context(_running(folder, "gunicorn", *web, env=env))
        jwt = folder / "jwt"
        await _run(
            folder, kerbside, "demo", "token", "--subject", "test", "--duration", "600", "--output", jwt, env=env
        )
        service = Service(f"http://{LOOPBACK}:{rest}", jwt.read_text().strip())
        async with asyncio.timeout(GUEST_TIMEOUT):
            while not (await service.is_ready() and await _listens(secure)):
                await asyncio.sleep(0.05)
        try:
            yield service
        except BaseException as error:
            for log in sorted(folder.glob("*.log")):
                error.add_note(f"{log.name} ends:\n{log.read_text(errors='replace')[-3000:]}")
            raise


def _sources(spice: SpiceAddress) -> str:
    """Return kerbside's list of consoles: only the guest."""
    console = f"uuid: {CONSOLE}, name: guest, hypervisor: {LOOPBACK}, hypervisor_ip: {LOOPBACK}, ticket: {spice.ticket}"
    console += f", insecure_port: {spice.port}"
    ca = ""
    if spice.ca_file is not None:
        console += f", secure_port: {spice.tls_port}, host_subject: '{spice.host_subject}'"
        ca = "  ca_cert: |\n" + "".join(f"    {line}\n" for line in spice.ca_file.read_text().splitlines())
    return f"- source: {SOURCE}\n  type: static\n{ca}  consoles:\n    - {{{console}}}\n"


@asynccontextmanager
async def _database(folder: Path) -> AsyncIterator[int]:
    """Run MariaDB with a database of its own; return its port."""
    port, data = free_port(), folder / "sql"
    user = ["--user=root"] if os.getuid() == 0 else []
    assert INSTALL_DB is not None
    install = (INSTALL_DB, "--no-defaults", f"--datadir={data}", "--skip-test-db", *user)
    await _run(folder, *install, "--auth-root-authentication-method=normal", env=dict(os.environ))
    statements = folder / "init.sql"  # one statement a line
    statements.write_text(
        "CREATE DATABASE kerbside;\n"
        f"CREATE USER kerbside@'{LOOPBACK}' IDENTIFIED BY 'secret';\n"
        f"GRANT ALL ON kerbside.* TO kerbside@'{LOOPBACK}';\n"
    )
    options = {
        "datadir": data,
        "init-file": statements,
        "bind-address": LOOPBACK,
        "port": port,
        "socket": folder / "sql.socket",
        "pid-file": folder / "sql.pid",
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    server = (MARIADB, "--no-defaults", "--skip-name-resolve", *words, *user)
    async with _running(folder, "mariadbd", *server, env=dict(os.environ)):
        async with asyncio.timeout(GUEST_TIMEOUT):
            while not await _listens(port):
                await asyncio.sleep(0.05)
        yield port


@asynccontextmanager
async def _running(folder: Path, name: str, *command: object, env: dict[str, str]) -> AsyncIterator[None]:
    """Run a program, with its output in ``NAME.log``; end it."""
    with (folder / f"{name}.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *DIES_WITH_THE_TEST, *map(str, command), stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, env=env
        )
    try:
        yield
    finally:
        if process.returncode is None:
            process.terminate()
        try:
            async with asyncio.timeout(15):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def _run(folder: Path, *command: object, env: dict[str, str]) -> None:
    """Run a program to its end. It must succeed."""
    process = await asyncio.create_subprocess_exec(
        *map(str, command),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=folder,
        env=env,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode(errors="replace")[-3000:]


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(LOOPBACK, port)
    except OSError:
        return False
    writer.close()
    await writer.wait_closed()
    return True
