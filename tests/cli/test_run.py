"""``farplug run``: its arguments, and the errors before anything is typed."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cli.support import Cli

from farplug.cli.run_command import Copy
from farplug.errors import UsageError


@pytest.mark.parametrize(
    ("text", "copy"),
    [
        ("a", Copy("a")),
        ("a:b", Copy("a", "b")),
        ("a:b:/c d", Copy("a:b", "/c d")),
        ("a:", None),
        (":b", None),
        ("", None),
    ],
)
def test_what_is_copied_where(text: str, copy: Copy | None) -> None:
    if copy is None:
        with pytest.raises(UsageError, match="a path is missing"):
            Copy.parse(text, "--copy-in")
    else:
        assert Copy.parse(text, "--copy-in") == copy


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("run",), "no command"),
        (("run", "-s", "web1", "--"), "no command"),
        (("run", "--shell", "--", "true"), "--shell and a command contradict each other"),
        (("run", "--secret-file", "x", "--", "true"), "--secret-file has no effect without --user"),
        (("run", "--timeout", "0", "--", "true"), "Invalid value for '--timeout'"),
        (("run", "vm.vv", "-s", "web1", "--", "true"), "TARGET and --session contradict each other"),
        (("run", "--no-such", "--", "true"), "No such option"),
        (("run", "-n", "--copy-in", "a:", "--", "true"), "a path is missing"),
    ],
)
def test_arguments_that_are_not_valid(cli: Cli, arguments: tuple[str, ...], error: str) -> None:
    result = cli(*arguments)
    assert (result.code, result.out) == (2, "")
    assert error in result.err


def test_failures_of_farplug_have_a_code_of_their_own(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = cli("run", "-s", "none", "--", "ls", "--json", "--help")
    assert (result.code, result.out) == (125, ""), "the options are the command's"
    assert "the session none is not running" in result.err
    secret = tmp_path / "secret"
    for content, error in (
        (None, "no such file"),
        (b"\xff", "is not text"),
        (b"two\nlines\n", "is not one line"),
        (b"x" * 5000, "is not one line"),
    ):
        if content is not None:
            secret.write_bytes(content)
        result = cli("run", "-s", "none", "--user", "root", "--secret-file", secret, "--", "true")
        assert result.code == 125
        assert error in result.err
    (tmp_path / "folder").mkdir()
    for arguments, error in (
        (("--copy-in", tmp_path / "nothing"), "cannot be read: no such file or directory\n  check the path"),
        (("--copy-in", tmp_path / "folder"), "is a folder, not a file\n  name a file"),
        (("--copy-in", "/dev/null"), "is a device or a pipe, not a file\n  name a file"),
        (("--copy-out", f"/x:{tmp_path}/nothing/y"), "cannot be written: no such file or directory\n  check the path"),
        (("--copy-out", f"/x:{secret}/y"), "cannot be written: not a directory\n  check the path"),
    ):
        result = cli("run", "-s", "none", *arguments, "--", "true")
        assert result.code == 125
        assert error in result.err, "before the session is looked for"
    with monkeypatch.context() as patched:
        patched.setattr("os.access", lambda path, mode: path != tmp_path)
        result = cli("run", "-s", "none", "--copy-out", f"/x:{tmp_path}", "--", "true")
    remedy = "check the permissions of the file and of its folder"
    assert result.err == f"farplug: {tmp_path} cannot be written: permission denied\n  {remedy}\n"
    result = cli("run", "-s", "none", "--shell")
    assert result.code == 125
    assert "needs a terminal" in result.err
