from __future__ import annotations

import asyncio

import pytest
import usb1
from tests.libusb.fake_libusb import FakeContext, FakeDevice, FakeHandle, FakeLibrary, FakeTransfer
from tests.physical.support import EVERYTHING, settle, until

from farplug.libusb.binding import UsbTransfer
from farplug.physical.event_handler import EventHandler


class Setting:
    """EventHandler of a fake session, and what they bring."""

    def __init__(self, *, polls: bool = True) -> None:
        self.library = FakeLibrary(device := FakeDevice(EVERYTHING))
        self.library.polls_nothing = not polls
        self.context = FakeContext(self.library)
        self.handle = FakeHandle(device, self.context)
        self.back: list[UsbTransfer] = []
        self.gone = 0
        self.events = EventHandler(self.context, self.deliver, self.lose)

    def deliver(self, transfer: UsbTransfer) -> None:
        self.back.append(transfer)

    def lose(self) -> None:
        self.gone += 1

    def submit(self) -> FakeTransfer:
        transfer = self.handle.getTransfer()
        transfer.setBulk(0x81, bytearray(4), self.events.completed, None)
        transfer.submit()
        return transfer

    def end(self) -> None:
        self.events.stop()
        self.events.join()
        self.context.close()


@pytest.mark.parametrize("polls", [True, False])
async def test_completions_are_delivered_on_the_event_loop(polls: bool) -> None:
    setting = Setting(polls=polls)
    sent = [setting.submit() for _ in range(5)]
    for transfer in sent:
        transfer.finish(b"x")
    await until(lambda: len(setting.back) == 5)
    assert setting.back == sent
    setting.end()


@pytest.mark.parametrize("polls", [True, False])
async def test_nothing_is_delivered_after_stop(polls: bool) -> None:
    setting = Setting(polls=polls)
    transfer = setting.submit()
    setting.events.stop()
    transfer.finish(b"x")
    await settle()
    assert not setting.back
    setting.end()


@pytest.mark.parametrize("polls", [True, False])
async def test_errors_of_event_handling_are_logged(polls: bool, caplog: pytest.LogCaptureFixture) -> None:
    setting = Setting(polls=polls)
    setting.library.event_errors += [usb1.USBErrorInterrupted(), usb1.USBErrorOther()]
    setting.submit().finish(b"x")
    await until(lambda: not setting.library.event_errors)
    setting.submit().finish(b"x")
    await until(lambda: len(setting.back) == 2)
    assert "libusb cannot handle events: LIBUSB_ERROR_OTHER" in caplog.text
    setting.end()


async def test_a_completion_that_raises_does_not_stop_the_others(caplog: pytest.LogCaptureFixture) -> None:
    setting = Setting()
    first, second = setting.submit(), setting.submit()

    def deliver(transfer: UsbTransfer) -> None:
        if transfer is first:
            raise ValueError("trouble")
        setting.back.append(transfer)

    setting.events._deliver = deliver
    first.finish()
    second.finish()
    await until(lambda: setting.back == [second])
    assert "trouble" in caplog.text
    setting.end()


async def test_stopped_by_a_completion() -> None:
    setting = Setting()
    first, second = setting.submit(), setting.submit()

    def deliver(transfer: UsbTransfer) -> None:
        setting.back.append(transfer)
        setting.events.stop()

    setting.events._deliver = deliver
    first.finish()
    second.finish()
    await settle()
    assert setting.back == [first]
    setting.end()


async def test_unplugged_while_nothing_is_in_flight() -> None:
    setting = Setting()
    setting.context.stop_watching()
    await until(lambda: setting.gone)
    await settle()
    assert setting.gone == 1
    setting.end()


async def test_a_loop_that_watches_no_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """As asyncio's default loop on Windows."""

    def refuse(*arguments: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(asyncio.get_running_loop(), "add_reader", refuse, raising=False)
    setting = Setting()
    setting.submit().finish(b"x")
    await until(lambda: setting.back)
    setting.end()


def test_completions_after_the_end_of_the_loop() -> None:
    async def begin() -> Setting:
        setting = Setting(polls=False)
        setting.submit()
        return setting

    setting = asyncio.run(begin())
    setting.handle.in_flight[0].finish()
    setting.end()
    assert not setting.back
