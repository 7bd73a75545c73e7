"""The fonts of text consoles, from files of this machine: that of the VGA BIOS, and those for Linux's console."""

from __future__ import annotations

import gzip
import logging
import re
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Final

from farplug.errors import Reason, SetupError
from farplug.spice.console import MAX_SIZE, Glyph, best_character, psf_glyphs, vga_glyphs

log = logging.getLogger(__name__)

VGA_FOLDERS: Final = ("/usr/share/seabios", "/usr/share/qemu", "/usr/local/share/qemu", "/opt/homebrew/share/qemu")
"""Where packages of SeaBIOS and QEMU have the images of VGA BIOSes."""
PSF_FOLDERS: Final = ("/usr/share/consolefonts", "/usr/share/kbd/consolefonts", "/usr/lib/kbd/consolefonts")
"""Where packages of console-setup and kbd have fonts."""
MAX_FILES: Final = 512
_PSF: Final = re.compile(r"[\w.-]+\.psfu?(\.gz)?", re.ASCII)


def console_glyphs() -> Mapping[Glyph, str]:
    """Return the characters of all fonts that are installed, by their glyphs. Takes up to a second, once.

    Raises:
        SetupError: none is installed (``MISSING_PROGRAM``).
    """
    glyphs = load_glyphs(VGA_FOLDERS, PSF_FOLDERS)
    if not glyphs:
        raise SetupError(
            "no font of a text console is installed, with which the text on a screen could be read",
            reason=Reason.MISSING_PROGRAM,
            remedy="install SeaBIOS, which comes with QEMU (Debian: seabios), or console-setup-linux, or kbd",
        )
    return glyphs


@cache
def load_glyphs(vga_folders: tuple[str, ...], psf_folders: tuple[str, ...]) -> Mapping[Glyph, str]:
    """Return the characters of the fonts in folders, by their glyphs. Of several, an ASCII one is taken."""
    found: dict[Glyph, str] = {}
    for path in _files(psf_folders, lambda name: _PSF.fullmatch(name) is not None):
        try:
            for glyph, name in psf_glyphs(_content(path)).items():
                found[glyph] = best_character(found.get(glyph, "") + name)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            log.debug("%s is not used as a console font: %s", path, error)
    for path in _files(vga_folders, lambda name: name.startswith("vgabios") and name.endswith(".bin")):
        try:
            glyphs = vga_glyphs(_content(path))
        except OSError as error:
            log.debug("%s is not used as a console font: %s", path, error)
            continue
        if glyphs:
            found |= {glyph: best_character(found.get(glyph, "") + name) for glyph, name in glyphs.items()}
            break
    return found


def _files(folders: tuple[str, ...], wanted: Callable[[str], bool]) -> list[Path]:
    paths: list[Path] = []
    for folder in folders:
        try:
            paths += sorted(path for path in Path(folder).iterdir() if wanted(path.name))
        except OSError:
            continue  # it is not there
    return [*islice(paths, MAX_FILES)]


def _content(path: Path) -> bytes:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        return file.read(MAX_SIZE)
