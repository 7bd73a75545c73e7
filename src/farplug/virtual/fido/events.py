"""Events of a security key."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

from farplug.usb.device import DeviceEvent
from farplug.virtual.fido.presence import Answer, Question, Use


@dataclass(frozen=True, slots=True, kw_only=True)
class PresenceEvent(DeviceEvent):
    """An event of a question to the user of a key.

    Attributes:
        interface: the key's interface in the device, which may have several keys. Each asks one question at a time.
        request: the number of the question, from 1.
    """

    interface: int = 0
    request: int

    @property
    def kind(self) -> Hashable:
        return "presence", self.interface


@dataclass(frozen=True, slots=True, kw_only=True)
class PresenceAsked(PresenceEvent):
    """A client asks for the touch of a user, and waits.

    Attributes:
        use: what the client asks for.
        site: the site; empty: none.
        user: the account; empty: unknown.
        seconds: how long the user has to answer.
        until: when that time is over, in seconds since 1970.
    """

    name: ClassVar[str] = "presence-asked"
    use: str
    site: str
    user: str
    seconds: float
    until: float

    @property
    def question(self) -> Question:
        """Return the question as a sentence."""
        return Question(Use(self.use), self.site, self.user)

    def __str__(self) -> str:
        return f"the VM waits for your answer: {self.question} ({self.seconds:g} s)"


@dataclass(frozen=True, slots=True, kw_only=True)
class PresenceAnswered(PresenceEvent):
    """A client does not wait for the touch of a user any more.

    Attributes:
        answer: what became of the question.
    """

    name: ClassVar[str] = "presence-answered"
    answer: Answer

    def __str__(self) -> str:
        return {
            Answer.ALLOW: "allowed",
            Answer.REFUSE: "refused",
            Answer.TIMED_OUT: "no answer in time: refused",
            Answer.CANCELLED: "the VM does not wait for an answer any more",
        }[self.answer]


@dataclass(frozen=True, slots=True)
class KeyUsed(DeviceEvent):
    """A client used the security key.

    Attributes:
        use: what for.
        site: the site; empty: none.
        user: the account; empty: unknown.
        status: how it ended, as the CTAP specification names it: ``success``, ``operation-denied``.
    """

    name: ClassVar[str] = "key-used"
    use: str
    site: str
    user: str
    status: str

    def __str__(self) -> str:
        return f"{Question(Use(self.use), self.site, self.user)}: {self.status.replace('-', ' ')}"
