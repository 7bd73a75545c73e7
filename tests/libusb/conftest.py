"""A context and a transfer of the real libusb."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest
import usb1

from farplug.libusb.library import Library


@pytest.fixture
def context() -> Iterator[Any]:
    context = cast(Any, Library().open_context())
    yield context
    context.close()


@pytest.fixture
def transfer(context: Any) -> Iterator[Any]:
    transfer = usb1.USBTransfer(
        context=context,
        handle=None,
        iso_packets=0,
        before_submit=None,
        after_completion=None,
        getFinalizer=context._getFinalizer,
        short_is_error=False,
        add_zero_packet=False,
    )
    transfer.setBulk(0x81, b"")
    yield transfer
    transfer.close()
