from __future__ import annotations

import logging
import re

import pytest

from farplug.cli import log
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


def test_debug(capsys: pytest.CaptureFixture[str]) -> None:
    log.start()
    log.debug(False)
    assert not log.debugging()
    log.debug(True)
    assert log.debugging()
    logging.getLogger("farplug.usbredir").debug("tcp < hello")
    logging.getLogger("asyncio").debug("not ours")
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3} usbredir tcp < hello\n", capsys.readouterr().err)
