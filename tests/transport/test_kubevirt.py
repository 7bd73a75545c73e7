"""VMs of KubeVirt: against an API server with TLS and websockets, and guests in memory behind it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from tests.transport.fake_kubevirt import TOKEN, FakeKubevirt, Kubeconfig, encoded, kubevirt, status
from tests.transport.fake_spice import Recorder, free_port
from websockets.asyncio.server import ServerConnection

from farplug.errors import (
    FarplugError,
    GuestGoneError,
    InternalError,
    PortError,
    Reason,
    RemoteProtocolError,
    SetupError,
    StateError,
    TargetError,
    UsageError,
)
from farplug.exit_codes import exit_code
from farplug.transport import kubeconfig as kubeconfig_module
from farplug.transport import websocket
from farplug.transport.connection import Timeouts
from farplug.transport.kubeconfig import Cluster, parse_cluster
from farplug.transport.kubevirt import KubevirtSession
from farplug.transport.kubevirt_target import KubevirtTarget
from farplug.transport.spice_target import Stage

TARGET = KubevirtTarget("lab", "vm1")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kubeconfig:
    return Kubeconfig(tmp_path, monkeypatch)


async def connect(target: KubevirtTarget = TARGET, **options: Any) -> KubevirtSession:
    return await KubevirtSession.connect(target, **options)


async def refused(target: KubevirtTarget = TARGET, **options: Any) -> FarplugError:
    """Connect, which must fail; the error, in which there is no secret."""
    with pytest.raises(FarplugError) as caught:
        await connect(target, **options)
    for error in (caught.value, caught.value.__cause__, caught.value.__context__):
        assert TOKEN not in f"{error!r} {error}"
    return caught.value


# Bytes ----------------------------------------------------------------------------------------------------------------


class Pipe:
    """Behind a slot: the test's own end of the stream."""

    def __init__(self) -> None:
        self.connections: asyncio.Queue[ServerConnection] = asyncio.Queue()

    async def __call__(self, connection: ServerConnection) -> None:
        self.connections.put_nowait(connection)
        await connection.wait_closed()


async def test_bytes_go_both_ways_and_borders_of_frames_mean_nothing(home: Kubeconfig) -> None:
    pipe = Pipe()
    stages: list[tuple[Stage, str]] = []
    async with kubevirt(home, FakeKubevirt(pipe, pipe)) as fake:
        session = await connect(progress=lambda stage, text: stages.append((stage, text)))
        assert stages == [
            (Stage.ACCESS, "the kubeconfig"),
            (Stage.REACH, f"lab/vm1 at https://{fake.address}/prefix"),
        ]
        port, recorder = session.ports[0], Recorder()
        port.write([b"dropped: not open"])
        server = await pipe.connections.get()
        await server.send(b"early")
        await port.open(recorder)
        with pytest.raises(StateError, match="open already"):
            await port.open(Recorder())
        assert len(fake.requests) == 1, "the websocket of the beginning is that of the first port"
        payload = os.urandom(3 << 20)
        port.write([b"head", payload[: 1 << 20]])
        port.write([payload[1 << 20 :]])
        got = b""
        while len(got) < 4 + len(payload):
            got += await server.recv()  # type: ignore[operator]
        assert got == b"head" + payload
        async for piece in _pieces(payload):
            await server.send(piece)
        await recorder.until(lambda: bytes(recorder.data) == b"early" + payload)
        port.pause_reading()
        await server.send(b"!")
        await asyncio.sleep(0.02)
        assert len(recorder.data) == 5 + len(payload)
        port.resume_reading()
        await recorder.until(lambda: recorder.data.endswith(b"!"))
        await port.close()
        assert recorder.closed == [None]
        assert server.close_code == 1000
        assert not session.over, "a port that this side closes does not end the session"
        again = Recorder()
        await port.open(again)
        await (await pipe.connections.get()).send(b"again")
        await again.until(lambda: bytes(again.data) == b"again")
        port.abort()
        await again.until(lambda: again.closed == [None])
        await session.close()
        assert await session.closed() is None
        with pytest.raises(GuestGoneError, match="was closed"):
            await port.open(Recorder())


async def _pieces(payload: bytes) -> Any:
    for offset in range(0, len(payload), 700_001):
        yield payload[offset : offset + 700_001]


async def test_a_peer_that_does_not_read_pauses_the_writer(home: Kubeconfig) -> None:
    pipe = Pipe()
    async with kubevirt(home, FakeKubevirt(pipe)):
        session = await connect()
        recorder = Recorder()
        await session.ports[0].open(recorder)
        server = await pipe.connections.get()
        block = bytes(1 << 20)
        count = 0
        while not recorder.pauses:
            session.ports[0].write([block])
            count += 1
            await asyncio.sleep(0)
        got = 0
        while got < count << 20:
            got += len(await server.recv())
        await recorder.until(lambda: recorder.resumes == 1)
        await session.close()


@pytest.mark.parametrize(
    ("code", "what"),
    [
        (1006, "KubeVirt broke the connection|KubeVirt closed the connection"),
        (1001, r"KubeVirt closed the connection \(code 1001: bye\): the VM lab/vm1 was stopped or migrated"),
    ],
)
async def test_the_session_ends_with_the_first_websocket_that_is_lost(home: Kubeconfig, code: int, what: str) -> None:
    pipe = Pipe()
    async with kubevirt(home, FakeKubevirt(pipe, pipe, pipe, pipe)) as fake:
        session = await connect()
        recorders = [Recorder() for _ in session.ports]
        await asyncio.gather(*(port.open(each) for port, each in zip(session.ports, recorders, strict=True)))
        assert fake.used == [0, 1, 2, 3], "the order of the ports is that of the VM's"
        first = await pipe.connections.get()
        if code == 1006:
            first.transport.abort()
        else:
            await first.close(code, "bye")
        error = await session.closed()
        assert isinstance(error, GuestGoneError)
        assert exit_code(error) == 9
        assert re.match(what, error.message)
        for recorder in recorders:
            await recorder.until(lambda recorder=recorder: bool(recorder.closed))  # type: ignore[misc]
            assert recorder.closed == [error]
        assert session.over
        with pytest.raises(GuestGoneError):
            await session.ports[0].open(Recorder())
        await session.close()


async def test_an_exception_of_the_listener_is_an_internal_error(home: Kubeconfig) -> None:
    class Broken(Recorder):
        def data_received(self, data: memoryview, more: bool = False) -> None:
            raise AttributeError("no such thing")

    async with kubevirt(home):
        session = await connect()
        broken = Broken()
        await session.ports[0].open(broken)
        await broken.until(lambda: bool(broken.closed))
        assert isinstance(broken.closed[0], InternalError)
        await session.close()


@pytest.mark.parametrize(
    ("frame", "what"),
    [
        (b"\x81\x05hello", "sent text"),
        (b"\x82\x7f" + (websocket.MAX_FRAME + 1).to_bytes(8, "big"), "violated the websocket protocol"),
        (b"\xc2\x01x", "violated the websocket protocol"),
    ],
)
async def test_a_server_that_violates_the_protocol(home: Kubeconfig, frame: bytes, what: str) -> None:
    async def violate(connection: ServerConnection) -> None:
        connection.transport.write(frame)
        await connection.wait_closed()

    async with kubevirt(home, FakeKubevirt(violate)):
        session = await connect()
        recorder = Recorder()
        await session.ports[0].open(recorder)
        await recorder.until(lambda: bool(recorder.closed))
        assert isinstance(recorder.closed[0], RemoteProtocolError)
        assert what in recorder.closed[0].message
        await session.close()


async def test_a_connection_without_traffic_has_pings(home: Kubeconfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "PING_INTERVAL", 0.01)
    async with kubevirt(home) as fake:
        session = await connect()
        while fake.pings < 3:
            await asyncio.sleep(0.01)
        await session.close()
    assert len(fake.requests) == 1


async def test_a_first_websocket_that_is_lost_before_its_port_is_opened_ends_the_session(home: Kubeconfig) -> None:
    async with kubevirt(home) as fake:
        session = await connect()
        await fake.stop()
        recorder = Recorder()
        await session.ports[0].open(recorder)
        await recorder.until(lambda: bool(recorder.closed))
        assert isinstance(recorder.closed[0], GuestGoneError)
        assert session.over
        await session.close()


# What the API answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "kind", "reason", "code", "message", "remedy", "command"),
    [
        (
            status(401, "Unauthorized"),
            *(TargetError, Reason.CREDENTIALS, 6),
            "does not accept the credentials of the context 'lab': Unauthorized",
            "log in",
            "kubectl --context=lab auth whoami",
        ),
        (
            status(403, 'virtualmachineinstances.subresources.kubevirt.io "vm1" is forbidden'),
            *(TargetError, Reason.FORBIDDEN, 6),
            "does not allow the context 'lab' to use the USB ports of lab/vm1: virtualmachineinstances",
            "the verb get on the resource virtualmachineinstances/usbredir",
            "kubectl --context=lab auth can-i get virtualmachineinstances.subresources.kubevirt.io "
            "--subresource=usbredir --namespace=lab",
        ),
        (
            status(404, 'virtualmachineinstance.kubevirt.io "vm1" not found', "vm1"),
            *(TargetError, Reason.NOT_FOUND, 4),
            "no VM vm1 runs in the namespace lab",
            "start the VM",
            "kubectl --context=lab get vmi --namespace=lab",
        ),
        (
            (404, b"404 page not found\n"),
            *(TargetError, Reason.NOT_FOUND, 4),
            "has no USB ports of VMs",
            "KubeVirt is installed",
            "kubectl --context=lab get apiservices v1.subresources.kubevirt.io",
        ),
        (
            status(409, 'Operation cannot be fulfilled on virtualmachineinstance "vm1": Not configured with USB'),
            *(PortError, Reason.NO_USBREDIR_CHANNEL, 7),
            "the VM lab/vm1 has no USB ports for clients: Operation cannot be fulfilled",
            "clientPassthrough: {}",
            "",
        ),
        (
            status(400, "VMI is not running"),
            *(TargetError, Reason.API_ERROR, 4),
            "KubeVirt cannot connect to lab/vm1: VMI is not running",
            "check that the VM runs",
            "kubectl --context=lab get vmi --namespace=lab",
        ),
        (
            status(500, "Internal error occurred: dialing virt-handler: websocket: bad handshake"),
            *(PortError, Reason.CHANNEL_IN_USE, 7),
            "most likely other clients use all 4: Internal error",
            "end another client",
            "",
        ),
        *(
            (
                status(number, "dial tcp 10.0.0.1:8186: connect: connection refused"),
                *(TargetError, Reason.API_ERROR, 4),
                f"failed with the status {number}: dial tcp",
                "try again later",
                "kubectl --context=lab get pods -A -l kubevirt.io",
            )
            for number in (429, 500, 502, 503, 504)
        ),
        ((503, b"<html>"), TargetError, Reason.API_ERROR, 4, "failed with the status 503", "try again later", None),
        ((302, b""), TargetError, Reason.API_ERROR, 4, "the HTTP status 302 instead of a websocket", "server", None),
        ((200, b"[" * 100_000), TargetError, Reason.API_ERROR, 4, "HTTP status 200 instead", "server", None),
        (
            (418, b'{"kind":"Status","message":["x"],"details":[]}'),
            *(TargetError, Reason.API_ERROR, 4),
            "status 418 instead",
            "server",
            None,
        ),
        (
            status(403, "no\n\x1b[31m " + "x" * 5000),
            *(TargetError, Reason.FORBIDDEN, 6),
            "lab/vm1: no \N{REPLACEMENT CHARACTER}[31m xxx",
            "ask",
            None,
        ),
    ],
)
async def test_every_status_has_a_reason_and_a_remedy(
    home: Kubeconfig,
    answer: tuple[int, bytes],
    kind: type[FarplugError],
    reason: Reason,
    code: int,
    message: str,
    remedy: str,
    command: str | None,
) -> None:
    async with kubevirt(home, FakeKubevirt(answers=[answer])):
        error = await refused(KubevirtTarget("lab", "vm1", "lab"))
    assert (type(error), error.reason, exit_code(error)) == (kind, reason, code)
    assert message in error.message
    assert len(error.message) < 600
    assert "\n" not in error.message
    assert remedy in error.remedy
    assert command in (None, error.remedy.command)


async def test_a_port_that_another_client_uses(home: Kubeconfig) -> None:
    async with kubevirt(home) as fake:
        ours, theirs = await connect(), await connect()
        for session, number in ((ours, 0), (theirs, 0), (theirs, 1), (theirs, 2)):
            await session.ports[number].open(Recorder())
        assert fake.used == [0, 1, 2, 3]
        with pytest.raises(PortError) as caught:
            await ours.ports[1].open(Recorder())
        assert caught.value.reason is Reason.CHANNEL_IN_USE
        await theirs.ports[1].close()
        while len(fake.open) == 4:
            await asyncio.sleep(0.01)
        await ours.ports[1].open(Recorder())
        assert fake.used == [0, 1, 2, 3, 2], "the server takes the first one that is free"
        await theirs.close()
        await ours.close()


async def test_another_vm_and_a_context_with_slashes(home: Kubeconfig) -> None:
    async with kubevirt(home) as fake:
        assert (await refused(KubevirtTarget("lab", "other"))).reason is Reason.NOT_FOUND
        session = await connect(KubevirtTarget("lab", "vm1", "default/api:6443/me"))
        await session.close()
        headers = fake.requests[-1]
    assert headers["Sec-WebSocket-Protocol"] == "plain.kubevirt.io"
    assert headers["User-Agent"].startswith("farplug/")
    assert "Sec-WebSocket-Extensions" not in headers


# Credentials ----------------------------------------------------------------------------------------------------------


async def test_no_log_and_no_capture_contains_the_token(home: Kubeconfig, caplog: pytest.LogCaptureFixture) -> None:
    class Tap:
        seen = b""

        def sent(self, buffers: list[Any]) -> None:
            self.seen += b"".join(buffers)

        def received(self, data: memoryview) -> None:
            self.seen += data

        def closed(self) -> None:
            self.seen += b"closed"

    class Wire:
        def tap(self, name: str) -> Tap:
            assert name == "usbredir of kubevirt://lab/vm1"
            return tap

    tap, pipe = Tap(), Pipe()
    caplog.set_level(logging.DEBUG)
    for name in ("websockets", "websockets.client"):
        caplog.set_level(logging.DEBUG, logger=name)
    async with kubevirt(home, FakeKubevirt(pipe)):
        session = await connect(wire=Wire)
        recorder = Recorder()
        await session.ports[0].open(recorder)
        server = await pipe.connections.get()
        await server.send(b"down")
        await recorder.until(lambda: bytes(recorder.data) == b"down")
        session.ports[0].write([b"u", b"p"])
        assert await server.recv() == b"up"
        await session.close()
    assert tap.seen == b"downupclosed"
    client = [record for record in caplog.records if record.name != "websockets.server"]
    assert not any(TOKEN in f"{record.getMessage()} {record.args}" for record in client)


async def test_a_client_certificate(home: Kubeconfig) -> None:
    certificate, key = ((home.folder / f"server-{name}.pem").read_bytes() for name in ("cert", "key"))
    user = {"client-certificate-data": encoded(certificate), "client-key-data": encoded(key)}
    fake = FakeKubevirt(token="")
    async with asyncio.timeout(60), fake.running(home.server_context(client_certificates=True)):
        home.write(fake.address, user)
        before = set(os.listdir("/tmp"))
        session = await connect()
        assert not {name for name in set(os.listdir("/tmp")) - before if "farplug-" in name and "key" in name}
        await session.close()
        home.write(fake.address, {})
        error = await refused()
        assert error.reason in (Reason.TLS_FAILED, Reason.UNREACHABLE), "a reset may come before the alert"
        home.write(fake.address, user | {"client-key-data": encoded(b"no key")})
        error = await refused()
        assert (error.reason, error.message) == (
            Reason.KUBECONFIG,
            "the kubeconfig has a client certificate that cannot be used with its key",
        )


PLUGIN = {"apiVersion": "client.authentication.k8s.io/v1", "command": "kube-login", "installHint": "get it\nthere"}


def credential(**fields: Any) -> str:
    printed = {"kind": "ExecCredential", "apiVersion": PLUGIN["apiVersion"], "status": fields}
    return f"cat <<'END'\n{json.dumps(printed)}\nEND\n"


async def test_a_credential_plugin(home: Kubeconfig) -> None:
    log = home.folder / "log"
    plugin = PLUGIN | {"args": ["--for", "lab"], "env": [{"name": "A", "value": "b c"}], "provideClusterInfo": True}
    script = f'echo "$A $* $KUBERNETES_EXEC_INFO" >>{log}\n'
    extensions = [{"name": "client.authentication.k8s.io/exec", "extension": {"audience": "x"}}]
    home.program("kube-login", script + credential(token=TOKEN, expirationTimestamp="2999-01-01T00:00:00Z"))
    async with kubevirt(home, None, {"exec": plugin}, extensions=extensions) as fake:
        session = await connect()
        await session.ports[0].open(Recorder())
        await session.ports[1].open(Recorder())
        (line,) = log.read_text().splitlines()
        assert line.startswith("b c --for lab {")
        info = json.loads(line.removeprefix("b c --for lab "))
        assert info["kind"] == "ExecCredential"
        assert info["spec"]["interactive"] is False
        cluster = info["spec"]["cluster"]
        assert (cluster["server"], cluster["config"]) == (f"https://{fake.address}/prefix", {"audience": "x"})
        # The cluster refuses the token now, and the plugin has a new one.
        fake.token = "another"
        home.program("kube-login", script + credential(token="another"))
        await session.ports[2].open(Recorder())
        assert len(log.read_text().splitlines()) == 2
        # It still refuses the token of the plugin: asked once more, and no third time.
        fake.token = "a third"
        with pytest.raises(TargetError) as caught:
            await session.ports[3].open(Recorder())
        assert caught.value.reason is Reason.CREDENTIALS
        assert len(log.read_text().splitlines()) == 3
        await session.close()


async def test_credentials_that_expire_are_fetched_anew(home: Kubeconfig) -> None:
    log = home.folder / "log"
    home.program("kube-login", f"echo >>{log}\n{credential(token=TOKEN, expirationTimestamp='2001-01-01T00:00:00Z')}")
    async with kubevirt(home, None, {"exec": PLUGIN}):
        session = await connect()
        before = len(log.read_text())
        await session.ports[0].open(Recorder())
        await session.ports[1].open(Recorder())
        assert len(log.read_text()) > before
        await session.close()


async def test_a_plugin_with_a_certificate(home: Kubeconfig) -> None:
    certificate, key = ((home.folder / f"server-{name}.pem").read_text() for name in ("cert", "key"))
    home.program("kube-login", credential(clientCertificateData=certificate, clientKeyData=key))
    fake = FakeKubevirt(token="")
    async with asyncio.timeout(60), fake.running(home.server_context(client_certificates=True)):
        home.write(fake.address, {"exec": PLUGIN})
        await (await connect()).close()


@pytest.mark.parametrize(
    ("script", "changes", "kind", "message"),
    [
        ("echo >&2; echo 'token expired' >&2; exit 7", {}, TargetError, "ended with exit code 7: token expired"),
        ("kill -9 $$", {}, TargetError, "was ended by signal 9"),
        ("sleep 1000", {}, TargetError, "did not end within 1 s"),
        ("cat /dev/zero", {}, TargetError, "printed more than 262144 bytes"),
        (f"echo {TOKEN}", {}, TargetError, "printed something that is not JSON"),
        ("printf '%0200000d' 0 | tr 0 '['", {}, TargetError, "printed something that is not JSON"),
        ("echo '[]'", {}, TargetError, "printed something that is not an ExecCredential"),
        (credential().replace("/v1", "/v1beta1"), {}, TargetError, "printed another version"),
        (credential().replace('"status": {}', '"status": 3'), {}, TargetError, "an ExecCredential without a status"),
        (credential(), {}, TargetError, "printed neither a token nor a certificate with its key"),
        (credential(clientCertificateData="x"), {}, TargetError, "printed neither a token nor a certificate"),
        (credential(token=[TOKEN]), {}, TargetError, "whose token is not text"),
        (credential(token=f"{TOKEN}\r\nX: y"), {}, TargetError, "its token is not valid"),
        ("", {"command": "no-such-plugin"}, SetupError, "cannot be started: no such file"),
        ("", {"command": ""}, SetupError, "cannot be started"),
        ("", {"command": "a\0b"}, SetupError, "cannot be started"),
        ("", {"apiVersion": "client.authentication.k8s.io/v1alpha1"}, UsageError, "of the version 'client"),
        ("", {"interactiveMode": "Always"}, UsageError, "needs a terminal"),
        ("", {"args": "x"}, UsageError, "arguments of a credential plugin that are not text"),
        ("", {"env": ["x"]}, UsageError, "has env that are not a list of objects"),
    ],
)
async def test_a_plugin_that_fails(
    home: Kubeconfig,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    changes: dict[str, Any],
    kind: type[FarplugError],
    message: str,
) -> None:
    monkeypatch.setattr(kubeconfig_module, "PLUGIN_TIMEOUT", 1.0 if "sleep" in script else 30.0)
    home.program("kube-login", script)
    async with kubevirt(home, None, {"exec": PLUGIN | changes}) as fake:
        error = await refused()
        assert fake.requests == []
    assert type(error) is kind
    assert message in error.message
    assert error.reason in (Reason.CREDENTIALS, Reason.KUBECONFIG, Reason.MISSING_PROGRAM)
    if kind is not UsageError and "token is not valid" not in message:
        assert error.remedy == "get it there", "the hint of the kubeconfig"


async def test_impersonation_and_other_users(home: Kubeconfig) -> None:
    user = {"token": TOKEN, "as": "bob", "as-uid": "7", "as-groups": ["g", "h"]}
    async with kubevirt(home, None, user) as fake:
        await (await connect()).close()
        headers = fake.requests[-1]
        assert headers.get_all("Impersonate-Group") == ["g", "h"]
        assert (headers["Impersonate-User"], headers["Impersonate-Uid"]) == ("bob", "7")
        file = home.folder / "token"
        file.write_text(f"{TOKEN}\n")
        home.write(fake.address, {"tokenFile": str(file)})
        session = await connect()
        fake.token = "rotated"
        file.write_text("rotated")
        await session.ports[0].open(Recorder())
        await session.ports[1].open(Recorder())
        await session.close()
        file.unlink()
        assert "cannot be read: no such file" in (error := await refused()).message
        assert error.reason is Reason.CREDENTIALS
        home.write(fake.address, {"username": "bob", "password": "pw"})
        assert (await refused()).reason is Reason.CREDENTIALS
        assert fake.requests[-1]["Authorization"] == "Basic Ym9iOnB3"
        for bad, message in (
            ({"as": "a\r\nX: y"}, "not valid in a header"),
            ({"as-groups": [3]}, "not valid in a header"),
            ({"as-groups": "g"}, "not a list"),
            ({"as-user-extra": {"a": ["b"]}}, "has as-user-extra, which is not supported"),
            ({"auth-provider": {"name": "gcp"}}, "has auth-provider, which is not supported"),
            ({"token": 3}, "has a token that is not text"),
            ({"client-certificate-data": "!"}, "not valid in Base64"),
        ):
            home.write(fake.address, bad)
            assert message in (error := await refused()).message
            assert (error.reason, exit_code(error)) == (Reason.KUBECONFIG, 2)


async def test_the_account_of_a_pod(home: Kubeconfig, monkeypatch: pytest.MonkeyPatch) -> None:
    account = home.folder / "account"
    account.mkdir()
    (account / "token").write_text(TOKEN)
    (account / "ca.crt").write_bytes(home.ca.read_bytes())
    monkeypatch.setattr(kubeconfig_module, "ACCOUNT_FOLDER", account)
    home.kubectl("exit 1")
    async with kubevirt(home) as fake:
        host, _, port = fake.address.partition(":")
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port)
        await (await connect()).close()
        fake.token = "other"
        assert "the account of this pod" in (await refused()).message
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "x")
        assert (await refused()).reason is Reason.KUBECONFIG
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port)
        (account / "ca.crt").write_bytes(bytes(300_000))
        assert "larger than" in (await refused()).message
        monkeypatch.setenv("KUBECONFIG", "/some")  # a kubeconfig comes first
        assert "kubectl ended" in (await refused()).message


# The kubeconfig -------------------------------------------------------------------------------------------------------


async def test_kubectl_is_not_installed(home: Kubeconfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farplug.programs.search_path", lambda: "/nonexistent")
    error = await refused()
    assert (type(error), error.reason, exit_code(error)) == (SetupError, Reason.MISSING_PROGRAM, 11)
    assert error.remedy == "install kubectl"


@pytest.mark.parametrize(
    ("script", "kind", "message"),
    [
        ("echo 'error: current-context must exist in order to minify' >&2; exit 1", UsageError, "current-context must"),
        ("sleep 1000", TargetError, "kubectl did not end within 1 s"),
        ("cat /dev/zero", TargetError, "kubectl printed more than 4194304 bytes"),
        ("echo garbage", UsageError, "not a kubeconfig in JSON"),
        ("echo '[]'", UsageError, "not a kubeconfig in JSON"),
        ("printf '%0200000d' 0 | tr 0 '['", UsageError, "not a kubeconfig in JSON"),
        ("echo '{}'", UsageError, "has no context ''"),
        ("""echo '{"contexts": 3}'""", UsageError, "has contexts that are not a list"),
        ("""echo '{"current-context": 3}'""", UsageError, "has a current-context that is not text"),
    ],
)
async def test_kubectl_that_fails(
    home: Kubeconfig, monkeypatch: pytest.MonkeyPatch, script: str, kind: type[FarplugError], message: str
) -> None:
    monkeypatch.setattr(kubeconfig_module, "KUBECTL_TIMEOUT", 1.0 if "sleep" in script else 20.0)
    home.kubectl(script)
    error = await refused()
    assert (type(error), error.reason) == (kind, Reason.KUBECONFIG)
    assert message in error.message


async def test_a_context_that_is_unknown(home: Kubeconfig) -> None:
    home.kubectl("echo 'error: cannot locate context nope' >&2; exit 1")
    error = await refused(KubevirtTarget("lab", "vm1", "nope"))
    assert (error.message, exit_code(error)) == ("the kubeconfig has no context 'nope'", 2)
    assert error.remedy.command == "kubectl config get-contexts"


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
async def test_the_real_kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = str(shutil.which("kubectl"))
    home = Kubeconfig(tmp_path, monkeypatch)
    (tmp_path / "bin/kubectl").unlink()
    (tmp_path / "bin/kubectl").symlink_to(real)
    async with kubevirt(home) as fake:
        context = "default/api:6443/me"
        (tmp_path / ".kube").mkdir()
        (tmp_path / ".kube/config").write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [
                        {
                            "name": "c",
                            "cluster": {"server": f"https://{fake.address}", "certificate-authority": str(home.ca)},
                        }
                    ],
                    "users": [{"name": "u", "user": {"token": TOKEN}}, {"name": "v", "user": {"token": "other"}}],
                    "contexts": [
                        {"name": context, "context": {"cluster": "c", "user": "u"}},
                        {"name": "other", "context": {"cluster": "c", "user": "v"}},
                    ],
                    "current-context": "other",
                }
            )
        )
        await (await connect(KubevirtTarget("lab", "vm1", context))).close()
        assert (await refused()).reason is Reason.CREDENTIALS, "the current context has another user"
        assert "no context 'nope'" in (await refused(KubevirtTarget("lab", "vm1", "nope"))).message
        (tmp_path / ".kube/config").write_text("a: [")
        assert (await refused()).reason is Reason.KUBECONFIG
        (tmp_path / ".kube/config").unlink()
        assert "current-context" in (await refused()).message


@pytest.mark.parametrize(
    ("cluster", "reason", "message"),
    [
        ({"server": "127.0.0.1:1"}, Reason.KUBECONFIG, "not a URL as https://HOST:PORT"),
        ({"server": "https://u:hush@h:1"}, Reason.KUBECONFIG, "not a URL as https://HOST:PORT: 'h:1'"),
        ({"server": "https://h:70000"}, Reason.KUBECONFIG, "not a URL"),
        ({"server": "https://h/a?b"}, Reason.KUBECONFIG, "not a URL"),
        ({"server": "https://h/ä"}, Reason.KUBECONFIG, "not valid in a URL"),
        ({"server": None}, Reason.KUBECONFIG, "not a URL"),
        ({"insecure-skip-tls-verify": True}, Reason.TLS_UNTRUSTED, "turns the check of the server 127.0.0.1 off"),
        ({"certificate-authority-data": encoded(b"x")}, Reason.KUBECONFIG, "not a certificate in PEM format"),
        ({"proxy-url": "socks5://h:1"}, Reason.BAD_TARGET, "socks5 proxies are not supported"),
        ({"certificate-authority-data": None}, Reason.TLS_UNTRUSTED, "is not trusted"),
        ({"tls-server-name": "other"}, Reason.TLS_WRONG_HOST, "certificate is not for other"),
    ],
)
async def test_a_cluster_that_is_not_valid(
    home: Kubeconfig, cluster: dict[str, Any], reason: Reason, message: str
) -> None:
    async with kubevirt(home, None, None, **cluster) as fake:
        error = await refused()
        assert fake.requests == []
    assert error.reason is reason
    assert message in error.message
    assert "hush" not in error.message
    assert error.remedy


def test_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    cluster = parse_cluster({"server": "https://[fd00::1]/k8s/clusters/c-1/"})
    assert (cluster.address.host, cluster.address.port, cluster.path) == ("fd00::1", 443, "/k8s/clusters/c-1")
    assert str(cluster) == "https://[fd00::1]:443/k8s/clusters/c-1"
    assert parse_cluster({"server": "http://h"}).address.port == 80
    monkeypatch.setenv("https_proxy", "http://proxy:8080")
    monkeypatch.setenv("no_proxy", "inside")
    assert str(parse_cluster({"server": "https://h"}).proxy.address) == "proxy:8080"  # type: ignore[union-attr]
    assert parse_cluster({"server": "https://inside"}).proxy is None
    own = parse_cluster({"server": "https://h", "proxy-url": "http://other:1"})
    assert str(own.proxy.address) == "other:1"  # type: ignore[union-attr]
    assert isinstance(own, Cluster)


async def test_without_tls_no_credentials_are_sent(home: Kubeconfig) -> None:
    fake = FakeKubevirt(token="")
    async with asyncio.timeout(60), fake.running():
        home.write(fake.address, server=f"http://{fake.address}/prefix")
        error = await refused()
        assert "without TLS" in error.message
        assert fake.requests == []
        home.write(fake.address, {}, server=f"http://{fake.address}/prefix")  # as kubectl proxy
        await (await connect()).close()


# Servers that are none ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", RemoteProtocolError, "is not a Kubernetes API server"),
        (b"HTTP/1.1 101 Go\r\n\r\n", RemoteProtocolError, "is not a Kubernetes API server"),
        (b"HTTP/1.1 101 Go\r\nX: " + b"x" * 20_000, RemoteProtocolError, "is not a Kubernetes API server"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + bytes(2 << 20), RemoteProtocolError, "is not a Kubernetes API server"),
        (b"HTTP/1.1 403 No\r\n\r\nno length", TargetError, "does not allow"),
        (b"", TargetError, "the server closed the connection|reset"),
        (None, TargetError, "did not answer within 0.3 s"),
    ],
)
async def test_a_peer_that_is_not_an_api_server(
    home: Kubeconfig, answer: bytes | None, kind: type[FarplugError], message: str
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if answer is not None:
            writer.write(answer)
            writer.close()
        else:
            await reader.read()
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=home.server_context())
    async with server:
        home.write(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
        timeouts = Timeouts(handshake=0.3) if answer is None else Timeouts()
        with pytest.raises(kind, match=message):
            await connect(timeouts=timeouts)


async def test_a_port_without_tls_and_one_without_a_server(home: Kubeconfig) -> None:
    home.write(f"127.0.0.1:{free_port()}")
    assert (await refused()).reason is Reason.CONNECTION_REFUSED
    fake = FakeKubevirt()
    async with fake.running():
        home.write(fake.address)
        assert (await refused()).reason in (Reason.TLS_FAILED, Reason.UNREACHABLE)


async def test_a_server_that_chooses_another_subprotocol_or_none(home: Kubeconfig) -> None:
    fake = FakeKubevirt()
    fake.subprotocols = None
    async with kubevirt(home, fake):
        await (await connect()).close()


async def test_through_a_proxy(home: Kubeconfig) -> None:
    asked: list[bytes] = []

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        host, _, port = asked[-1].split()[1].decode().partition(":")
        up, down = await asyncio.open_connection(host, int(port))
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")

        async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(1 << 16):
                sink.write(data)
            sink.close()

        await asyncio.gather(copy(reader, down), copy(up, writer), return_exceptions=True)

    server = await asyncio.start_server(proxy, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with kubevirt(home, None, None, **{"proxy-url": url}) as fake:
            session = await connect()
            recorder = Recorder()
            await session.ports[0].open(recorder)
            await recorder.until(lambda: bool(recorder.data))
            await session.close()
            assert asked[0].startswith(f"CONNECT {fake.address} HTTP/1.1\r\n".encode())
            assert TOKEN.encode() not in b"".join(asked)


async def test_a_call_that_is_cancelled_leaves_nothing(home: Kubeconfig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        home.write(f"127.0.0.1:{server.getsockname()[1]}")
        connecting = asyncio.ensure_future(connect())
        peer, _ = await asyncio.get_running_loop().sock_accept(server)
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
        with peer:
            peer.setblocking(False)
            while await asyncio.get_running_loop().sock_recv(peer, 1 << 16):
                pass
