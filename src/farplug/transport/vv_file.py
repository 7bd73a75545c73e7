"""``.vv`` files on disk."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from farplug.errors import Reason, UsageError, missing_file_remedy
from farplug.spice.vv import MAX_VV_FILE, VvFile

log = logging.getLogger(__name__)


def read_vv_file(path: Path) -> VvFile:
    """Read a ``.vv`` file, and log its warnings. The file is not deleted: see :func:`delete_vv_file`.

    Raises:
        UsageError: the file cannot be read, or is malformed.
    """
    try:
        if not path.is_file():
            what, remedy = "does not exist", missing_file_remedy(path)
            if path.exists():
                what, remedy = "is not a file", "give the path of a .vv file"
            raise UsageError(f"{path} {what}", reason=Reason.BAD_VV_FILE, remedy=remedy)
        with path.open("rb") as file:
            data = file.read(MAX_VV_FILE + 1)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {os.strerror(error.errno or 0).lower()}",
            reason=Reason.BAD_VV_FILE,
            remedy="check the permissions of the file and of its folder",
        ) from error
    vv = VvFile.parse(data, path=str(path))
    for warning in vv.warnings:
        log.warning("%s", warning)
    return vv


def delete_vv_file(path: Path) -> None:
    """Delete a ``.vv`` file with ``delete-this-file=1``: its password is valid once.

    Call it after the file was checked. If the file cannot be deleted, log a warning.
    """
    try:
        path.unlink()
        log.info("%s deleted (delete-this-file=1)", path)
    except OSError as error:
        log.warning("%s cannot be deleted (delete-this-file=1): %s", path, os.strerror(error.errno or 0).lower())
