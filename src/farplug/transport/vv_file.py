"""``.vv`` files on disk."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from farplug.errors import Reason, UsageError
from farplug.spice.vv import MAX_VV_FILE, VvFile

log = logging.getLogger(__name__)


def read_vv_file(path: Path) -> VvFile:
    """Read a ``.vv`` file, and log what is ignored in it as warnings. It stays: see :func:`delete_vv_file`.

    Raises:
        UsageError: it cannot be read, or is malformed.
    """
    try:
        if not path.is_file():
            what = "is not a file" if path.exists() else "does not exist"
            raise UsageError(f"{path} {what}", reason=Reason.BAD_VV_FILE, remedy="give the path of a .vv file")
        with path.open("rb") as file:
            data = file.read(MAX_VV_FILE + 1)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {os.strerror(error.errno or 0)}",
            reason=Reason.BAD_VV_FILE,
            remedy="check the file's permissions, and those of its folder",
        ) from error
    vv = VvFile.parse(data, path=str(path))
    for warning in vv.warnings:
        log.warning("%s", warning)
    return vv


def delete_vv_file(path: Path) -> None:
    """Delete a ``.vv`` file that asks for it (``delete-this-file=1``): its password serves once.

    Call it when the file is known to be usable. One that cannot be deleted stays, with a warning.
    """
    try:
        path.unlink()
        log.info("%s deleted, as it asks (delete-this-file=1)", path)
    except OSError as error:
        log.warning("%s asks to be deleted, but cannot be: %s", path, os.strerror(error.errno or 0))
