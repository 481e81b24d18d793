"""Fonts for words in pictures: DejaVu Sans, helped out by installed ones for letters it lacks."""

import functools
import importlib.util
import itertools
from pathlib import Path

from PIL import ImageFont

from errors import one_line


@functools.cache
def base_path():
    """DejaVu Sans as matplotlib brings it, or None without matplotlib."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0], "mpl-data", "fonts", "ttf", "DejaVuSans.ttf")
    return str(path) if path.exists() else None


@functools.cache
def _letters(path):
    """The code points that a font file has glyphs for."""
    try:
        from matplotlib.ft2font import FT2Font  # slow to import

        return frozenset(FT2Font(path).get_charmap())
    except Exception:  # a damaged or odd font, or matplotlib, raises nearly anything
        return frozenset()


@functools.cache
def _installed():
    """Paths of the system's fonts, those first that go well with DejaVu Sans."""
    try:
        from matplotlib import font_manager  # slow to import
    except Exception:  # as above
        return []

    def rank(path):
        name = Path(path).name.lower()
        # The last resort has a box for every letter; glyphs of colours are no letters.
        if "lastresort" in name or "last resort" in name or "emoji" in name:
            return None
        return ("regular" not in name, "sans" not in name, "mono" in name, name)

    ranked = [(rank(path), path) for path in font_manager.findSystemFonts()]
    return [path for place, path in sorted(r for r in ranked if r[0] is not None)]


@functools.cache
def _helper(letter):
    """The first installed font that has a letter which DejaVu Sans lacks, or None."""
    return next((path for path in _installed() if ord(letter) in _letters(path)), None)


def font_of(letter):
    """The path of the font that a letter is drawn with; where none has it, DejaVu Sans."""
    base = base_path()
    # Latin, Greek, Cyrillic: DejaVu Sans has them, so matplotlib need not be asked.
    if base is None or ord(letter) < 0x530 or ord(letter) in _letters(base):
        return base
    return _helper(letter) or base


def chart_style(texts):
    """matplotlib's settings (rc) for a chart with these texts: their letters, as they stand."""
    from matplotlib import font_manager

    families = ["DejaVu Sans"]
    for path in dict.fromkeys(font_of(letter) for letter in "".join(texts)):
        if path != base_path():
            font_manager.fontManager.addfont(path)
            families.append(font_manager.FontProperties(fname=path).get_name())
    return {"font.family": families, "text.parse_math": False, "axes.unicode_minus": True}


@functools.cache
def _loaded(path, size):
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)


class Font:
    """Letters of a size in pixels, each from the first font that has it."""

    def __init__(self, size):
        self.size = size
        self.ascent, self.descent = _loaded(base_path(), size).getmetrics()
        self.line = int(1.5 * size)

    def _runs(self, text):
        """(font, part) of a line's parts that one font draws."""
        for path, letters in itertools.groupby(one_line(text), font_of):
            yield _loaded(path, self.size), "".join(letters)

    def getlength(self, text):
        """Width of a line, in pixels."""
        return sum(font.getlength(part) for font, part in self._runs(text))

    def draw(self, canvas, xy, text, anchor="la"):
        """Draws black lines on an ImageDraw.

        anchor: two letters as Pillow's, what of the lines lies at xy: their left, middle or right;
        the ascender, middle or descender.
        """
        lines = text.split("\n")
        below = (len(lines) - 1) * self.line
        height = self.ascent + self.descent + below
        top = xy[1] - {"a": 0, "m": height / 2, "d": height}[anchor[1]]
        for number, line in enumerate(lines):
            x = xy[0] - self.getlength(line) * {"l": 0, "m": 0.5, "r": 1}[anchor[0]]
            for font, part in self._runs(line):
                y = top + self.ascent + number * self.line
                canvas.text((x, y), part, "black", font, anchor="ls")
                x += font.getlength(part)
