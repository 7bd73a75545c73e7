from __future__ import annotations

import ast
import errno
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
from tests.docs import ROOT

import farplug
from farplug import errors
from farplug.cli.log import remedy_lines
from farplug.errors import FarplugError, Reason, Remedy
from farplug.exit_codes import ExitCode, exit_code


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
        if not module.name.startswith(("farplug.cli", "farplug.load.user")):  # the latter is for Locust's processes
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


def test_the_error_of_a_session_has_its_exit_code() -> None:
    for number, code in [
        (3, ExitCode.IMAGE),
        (0, ExitCode.INTERNAL_ERROR),
        (130, ExitCode.INTERRUPTED),
        (77, ExitCode.INTERNAL_ERROR),
    ]:
        error = errors.SessionError("x", reason=Reason.TLS_FAILED, exit_code=number)
        assert (error.exit_code, exit_code(error)) == (number, code)


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
    either = Remedy("convert it", command="a b", alternative=Remedy("wait"))
    assert either.as_dict() == {"remedy": "convert it", "command": "a b", "alternative": {"remedy": "wait"}}


@pytest.mark.parametrize(
    ("remedy", "lines"),
    [
        ("", []),
        ("wait", ["wait"]),
        ("one\ntwo", ["one", "two"]),
        (Remedy("plug it anyway", setting="storage.force", value=True), ["plug it anyway: --force"]),
        (Remedy(setting="target.ca_file"), ["--ca-file FILE"]),
        (Remedy(setting="target.proxy"), ["--proxy URL"]),
        (Remedy(setting="target.host_subject", value="O=A B,CN=x:y"), ["--host-subject 'O=A B,CN=x:y'"]),
        (
            Remedy("give one", setting="target.password"),
            ["give one: --password-file FILE, --ask-password, or FARPLUG_PASSWORD in the environment (for URLs)"],
        ),
        (Remedy("use", setting="storage.usb_speed", value="high"), ["use: --usb-speed high"]),
        (Remedy("convert it", command="qemu-img convert -O raw a b"), ["convert it:", "  qemu-img convert -O raw a b"]),
        (Remedy("do this, as root:", command="a\nb"), ["do this, as root:", "  a", "  b"]),
        (
            Remedy("unpack it, and plug the folder", command="unzip a.zip", setting="usb_folder", value="a b"),
            ["unpack it, and plug the folder:", "  unzip a.zip", "  --usb-folder 'a b'"],
        ),
        (
            Remedy("convert it", command="a", alternative=Remedy("or plug it", setting="storage.force", value=True)),
            ["convert it:", "  a", "or plug it: --force"],
        ),
        (Remedy(command="ls\x1b"), ["ls\N{REPLACEMENT CHARACTER}"]),
    ],
)
def test_how_the_command_line_shows_a_remedy(remedy: str, lines: list[str]) -> None:
    assert remedy_lines(remedy) == lines


@pytest.mark.parametrize(
    ("error", "message", "reason", "remedy"),
    [
        (
            OSError(errno.ENOENT, "No such file"),
            "a/b cannot be opened: no such file",
            Reason.NOT_FOUND,
            "check the path",
        ),
        (
            OSError(errno.EPERM, "Not permitted"),
            "a/b cannot be opened: not permitted",
            Reason.NO_PERMISSION,
            "check the permissions of the file and of its folder",
        ),
        (OSError(errno.EISDIR, "Is a"), "a/b cannot be opened: is a", Reason.NOT_A_FILE, "name a file"),
        (OSError(errno.EBUSY, "Busy"), "a/b cannot be opened: busy", Reason.IN_USE, ""),
        (OSError(errno.ENOSPC, "Full"), "a/b cannot be opened: full", Reason.NO_SPACE, ""),
        (OSError(errno.EIO, "Broken"), "a/b cannot be opened: broken", Reason.IO_ERROR, ""),
        (OSError("Odd"), "a/b cannot be opened: odd", Reason.IO_ERROR, ""),
        (ValueError("embedded null byte"), "'a/b' is not a valid path", Reason.NOT_FOUND, "check the path"),
    ],
)
def test_an_error_of_the_system(error: OSError | ValueError, message: str, reason: Reason, remedy: str) -> None:
    result = errors.from_oserror(Path("a/b"), error, as_=errors.SetupError)
    assert type(result) is errors.SetupError
    assert (result.message, result.reason, result.remedy) == (message, reason, remedy)
    other = errors.from_oserror("x", OSError(errno.ENOENT, "Gone"), as_=errors.ImageError, problem="failed", remedy="y")
    assert (other.message, other.remedy) == ("x failed: gone", "y")
    home = errors.from_oserror("~/x", OSError(errno.ENOENT, "Gone"), as_=errors.ImageError)
    assert home.remedy.startswith("write the path of the home folder in place of ~")


_REASONS_TABLE = (ROOT / "docs/exit-codes.md").read_text().partition("## Events")[0]
DOCUMENTED = {
    reason: {int(code) for code in re.findall(r"\d+", codes)}
    for reason, codes in re.findall(r"^\| `([a-z-]+)` \| ([^|]*) \|", _REASONS_TABLE, re.MULTILINE)
}


def _raised() -> set[tuple[str, str]]:
    """Return the names of the class and of the reason of each error that farplug's modules make."""
    found = set()
    for path in sorted((ROOT / "src/farplug").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                for keyword in node.keywords:
                    if keyword.arg == "reason" and isinstance(keyword.value, ast.Attribute):
                        found.add((node.func.id, keyword.value.attr))
    return found


def test_each_class_carries_only_reasons_that_are_documented_with_its_exit_code() -> None:
    wrong, checked = [], 0
    for class_name, reason_name in sorted(_raised()):
        kind = getattr(errors, class_name, None)
        if kind is errors.SessionError:
            continue  # its exit code is an argument
        if kind is not None and reason_name in Reason.__members__:
            error = kind("x", reason=Reason[reason_name])
            codes = DOCUMENTED[str(error.reason)]
            if codes:  # the reason of a warning has none
                checked += 1
                if int(exit_code(error)) not in codes:
                    wrong.append((class_name, reason_name, int(exit_code(error)), codes))
    assert wrong == []
    assert checked > 50
