"""The pytest plugin, as projects use it, with a guest in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tests.app.test_screen import decode_png
from tests.testing.fake_vm import DIES, MISSING, NO_KVM, STUCK, FakeVm

from farplug.testing import lending
from farplug.testing.project import __main__ as project
from farplug.testing.running_guest import FRAME_INTERVAL
from farplug.vm.qemu import QemuGuest

QUIET = ("-p", "no:cacheprovider", "-o", "asyncio_default_fixture_loop_scope=function")


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lending, "QemuGuest", FakeVm)
    monkeypatch.setattr(lending, "missing_kvm", lambda: "")
    monkeypatch.setattr(FakeVm, "made", [])


def run(pytester: pytest.Pytester, code: str, *options: str) -> pytest.RunResult:
    pytester.makepyfile(code)
    return pytester.runpytest_inprocess(*QUIET, *options)


def test_the_start_of_pytest_imports_nothing_else() -> None:
    code = "import farplug.testing.plugin, sys; print(*sorted(name for name in sys.modules if 'farplug' in name))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["farplug", "farplug.lazy", "farplug.testing", "farplug.testing.plugin"]


def test_plain_asyncio_and_anyio_tests_share_a_guest(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
        import asyncio
        import anyio
        import pytest
        from farplug.errors import StateError
        from farplug.testing import CommandFailed

        last = []

        @pytest.fixture
        def anyio_backend():
            return "asyncio"

        def test_plain(farplug_guest):
            assert farplug_guest.succeed("echo one", "echo two") == "one\\ntwo\\n"
            with pytest.raises(CommandFailed, match="exit code 3: oops"):
                farplug_guest.succeed("echo oops; exit 3")
            assert farplug_guest.fail("echo no; exit 1") == "no\\n"
            with pytest.raises(AssertionError, match="'true' succeeded"):
                farplug_guest.fail("true")
            last.append(farplug_guest)

        @pytest.mark.asyncio
        async def test_asyncio(farplug_guest):
            await asyncio.sleep(0)
            assert farplug_guest.succeed("echo one") == "one\\n"
            assert farplug_guest.call(asyncio.sleep(0, "done")) == "done"

        @pytest.mark.anyio
        async def test_anyio(farplug_guest, farplug_plug):
            await anyio.sleep(0)
            assert farplug_plug(kind="keyboard").device.identity.product == "Virtual Keyboard"

        def test_the_console_begins_with_the_test(farplug_guest):
            assert farplug_guest.console == ""
            farplug_guest.succeed("echo login: root")
            assert farplug_guest.wait_for_text("login: ?(.*)") == "login: root"

        def test_a_guest_of_an_earlier_test_is_refused():
            for call in (lambda: last[0].succeed("true"), lambda: last[0].plug(kind="keyboard"),
                         lambda: last[0].screen.frame(), lambda: last[0].wait_for_text("x")):
                with pytest.raises(StateError, match="this guest was released"):
                    call()
        """,
        "--farplug-accel=tcg",
    )
    result.assert_outcomes(passed=5)
    (vm,) = FakeVm.made
    assert vm.closed
    assert "without KVM" not in result.stdout.str(), "the user chose that"


def test_commands_that_are_waited_for(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
        import pytest
        from farplug.testing import CommandFailed, GuestTimeout

        def test_it(farplug_guest, tmp_path):
            flag = tmp_path / "it's here"
            farplug_guest.succeed(f'(sleep 0.5; echo >"{flag}") >/dev/null 2>&1 &')
            assert farplug_guest.wait_until_succeeds(f'echo look; test -e "{flag}"') == "look\\n"
            farplug_guest.succeed(f'(sleep 0.5; rm "{flag}") >/dev/null 2>&1 &')
            farplug_guest.wait_until_fails(f'test -e "{flag}"')
            with pytest.raises(CommandFailed, match="exit code 4: last words"):
                farplug_guest.wait_until_succeeds("echo last words; exit 4", timeout=1)
            with pytest.raises(AssertionError, match="still succeeds"):
                farplug_guest.wait_until_fails("true", timeout=1)
            with pytest.raises(GuestTimeout, match="did not show 'never'"):
                farplug_guest.wait_for_text("never", timeout=0.1)
        """,
    )
    result.assert_outcomes(passed=1)


FAILS = """
    import time
    from farplug.spice.framebuffer import Rect

    def test_passes(farplug_guest, farplug_plug):
        farplug_plug(kind="tablet")

    def test_fails(farplug_guest, farplug_plug, farplug_screen):
        farplug_plug(kind="keyboard")
        with farplug_screen.changed():
            farplug_guest.call(draw(farplug_guest.vm))
        time.sleep(%f)
        farplug_guest.succeed("echo the last words of the kernel")
        assert 0

    async def draw(vm):
        vm.draw(Rect(0, 0, 64, 64), 0xFF0000)

    def test_next(farplug_guest):
        pass
""" % (2 * FRAME_INTERVAL)


def test_a_failure_has_what_shows_why(pytester: pytest.Pytester) -> None:
    result = run(pytester, FAILS, "--farplug-artifacts=out", "--junitxml=report.xml", "-o", "junit_logging=system-out")
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(
        [
            "*- guest: console -*",
            "the last words of the kernel",
            "*- guest: standard error of QEMU -*",
            "qemu: a warning",
            "*- guest: devices -*",
            "* keyboard*: attached as *",
            "*- guest: files -*",
        ]
    )
    assert len(FakeVm.made) == 2, "a test that fails may have broken the system"
    (folder,) = (pytester.path / "out").iterdir()
    assert folder.name == "test_a_failure_has_what_shows_why.py-test_fails"
    files = ["console.txt", "devices.txt", "qemu-stderr.txt", "screen.png", "screens.png", "usb.pcapng"]
    assert sorted(path.name for path in folder.iterdir()) == files
    assert (folder / "console.txt").read_text() == "the last words of the kernel\n", "and not of the test before"
    assert (folder / "usb.pcapng").read_bytes().startswith(b"\x0a\x0d\x0d\x0a")
    width, height, last = decode_png((folder / "screen.png").read_bytes())
    assert (width, height, last[:3]) == (128, 64, b"\xff\0\0")
    width, height, strip = decode_png((folder / "screens.png").read_bytes())
    assert (width, height) == (128, 2 * 64 + 4)
    assert strip.endswith(last)
    (failed,) = ElementTree.parse(pytester.path / "report.xml").iterfind(".//testcase[failure]")
    links = {one.get("name"): one.get("value") for one in failed.iterfind(".//property")}
    assert links["farplug_guest_usb"] == str(folder / "usb.pcapng")
    assert links["farplug_guest_screens"] == str(folder / "screens.png")
    assert len(links) == len(files), "each once"
    assert f"[[ATTACHMENT|{folder / 'screens.png'}]]" in failed.findtext("system-out", "")


def test_a_guest_that_is_released_before_the_failure(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
        from farplug.spice.framebuffer import Rect

        async def draw(vm):
            vm.draw(Rect(0, 0, 64, 64), 0xFF0000)

        def test_fails(farplug_guest_factory):
            with farplug_guest_factory(fresh=True) as first:
                first.plug(kind="keyboard")
            assert first.vm.closed
            with farplug_guest_factory(fresh=True) as second:
                second.plug(kind="tablet")
                with second.screen.changed():
                    second.call(draw(second.vm))
                second.succeed("echo the last words of the kernel")
                assert 0

        def test_passes(farplug_guest_factory):
            with farplug_guest_factory() as guest:
                guest.close()
        """,
        "--farplug-artifacts=out",
    )
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*- guest 2: console -*", "the last words of the kernel"])
    (folder,) = (pytester.path / "out").iterdir()
    assert (folder / "usb.pcapng").exists()
    assert {path.name for path in (folder / "guest-2").iterdir()} > {"console.txt", "screen.png", "usb.pcapng"}
    assert decode_png((folder / "guest-2" / "screen.png").read_bytes())[2][:3] == b"\xff\0\0"
    assert [vm.closed for vm in FakeVm.made] == [True] * 3


SESSION = """
    import pytest

    @pytest.fixture(scope="module")
    def installed(farplug_session_guest_factory):
        with farplug_session_guest_factory(memory=512) as guest:
            guest.succeed("echo installed")
            yield guest
        assert guest.vm.closed == %s

    def test_one(installed, farplug_guest_factory):
        installed.plug(kind="keyboard")
        for memory in (128, 129, 130, 131):
            farplug_guest_factory(memory=memory).close()
        assert installed.vm.alive

    def test_other(installed):
        installed.succeed("echo other")
        assert %s

    def test_of_no_interest():
        assert %s
"""


def test_guests_of_fixtures_of_a_module(pytester: pytest.Pytester) -> None:
    options = ("--farplug-artifacts=out", "--farplug-capture=on")
    result = run(pytester, SESSION % (False, 1, 1), *options)
    result.assert_outcomes(passed=3)
    assert [path.relative_to(pytester.path) for path in pytester.path.rglob("*.pcapng")] == [
        Path("out", "session", "usb.pcapng")
    ]


def test_a_failure_with_the_guest_of_a_module(pytester: pytest.Pytester) -> None:
    result = run(pytester, SESSION % (True, 0, 0), "--farplug-artifacts=out")
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(["*- guest: console -*", "installed", "other"])
    folders = [path.name.rpartition("-")[2] for path in (pytester.path / "out").iterdir()]
    assert folders == ["test_other"]


def test_an_interrupted_run_ends_the_fixtures_of_the_session(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        from pathlib import Path
        import pytest

        @pytest.fixture(scope="session")
        def installed(farplug_session_guest_factory):
            guest = farplug_session_guest_factory()
            yield guest
            guest.close()
            Path("ended").touch()

        def test_it(installed):
            raise KeyboardInterrupt
        """
    )
    pytester.inline_run(*QUIET, no_reraise_ctrlc=True)
    assert (pytester.path / "ended").exists()
    assert FakeVm.made[0].closed


def test_without_a_folder_nothing_is_written(pytester: pytest.Pytester) -> None:
    result = run(pytester, FAILS)
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["*- guest: console -*"])
    assert {path.suffix or path.name for path in pytester.path.iterdir()} == {".py", "__pycache__"}


def test_captures_of_all_tests_or_of_none(pytester: pytest.Pytester) -> None:
    run(pytester, FAILS, "--farplug-artifacts=all", "--farplug-capture=on").assert_outcomes(passed=2, failed=1)
    captured = sorted(path.parent.name.rpartition("-")[2] for path in (pytester.path / "all").glob("*/usb.pcapng"))
    assert captured == ["test_fails", "test_passes"], "the third one plugs nothing in"
    run(pytester, FAILS, "-o", "farplug_artifacts=none", "-o", "farplug_capture=off").assert_outcomes(
        passed=2, failed=1
    )
    assert not list((pytester.path / "none").glob("*/usb.pcapng"))
    assert list((pytester.path / "none").glob("*/screen.png"))


MARKED = """
    import pytest

    @pytest.mark.farplug(kernel_arguments=["%s"])
    def test_it(farplug_guest):
        farplug_guest.succeed("true")
"""


def test_without_qemu_a_test_is_skipped_or_fails(pytester: pytest.Pytester) -> None:
    result = run(pytester, MARKED % MISSING, "-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*QEMU is not installed (sudo apt-get install qemu-system-x86)"])
    for option in (["--farplug-require"], ["-o", "farplug_require=true"]):
        result = run(pytester, MARKED % MISSING, *option)
        result.assert_outcomes(errors=1)
        result.stdout.fnmatch_lines(["QEMU is not installed (sudo apt-get install qemu-system-x86)"])


def test_the_project_is_skipped_where_nothing_is_installed(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lending, "QemuGuest", QemuGuest)
    monkeypatch.chdir(pytester.path)
    assert project.main() == 0
    monkeypatch.setenv("PATH", str(pytester.path))
    pytester.runpytest_inprocess(*QUIET).assert_outcomes(skipped=4)


def test_guests_for_a_test_whose_loop_runs_meanwhile(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        f"""
        import asyncio
        import pytest

        @pytest.mark.asyncio
        async def test_boots(farplug_guest_factory):
            first, second = await asyncio.gather(*(asyncio.to_thread(farplug_guest_factory, fresh=True) for _ in "ab"))
            assert first.vm is not second.vm
            assert (await first.vm.run("echo one")).output == "one\\n"

        @pytest.mark.asyncio
        async def test_skips(farplug_guest_factory):
            await asyncio.to_thread(farplug_guest_factory, kernel_arguments=["{MISSING}"])
        """,
    )
    result.assert_outcomes(passed=1, skipped=1)
    assert all(vm.closed for vm in FakeVm.made[:2])


def test_a_guest_that_dies_says_so(pytester: pytest.Pytester) -> None:
    result = run(pytester, MARKED % DIES)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["E *GuestCrashed: QEMU was killed by SIGABRT: an assertion failed"])
    result = run(
        pytester,
        """
        def test_dies(farplug_guest, farplug_plug):
            farplug_plug(kind="keyboard")
            farplug_guest.succeed("die")

        def test_next(farplug_guest):
            farplug_guest.succeed("true")
        """,
        "--farplug-artifacts=out",
    )
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(["E *GuestCrashed: QEMU was killed by SIGABRT: an assertion failed"])
    assert list((pytester.path / "out").glob("*/qemu-stderr.txt"))


def test_kvm_that_is_missing_or_does_not_work_is_reported_once(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = MARKED % NO_KVM + "\n" + (MARKED % NO_KVM).replace("test_it", "test_other")
    result = run(pytester, two)
    result.assert_outcomes(passed=2)
    line = "farplug: the VMs ran without KVM, which is slower: QEMU was killed by SIGABRT: an assertion failed"
    assert result.stdout.str().count(line) == 1
    assert [vm.config.accelerator for vm in FakeVm.made] == ["kvm", "tcg"]
    run(pytester, MARKED % STUCK).stdout.fnmatch_lines(["*without KVM, which is slower: the guest did not boot"])
    result = run(pytester, two, "--farplug-accel=kvm")
    result.assert_outcomes(errors=2)
    monkeypatch.setattr(lending, "missing_kvm", lambda: "/dev/kvm: permission denied")
    result = run(pytester, two)
    result.assert_outcomes(passed=2)
    assert result.stdout.str().count("which is slower: /dev/kvm: permission denied") == 1


def test_dev_kvm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(lending, "KVM", tmp_path / "kvm")
    assert lending.missing_kvm() == f"{tmp_path}/kvm: no such file or directory"
    (tmp_path / "kvm").touch()
    assert lending.missing_kvm() == ""


RAISES = """
    import pytest
    from farplug.usb import Speed
    from farplug.virtual import Function, VirtualDevice
    from farplug.usb.descriptors import InterfaceDescriptor

    class Broken(Function):
        def interfaces(self, speed, numbers):
            return (InterfaceDescriptor(0, 0, 0xFF, 0, 0),)

        def submit(self, transfer): ...
        def cancel(self, transfer): ...
        def reset(self, *, port_reset): ...

        def configured(self, speed):
            raise ZeroDivisionError("of the device")

        async def dispose(self):
            print("disposed")

    @pytest.fixture
    def broken(farplug_plug):
        return farplug_plug(VirtualDevice(Broken()), wait=False)

    def test_it(farplug_guest, broken):
        farplug_guest.call(faulty(farplug_guest))
        %s

    async def faulty(guest):
        import asyncio
        async with asyncio.timeout(100):
            while not guest.faults:
                await asyncio.sleep(0.01)
"""


def test_a_device_that_raises_fails_the_test(pytester: pytest.Pytester) -> None:
    result = run(pytester, RAISES % "pass", "-s")
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*disposed*", "E *ZeroDivisionError: of the device"])
    result = run(pytester, RAISES % "farplug_guest.faults.clear()")
    result.assert_outcomes(passed=1)
    result = run(pytester, RAISES % "assert 0")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*- guest: devices -*", "*ZeroDivisionError: of the device*"])


def test_a_paused_guest_finds_what_was_plugged_in_before(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
        import pytest
        from farplug.errors import StateError
        from farplug.testing import GuestTimeout

        @pytest.mark.farplug(boot="bios", paused=True, ports=2)
        def test_firmware(farplug_guest, farplug_plug, farplug_keyboard):
            one = farplug_plug(kind="tablet")
            other = farplug_plug(kind="keyboard")
            assert one.device is None
            other.unplug()
            with pytest.raises(GuestTimeout, match="did not configure tablet within 0.1 s"):
                one.configured(timeout=0.1)
            farplug_guest.start()
            one.configured()
            assert one.device.identity.product == "Virtual Tablet"
            with pytest.raises(StateError, match="not paused"):
                farplug_guest.start()
            assert not farplug_keyboard.press("Return")  # through SPICE

        def test_linux_is_not_paused(farplug_guest_factory):
            one, other = farplug_guest_factory(), farplug_guest_factory(fresh=True, memory=512)
            assert one.vm is not other.vm
            assert farplug_guest_factory().vm is one.vm
        """,
    )
    result.assert_outcomes(passed=2)
    assert [vm.config.memory for vm in FakeVm.made] == [256, 256, 512]
    assert all(vm.closed for vm in FakeVm.made)


def test_ports_on_sockets(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
        import pytest
        from farplug.errors import PortError, TargetError
        from farplug.testing import GuestConfig, TcpPort

        @pytest.fixture(scope="session")
        def farplug_guest_config():
            return GuestConfig(ports=(TcpPort(), TcpPort()))

        def test_it(farplug_plug, farplug_screen):
            farplug_plug(kind="tablet")
            with farplug_plug(kind="keyboard"):
                with pytest.raises(PortError):
                    farplug_plug(kind="mouse")
            farplug_plug(kind="mouse")
            with pytest.raises(TargetError, match="no SPICE server"):
                farplug_screen.frame()
        """,
        *("--farplug-artifacts=out", "--farplug-capture=on"),
    )
    result.assert_outcomes(passed=1)
    assert sorted(path.name for path in (pytester.path / "out").glob("*/*")) == ["usb-2.pcapng", "usb.pcapng"]


def test_the_screen(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
        import pytest
        from farplug.errors import ImageError
        from farplug.spice.framebuffer import Rect
        from farplug.testing import GuestTimeout, ScreenMismatch

        async def draw(vm, rect, colour):
            vm.draw(rect, colour)

        def test_it(farplug_guest, farplug_screen, tmp_path):
            whole = tmp_path / "whole.png"
            assert farplug_guest.screenshot(whole).width == 128
            assert farplug_screen.shows(whole) == (0, 0)
            with farplug_screen.changed():
                farplug_guest.call(draw(farplug_guest.vm, Rect(10, 20, 20, 24), 0x123456))
            assert farplug_screen.still(0.05).pixel(10, 20) == (0x12, 0x34, 0x56)
            assert not farplug_screen.matches(whole)
            assert farplug_screen.matches(whole, differing=0.01)
            with pytest.raises(ScreenMismatch, match="40 of 8192 pixels differ"):
                farplug_screen.shows(whole, timeout=0.1)
            with pytest.raises(GuestTimeout, match="did not change within 0.1 s"):
                with farplug_screen.changed(timeout=0.1):
                    pass
            with pytest.raises(ImageError, match="no such file") as caught:
                farplug_screen.shows(tmp_path / "none.png")
            assert "farplug_screen.save(path)" in caught.value.remedy
            with pytest.raises(ValueError, match="differing=0.5"):
                farplug_screen.shows(part(tmp_path), differing=0.5)
            with pytest.raises(ScreenMismatch, match="no place of the screen"):
                farplug_screen.shows(part(tmp_path), timeout=0.1)
            farplug_guest.call(draw(farplug_guest.vm, Rect(50, 30, 60, 34), 0x654321))
            assert farplug_screen.shows(part(tmp_path)) == (50, 30)

        def part(folder):
            from farplug.app.png import encode_png
            path = folder / "part.png"
            path.write_bytes(encode_png(10, 4, bytes((0x21, 0x43, 0x65, 0)) * 40))
            return path
        """,
    )
    result.assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--farplug-capture=on"], "--farplug-capture=on needs a folder: --farplug-artifacts=DIR"),
        (["--farplug-timeout=0"], "farplug_timeout is not a number of seconds above 0"),
        (["-o", "farplug_timeout=soon"], "farplug_timeout is not a number of seconds above 0"),
        (["-o", "farplug_accel=fast"], "farplug_accel is 'fast', not one of auto, kvm, tcg"),
        (["--farplug-keep"], "--farplug-keep waits for Enter: it needs a terminal, and one process (no -n)"),
    ],
)
def test_options_that_are_not_valid(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.setattr(sys, "__stdin__", None)
    result = run(pytester, "def test_it(farplug_guest): ...", *options)
    result.assert_outcomes(errors=1)
    assert message in result.stdout.str()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("speed=3", "a guest has no field 'speed'"),
        ("ports=40", "the configuration of the guest is not valid: 40 devices do not fit"),
        ("boot='coreboot'", "'coreboot' is not a valid Boot"),
        ("2", "takes fields by name"),
    ],
)
def test_markers_that_are_not_valid(pytester: pytest.Pytester, arguments: str, message: str) -> None:
    code = f"import pytest\n@pytest.mark.farplug({arguments})\ndef test_it(farplug_guest): ..."
    result = run(pytester, code, "--strict-markers")
    result.assert_outcomes(errors=1)
    assert message in result.stdout.str()


def test_a_vm_is_kept_until_enter(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        alive: bool | None = None

        def isatty(self) -> bool:
            return True

        def readline(self) -> str:
            self.alive = FakeVm.made[0].alive
            return "\n"

    terminal = Terminal()
    monkeypatch.setattr(sys, "__stdin__", terminal)
    result = run(
        pytester, "def test_fails(farplug_guest): assert 0\ndef test_passes(farplug_guest): ...", "--farplug-keep"
    )
    result.assert_outcomes(failed=1, passed=1)
    assert terminal.alive


def test_processes_of_xdist_have_guests_of_their_own(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        """
        from tests.testing.fake_vm import install
        from farplug.testing import lending
        install()
        lending.missing_kvm = lambda: ""
        """
    )
    two = MARKED % NO_KVM + "        assert 0\n\n" + (MARKED % NO_KVM).replace("test_it", "test_other")
    pytester.makepyfile(two)
    pytester.syspathinsert(Path(__file__).parents[2])
    result = pytester.runpytest_inprocess(*QUIET, "-n", "2", "--farplug-artifacts=out")
    result.assert_outcomes(passed=1, failed=1)
    assert result.stdout.str().count("farplug: the VMs ran without KVM") == 1
    assert len(list((pytester.path / "out").glob("*/qemu-stderr.txt"))) == 1
