"""When a lost VM is contacted again: the policy alone, with a clock of the test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from farplug.app.retry import DELAYS, FLAPS, JITTER, MOVED_LIMIT, GiveUp, Retry, Wait
from farplug.app.settings import ReconnectSettings
from farplug.errors import (
    DeviceError,
    FarplugError,
    GuestGoneError,
    ImageError,
    PortError,
    Reason,
    RemoteProtocolError,
    TargetError,
    UsageError,
)
from farplug.spice.messages import SwitchHost
from farplug.transport.moved import GuestMoved

GONE = GuestGoneError("the SPICE server closed the session")
REFUSED = TargetError("connection refused", reason=Reason.CONNECTION_REFUSED)
MOVED = GuestMoved(SwitchHost(5900, None, "other"))
FOREVER = ReconnectSettings()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def attempts(retry: Retry, clock: Clock, step: Wait | GiveUp) -> Iterator[Wait]:
    """Yield the waits of attempts that all fail, until the policy gives up."""
    while isinstance(step, Wait):
        yield step
        clock.now += step.delay
        step = retry.failed(REFUSED)


def test_delays_grow_to_a_limit(clock: Clock) -> None:
    retry = Retry(FOREVER, clock, noise=lambda: 0)
    clock.now += 30
    steps = attempts(retry, clock, retry.lost(GONE))
    waits = [next(steps) for _ in range(9)]
    assert [wait.delay for wait in waits] == [*DELAYS, *[DELAYS[-1]] * 3]
    assert [wait.attempt for wait in waits] == list(range(1, 10))
    assert all(wait.moved is None for wait in waits)


@pytest.mark.parametrize("noise", [-1, 1])
def test_delays_differ_between_clients(clock: Clock, noise: float) -> None:
    retry = Retry(FOREVER, clock, noise=lambda: noise)
    step = retry.lost(GONE)
    assert isinstance(step, Wait)
    assert step.delay == DELAYS[0] * (1 + JITTER * noise)


def test_the_delays_begin_anew_after_a_stable_connection_only(clock: Clock) -> None:
    retry = Retry(FOREVER, clock, noise=lambda: 0, exclusive=False)
    for up, delay in ((1, DELAYS[0]), (1, DELAYS[1]), (59, DELAYS[2]), (60, DELAYS[0]), (0, DELAYS[1])):
        clock.now += up
        step = retry.lost(GONE)
        assert isinstance(step, Wait)
        assert (step.delay, step.attempt) == (delay, 1)
        retry.connected()


def test_the_limit_counts_from_the_loss(clock: Clock) -> None:
    retry = Retry(ReconnectSettings(10), clock, noise=lambda: 0)
    clock.now += 100
    waits = list(attempts(retry, clock, retry.lost(GONE)))
    assert [wait.delay for wait in waits] == [0.5, 1, 2, 4, 2.5], "the last one is cut"
    step = retry.failed(REFUSED)
    assert isinstance(step, GiveUp)
    assert step.error.reason is Reason.GUEST_GONE
    assert "no attempt to connect again succeeded within 10 s" in step.error.message


@pytest.mark.parametrize(
    "reason",
    [
        Reason.WRONG_PASSWORD,
        Reason.NO_PASSWORD,
        Reason.NEEDS_TLS,
        Reason.TLS_UNTRUSTED,
        Reason.TLS_WRONG_HOST,
        Reason.TLS_FAILED,
        Reason.NOT_SPICE,
    ],
)
def test_what_a_further_attempt_does_not_change_ends_the_attempts(clock: Clock, reason: Reason) -> None:
    retry = Retry(FOREVER, clock)
    retry.lost(GONE)
    error = TargetError("no", reason=reason)
    assert retry.failed(error) == GiveUp(error)


@pytest.mark.parametrize(
    "error",
    [
        UsageError("x", reason=Reason.BAD_VV_FILE),
        ImageError("x", reason=Reason.NOT_FOUND),
        DeviceError("x", reason=Reason.DEVICE_LOST),
        RemoteProtocolError("x"),
    ],
)
def test_errors_of_other_kinds_end_the_attempts(clock: Clock, error: FarplugError) -> None:
    retry = Retry(FOREVER, clock)
    assert retry.lost(error) == GiveUp(error)
    assert not retry.follows(error)
    retry.lost(GONE)
    assert retry.failed(error) == GiveUp(error)


@pytest.mark.parametrize(
    "error",
    [
        REFUSED,
        GONE,
        TargetError("x", reason=Reason.TIMED_OUT),
        TargetError("x", reason=Reason.LINK_REFUSED),
        TargetError("x", reason=Reason.TARGET_COMMAND),
        PortError("x", reason=Reason.CHANNEL_IN_USE),
        PortError("x", reason=Reason.NO_USBREDIR_CHANNEL),
    ],
)
def test_what_may_change_is_tried_again(clock: Clock, error: FarplugError) -> None:
    retry = Retry(FOREVER, clock)
    retry.lost(GONE)
    assert isinstance(retry.failed(error), Wait)


def test_without_the_setting_only_a_vm_that_moved_is_followed(clock: Clock) -> None:
    retry = Retry(None, clock)
    assert retry.lost(GONE) == GiveUp(GONE)
    assert not retry.follows(GONE)
    assert retry.follows(MOVED)
    assert retry.lost(MOVED) == Wait(1, 0, MOVED)


def test_where_the_new_host_cannot_be_reached_the_old_target_is_tried_for_a_while(clock: Clock) -> None:
    retry = Retry(None, clock)
    waits = list(attempts(retry, clock, retry.lost(MOVED)))
    assert waits[0] == Wait(1, 0, MOVED)
    assert {(wait.delay, wait.moved) for wait in waits[1:]} == {(1.0, None)}
    assert len(waits) == 1 + MOVED_LIMIT
    assert retry.failed(REFUSED) == GiveUp(REFUSED)


def test_a_server_that_does_not_report_the_new_host(clock: Clock) -> None:
    assert Retry(None, clock).lost(GuestMoved(None)) == Wait(1, 0, None)


def test_after_a_move_the_setting_holds_too(clock: Clock) -> None:
    retry = Retry(FOREVER, clock, noise=lambda: 0)
    steps = attempts(retry, clock, retry.lost(MOVED))
    assert [next(steps).delay for _ in range(4)] == [0, 0.5, 1, 2]


def test_a_client_that_takes_the_vm_again_and_again_gets_it(clock: Clock) -> None:
    retry = Retry(FOREVER, clock)
    steps = []
    for _ in range(FLAPS):
        clock.now += 2
        steps.append(retry.lost(GONE))
        retry.connected()
    assert [type(step) for step in steps] == [Wait] * (FLAPS - 1) + [GiveUp]
    last = steps[-1]
    assert isinstance(last, GiveUp)
    assert "another client takes the VM each time" in last.error.message


def test_losses_between_which_the_connection_lasts_do_not_count_as_flapping(clock: Clock) -> None:
    retry = Retry(FOREVER, clock)
    for up in (2, 2, 11, 2, 2, 30):
        clock.now += up
        assert isinstance(retry.lost(GONE), Wait)
        retry.connected()


def test_moves_do_not_count_as_flapping_and_sockets_serve_no_other_client(clock: Clock) -> None:
    for retry, error in ((Retry(FOREVER, clock), MOVED), (Retry(FOREVER, clock, exclusive=False), GONE)):
        for _ in range(2 * FLAPS):
            assert isinstance(retry.lost(error), Wait)
            retry.connected()


def test_a_ticket_for_one_connection(clock: Clock) -> None:
    retry = Retry(FOREVER, clock, used_up=True)
    assert isinstance(retry.lost(MOVED), Wait), "the ticket moves with the VM"
    step = retry.lost(GONE)
    assert isinstance(step, GiveUp)
    assert "was for one connection" in step.error.message
    assert step.error.remedy.setting == "target.command"
