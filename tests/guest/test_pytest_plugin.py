"""The pytest plugin in real guests: the project that it writes, and a test that fails."""

from __future__ import annotations

import struct

import pytest
from tests.app.test_screen import decode_png

from farplug.testing.project import __main__ as project

FAILS = """
    def test_typed_text_is_on_the_screen(farplug_guest, farplug_plug, farplug_screen, farplug_keyboard, tmp_path):
        farplug_guest.succeed("head -n 1 </dev/tty1 >/tmp/line 2>&1 & echo $! >/tmp/reader")
        farplug_guest.wait_until_succeeds("ls -l /proc/$(cat /tmp/reader)/fd | grep -q tty1")
        before = farplug_screen.still()
        farplug_keyboard.type("x")  # plugs the keyboard in, which the kernel writes on the screen
        with farplug_screen.changed():
            farplug_keyboard.type("Hello")
        farplug_screen.still(cells=0, seconds=0.1)
        farplug_screen.save("typed.png")
        assert farplug_screen.matches("typed.png", differing=0.001)
        farplug_guest.send_keys("Return")
        assert farplug_guest.wait_until_succeeds("grep . /tmp/line") == "xHello\\n"
        farplug_guest.succeed("echo the end >/dev/kmsg")
        farplug_guest.wait_for_text("the end")
        assert (before.width, before.height) == (0, 0)
"""


def test_the_project_passes_and_a_failure_has_what_shows_why(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pytester.path)
    assert project.main() == 0
    assert project.main() == 1, "files that are there stay"
    pytester.makepyfile(test_z=FAILS)
    result = pytester.runpytest_subprocess(
        *("-p", "no:cacheprovider", "-o", "asyncio_default_fixture_loop_scope=function"),
        *("--farplug-require", "--farplug-artifacts=out", "--farplug-timeout=120"),
    )
    result.assert_outcomes(passed=4, failed=1)
    result.stdout.fnmatch_lines(
        ["*- guest: console -*", "*the end", "*- guest: devices -*", "* configured by the guest*"]
    )
    (folder,) = (pytester.path / "out").iterdir()
    width, height, last = decode_png((folder / "screen.png").read_bytes())
    assert (width, height) > (700, 300)
    assert len({last[at : at + 3] for at in range(0, len(last), 3)}) > 1, "there is text"
    strip_width, strip_height, _ = decode_png((folder / "screens.png").read_bytes())
    assert strip_width <= width < strip_height
    capture = (folder / "usb.pcapng").read_bytes()
    at = 0
    while at < len(capture):  # whole blocks
        at += struct.unpack_from("<I", capture, at + 4)[0]
    assert at == len(capture)
    assert len(capture) > 5000
