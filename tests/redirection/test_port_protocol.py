"""When the guest's packets are handled, and which answers are sent together."""

from __future__ import annotations

import asyncio
import itertools
import platform
import subprocess
import sys

import pytest
from tests.redirection.scripted import BULK_IN, BULK_OUT, INTERRUPT_IN, ScriptedDevice, kinds, settle

from farplug.redirection import events, port_protocol
from farplug.testing.memory import MemoryGuest
from farplug.usb import Status
from farplug.usb.share import PACKET_WORK, TURN_WORK
from farplug.usb.types import Buffer
from farplug.usbredir import envelope, packets
from farplug.usbredir.caps import ALL_CAPS, Cap


async def test_too_many_pending_transfers_pause_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port_protocol, "MAX_PENDING", 4)
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        pending = [guest.submit_in(BULK_IN, 1) for _ in range(10)]
        await settle()
        assert len(device.submitted) == 4
        for index in range(10):
            device.submitted[index].complete(Status.SUCCESS, b"x")
            await settle()
        assert all([(await item).data == b"x" for item in pending])


async def test_many_packets_at_once_do_not_block_the_event_loop() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        at_once = TURN_WORK // PACKET_WORK
        pending = [guest.submit_in(BULK_IN, 1) for _ in range(10 * at_once)]
        seen = [0]
        while seen[-1] < len(pending):
            await asyncio.sleep(0)
            seen.append(len(device.submitted))
        assert max(later - earlier for earlier, later in itertools.pairwise(seen)) == at_once
        for transfer in device.submitted:
            transfer.complete(Status.SUCCESS, b"x")
        assert all([(await item).data == b"x" for item in pending])


def record_writes(guest: MemoryGuest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the sizes of what the engine writes to its port, in bytes; the list grows with each write."""
    sizes: list[int] = []
    port = guest.redirection.port
    write = port.write

    def recorded(buffers: list[Buffer]) -> None:
        sizes.append(sum(map(len, buffers)))
        write(buffers)

    monkeypatch.setattr(port, "write", recorded)
    return sizes


async def test_answers_to_one_batch_of_packets_are_sent_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = ScriptedDevice()
    monkeypatch.setattr(device, "submit", lambda transfer: transfer.complete(Status.SUCCESS, bytes(transfer.length)))
    async with MemoryGuest(device) as guest:
        sizes = record_writes(guest, monkeypatch)
        answers = [guest.submit_in(BULK_IN, 512) for _ in range(8)]
        assert [len((await answer).data) for answer in answers] == [512] * 8
        assert len(sizes) == 1
        sizes.clear()
        answers = [guest.submit_in(BULK_IN, port_protocol.FLUSH_ABOVE // 4) for _ in range(12)]
        assert all([len((await answer).data) == port_protocol.FLUSH_ABOVE // 4 for answer in answers])
        assert len(sizes) == 3, "answers are not queued without a bound"


async def test_answers_that_a_device_completes_later_are_sent_together(monkeypatch: pytest.MonkeyPatch) -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        sizes = record_writes(guest, monkeypatch)
        small, other, large = (
            guest.submit_in(BULK_IN, 1),
            guest.submit_out(BULK_OUT, b"x"),
            guest.submit_in(BULK_IN, 1 << 20),
        )
        await settle()
        device.submitted[0].complete(Status.SUCCESS, b"x")
        device.submitted[1].complete()
        assert not sizes
        assert ((await small).data, (await other).length) == (b"x", 1)
        assert len(sizes) == 1
        device.submitted[2].complete(Status.SUCCESS, bytes(1 << 20))
        assert len(sizes) == 2, "a large answer is sent at once"
        assert len((await large).data) == 1 << 20


async def test_packets_wait_while_an_operation_runs() -> None:
    device = ScriptedDevice()
    gate = asyncio.Event()
    reset = device.reset

    async def slow_reset() -> Status:
        await gate.wait()
        return await reset()

    device.reset = slow_reset  # type: ignore[method-assign]
    async with MemoryGuest(device) as guest:
        guest.send(packets.SetConfiguration(id=101, configuration=1))
        guest.reset()
        pending = guest.submit_in(BULK_IN, 10)
        await settle()
        assert device.submitted == []
        gate.set()
        await guest.wait(lambda: events.PortReset in kinds(guest))
        await settle()
        device.submitted[0].complete(Status.SUCCESS, b"after")
        assert (await pending).data == b"after"


async def test_a_packet_of_a_device_that_cannot_be_encoded_is_a_fault() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        guest.send(packets.StartInterruptReceiving(endpoint=INTERRUPT_IN))
        await settle()
        assert device.listener is not None
        device.listener.received(INTERRUPT_IN, Status.SUCCESS, bytes(70_000))
        assert kinds(guest).count(events.DeviceFault) == 1
        assert not guest.violations
        guest.faults.clear()


async def test_on_a_port_that_keeps_unread_data_nothing_is_sent_before_the_guests_hello() -> None:
    guest = MemoryGuest(paused=True)
    guest.redirection.port.keeps_unread = True
    async with guest:
        await settle()
        assert guest.received == []
        guest.resume()
        attaching = asyncio.ensure_future(guest.redirection.attach(ScriptedDevice()))
        await guest.wait(lambda: guest.connected is not None)
        await attaching
        assert isinstance(guest.received[0], packets.Hello)


@pytest.mark.parametrize("missing", [Cap.NONE, Cap.IDS_64_BITS, Cap.BULK_STREAMS, Cap.BULK_RECEIVING, Cap.FILTER])
async def test_on_a_port_that_keeps_unread_data_a_new_parser_skips_all_messages(
    missing: Cap, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = MemoryGuest(caps=ALL_CAPS & ~missing)
    port = guest.redirection.port
    port.keeps_unread = True
    written: list[bytes] = []
    write = port.write

    def recorded(buffers: list[Buffer]) -> None:
        written.append(b"".join(buffers))
        write(buffers)

    monkeypatch.setattr(port, "write", recorded)
    device = ScriptedDevice()
    async with guest:
        await guest.redirection.attach(device)
        reading = guest.submit_in(BULK_IN, 1 << 20)
        await settle()
        device.submitted[0].complete(Status.SUCCESS, bytes(1 << 20))
        assert len((await reading).data) == 1 << 20
        await guest.redirection.detach()
    hello, *messages = written
    assert len(messages) >= 3
    for message in messages:
        prefix, suffix = envelope.enclose([], max(len(message) - envelope.OVERHEAD, 0))
        assert (message.startswith(prefix) and message.endswith(suffix)) is (missing is Cap.NONE)
    assert hello.startswith(bytes(4)), "a hello"


PAGE_FAULTS = """
import asyncio, resource
from farplug.testing.memory import MemoryGuest

def page_faults_of_large_writes():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        payloads = [bytearray(512 << 10) for _ in range(4)]
        del payloads
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

async def main():
    page_faults_of_large_writes()
    before = page_faults_of_large_writes()
    async with MemoryGuest():
        page_faults_of_large_writes()
        print(before, page_faults_of_large_writes())

asyncio.run(main())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have rules of their own")
def test_the_memory_of_large_writes_is_kept_for_the_next() -> None:
    output = subprocess.run([sys.executable, "-c", PAGE_FAULTS], check=True, capture_output=True, text=True).stdout
    before, after = map(int, output.split())
    assert before > 20 * 4 * 64, "the rules of this C library are others"
    assert after < 20 * 4
