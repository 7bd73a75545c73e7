"""A Locust user that has a session with a VM: the base class for locustfiles.

Locust must be imported before: it replaces the sockets and threads of the process. ``locust -f locustfile.py`` does
that.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Protocol

from farplug.control.messages import ErrorData
from farplug.errors import FarplugError, Reason, Remedy, SetupError, StateError, TargetError, UsageError
from farplug.exit_codes import exit_code
from farplug.load.client import Agent, Watch
from farplug.load.targets import Lease, Pool, read_targets, read_vv


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ImportError:
        return False


if "locust" not in sys.modules:
    if not _is_installed("locust"):
        raise SetupError(
            "load tests need the Python package locust, which is not installed",
            reason=Reason.MISSING_PROGRAM,
            remedy=Remedy("install it:", command="pip install 'farplug[load]'"),
        )
    raise StateError(
        "farplug.load.user is for locustfiles: Locust was not imported before",
        remedy=Remedy("start Locust:", command="locust -f locustfile.py"),
    )

import gevent
from gevent.event import AsyncResult
from gevent.lock import BoundedSemaphore
from locust import User, constant, events
from locust.env import Environment
from locust.exception import RescheduleTask, StopUser
from locust.runners import STATE_MISSING, MasterRunner, WorkerRunner

log = logging.getLogger(__name__)

SESSION = "session"
"""The type of requests that users make."""
STAGE = "stage"
"""The type of requests that are parts of another one."""
MIB = 1 << 20

_ACQUIRE, _ACQUIRED, _RELEASE = "farplug-acquire", "farplug-acquired", "farplug-release"
_ANSWER_TIMEOUT = 30.0
"""Seconds that a worker waits for a target from the master."""
_END_INTERVAL = 0.5
"""Seconds between two checks whether all sessions of a limited number have ended."""


class LoadFailure(Exception):
    """A request of a user failed. Failures of the same kind have the same text, so that Locust counts them together."""

    def __init__(self, error: FarplugError) -> None:
        text = re.sub(r"\S+:\d+\b", "TARGET", f"{error.message}")
        text = re.sub(r"\busbredir \d+", "usbredir", text)
        super().__init__(f"{error.reason}: {text}")

    def __repr__(self) -> str:
        return str(self)


class FarplugUser(User):
    """A user with at most one session at a time.

    Each method is a request in Locust's statistics: ``connect`` and its stages ``link`` and ``hello``, ``attach``,
    ``read 1 MiB``, ``write 1 MiB``, ``detach``, ``close``. One that fails is counted, closes the session, and ends
    the task: Locust begins the next one after ``wait_time``.

    Attributes:
        timeout: seconds of one request.
        wait_time: between two tasks.
    """

    abstract = True
    timeout: ClassVar[float] = 30.0
    wait_time: Callable[..., float] = constant(1)

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self._lease: Lease | None = None
        self._agent: Agent | None = None
        self._number: int | None = None

    def vv_of(self, target: str) -> str | None:
        """Return the ``.vv`` file for a target of the list that is about to be used; None: the target is an address.

        Override it to get the file, or a fresh token, from a proxy. It runs before the time is taken.

        Args:
            target: as it is listed; a path of a ``.vv`` file was read by the master, and does not get here.

        Raises:
            FarplugError: the session fails with it.
        """
        return None

    def connect(self) -> None:
        """Connect to a free target: link all channels, and wait until the VM's ports are ready."""
        if self._number is not None:
            raise StateError("the user has a session already")
        try:
            lease, vv = _targets.acquire(self.environment)
            self._lease = lease
            if vv is None:
                vv = self.vv_of(lease.target)
            self._agent = _agents.current()
        except FarplugError as error:
            self._fail("connect", error)
        self._number = _agents.next_session()
        result = self._request("connect", "connect", target=lease.target, vv=vv)
        for stage in ("link", "hello"):
            self._fire(STAGE, stage, result[stage])

    def attach(self, size: int = 64 * MIB) -> None:
        """Plug a disk in, and wait until the VM has configured it.

        Args:
            size: bytes. It bounds the memory that is used for what the VM writes.
        """
        self._request("attach", "attach", size=size)

    def read(self, size: int = MIB) -> None:
        """Wait until the VM has read data; its own programs read. The time is that which the VM needed.

        Args:
            size: bytes.
        """
        self._request("read", f"read {_of(size)}", size=size, length=size)

    def write(self, size: int = MIB) -> None:
        """Wait until the VM has written data; its own programs write. The time is that which the VM needed.

        Args:
            size: bytes.
        """
        self._request("write", f"write {_of(size)}", size=size, length=size)

    def detach(self) -> None:
        """Take the disk out of the VM."""
        self._request("detach", "detach")

    def close(self) -> None:
        """End the session; the target is free."""
        self._request("close", "close")
        self._number = None
        self._release()

    def on_stop(self) -> None:
        """End the session, if there is one: the test is over."""
        self._abandon()

    def _request(self, method: str, name: str, *, length: int = 0, **params: Any) -> Mapping[str, Any]:
        if self._agent is None or self._number is None:
            raise StateError("the user has no session: connect first")
        try:
            result = self._agent.call(method, self.timeout, session=self._number, **params)
        except FarplugError as error:
            if method == "connect":
                self._number = None  # the agent has closed it
            self._fail(name, error)
        self._fire(SESSION, name, result["seconds"], length)
        return result

    def _fire(self, kind: str, name: str, seconds: float, length: int = 0) -> None:
        self.environment.events.request.fire(
            request_type=kind,
            name=name,
            response_time=1000 * seconds,
            response_length=length,
            exception=None,
            context=self.context(),
        )

    def _fail(self, name: str, error: FarplugError) -> None:
        """Count a failure, end the session, and end the task."""
        log.warning("%s: %s", name, _with_remedy(error))
        self._abandon()
        self.environment.events.request.fire(
            request_type=SESSION,
            name=name,
            response_time=None,
            response_length=0,
            exception=LoadFailure(error),
            context={**self.context(), "error": error.as_dict()},
        )
        raise RescheduleTask

    def _abandon(self) -> None:
        """End the session without counting anything."""
        number, self._number = self._number, None
        if number is not None and self._agent is not None:
            self._agent.post("close", session=number)
        self._release()

    def _release(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            _targets.release(self.environment, lease)


def _of(size: int) -> str:
    return f"{size // MIB} MiB" if size % MIB == 0 else f"{size} bytes"


def _with_remedy(error: FarplugError) -> str:
    remedy = " ".join(part for part in (str(error.remedy), error.remedy.command) if part)
    return f"{error.message} ({remedy})" if remedy else error.message


class _Agents:
    """The load agent of this process. One that has ended is replaced."""

    def __init__(self) -> None:
        self._agent: Agent | None = None
        self._watch: Watch | None = None
        self._sessions = 0
        self._stopping: gevent.Greenlet | None = None
        self._starting = BoundedSemaphore()

    def next_session(self) -> int:
        """Return a number for a new session."""
        self._sessions += 1
        return self._sessions

    def current(self) -> Agent:
        """Return the agent; start one if there is none, or it has ended.

        Raises:
            SetupError: it cannot be started.
        """
        with self._starting:
            if self._agent is None or self._agent.ended is not None:
                self._agent = Agent()
                self._watch = Watch(self._agent)
            return self._agent

    def stop(self) -> None:
        """Begin to end the agent: Locust waits only half a second for the last statistics of a worker."""
        agent, self._agent = self._agent, None
        watch, self._watch = self._watch, None
        if agent is not None and watch is not None:
            self._stopping = gevent.spawn(_end, agent, watch)

    def stopped(self) -> None:
        """Wait until the agent has ended."""
        if self._stopping is not None:
            self._stopping.join()


def _end(agent: Agent, watch: Watch) -> None:
    watch.stop()
    agent.close()


class _Runner(Protocol):
    """What is needed of Locust's runners, which the master and the workers have alike."""

    def send_message(self, msg_type: str, data: Any = None, client_id: str | None = None) -> None: ...


class _Targets:
    """Who uses which target: the master has the pool, users ask it with messages."""

    def __init__(self) -> None:
        self._pool: Pool | None = None
        self._asked: dict[int, AsyncResult] = {}
        self._questions = 0
        self._ending: gevent.Greenlet | None = None

    # In the process of a user

    def acquire(self, environment: Environment) -> tuple[Lease, str | None]:
        """Return a free target, and its ``.vv`` file if it is one.

        Raises:
            FarplugError: there is none.
            StopUser: no more sessions are wanted.
        """
        self._questions += 1
        question, answer = self._questions, AsyncResult()
        self._asked[question] = answer
        try:
            _runner(environment).send_message(_ACQUIRE, {"question": question})
            data = answer.get(timeout=_ANSWER_TIMEOUT)
        except gevent.Timeout:
            raise TargetError(
                "the Locust master has sent no target", reason=Reason.TIMED_OUT, remedy="read the master's log"
            ) from None
        finally:
            del self._asked[question]
        if "error" in data:
            raise ErrorData.parse(data["error"]).error()
        if data["number"] is None:
            raise StopUser
        return Lease(data["number"], data["target"], ""), data["vv"]

    def acquired(self, environment: Environment, msg: Any) -> None:
        """Pass the master's answer on to the user that asked."""
        if (answer := self._asked.get(msg.data["question"])) is not None:
            answer.set(msg.data)
        elif msg.data.get("number") is not None:  # the user was stopped meanwhile
            _runner(environment).send_message(_RELEASE, {"number": msg.data["number"]})

    def release(self, environment: Environment, lease: Lease) -> None:
        """Give a target back."""
        _runner(environment).send_message(_RELEASE, {"number": lease.number})

    # In the process of the master

    def open(self, environment: Environment) -> None:
        """Read the list of targets.

        Raises:
            UsageError: it cannot be used.
        """
        options = environment.parsed_options
        if options is None or not options.farplug_targets:
            raise UsageError(
                "a load test needs a list of targets",
                reason=Reason.BAD_SETTING,
                remedy="name a file with one target a line in the environment variable FARPLUG_TARGETS",
            )
        self._pool = Pool(read_targets(Path(options.farplug_targets)), options.farplug_sessions or None)

    def begin(self, environment: Environment) -> None:
        """Begin a test."""
        if self._pool is not None:
            self._pool.reset()
            if self._ending is None or self._ending.ready():
                self._ending = gevent.spawn(self._end_when_over, self._pool, environment)

    def _end_when_over(self, pool: Pool, environment: Environment) -> None:
        """End the test once all sessions that were wanted have ended, or were those of workers that have died."""
        while not pool.over:
            gevent.sleep(_END_INTERVAL)
            if pool.used_up:
                self._reclaim(pool, environment)
        runner = environment.runner
        if runner is not None and environment.web_ui is None:
            runner.quit()
        elif runner is not None:
            runner.stop()

    def wanted(self, environment: Environment, msg: Any) -> None:
        """Answer a user that wants a target."""
        assert self._pool is not None
        data: dict[str, Any] = {"question": msg.data["question"]}
        try:
            if self._pool.used_up:
                data |= {"number": None}
            else:
                self._reclaim(self._pool, environment)
                lease = self._pool.acquire(msg.node_id)
                data |= {"number": lease.number, "target": lease.target, "vv": None}
                if lease.target.endswith(".vv"):
                    try:
                        data["vv"] = read_vv(Path(lease.target))
                    except FarplugError:
                        self._pool.release(lease.number)
                        raise
        except FarplugError as error:
            data = {"question": msg.data["question"], "error": ErrorData.of(error).to_json()}
        _runner(environment).send_message(_ACQUIRED, data, msg.node_id)

    def _reclaim(self, pool: Pool, environment: Environment) -> None:
        """Release the targets of workers that have died."""
        if isinstance(environment.runner, MasterRunner):
            alive = {node.id for node in environment.runner.clients.all if node.state != STATE_MISSING}
            for holder in pool.holders - alive:
                log.warning("the targets of worker %s, which has died, are free again", holder)
                pool.drop(holder)

    def released(self, environment: Environment, msg: Any) -> None:
        """Release a target."""
        assert self._pool is not None
        self._pool.release(msg.data["number"])


def _runner(environment: Environment) -> _Runner:
    assert environment.runner is not None
    return environment.runner


_targets = _Targets()
_agents = _Agents()


def _add_options(parser: Any) -> None:
    parser.add_argument(
        "--farplug-targets",
        metavar="FILE",
        env_var="FARPLUG_TARGETS",
        default="",
        help="The targets, one a line: spice://HOST:PORT, or the path of a .vv file on the master's machine",
    )
    parser.add_argument(
        "--farplug-sessions",
        metavar="N",
        env_var="FARPLUG_SESSIONS",
        type=int,
        default=0,
        help="End the test after N sessions in all",
    )


def _initialized(environment: Environment, runner: Any, **_: Any) -> None:
    if isinstance(runner, WorkerRunner):
        runner.register_message(_ACQUIRED, _targets.acquired)
        return
    try:
        _targets.open(environment)
    except FarplugError as error:
        log.error("%s", _with_remedy(error))
        sys.exit(int(exit_code(error)))
    if runner is not None:
        runner.register_message(_ACQUIRE, _targets.wanted)
        runner.register_message(_RELEASE, _targets.released)
        if not isinstance(runner, MasterRunner):
            runner.register_message(_ACQUIRED, _targets.acquired)


def _begins(environment: Environment, **_: Any) -> None:
    _targets.begin(environment)


def _stopped(environment: Environment, **_: Any) -> None:
    _agents.stop()


def _quits(environment: Environment, **_: Any) -> None:
    _agents.stop()
    _agents.stopped()


events.init_command_line_parser.add_listener(_add_options)
events.init.add_listener(_initialized)
events.test_start.add_listener(_begins)
events.test_stop.add_listener(_stopped)
events.quitting.add_listener(_quits)
