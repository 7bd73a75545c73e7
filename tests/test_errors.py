from __future__ import annotations

import pytest

from farplug import errors
from farplug.errors import ExitCode, FarplugError, Reason


def _tree(kind: type[FarplugError]) -> list[type[FarplugError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in _tree(child))]


def test_the_tree_is_the_one_in_the_docstring() -> None:
    assert errors.__doc__ is not None
    own = [kind.__name__ for kind in _tree(FarplugError) if kind.__module__ == "farplug.errors"]
    assert len(own) == 13
    for name in own:
        assert f" {name} " in errors.__doc__ or f"{name}\n" in errors.__doc__


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (Reason.CONNECTION_REFUSED, ExitCode.UNREACHABLE),
        (Reason.UNRESOLVABLE, ExitCode.UNREACHABLE),
        (Reason.LINK_REFUSED, ExitCode.UNREACHABLE),
        (Reason.PROXY, ExitCode.UNREACHABLE),
        (Reason.NEEDS_TLS, ExitCode.TLS),
        (Reason.TLS_UNTRUSTED, ExitCode.TLS),
        (Reason.TLS_WRONG_HOST, ExitCode.TLS),
        (Reason.TLS_FAILED, ExitCode.TLS),
        (Reason.WRONG_PASSWORD, ExitCode.DENIED),
        (Reason.NO_PASSWORD, ExitCode.DENIED),
        (Reason.NOT_SPICE, ExitCode.PROTOCOL),
    ],
)
def test_the_exit_code_tells_the_stage(reason: Reason, code: ExitCode) -> None:
    assert errors.TargetError("x", reason=reason).exit_code is code


def test_defaults() -> None:
    gone = errors.GuestGoneError("it left", remedy="wait")
    assert (str(gone), gone.message, gone.reason, gone.remedy) == ("it left", "it left", Reason.GUEST_GONE, "wait")
    assert gone.exit_code is ExitCode.GUEST_GONE
    broken = errors.InternalError(ZeroDivisionError("it\nbroke"))
    assert (str(broken), broken.exit_code) == ("internal error: ZeroDivisionError: it", ExitCode.DEFECT)
    for kind in (errors.LocalProtocolError, errors.RemoteProtocolError):
        assert (kind("x").reason, kind("x").exit_code) == (Reason.PROTOCOL, ExitCode.PROTOCOL)
