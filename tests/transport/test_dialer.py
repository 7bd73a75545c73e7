from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.x509.oid import NameOID
from tests.transport.fake_spice import TICKET_KEY_DER, Certificates, FakeSpice, free_port, message, running

from farplug.errors import Reason, TargetError, UsageError
from farplug.exit_codes import ExitCode, exit_code
from farplug.spice.link import LinkFailure, LinkReply
from farplug.spice.types import ChannelType, LinkError
from farplug.spice.vv import VvFile
from farplug.target import parse_target
from farplug.transport import tls
from farplug.transport.connection import Timeouts
from farplug.transport.dialer import ChannelDialer, LinkedChannel
from farplug.transport.spice_target import SpiceTarget, Stage


async def link(target: SpiceTarget, stages: list[str] | None = None, **timeouts: float) -> LinkedChannel:
    def progress(stage: Stage, where: str) -> None:
        if stages is not None:
            stages.append(f"{stage} {where}")

    dialer = ChannelDialer(target, Timeouts(**timeouts))
    linked = await dialer.link(ChannelType.MAIN, 0, connection_id=0, capabilities=[1], progress=progress)
    linked.connection.abort()
    return linked


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"))


@pytest.mark.parametrize("caps", [0b1011, 0b0011, 0b1010])
async def test_plain(caps: int) -> None:
    fake = FakeSpice(password="secret", common_caps=caps)
    async with running(fake) as port:
        stages: list[str] = []
        linked = await link(SpiceTarget(host="127.0.0.1", port=port, password="secret"), stages)
    assert stages == [f"reach 127.0.0.1:{port}", f"ticket 127.0.0.1:{port}"]
    assert linked.link.mini_header == bool(caps & 8)
    assert not linked.local


async def test_unix(tmp_path: Path) -> None:
    path = tmp_path / "spice.sock"
    async with running(FakeSpice(), path=path):
        linked = await link(SpiceTarget(unix_path=str(path)))
    assert linked.local


async def test_wrong_password() -> None:
    async with running(FakeSpice(password="secret")) as port:
        with pytest.raises(LinkFailure, match="the password is wrong") as caught:
            await link(SpiceTarget(host="127.0.0.1", port=port, password="guess"))
    assert caught.value.reason is Reason.WRONG_PASSWORD
    assert exit_code(caught.value) is ExitCode.DENIED


async def test_not_spice() -> None:
    async with running(FakeSpice(greeting=b"HTTP/1.1 400 Bad Request\r\n\r\n")) as port:
        with pytest.raises(LinkFailure, match="HTTP server") as caught:
            await link(SpiceTarget(host="127.0.0.1", port=port))
    assert caught.value.reason is Reason.NOT_SPICE


async def test_server_that_closes_or_sends_nothing() -> None:
    async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            await reader.readexactly(42)

    async def send_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError):
            await reader.read()

    for serve, timeout, reason, expected_text in (
        (close, 60, Reason.LINK_REFUSED, "without a link reply"),
        (send_nothing, 0.1, Reason.TIMED_OUT, r"no link reply within 0\.1 s"),
    ):
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        with pytest.raises(LinkFailure, match=expected_text) as caught:
            await link(SpiceTarget(host="127.0.0.1", port=server.sockets[0].getsockname()[1]), handshake=timeout)
        assert caught.value.reason is reason
        server.close()
        await asyncio.sleep(0.01)


async def test_needs_tls_and_there_is_none() -> None:
    async with running(FakeSpice(link_error=LinkError.NEED_SECURED)) as port:
        with pytest.raises(LinkFailure, match="demands TLS") as caught:
            await link(SpiceTarget(host="127.0.0.1", port=port))
    assert caught.value.reason is Reason.NEEDS_TLS
    with pytest.raises(TargetError, match="secure-channels requires TLS for the channel main") as refused:
        await link(SpiceTarget(host="127.0.0.1", port=1, secure_channels=frozenset({"main"})))
    assert refused.value.reason is Reason.NEEDS_TLS


@pytest.fixture
async def both(certificates: Certificates) -> AsyncIterator[tuple[FakeSpice, dict[str, Any]]]:
    """A server with a plain and a TLS port, and what a target needs for both."""
    fake = FakeSpice(password="secret")
    async with running(fake) as port, running(fake, tls=certificates.server_context()) as tls_port:
        yield fake, {"host": "127.0.0.1", "port": port, "tls_port": tls_port, "password": "secret"}


SUBJECT = r"O=Test\, Inc.,CN=vmhost"
MAIN = frozenset({ChannelType.MAIN})


@pytest.fixture
def trusted(certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system trusts the CA."""
    made = tls.client_context

    def client_context(*, ca: str | None, check_hostname: bool) -> ssl.SSLContext:
        return made(ca=ca or certificates.ca, check_hostname=check_hostname)

    monkeypatch.setattr(tls, "client_context", client_context)


async def test_tls_comes_first(both: tuple[FakeSpice, dict[str, Any]], trusted: None) -> None:
    fake, target = both
    fake.secured = frozenset({ChannelType.USBREDIR})
    fake.channels = ((9, 0),)
    stages: list[str] = []
    dialer = ChannelDialer(SpiceTarget(**target), Timeouts())
    for channel_type in (ChannelType.MAIN, ChannelType.USBREDIR):
        linked = await dialer.link(
            channel_type,
            0,
            connection_id=channel_type - 1,
            capabilities=[],
            progress=lambda stage, where: stages.append(f"{stage} {where}"),
        )
        linked.connection.abort()
    where = f"127.0.0.1:{target['tls_port']}"
    assert stages == [f"{stage} {where}" for stage in ("reach", "tls", "ticket")] * 2
    assert [channel.tls for channel in fake.linked] == [True, True]
    assert str(SpiceTarget(**target)) == where


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ({}, ""),
        ({"ca": "ca"}, "does not serve the channel main over TLS"),
        ({"host_subject": SUBJECT}, "does not serve the channel main over TLS"),
        ({"secure_channels": frozenset({"usbredir"})}, "does not serve the channel main over TLS"),
        ({"secure_channels": frozenset({"main"})}, "over TLS, as secure-channels requires"),
        ({"secure_channels": frozenset({"all"})}, "over TLS, as secure-channels requires"),
        ({"ca": "ca", "host_subject": SUBJECT, "allow_plain": True}, ""),
        ({"secure_channels": frozenset({"usbredir"}), "allow_plain": True}, ""),
        ({"secure_channels": frozenset({"main"}), "allow_plain": True}, "as secure-channels requires"),
        ({"port": None}, "demands a connection without TLS"),
    ],
)
async def test_a_channel_that_the_server_does_not_serve_over_tls(
    both: tuple[FakeSpice, dict[str, Any]],
    certificates: Certificates,
    trusted: None,
    options: dict[str, Any],
    refusal: str,
) -> None:
    fake, target = both
    fake.unsecured = MAIN
    if "ca" in options:
        options = {**options, "ca": certificates.ca}
    stages: list[str] = []
    if not refusal:
        await link(SpiceTarget(**{**target, **options}), stages)
        assert [stage.split()[0] for stage in stages] == ["reach", "tls", "ticket", "reach", "ticket"]
        assert [channel.tls for channel in fake.linked] == [False]
        return
    with pytest.raises(TargetError, match=refusal) as caught:
        await link(SpiceTarget(**{**target, **options}), stages)
    assert not any(stage.endswith(f":{target['port']}") for stage in stages)
    if "secure-channels requires" not in refusal and options.get("port", 1):
        assert caught.value.reason is Reason.NEEDS_TLS
        assert caught.value.remedy.alternative is not None
        assert caught.value.remedy.alternative.setting == "target.allow_plain"


async def test_a_server_that_refuses_tls_after_the_ticket(
    both: tuple[FakeSpice, dict[str, Any]], trusted: None
) -> None:
    fake, target = both
    fake.ticket_error = LinkError.NEED_UNSECURED
    stages: list[str] = []
    with pytest.raises(LinkFailure, match="demands a connection without TLS"):
        await link(SpiceTarget(**target), stages)
    assert [stage.split()[0] for stage in stages] == ["reach", "tls", "ticket"]


@pytest.mark.parametrize("allow_plain", [False, True])
@pytest.mark.parametrize("what", ["refused", "untrusted", "not TLS", "another host"])
async def test_nothing_is_sent_to_the_plain_port_if_tls_fails(
    certificates: Certificates, tmp_path: Path, what: str, allow_plain: bool
) -> None:
    """An attacker who can answer on the plain port can also make TLS fail."""
    connections: list[object] = []

    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        writer.close()

    plain = await asyncio.start_server(count, "127.0.0.1", 0)
    port = plain.sockets[0].getsockname()[1]
    contexts = {
        "refused": None,
        "not TLS": None,
        "untrusted": Certificates(tmp_path).server_context(),
        "another host": certificates.server_context(["other.example"], []),
    }
    async with running(FakeSpice(greeting=b"REDQ"), tls=contexts[what]) as tls_port:
        target = SpiceTarget(
            host="127.0.0.1",
            port=port,
            tls_port=free_port() if what == "refused" else tls_port,
            ca=certificates.ca,
            password="secret",
            allow_plain=allow_plain,
        )
        with pytest.raises(TargetError):
            await link(target, handshake=2)
    assert not connections
    plain.close()


@pytest.mark.parametrize("options", [{"ca": "ca"}, {"host_subject": SUBJECT}])
async def test_what_demands_tls_without_a_tls_port(certificates: Certificates, options: dict[str, Any]) -> None:
    """A .vv file may have a CA and no tls-port."""
    options = {key: certificates.ca if key == "ca" else value for key, value in options.items()}
    async with running(fake := FakeSpice()) as port:
        with pytest.raises(TargetError, match="but no TLS port: nothing would be checked") as caught:
            await link(SpiceTarget(host="127.0.0.1", port=port, **options))
        assert caught.value.reason is Reason.NEEDS_TLS
        assert not fake.linked
        await link(SpiceTarget(host="127.0.0.1", port=port, **options, allow_plain=True))
        assert len(fake.linked) == 1


async def test_channels_that_are_not_used_may_have_no_tls() -> None:
    async with running(FakeSpice()) as port:
        await link(SpiceTarget(host="127.0.0.1", port=port, secure_channels=frozenset({"display"})))


@pytest.mark.parametrize(
    ("options", "tls"),
    [
        ({}, True),
        ({"port": None}, True),
        ({"secure_channels": frozenset({"main", "inputs"})}, True),
        ({"secure_channels": frozenset({"all"})}, True),
        ({"secure_channels": frozenset({"usbredir"})}, True),
        ({"allow_plain": True}, True),
        ({"tls_port": None, "ca": None}, False),
        ({"port": None, "host_subject": r"O=Test\, Inc.,CN=vmhost"}, True),
        ({"port": None, "host": "localhost"}, True),
    ],
)
async def test_tls(
    both: tuple[FakeSpice, dict[str, Any]], certificates: Certificates, options: dict[str, Any], tls: bool
) -> None:
    fake, target = both
    await link(SpiceTarget(**{**target, "ca": certificates.ca, **options}))
    assert [channel.tls for channel in fake.linked] == [tls]


@pytest.mark.parametrize(
    ("options", "reason", "expected_text"),
    [
        (
            {"ca": None},
            Reason.TLS_UNTRUSTED,
            r"not trusted .*certificate of O=Test\\, Inc.,CN=vmhost, issued by O=Test",
        ),
        (
            {"host_subject": "O=Other,CN=vmhost"},
            Reason.TLS_WRONG_HOST,
            "subject is not O=Other,CN=vmhost: certificate of",
        ),
        ({"host_subject": r"CN=vmhost"}, Reason.TLS_WRONG_HOST, "subject is not CN=vmhost"),
        ({"host_subject": r"O=Test\, Inc.,CN=vmhost", "ca": None}, Reason.TLS_UNTRUSTED, "not trusted"),
    ],
)
async def test_tls_refused(
    both: tuple[FakeSpice, dict[str, Any]],
    certificates: Certificates,
    options: dict[str, Any],
    reason: Reason,
    expected_text: str,
) -> None:
    fake, target = both
    with pytest.raises(TargetError, match=expected_text) as caught:
        await link(SpiceTarget(**{**target, "port": None, "ca": certificates.ca, **options}))
    assert caught.value.reason is reason
    assert exit_code(caught.value) is ExitCode.TLS
    assert caught.value.remedy
    assert not fake.linked, "nothing was sent to a server that is not the right one"


async def test_wrong_host_name(certificates: Certificates) -> None:
    context = certificates.server_context(["other.example"], ["192.0.2.1"])
    async with running(FakeSpice(), tls=context) as port:
        for host in ("127.0.0.1", "localhost"):
            with pytest.raises(TargetError, match=rf"not for {host}: .*, for other\.example, 192\.0\.2\.1, ") as caught:
                await link(SpiceTarget(host=host, tls_port=port, ca=certificates.ca))
            assert caught.value.reason is Reason.TLS_WRONG_HOST


async def test_an_address_with_a_zone(certificates: Certificates) -> None:
    """The kernel needs the zone; certificates have none."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    context = certificates.server_context([], ["::1"])
    async with running(FakeSpice(), tls=context, host="::1") as port:
        target = parse_target(f"spice+tls://[::1%251]:{port}")
        assert isinstance(target, SpiceTarget)
        linked = await link(replace(target, ca=certificates.ca))
    assert linked.connection.tls is not None


async def test_expired_certificate(certificates: Certificates) -> None:
    async with running(FakeSpice(), tls=certificates.server_context(days=-1)) as port:
        with pytest.raises(TargetError, match=r"not trusted \(certificate has expired\).*valid until 20") as caught:
            await link(SpiceTarget(host="127.0.0.1", tls_port=port, ca=certificates.ca))
    assert caught.value.reason is Reason.TLS_UNTRUSTED


async def test_other_ca(certificates: Certificates, tmp_path: Path) -> None:
    other = Certificates(tmp_path)
    async with running(FakeSpice(), tls=certificates.server_context()) as port:
        with pytest.raises(TargetError, match="not trusted") as caught:
            await link(SpiceTarget(host="127.0.0.1", tls_port=port, ca=other.ca))
    assert caught.value.reason is Reason.TLS_UNTRUSTED


async def test_tls_to_a_plain_port(certificates: Certificates) -> None:
    async with running(FakeSpice(greeting=b"x")) as port:
        with pytest.raises(TargetError, match=r"TLS to 127\.0\.0\.1") as caught:
            await link(SpiceTarget(host="127.0.0.1", tls_port=port, ca=certificates.ca), handshake=0.5)
    assert caught.value.reason is Reason.TLS_FAILED


async def test_a_host_that_is_not_a_valid_name_in_a_certificate(certificates: Certificates, proxy: int) -> None:
    async with running(FakeSpice(), tls=certificates.server_context()) as port:
        with pytest.raises(TargetError) as caught:
            await link(
                SpiceTarget(
                    host=".pvespiceproxy::" + "x" * 300,
                    tls_port=port,
                    ca=certificates.ca,
                    proxy=f"http://127.0.0.1:{proxy}",
                )
            )
    assert caught.value.reason is Reason.TLS_WRONG_HOST


requests: list[bytes] = []


@pytest.fixture
async def proxy() -> AsyncIterator[int]:
    """A CONNECT proxy that opens every tunnel to 127.0.0.1, with the requested port."""
    requests.clear()
    tasks: set[asyncio.Task[None]] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
        except OSError:
            pass
        finally:
            writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        requests.append(request)
        port = int(request.split(b"\r\n")[0].split()[1].rpartition(b":")[2])
        inside, outside = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        for source, sink in ((reader, outside), (inside, writer)):
            task = asyncio.create_task(pump(source, sink))
            tasks.add(task)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_proxmox(certificates: Certificates, proxy: int) -> None:
    """A .vv file of Proxmox: a proxy, a ticket instead of a host, TLS, the host's subject."""
    subject = ((NameOID.ORGANIZATIONAL_UNIT_NAME, "PVE Cluster Node"), (NameOID.COMMON_NAME, "pve.example.org"))
    fake = FakeSpice(password="ticket")
    async with running(fake, tls=certificates.server_context(subject=subject)) as port:
        vv = VvFile(
            host="pvespiceproxy:6567A3D8:100:pve::5ba2e0c0",
            tls_port=port,
            password="ticket",
            ca=certificates.ca,
            host_subject="OU=PVE Cluster Node,CN=pve.example.org",
            proxy=f"http://user:word@127.0.0.1:{proxy}",
        )
        stages: list[str] = []
        await link(SpiceTarget.from_vv(vv), stages)
    assert stages[0] == f"reach pvespiceproxy:6567A3D8:100:pve::5ba2e0c0:{port} through the proxy 127.0.0.1:{proxy}"
    assert [stage.split()[0] for stage in stages] == ["reach", "tls", "ticket"]
    assert requests[0].startswith(b"CONNECT pvespiceproxy:6567A3D8:100:pve::5ba2e0c0:%d HTTP/1.1\r\n" % port)
    assert b"Proxy-Authorization: Basic dXNlcjp3b3Jk\r\n" in requests[0]


async def test_proxy_that_does_not_exist() -> None:
    absent = free_port()
    with pytest.raises(TargetError, match=f"127.0.0.1:{absent}: Connection refused"):
        await link(SpiceTarget(host="vmhost", port=1, proxy=f"http://127.0.0.1:{absent}"))


async def test_proxy_that_refuses() -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 401 invalid ticket\r\n\r\n")

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(TargetError, match=r"refused the tunnel: HTTP/1\.1 401 invalid ticket") as caught:
        await link(SpiceTarget(host="vmhost", port=1, proxy=f"http://127.0.0.1:{port}"))
    assert caught.value.reason is Reason.PROXY
    server.close()
    await asyncio.sleep(0)


async def test_no_repr_contains_secrets(proxy: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    target = SpiceTarget(host="h", port=1, password="hush", proxy="http://u:hush@p", ca="hush")
    assert "hush" not in repr(target) + str(target)
    fake = FakeSpice(password="hush")
    async with running(fake) as port:
        url = f"http://u:hush@127.0.0.1:{proxy}"
        await link(SpiceTarget(host="127.0.0.1", port=port, password="hush", proxy=url))
    assert "> main: ticket" in caplog.text
    assert "hush" not in caplog.text


@pytest.mark.parametrize("right", [True, False])
async def test_a_link_reply_that_arrives_with_the_handshake(certificates: Certificates, right: bool) -> None:
    """The last message of the TLS handshake and the link reply in one segment: nothing, above all no ticket, goes to a
    server before its subject is checked.
    """
    context = certificates.server_context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # in 1.3 the server's handshake ends before the client's
    received = bytearray()
    gone = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        session = context.wrap_bio(incoming, outgoing, server_side=True)
        handshaken = False
        with contextlib.closing(writer), contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                incoming.write(data)
                with contextlib.suppress(ssl.SSLError):  # SSLWantReadError is one
                    if not handshaken:
                        session.do_handshake()
                        handshaken = True
                        session.write(bytes(LinkReply(LinkError.OK, TICKET_KEY_DER, (0b1011,), (1,))))
                    while len(received) < 16 + 26 + 4 + 128:
                        received.extend(session.read(1 << 16))
                    session.write(bytes(4))
                writer.write(outgoing.read())
        gone.set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    target = SpiceTarget(
        host="127.0.0.1",
        tls_port=server.sockets[0].getsockname()[1],
        password="secret",
        ca=certificates.ca,
        host_subject=r"O=Test\, Inc.,CN=vmhost" if right else "CN=other",
    )
    if right:
        await link(target)
        assert len(received) >= 128
    else:
        with pytest.raises(TargetError, match="subject is not CN=other"):
            await link(target)
    async with asyncio.timeout(100):
        await gone.wait()
    assert right or not received
    server.close()


async def test_whatever_fails_after_the_handshake_closes_the_connection(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError):
            await reader.read()
        gone.set()

    def defect(session: ssl.SSLObject) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("farplug.transport.tls.peer_certificate", defect)
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=certificates.server_context())
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(ZeroDivisionError):
        await link(SpiceTarget(host="127.0.0.1", tls_port=port, ca=certificates.ca, host_subject="CN=x"))
    async with asyncio.timeout(100):
        await gone.wait()
    server.close()


@pytest.mark.parametrize(
    "options",
    [
        {"host": "x", "port": 1, "secure_channels": frozenset({"Main"})},
        {},
        {"host": "x"},
        {"port": 1},
        {"host": "x", "port": 1, "password": "x" * 61},
    ],
)
def test_impossible_targets(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        SpiceTarget(**options)


@pytest.mark.parametrize("options", [{"proxy": "ftp://x"}, {"host_subject": "x"}, {"tls_port": 2, "ca": "x"}])
async def test_malformed_targets(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        await link(SpiceTarget(host="h", port=1, **options))


async def test_bytes_that_arrive_with_the_link_are_delivered_first() -> None:
    """The ticket's result and the first message in one segment."""
    fake = FakeSpice()
    received: list[bytes] = []

    class Reader:
        def data_received(self, data: memoryview) -> None:
            received.append(bytes(data))

        def pause_writing(self) -> None: ...

        def resume_writing(self) -> None: ...

    async def greet(channel: Any) -> None:
        channel.send(message(7, b"first"))
        await asyncio.sleep(0.05)
        channel.send(b"second")

    fake.main = greet
    lost = asyncio.Event()
    async with running(fake) as port:
        dialer = ChannelDialer(SpiceTarget(host="127.0.0.1", port=port), Timeouts())
        linked = await dialer.link(ChannelType.MAIN, 0, connection_id=0, capabilities=[])
        await asyncio.sleep(0.02)
        linked.start(Reader(), lambda error: lost.set())
        await lost.wait()
    assert b"".join(received) == message(7, b"first") + b"second"
