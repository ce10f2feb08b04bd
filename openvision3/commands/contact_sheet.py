"""A contact sheet: found pictures in rows, each with its rank, score and name."""

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from openvision3.commands.common import printable
from openvision3.config import OpenVisionError
from openvision3.data.transforms import load_image

COLUMNS, SIDE, GAP, LINE = 5, 220, 16, 22  # pictures a row; pixels
_INK, _GREY, _MAT = (25, 25, 25), (120, 120, 120), (240, 240, 240)


def contact_sheet(title: str, like: Path | None, found: Sequence[tuple[Path, float]]) -> Image.Image:
    """Draws (path, score) pairs, best first, under the query: its text, and the picture `like` where it is one."""
    header = GAP + 2 * LINE + (SIDE // 2 + GAP if like else 0)
    columns, rows = min(COLUMNS, max(3, len(found))), -(-len(found) // COLUMNS)
    cell = SIDE + 2 * LINE + GAP
    sheet = Image.new("RGB", (GAP + columns * (SIDE + GAP), header + rows * cell), "white")
    draw, large, small = ImageDraw.Draw(sheet), _font(24), _font(14)
    draw.text((GAP, GAP // 2), _fitted(title, sheet.width - 2 * GAP, large), fill=_INK, font=large)
    if like:
        _place(sheet, like, (GAP, GAP + 2 * LINE, SIDE // 2))
    for i, (path, score) in enumerate(found):
        x, y = GAP + i % columns * (SIDE + GAP), header + i // columns * cell
        _place(sheet, path, (x, y, SIDE))
        draw.text((x, y + SIDE + 3), f"{i + 1}   {score:.3f}", fill=_INK, font=small)
        draw.text((x, y + SIDE + LINE), _fitted(path.name, SIDE, small), fill=_GREY, font=small)
    return sheet


def labelled_sheet(pictures: Sequence[tuple[Path, str]]) -> Image.Image:
    """Draws (path, label) pairs in rows, as near to a square as they go, each with its label under it."""
    columns = max(1, min(8, math.ceil(math.sqrt(len(pictures)))))
    rows, cell = -(-len(pictures) // columns), SIDE + LINE + GAP
    sheet = Image.new("RGB", (GAP + columns * (SIDE + GAP), GAP + rows * cell), "white")
    draw, small = ImageDraw.Draw(sheet), _font(14)
    for i, (path, label) in enumerate(pictures):
        x, y = GAP + i % columns * (SIDE + GAP), GAP + i // columns * cell
        _place(sheet, path, (x, y, SIDE))
        draw.text((x, y + SIDE + 3), _fitted(label, SIDE, small), fill=_INK, font=small)
    return sheet


def _place(sheet: Image.Image, path: Path, box: tuple[int, int, int]) -> None:
    """Draws a picture, whole and not enlarged more than to fit, in the middle of the square (left, top, side)."""
    left, top, side = box
    ImageDraw.Draw(sheet).rectangle((left, top, left + side - 1, top + side - 1), fill=_MAT)
    try:
        image = load_image(path)
    except OpenVisionError:  # removed since it was found
        return
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    sheet.paste(image, (left + (side - width) // 2, top + (side - height) // 2))


def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib  # its DejaVu has Latin, Greek and Cyrillic letters, Pillow's own font only Latin ones

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _fitted(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """The text, with its middle left out where it is wider than `width` pixels."""
    text = " ".join(printable(text).split())
    kept = len(text)
    shown = text
    while font.getlength(shown) > width and kept > 1:
        kept -= 1
        shown = f"{text[: -(-kept // 2)]}…{text[len(text) - kept // 2 :]}"
    return shown
