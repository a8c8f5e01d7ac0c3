"""Draws letters of any script in plots: in another font that has them, else as code points; never as empty boxes."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

_KNOWN = ("CJK", "Han", "Gothic", "Hei", "Ming", "Song", "Fallback", "Unicode", "Noto")
"""Parts of the names of fonts with many scripts, which are searched first."""
_MOST_FONTS = 400


def drawable(text: str) -> list[str]:
    """Return the letters of a text for matplotlib: as code points where no font has them, and without formulas."""
    return [_drawable(char) for char in text]


def _drawable(char: str) -> str:
    if char == "$":
        return r"\$"  # two of them would enclose a formula
    if char.isprintable() and (_has_default(char) or fallback(char) is not None):
        return char
    return char.encode("ascii", "backslashreplace").decode("ascii") if ord(char) > 126 else repr(char)[1:-1]


def choose_fonts(figure: Figure) -> None:
    """Set fonts for every text of the figure that have its letters; call it again after adding texts."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        choose_font(text)


def choose_font(text: Text) -> None:
    """Set fonts for one text that have its letters."""
    written = dict.fromkeys(char for char in text.get_text() if char.isprintable() and not _has_default(char))
    others = dict.fromkeys(name for name in map(fallback, written) if name is not None)
    if others:
        text.set_fontfamily([*_default_family(), *others])


@cache
def fallback(char: str) -> str | None:
    """Return the name of an installed font that has the letter; None if none has."""
    code = ord(char)
    return next((name for name, codes in _found() if code in codes), None) or _search(code)


def _has_default(char: str) -> bool:
    return ord(char) in _default_codes()


@cache
def _default_codes() -> frozenset[int]:
    from matplotlib import font_manager

    return _codes(font_manager.findfont(font_manager.FontProperties()))


def _default_family() -> list[str]:
    import matplotlib

    return list(matplotlib.rcParams["font.family"])


@cache
def _found() -> list[tuple[str, frozenset[int]]]:
    """Return the cache of fonts that were needed so far: (name, characters)."""
    return []


def _search(code: int) -> str | None:
    for name, path in _fonts():
        codes = _codes(path)
        if code in codes:
            _found().append((name, codes))
            return name
    return None


@cache
def _fonts() -> tuple[tuple[str, str], ...]:
    """Return (name, path) of installed fonts, those that are likely to have other scripts first."""
    from matplotlib import font_manager

    by_name = {font.name: font.fname for font in font_manager.fontManager.ttflist}
    likely = sorted(by_name, key=lambda name: (not any(part in name for part in _KNOWN), name))
    return tuple((name, by_name[name]) for name in likely[:_MOST_FONTS] if "Last Resort" not in name)


@cache
def _codes(path: str) -> frozenset[int]:
    """Return the characters that a font file has."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):  # a damaged font, or one that FreeType cannot read
        return frozenset()
