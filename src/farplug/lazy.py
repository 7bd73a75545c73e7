"""Packages whose names are imported when they are used for the first time (PEP 562)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any


def lazy_import(namespace: dict[str, Any], names: Mapping[str, str]) -> None:
    """Define a package's ``__getattr__`` and ``__dir__``, so that it imports its names on first use.

    Type checkers do not see these names: the package imports them under ``TYPE_CHECKING`` as well.

    Args:
        namespace: ``globals()`` of the package.
        names: the module of each name, relative to the package.
    """
    package = namespace["__name__"]

    def __getattr__(name: str) -> Any:
        module = names.get(name)
        if module is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = namespace[name] = getattr(import_module(module, package), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*namespace, *names})

    namespace["__getattr__"] = __getattr__
    namespace["__dir__"] = __dir__
