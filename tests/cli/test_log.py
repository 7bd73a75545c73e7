from __future__ import annotations

import logging
import re

import pytest
import typer.main

from farplug.cli import log
from farplug.cli.tree import app
from farplug.errors import DeviceError, Reason


def test_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    log.start()
    log.start()
    logger = logging.getLogger("farplug.store.file")
    error = DeviceError("no\nluck", reason=Reason.IO_ERROR)
    logger.info("quiet")
    logger.warning("%s is odd", "a\x1bb")
    logger.warning("it broke", exc_info=error)
    logger.error("it broke", exc_info=ValueError("x"))
    assert capsys.readouterr().err.splitlines() == [
        "farplug: warning: a\N{REPLACEMENT CHARACTER}b is odd",
        "farplug: warning: it broke: no",
        "farplug: error: it broke: ValueError: x",
    ]


def test_tracebacks_cannot_control_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    log.start()
    log.debug(True)
    try:
        raise ValueError("bad \x1b[2J\x07name\nsecond \x9b line \u202e")
    except ValueError as error:
        error.add_note("note \x1b]0;title\x07")
        logging.getLogger("farplug.usb").error("it \x1b broke", exc_info=error)
        log.traceback(error)
    text = capsys.readouterr().err
    assert text.count("Traceback (most recent call last):") == 2
    assert text.count("ValueError: bad \N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}name\n") == 2
    assert text.count("note \N{REPLACEMENT CHARACTER}]0;title\N{REPLACEMENT CHARACTER}\n") == 2
    assert "".join(text.split("\n")).isprintable()


def test_debug(capsys: pytest.CaptureFixture[str]) -> None:
    log.start()
    log.debug(False)
    assert not log.debugging()
    log.debug(True)
    assert log.debugging()
    logging.getLogger("farplug.usbredir").debug("tcp < hello")
    logging.getLogger("asyncio").debug("not ours")
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3} usbredir tcp < hello\n", capsys.readouterr().err)


def test_tracebacks_cannot_control_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    log.start()
    log.debug(True)
    try:
        raise ValueError("\x1b]0;owned\x07 \u202e\nsecond line")
    except ValueError as error:
        log.LOGGER.warning("it broke", exc_info=error)
    err = capfd.readouterr().err
    assert "second line" in err.split("\n")
    assert all(character.isprintable() for character in err.replace("\n", ""))


@pytest.mark.parametrize("setting", sorted(log._METAVARS))
def test_an_option_of_a_remedy_is_that_of_the_help(setting: str) -> None:
    option = log.setting_option(setting)
    root = typer.main.get_command(app)
    shown = {
        f"{one.opts[0]} {one.metavar}"
        for command in root.commands.values()  # type: ignore[attr-defined]
        for one in command.params
        if one.opts[0] == option.split()[0]
    }
    assert shown == {option}
