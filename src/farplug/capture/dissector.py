"""Install the Wireshark dissector for usbredir, a Lua file of this package."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

from farplug.errors import Reason, SetupError, from_oserror

FILE_NAME: Final = "farplug-usbredir.lua"
_MARK: Final = b"farplug usbredir dissector"
"""In the first lines of the file: an installed file without these words is not replaced."""
_MARK_SIZE: Final = 1024


def dissector() -> bytes:
    """Return the dissector, a program in Lua."""
    return Path(__file__).with_name("usbredir.lua").read_bytes()


def plugin_folder() -> Path:
    """Return the folder from which Wireshark loads the Lua files of this user.

    Source: Wireshark User's Guide, appendix B.2 (plugin folders).
    """
    if sys.platform == "win32":
        return Path(os.environ.get("APPDATA", Path.home())) / "Wireshark" / "plugins"
    return Path.home() / ".local" / "lib" / "wireshark" / "plugins"


def install_dissector(folder: Path | None = None) -> Path:
    """Write the dissector to a folder, which is made if it does not exist; return the path of the file.

    Args:
        folder: None: the user's folder of Wireshark.

    Raises:
        SetupError: the file cannot be written, or a file of this name is something else.
    """
    path = (plugin_folder() if folder is None else folder) / FILE_NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and _MARK not in path.read_bytes()[:_MARK_SIZE]:
            raise SetupError(
                f"{path} exists, and is not farplug's dissector",
                reason=Reason.EXISTS,
                remedy="move this file to another place",
            )
        path.write_bytes(dissector())
    except OSError as error:
        raise from_oserror(path, error, as_=SetupError, problem="cannot be written") from error
    return path
