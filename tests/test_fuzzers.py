"""Each fuzzer runs, with a few cases from a fixed seed."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from tests.docs import ROOT

FUZZERS = {path.stem.removeprefix("fuzz_"): path for path in sorted((ROOT / "fuzz").glob("fuzz_*.py"))}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", FUZZERS)
def test_a_fuzzer_runs(name: str) -> None:
    result = run(FUZZERS[name], "--seed", 1, "--cases", 5, "--seconds", 100)
    assert result.returncode == 0, result.stderr
    assert f"{name}: 5 cases from seed 1" in result.stdout


@pytest.mark.parametrize("kind", ["AssertionError", "SystemExit"])
def test_a_failure_prints_how_to_repeat_it(kind: str) -> None:
    program = f"""
import random, sys
sys.path.insert(0, "fuzz")
from harness import run
def one_case(rng: random.Random) -> None:
    if rng.random() < 0.3:
        raise {kind}("found")
run("example", one_case)
"""
    result = run("-c", program, "--seed", "1")
    assert result.returncode != 0
    assert "found" in result.stderr
    assert re.search(r"example: failed; repeat with: .* --cases 1 --seed \d+", result.stderr)


def test_the_guided_fuzzer_parses_its_seeds() -> None:
    result = run(ROOT / "fuzz/guided.py", "--seeds")
    assert result.returncode == 0, result.stderr


def test_contributing_names_every_fuzzer() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text.partition("## Fuzzers")[2].partition("\n## ")[0]
    assert set(re.findall("`([a-z]+)`", section)) >= set(FUZZERS)
