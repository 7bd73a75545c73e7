"""A login on the screen of a guest.

The text console on the screen shows when the guest asks for a name, for a password, and when a shell has begun. Where
the guest has no screen, or one that cannot be read, only time is left: nothing else reports what it asks for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from farplug.control.client import Client
from farplug.errors import FarplugError, GuestGoneError, Reason, RemoteProtocolError, TargetError
from farplug.text import MAX_SHOWN, printable

LOOK_INTERVAL: Final = 0.2
"""Seconds from one look at the screen to the next."""
PROMPT_INTERVAL: Final = 5.0
"""Seconds without a prompt after which the Return key is pressed, so that the guest asks again."""

CURSOR: Final = " \N{REPLACEMENT CHARACTER}"
"""What the cursor is at the end of a line of text: a space, or a cell without a character."""
ASKS: Final = (":", "\uff1a")
"""Ends of a question for a name or a password, in any language."""
SHELLS: Final = ("$", "#", ">", "%")
"""Ends of the prompt of a shell."""

Type = Callable[[str, bool], Awaitable[object]]
"""Types a text, which is a secret or not."""


@dataclass(frozen=True, slots=True)
class Login:
    """Who logs in before the line is typed.

    Attributes:
        user: the name.
        secret: the password; None: none is asked for.
    """

    user: str
    secret: str | None = None


async def log_in(client: Client, type_text: Type, login: Login, *, delay: float, timeout: float) -> None:
    """Type the name when the guest asks for it, and the password when it asks for that.

    A name that is not shown was typed as a password: it is typed again. The password is typed only after a name that
    was shown, and only when the guest asks for something else then. If a shell begins at once, none is typed.

    Args:
        client: the connection to the session.
        type_text: types.
        login: who logs in.
        delay: seconds that the guest needs to ask for the password, and to start a shell, if its screen cannot be read;
            and that a prompt of a shell must stand still which does not end as most do.
        timeout: seconds for each question.

    Raises:
        TargetError: ``no-prompt``: the guest does not ask, or refused the login.
        FarplugError: the guest or the session is gone, or the text cannot be typed.
    """
    screen = _Screen(client)
    user = printable(login.user, MAX_SHOWN)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    while True:
        question = await screen.asks(lambda: type_text("\n", False), delay, deadline - loop.time())
        if question is None:
            await type_text(f"{login.user}\n", False)
            await asyncio.sleep(delay)
            if login.secret is not None:
                await type_text(f"{login.secret}\n", True)
                await asyncio.sleep(delay)
            return
        await type_text(login.user, False)
        is_shown = await screen.shows_answer(question, delay)
        await type_text("\n", False)
        if is_shown:
            break
        # It was a question for a password, which an earlier login left: the guest refuses the name, and asks again.
        if await screen.changed(question, ASKS, deadline - loop.time(), None) is None:
            raise _refused("the VM does not show what is typed as the name")
    line = await screen.changed(question, (*ASKS, *SHELLS), timeout, delay if login.secret is None else None)
    if login.secret is None:
        if line is not None and line.endswith(ASKS):
            raise _refused(f"the VM asks for a password of {user}, or does not know the name")
        return
    if line is None or line == question:
        raise _refused(f"the VM did not ask for the password of {user}")
    if line.endswith(SHELLS):
        return
    await type_text(f"{login.secret}\n", True)
    if await screen.changed(line, (*SHELLS, question), timeout, delay) == question:
        raise _refused(f"the VM refused the login of {user}")


class _Screen:
    """The text console that a guest shows.

    Args:
        client: the connection to the session.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._is_there = True

    async def asks(self, press_return: Callable[[], Awaitable[object]], delay: float, timeout: float) -> str | None:
        """Wait until the last line of the screen is a question; return the line, or None: the screen cannot be read.

        Messages of the kernel may follow the question: after the Return key the guest asks once more, perhaps for the
        password of an empty name.

        Raises:
            TargetError: ``no-prompt``: there is no question.
        """
        loop = asyncio.get_running_loop()
        begin = again = loop.time()
        was_text = False
        while True:
            line = await self._last_line()
            was_text = was_text or line is not None
            now = loop.time()
            if line is not None and line.endswith(ASKS):
                return line
            if not was_text and (not self._is_there or now - begin >= delay):
                return None
            if now - begin >= timeout:
                raise _refused("the VM does not ask for a name")
            if line is not None and now >= again:
                again = now + PROMPT_INTERVAL
                await press_return()
            await asyncio.sleep(LOOK_INTERVAL)

    async def shows_answer(self, question: str, timeout: float) -> bool:
        """Wait until what was typed is shown after a question; return whether it is: that of a password is not.

        Args:
            question: the line.
            timeout: in seconds.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while not any(line.startswith(question) and line != question for line in await self._lines() or ()):
            if loop.time() >= deadline:
                return False
            await asyncio.sleep(LOOK_INTERVAL)
        return True

    async def changed(self, before: str, ends: tuple[str, ...], timeout: float, delay: float | None) -> str | None:
        """Wait until the last line is another one, with one of these ends; return the line, or None: timeout.

        Args:
            before: the last line before something was typed. It may come back when others came between.
            ends: of the line.
            timeout: in seconds.
            delay: seconds without a change after which a line with another end is taken, too; None: it is not.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        last, since, has_changed = before, loop.time(), False
        while (now := loop.time()) < deadline:
            line = await self._last_line()
            if line is not None:
                if line != last:
                    last, since, has_changed = line, now, True
                if has_changed and (line.endswith(ends) or (delay is not None and now - since >= delay)):
                    return line
            await asyncio.sleep(LOOK_INTERVAL)
        return None

    async def _last_line(self) -> str | None:
        """Return the last line that is not empty; None: the screen cannot be read."""
        lines = await self._lines()
        return None if lines is None else next((line for line in reversed(lines) if line), "")

    async def _lines(self) -> list[str] | None:
        """Return the lines of the screen, without the cursor; None: the screen cannot be read."""
        try:
            result: Any = await self._client.call("screen-text", {})
        except (GuestGoneError, RemoteProtocolError):
            raise
        except FarplugError as error:
            # A screen may show text soon, when firmware or a splash screen is over.
            self._is_there = error.reason is Reason.NO_TEXT
            return None
        lines = result.get("lines") if isinstance(result, dict) else None
        if not isinstance(lines, list):
            raise RemoteProtocolError("the session sent no lines of text")
        return [str(one).rstrip(CURSOR).strip() for one in lines]


def _refused(message: str) -> TargetError:
    return TargetError(
        message,
        reason=Reason.NO_PROMPT,
        remedy="look at the screen of the VM; check the name, the password and the keyboard layout",
    )
