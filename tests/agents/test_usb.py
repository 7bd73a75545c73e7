"""Plugging in by an agent: what is allowed, what a person is asked, secrets and records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mcp.client.context import ClientRequestContext
from mcp_types import ElicitRequestParams, ElicitResult
from tests.agents.support import agent, console

from farplug.agents import machine as machine_module
from farplug.agents.policy import Folders, Policy
from farplug.errors import DeviceError, Reason


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "disk.raw").write_bytes(bytes(1 << 20))
    iso = bytearray(1 << 20)
    iso[0x8001:0x8006] = b"CD001"
    (folder / "a.iso").write_bytes(iso)
    (folder / "b.iso").write_bytes(iso)
    (tmp_path / "outside.raw").write_bytes(bytes(1 << 20))
    (folder / "link.raw").symlink_to(tmp_path / "outside.raw")
    return folder


class Person:
    """Answers questions."""

    def __init__(self, action: str = "accept", allow: bool = True) -> None:
        self.questions: list[str] = []
        self.action: Any = action
        self.allow = allow

    async def __call__(self, context: ClientRequestContext, params: ElicitRequestParams) -> ElicitResult:
        self.questions.append(params.message)
        return ElicitResult(action=self.action, content={"allow": self.allow} if self.action == "accept" else None)


async def test_a_disk_and_a_cdrom_drive(environment: dict[str, str], images: Path) -> None:
    policy = Policy(folders=Folders.of([images]))
    async with console(environment) as one, agent(one, policy) as acting:
        listed = await acting.json("usb_list")
        assert listed["allowed_folders"] == [str(images)]
        assert [Path(file["path"]).name for file in listed["files"]] == ["a.iso", "b.iso", "disk.raw"]
        assert "usb_devices" not in listed
        (attached,) = await acting.json("usb_attach", kind="disk", path="disk.raw")
        assert attached["label"] == "disk.raw"
        (guest,) = one.app.guests.values()
        assert [one["label"] for one in (await acting.json("usb_list"))["attached"]] == ["disk.raw"]
        assert await acting.text("usb_detach", device="disk.raw") == "detached disk.raw"
        assert (await acting.text("usb_detach", device="disk.raw")).startswith("nothing was detached")
        await acting.json("usb_attach", kind="cdrom", path=str(images / "a.iso"))
        assert await acting.text("cdrom_insert", path="b.iso") == f"inserted {images}/b.iso"
        (drive,) = (await acting.json("usb_list"))["cdrom_drives"]
        assert drive["medium"] == str(images / "b.iso")
        assert await acting.text("cdrom_eject") == "ejected"
        assert "[not-found]" in await acting.refused("cdrom_eject", drive="cdrom7")
        assert guest.attachments


async def test_a_vm_that_does_not_use_what_is_plugged_in(
    environment: dict[str, str], images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Firmware: the agent goes on, and restarts it."""
    monkeypatch.setattr(machine_module, "USE_TIMEOUT", 0.1)
    policy = Policy(folders=Folders.of([images]))
    async with console(environment, silent=True) as one, agent(one, policy) as acting:
        (attached,) = await acting.json("usb_attach", kind="cdrom", path="a.iso")
        assert (attached["label"], attached["error"]) == ("cdrom0", None)
        assert attached["note"] == "the VM does not use it yet: firmware looks for devices only when it starts"
        assert [one["label"] for one in (await acting.json("usb_list"))["attached"]] == ["cdrom0"]
        assert await acting.text("usb_detach", device="cdrom0") == "detached cdrom0"


@pytest.mark.parametrize(
    ("tool", "arguments", "reason"),
    [
        ("usb_attach", {"kind": "disk", "path": "link.raw"}, "not-allowed"),
        ("usb_attach", {"kind": "disk", "path": "../outside.raw"}, "not-allowed"),
        ("usb_attach", {"kind": "disk", "path": "/dev/null"}, "not-allowed"),
        ("usb_attach", {"kind": "folder", "path": "/etc"}, "not-allowed"),
        ("usb_attach", {"kind": "disk", "path": ""}, "not-found"),
        ("usb_attach", {"kind": "disk", "path": "disk.raw", "writable": True}, "not-allowed"),
        ("usb_attach", {"kind": "cdrom", "path": "a.iso", "writable": True}, "bad-setting"),
        ("usb_attach", {"kind": "usb-device", "path": "1050:0407"}, "not-allowed"),
        ("cdrom_insert", {"path": "link.raw"}, "not-allowed"),
        ("cdrom_insert", {"path": "disk.raw"}, "not-found"),
    ],
)
async def test_what_is_not_allowed_is_refused(
    environment: dict[str, str], images: Path, tool: str, arguments: dict[str, Any], reason: str
) -> None:
    person = Person()
    async with console(environment) as one, agent(one, Policy(folders=Folders.of([images])), answer=person) as acting:
        error = await acting.refused(tool, **arguments)
        assert error.endswith(f"[{reason}]")
        assert person.questions == []
        (guest,) = one.app.guests.values()
        assert not guest.attachments


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_a_person_is_asked_before_a_writable_disk(environment: dict[str, str], images: Path, mode: str) -> None:
    policy = Policy(folders=Folders.of([images]), allow_write=True)
    person = Person(allow=False)
    async with console(environment) as one, agent(one, policy, answer=person, mode=mode) as acting:
        disk = {"kind": "disk", "path": "disk.raw", "writable": True}
        error = await acting.refused("usb_attach", **disk)
        assert error == "the person did not allow it [not-allowed]"
        assert person.questions == [
            f"An agent wants to plug into the VM: the disk {images}/disk.raw, to which the VM then writes. Allow it?"
        ]
        person.action = "decline"
        await acting.refused("usb_attach", **disk)
        (guest,) = one.app.guests.values()
        assert not guest.attachments
        person.action, person.allow = "accept", True
        (attached,) = await acting.json("usb_attach", **disk)
        assert attached["label"] == "disk.raw"
        assert len(person.questions) == 3


async def test_a_client_that_cannot_ask_uses_what_the_user_allowed(environment: dict[str, str], images: Path) -> None:
    policy = Policy(folders=Folders.of([images]), allow_write=True, allow_devices=True)
    async with console(environment) as one, agent(one, policy) as acting:
        assert await acting.json("usb_attach", kind="disk", path="disk.raw", writable=True)
        assert "usb_devices" in await acting.json("usb_list")


async def test_errors_have_nothing_of_a_secret(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(secrets={"nul": "hunter2\0", "long": "hunter2" * 2000, "lost": "hunter2"})
    async with console(environment) as one, agent(one, policy) as acting:
        for name in ("nul", "long"):
            error = await acting.refused("type_secret", name=name)
            assert error == f"the secret {name} is not a text that can be typed; nothing was typed [bad-setting]"

        async def lose(*arguments: object) -> None:
            raise DeviceError("the VM may have lost keys: 2 of 7 characters are certain", reason=Reason.UNCONFIRMED)

        monkeypatch.setattr("farplug.app.typing.Typing.type", lose)
        error = await acting.refused("type_secret", name="lost")
        assert "the VM may have lost a part of the secret lost" in error
        assert "7" not in error


async def test_secrets_are_typed_and_not_shown(environment: dict[str, str], tmp_path: Path) -> None:
    audit = tmp_path / "audit"
    policy = Policy(secrets={"root": "hunter2", "other": "\N{SNOWMAN}"})
    async with console(environment) as one, agent(one, policy, audit=audit) as acting:
        assert (await acting.json("vm_status"))["secrets"] == ["other", "root"]
        text = await acting.text("type_secret", name="root")
        assert text == "typed the secret root; not confirmed: look whether it is there"
        assert len([body for kind, body in one.inputs.received if kind == 104]) == len("hunter2")
        error = await acting.refused("type_secret", name="other")
        assert error == ("the VM's keyboard layout lacks a character of the secret other; nothing was typed [bad-key]")
        assert "no secret 'admin'" in await acting.refused("type_secret", name="admin")
    records = audit.read_text()
    assert "hunter2" not in records
    outcomes = [record.get("outcome") for record in map(json.loads, records.splitlines())]
    assert outcomes == [None, "done", None, "done", None, "refused", None, "refused"]


async def test_nothing_is_done_without_a_record(environment: dict[str, str]) -> None:
    async with console(environment) as one, agent(one, audit=Path("/dev/full")) as acting:
        assert "[no-space]" in await acting.refused("key", text="a")
        assert one.inputs.received == []
