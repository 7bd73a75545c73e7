"""The tool ``run``, with a shell of this machine in the place of the VM's."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.agents.support import agent, console
from tests.control.shells import local_shell
from tests.control.support import RawClient
from tests.control.test_driving import done

from farplug.agents import machine as machine_module
from farplug.agents.server import MAX_OUTPUT
from farplug.control.client import Client
from farplug.control.shell import Shell


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """Return the options with which shells were opened."""
    options: list[dict[str, Any]] = []

    @asynccontextmanager
    async def open_shell(client: Client, **given: Any) -> AsyncIterator[Shell]:
        options.append(given)
        folder = tmp_path / str(len(options))
        folder.mkdir()
        async with local_shell(folder, "dash") as shell:
            yield shell

    monkeypatch.setattr(machine_module, "open_shell", open_shell)
    return options


async def test_a_program_with_its_outputs_and_exit_code(
    environment: dict[str, str], opened: list[dict[str, Any]]
) -> None:
    async with console(environment) as one, agent(one) as acting:
        script = "cat; printf 'a\\377' >&2; exit 3"
        result = await acting.json("run", command=["sh", "-c", script], stdin="typed\n", layout="de")
        assert result == {"exit_code": 3, "stdout": "typed\n", "stderr": "a\N{REPLACEMENT CHARACTER}"}
        assert opened[0]["layout"] == "de"
        result = await acting.json("run", command=["head", "-c", "100000", "/dev/zero"])
        assert result["stdout"] == "\0" * MAX_OUTPUT + f"\n[{100_000 - MAX_OUTPUT} bytes more were left out]"
        assert "NUL" in await acting.refused("run", command=["a\0"])


async def test_an_output_that_never_ends(environment: dict[str, str], opened: list[dict[str, Any]]) -> None:
    """Return what has arrived, and no more than a part of it."""
    async with console(environment) as one, agent(one) as acting:
        result = await acting.json("run", command=["sh", "-c", "printf '\\376' >&2; exec yes"], timeout=0.5)
        assert (result["exit_code"], result["stderr"]) == (None, "\N{REPLACEMENT CHARACTER}")
        assert result["timeout"].startswith("the command did not end within 0.5 s, and was terminated.")
        kept, _, left_out = result["stdout"].rpartition("\n[")
        assert kept == ("y\n" * MAX_OUTPUT)[:MAX_OUTPUT]
        assert left_out.endswith(" bytes more were left out]")
        assert (await acting.json("run", command=["echo", "still there"]))["stdout"] == "still there\n"


async def test_while_a_person_holds_the_keyboard_nothing_is_run(
    environment: dict[str, str], opened: list[dict[str, Any]]
) -> None:
    async with console(environment) as one, agent(one) as acting, RawClient.connect(one.server.path) as person:
        await done(person, "drive", take=True, client="Ann")
        assert "a person took over" in await acting.refused("run", command=["true"])
        assert opened == []
