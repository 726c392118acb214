"""Where the shapes of a small image are, on which ground, and how both become pixels.

A shape is drawn about a center, `radius` pixels to each side. What evaluation alone shows is separate by construction:

    centers     a fifth of the pixels, `HELD_OUT_CLASS` of `spot_class`, are no center in training; images are moved by
                three pixels along an axis from centers that training has to such ones
    radii       `HELD_OUT_RADII` are between those of training
    grounds     of the 64 cells of the color cube training has plain grounds in 48 only; `HELD_OUT_PATTERNS` in none
"""

import random
from collections.abc import Sequence
from functools import cache
from itertools import combinations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import ImageFont

SIZE = 32
HALF = SIZE // 2
# Pixels between a center and the middle lines at least, so that no shape is in two corners at once.
MARGIN = 3
# Classes of pixels, the held-out one of them, and pixels by which everything is moved in the evaluation: moved so
# along an axis, each class becomes another one.
CLASSES, HELD_OUT_CLASS, MOVE = 5, 0, 3
RADII, HELD_OUT_RADII = (3, 4, 6), (5,)
# Two of these fit into one corner.
SMALL_RADII = (3, 3, 4)
# A written word of two letters, in pixels.
WORD_SIZE = (12, 11)
PLAIN, GRADIENT, ROWS, COLUMNS, GRAIN = PATTERNS = ("plain", "gradient", "rows", "columns", "grain")
HELD_OUT_PATTERNS = ("checks", "diagonals")
TRAINED_PATTERNS = (PLAIN, PLAIN, *PATTERNS)
# Share of plain grounds that are dark and gray, between these levels: those are learned first.
SHARE_DARK, DARK = 0.35, (5, 45)
# Distance of the ground's color to any shape's at least, and levels of each channel in the cube's cells.
CONTRAST, LEVELS = 70, 4
Color = tuple[int, int, int]
Spot = tuple[int, int]


# ---- centers ----


def spot_class(spot: Spot) -> int:
    """Return the class of a pixel: each row, and each column, has all of them in turn."""
    return (spot[0] + 2 * spot[1]) % CLASSES


def is_trained_spot(spot: Spot) -> bool:
    """Return whether training has shapes with this center, or words that begin there."""
    return spot_class(spot) != HELD_OUT_CLASS


def is_allowed(spot: Spot, corner: int, radius: int) -> bool:
    """Return whether a shape with this center is inside the image and of one corner only."""
    return all(part in _span(corner, axis, radius) for axis, part in enumerate(spot))


@cache
def _span(corner: int, axis: int, radius: int) -> range:
    """Return the coordinates of centers along an axis."""
    is_far = (corner % 2, corner // 2)[axis]
    return range(HALF - 1 + MARGIN, SIZE - radius) if is_far else range(radius, HALF + 1 - MARGIN)


@cache
def _spots(corner: int, radius: int, only: int | None) -> tuple[Spot, ...]:
    """Return the centers that training has in a corner, all or those of a class."""
    spots = ((x, y) for x in _span(corner, 0, radius) for y in _span(corner, 1, radius))
    return tuple(spot for spot in spots if is_trained_spot(spot) and only in (None, spot_class(spot)))


@cache
def _word_spots(corner: int, only: int | None) -> tuple[Spot, ...]:
    left, top = HALF * (corner % 2), HALF * (corner // 2)
    spots = ((left + x, top + y) for x in range(HALF - WORD_SIZE[0] + 1) for y in range(HALF - WORD_SIZE[1] + 1))
    return tuple(spot for spot in spots if is_trained_spot(spot) and only in (None, spot_class(spot)))


def is_allowed_word(spot: Spot, corner: int) -> bool:
    """Return whether a word that begins at this pixel is within the corner."""
    starts = (HALF * (corner % 2), HALF * (corner // 2))
    return all(0 <= part - start <= HALF - size for part, start, size in zip(spot, starts, WORD_SIZE, strict=True))


def draw_spots(
    rng: random.Random,
    corners: Sequence[int],
    radii: Sequence[int],
    word_corner: int | None = None,
    only: int | None = None,
) -> tuple[list[Spot], list[int], Spot | None]:
    """Return centers and radii of shapes with at least a pixel between them, and the first pixel of the word.

    Args:
        corners: of the shapes, at most two in one.
        radii: to draw from; those in one corner are from `SMALL_RADII`.
        word_corner: of the word, without a shape.
        only: class of all centers and of the word's first pixel; by default all that training has.
    """
    while True:
        sizes = [rng.choice(SMALL_RADII if corners.count(corner) > 1 else radii) for corner in corners]
        spots = [rng.choice(_spots(corner, size, only)) for corner, size in zip(corners, sizes, strict=True)]
        word = None if word_corner is None else rng.choice(_word_spots(word_corner, only))
        boxes = [(x - size, y - size, x + size, y + size) for (x, y), size in zip(spots, sizes, strict=True)]
        if word is not None:
            boxes.append((*word, word[0] + WORD_SIZE[0] - 1, word[1] + WORD_SIZE[1] - 1))
        if not any(_touches(*pair) for pair in combinations(boxes, 2)):
            return spots, sizes, word


def _touches(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return one[0] <= other[2] + 1 and other[0] <= one[2] + 1 and one[1] <= other[3] + 1 and other[1] <= one[3] + 1


# ---- grounds ----


def is_held_out_color(color: Sequence[int]) -> bool:
    """Return whether plain grounds of this color are in no training image: a quarter of the cells of the cube."""
    return sum(part * LEVELS // 256 for part in color) % LEVELS == 2


def draw_ground(rng: random.Random, pattern: str, shades: Sequence[Color], held_out: bool) -> "numpy.ndarray":
    """Return a ground (SIZE, SIZE, 3) in bytes on which all shades can be seen.

    Args:
        pattern: of `PATTERNS` or `HELD_OUT_PATTERNS`.
        shades: of the shapes and the word.
        held_out: whether a plain ground's color is one that training has not.
    """
    import numpy

    is_dark = pattern == PLAIN and not held_out and rng.random() < SHARE_DARK
    while True:
        color = (rng.randint(*DARK),) * 3 if is_dark else tuple(rng.randint(0, 255) for _ in range(3))
        step = 0 if pattern == PLAIN else rng.choice((-1, 1)) * rng.randint(12, 30)
        if pattern == PLAIN and is_held_out_color(color) != held_out:
            continue
        other = tuple(min(255, max(0, part + step)) for part in color)
        if all(distance(tone, shade) >= (0 if is_dark else CONTRAST) for tone in (color, other) for shade in shades):
            break
    if pattern == PLAIN:
        return numpy.full((SIZE, SIZE, 3), color, numpy.uint8)
    share = _share(rng, pattern)[..., None]
    return (numpy.array(color) * (1 - share) + numpy.array(other) * share).astype(numpy.uint8)


def distance(one: Sequence[int], other: Sequence[int]) -> float:
    """Return the distance of two colors in levels."""
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5


def _share(rng: random.Random, pattern: str) -> "numpy.ndarray":
    """Return the share (SIZE, SIZE) of the second tone in each pixel."""
    import numpy

    y, x = numpy.mgrid[:SIZE, :SIZE]
    width, start = rng.randint(2, 4), rng.randint(0, 7)
    if pattern == GRAIN:
        return numpy.random.default_rng(rng.getrandbits(32)).random((SIZE, SIZE))
    if pattern == GRADIENT:
        across = rng.choice((x, y, SIZE - 1 - x, SIZE - 1 - y, (x + y) / 2))
        return across / (SIZE - 1)
    bands = {
        ROWS: (y + start) // width,
        COLUMNS: (x + start) // width,
        "checks": (x + start) // width + (y + start) // width,
        "diagonals": (x + y + start) // width,
    }
    return (bands[pattern] % 2).astype(float)


# ---- pixels ----


@cache
def _font() -> "ImageFont":
    """Return Pillow's font of pixels, 6 by 11, which needs no library for drawing outlines."""
    from PIL import ImageFont

    return ImageFont.load_default_imagefont()


def paint(
    ground: "numpy.ndarray",
    shapes: Sequence[tuple[str, Spot, int, Color]],
    word: tuple[str, Spot, Color] | None = None,
) -> "Image":
    """Return the image (SIZE, SIZE) in RGB.

    Args:
        shapes: as (shape, center, radius, color).
        word: as (text, first pixel, color).
    """
    from PIL import Image, ImageDraw

    picture = Image.fromarray(ground)
    draw = ImageDraw.Draw(picture)
    for shape, (x, y), radius, color in shapes:
        _draw_shape(draw, shape, x, y, radius, color)
    if word is not None:
        text, spot, color = word
        draw.text(spot, text, font=_font(), fill=color)
    return picture


# Pixels of a shape in a patch, for the patch to show a part of it.
LEAST_PART = 3


@cache
def covered(shape: str, spot: Spot, radius: int, patch_size: int) -> frozenset[int]:
    """Return the numbers of the patches, row by row, that show a part of a shape."""
    import numpy
    from PIL import Image, ImageDraw

    mask = Image.new("L", (SIZE, SIZE))
    _draw_shape(ImageDraw.Draw(mask), shape, *spot, radius, 1)
    side = SIZE // patch_size
    pixels = numpy.asarray(mask, dtype=int).reshape(side, patch_size, side, patch_size).sum((1, 3))
    return frozenset(numpy.flatnonzero(pixels.ravel() >= LEAST_PART).tolist())


@cache
def covered_by_word(spot: Spot, patch_size: int) -> frozenset[int]:
    """Return the numbers of the patches, row by row, that show a part of the word that begins at a pixel."""
    spans = [range(start, start + size) for start, size in zip(spot, WORD_SIZE, strict=True)]
    pixels = [x // patch_size + y // patch_size * (SIZE // patch_size) for x in spans[0] for y in spans[1]]
    return frozenset(number for number in pixels if pixels.count(number) >= LEAST_PART)


def _draw_shape(draw: "ImageDraw", shape: str, x: int, y: int, r: int, shade: Color | int) -> None:
    """Draw a shape about (x, y), r pixels to each side."""
    whole = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        draw.ellipse(whole, fill=shade)
    elif shape == "square":
        draw.rectangle(whole, fill=shade)
    elif shape == "frame":
        draw.rectangle(whole, outline=shade, width=1)
    elif shape == "triangle":
        draw.polygon([(x - r, y + r), (x + r, y + r), (x, y - r)], fill=shade)
    elif shape == "diamond":
        draw.polygon([(x - r, y), (x, y - r), (x + r, y), (x, y + r)], fill=shade)
    if shape in ("bar", "cross"):
        draw.rectangle((x - r, y - 1, x + r, y + 1), fill=shade)
    if shape in ("post", "cross"):
        draw.rectangle((x - 1, y - r, x + 1, y + r), fill=shade)
