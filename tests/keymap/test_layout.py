"""Layouts: the tables of the package, those of this machine, and what no layout has."""

from __future__ import annotations

import re
import string
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.docs import ROOT

from farplug.errors import Reason, UsageError
from farplug.keymap import Key, Layout, Stroke, chord, find_layout, key_named, layouts_with, packaged_layouts, xkb
from farplug.keymap import layout as layout_module
from farplug.keymap.layout import MAX_MARKS, MAX_TEXT, characters
from farplug.keymap.table import ALTGR, MODIFIERS, SHIFT, read_table, write_table

FOLDER = ROOT / "src/farplug/keymap/layouts"
LATIN = "us,gb,de,fr,es,it,ch,se,pt,pl,cz,be,dk,no,fi,nl,br,ca,hu,tr,latam"


@pytest.mark.parametrize("name", LATIN.split(","))
def test_each_latin_layout_has_ascii(name: str) -> None:
    layout = find_layout(name)
    assert len(layout.type(string.printable[:-2])) == len(string.printable) - 2
    assert all(stroke.modifiers in MODIFIERS for strokes in layout.strokes.values() for stroke in strokes)


def test_keys_that_every_keyboard_has_come_first() -> None:
    strokes = find_layout("us").strokes
    assert strokes["<"] == (Stroke(Key.COMMA, SHIFT),)
    assert {len(one) for one in strokes.values()} == {1}
    german = find_layout("DE").strokes
    assert german["<"] == (Stroke(Key.NON_US_BACKSLASH),)
    assert german["z"] == (Stroke(Key.Y),)
    assert german["@"] == (Stroke(Key.Q, ALTGR),)
    assert german["é"] == (Stroke(Key.EQUAL), Stroke(Key.E))
    assert german["^"] == (Stroke(Key.GRAVE), Stroke(Key.SPACE))
    assert find_layout("fr").strokes["1"] == (Stroke(Key.DIGIT_1, SHIFT),)


def test_no_two_characters_are_typed_alike() -> None:
    for name in packaged_layouts():
        strokes = find_layout(name).strokes
        assert len({*strokes.values()}) == len(strokes), name


def test_descriptions() -> None:
    layouts = packaged_layouts()
    assert (layouts["de"], layouts["us-intl"]) == ("German", "English (US, intl., with dead keys)")
    assert len(layouts) >= 70
    assert all(layouts.values())


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.txt")), ids=lambda path: path.stem)
def test_a_table_is_read_as_it_was_written(path: Path) -> None:
    text = path.read_text("utf-8")
    assert write_table(*read_table(text.splitlines())) == text


def test_the_generator_makes_the_same_tables(tmp_path: Path) -> None:
    if xkb.read_layout("us") is None:
        pytest.skip("this machine has no libxkbcommon, or no xkb-data")
    version = subprocess.run(["dpkg-query", "-W", "-f", "${Version}", "xkb-data"], capture_output=True, text=True)
    if not version.stdout.startswith("2.35.1"):
        pytest.skip("the tables are those of xkb-data 2.35.1")
    subprocess.run([sys.executable, ROOT / "scripts/layouts.py", tmp_path], check=True)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        path.name: path.read_text() for path in FOLDER.iterdir()
    }


def test_layouts_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_module, "_machine", {})
    if xkb.read_layout("us") is not None:
        assert len(find_layout("de-neo").type("Straße")) == 6
    monkeypatch.setattr(layout_module, "_machine", {})
    monkeypatch.setattr(xkb, "_library", lambda: None)
    with pytest.raises(UsageError, match="'de-neo' is not a keyboard layout") as caught:
        find_layout("de-neo")
    assert caught.value.reason is Reason.NOT_FOUND
    assert "layouts: al, am," in caught.value.remedy


@pytest.mark.parametrize("name", ["", "../us", "us/..", "klingon", "us-", "u" * 1000, "\0", "us\n", "de-nosuchvariant"])
def test_names_of_missing_layouts(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError) as caught:
        find_layout(name)
    assert caught.value.reason is Reason.NOT_FOUND
    assert len(caught.value.message) < 120
    assert capfd.readouterr() == ("", "")


def test_missing_characters() -> None:
    us = find_layout("us")
    assert us.missing("a\r\nb\tc") == []
    first, second = us.missing("n\u0303o sé")
    assert (first.index, first.character, second.index, second.character) == (0, "ñ", 5, "é")
    assert {"es", "latam", "us-intl"} <= {*first.layouts}
    assert len(us.missing("é" * 5000)) == 1000
    with pytest.raises(UsageError, match=r"no key for '€' \(U\+20AC, line 2, character 3\)") as caught:
        us.type("ab\ncd€")
    assert (caught.value.reason, caught.value.remedy[:22]) == (Reason.BAD_KEY, "layouts that have it: ")
    with pytest.raises(UsageError) as caught:
        us.type("\x1b[A")
    assert caught.value.remedy.startswith("leave control characters out")
    with pytest.raises(UsageError) as caught:
        us.type("\N{PILE OF POO}")
    assert caught.value.remedy.startswith("leave it out: no layout")
    with pytest.raises(UsageError, match="at most 1048576 are typed"):
        us.type("x" * (MAX_TEXT + 1))
    assert layouts_with("ß")[:2] == ("at", "de")
    assert layouts_with("\N{PILE OF POO}") == ()


@given(st.text())
def test_a_text_is_typed_or_refused(text: str) -> None:
    """Compare what is missing with what makes typing an error; indices are those of the text."""
    layout = find_layout("de")
    missing = layout.missing(text)
    for one in missing:
        assert unicodedata.normalize("NFC", text[one.index :]).startswith(one.character) or one.index < len(text)
    if missing:
        with pytest.raises(UsageError):
            layout.type(text)
    else:
        assert len(layout.type(text)) == len(list(characters(text)))


def _composed(text: str) -> list[tuple[int, str]]:
    """Return the characters of a text without carriage returns, with any number of combining ones."""
    found: list[tuple[int, str]] = []
    start = 0
    while start < len(text):
        end = start + 1
        while end < len(text) and unicodedata.combining(text[end]):
            end += 1
        found += [(start, character) for character in unicodedata.normalize("NFC", text[start:end])]
        start = end
    return found


@given(st.text("aeoé한ㄱ\u0300\u0323\u0301\u1100\u1161\ud800", max_size=30))
def test_characters_are_composed(text: str) -> None:
    assert list(characters(text)) == _composed(text)


def test_many_combining_characters_are_not_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    normalize = unicodedata.normalize

    def counted(form: Literal["NFC"], text: str) -> str:
        lengths.append(len(text))
        return normalize(form, text)

    monkeypatch.setattr(unicodedata, "normalize", counted)
    text = "e\u0301" + "a" + "\u0300\u0323" * 50_000  # NFC would sort them: minutes for 1 Mi
    found = list(characters(text))
    assert found[0] == (0, "é")
    assert max(lengths) == MAX_MARKS + 1
    assert len(found) > 90_000
    with pytest.raises(UsageError, match="no key for"):
        find_layout("us").type(text)


def test_names_of_keys() -> None:
    assert chord("ctrl+alt+Delete") == [Key.LEFT_CTRL, Key.LEFT_ALT, Key.DELETE]
    assert key_named("KP_Enter") is key_named("keypad_enter") is Key.KEYPAD_ENTER
    assert key_named("0x87") is Key.INTERNATIONAL_1
    assert key_named("Page_Up") is key_named("Prior") is Key.PAGE_UP
    for key in Key:
        assert key_named(key.name) is key
        assert key_named(f"0x{key:02x}") is key
    for name in ("", "nokey", "é", "\u212a", "0xff", "0x1", "0x", "ctrl "):
        with pytest.raises(UsageError) as caught:
            key_named(name)
        assert caught.value.reason is Reason.BAD_KEY
    with pytest.raises(UsageError, match="7 keys at a time"):
        chord("a+b+c+d+e+f+g")


def test_a_layout_without_letters() -> None:
    lacks = Layout("none", "none", {})
    assert [one.index for one in lacks.missing("ab")] == [0, 1]
    assert re.match("the keyboard layout none has no key", str(_error(lacks)))


def _error(layout: Layout) -> UsageError:
    with pytest.raises(UsageError) as caught:
        layout.type("a")
    return caught.value
