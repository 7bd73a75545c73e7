"""A login by what the screen shows: what is typed when, and what is not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from farplug.control import login as login_module
from farplug.control.client import Client
from farplug.control.login import Login, log_in
from farplug.errors import GuestGoneError, Reason, StateError, TargetError

ASK = "vm login:"


class Terminal:
    """A text console with a login, which answers some looks after something was typed.

    Args:
        password: the right one; None: none is asked for.
        lines: what is on the screen.
        prompt: of the shell.
        late: looks after which it answers.
    """

    def __init__(
        self, password: str | None = "pw", lines: tuple[str, ...] = (ASK,), prompt: str = "root@vm:~#", late: int = 2
    ) -> None:
        self.password = password
        self.lines = [*lines]
        self.prompt = prompt
        self.late = late
        self.typed: list[tuple[str, bool]] = []
        self.error: Exception | None = None
        self._answers: list[tuple[int, Callable[[], None]]] = []
        self._asks = "name"
        self._name = self._line = ""
        self.agetty = True
        """The Return key alone brings the question back; otherwise that for a password."""

    async def call(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        assert (method, params) == ("screen-text", {})
        if self.error is not None:
            raise self.error
        self._answers = [(left - 1, answer) for left, answer in self._answers]
        while self._answers and self._answers[0][0] < 0:
            self._answers.pop(0)[1]()
        lines = [*self.lines[:-1], f"{self.lines[-1]} \N{REPLACEMENT CHARACTER}"]  # the cursor
        return {"lines": [*lines, "", ""], "columns": 80, "unknown": 1}

    async def type(self, text: str, secret: bool) -> None:
        self.typed.append((text, secret))
        self._answers.append((self.late, lambda: self._keys(text)))

    def _keys(self, text: str) -> None:
        for line in text.splitlines(keepends=True):
            self._line += line.removesuffix("\n")
            if self._asks == "name" and line != "\n":
                self.lines[-1] += f" {line.rstrip()}"
            if line.endswith("\n"):
                answer, self._line = self._line, ""
                self._answer(answer)

    def _answer(self, text: str) -> None:
        if self._asks == "name":
            if not text and self.agetty:
                self.lines.append(ASK)
            elif self.password is None:
                self._shell()
            else:
                self.lines.append("Password:")
                self._asks = "password"
                self._name = text
        elif text == self.password and self._name:
            self._shell()
        else:
            self.lines += ["Login incorrect", ASK]
            self._asks = "name"

    def _shell(self) -> None:
        self.lines += ["Linux vm", "Last login: today", self.prompt]
        self._asks = ""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(login_module, "LOOK_INTERVAL", 0.001)


async def logged_in(
    terminal: Terminal, login: Login, timeout: float = 20, delay: float = 0.1
) -> list[tuple[str, bool]]:
    """Log in; return what was typed."""
    await log_in(cast(Client, terminal), terminal.type, login, delay=delay, timeout=timeout)
    return terminal.typed


NAME, SECRET = (("root", False), ("\n", False)), ("pw\n", True)


@pytest.mark.parametrize("late", [0, 200])
async def test_the_vm_asks_and_is_answered(late: int) -> None:
    terminal = Terminal(late=late)
    assert await logged_in(terminal, Login("root", "pw"), delay=10) == [*NAME, SECRET]
    assert terminal.lines[-1] == terminal.prompt


async def test_messages_of_the_kernel_after_the_question() -> None:
    terminal = Terminal(lines=(ASK, "[    9.1] usb 1-1: new device"))
    assert (await logged_in(terminal, Login("root", "pw")))[-3:] == [*NAME, SECRET]
    assert terminal.typed[0] == ("\n", False)


@pytest.mark.parametrize("late", [0, 20])
async def test_the_vm_asks_for_a_password_of_an_earlier_login(late: int) -> None:
    """Type the name again if it is not shown: no password is typed as a name, which would be shown."""
    terminal = Terminal(lines=(ASK, "[    9.1] usb 1-1: new device"), late=late)
    terminal.agetty = False
    assert await logged_in(terminal, Login("root", "pw")) == [("\n", False), *NAME, *NAME, SECRET]
    assert not any("pw" in line for line in terminal.lines)
    assert terminal.lines[-1] == terminal.prompt


async def test_an_unusual_prompt_stands_still() -> None:
    assert await logged_in(Terminal(prompt="vm ready"), Login("root", "pw")) == [*NAME, SECRET]


async def test_no_password_is_asked_for() -> None:
    assert await logged_in(Terminal(password=None), Login("root")) == [*NAME]
    assert await logged_in(Terminal(password=None), Login("root", "pw")) == [*NAME], "not typed into the shell"


@pytest.mark.parametrize(
    ("terminal", "login", "typed", "message"),
    [
        (Terminal(), Login("root", "no"), [*NAME, ("no\n", True)], "refused the login of root"),
        (Terminal(), Login("root"), [*NAME], "asks for a password of root"),
        (Terminal(lines=("Starting",), late=1 << 30), Login("root", "pw"), None, "does not ask for a name"),
        (Terminal(late=1 << 30), Login("root", "pw"), [*NAME], "does not show what is typed"),
    ],
    ids=["password", "no-password", "no-name", "nothing"],
)
async def test_the_vm_refuses(
    monkeypatch: pytest.MonkeyPatch,
    terminal: Terminal,
    login: Login,
    typed: list[tuple[str, bool]] | None,
    message: str,
) -> None:
    monkeypatch.setattr(login_module, "PROMPT_INTERVAL", 0.05)
    with pytest.raises(TargetError, match=message) as error:
        await logged_in(terminal, login, timeout=0.5 if terminal.late > 2 else 20)
    assert error.value.reason is Reason.NO_PROMPT
    assert "pw" not in str(error.value)
    if typed is None:
        assert {text for text, _ in terminal.typed} == {"\n"}
    else:
        assert terminal.typed == typed


async def test_the_name_is_asked_for_again() -> None:
    """The name was lost on the way: the password would be shown if it was typed now."""
    terminal = Terminal()
    terminal._answer = lambda text: terminal.lines.extend(["", "x", ASK] if text else [])  # type: ignore[method-assign]
    with pytest.raises(TargetError, match="did not ask for the password"):
        await logged_in(terminal, Login("root", "pw"), timeout=0.5)
    assert terminal.typed == [*NAME]


BLIND = [("root\n", False), SECRET]


async def test_a_screen_that_cannot_be_read() -> None:
    terminal = Terminal()
    terminal.error = StateError("no text", reason=Reason.NO_TEXT)
    assert await logged_in(terminal, Login("root", "pw"), delay=0.01) == BLIND


@pytest.mark.parametrize("reason", [Reason.NO_DISPLAY, Reason.MISSING_PROGRAM])
async def test_no_screen_is_waited_for(monkeypatch: pytest.MonkeyPatch, reason: Reason) -> None:
    """Type at once, and wait only for what the VM needs after the name and after the password."""
    terminal, waits = Terminal(), []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    terminal.error = StateError("no screen", reason=reason)
    assert await logged_in(terminal, Login("root", "pw"), delay=7.0) == BLIND
    assert waits == [7.0, 7.0]


async def test_text_appears_later() -> None:
    terminal = Terminal()
    terminal.error = StateError("no text", reason=Reason.NO_TEXT)
    asyncio.get_running_loop().call_later(0.05, setattr, terminal, "error", None)
    assert await logged_in(terminal, Login("root", "pw"), delay=20) == [*NAME, SECRET]
    assert terminal.lines[-1] == terminal.prompt


async def test_the_session_ends() -> None:
    terminal = Terminal()
    terminal.error = GuestGoneError("gone")
    with pytest.raises(GuestGoneError):
        await logged_in(terminal, Login("root", "pw"))
    assert terminal.typed == []
