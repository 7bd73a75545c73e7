"""User presence: who allows what a client asks a security key for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from farplug.text import printable

MAX_SITE: Final = 253
"""Characters that are shown of a site: a domain name."""


class Presence(StrEnum):
    """Who touches the key."""

    AUTO = "auto"
    """Each request is allowed at once."""
    ASK = "ask"
    """The user is asked, and has 30 seconds."""
    DENY = "deny"
    """Each request is refused at once."""


class Use(StrEnum):
    """What a client asks for."""

    REGISTER = "register"
    SIGN_IN = "sign-in"
    LOOK_UP = "look-up"
    """Whether the key has a credential, without the presence of a user."""
    SELECT = "select"
    """Which one of several keys the user wants to use."""
    RESET = "reset"
    SET_PIN = "set-pin"
    CHANGE_PIN = "change-pin"
    ENTER_PIN = "enter-pin"
    LIST = "list"
    """The credentials that the key keeps."""
    DELETE = "delete"
    UPDATE = "update"
    WINK = "wink"


_SENTENCES: Final = {
    Use.REGISTER: "register the key",
    Use.SIGN_IN: "sign in",
    Use.LOOK_UP: "look up credentials",
    Use.SELECT: "select the key",
    Use.RESET: "reset the key: delete all its credentials",
    Use.SET_PIN: "set the PIN",
    Use.CHANGE_PIN: "change the PIN",
    Use.ENTER_PIN: "enter the PIN",
    Use.LIST: "list credentials",
    Use.DELETE: "delete a credential",
    Use.UPDATE: "rename a credential",
    Use.WINK: "show which key this is",
}


@dataclass(frozen=True, slots=True)
class Question:
    """What a user is asked.

    Attributes:
        use: what a client asks for.
        site: the id of the relying party, such as ``example.com``; empty if there is none. U2F has only its hash.
        user: the name of the account; empty: unknown.
    """

    use: Use
    site: str = ""
    user: str = ""

    def __str__(self) -> str:
        site = f" at {printable(self.site)}" if self.site else ""
        return f"{_SENTENCES[self.use]}{site}{f' as {printable(self.user)}' if self.user else ''}"


class Answer(StrEnum):
    """What became of a question."""

    ALLOW = "allow"
    REFUSE = "refuse"
    TIMED_OUT = "timed-out"
    CANCELLED = "cancelled"
    """The client did not wait, or the guest reset or unplugged the key."""


class AsksPresence(ABC):
    """A function of a device that waits for the answer of a user."""

    @property
    @abstractmethod
    def asks(self) -> Question | None:
        """Return the question that waits for an answer; None: there is none."""

    @abstractmethod
    def answer(self, allow: bool, number: int | None = None) -> Question:
        """Answer the question that waits.

        Args:
            allow: allow what the client asks for.
            number: of the question; None: the one that waits.

        Returns:
            The question.

        Raises:
            UsageError: no question waits, or another one.
        """
