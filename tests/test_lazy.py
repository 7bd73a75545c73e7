"""Packages import their names on first use."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

LAZY = (
    *("farplug.image", "farplug.physical", "farplug.redirection", "farplug.spice", "farplug.store", "farplug.testing"),
    *("farplug.usbredir", "farplug.virtual"),
)


@pytest.mark.parametrize("package", LAZY)
def test_every_public_name_is_there(package: str) -> None:
    module = import_module(package)
    assert set(module.__all__) <= set(dir(module))
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        _ = module.nothing


def test_a_name_brings_its_own_module_only() -> None:
    code = "import sys; from farplug.store import CacheMode; print('farplug.store.overlay' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
