"""Start processes of farplug as copies of one that has imported it: the imports are most of what a start costs.

:class:`Popen` is that of :mod:`subprocess`. The process is a child of the caller, and has the arguments, environment,
working directory, signals and streams that a new one would have. Tests of a start itself use :mod:`subprocess`.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib
import importlib.util
import json
import os
import pkgutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

COMMAND = (sys.executable, "-c", "from farplug.cli.main import main; main()")
"""The command line, without arguments."""
_PR_SET_CHILD_SUBREAPER = 36
"""prctl(2): orphans below this process become its children."""
_PR_SET_KEEPCAPS = 8
"""prctl(2): a change of the user does not take the permitted capabilities."""
_CAPABILITY_VERSION = 0x20080522
_CAP_DAC_READ_SEARCH = 2
_MAX_REQUEST = 1 << 17
_PACKAGES = ("farplug.app", "farplug.cli", "farplug.control", "farplug.physical", "farplug.transport", "farplug.web")
"""Their modules are imported before the first start."""
_FIRST = "farplug.cli.script"
"""The module that a process imports first: it looks at the signals of the process."""


class Popen(subprocess.Popen[Any]):
    """A process of Python that runs code (``-c``) or a module (``-m``)."""

    def _execute_child(self, args: Sequence[object], executable: object, preexec_fn: object, *others: Any) -> None:
        """Start the process. :class:`subprocess.Popen` has made the pipes, and waits for the process."""
        _, _, cwd, env, _, _, _, *pipes = others[:13]
        _, group, groups, user, _, start_new_session = others[13:19]
        program, *words = map(str, args)
        assert program == sys.executable
        assert preexec_fn is None
        request = {
            "words": words,
            "folder": str(cwd or os.getcwd()),
            "environment": {**(os.environ if env is None else env)},
            "session": start_new_session,
            "user": None if user is None else (user, group, groups),
        }
        streams = [number if pipe == -1 else pipe for number, pipe in enumerate((pipes[0], pipes[3], pipes[5]))]
        try:
            self.pid = _start(json.dumps(request).encode(), streams)
            self._child_created = True
        finally:
            self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


def _start(request: bytes, streams: Sequence[int]) -> int:
    """Start a process; return its id."""
    requests = _starter()
    # The parent of the process ends before the answer comes.
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        socket.send_fds(requests, [request], streams)
        return int(requests.recv(32))
    finally:
        _prctl(_PR_SET_CHILD_SUBREAPER, 0)


def prepare() -> None:
    """Copy this process in the future, with what it has imported by now. It must have no thread and no event loop."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        ours.close()
        _run(theirs)
        sys.exit()
    theirs.close()
    _connections.append(ours)


_connections: list[socket.socket] = []
"""The connection to the process that is copied, from the first start on."""


def _starter() -> socket.socket:
    """Return the connection to the process that is copied, which ends with this process."""
    if not _connections:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-P", __file__, str(theirs.fileno())]
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        process.returncode = 0  # no warning about a child that still runs
        _connections.append(ours)
    return _connections[0]


def _prctl(option: int, value: int) -> None:
    assert ctypes.CDLL(None).prctl(option, value, 0, 0, 0) == 0


# The process that is copied -------------------------------------------------------------------------------------------


def _import_farplug() -> None:
    for package in _PACKAGES:
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
            if module.name != _FIRST:
                importlib.import_module(module.name)


def _serve(requests: socket.socket) -> Callable[[], object] | None:
    """Start a process for each request; return in each what it is to run, and None at the end."""
    while True:
        request, streams, _, _ = socket.recv_fds(requests, _MAX_REQUEST, 3)
        if not request:
            return None
        reader, writer = os.pipe()
        if (parent := os.fork()) == 0:
            if (child := os.fork()) == 0:
                requests.close()
                os.close(reader)
                os.close(writer)
                return _become(streams, **json.loads(request))
            os.write(writer, str(child).encode())
            os._exit(0)
        os.waitpid(parent, 0)  # the process has its new parent before that one has its id
        requests.send(os.read(reader, 32))
        for descriptor in (reader, writer, *streams):
            os.close(descriptor)


def _become(
    streams: Sequence[int],
    words: Sequence[str],
    folder: str,
    environment: dict[str, str],
    session: bool,
    user: tuple[int, int, Sequence[int]] | None,
) -> Callable[[], object]:
    """Make this process what a new one would be; return what it is to run."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  (these three stay open)
    sys.stdout = open(1, "w", buffering=1 if os.isatty(1) else -1, closefd=False)  # noqa: SIM115
    sys.stdout.reconfigure(write_through=bool(environment.get("PYTHONUNBUFFERED")))
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if session:
        os.setsid()
    if user is not None:
        _change_user(*user)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    kind, what, *arguments = [word for word in words if word != "-P"]
    if kind == "-c":
        source, name = what, kind
    else:
        spec = importlib.util.find_spec(what)
        assert spec is not None
        assert spec.origin is not None
        source, name = Path(spec.origin).read_text(), spec.origin
    sys.argv = [name, *arguments]
    return functools.partial(exec, compile(source, name, "exec"), {"__name__": "__main__"})


def _change_user(user: int, group: int, groups: Sequence[int]) -> None:
    """Give up all of root's rights but one: to read all files, such as modules of farplug in a home."""
    _prctl(_PR_SET_KEEPCAPS, 1)
    os.setgroups(groups)
    os.setgid(group)
    os.setuid(user)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    effective = permitted = 1 << _CAP_DAC_READ_SEARCH
    assert ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)(effective, permitted, 0, 0, 0, 0)) == 0


def _run(requests: socket.socket) -> None:
    """Start processes until the connection ends; in a process, run its program."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()
    gc.freeze()
    if (program := _serve(requests)) is not None:
        program()


if __name__ == "__main__":
    _import_farplug()
    _run(socket.socket(fileno=int(sys.argv[1])))
