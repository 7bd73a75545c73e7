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
from farplug.physical.device_thread import Worker

ROOT = Path(__file__).parents[2]


async def test_calls_are_made_one_after_the_other_and_the_last_one_last() -> None:
    calls: list[str] = []
    worker = Worker("test", lambda: calls.append("last"))
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


async def test_results_and_errors_come_back() -> None:
    worker = Worker("test", lambda: None)
    assert await worker.call(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        await worker.call(lambda: 1 // 0)
    await worker.stop()


async def test_a_call_is_made_even_if_nobody_waits_for_it() -> None:
    calls: list[int] = []
    worker = Worker("test", lambda: None)
    gate = threading.Event()
    first, second = worker.call(gate.wait), worker.call(lambda: calls.append(1))
    first.cancel()
    second.cancel()
    gate.set()
    await worker.stop()
    assert calls == [1]


def test_a_loop_that_ended_is_not_missed() -> None:
    gate = threading.Event()
    calls: list[int] = []

    async def begin() -> Worker:
        worker = Worker("test", lambda: calls.append(3))
        worker.call(gate.wait)
        worker.call(lambda: calls.append(1))
        return worker

    worker = asyncio.run(begin())
    gate.set()
    worker.end(time.monotonic() + 10)
    assert calls == [1, 3]
    worker.end(time.monotonic() + 10)
    assert calls == [1, 3]


SECOND_INTERRUPT = """
            from farplug.cli import session
            from farplug.cli.output import SilentOutput

            leaving = session._Session(None, SilentOutput())
            leaving._interrupted, leaving._keeper = True, object()
            leaving._interrupt()
"""


@pytest.mark.parametrize("end", ["", "raise KeyboardInterrupt", "sys.exit(3)", SECOND_INTERRUPT])
def test_the_exit_of_the_process_gives_devices_back(end: str) -> None:
    script = f"""
        import asyncio, sys
        from tests.libusb.fake_libusb import FakeDevice
        from tests.physical.support import EVERYTHING, on_bench

        bench = on_bench(FakeDevice(EVERYTHING, drivers={{0: "storage"}}))

        class Tell(list):
            def append(self, item):
                super().append(item)
                print(item, flush=True)

        async def main():
            await bench.device.open(bench.listener)
            bench.read(512)
            bench.fake.calls = Tell()
            {end}

        asyncio.run(main())
    """
    result = run(script)
    assert result.stdout.split("\n")[-4:] == ["reset", "attach 0", "close", ""], result


def test_a_device_that_hangs_does_not_keep_the_process() -> None:
    script = """
        import asyncio, threading
        from farplug.physical import device_thread

        device_thread.EXIT_PATIENCE = 0.1

        async def main():
            device_thread.Worker("test", lambda: None).call(threading.Event().wait)

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
