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

_PR_SET_CHILD_SUBREAPER = 36
"""prctl(2): orphans below this process become its children."""
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
        start_new_session = others[18]
        program, *words = map(str, args)
        assert program == sys.executable
        assert preexec_fn is None
        request = {
            "words": words,
            "folder": str(cwd or os.getcwd()),
            "environment": {**(os.environ if env is None else env)},
            "session": start_new_session,
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
    prctl = ctypes.CDLL(None).prctl
    # The parent of the process ends before the answer comes.
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        socket.send_fds(requests, [request], streams)
        return int(requests.recv(32))
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@functools.cache
def _starter() -> socket.socket:
    """Return the connection to the process that is copied. It ends with this process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, "-P", __file__, str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    process.returncode = 0  # no warning about a child that still runs
    return ours


# The process that is copied -------------------------------------------------------------------------------------------


def _import_farplug() -> None:
    for package in _PACKAGES:
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
            if module.name != _FIRST:
                importlib.import_module(module.name)
    gc.collect()
    gc.freeze()


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
    streams: Sequence[int], words: Sequence[str], folder: str, environment: dict[str, str], session: bool
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


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _requests = socket.socket(fileno=int(sys.argv[1]))
    _import_farplug()
    if (_program := _serve(_requests)) is not None:
        _program()
