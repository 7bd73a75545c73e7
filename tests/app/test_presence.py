"""Questions of security keys in the application: events, state, answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.app.test_link import running
from tests.cli.key_guest import KeyGuest

from farplug.app.commands import Attach, Detach, Presence, PresenceAnswer
from farplug.app.settings import Source
from farplug.app.state import apply
from farplug.errors import ImageError, Reason, UsageError
from farplug.virtual.fido.presence import Presence as WhoTouches

ALLOW, REFUSE = PresenceAnswer.ALLOW, PresenceAnswer.REFUSE


@pytest.mark.parametrize(("answer", "status"), [(ALLOW, 0), (REFUSE, 0x27)])
async def test_a_user_answers(tmp_path: Path, answer: PresenceAnswer, status: int) -> None:
    guest = KeyGuest()
    source = Source.fido(tmp_path / "keys.json", WhoTouches.ASK)
    async with guest.listening() as target, running(target) as session:
        await session.named("ready")
        with pytest.raises(UsageError, match="no security key is plugged in"):
            await session.app.do(Presence())
        snapshot = session.app.snapshot()
        (attached,) = (await session.app.do(Attach((source,))))["attachments"]
        assert (attached["label"], attached["details"]) == ("fido0", ["keys.json, presence: ask"])
        asked = await session.named("presence-asked")
        assert asked.message == "the VM waits for your answer: select the key (30 s)"
        (question,) = session.guest.attachments[0].snapshot()["questions"]
        assert {name: asked.fields[name] for name in question} == question
        with pytest.raises(UsageError, match="'cdrom0' is not a security key"):
            await session.app.do(Presence(attachment="cdrom0"))
        with pytest.raises(UsageError, match="does not wait for an answer to 7") as caught:
            await session.app.do(Presence(request=7))
        assert caught.value.reason is Reason.NOT_ASKED
        name = "fido0" if answer is ALLOW else str(tmp_path / "keys.json")
        answered = await session.app.do(Presence(answer, name, question["request"]))
        assert answered == {"attachment": "fido0", "answer": str(answer), "use": "select", "site": "", "user": ""}
        used = await session.named("key-used")
        assert (used.device, used.fields["status"]) == ("fido0", "operation-denied" if status else "success")
        await session.until(lambda: guest.replies == [status])
        with pytest.raises(UsageError, match="no program in the VM waits") as caught:
            await session.app.do(Presence())
        assert caught.value.reason is Reason.NOT_ASKED
        for event in session.events:
            snapshot = apply(snapshot, event.to_json())
            if event is asked:
                (one,) = snapshot["guests"]["g1"]["attachments"].values()
                assert one["questions"] == [question]
        assert snapshot == session.app.snapshot()
        assert await session.app.do(Detach("fido0")) == {"detached": ["fido0"]}


async def test_unplugged_while_a_user_is_asked(tmp_path: Path) -> None:
    source = Source.fido(tmp_path / "keys.json", WhoTouches.ASK)
    async with KeyGuest().listening() as target, running(target, source) as session:
        await session.named("presence-asked")
        await session.app.do(Detach("all"))
        with pytest.raises(UsageError, match="no security key"):
            await session.app.do(Presence())
        (attached,) = (await session.app.do(Attach((source,))))["attachments"]  # the file is free again
        assert attached["label"] == "fido0"
        await session.named("presence-asked", 2)


async def test_two_keys_in_one_port(tmp_path: Path) -> None:
    sources = [Source.fido(tmp_path / name, WhoTouches.ASK) for name in ("a.json", "b.json")]
    async with KeyGuest().listening() as target, running(target, *sources) as session:
        asked = await session.named("presence-asked")
        assert asked.device == "fido0, fido1"
        assert asked.fields["interface"] == 0
        await session.app.do(Presence(attachment="fido0"))
        await session.named("key-used")


async def test_a_file_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text("{}")
    path.chmod(0o644)
    async with KeyGuest().listening() as target, running(target) as session:
        await session.named("ready")
        with pytest.raises(ImageError, match="other users can open") as caught:
            await session.app.do(Attach((Source.fido(path),)))
        assert caught.value.reason is Reason.NO_PERMISSION
        path.chmod(0o600)
        with pytest.raises(ImageError, match="not the file of a security key"):
            await session.app.do(Attach((Source.fido(path),)))
    assert path.read_text() == "{}"
