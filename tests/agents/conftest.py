from __future__ import annotations

from tests.control.conftest import environment, folder

__all__ = ["environment", "folder"]
