from __future__ import annotations

import asyncio
import base64
import contextlib

import pytest

from farplug.errors import Reason, TargetError, UsageError
from farplug.transport.connection import TcpAddress, dial
from farplug.transport.proxy import MAX_REPLY, HttpProxy, open_tunnel


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://pve.example.org:3128", HttpProxy(TcpAddress("pve.example.org", 3128))),
        ("http://pve.example.org:8080/", HttpProxy(TcpAddress("pve.example.org", 8080))),
        ("http://pve", HttpProxy(TcpAddress("pve", 3128))),
        ("pve:81", HttpProxy(TcpAddress("pve", 81))),
        ("http://[::1]:81", HttpProxy(TcpAddress("::1", 81))),
        ("http://[::1]/", HttpProxy(TcpAddress("::1", 3128))),
        ("HTTP://[fe80::1%25eth0]:81", HttpProxy(TcpAddress("fe80::1%eth0", 81))),
        ("http://fe80::1%eth0:81", HttpProxy(TcpAddress("fe80::1%eth0", 81))),
        ("2001:db8::beef", HttpProxy(TcpAddress("2001:db8::beef", 3128))),
        ("me:p@1:2:3:4:5:6:7:8:81", HttpProxy(TcpAddress("1:2:3:4:5:6:7:8", 81), "me:p")),
        ("http://me:p%40ss@pve", HttpProxy(TcpAddress("pve", 3128), "me:p@ss")),
        ("http://me@pve", HttpProxy(TcpAddress("pve", 3128), "me:")),
        ("http://me:%ff\udcfe@pve", HttpProxy(TcpAddress("pve", 3128), "me:\udcff\udcfe")),
    ],
)
def test_parse(url: str, expected: HttpProxy) -> None:
    assert HttpProxy.parse(url) == expected


@pytest.mark.parametrize(
    ("url", "expected_text"),
    [
        ("", "it has no host"),
        ("http://", "it has no host"),
        ("http://:3128", "it has no host"),
        ("://pve", "it has no scheme"),
        ("me:hush@pve://x", "it has no scheme"),
        ("https://pve:3128", "https proxies are not supported, only http"),
        ("socks5://pve", "socks5 proxies are not supported"),
        ("http://pve:x", "a port is a number from 1 to 65535"),
        ("http://pve:70000", "a port is a number from 1 to 65535"),
        ("http://pve:0", "a port is a number from 1 to 65535"),
        ("http://[::1", "the brackets around its host are malformed"),
        ("http://[pve]:3128", "its host in brackets is not an IPv6 address"),
        ("http://2001:db8::5:3128", "its IPv6 address needs brackets"),
        ("http://a b", "a space or a control character"),
        ("http://a/b", "nothing may follow the port"),
        ("http://a/b@c", "nothing may follow the port"),
        ("http://pve:3128?token=hush", "nothing may follow the port"),
    ],
)
def test_malformed(url: str, expected_text: str) -> None:
    with pytest.raises(UsageError) as caught:
        HttpProxy.parse(url)
    assert expected_text in caught.value.message
    assert "hush" not in caught.value.message
    assert caught.value.reason is Reason.BAD_TARGET
    assert caught.value.remedy


def test_no_credentials_in_messages() -> None:
    with pytest.raises(UsageError) as caught:
        HttpProxy.parse("http://me:hush@pve:x")
    assert "hush" not in str(caught.value) + caught.value.remedy
    assert "hush" not in repr(HttpProxy.parse("http://me:hush@pve"))


def test_connect_request() -> None:
    proxy = HttpProxy(TcpAddress("pve", 3128))
    ticket = TcpAddress("pvespiceproxy:6567A3D8:100:pve::5ba2e0c0", 61000)
    assert proxy.connect_request(ticket) == (
        b"CONNECT pvespiceproxy:6567A3D8:100:pve::5ba2e0c0:61000 HTTP/1.1\r\n"
        b"Host: pvespiceproxy:6567A3D8:100:pve::5ba2e0c0:61000\r\n\r\n"
    )
    assert proxy.connect_request(TcpAddress("::1", 1)).startswith(b"CONNECT [::1]:1 HTTP/1.1\r\n")
    with_password = HttpProxy(TcpAddress("pve", 3128), "me:p@ss").connect_request(TcpAddress("a", 1))
    assert b"\r\nProxy-Authorization: Basic " + base64.b64encode(b"me:p@ss") + b"\r\n\r\n" in with_password
    not_utf8 = HttpProxy(TcpAddress("pve", 3128), "me:\udcff").connect_request(TcpAddress("a", 1))
    assert base64.b64encode(b"me:\xff") in not_utf8


@pytest.mark.parametrize("host", ["a\r\nX: y", "a b", "a\tb", "ü", "a\0"])
def test_hosts_that_are_not_valid_in_a_request(host: str) -> None:
    with pytest.raises(UsageError, match="are not valid in a request"):
        HttpProxy(TcpAddress("pve", 3128)).connect_request(TcpAddress(host, 1))


async def tunnel(answer: bytes, *, timeout: float = 5, step: int = 10**9, leave: bool = True) -> bytes:
    """Open a tunnel through a proxy with this reply. Returns the data from the tunnel."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError):
            await reader.readuntil(b"\r\n\r\n")
            for at in range(0, len(answer), step):
                writer.write(answer[at : at + step])
                await asyncio.sleep(0)
            if not leave:
                writer.write(b"echo " + await reader.read(100))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    address = TcpAddress("127.0.0.1", server.sockets[0].getsockname()[1])
    sock = await dial(address, 5)
    loop = asyncio.get_running_loop()
    try:
        await open_tunnel(sock, HttpProxy(address), TcpAddress("vmhost", 5900), timeout)
        await loop.sock_sendall(sock, b"hello")
        return await loop.sock_recv(sock, 100)
    finally:
        sock.close()
        server.close()


@pytest.mark.parametrize("step", [1, 10**9])
@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.0 200\nVia: x\n\n", b"HTTP/1.1 204 ok\r\nX: " + b"y" * 4000 + b"\r\n\r\n"],
)
async def test_tunnel(answer: bytes, step: int) -> None:
    assert await tunnel(answer, step=step, leave=False) == b"echo hello"


@pytest.mark.parametrize(
    ("answer", "expected_text"),
    [
        (b"HTTP/1.1 403 Forbidden\r\n\r\n", "it refused the tunnel: HTTP/1.1 403 Forbidden"),
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "it requires a password"),
        (b"HTTP/1.1 30\r\n\r\n", "malformed"),
        (b"HTTP/1.1 40\x1b[31m\r\n\r\n", r"malformed: HTTP/1.1 40.\[31m"),
        (b"REDQ nonsense", "its reply is not HTTP"),
        (b"HTTP/1.1 200 OK\r\n", "closed the connection after 17 bytes"),
        (b"", "closed the connection after 0 bytes"),
        (b"HTTP/1.1 200 OK\r\n\r\nRFB", "3 bytes came through the tunnel"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 4000, f"larger than {MAX_REPLY} bytes"),
    ],
)
async def test_refused(answer: bytes, expected_text: str) -> None:
    with pytest.raises(TargetError, match=expected_text) as caught:
        await tunnel(answer)
    assert caught.value.reason is Reason.PROXY
    assert caught.value.remedy


async def test_silent_proxy() -> None:
    with pytest.raises(TargetError, match=r"no reply to CONNECT within 0\.05 s"):
        await tunnel(b"", timeout=0.05, leave=False)
