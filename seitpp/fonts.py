"""Fonts for names in pictures: which ones have the characters, and what is drawn where none has them."""

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib import font_manager, rcParams
from matplotlib.font_manager import FontProperties

LAST_RESORT = "Last Resort"  # a font of boxes, one for each script
LONGEST = 28  # characters of a name that are drawn


class DrawnNames(NamedTuple):
    """The `texts` that are drawn for names, and the `families` of fonts that have their characters, in order."""

    texts: list[str]
    families: list[str]


def drawn_names(names: Sequence[str], numbers: Sequence[int]) -> DrawnNames:
    """Return what to draw for `names`: the name, shortened, if installed fonts have all of its characters.

    Otherwise it is the number of the class, from `numbers`: a row of boxes could be any class.
    """
    texts = [name if len(name) <= LONGEST else f"{name[: LONGEST - 2]}.." for name in names]
    families = list(rcParams["font.family"])
    missing = set("".join(texts)) - _characters(families[0])
    if missing:
        for family in _families():
            if found := missing & _characters(family):
                families.append(family)
                missing -= found
    drawn = [str(n) if missing & set(text) else text for text, n in zip(texts, numbers, strict=True)]
    return DrawnNames(drawn, families)


def _families() -> list[str]:
    fonts = font_manager.fontManager.ttflist
    names = {font.name for font in fonts if font.style == "normal" and font.weight in (400, "normal")}
    return sorted(name for name in names if not name.startswith(LAST_RESORT))


def _characters(family: str) -> set[str]:
    """Return the characters of the font file that matplotlib takes for a family."""
    path = font_manager.findfont(FontProperties(family=[family]))
    return {chr(code) for code in font_manager.get_font(path).get_charmap()}
