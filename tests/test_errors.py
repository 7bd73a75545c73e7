from __future__ import annotations

import importlib
import pkgutil
import re

import pytest

import farplug
from farplug import errors
from farplug.cli.exit_codes import ExitCode, exit_code
from farplug.cli.log import remedy_lines
from farplug.errors import FarplugError, Reason, Remedy


def _tree(kind: type[FarplugError]) -> set[tuple[str, str, str]]:
    """Return the name, the base class and the module of each subclass of a class in the library."""
    below = [kind for kind in kind.__subclasses__() if not kind.__module__.startswith("farplug.cli.")]
    entries = {(child.__name__, kind.__name__, child.__module__) for child in below}
    return entries.union(*map(_tree, below))


def _drawn_tree(docstring: str) -> set[tuple[str, str, str]]:
    """Return the same for the tree in the docstring."""
    entries, path = set(), ["FarplugError"]
    for lines, name, module in re.findall(r"^    ([│├└─ ]+)(\w+) [^(\n]*(?:\(([\w.]+)\))?$", docstring, re.MULTILINE):
        path[len(lines) // 4 :] = [name]
        entries.add((name, path[-2], module or "farplug.errors"))
    return entries


def test_the_tree_is_the_one_in_the_docstring() -> None:
    for module in pkgutil.walk_packages(farplug.__path__, "farplug."):
        if not module.name.startswith("farplug.cli"):
            importlib.import_module(module.name)
    assert errors.__doc__ is not None
    assert _drawn_tree(errors.__doc__) == _tree(FarplugError)


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
def test_the_exit_code_depends_on_the_stage(reason: Reason, code: ExitCode) -> None:
    assert exit_code(errors.TargetError("x", reason=reason)) is code


def test_defaults() -> None:
    gone = errors.GuestGoneError("it left", remedy="wait")
    assert (str(gone), gone.message, gone.reason, gone.remedy) == ("it left", "it left", Reason.GUEST_GONE, "wait")
    assert exit_code(gone) is ExitCode.GUEST_GONE
    broken = errors.InternalError(ZeroDivisionError("it\nbroke"))
    assert (str(broken), exit_code(broken)) == ("internal error: ZeroDivisionError: it", ExitCode.INTERNAL_ERROR)
    for kind in (errors.LocalProtocolError, errors.RemoteProtocolError):
        assert (kind("x").reason, exit_code(kind("x"))) == (Reason.PROTOCOL, ExitCode.PROTOCOL)


def test_a_remedy_is_text_with_what_a_program_can_offer() -> None:
    error = errors.ImageError(
        "a.raw is in use",
        reason=Reason.IN_USE,
        remedy=Remedy("plug the image anyway", setting="storage.force", value=True),
    )
    assert error.remedy == "plug the image anyway"
    assert error.as_dict() == {
        "reason": "in-use",
        "message": "a.raw is in use",
        "remedy": "plug the image anyway",
        "setting": "storage.force",
        "value": True,
    }
    plain = errors.ImageError("x", reason=Reason.IN_USE, remedy="wait")
    assert plain.as_dict() == {"reason": "in-use", "message": "x", "remedy": "wait"}
    assert not errors.ImageError("x", reason=Reason.IN_USE).remedy
    assert Remedy(command="ls")


@pytest.mark.parametrize(
    ("remedy", "lines"),
    [
        ("", []),
        ("wait", ["wait"]),
        ("one\ntwo", ["one", "two"]),
        (Remedy("plug it anyway", setting="storage.force", value=True), ["plug it anyway: --force"]),
        (Remedy(setting="target.ca_file"), ["--ca-file FILE"]),
        (Remedy("use", setting="storage.usb_speed", value="high"), ["use: --usb-speed high"]),
        (Remedy("convert it", command="qemu-img convert -O raw a b"), ["convert it", "  qemu-img convert -O raw a b"]),
        (Remedy(command="ls\x1b"), ["ls\N{REPLACEMENT CHARACTER}"]),
    ],
)
def test_how_the_command_line_shows_a_remedy(remedy: str, lines: list[str]) -> None:
    assert remedy_lines(remedy) == lines
