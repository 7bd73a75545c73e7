"""A load agent, as a Locust process uses it: blocking calls, which gevent turns into switches between users."""

from __future__ import annotations

import itertools
import logging
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from threading import Event, Lock, Thread
from typing import Any

from farplug.control.messages import (
    MAX_PAYLOAD,
    Failure,
    FromServer,
    Receiver,
    Reply,
    Request,
    encode,
    parse_reply,
)
from farplug.errors import Reason, RemoteProtocolError, SessionError, SetupError
from farplug.exit_codes import ExitCode
from farplug.programs import child_environment

log = logging.getLogger(__name__)

MARGIN = 30.0
"""Seconds beyond the timeout of a call after which the agent itself counts as unresponsive."""
WATCH_INTERVAL = 5.0
"""Seconds between two looks at the figures of an agent."""
BUSY = 0.9
"""Share of a processor from which an agent is too busy to measure anything but itself."""
LATE = 0.25
"""Seconds by which the event loop of an agent may be late, before its times are wrong."""


class _Call:
    def __init__(self) -> None:
        self.over = Event()
        self.answer: FromServer | SessionError | None = None

    def end(self, answer: FromServer | SessionError) -> None:
        self.answer = answer
        self.over.set()


class Agent:
    """A load agent in a process of its own, which ends with this object or with this process.

    Calls may be made from any thread.

    Attributes:
        pid: the agent's process.
        ended: why it has ended; None: it runs.

    Raises:
        SetupError: it cannot be started.
    """

    def __init__(self) -> None:
        if sys.platform == "win32":
            raise SetupError("load tests do not run on Windows", reason=Reason.UNSUPPORTED_SYSTEM)
        self.ended: SessionError | None = None
        self._calls: dict[int, _Call] = {}
        self._ids = itertools.count(1)
        self._lock = Lock()
        self._closing = False
        self._socket, theirs = socket.socketpair()
        with theirs:
            number = theirs.fileno()
            command = [sys.executable, "-P", "-m", "farplug.load.agent", str(number)]
            try:
                self._process = subprocess.Popen(
                    command,
                    pass_fds=[number],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # a Ctrl-C ends Locust, which ends the agent
                    env=child_environment(),
                )
            except OSError as error:
                self._socket.close()
                raise SetupError(
                    f"the load agent cannot be started: {error.strerror}", reason=Reason.MISSING_PROGRAM
                ) from error
        self.pid = self._process.pid
        self._reader = Thread(target=self._read, name="load agent", daemon=True)
        self._reader.start()

    def call(self, method: str, timeout: float, **params: Any) -> Mapping[str, Any]:
        """Call a method of the agent; return its result.

        Args:
            method: see :mod:`farplug.load.agent`.
            timeout: seconds for the VM.
            params: the parameters; those that are None are left out.

        Raises:
            SessionError: the call failed, or the agent ended (``session-gone``).
        """
        number = next(self._ids)
        given = {name: value for name, value in params.items() if value is not None}
        call = self._calls[number] = _Call()
        try:
            if self.ended is not None:
                raise self.ended
            self._send(Request(number, method, {**given, "timeout": timeout}))
            if not call.over.wait(timeout + MARGIN):
                raise SessionError(
                    f"the load agent did not answer within {timeout + MARGIN:g} s",
                    reason=Reason.TIMED_OUT,
                    exit_code=ExitCode.UNREACHABLE,
                    remedy="use more Locust workers: each has an agent",
                )
        finally:
            del self._calls[number]
        match call.answer:
            case Reply(result=dict(result)):
                return result
            case Failure(error=error):
                raise error.error()
            case SessionError() as error:
                raise error
        raise RemoteProtocolError(f"{call.answer} is not an answer of a load agent")

    def post(self, method: str, **params: Any) -> None:
        """Call a method of the agent, and do not wait for its end."""
        self._send(Request(next(self._ids), method, params))

    def _send(self, request: Request) -> None:
        data = encode(request)
        with suppress(OSError), self._lock:  # the reader notices the end
            self._socket.sendall(data)

    def close(self) -> None:
        """End the agent with all its sessions, and wait for it."""
        self._closing = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        self._reader.join()

    def _read(self) -> None:
        receiver = Receiver(parse_reply, MAX_PAYLOAD)
        try:
            while data := self._socket.recv(1 << 16):
                receiver.receive_data(data)
                while (message := receiver.next_message()) is not None:
                    self._answered(message)
        except OSError:
            pass  # the agent has ended
        except RemoteProtocolError as error:
            log.error("load agent %d: %s", self.pid, error.message)
            self._process.kill()
        self._socket.close()
        self._end(self._process.wait())

    def _answered(self, message: FromServer) -> None:
        match message:
            case Reply(id=int(number)) | Failure(id=int(number)):
                if (call := self._calls.get(number)) is not None:
                    call.end(message)

    def _end(self, status: int) -> None:
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"
        self.ended = SessionError(
            f"the load agent ended with {how}, and all its sessions",
            reason=Reason.SESSION_GONE,
            exit_code=ExitCode.GUEST_GONE,
            remedy="read what it wrote to the terminal of the Locust worker; the next session starts another agent",
        )
        if not self._closing:
            log.error("load agent %d: %s; %s", self.pid, self.ended.message, self.ended.remedy)
        for call in list(self._calls.values()):
            call.end(self.ended)


class Watch:
    """Looks at the figures of an agent from time to time, in a thread, and warns if the agent itself is the limit.

    Args:
        agent: is looked at until it ends, or :meth:`stop` is called.
        interval: seconds between two looks.
    """

    def __init__(self, agent: Agent, interval: float = WATCH_INTERVAL) -> None:
        self._agent = agent
        self._interval = interval
        self._stopped = Event()
        self._cpu = 0.0
        self._thread = Thread(target=self._run, name="watch of a load agent", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the watch, and log what the agent has done."""
        self._stopped.set()
        self._thread.join()
        if self._agent.ended is None:
            with suppress(SessionError):
                log.info("load agent %d: %s", self._agent.pid, summary(self._agent.call("figures", 0)))

    def _run(self) -> None:
        while not self._stopped.wait(self._interval):
            try:
                self._look(self._agent.call("figures", 0))
            except SessionError:
                return

    def _look(self, figures: Mapping[str, Any]) -> None:
        share = (figures["cpu"] - self._cpu) / self._interval
        self._cpu = figures["cpu"]
        if share > BUSY or figures["delay"] > LATE:
            log.warning(
                "load agent %d uses %.0f %% of a processor, and its event loop was late by up to %.0f ms: this machine "
                "is the limit, and the times are not those of the servers; use more workers, on more machines",
                *(self._agent.pid, 100 * share, 1000 * figures["delay"]),
            )


def summary(figures: Mapping[str, Any]) -> str:
    """Return the figures of an agent as text."""
    total, most = figures["total"], figures["most"]
    grown = (figures["peak_memory"] - figures["memory"]) / 2**20
    return (
        f"{total} sessions, at most {most} at once; {figures['cpu']:.1f} s of processor time, "
        f"{1000 * figures['cpu'] / max(total, 1):.1f} ms for each; {figures['peak_memory'] / 2**20:.0f} MiB of memory, "
        f"{grown / max(most, 1):.2f} MiB for each at once"
    )
