"""Where the page listens, and TLS."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.leaks import comes
from tests.web.support import Served
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Origin

from farplug.errors import FarplugError, Reason, SetupError, UsageError
from farplug.exit_codes import ExitCode, exit_code
from farplug.vm.certificates import write_certificates
from farplug.web import server
from farplug.web.server import Page, PageSettings


async def refused(environment: dict[str, str], **settings: Any) -> FarplugError:
    with pytest.raises(FarplugError) as caught:
        async with Page.serve(PageSettings(**settings), environment):
            pass
    assert caught.value.message
    assert caught.value.remedy
    return caught.value


async def test_a_port_that_is_in_use(environment: dict[str, str]) -> None:
    async with Served.serve(environment) as served:
        error = await refused(environment, port=served.port)
    assert isinstance(error, SetupError)
    assert (error.reason, exit_code(error)) == (Reason.IN_USE, ExitCode.SETUP)
    assert (error.remedy.setting, error.remedy.value) == ("port", 0)
    async with Served.serve(environment, port=served.port) as again:  # it is free at once
        assert again.port == served.port


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "", "192.0.2.1"])
async def test_other_machines_need_tls(environment: dict[str, str], address: str) -> None:
    error = await refused(environment, address=address)
    assert (error.reason, exit_code(error)) == (Reason.NEEDS_TLS, ExitCode.TLS)
    assert error.remedy.command.startswith("ssh -L ")


@pytest.mark.parametrize("address", ["none.invalid", "x" * 300, "a\0b"])
async def test_an_address_that_does_not_exist(environment: dict[str, str], address: str) -> None:
    error = await refused(environment, address=address)
    assert (error.reason, exit_code(error)) == (Reason.UNRESOLVABLE, ExitCode.USAGE)


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
@pytest.mark.parametrize("address", ["localhost", "::1", "[::1]", "127.0.0.2"])
async def test_other_addresses_of_this_machine(environment: dict[str, str], address: str) -> None:
    async with Page.serve(PageSettings(address=address), environment) as page:
        host = f"[{address}]" if address == "::1" else address
        assert page.url.startswith(f"http://{host}:{page.port}/#token=")
        reader, writer = await asyncio.open_connection(address.strip("[]"), page.port)
        writer.write(f"GET /x HTTP/1.1\r\nHost: {host}:{page.port}\r\nConnection: close\r\n\r\n".encode())
        assert (await reader.read()).startswith(b"HTTP/1.1 404")
        writer.close()


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """A folder with certificates of an authority and of this machine, under another name."""
    folder = tmp_path / "tls"
    folder.mkdir()
    write_certificates(folder, ["vm.example", "127.0.0.1"])
    return folder


def tls(folder: Path) -> dict[str, Any]:
    return {"certificate": str(folder / "server-cert.pem"), "key": str(folder / "server-key.pem")}


async def test_the_page_over_tls(environment: dict[str, str], certificates: Path) -> None:
    trusting = ssl.create_default_context(cafile=certificates / "ca-cert.pem")
    async with Page.serve(PageSettings(address="0.0.0.0", **tls(certificates)), environment) as page:
        assert page.url.startswith(f"https://vm.example:{page.port}/#token=")
        for origin, host in (("https://127.0.0.1", "127.0.0.1"), ("https://vm.example", "vm.example")):
            uri = f"wss://{host}:{page.port}/ws"
            own = Origin(f"{origin}:{page.port}")
            async with connect(uri, ssl=trusting, origin=own, host="127.0.0.1", proxy=None) as websocket:
                token = page.tokens.full
                await websocket.send(
                    f'{{"id": 1, "method": "hello", "params": {{"protocol_version": "1.1", "token": "{token}"}}}}'
                )
                assert '"ok": true' in str(await websocket.recv())
                assert not websocket.protocol.extensions
        evil = Origin(f"https://evil.example:{page.port}")
        with pytest.raises(InvalidStatus):
            async with connect(uri, ssl=trusting, origin=evil, host="127.0.0.1", proxy=None):
                pass
        with pytest.raises(ssl.SSLCertVerificationError):
            await asyncio.open_connection("127.0.0.1", page.port, ssl=ssl.create_default_context())


async def test_a_client_without_tls_on_a_port_with_tls(environment: dict[str, str], certificates: Path) -> None:
    async with Page.serve(PageSettings(**tls(certificates)), environment) as page:
        reader, writer = await asyncio.open_connection("127.0.0.1", page.port)
        writer.write(f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{page.port}\r\n\r\n".encode())
        assert b"HTTP" not in await reader.read()
        writer.close()
        trusting = ssl.create_default_context(cafile=certificates / "ca-cert.pem")
        reader, writer = await asyncio.open_connection("127.0.0.1", page.port, ssl=trusting)
        writer.write(f"GET /x HTTP/1.1\r\nHost: 127.0.0.1:{page.port}\r\nConnection: close\r\n\r\n".encode())
        assert (await reader.read()).startswith(b"HTTP/1.1 404")
        writer.close()


async def test_tls_files_that_are_wrong(environment: dict[str, str], certificates: Path, tmp_path: Path) -> None:
    good = tls(certificates)
    text = tmp_path / "text.pem"
    text.write_text("nonsense")
    encrypted = tmp_path / "encrypted.pem"
    command = ["openssl", "pkey", "-aes256", "-passout", "pass:secret", "-in", good["key"], "-out", str(encrypted)]
    subprocess.run(command, check=True, capture_output=True)
    other = tmp_path / "other"
    other.mkdir()
    write_certificates(other, ["vm.example"])
    for wrong in (
        {"certificate": good["certificate"], "key": None},
        {"certificate": None, "key": good["key"]},
        {**good, "key": str(tmp_path / "none")},
        {**good, "certificate": str(tmp_path)},
        {**good, "key": str(text)},
        {**good, "certificate": str(text)},
        {**good, "key": str(other / "server-key.pem")},
        {"certificate": good["key"], "key": good["certificate"]},
        {**good, "key": str(encrypted)},
    ):
        error = await refused(environment, **wrong)
        assert isinstance(error, UsageError)
        assert exit_code(error) is ExitCode.USAGE
    assert "is encrypted" in error.message


async def test_a_web_root_that_does_not_exist(environment: dict[str, str], tmp_path: Path) -> None:
    error = await refused(environment, web_root=str(tmp_path / "none"))
    assert (error.reason, exit_code(error)) == (Reason.NOT_FOUND, ExitCode.USAGE)


async def test_a_user_without_a_name(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs with any number of a user."""

    def unknown() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr("getpass.getuser", unknown)
    async with Served.serve(environment) as served, served.websocket() as browser:
        hello = {"protocol_version": "1.1", "token": served.page.tokens.full}
        assert (await browser.call("hello", hello))["user"] == str(os.geteuid())


async def test_a_user_without_a_home(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    del environment["XDG_CACHE_HOME"]
    error = await refused(environment)
    assert (error.reason, exit_code(error)) == (Reason.NOT_FOUND, ExitCode.SETUP)


async def test_nothing_is_left(environment: dict[str, str]) -> None:
    before = asyncio.all_tasks()
    async with Page.serve(PageSettings(), environment) as page:
        private = page.private
        assert private.stat().st_mode & 0o777 == 0o700
    assert not private.exists()
    await comes(lambda: asyncio.all_tasks() <= before)
    assert list(Path(environment["XDG_CACHE_HOME"], "farplug").iterdir()) == []


def test_other_commands_do_not_import_a_web_server() -> None:
    code = (
        "import sys, farplug.cli.main, farplug.cli.session, farplug.cli.session_verbs, farplug.control.server;"
        "print([name for name in ('starlette', 'uvicorn', 'websockets', 'farplug.web') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


async def test_connections_without_a_request(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "REQUEST_TIMEOUT", 0.1)
    async with Served.serve(environment) as served:
        half = served.request("GET", "/x")[:20]
        whole = served.request("GET", "/x", {"Connection": "keep-alive"})
        for data in (b"", half, whole + half):
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            writer.write(data)
            answer = await _all(reader)
            assert answer.count(b"HTTP/1.1 404") == data.count(whole)
            writer.close()
        async with served.browser() as browser:  # a websocket stays
            await asyncio.sleep(0.3)
            assert await browser.call("sessions") == []


async def test_an_upload_takes_longer_than_a_request(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "REQUEST_TIMEOUT", 0.1)
    async with Served.serve(environment) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        head = served.request("PUT", "/media/a", {"Content-Length": "4"}, token=served.page.tokens.full)
        writer.write(head)
        for byte in b"abcd":
            await asyncio.sleep(0.1)
            writer.write(bytes([byte]))
        assert b'"complete":true' in await _all(reader)
        writer.close()


async def test_too_many_connections(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 5)
    async with Served.serve(environment) as served:
        opened = [await asyncio.open_connection("127.0.0.1", served.port) for _ in range(5)]
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(served.request("GET", "/x"))
        assert await _all(reader) == b""
        for _, one in [*opened, (reader, writer)]:
            one.close()
        while True:
            try:
                if (await served.http("GET", "/x")).status == 404:
                    break
            except ConnectionError:
                pass


async def _all(reader: asyncio.StreamReader) -> bytes:
    """Return what comes until the connection is closed, in whatever way."""
    received = b""
    with suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            received += data
    return received


async def test_tls_handshakes_count_as_connections(
    environment: dict[str, str], certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 5)
    trusting = ssl.create_default_context(cafile=certificates / "ca-cert.pem")
    async with asyncio.timeout(60), Page.serve(PageSettings(**tls(certificates)), environment) as page:
        whole = await asyncio.open_connection("127.0.0.1", page.port, ssl=trusting)
        half = [await _half_open(page.port) for _ in range(4)]
        reader, writer = await asyncio.open_connection("127.0.0.1", page.port)
        assert await _all(reader) == b""
        assert not any(reader.at_eof() for reader, _ in half)
        for _, one in [*half, (reader, writer)]:
            one.close()
        while True:
            with suppress(OSError):
                again = await asyncio.open_connection("127.0.0.1", page.port, ssl=trusting)
                break
        for reader, writer in (whole, again):
            writer.write(f"GET /x HTTP/1.1\r\nHost: 127.0.0.1:{page.port}\r\nConnection: close\r\n\r\n".encode())
            assert (await reader.read()).startswith(b"HTTP/1.1 404")
            writer.close()


async def test_a_tls_handshake_that_is_not_completed(
    environment: dict[str, str], certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "HANDSHAKE_TIMEOUT", 0.1)
    async with asyncio.timeout(100), Page.serve(PageSettings(**tls(certificates)), environment) as page:
        reader, writer = await _half_open(page.port)
        assert await _all(reader) == b""
        writer.close()


async def _half_open(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect, and begin a TLS handshake."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"\x16\x03\x01\x02\x00\x01")
    return reader, writer


async def test_the_page_ends_during_a_tls_handshake(environment: dict[str, str], certificates: Path) -> None:
    before = asyncio.all_tasks()
    async with asyncio.timeout(60):
        async with Page.serve(PageSettings(**tls(certificates)), environment) as page:
            reader, writer = await _half_open(page.port)
            with pytest.raises(ssl.SSLCertVerificationError):  # by then, the server has accepted both
                await asyncio.open_connection("127.0.0.1", page.port, ssl=ssl.create_default_context())
        assert await _all(reader) == b""
        writer.close()
    await comes(lambda: asyncio.all_tasks() <= before)
