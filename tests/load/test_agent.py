"""The load agent in its own process, called from threads, against VMs in memory behind real SPICE links."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.load.vms import serving, target

from farplug.control.messages import ErrorData
from farplug.errors import FarplugError, Reason, SessionError
from farplug.exit_codes import ExitCode
from farplug.load.agent import SPARE_FILES, LoadAgent, raise_file_limit
from farplug.load.client import Agent, Watch, summary

MIB = 1 << 20


@pytest.fixture
def agent() -> Iterator[Agent]:
    agent = Agent()
    yield agent
    agent.close()


async def call(agent: Agent, method: str, timeout: float = 30, **params: Any) -> Any:
    return await asyncio.to_thread(agent.call, method, timeout, **params)


async def fails(agent: Agent, method: str, timeout: float = 30, **params: Any) -> SessionError:
    with pytest.raises(SessionError) as caught:
        await call(agent, method, timeout, **params)
    return caught.value


async def test_two_sessions_side_by_side(agent: Agent, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    watch = Watch(agent)
    async with serving(ports=2) as port:

        async def session(number: int) -> None:
            result = await call(agent, "connect", session=number, target=target(number, port))
            assert result["seconds"] >= result["link"] > 0
            assert result["hello"] >= 0
            for method, params in (
                ("attach", {"size": 8 * MIB}),
                ("read", {"size": MIB}),
                ("write", {"size": MIB}),
                ("detach", {}),
            ):
                assert (await call(agent, method, session=number, **params))["seconds"] > 0, method

        await asyncio.gather(session(1), session(2))
        figures = await call(agent, "figures")
        assert (figures["sessions"], figures["most"], figures["total"]) == (2, 2, 2)
        for number in (1, 2):
            await call(agent, "close", session=number)
        assert (await call(agent, "figures"))["sessions"] == 0
    await asyncio.to_thread(watch.stop)
    assert "2 sessions, at most 2 at once" in caplog.text


async def test_a_vv_file_is_used_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    agent = Agent()
    async with serving(password="secret") as port:
        vv = f"[virt-viewer]\ntype=spice\nhost=127.0.0.1\nport={port}\npassword={{}}\ndelete-this-file=1\n"
        error = await fails(agent, "connect", session=1, target="a.vv", vv=vv.format("expired"))
        assert error.reason is Reason.WRONG_PASSWORD
        assert error.exit_code == ExitCode.DENIED
        await call(agent, "connect", session=1, target="a.vv", vv=vv.format("secret"))
        await call(agent, "close", session=1)
    assert [path.suffix for path in tmp_path.rglob("*")] == [""], "only the agent's folder"
    agent.close()
    assert not [*tmp_path.iterdir()]


async def test_what_the_vm_does_not_do_in_time(agent: Agent) -> None:
    async with serving(works=False) as port:
        await call(agent, "connect", session=1, target=target(1, port))
        error = await fails(agent, "attach", 0.2, session=1, size=MIB)
        assert error.reason is Reason.TIMED_OUT
        assert "has not configured the disk within 0.2 s" in error.message
    async with serving() as port:
        await call(agent, "connect", session=2, target=target(2, port))
        await call(agent, "attach", session=2, size=MIB)
        error = await fails(agent, "read", 0.5, session=2, size=100 * MIB)
        assert error.reason is Reason.TIMED_OUT
        assert "a program in the VM must read" in error.remedy


async def test_a_vm_that_goes_away(agent: Agent) -> None:
    async with serving() as port:
        await call(agent, "connect", session=1, target=target(1, port))
        await call(agent, "attach", session=1, size=MIB)
        waiting = asyncio.ensure_future(fails(agent, "read", session=1, size=100 * MIB))
        await call(agent, "figures")
    assert (await waiting).reason is Reason.GUEST_GONE
    assert (await fails(agent, "connect", session=2, target=target(2, port))).reason is Reason.CONNECTION_REFUSED


async def test_a_call_is_interrupted_by_the_end_of_its_session(agent: Agent) -> None:
    async with serving() as port:
        await call(agent, "connect", session=1, target=target(1, port))
        await call(agent, "attach", session=1, size=MIB)
        waiting = asyncio.ensure_future(fails(agent, "read", session=1, size=100 * MIB))
        await call(agent, "figures")
        agent.post("close", session=1)
        assert "the session was closed" in (await waiting).message
        assert (await fails(agent, "close", session=1)).reason is Reason.NO_SESSION


@pytest.mark.parametrize(
    ("method", "params", "reason"),
    [
        ("read", {"session": 1, "size": 1}, Reason.WRONG_STATE),
        ("detach", {"session": 1}, Reason.WRONG_STATE),
        ("connect", {"session": 1, "target": "spice://x:1"}, Reason.WRONG_STATE),
        ("attach", {"session": 1, "size": 5}, Reason.BAD_SETTING),
        ("attach", {"session": 1, "size": -1}, Reason.BAD_SETTING),
        ("attach", {"session": "x", "size": 512}, Reason.BAD_SETTING),
        ("attach", {"session": 7, "size": 512}, Reason.NO_SESSION),
        ("dance", {"session": 1}, Reason.UNKNOWN_COMMAND),
        ("connect", {"session": 2, "target": "nothing://"}, Reason.BAD_TARGET),
    ],
)
async def test_calls_that_are_not_possible(method: str, params: dict[str, Any], reason: Reason, tmp_path: Path) -> None:
    agent = LoadAgent(tmp_path, None)
    async with serving() as port:
        await agent.execute("connect", {"session": 1, "target": target(1, port), "timeout": 30})
        with pytest.raises(FarplugError) as caught:
            await agent.execute(method, {"timeout": 30, **params})
        assert caught.value.reason is reason
        assert agent.figures()["sessions"] == 1
        await agent.execute("close", {"session": 1})


async def test_a_limit_of_open_files(tmp_path: Path) -> None:
    agent = LoadAgent(tmp_path, SPARE_FILES)
    with pytest.raises(FarplugError, match=f"may open {SPARE_FILES} files: no more sessions") as caught:
        await agent.execute("connect", {"session": 1, "target": "spice://127.0.0.1:1", "timeout": 1})
    assert caught.value.reason is Reason.IO_ERROR
    assert "ulimit -n" in ErrorData.of(caught.value).remedy.command


async def test_the_real_limit_of_open_files(agent: Agent) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert raise_file_limit() == hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    async with serving(ports=4) as port:
        await call(agent, "connect", session=1, target=target(1, port))
        resource.prlimit(agent.pid, resource.RLIMIT_NOFILE, (14, hard))
        error = await fails(agent, "connect", session=2, target=target(2, port))
        assert error.reason is Reason.IO_ERROR
        assert "ulimit -n" in error.remedy.command
        await call(agent, "close", session=1)


async def test_an_agent_that_dies(agent: Agent) -> None:
    async with serving() as port:
        await call(agent, "connect", session=1, target=target(1, port))
        await call(agent, "attach", session=1, size=MIB)
        waiting = asyncio.ensure_future(fails(agent, "read", session=1, size=100 * MIB))
        await call(agent, "figures")
        os.kill(agent.pid, signal.SIGKILL)
        error = await waiting
    assert error.reason is Reason.SESSION_GONE
    assert "the load agent ended with signal SIGKILL" in error.message
    assert (await fails(agent, "connect", session=2, target="spice://x:1")).reason is Reason.SESSION_GONE
    assert agent.ended is not None
    assert summary({"total": 0, "most": 0, "cpu": 0.0, "peak_memory": 0, "memory": 0}).startswith("0 sessions")
