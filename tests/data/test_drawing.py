"""Drawn images, read back from their pixels alone: whole shapes apart from each other; what training has not."""

import random
import re
from collections import Counter
from itertools import pairwise

import numpy
import pytest

from hfllm.data.world import drawing
from hfllm.data.world.drawing import HELD_OUT_PATTERNS, HELD_OUT_RADII, PATTERNS, PLAIN, RADII, SIZE
from hfllm.data.world.pictures import (
    CAPTIONS,
    COLORS,
    CROWDED,
    GROUNDS,
    MOVED,
    NOT_THERE,
    PLACES,
    SHAPES,
    SIZES,
    STYLES,
    TRAINED_STYLE,
    Scene,
    Style,
    Thing,
    captions,
    draw_example,
    draw_picture,
    moved,
)
from hfllm.data.world.pictures import (
    PATTERNS as OTHER_PATTERNS,
)
from hfllm.stages.vision.build import caption_rows, eval_parts, question_rows, style_parts

# Everything as in training, on plain grounds, where each pixel that differs from the ground is of a thing.
ON_PLAIN = Style(patterns=(PLAIN,))


def some(count=150, style=ON_PLAIN, seed=0, **kwargs):
    return [draw_example(seed, number, num_questions=4, style=style, **kwargs) for number in range(count)]


def ground_of(picture):
    """Return the most frequent pixel, and its share."""
    ((pixel, count),) = Counter(map(tuple, numpy.asarray(picture).reshape(-1, 3))).most_common(1)
    return tuple(map(int, pixel)), count / SIZE**2


def components(picture):
    """Return the masks (SIZE, SIZE) of what lies on a plain ground: pixels of one color that touch or meet."""
    pixels = numpy.asarray(picture).astype(int)
    is_lit, found = (pixels != ground_of(picture)[0]).any(2), []
    while is_lit.any():
        todo, mask = [tuple(numpy.argwhere(is_lit)[0])], numpy.zeros((SIZE, SIZE), bool)
        while todo:
            y, x = todo.pop()
            if is_lit[y, x]:
                is_lit[y, x], mask[y, x] = False, True
                around = [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
                todo += [(a, b) for a, b in around if 0 <= a < SIZE and 0 <= b < SIZE]
        found.append(mask)
    return found


def box(mask):
    """Return left, top, right and bottom of a mask."""
    ys, xs = numpy.nonzero(mask)
    return tuple(map(int, (xs.min(), ys.min(), xs.max(), ys.max())))


def shape_of(mask):
    """Return the name of the shape that a mask has, by its outline."""
    left, top, right, bottom = box(mask)
    cut, width, height = mask[top : bottom + 1, left : right + 1], right - left + 1, bottom - top + 1
    if width != height:
        return "bar" if width > height else "post"
    middle = width // 2
    if cut.all():
        return "square"
    if not cut[middle, middle]:
        return "frame"
    if cut[-1].all():
        return "triangle"
    if cut[0].sum() == 1:
        return "diamond"
    # Both a circle and a cross have a part of each edge; the cross has no more of the lines next to it.
    return "cross" if cut[0].sum() == 3 and cut.sum() == 6 * width - 9 else "circle"


def read(picture):
    """Return the things of an image without a word as (color, shape, corner, center, radius), by the pixels alone."""
    things, pixels = [], numpy.asarray(picture).astype(float)
    for mask in components(picture):
        left, top, right, bottom = box(mask)
        mean = pixels[mask].mean(0)
        # A shade is a color times its light: of the same hue.
        far = {name: abs(mean - numpy.outer(LIGHTS, COLORS[name])).sum(1).min() for name in COLORS}
        color = min(far, key=far.get)
        center = ((left + right) // 2, (top + bottom) // 2)
        corner = (center[0] >= SIZE / 2) + 2 * (center[1] >= SIZE / 2)
        things.append((color, shape_of(mask), int(corner), center, max(right - left, bottom - top) // 2))
    return sorted(things)


LIGHTS = numpy.linspace(0.8, 1.08, 15)


def written(scene):
    """Return the things of a scene as `read` does."""
    return sorted((t.color, t.shape, t.corner, t.center, t.radius) for t in scene.things)


@pytest.mark.parametrize("style", [ON_PLAIN, *(STYLES[name] for name in (MOVED, GROUNDS, SIZES, CROWDED))])
def test_pixels_show_the_scene(style):
    """Each shape is whole, inside and apart from others, of its color, at its center, in its corner."""
    plain = Style(**{**vars(style), "patterns": (PLAIN,)})
    right_colors = total = 0
    for example in some(200, plain, numbers=(1, 2, 3)):
        if example.scene.word is not None:
            continue
        seen, said = read(example.picture), written(example.scene)
        assert sorted(each[1:] for each in seen) == sorted(each[1:] for each in said), example.scene
        right_colors += len(set(seen) & set(said))
        total += len(said)
    # Shades of brown, orange and red overlap.
    assert total > 150 and right_colors > 0.95 * total


def test_questions_are_answered_by_what_the_pixels_show():
    """The answers follow from the things that are read from the image, without the scene and the code that asks."""
    count = Counter()
    for example in some(300, numbers=(1, 2, 3)):
        seen = read(example.picture) if example.scene.word is None else []
        if seen != written(example.scene):
            continue
        for question in example.questions:
            words = question.text.replace(",", "").strip("?.").split()
            named = [word for word in words if word in COLORS or word in SHAPES]
            meant = [each for each in seen if all(name in each[:2] for name in named)]
            if question.family in ("color", "shape", "place"):
                ((color, shape, corner, *_),) = meant
                said = {"color": f": {color}", "shape": f": {shape}", "place": ""}[question.family]
                assert question.answer == PLACES[corner] + said
            elif question.family == "count":
                assert question.answer == ("one", "two", "three")[len(seen) - 1]
            elif question.family == "absent":
                assert not named or not meant, question
                assert question.answer == NOT_THERE
            elif question.family == "relation":
                (other,) = re.findall("(?i)from the ([a-z]+)", question.text)
                (one,) = set(named) - {other}
                ((x1, y1),), ((x2, y2),) = ([each[3] for each in seen if each[1] == name] for name in (one, other))
                half = SIZE / 2
                sides = {"left": x1 < half <= x2, "right": x2 < half <= x1, "above": y1 < half <= y2}
                sides["below"] = y2 < half <= y1
                (said,) = (name for name, holds in sides.items() if holds)
                assert question.answer.endswith(f": {said}")
            count[question.family] += 1
    assert len(count) == 6 and min(count.values()) > 20


def test_two_things_in_one_corner_are_named_from_the_left_or_from_above():
    orders = Counter()
    for example in some(100, STYLES[CROWDED], numbers=(2, 3)):
        one, other = example.scene.things[:2]
        assert one.corner == other.corner and len({t.corner for t in example.scene.things[1:]}) == len(
            example.scene.things[1:]
        )
        across, down = (b - a for a, b in zip(one.spot, other.spot, strict=True))
        is_first = across > 0 if abs(across) >= abs(down) else down > 0
        (_, colors), (_, shapes) = captions(example.scene)
        named = [
            [part.split(": ")[1] for part in said.split(", ") if part.startswith(PLACES[one.corner] + ":")]
            for said in (colors, shapes)
        ]
        expected = [one, other] if is_first else [other, one]
        assert named == [[t.color for t in expected], [t.shape for t in expected]]
        orders[is_first] += 1
        # Every question that names something there is names the first two's corner.
        for question in example.questions:
            if question.family in ("color", "shape", "place"):
                assert question.answer.startswith(PLACES[one.corner])
    assert min(orders.values()) > 20


# ---- what no training image has ----


def held_out_center(center):
    """Return whether only the evaluation has this center: a fifth of the pixels, in each row and column."""
    x, y = center
    return (x + 2 * y) % 5 == 0


def training(count=700):
    """Return rows of both kinds that the recipe trains on, with their scenes."""
    streams = [(caption_rows("pictures", seed, count), question_rows("pictures", seed, count, 7)) for seed in (7, 42)]
    return [row for each in streams for rows in each for row in rows]


def test_training_has_none_of_the_positions_sizes_and_grounds_of_the_evaluation():
    plain = others = 0
    for row in training():
        for thing in row.scene.things:
            assert held_out_center(thing.center) is False and thing.radius in RADII
        assert row.scene.word is None or not held_out_center(row.scene.word_spot)
        pixel, share = ground_of(row.picture)
        # More than half of a patterned ground is never of one color: bands have two, gradients and grain many.
        if share > 0.55:
            plain += 1
            assert not drawing.is_held_out_color(pixel)
        else:
            others += 1
    assert plain > 500 and others > 500
    assert not set(RADII) & set(HELD_OUT_RADII) and not set(PATTERNS) & set(HELD_OUT_PATTERNS)
    assert set(TRAINED_STYLE.patterns) <= set(PATTERNS) and set(TRAINED_STYLE.radii) <= set(RADII)


def test_positions_and_sizes_of_training_are_so_in_the_pixels():
    """A shape's center and radius, measured in the image, are never those of the evaluation."""
    train = [each for example in some(150) if example.scene.word is None for each in read(example.picture)]
    assert train and all(not held_out_center(center) and radius in RADII for *_, center, radius in train)
    style = Style(move=STYLES[MOVED].move, patterns=(PLAIN,))
    away = [each for example in some(150, style) if example.scene.word is None for each in read(example.picture)]
    assert away and all(held_out_center(center) for *_, center, _ in away)


def test_the_evaluation_has_what_it_is_named_for():
    parts = style_parts("pictures", 120)
    assert parts.keys() == STYLES.keys() and {len(each) for each in parts.values()} == {60}
    assert style_parts("digits", 120) == {}
    for asked in parts[MOVED]:
        assert all(held_out_center(thing.center) for thing in asked.scene.things)
        assert asked.scene.word is None or held_out_center(asked.scene.word_spot)
    for asked in parts[SIZES]:
        assert {thing.radius for thing in asked.scene.things} <= set(HELD_OUT_RADII)
    for asked in parts[GROUNDS]:
        pixel, share = ground_of(asked.images[0])
        assert share > 0.3 and drawing.is_held_out_color(pixel)
    for asked in parts[CROWDED]:
        assert asked.scene.things[0].corner == asked.scene.things[1].corner
    # Nothing but the one property differs from training: pairs are known.
    seen = {thing.pair for asked in eval_parts("pictures", 60)["held_out"] for thing in asked.scene.things[:1]}
    assert not seen & {thing.pair for each in parts.values() for asked in each for thing in asked.scene.things}


def test_held_out_patterns_differ_from_the_trained_ones():
    """Along every row and column checks change; along every diagonal of one direction diagonals do not."""
    for pattern in (*PATTERNS, *HELD_OUT_PATTERNS):
        ground = drawing.draw_ground(random.Random(5), pattern, [], False).astype(int)
        rows, columns = (abs(numpy.diff(ground, axis=axis)).sum((axis, 2)) for axis in (1, 0))
        changes = {"rows": columns.all() and not rows.any(), "columns": rows.all() and not columns.any()}
        changes |= {PLAIN: not rows.any() and not columns.any()}
        along = [numpy.diff(numpy.fliplr(ground).diagonal(offset), axis=1).any() for offset in (-3, 0, 3)]
        changes |= {"checks": rows.all() and columns.all() and any(along)}
        changes |= {"diagonals": rows.all() and columns.all() and not any(along)}
        named = [name for name in ("rows", "columns", PLAIN, "checks", "diagonals") if changes[name]]
        assert pattern in named or pattern in ("gradient", "grain")
        assert pattern not in HELD_OUT_PATTERNS or named == [pattern]


def test_colors_of_grounds_are_held_out_in_every_part_of_the_cube():
    levels = [32, 96, 160, 224]
    cells = [(a, b, c) for a in levels for b in levels for c in levels]
    assert sum(map(drawing.is_held_out_color, cells)) == 16
    # Each channel has each level among both.
    for axis in range(3):
        assert {cell[axis] for cell in cells if drawing.is_held_out_color(cell)} == set(levels)


def test_every_shape_can_be_seen_on_its_ground():
    """No pixel of any ground is near the color of a shape; of dark gray ones none is as near as to be the same."""
    rng = random.Random(0)
    for pattern in (*PATTERNS, *HELD_OUT_PATTERNS):
        for _ in range(30):
            shades = [tuple(rng.randint(0, 255) for _ in range(3)) for _ in range(3)]
            ground = drawing.draw_ground(rng, pattern, shades, held_out=False).reshape(-1, 3).astype(float)
            is_dark = pattern == PLAIN and ground.max() <= 45
            near = min(numpy.linalg.norm(ground - shade, axis=1).min() for shade in shades)
            assert is_dark or near > 55
    for example in some(100):
        ground, _ = ground_of(example.picture)
        for mask in components(example.picture):
            mean = numpy.asarray(example.picture)[mask].mean(0)
            assert numpy.linalg.norm(mean - ground) > 25


def test_moving_moves_every_pixel():
    scene = Scene((Thing("red", "circle", 0), Thing("blue", "frame", 3)), "go", 1)
    plain = Style(patterns=(PLAIN,))
    before, after = (
        numpy.asarray(draw_picture(each, random.Random(1), plain)) for each in (scene, moved(scene, 3, 2))
    )
    assert numpy.array_equal(before[:-2, :-3], after[2:, 3:]) and not numpy.array_equal(before, after)


def test_shapes_of_all_sizes_are_told_apart_by_their_masks():
    for radius in (*RADII, *HELD_OUT_RADII):
        for shape in SHAPES:
            thing = Thing("white", shape, 0, (8, 8), radius)
            picture = draw_picture(Scene((thing,)), random.Random(2), ON_PLAIN)
            (mask,) = components(picture)
            assert shape_of(mask) == shape
            left, top, right, bottom = box(mask)
            assert max(right - left, bottom - top) == 2 * radius and (left + right, top + bottom) == (16, 16)


def test_bands_are_two_to_four_pixels_wide():
    for seed in range(20):
        ground = drawing.draw_ground(random.Random(seed), "rows", [], False).astype(int)[:, 0].sum(1)
        edges = [0, *(index + 1 for index, (a, b) in enumerate(pairwise(ground)) if a != b)]
        widths = {b - a for a, b in pairwise(edges[1:])}
        assert len(widths) == 1 and widths <= {2, 3, 4}


def test_captions_and_questions_are_of_different_images():
    captioned = {row.picture.tobytes() for row in caption_rows("pictures", 7, 100)}
    assert not captioned & {row.picture.tobytes() for row in question_rows("pictures", 7, 100, 2)}
    assert caption_rows("pictures", 7, 2).kind == CAPTIONS
    # Either caption comes first, also where things have colors.
    firsts = [row.turns[0][0] for row in caption_rows("pictures", 7, 40) if len(row.turns) == 2]
    assert len({*firsts}) == 2 and len({firsts.count(each) for each in firsts}) == 1
    assert OTHER_PATTERNS in STYLES
