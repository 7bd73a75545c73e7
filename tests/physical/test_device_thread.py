from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from tests.physical.support import until

import farplug
from farplug.physical.device_thread import DeviceThread

ROOT = Path(__file__).parents[2]


async def test_calls_are_made_one_after_the_other_and_the_last_one_last() -> None:
    calls: list[str] = []
    worker = DeviceThread("test", lambda: calls.append("last"))
    threads: list[threading.Thread] = []

    def slow() -> None:
        threads.append(threading.current_thread())
        time.sleep(0.05)
        calls.append("slow")

    worker.call(slow)
    worker.call(lambda: calls.append("quick"))
    await worker.stop()
    assert threads == [worker._thread]
    assert calls == ["slow", "quick", "last"]
    await until(lambda: not worker._thread.is_alive())


async def test_results_and_exceptions_are_returned() -> None:
    worker = DeviceThread("test", lambda: None)
    assert await worker.call(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        await worker.call(lambda: 1 // 0)
    await worker.stop()


async def test_a_call_is_made_even_if_its_caller_was_cancelled() -> None:
    calls: list[int] = []
    worker = DeviceThread("test", lambda: None)
    gate = threading.Event()
    first, second = worker.call(gate.wait), worker.call(lambda: calls.append(1))
    first.cancel()
    second.cancel()
    gate.set()
    await worker.stop()
    assert calls == [1]


def test_calls_after_the_end_of_the_loop() -> None:
    gate = threading.Event()
    calls: list[int] = []

    async def begin() -> DeviceThread:
        worker = DeviceThread("test", lambda: calls.append(3))
        worker.call(gate.wait)
        worker.call(lambda: calls.append(1))
        return worker

    worker = asyncio.run(begin())
    gate.set()
    worker.finish(time.monotonic() + 10)
    assert calls == [1, 3]
    worker.finish(time.monotonic() + 10)
    assert calls == [1, 3]


SECOND_INTERRUPT = """
            from farplug.cli import session
            from farplug.cli.output import SilentOutput

            leaving = session._Session(None, SilentOutput())
            leaving._interrupted, leaving._keeper = True, object()
            leaving._interrupt()
"""


@pytest.mark.parametrize("end", ["", "raise KeyboardInterrupt", "sys.exit(3)", SECOND_INTERRUPT])
def test_the_exit_of_the_process_releases_devices(end: str) -> None:
    script = f"""
        import asyncio, sys
        from tests.libusb.fake_libusb import FakeDevice
        from tests.physical.support import EVERYTHING, on_bench

        bench = on_bench(FakeDevice(EVERYTHING, drivers={{0: "storage"}}))

        class Printed(list):
            def append(self, item):
                super().append(item)
                print(item, flush=True)

        async def main():
            await bench.device.open(bench.listener)
            bench.read(512)
            bench.fake.calls = Printed()
            {end}

        asyncio.run(main())
    """
    result = run(script)
    assert result.stdout.split("\n")[-4:] == ["reset", "attach 0", "close", ""], result


def test_a_device_that_hangs_does_not_keep_the_process_alive() -> None:
    script = """
        import asyncio, threading
        from farplug.physical import device_thread

        device_thread.EXIT_TIMEOUT = 0.1

        async def main():
            device_thread.DeviceThread("test", lambda: None).call(threading.Event().wait)

        asyncio.run(main())
    """
    assert run(script).returncode == 0


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={"PYTHONPATH": f"{Path(farplug.__file__).parents[1]}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=50,
    )
