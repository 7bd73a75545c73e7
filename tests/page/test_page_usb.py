"""The sockets: what is in them, plugging in and out, refusals, files of the browser."""

from __future__ import annotations

import base64
import hashlib
import time
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect
from tests.page.conftest import Opened
from tests.page.fake_page import LATER, FakePage, Json, Refused, attachment, guest

EVIL = "<img src=x onerror=alert(1)>\u202e\u0007"
KEY: Json = {
    "id": "1-2",
    "name": "YubiKey 5 NFC",
    "vendor_id": "1050",
    "product_id": "0407",
    "port": "1-2",
    "speed": "full",
    "classes": ["HID"],
    "state": "free",
}
DISK: Json = {
    **KEY,
    "id": "2-3",
    "name": "Portable SSD T7",
    "port": "2-3",
    "state": "refused",
    "reason": "in-use",
    "message": "this machine uses the disk: /dev/sdc2 is mounted on /home",
    "setting": "rules.force",
    "value": True,
}
IMAGES: list[Json] = [
    {"name": "archive", "kind": "folder", "size": None, "modified": 1.7e9, "as": None},
    {"name": "drivers.raw", "kind": "file", "size": 67_100_000, "modified": 1.7e9, "as": "disk"},
    {"name": "virtio.iso", "kind": "file", "size": 753_000_000, "modified": 1.7e9, "as": "cdrom"},
    {
        "name": "base.qcow2",
        "kind": "file",
        "size": 9,
        "modified": 1.7e9,
        "as": "disk",
        "problem": {"message": "it is qcow2"},
    },
]

ROWS: list[Json] = [
    {
        "name": "web1",
        "target": "spice://a:1",
        "vm": "testvm",
        "state": "connected",
        "attempt": None,
        "started": 0,
        "ports": [{"device": "a"}, {"device": None}],
        "devices": [{"state": "in use", "rate": 1500}],
        "thumbnail": True,
    },
    {"name": "stuck", "state": "not responding", "reason": "timed-out", "message": "no answer", "thumbnail": False},
]


def socket(page: Page, number: int) -> Locator:
    return page.locator(f".socket[data-port='{number}']")


def iso(size: int = 200_000) -> bytes:
    data = bytearray(bytes(range(256)) * (size // 256))
    data[32768:32774] = b"\x01CD001"
    return bytes(data)


def drop(page: Page, selector: str, script: str) -> None:
    """Drop what a script puts into ``transfer``."""
    transfer = page.evaluate_handle(f"() => {{ const transfer = new DataTransfer(); {script}; return transfer; }}")
    for kind in ("dragenter", "dragover", "drop"):
        page.dispatch_event(selector, kind, {"dataTransfer": transfer})


def file(name: str, data: bytes) -> str:
    text = base64.b64encode(data).decode()
    return f"transfer.items.add(new File([Uint8Array.from(atob('{text}'), one => one.charCodeAt(0))], '{name}'))"


class TestSockets:
    def test_devices_in_sockets(self, fake: FakePage, page: Page) -> None:
        expect(page.locator(".socket")).to_have_count(4)
        expect(page.get_by_text("0 of 4 in use")).to_be_visible()
        fake.attachment("g1.a1", "usbredir 1", sources=[{"kind": "disk", "path": "/srv/scratch.raw"}])
        expect(socket(page, 1).locator("h3")).to_have_text("scratch.raw")
        expect(socket(page, 1).locator(".state")).to_have_text("In use · disk, writable · SuperSpeed 5\u00a0Gb/s")
        expect(page.get_by_text("1 of 4 in use")).to_be_visible()
        fake.attachment("g1.a2", "usbredir 2", units=["a.raw", "b.raw", "cdrom0"])
        expect(socket(page, 2).locator("h3")).to_have_text("3 drives")
        expect(socket(page, 2).locator(".units li")).to_have_count(3)
        expect(socket(page, 2).get_by_role("button", name="Unplug 3 drives")).to_have_text("Unplug all")
        about = {name: value for name, value in attachment("g1.a3", "usbredir 0").items() if name != "id"}
        fake.sources["g1.a3"] = []
        fake.event("attaching", attachment="g1.a3", device="scratch.raw", **{**about, "state": "attached"})
        expect(socket(page, 0).locator(".state")).to_contain_text("Attached · disk · waits for the VM’s driver")

    def test_what_a_device_was_made_of(self, fake: FakePage, page: Page) -> None:
        rows = [
            ({"kind": "disk", "snapshot": True}, "disk, writes to a snapshot"),
            ({"kind": "read-only-disk"}, "disk, read-only"),
            ({"kind": "gamepad"}, "gamepad"),
            ({"kind": "usb-device"}, "device of this machine"),
        ]
        for number, (source, words) in enumerate(rows):
            fake.attachment(f"g1.a{number}", f"usbredir {number}", sources=[source])
            expect(socket(page, number).locator(".state")).to_contain_text(f"In use · {words} · ")

    def test_figures_and_the_chart_and_endpoints_on_demand(self, fake: FakePage, page: Page) -> None:
        endpoint = {"endpoint": 129, "transfers": 122, "bytes": 4_190_000, "errors": 0}
        fake.attachment(
            "g1.a1",
            "usbredir 0",
            figures={"read": 0, "written": 0, "commands": 0, "rate": 0, "memory": 0, "errors": 0},
        )
        line = socket(page, 0).locator(".spark .line").first
        before = line.get_attribute("d")
        assert before is not None
        fake.event(
            "figures",
            attachment="g1.a1",
            device="scratch.raw",
            port="usbredir 0",
            state="in use",
            level="detail",
            read=84_200_000,
            written=1500,
            commands=4812,
            rate=84_200_000,
            memory=0,
            errors=3,
            endpoints=[endpoint],
        )
        expect(socket(page, 0).locator(".figures")).to_have_text(
            "Read84.2\u00a0MBWritten1.50\u00a0kBCommands4\u202f812Errors3"
        )
        expect(socket(page, 0).locator("dd.stop")).to_have_text("3")
        expect(socket(page, 0).locator(".rate")).to_contain_text("84.2\u00a0MB/s read")
        expect(line).not_to_have_attribute("d", before)
        page.get_by_role("button", name="More about scratch.raw").click()
        page.get_by_role("menuitem", name="Show endpoints").click()
        expect(page.locator(".ends tbody tr")).to_have_text("81 to the VM1224.19\u00a0MB0")

    def test_names_from_outside_are_text(self, fake: FakePage, opened: Opened) -> None:
        fake.devices = [{**KEY, "name": EVIL}]
        page = opened(fake)
        expect(page.get_by_text("You drive")).to_be_visible()
        fake.attachment("g1.a1", "usbredir 0", label=EVIL, units=[EVIL])
        fake.event("note", message=EVIL, device=EVIL)
        shown = EVIL.replace("\u202e", "\ufffd").replace("\u0007", "\ufffd")
        expect(socket(page, 0).locator(".mid").first).to_have_attribute("title", shown)
        expect(page.locator(".log li").first).to_contain_text(shown)
        expect(page.locator(".devices h3").first).to_have_text(shown)
        assert page.locator("img").count() == 0

    def test_a_port_that_another_client_uses(self, fake: FakePage, opened: Opened) -> None:
        error = {"reason": "channel-in-use", "message": "another client uses the channel", "remedy": "close it"}
        fake.snapshot["guests"]["g1"] = guest(1)
        fake.snapshot["guests"]["g1"]["ports"][0] |= {"state": "closed", "error": error}
        page = opened(fake)
        expect(socket(page, 0)).to_contain_text("Not open")
        expect(socket(page, 0)).to_contain_text("Another client uses the channel. Close it.")


class TestPlugging:
    def test_devices_that_cannot_be_listed(self, fake: FakePage, opened: Opened) -> None:
        def refuse(params: object, data: object) -> None:
            remedy = {"remedy": "load the kernel's support", "command": "sudo modprobe usbcore"}
            raise Refused("no-usb", "this machine has no USB", **remedy)

        fake.handlers["devices"] = refuse
        page = opened(fake)
        shown = page.locator(".plugin .nothing")
        expect(shown).to_contain_text("The USB devices cannot be listed. This machine has no USB.")
        expect(shown.locator(".remedy")).to_have_text("Load the kernel's support:")
        expect(shown.locator("code")).to_have_text("$ sudo modprobe usbcore")

    def test_devices_of_this_machine(self, fake: FakePage, opened: Opened) -> None:
        """One is plugged in by its button and dragged to a socket; the row of another one has the reason why not."""
        fake.devices = [KEY, DISK]
        page = opened(fake)
        row = page.locator(".devices li", has_text="Portable SSD T7")
        expect(row).to_contain_text("This machine uses the disk: /dev/sdc2 is mounted on /home.")
        expect(row.get_by_role("button", name="Plug in", exact=True)).to_have_count(0)
        page.get_by_role("button", name="Plug in YubiKey 5 NFC").click()
        params = fake.wait("attach").params
        assert params == {"sources": [{"kind": "usb-device", "path": "1-2"}], "port": 0, "wait": False}
        expect(socket(page, 0)).to_contain_text("In use")
        page.locator(".devices li", has_text="YubiKey 5 NFC").drag_to(socket(page, 2))
        assert fake.wait("attach", 2).params["port"] == 2
        expect(socket(page, 2)).to_contain_text("In use")  # no more messages come and move the others
        page.locator(".log li", has_text="attached as").last.hover()
        page.locator(".log li", has_text="attached as").last.get_by_role("button", name="Copy command").click()
        expect(page.locator("#said")).to_have_text("Copied")

    def test_a_refusal_stays_at_its_socket_with_its_remedy(self, fake: FakePage, opened: Opened) -> None:
        def refuse(params: Json, data: bytes | None) -> Any:
            raise Refused(
                "in-use",
                "this machine uses the disk",
                remedy="unmount it",
                command="umount /home",
                setting="rules.force",
                value=True,
            )

        fake.devices = [KEY]
        attach, fake.handlers["attach"] = fake.handlers["attach"], refuse
        page = opened(fake)
        page.get_by_role("button", name="Plug in YubiKey 5 NFC").click()
        place = socket(page, 0)
        expect(place.get_by_role("alert")).to_contain_text("This machine uses the disk.")
        expect(place).to_contain_text("Unmount it:")
        expect(place.locator("code")).to_contain_text("umount /home")
        place.get_by_role("button", name="Plug in anyway…").click()
        expect(place).to_contain_text("It can damage data")
        assert len(fake.of("attach")) == 1
        fake.handlers["attach"] = attach
        place.get_by_role("button", name="Plug in anyway", exact=True).click()
        assert fake.wait("attach", 2).params["rules"] == {"force": True}
        expect(socket(page, 0)).to_contain_text("In use")
        expect(page.get_by_role("alert")).to_have_count(0)

    def test_the_vm_refuses_and_the_refusal_is_put_away(self, fake: FakePage, page: Page) -> None:
        about = {name: value for name, value in attachment("g1.a1", "usbredir 1").items() if name != "id"}
        common = {"attachment": "g1.a1", "device": "scratch.raw"}
        fake.event("attaching", **common, **{**about, "state": "attached"})
        error = {"reason": "filtered", "message": "the VM's filter does not allow the device", "remedy": "change it"}
        fake.event("refused", **common, port="usbredir 1", state="refused", error=error, level="bad")
        fake.event("removed", **common, port="usbredir 1", state="refused")
        expect(socket(page, 1).get_by_role("alert")).to_contain_text("The VM's filter does not allow the device.")
        socket(page, 1).get_by_role("button", name="Put the refusal away").click()
        expect(socket(page, 1)).to_have_text("1EmptyPlug in…")

    @pytest.fixture
    def unhurried(self, page: Page) -> Page:
        """Return a page for which each write was just now: on a busy machine a click may come 5 s later."""
        page.evaluate("() => { const now = Date.now(); Date.now = () => now; }")
        return page

    @staticmethod
    def plugged_and_written(fake: FakePage, page: Page, id: str, sources: list[dict[str, str]]) -> None:
        """Attach a device to which the guest has sent 4096 bytes."""
        fake.attachment(id, "usbredir 0", sources=sources)
        fake.event(
            "figures",
            attachment=id,
            device="scratch.raw",
            port="usbredir 0",
            state="in use",
            level="detail",
            read=0,
            written=4096,
            commands=1,
            rate=4096,
            memory=0,
        )
        expect(socket(page, 0).locator(".figures")).to_contain_text("4.10\u00a0kB")

    def test_unplug_asks_after_a_write(self, fake: FakePage, unhurried: Page) -> None:
        page = unhurried
        made_of: list[list[dict[str, str]]] = [
            [],
            [{"kind": "disk"}],
            [{"kind": "usb-device"}],
            [{"kind": "serial"}, {"kind": "disk"}],
        ]
        for number, sources in enumerate(made_of):
            self.plugged_and_written(fake, page, f"g1.a{number}", sources)
            page.get_by_role("button", name="Unplug scratch.raw").click()
            expect(socket(page, 0)).to_contain_text("The VM wrote")
            assert len(fake.of("detach")) == number
            page.get_by_role("button", name="Unplug anyway").click()
            assert fake.wait("detach", number + 1).params == {"device": f"g1.a{number}"}
            expect(socket(page, 0)).to_contain_text("Empty")

    def test_unplug_at_once(self, fake: FakePage, unhurried: Page) -> None:
        """Nothing was written to it, or it holds no data."""
        page = unhurried
        for number, kind in enumerate(("disk", "fido", "keyboard", "serial", "network")):
            if kind == "disk":
                fake.attachment("g1.a0", "usbredir 0", sources=[{"kind": kind}])
            else:
                self.plugged_and_written(fake, page, f"g1.a{number}", [{"kind": kind}])
            page.get_by_role("button", name="Unplug scratch.raw").click()
            assert fake.wait("detach", number + 1).params == {"device": f"g1.a{number}"}
            expect(socket(page, 0)).to_contain_text("Empty")

    def test_eject_and_insert(self, fake: FakePage, opened: Opened) -> None:
        def locked(params: Json, data: bytes | None) -> Any:
            if not params.get("force"):
                raise Refused("medium-locked", "the VM has locked the medium", remedy="eject it in the VM")
            fake.event(
                "medium-ejected",
                attachment="g1.a1",
                device="cdrom0",
                port="usbredir 0",
                state="in use",
                lun=0,
                medium="/srv/a.iso",
                by_guest=False,
            )

        fake.handlers["eject"] = locked
        fake.handlers["insert"] = lambda params, data: None
        fake.files = {"": IMAGES}
        page = opened(fake)
        source = {"kind": "cdrom", "path": "/srv/a.iso"}
        fake.attachment(
            "g1.a1", "usbredir 0", label="cdrom0", units=["cdrom0"], identity="farplug Virtual CD-ROM", sources=[source]
        )
        page.get_by_role("button", name="Eject a.iso").click()
        expect(page.get_by_role("alert")).to_contain_text("The VM has locked the medium.")
        page.get_by_role("button", name="Eject anyway").click()
        assert fake.wait("eject", 2).params == {"drive": "cdrom0", "force": True}
        expect(socket(page, 0).locator("h3")).to_have_text("CD-ROM drive, empty")
        page.get_by_role("button", name="Insert…").click()
        page.get_by_role("radio", name="virtio.iso").check()
        expect(page.get_by_role("dialog").locator("code")).to_have_text("$ farplug insert -s web1 virtio.iso cdrom0")
        page.get_by_role("button", name="Insert", exact=True).click()
        assert fake.wait("insert").params == {"path": "virtio.iso", "drive": "cdrom0"}

    def test_the_menu_copies_commands(self, fake: FakePage, page: Page) -> None:
        fake.files = {"": IMAGES}
        page.get_by_role("button", name="Plug in… Socket 0").click()
        page.get_by_role("radio", name="drivers.raw").check()
        page.get_by_role("dialog").get_by_role("button", name="Plug in", exact=True).click()
        page.get_by_role("button", name="More about drivers.raw").click()
        expect(page.get_by_role("menuitem")).to_have_count(2)
        expect(page.get_by_role("menuitem").first).to_contain_text("farplug attach -s web1 --usb-disk-ro drivers.raw")
        expect(page.get_by_role("menuitem").first).to_be_focused()
        page.keyboard.press("ArrowDown")
        expect(page.get_by_role("menuitem").nth(1)).to_be_focused()
        page.keyboard.press("Escape")
        expect(page.get_by_role("menu")).to_have_count(0)
        expect(page.get_by_role("button", name="More about drivers.raw")).to_be_focused()


class TestSecurityKey:
    def ask(self, fake: FakePage) -> None:
        fake.event(
            "presence-asked",
            attachment="g1.a1",
            device="keys.json",
            port="usbredir 0",
            state="in use",
            interface=0,
            request=7,
            use="sign-in",
            site="login.example.org",
            user="mia",
            seconds=30,
            until=time.time() + 25,
            message="login.example.org asks for a touch",
        )

    def test_a_touch_also_over_the_picture_while_the_panel_is_folded_away(self, fake: FakePage, page: Page) -> None:
        fake.handlers["presence"] = lambda params, data: None
        fake.attachment("g1.a1", "usbredir 0", label="keys.json", units=["keys.json"], identity="farplug Security Key")
        self.ask(fake)
        row = page.get_by_role("alertdialog", name="Asks for a touch: keys.json")
        expect(row).to_contain_text("login.example.org wants to sign you in as mia.")
        expect(row).to_contain_text("s left")
        expect(page.locator(".log .asks")).to_contain_text("login.example.org asks for a touch")
        assert page.evaluate("document.activeElement === document.body")
        row.get_by_role("button", name="Touch").click()
        assert fake.wait("presence").params == {"answer": "allow", "attachment": "g1.a1", "request": 7}
        common = {"attachment": "g1.a1", "device": "keys.json", "port": "usbredir 0", "state": "in use"}
        fake.event("presence-answered", **common, interface=0, request=7, answer="allow")
        expect(row).to_have_count(0)
        page.get_by_role("button", name="USB panel").click()
        self.ask(fake)
        page.locator(".floating").get_by_role("button", name="Refuse").click()
        assert fake.wait("presence", 2).params["answer"] == "refuse"


class TestVirtual:
    def test_each_is_plugged_in(self, fake: FakePage, opened: Opened) -> None:
        fake.snapshot["guests"]["g1"] = guest(10)
        page = opened(fake)
        page.get_by_role("tab", name="Virtual").click()
        row = page.locator(".devices li", has_text="USB network adapter")
        expect(row.get_by_role("button", name="Plug in")).to_have_count(0)
        row.get_by_role("button", name="Copy command").click()
        expect(page.locator("#said")).to_have_text("Copied")
        expected = [
            ("USB keyboard", {"kind": "keyboard"}),
            ("USB tablet", {"kind": "tablet"}),
            ("USB mouse", {"kind": "mouse"}),
            ("USB touchscreen", {"kind": "touchscreen"}),
            ("USB gamepad", {"kind": "gamepad"}),
            ("USB camera", {"kind": "camera", "path": "pattern"}),
            ("USB security key", {"kind": "fido", "path": "keys.json", "presence": "ask"}),
            ("USB security key", {"kind": "fido", "path": "tests/mia.json", "presence": "ask"}),
            ("USB serial line to a program", {"kind": "serial", "path": "pty"}),
            ("USB serial line", {"kind": "serial", "path": "client"}),
        ]
        for number, (name, source) in enumerate(expected):
            if source.get("path") == "tests/mia.json":
                page.get_by_label("File of the security key").fill("tests/mia.json")
            page.get_by_role("button", name=f"Plug in {name}", exact=True).click()
            assert fake.wait("attach", number + 1).params == {"sources": [source], "port": number, "wait": False}
            assert fake.wait("command", matching=lambda params: params["params"].get("sources") == [source])  # noqa: B023
            expect(socket(page, number)).to_contain_text("In use")

    def test_without_a_folder_there_is_no_file(self, opened: Opened) -> None:
        with FakePage(web_root=False) as fake:
            page = opened(fake)
            reason = page.get_by_text("Record USB needs a folder")
            for width in (1280, 800):
                page.set_viewport_size({"width": width, "height": 600})
                expect(reason).to_be_visible()
                for side in ("Width", "Height"):
                    assert reason.evaluate(f"node => node.scroll{side} - node.client{side}") <= 0, (
                        "the option is cut off"
                    )
            page.get_by_role("tab", name="Images").click()
            expect(page.locator(".plugin")).to_contain_text("No folder of this machine is open to this page.")
            expect(page.locator(".plugin code")).to_have_text("$ farplug page --web-root DIR")
            page.get_by_role("tab", name="Virtual").click()
            expect(page.locator(".plugin")).to_contain_text("Its file needs a folder")
            expect(page.get_by_role("button", name="Plug in USB camera")).to_be_visible()
            expect(page.get_by_role("button", name="Plug in USB security key")).to_have_count(0)
            expect(page.get_by_role("button", name="Show a clip")).to_have_count(0)

    def test_a_clip_and_a_folder_of_images(self, fake: FakePage, page: Page) -> None:
        clip = {**IMAGES[1], "name": "a.mjpeg", "as": "clip"}
        fake.files = {"": [{**IMAGES[0], "name": "pattern"}, clip, *IMAGES[1:]]}
        page.get_by_role("tab", name="Virtual").click()
        for port, (chosen, path) in enumerate((("a.mjpeg", "a.mjpeg"), ("pattern", "pattern/"))):
            page.get_by_role("button", name="Show a clip with USB camera").click()
            dialog = page.get_by_role("dialog", name="Plug in a camera")
            expect(dialog.get_by_role("radio")).to_have_count(2)
            dialog.get_by_role("radio", name=chosen).check()
            dialog.get_by_role("button", name="Plug in", exact=True).click()
            assert fake.wait("attach", port + 1).params == {
                "sources": [{"kind": "camera", "path": path}],
                "port": port,
                "wait": False,
            }
            expect(dialog).to_have_count(0)
            expect(socket(page, port)).to_contain_text("In use")

    def test_a_clip_among_the_images(self, fake: FakePage, opened: Opened) -> None:
        fake.files = {"": [{**IMAGES[1], "name": "a.mjpeg", "as": "clip"}]}
        page = opened(fake)
        page.get_by_role("button", name="Plug in… Socket 0").click()
        expect(page.get_by_role("dialog").locator("tr.no")).to_contain_text("A clip: a camera shows it.")
        page.keyboard.press("Escape")
        page.get_by_role("tab", name="Images").click()
        page.get_by_role("button", name="Plug in… a.mjpeg").click()
        expect(page.get_by_role("dialog", name="Plug in a camera").get_by_role("radio")).to_be_checked()

    def test_the_path_of_a_terminal(self, fake: FakePage, page: Page) -> None:
        fake.attachment("g1.a1", "usbredir 0", label="serial0", units=["serial0"], details=["/dev/pts/5"])
        expect(socket(page, 0).locator(".detail code")).to_have_text("/dev/pts/5")
        socket(page, 0).locator(".detail").get_by_role("button", name="Copy").click()
        expect(page.locator("#said")).to_have_text("Copied")
        fake.attachment("g1.a2", "usbredir 1", label="fido0", units=["fido0"], details=["keys.json, presence: ask"])
        expect(socket(page, 1).locator(".detail")).to_have_text("keys.json, presence: ask")
        expect(socket(page, 1).locator(".detail button")).to_have_count(0)


class TestDialog:
    @staticmethod
    def dialog(page: Page, port: int) -> Locator:
        """Open the dialog of a socket."""
        page.get_by_role("button", name=f"Plug in… Socket {port}").click()
        dialog = page.get_by_role("dialog", name=f"Plug into socket {port}")
        expect(dialog).to_be_visible()
        return dialog

    def test_a_disk_with_a_snapshot(self, fake: FakePage, page: Page) -> None:
        fake.files = {"": IMAGES}
        dialog = self.dialog(page, 2)
        expect(dialog.get_by_role("radio", name="base.qcow2")).to_be_disabled()
        expect(dialog.locator("tr.no")).to_contain_text("it is qcow2")
        page.keyboard.press("Escape")
        expect(dialog).to_have_count(0)
        expect(page.get_by_role("button", name="Plug in… Socket 2")).to_be_focused()
        dialog = self.dialog(page, 2)
        expect(dialog.get_by_role("button", name="Plug in", exact=True)).to_be_disabled()
        expect(dialog).to_contain_text("Choose what to plug in.")
        dialog.get_by_role("radio", name="drivers.raw").check()
        expect(dialog.locator("footer code")).to_have_text("$ farplug attach -s web1 --usb-disk-ro drivers.raw")
        dialog.get_by_role("radio", name="Write to a snapshot").check()
        expect(dialog.locator("footer code")).to_have_text("$ farplug attach -s web1 --usb-disk drivers.raw")
        dialog.get_by_label("Speed").select_option("high")
        dialog.get_by_role("button", name="Plug in", exact=True).click()
        assert fake.wait("attach").params == {
            "sources": [{"kind": "disk", "path": "drivers.raw"}],
            "storage": {"speed": "high", "snapshot": True},
            "port": 2,
            "wait": False,
        }
        expect(dialog).to_have_count(0)

    def test_an_iso_is_a_cd_and_a_folder_is_opened_or_plugged_in(self, fake: FakePage, page: Page) -> None:
        fake.files = {"": IMAGES, "archive": IMAGES[1:2]}
        dialog = self.dialog(page, 2)
        dialog.get_by_role("radio", name="virtio.iso").check()
        expect(dialog.get_by_role("radio", name="CD-ROM")).to_be_checked()
        expect(dialog.get_by_text("It may")).to_have_count(0)
        dialog.get_by_role("button", name="Plug in", exact=True).click()
        assert fake.wait("attach").params["sources"] == [{"kind": "cdrom", "path": "virtio.iso"}]
        expect(dialog).to_have_count(0)
        dialog = self.dialog(page, 3)
        dialog.get_by_role("button", name="Open archive").click()
        dialog.get_by_role("radio", name="drivers.raw").check()
        expect(dialog.locator("footer code")).to_contain_text("archive/drivers.raw")
        dialog.get_by_role("navigation").get_by_role("button", name="images").click()
        dialog.get_by_role("tab", name="Folder").click()
        dialog.get_by_role("radio", name="archive").check()
        dialog.get_by_role("button", name="Plug in", exact=True).click()
        assert fake.wait("attach", 2).params["sources"] == [{"kind": "folder", "path": "archive"}]


class TestFilesOfTheBrowser:
    def test_an_iso_that_is_dropped_is_a_cd(self, fake: FakePage, page: Page) -> None:
        data = iso()
        drop(page, ".bench", file("debian.iso", data))
        offer = fake.wait("media-offer").params
        assert (offer["file"], offer["size"]) == ("debian.iso", len(data))
        assert fake.wait("attach").params["sources"] == [{"kind": "cdrom", "path": "client:m1"}]
        expect(socket(page, 0).locator("h3")).to_have_text("debian.iso")
        expect(socket(page, 0)).to_contain_text("CD-ROM from this browser")
        expect(socket(page, 0)).to_contain_text("The VM has not read it yet")
        fake.emit("media-read", {"media": "m1", "read": 7, "offset": 32_768, "length": 4096})
        answer = fake.wait("media-data")
        assert answer.params == {"media": "m1", "read": 7}
        assert answer.data == data[32_768 : 32_768 + 4096]
        touched = base64.b64encode(bytes([0b1100_0000]) + bytes(30) + bytes([1])).decode()
        fake.emit("media-progress", {"media": "m1", "read": 4096, "last": 100_000, "touched": touched})
        expect(socket(page, 0).locator(".touched rect")).to_have_count(3)
        expect(socket(page, 0).locator("figcaption")).to_contain_text(
            "1\u00a0% touched, 4.10\u00a0kB of 200\u00a0kB read"
        )

    def test_another_file_is_a_read_only_disk_in_the_chosen_socket(self, fake: FakePage, page: Page) -> None:
        drop(page, ".socket[data-port='3']", file("a.raw", b"disk" * 512))
        params = fake.wait("attach").params
        assert params["sources"] == [{"kind": "read-only-disk", "path": "client:m1"}]
        assert params["port"] == 3
        page.get_by_role("button", name="Unplug a.raw").click()
        assert fake.wait("media-withdraw").params == {"media": "m1"}

    def test_a_chosen_file_that_vanished_fails_the_read(self, fake: FakePage, page: Page, tmp_path: Path) -> None:
        path = tmp_path / "a.iso"
        path.write_bytes(iso())
        page.get_by_role("tab", name="This browser").click()
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Choose a file…").click()
        chooser.value.set_files(path)
        fake.wait("attach")
        path.unlink()
        fake.emit("media-read", {"media": "m1", "read": 1, "offset": 0, "length": 2048})
        answer = fake.wait("media-data")
        assert answer.params["error"] == "The file cannot be read any more: it was changed, moved or removed."
        assert answer.data == b""

    def test_refusals_at_the_socket(self, fake: FakePage, page: Page) -> None:
        page.evaluate(
            "() => { const entry = DataTransferItem.prototype.webkitGetAsEntry;"
            " DataTransferItem.prototype.webkitGetAsEntry = function () {"
            " return this.getAsFile()?.name === 'stuff' ? {isDirectory: true} : entry.call(this); }; }"
        )
        for number, (script, message) in enumerate(
            [
                ("transfer.items.add(new File([], 'a.iso'))", "The file is empty."),
                (
                    "transfer.items.add(new File(['a'], 'a')); transfer.items.add(new File(['b'], 'b'))",
                    "2 files were dropped at once.",
                ),
                ("transfer.items.add(new File(['a'], 'stuff'))", "A browser passes on files, not folders."),
            ],
            1,
        ):
            drop(page, f".socket[data-port='{number}']", script)
            expect(socket(page, number).get_by_role("alert")).to_contain_text(message)
        assert fake.of("media-offer") == []

        def refuse(params: Json, data: bytes | None) -> Any:
            raise Refused("not-raw", "the file is compressed", remedy="unpack it")

        fake.handlers["attach"] = refuse
        drop(page, ".bench", file("a.raw.gz", b"disk" * 512))
        expect(socket(page, 0).get_by_role("alert")).to_contain_text("The file is compressed.")
        fake.wait("media-withdraw")

    def test_two_drops_one_right_after_the_other_go_to_two_sockets(self, fake: FakePage, page: Page) -> None:
        page.evaluate(
            "() => { for (const name of ['a.raw', 'b.raw']) { const dataTransfer = new DataTransfer();"
            " dataTransfer.items.add(new File(['disk'.repeat(512)], name)); document.querySelector('.bench')"
            ".dispatchEvent(new DragEvent('drop', { dataTransfer, bubbles: true, cancelable: true })); } }"
        )
        expect(page.get_by_role("button", name="Unplug a.raw")).to_be_visible()
        expect(page.get_by_role("button", name="Unplug b.raw")).to_be_visible()
        assert sorted(call.params["port"] for call in fake.of("attach")) == [0, 1]
        assert fake.of("media-withdraw") == []

    def test_all_sockets_are_taken(self, fake: FakePage, page: Page) -> None:
        for number in range(4):
            fake.attachment(f"g1.a{number}", f"usbredir {number}", label=f"{number}.raw")
        expect(page.get_by_text("4 of 4 in use")).to_be_visible()
        drop(page, ".bench", file("a.iso", iso()))
        expect(page.locator(".spill").get_by_role("alert")).to_contain_text("All 4 sockets are taken.")
        drop(page, ".socket[data-port='1']", file("b.iso", iso()))
        expect(page.locator(".socket[data-port='1'] + .spill")).to_contain_text("This socket is taken.")
        assert fake.of("media-offer") == []

    def test_zones_while_a_file_is_dragged(self, page: Page) -> None:
        transfer = page.evaluate_handle(
            "() => { const one = new DataTransfer(); one.items.add(new File(['a'], 'a')); return one; }"
        )
        page.dispatch_event(".bench", "dragover", {"dataTransfer": transfer})
        expect(page.get_by_role("heading", name="Drop it to plug it in")).to_be_visible()
        expect(socket(page, 0)).to_contain_text("Goes in here")
        page.dispatch_event("body", "dragleave")
        expect(page.get_by_role("heading", name="Drop it to plug it in")).to_have_count(0)

    def test_upload_first(self, fake: FakePage, page: Page, tmp_path: Path) -> None:
        data = iso(9_000_000)
        path = tmp_path / "big one.iso"
        path.write_bytes(data)
        fake.uploads["big one.iso"] = bytearray(data[:1000])
        page.get_by_role("tab", name="This browser").click()
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Upload first").click()
        chooser.value.set_files(path)
        assert fake.wait("attach").params["sources"] == [{"kind": "cdrom", "path": "big one.iso"}]
        assert bytes(fake.uploads["big one.iso"]) == data
        expect(page.locator(".uploads")).to_contain_text(hashlib.sha256(data).hexdigest())


class TestRecording:
    def test_start_and_stop(self, fake: FakePage, page: Page) -> None:
        def start(params: Json, data: bytes | None) -> None:
            fake.event("capture-started", path="/srv/images/web1.pcapng", bytes=None)

        fake.handlers["capture"] = start
        fake.handlers["stop-capture"] = lambda params, data: fake.event(
            "capture-ended", path="x", error=None, dropped=0, cut=0
        )
        page.get_by_role("button", name="Record USB").click()
        expect(page.locator(".recordform code")).to_have_text("$ farplug capture -s web1 web1.pcapng")
        page.get_by_role("button", name="Record", exact=True).click()
        assert fake.wait("capture").params == {"path": "web1.pcapng"}
        page.get_by_role("button", name="Stop recording").click()
        fake.wait("stop-capture")
        expect(page.get_by_role("button", name="Record USB")).to_be_visible()


class TestMessages:
    def test_newest_first_with_remedy_and_dropped_events_lead_to_a_new_snapshot(
        self, fake: FakePage, page: Page
    ) -> None:
        fake.event("note", message="first")
        fake.event("skipped", message="second", level="bad", remedy="do this", command="umount /x")
        fake.event("figures", message="quiet", level="detail", attachment="g1.a9")
        expect(page.locator(".log li")).to_have_count(2)
        expect(page.locator(".log li").first).to_contain_text("second")
        expect(page.locator(".log .fix")).to_have_text("do this: umount /x")
        fake.snapshot = {"last_event": 900, "guests": {"g1": guest(2)}}
        fake.emit("dropped", {"count": 4, "id": 899})
        expect(page.locator(".socket")).to_have_count(2)


class TestText:
    @pytest.fixture
    def text(self, page: Page) -> Locator:
        """Return the field of the text."""
        page.get_by_role("button", name="Type text").click()
        return page.get_by_label("Text", exact=True)

    def test_type(self, fake: FakePage, page: Page, text: Locator) -> None:
        """A text, a long one in pieces, and a hidden one."""
        text.fill("root\nsecret 1")
        page.get_by_role("button", name="Type it").click()
        assert fake.wait("type").params == {"text": "root\nsecret 1", "hidden": False, "layout": "us"}
        expect(page.get_by_text("Typed 13 characters. The VM confirmed all of them.")).to_be_visible()
        text.fill("ab" * 3000)
        page.get_by_role("button", name="Type it").click()
        fake.wait("type", 3)
        expect(page.get_by_text("Typed 6\u202f000 characters. The VM confirmed all of them.")).to_be_visible()
        assert [len(call.params["text"]) for call in fake.of("type")] == [13, 4000, 2000]
        page.get_by_label("Hide the text").check()
        page.get_by_label("Text, hidden").fill("pa55")
        assert page.locator("#type-text").get_attribute("type") == "password"
        page.keyboard.press("Enter")
        assert fake.wait("type", 4).params == {"text": "pa55", "hidden": True, "layout": "us"}

    def test_it_fails_or_the_vm_does_not_confirm(self, fake: FakePage, page: Page, text: Locator) -> None:
        codes = iter(("no-free-port", "unconfirmed"))

        def fail(params: Json, data: bytes | None) -> Any:
            raise Refused(next(codes), "the keyboard is gone")

        fake.handlers["type"] = fail
        text.fill("root")
        for words in ("Nothing was typed: ", "Not all of it is certain: "):
            page.get_by_role("button", name="Type it").click()
            expect(page.locator(".problem")).to_contain_text(f"{words}the keyboard is gone")
            expect(text).to_have_value("root")
        replies = iter([{"via": "usb", "confirmed": True}, {"via": "spice", "confirmed": False}])
        fake.handlers["type"] = lambda params, data: next(replies)
        text.fill("a" * 5000)
        page.get_by_role("button", name="Type it").click()
        expect(page.get_by_text("The VM did not confirm them: look at its screen.")).to_be_visible()

    def test_a_layout_that_is_not_in_the_package(self, fake: FakePage, opened: Opened) -> None:
        layouts = [{"name": "us", "title": "English (US)"}]
        fake.handlers["layouts"] = lambda params, data: {"layouts": layouts, "current": "de(neo)"}
        page = opened(fake)
        page.get_by_role("button", name="Type text").click()
        expect(page.get_by_label("Keyboard layout of the VM")).to_have_value("de(neo)")
        page.get_by_label("Text", exact=True).fill("root")
        page.get_by_role("button", name="Type it").click()
        assert fake.wait("type").params["layout"] == "de(neo)"

    def test_what_the_layout_lacks(self, fake: FakePage, page: Page, text: Locator) -> None:
        """It is found at the end of a long text, too; it is underlined, left out, or typed with another layout."""
        text.fill("a" * 9000 + "ö")
        expect(page.locator(".problem")).to_contain_text("1 character is not on this layout: ö (line 1, column 9001)")
        expect(page.get_by_role("button", name="Type it")).to_be_disabled()
        text.fill("größe")
        page.get_by_role("button", name="Leave out the 2").click()
        expect(text).to_have_value("gre")
        text.fill("größe\n12 €")
        expect(page.locator(".mirror mark")).to_have_text(["ö", "ß", "€"])
        expect(page.locator(".problem")).to_contain_text(
            "3 characters are not on this layout: ö (line 1, column 3), ß (line 1, column 4), € (line 2, column 4)"
        )
        expect(page.get_by_role("button", name="Type it")).to_be_disabled()
        page.get_by_role("button", name="Use German").click()
        page.get_by_role("button", name="Type it").click()
        assert fake.wait("type").params["layout"] == "de"

    def test_a_letter_is_left_out_with_its_marks(self, fake: FakePage, page: Page, text: Locator) -> None:
        fake.handlers["check-text"] = lambda params, data: {
            "missing": [{"index": 1, "char": "ö", "layouts": ["de"]}] if "\u0308" in params["text"] else []
        }
        text.fill("go\u0308e")
        page.get_by_role("button", name="Leave out the 1").click()
        expect(text).to_have_value("ge")

    def test_progress_and_stop(self, fake: FakePage, page: Page, text: Locator) -> None:
        fake.handlers["type"] = lambda params, data: LATER
        text.fill("x" * 100)
        page.get_by_role("button", name="Type it").click()
        fake.wait("type")
        fake.emit("typing", {"done": 40, "total": 100})
        expect(page.locator(".typebox")).to_contain_text("40 of 100 characters, 2\u00a0s left")
        page.get_by_role("button", name="Stop", exact=True).click()
        fake.wait("stop-typing")
        fake.finish("type", Refused("interrupted", "the typing was stopped"))
        expect(page.get_by_text("Stopped.")).to_be_visible()
        expect(text).to_have_value("x" * 100)

    def test_keys(self, fake: FakePage, page: Page) -> None:
        page.get_by_role("button", name="Ctrl+Alt+Del").click()
        assert fake.wait("press").params == {"keys": "ctrl+alt+Delete"}
        page.get_by_role("toolbar").get_by_role("button", name="Keys").click()
        page.get_by_role("button", name="Shift").click()
        page.get_by_role("button", name="F5", exact=True).click()
        assert fake.wait("press", 2).params == {"keys": "shift+F5"}
        expect(page.locator(".keypad code")).to_have_text("$ farplug press -s web1 shift+F5")


class TestBoard:
    def test_tiles(self, opened: Opened) -> None:
        with FakePage(session=None) as fake:
            fake.rows = ROWS
            page = opened(fake)
            tile = page.get_by_role("link", name="web1")
            expect(tile).to_contain_text("1 of 2 sockets in use1.50\u00a0kB/s")
            expect(tile.get_by_role("img", name="Screen of web1")).to_be_visible()
            expect(page.get_by_text("Does not respond").first).to_be_visible()
            page.get_by_label("Find a session").fill("nothing")
            expect(page.get_by_role("status").filter(has_text="No session has “nothing”")).to_be_visible()
            page.get_by_label("Find a session").fill("test")
            tile.click()
            assert fake.wait("open").params == {"session": "web1"}
            expect(page.locator(".socket")).to_have_count(4)
            page.go_back()
            fake.wait("close")
            expect(page.get_by_role("heading", name="Sessions")).to_be_visible()

    def test_a_session_that_starts_appears(self, opened: Opened) -> None:
        with FakePage(session=None) as fake:
            page = opened(fake)
            expect(page.get_by_role("heading", name="No session runs yet")).to_be_visible()
            fake.wait("watch-sessions")
            fake.emit("sessions", {"sessions": ROWS})
            expect(page.get_by_role("link", name="web1")).to_be_visible()
