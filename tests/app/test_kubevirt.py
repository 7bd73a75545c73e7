"""A VM of KubeVirt in an application: devices, ports that are shared, a migration, what has no screen."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.app.test_link import running
from tests.cli.support import Cli, blank, in_thread
from tests.transport.fake_kubevirt import TOKEN, FakeKubevirt, Kubeconfig, in_memory, kubevirt, status

from farplug.app import retry
from farplug.app.commands import Attach, Detach
from farplug.app.settings import Source, TargetSettings
from farplug.control.names import default_name
from farplug.errors import GuestGoneError, PortError, Reason, TargetError
from farplug.usbredir import packets

TARGET = "kubevirt://lab/vm1"
cli = pytest.fixture(lambda capfd: Cli(capfd))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kubeconfig:
    monkeypatch.setattr(retry, "DELAYS", (0.01, 0.02))
    for name in ("a.raw", "b.raw", "c.raw", "d.raw", "e.raw"):
        blank(tmp_path / name)
    return Kubeconfig(tmp_path, monkeypatch)


async def test_a_port_is_opened_when_a_device_needs_it(home: Kubeconfig) -> None:
    sources = [Source.disk(home.folder / name) for name in ("a.raw", "b.raw", "c.raw", "d.raw", "e.raw")]
    async with kubevirt(home) as fake, running(TARGET, sources[0], reconnect=None) as session:
        await session.in_use()
        assert fake.used == [0]
        assert session.guest.snapshot()["name"] == "vm1"
        for count, source in enumerate(sources[1:4], start=2):
            (attached,) = (await session.app.do(Attach((source,))))["attachments"]
            assert attached["state"] == "in use"
            assert fake.used == [*range(count)]
        with pytest.raises(PortError, match="all of its 4 ports are taken") as fifth:
            await session.app.do(Attach((sources[4],)))
        assert "KubeVirt gives each 4 USB ports" in fifth.value.remedy
        await session.app.do(Detach("b.raw"))
        await session.app.do(Attach((sources[4],)))
        assert fake.used == [0, 1, 2, 3], "a port stays open"
    assert fake.closed == [1000] * 4


async def test_a_port_of_another_client_is_reported(home: Kubeconfig) -> None:
    fake = FakeKubevirt(in_memory()[1])
    async with kubevirt(home, fake), running(TARGET, Source.disk(home.folder / "a.raw"), reconnect=None) as session:
        await session.in_use()
        with pytest.raises(PortError) as caught:
            await session.app.do(Attach((Source.disk(home.folder / "b.raw"),)))
        assert caught.value.reason is Reason.CHANNEL_IN_USE
        assert not session.run.done()


async def test_a_migration_under_the_websockets(home: Kubeconfig) -> None:
    guest, slot = in_memory()
    fake = FakeKubevirt(slot, *(in_memory()[1] for _ in range(3)))
    sources = [Source.disk(home.folder / "a.raw"), Source.disk(home.folder / "b.raw")]
    async with kubevirt(home, fake), running(TARGET, *sources) as session:
        await session.in_use()
        before = session.places
        # The VM is gone on its old node; on the new one it is not ready at once, and the credentials are fetched anew.
        fake.answers = [
            status(400, "VMI is not running"),
            status(500, "Internal error occurred: dialing virt-handler: websocket: bad handshake"),
            status(404, 'virtualmachineinstance.kubevirt.io "vm1" not found', "vm1"),
        ]
        fake.token = "of-the-day-after"
        home.write(fake.address, {"token": fake.token})
        await fake.stop()
        lost = await session.named("lost")
        assert (lost.fields["reason"], "was stopped or migrated" in lost.message) == ("guest-gone", True)
        await session.named("back")
        await session.in_use()
        assert session.places == before
        assert sum(isinstance(packet, packets.DeviceConnect) for packet in guest.seen) == 2
        assert TOKEN not in str([event.fields for event in session.events])
        assert fake.token not in str([(event.message, event.fields) for event in session.events])


async def test_what_a_further_attempt_does_not_change(home: Kubeconfig) -> None:
    async with kubevirt(home) as fake, running(TARGET, Source.disk(home.folder / "a.raw")) as session:
        await session.in_use()
        fake.answers = [status(403, "forbidden")] * 2
        await fake.stop(1001)
        with pytest.raises(TargetError) as caught:
            await session.run
        assert caught.value.reason is Reason.FORBIDDEN
        assert len(fake.answers) == 1, "one attempt"


async def test_without_reconnecting_the_session_ends(home: Kubeconfig) -> None:
    async with kubevirt(home) as fake:
        async with running(TARGET, Source.disk(home.folder / "a.raw"), reconnect=None) as session:
            await session.in_use()
            await fake.stop()
            with pytest.raises(GuestGoneError) as caught:
                await session.run
        assert "connect again" in caught.value.remedy


async def test_the_screen_is_not_ours(home: Kubeconfig) -> None:
    async with kubevirt(home), running(TARGET) as session:
        await session.named("ready")
        for call in (session.guest.screen.frame(), session.guest.inputs.press("a")):
            with pytest.raises(TargetError) as caught:
                await call
            assert caught.value.reason in (Reason.NO_DISPLAY, Reason.NO_INPUTS)
            assert caught.value.remedy == "KubeVirt shows the screen of a VM over VNC: run virtctl vnc"


def test_names() -> None:
    context = "kubevirt://admin@lab/lab/vm1"
    assert TargetSettings(context).public_target == context, "a context is not a password"
    assert default_name("", context) == "admin-lab-lab-vm1"


def test_doctor(cli: Cli, home: Kubeconfig) -> None:
    with in_thread(lambda: kubevirt(home)) as fake:
        result = cli("doctor", TARGET)
        assert result.code == 0
        assert "ok      access              the kubeconfig\n" in result.out
        assert f"ok      reach               lab/vm1 at https://{fake.address}/prefix" in result.out
        assert "ok      usbredir 0          ready: farplug" in result.out
        assert "usbredir 1" not in result.out, "the ports are alike"
        result = cli("doctor", "kubevirt://lab/other")
        assert (result.code, "FAILED  reach " in result.out) == (4, True)
        assert "kubectl get vmi --namespace=lab" in result.err
        home.kubectl("exit 1")
        result = cli("doctor", TARGET)
        assert (result.code, "FAILED  access " in result.out) == (2, True)
