"""A real QEMU's usb-redir sockets behind an API server as that of KubeVirt: TLS, tokens, websockets."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import pytest
from tests.app.test_link import running
from tests.guest.plugging import GUEST_TIMEOUT, MIB
from tests.guest.test_reconnect import in_use
from tests.transport.fake_kubevirt import FakeKubevirt, Kubeconfig, socket_of, status

from farplug.app.commands import Attach
from farplug.app.settings import Source
from farplug.testing import QemuGuest

READ = """
    for disk in /dev/sd?; do
        [ "$(head -c 5 $disk)" = {name} ] && sha256sum <$disk && break
    done 2>/dev/null; :
"""
WRITE = """
    for disk in /dev/sd?; do
        [ "$(head -c 5 $disk)" = {name} ] || continue
        dd if=/dev/urandom of=$disk bs=1M seek=1 count=4 conv=fsync 2>/dev/null && sha256sum <$disk
    done
"""


async def digest(guest: QemuGuest, name: str) -> str:
    """Wait until the guest has a disk whose first bytes are a name; return what it reads of the disk."""
    async with asyncio.timeout(GUEST_TIMEOUT):
        while not (printed := await guest.check(READ.format(name=name))):
            await asyncio.sleep(0.1)
    return printed.split()[0]


async def test_disks_through_the_kubernetes_api(
    guest: QemuGuest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Kubeconfig(tmp_path, monkeypatch)
    images = [tmp_path / name for name in ("alpha.raw", "gamma.raw")]
    for image in images:
        image.write_bytes(image.stem.encode() + os.urandom(8 * MIB - 5))
    expected = [hashlib.sha256(image.read_bytes()).hexdigest() for image in images]
    fake = FakeKubevirt(*(socket_of(target) for target in guest.targets if not target.startswith("spice")))
    async with asyncio.timeout(4 * GUEST_TIMEOUT), fake.running(home.server_context()):
        home.write(fake.address)
        async with running("kubevirt://lab/vm1", Source.disk(images[0])) as session:
            await session.in_use()
            await session.app.do(Attach((Source.disk(images[1]),)))
            assert fake.used == [0, 1]
            assert [await digest(guest, image.stem) for image in images] == expected
            (written,) = (await guest.check(WRITE.format(name="gamma"))).split()[:1]
            assert hashlib.sha256(images[1].read_bytes()).hexdigest() == written
            # The VM is migrated: the websockets end, and KubeVirt needs a moment.
            fake.answers = [status(400, "VMI is not running")]
            await fake.stop()
            await session.named("back")
            await in_use(session, "alpha.raw", "gamma.raw")
            assert [await digest(guest, image.stem) for image in images] == [expected[0], written]
        while fake.open:
            await asyncio.sleep(0.01)
    assert fake.closed[-2:] == [1000, 1000]
    await guest.check("while ls /dev/sd? 2>/dev/null; do busybox sleep 0.1; done; :")
