"""Hosts, origins, tokens, headers."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.web.support import Served
from websockets.exceptions import InvalidStatus

from farplug.web import server
from farplug.web.security import HEADERS, MAX_BAD_TOKENS, Origins, Role, Tokens

HELLO = {"protocol_version": "1.1", "client_name": "Mia"}


class Clock:
    """A clock that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("127.0.0.1:8000", True),
        ("localhost:8000", True),
        ("LOCALHOST:8000", True),
        ("[::1]:8000", True),
        ("127.0.0.1", False),
        ("127.0.0.1:80", False),
        ("127.0.0.1:08000", False),
        ("127.0.0.2:8000", False),
        ("evil.example:8000", False),
        ("localhost.evil.example:8000", False),
        ("localhost:8000@evil.example", False),
        ("evil.example:8000:8000", False),
        ("[::1]", False),
        ("::1:8000", False),
        ("*:8000", False),
        ("", False),
        (":8000", False),
        ("127.0.0.1:8000 ", False),
    ],
)
def test_hosts(host: str, allowed: bool) -> None:
    origins = Origins.of([], 8000)
    assert origins.allows_host(host) is allowed
    assert origins.allows_origin(f"http://{host}") is allowed
    assert not origins.allows_origin(f"https://{host}")
    assert not origins.allows_origin(host)


def test_the_default_port_may_be_missing() -> None:
    assert Origins.of([], 80).allows_host("localhost")
    assert Origins.of(["vm.example"], 443, tls=True).allows_origin("https://vm.example")
    assert not Origins.of(["vm.example"], 443, tls=True).allows_origin("http://vm.example")
    assert Origins.of(["[fe80::1]"], 443, tls=True).allows_host("[FE80::1]")


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("a.example.org", True),
        ("A.Example.org", True),
        ("a.b.example.org", False),
        (".example.org", False),
        ("example.org", False),
        ("*.example.org", False),
        ("a.example.com", False),
    ],
)
def test_a_certificate_for_a_domain(host: str, allowed: bool) -> None:
    assert Origins.of(["*.example.org"], 443, tls=True).allows_host(host) is allowed


def test_tokens() -> None:
    tokens = Tokens.make(view=True)
    assert tokens.role(tokens.full) is Role.FULL
    assert tokens.role(tokens.view) is Role.VIEW
    assert tokens.bearer(f"Bearer {tokens.full}") is Role.FULL
    assert tokens.bearer(f"bearer {tokens.view}") is Role.VIEW
    assert len(tokens.full) >= 43
    assert Tokens.make().view is None


@pytest.mark.parametrize(
    "token", [None, "", 3, [], "x", "\ud800", "ä" * 20, "x" * 10_000_000, b"bytes", {"token": 1}, "Bearer"]
)
def test_wrong_tokens(token: object) -> None:
    tokens = Tokens.make()
    assert tokens.role(token) is None
    assert tokens.role(tokens.full + " ") is None
    assert tokens.bearer(tokens.full) is None
    assert tokens.bearer(f"Basic {tokens.full}") is None


def test_many_wrong_tokens_do_not_lock_the_user_out() -> None:
    clock = Clock()
    tokens = Tokens("full", "view", clock)
    for _ in range(MAX_BAD_TOKENS - 1):
        assert tokens.role("x") is None
        assert not tokens.limited
        clock.now += 1
    assert tokens.role("x") is None
    assert tokens.limited
    assert tokens.role("full") is Role.FULL
    clock.now += 10
    assert tokens.role("x") is None
    assert not tokens.limited


# Over HTTP --------------------------------------------------------------------------------------------------------


@pytest.fixture
def page_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of a page, in place of those of the package."""
    folder = tmp_path / "static"
    (folder / "part").mkdir(parents=True)
    for name in ("index.html", "app.js", "style.css", "icons.svg", "part/a.js", "notes.txt", ".hidden.js", "data.py"):
        (folder / name).write_text(name)
    (tmp_path / "secret.js").write_text("secret")
    monkeypatch.setattr(server, "static_folder", lambda: folder)
    return folder


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/static/index.html", "text/html; charset=utf-8"),
        ("/static/app.js", "text/javascript; charset=utf-8"),
        ("/static/style.css", "text/css; charset=utf-8"),
        ("/static/icons.svg", "image/svg+xml"),
        ("/static/part/a.js", "text/javascript; charset=utf-8"),
    ],
)
async def test_files_of_the_page(served: Served, page_files: Path, path: str, kind: str) -> None:
    answer = await served.http("GET", path)
    assert (answer.status, answer.headers["content-type"]) == (200, kind)
    assert answer.body.decode() == (path.removeprefix("/static/").removeprefix("/") or "index.html")
    for name, value in HEADERS.items():
        assert answer.headers[name] == value.lower()
    assert "set-cookie" not in answer.headers
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert "server" not in answer.headers


@pytest.mark.parametrize(
    "path",
    [
        *("/static/", "/static/none.js", "/static/notes.txt", "/static/data.py", "/static/.hidden.js", "/static/part"),
        *("/static/../secret.js", "/static/%2e%2e/secret.js", "/static/..%2fsecret.js", "/static/..%5csecret.js"),
        *(
            "/static//etc/passwd.js",
            "/static/part//a.js",
            "/static/%00.js",
            "/static/part/../app.js",
            "/static/a%0a.js",
        ),
        *(
            "/index.html",
            "/metrics",
            "/docs",
            "/openapi.json",
            "/favicon.ico",
            "/media",
            "/media/",
            "/ws/",
            "/media/a/b",
        ),
    ],
)
async def test_nothing_else_is_served(served: Served, page_files: Path, path: str) -> None:
    answer = await served.http("GET", path, token=served.page.tokens.full)
    assert answer.status == 404
    assert answer.headers["content-security-policy"] == HEADERS["content-security-policy"]
    assert b"secret" not in answer.body


@pytest.mark.parametrize("method", ["POST", "DELETE", "OPTIONS", "PUT", "PATCH", "TRACE", "X"])
async def test_other_methods_of_http(served: Served, page_files: Path, method: str) -> None:
    for path in ("/", "/static/app.js", "/screenshot.png"):
        assert (await served.http(method, path, token=served.page.tokens.full)).status == 405


FOREIGN = [
    {"Host": "evil.example"},
    {"Host": "evil.example:{port}"},
    {"Host": "127.0.0.1"},
    {"Host": "127.0.0.1:{port}", "Origin": "http://evil.example"},
    {"Host": "127.0.0.1:{port}", "Origin": "http://127.0.0.1:1"},
    {"Host": "127.0.0.1:{port}", "Origin": "https://127.0.0.1:{port}"},
    {"Host": "127.0.0.1:{port}", "Origin": "null"},
    {"Host": "127.0.0.1:{port}", "Origin": ""},
]


@pytest.mark.parametrize("headers", FOREIGN)
async def test_foreign_hosts_and_origins(served: Served, page_files: Path, headers: dict[str, str]) -> None:
    own = {name: value.format(port=served.port) for name, value in headers.items()}
    for method, path in (("GET", "/"), ("GET", "/static/app.js"), ("PUT", "/media/a.iso")):
        answer = await served.http(method, path, own, token=served.page.tokens.full)
        assert answer.status == 403
        assert answer.headers["content-security-policy"] == HEADERS["content-security-policy"]


async def test_the_page_itself_as_origin(served: Served, page_files: Path) -> None:
    for name in ("127.0.0.1", "localhost", "[::1]"):
        host = f"{name}:{served.port}"
        assert (await served.http("GET", "/", {"Host": host, "Origin": f"http://{host}"})).status == 200


async def test_two_hosts_and_two_origins(served: Served, page_files: Path) -> None:
    own = f"127.0.0.1:{served.port}"
    twice = f"GET / HTTP/1.1\r\nHost: {own}\r\nOrigin: http://{own}\r\nOrigin: http://evil.example\r\n"
    assert (await served.raw(f"{twice}Connection: close\r\n\r\n".encode())).status == 403
    answer = await served.raw(f"GET / HTTP/1.1\r\nHost: {own}\r\nHost: evil.example\r\n\r\n".encode())
    assert answer.status in (400, 403)
    assert (await served.raw(b"GET / HTTP/1.0\r\n\r\n")).status in (400, 403)


@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), b"nonsense\r\n\r\n", b"\0" * 100_000]
)
async def test_what_is_not_http(served: Served, page_files: Path, data: bytes) -> None:
    assert (await served.raw(data)).status in (0, 400)
    assert (await served.http("GET", "/")).status == 200


async def test_a_screenshot_and_an_upload_need_the_token(served: Served) -> None:
    tokens = served.page.tokens
    for headers in ({}, {"Authorization": f"Basic {tokens.full}"}, {"Cookie": f"token={tokens.full}"}):
        for method, path in (("GET", "/screenshot.png?session=web1"), ("PUT", "/media/a.iso")):
            answer = await served.http(method, path, headers)
            assert answer.status in (401, 429)
    answer = await served.http("GET", "/screenshot.png?session=web1", token="x")
    assert (answer.status, answer.headers["retry-after"]) == (429, "10")
    for token in (tokens.full, tokens.view):
        assert (await served.http("GET", "/screenshot.png?session=web1", token=token)).status == 404
    answer = await served.http("PUT", "/media/a.iso", body=b"x", token=tokens.view)
    assert (answer.status, answer.json["error"]["code"]) == (403, "view-only")


# The websocket ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1:{port}", "http://127.0.0.1:1"])
async def test_a_websocket_of_another_page(served: Served, origin: str) -> None:
    with pytest.raises(InvalidStatus) as caught:
        async with served.websocket(origin.format(port=served.port)):
            pass
    assert caught.value.response.status_code == 403
    assert caught.value.response.headers["content-security-policy"] == HEADERS["content-security-policy"]


UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version": "13",
}


async def test_a_websocket_without_an_origin(served: Served) -> None:
    assert (await served.http("GET", "/ws", UPGRADE)).status == 403


async def test_a_websocket_by_dns_rebinding(served: Served) -> None:
    evil = {"Host": f"evil.example:{served.port}", "Origin": f"http://evil.example:{served.port}"}
    assert (await served.http("GET", "/ws", {**UPGRADE, **evil})).status == 403


async def test_a_websocket_at_another_path(served: Served) -> None:
    for path in ("/", "/static/app.js", "/wsx"):
        with pytest.raises(InvalidStatus) as caught:
            async with served.websocket(path=path):
                pass
        assert caught.value.response.status_code in (403, 404)


async def test_a_long_frame_before_the_token(served: Served) -> None:
    nested = "[" * 500 + "]" * 500
    async with served.websocket() as browser:
        await browser.send("hello", {**HELLO, "token": served.page.tokens.full, "x": [nested] * 20})
        assert await browser.closed() == 4400
    async with served.browser() as browser:  # with it, they are requests
        refused = await browser.refused("command", {"method": "status"})
        assert await browser.refused("command", {"method": "status", "x": [nested] * 20}) == refused


@pytest.mark.parametrize("token", [None, "", "x", 3, ["x"], "x" * 10_000])
async def test_a_wrong_token(served: Served, token: object) -> None:
    async with served.websocket() as browser:
        await browser.send("hello", {**HELLO, "token": token})
        assert await browser.closed() == 4401


async def test_too_many_wrong_tokens(served: Served) -> None:
    codes = []
    for _ in range(6):
        async with served.websocket() as browser:
            await browser.send("hello", {**HELLO, "token": "x"})
            codes.append(await browser.closed())
    assert codes == [*[4401] * 4, 4429, 4429]
    async with served.browser():  # the user is not locked out
        pass


async def test_what_hello_returns(served: Served) -> None:
    async with served.websocket() as browser:
        result = await browser.call("hello", {**HELLO, "token": served.page.tokens.view})
        assert (result["role"], result["web_root"], result["uploads"]) == ("view", None, None)
        assert "attach" not in result["supported_methods"]
        assert await browser.refused("hello", {**HELLO, "token": served.page.tokens.full}) == "wrong-state"
    async with served.websocket() as browser:
        result = await browser.call("hello", {**HELLO, "token": served.page.tokens.full})
        assert (result["server_name"], result["role"], result["session"]) == ("farplug page", "full", None)
        assert result["uploads"] == {"quota": 16 << 30, "used": 0}
        assert "attach" in result["supported_methods"]


@pytest.mark.parametrize("version", [None, "2.0", 1.1, "0.9"])
async def test_another_version(served: Served, version: object) -> None:
    async with served.websocket() as browser:
        message = await browser.ask_anything(
            {
                "id": 1,
                "method": "hello",
                "params": {"protocol_version": version, "token": served.page.tokens.full},
            }
        )
        assert (message["id"], message["error"]["code"]) == (None, "protocol")
        assert await browser.closed() == 4400


async def test_something_before_hello(served: Served) -> None:
    async with served.websocket() as browser:
        message = await browser.ask_anything({"id": 1, "method": "sessions", "params": {}})
        assert (message["id"], message["error"]["code"]) == (None, "protocol")
        assert await browser.closed() == 4400


async def test_what_a_watcher_may_not_do(served: Served) -> None:
    async with served.browser(served.page.tokens.view) as browser:
        assert await browser.refused("attach", {"sources": []}) == "view-only"
        assert await browser.refused("files") == "view-only"
        assert await browser.refused("remove-upload") == "view-only"
        assert await browser.call("sessions") == []
