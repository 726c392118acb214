"""Small images with exact answers, colored shapes in four corners and now and then a word, and rows of them.

    color       "What color is the square?"                     top left: red
    shape       "What shape is red?"                            top left: square
    count       "How many shapes are there?"                    two
    place       "Where is the red square?"                      top left
    relation    "Where is the square from the frame?"            top left, bottom left: above
    text        "Which word is written?"                        bottom right: go
    absent      any of these about something absent             not in the picture

An answer first says where it has looked. Finding a thing by its shape and reading its color at once is learned late;
finding its corner, and reading the color there, are two steps that are learned early, and each works for colors and
shapes that were never seen together.

An image has one to three shapes, each at a random position of a random size, at most two in one corner, on a ground of
any color, plain or with a pattern, and questions have several wordings: `Style` has what varies, and `STYLES` what no
training image or question has. `HELD_OUT` holds a fifth of the pairs of color and shape: no training image shows them,
though each of their colors and shapes is seen in many others. A model that answers about them has learned color and
shape apart, not pairs by heart. With fewer than about 48 pairs no model does.

Captions name the things corner by corner, colors and shapes in two lists, so that neither can be guessed from the
other.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cmp_to_key
from itertools import product
from typing import TYPE_CHECKING

from hfllm.data.sources import DIGITS, PICTURES
from hfllm.data.world import drawing
from hfllm.data.world.drawing import HALF, SIZE, Spot
from hfllm.data.world.rubric import GoldAnswer, words_of
from hfllm.data.world.wordings import COLOR, COUNT, PLACE, RELATION, SHAPE, TEXT, WORDINGS, meaning_of, usual_wording
from hfllm.errors import InputError

if TYPE_CHECKING:
    import numpy
    from PIL.Image import Image


COLORS = {
    **{"red": (215, 40, 40), "orange": (240, 130, 30), "yellow": (235, 215, 50), "lime": (150, 230, 40)},
    **{"green": (35, 145, 55), "cyan": (50, 200, 215), "blue": (50, 90, 225), "navy": (30, 40, 125)},
    **{"purple": (150, 55, 180), "pink": (250, 150, 195), "white": (240, 240, 240), "brown": (115, 70, 30)},
}
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "bar", "post", "frame")
PLACES = ("top left", "top right", "bottom left", "bottom right")
WORDS = ("up", "go", "no", "hi", "me", "at", "by", "ox")
COUNTS = ("one", "two", "three")
# Position of the first of two neighboring corners, seen from the second; corners across have no such word.
RELATIONS = {
    **{(0, 1): "left", (2, 3): "left", (1, 0): "right", (3, 2): "right"},
    **{(0, 2): "above", (1, 3): "above", (2, 0): "below", (3, 1): "below"},
}
DIRECTIONS = ("left", "right", "above", "below")
Pair = tuple[str, str]
PAIRS: tuple[Pair, ...] = tuple((color, shape) for color in COLORS for shape in SHAPES)
HELD_OUT: tuple[Pair, ...] = PAIRS[2::5]
SEEN: tuple[Pair, ...] = tuple(pair for pair in PAIRS if pair not in HELD_OUT)
ABSENT = "absent"
FAMILIES = (COLOR, SHAPE, COUNT, PLACE, RELATION, TEXT, ABSENT)
# How often each is drawn in training: questions with two lookups, or with a search in vain, are learned last.
TRAINED_FAMILIES = (COUNT, TEXT, *[COLOR, PLACE] * 3, *[SHAPE] * 4, *[ABSENT] * 5, *[RELATION] * 6)
NOT_THERE = "not in the picture"
WORD = "word"
ASK_COLORS, ASK_SHAPES = "Name the colors.", "Name the shapes."
ASK_COUNT, ASK_WORD = WORDINGS[COUNT].trained[0], WORDINGS[TEXT].trained[0]
# How many shapes images have, and the share of them with a word.
NUMBERS, SHARE_OF_WORDS = (1, 2, 2, 3), 0.3
# In training: among three things a look at random is right less often.
TRAINED_NUMBERS = (1, 2, 3, 3)
# How light a color is drawn, times its own shade; and the distance of a shade without a name to any of these at least.
LIGHTS, UNLIKE = (0.8, 1.08), 60
# Share of questions in the usual wording; the others have one of the rest.
SHARE_USUAL = 0.4


@dataclass(frozen=True)
class Style:
    """How images are drawn and asked about; by default as in training.

    Args:
        radii: of shapes, to draw from, in pixels.
        patterns: of grounds, to draw from.
        has_other_grounds: whether plain grounds have colors that no plain ground of training has.
        share_crowded: share of the images of two and more things that have two in one corner.
        move: pixels by which everything is moved along an axis, from where training has things.
        has_other_wordings: whether questions are held-out wordings.
    """

    radii: tuple[int, ...] = drawing.RADII
    patterns: tuple[str, ...] = drawing.TRAINED_PATTERNS
    has_other_grounds: bool = False
    share_crowded: float = 0.3
    move: int = 0
    has_other_wordings: bool = False


TRAINED_STYLE = Style()
# What no training image has, one by one; two things in one corner training does have.
MOVED, GROUNDS, PATTERNS, SIZES, CROWDED, REWORDED = ("moved", "grounds", "patterns", "sizes", "crowded", "reworded")
STYLES = {
    MOVED: Style(move=drawing.MOVE),
    GROUNDS: Style(patterns=(drawing.PLAIN,), has_other_grounds=True),
    PATTERNS: Style(patterns=drawing.HELD_OUT_PATTERNS),
    SIZES: Style(radii=drawing.HELD_OUT_RADII, share_crowded=0),
    CROWDED: Style(share_crowded=1),
    REWORDED: Style(has_other_wordings=True),
}


@dataclass(frozen=True)
class Thing:
    """A shape of a color in a corner, by its number in `PLACES`.

    Args:
        color: of `COLORS`; "" for a shade that has no name.
        shape: of `SHAPES`.
        center: its pixel (x, y); by default the middle of the corner.
        radius: pixels to each side of the center.
    """

    color: str
    shape: str
    corner: int
    center: Spot | None = None
    radius: int = 4

    @property
    def pair(self) -> Pair:
        """Its color and shape."""
        return self.color, self.shape

    @property
    def spot(self) -> Spot:
        """Its center in pixels."""
        return self.center or (HALF // 2 + HALF * (self.corner % 2), HALF // 2 + HALF * (self.corner // 2))


@dataclass(frozen=True)
class Scene:
    """The content of an image: its things, the first of which questions may be about, and its word if there is one.

    Args:
        word_spot: the first pixel of the word; by default that of its corner.
    """

    things: tuple[Thing, ...]
    word: str | None = None
    word_corner: int | None = None
    word_spot: Spot | None = None

    def only(self, shape: str = "", color: str = "") -> bool:
        """Return whether exactly one thing has this shape, this color, or both."""
        return sum((not shape or t.shape == shape) and (not color or t.color == color) for t in self.things) == 1


@dataclass(frozen=True)
class Question:
    """A question about a scene with its exact answer, and the wrong answers of the same kind."""

    family: str
    text: str
    answer: str
    others: tuple[str, ...]

    @property
    def gold(self) -> GoldAnswer:
        """The gold answer for `hfllm.rewards.functions.gold_reward`."""
        needed = ("not",) if self.family == ABSENT else tuple(words_of(self.answer))
        wrong = {word for other in self.others for word in other.split()} - set(needed)
        return GoldAnswer("answer", (self.answer,), needed, tuple(sorted(wrong)))

    def gold_columns(self) -> dict[str, object]:
        """Return the columns of a prompt dataset for gold scoring."""
        return self.gold.columns()


def draw_scene(
    rng: random.Random,
    held_out: bool = False,
    numbers: Sequence[int] = NUMBERS,
    style: Style = TRAINED_STYLE,
    is_apart: bool = False,
) -> Scene:
    """Return a scene; with `held_out` its first thing is one of the pairs absent from all training images.

    Args:
        numbers: of things, to draw from; at most three.
        style: of the image; in a crowded one the first two things are in one corner.
        is_apart: whether each thing is a shape in a shade without a name.
    """
    pairs = [("", rng.choice(SHAPES)) if is_apart else rng.choice(SEEN) for _ in range(rng.choice(numbers))]
    if held_out:
        pairs[0] = rng.choice(HELD_OUT)
    corners = rng.sample(range(len(PLACES)), len(PLACES))
    is_crowded = rng.random() < style.share_crowded
    if is_crowded and len(pairs) > 1:
        corners = [corners[0], *corners]
    word = rng.choice(WORDS) if rng.random() < SHARE_OF_WORDS else None
    scene = None
    while scene is None:
        scene = _placed(rng, pairs, corners, word, style)
    return scene


def _placed(
    rng: random.Random, pairs: Sequence[Pair], corners: Sequence[int], word: str | None, style: Style
) -> Scene | None:
    """Return the scene of things at random positions, moved as the style has it; `None` where one would leave it."""
    word_corner = None if word is None else corners[-1]
    step, start = (0, 0), None
    if style.move:
        step = rng.choice(((style.move, 0), (-style.move, 0), (0, style.move), (0, -style.move)))
        # From there the step leads to centers that training has not.
        start = drawing.spot_class((-step[0], -step[1]))
    spots, radii, word_spot = drawing.draw_spots(rng, corners[: len(pairs)], style.radii, word_corner, start)
    placed = zip(pairs, corners, spots, radii, strict=False)
    scene = Scene(tuple(Thing(*pair, *where) for pair, *where in placed), word, word_corner, word_spot)
    if not style.move:
        return scene
    scene = moved(scene, *step)
    is_inside = all(drawing.is_allowed(each.spot, each.corner, each.radius) for each in scene.things)
    return scene if is_inside and (word is None or drawing.is_allowed_word(scene.word_spot, word_corner)) else None


def moved(scene: Scene, across: int, down: int) -> Scene:
    """Return a scene with everything moved by pixels to the right and down; corners stay as they are named."""

    def move(spot: Spot) -> Spot:
        return spot[0] + across, spot[1] + down

    things = tuple(replace(thing, center=move(thing.spot)) for thing in scene.things)
    word_spot = None if scene.word is None else move(_word_spot(scene))
    return replace(scene, things=things, word_spot=word_spot)


def _word_spot(scene: Scene) -> Spot:
    return scene.word_spot or (HALF * (scene.word_corner % 2), HALF * (scene.word_corner // 2))


def captions(scene: Scene) -> tuple[tuple[str, str], ...]:
    """Return both captions as (request, caption): the colors, and the shapes, corner by corner.

    Of two things in one corner the left one comes first, or else the upper one. What has no name is left out.
    """
    named = [(thing.corner, thing.color, thing.shape) for thing in sorted(scene.things, key=cmp_to_key(_order))]
    if scene.word is not None:
        named.append((scene.word_corner, WORD, scene.word))
    # Sorting keeps the order of two things in one corner.
    named.sort(key=lambda each: each[0])
    said = (
        (request, ", ".join(at_corner(corner, parts[index]) for corner, *parts in named if parts[index]))
        for index, request in enumerate((ASK_COLORS, ASK_SHAPES))
    )
    return tuple((request, caption) for request, caption in said if caption)


def _order(one: Thing, other: Thing) -> int:
    """Return a negative number if a thing is named before another one of its corner: by the larger distance."""
    across, down = (a - b for a, b in zip(one.spot, other.spot, strict=True))
    return across if abs(across) >= abs(down) else down


# The words of `patch_names`: colors, shapes, and both parts of the name of a corner.
PATCH_WORDS = ((*COLORS, WORD), (*SHAPES, *WORDS), ("top", "bottom"), ("left", "right"))


def patch_names(scene: Scene, patch_size: int) -> list[tuple[str, ...] | None]:
    """Return for each patch, row by row, words of `PATCH_WORDS` about the shape or the word with its center there.

    Two centers are never in one patch of eight pixels or less. Where a part of another shape or word is, its names are
    returned without the corner; of parts of two, two empty words.
    """
    names: list[tuple[str, ...] | None] = [None] * (SIZE // patch_size) ** 2
    parts = [
        (thing.pair, drawing.covered(thing.shape, thing.spot, thing.radius, patch_size)) for thing in scene.things
    ]
    if scene.word is not None:
        parts.append(((WORD, scene.word), drawing.covered_by_word(_word_spot(scene), patch_size)))
    for name, numbers in parts:
        for number in numbers:
            names[number] = name if names[number] is None else ("", "")
    centers = [(thing.spot, thing.pair, thing.corner) for thing in scene.things]
    if scene.word is not None:
        left, top = _word_spot(scene)
        middle = (left + drawing.WORD_SIZE[0] // 2, top + drawing.WORD_SIZE[1] // 2)
        centers.append((middle, (WORD, scene.word), scene.word_corner))
    for (x, y), name, corner in centers:
        names[y // patch_size * (SIZE // patch_size) + x // patch_size] = (*name, *PLACES[corner].split())
    return names


def at_corner(corner: int, content: str) -> str:
    """Return words about the content of a corner."""
    return f"{PLACES[corner]}: {content}"


# ---- questions ----


def trained_families(share_absent: float | None = None) -> tuple[str, ...]:
    """Return the families of training questions, each as often as its weight.

    Args:
        share_absent: of questions about absent things, from 0 to below 1, to five places; `None` leaves
            `TRAINED_FAMILIES`.
    """
    if share_absent is None:
        return TRAINED_FAMILIES
    # So many that the smallest share and the largest are met, and no more.
    repeats = max(1, round(10_000 * (1 - share_absent)))
    others = tuple(family for family in TRAINED_FAMILIES if family != ABSENT) * repeats
    return others + (ABSENT,) * round(len(others) * share_absent / (1 - share_absent))


def draw_question(
    scene: Scene,
    rng: random.Random,
    about_first: bool = False,
    families: Sequence[str] = FAMILIES,
    style: Style = TRAINED_STYLE,
) -> Question:
    """Return a question about a scene, of a family drawn among the possible ones.

    Args:
        about_first: whether it must be about the first thing, as for held-out pairs.
        families: to draw from; the scene must allow one of them, as every scene does with count, place and absent.
        style: of the question: in trained or held-out wordings.
    """
    while True:
        thing = scene.things[0] if about_first else rng.choice(scene.things)
        question = ASKING[rng.choice(families)](scene, thing, rng)
        if question is not None:
            return replace(question, text=_worded(question.text, rng, style.has_other_wordings))


def _worded(text: str, rng: random.Random, is_held_out: bool) -> str:
    """Return a question of the usual wording in one of the other wordings of its kind, or as it is."""
    kind, names = meaning_of(text)
    usual, *others = WORDINGS[kind].trained
    if is_held_out:
        return rng.choice(WORDINGS[kind].held_out).format(*names)
    return (usual if rng.random() < SHARE_USUAL else rng.choice(others)).format(*names)


def _ask_color(scene: Scene, thing: Thing, rng: random.Random) -> Question | None:
    if not all(thing.pair) or not scene.only(thing.shape):
        return None
    return _asked_color(COLOR, thing.shape, at_corner(thing.corner, thing.color))


def _ask_shape(scene: Scene, thing: Thing, rng: random.Random) -> Question | None:
    if not all(thing.pair) or not scene.only(color=thing.color):
        return None
    return _asked_shape(SHAPE, thing.color, at_corner(thing.corner, thing.shape))


def _ask_count(scene: Scene, thing: Thing, rng: random.Random) -> Question:
    return _question(COUNT, ASK_COUNT, COUNTS[len(scene.things) - 1], COUNTS)


def _ask_place(scene: Scene, thing: Thing, rng: random.Random) -> Question | None:
    if not scene.only(thing.shape, thing.color):
        return None
    is_named_whole = rng.random() < 2 / 3 or not thing.shape or not scene.only(thing.shape)
    return _asked_place(PLACE, thing.pair if is_named_whole else ("", thing.shape), PLACES[thing.corner])


def _ask_relation(scene: Scene, thing: Thing, rng: random.Random) -> Question | None:
    others = [
        other
        for other in scene.things
        if (thing.corner, other.corner) in RELATIONS and other.shape and scene.only(other.shape)
    ]
    if not others or not thing.shape or not scene.only(thing.shape):
        return None
    other = rng.choice(others)
    text = f"Where is the {thing.shape} from the {other.shape}?"
    answer = f"{PLACES[thing.corner]}, {at_corner(other.corner, RELATIONS[thing.corner, other.corner])}"
    return _question(RELATION, text, answer, (*DIRECTIONS, *PLACES))


def _ask_word(scene: Scene, thing: Thing, rng: random.Random) -> Question | None:
    if scene.word is None:
        return None
    return _question(TEXT, ASK_WORD, at_corner(scene.word_corner, scene.word), (*WORDS, *PLACES))


def _ask_absent(scene: Scene, thing: Thing, rng: random.Random) -> Question | None:
    """Return a question about something absent; half of the absent pairs have a color and a shape that are present."""
    colors, shapes = {each.color for each in scene.things}, {each.shape for each in scene.things}
    present_pairs = {each.pair for each in scene.things}
    kind = rng.choice((COLOR, SHAPE, PLACE, TEXT))
    if kind == TEXT:
        return None if scene.word is not None else _question(ABSENT, ASK_WORD, NOT_THERE, (*WORDS, *PLACES))
    if kind == COLOR:
        return _asked_color(ABSENT, rng.choice([shape for shape in SHAPES if shape not in shapes]), NOT_THERE)
    if kind == SHAPE:
        return _asked_shape(ABSENT, rng.choice([color for color in COLORS if color not in colors]), NOT_THERE)
    near = [pair for pair in product(sorted(colors), sorted(shapes)) if pair not in present_pairs]
    near = [pair for pair in near if pair in SEEN]
    if near and rng.random() < 0.5:
        return _asked_place(ABSENT, rng.choice(near), NOT_THERE)
    while True:
        color, shape = rng.choice(SEEN)
        if (color in colors) != (shape in shapes):
            return _asked_place(ABSENT, (color, shape), NOT_THERE)


ASKING = {
    **{COLOR: _ask_color, SHAPE: _ask_shape, COUNT: _ask_count, PLACE: _ask_place},
    **{RELATION: _ask_relation, TEXT: _ask_word, ABSENT: _ask_absent},
}


def _asked_color(family: str, shape: str, answer: str) -> Question:
    return _question(family, f"What color is the {shape}?", answer, (*COLORS, *PLACES))


def _asked_shape(family: str, color: str, answer: str) -> Question:
    return _question(family, f"What shape is {color}?", answer, (*SHAPES, *PLACES))


def _asked_place(family: str, pair: Pair, answer: str) -> Question:
    return _question(family, f"Where is the {' '.join(filter(None, pair))}?", answer, PLACES)


def _question(family: str, text: str, answer: str, kind: Sequence[str]) -> Question:
    return Question(family, text, answer, tuple(other for other in (*kind, NOT_THERE) if other != answer))


def answer_about(scene: Scene, text: str) -> str:
    """Return the right answer to a question, by its words, about any scene; "" where more than one thing is meant."""
    text = usual_wording(text)
    if text == ASK_COUNT:
        return COUNTS[len(scene.things) - 1]
    if text == ASK_WORD:
        return NOT_THERE if scene.word is None else at_corner(scene.word_corner, scene.word)
    words = text.rstrip("?").split()
    matches = [[t for t in scene.things if word in (t.color, t.shape)] for word in words if word in (*COLORS, *SHAPES)]
    if words[0] == "Where" and "from" not in words:
        # One name of color and shape together.
        matches = [[thing for thing in matches[0] if all(thing in each for each in matches)]]
    if not all(matches):
        return NOT_THERE
    if any(len(each) > 1 for each in matches):
        return ""
    thing = matches[0][0]
    if words[0] == "What":
        return at_corner(thing.corner, thing.color if words[1] == "color" else thing.shape)
    if len(matches) == 1:
        return PLACES[thing.corner]
    other = matches[1][0]
    relation = RELATIONS.get((thing.corner, other.corner))
    return f"{PLACES[thing.corner]}, {at_corner(other.corner, relation)}" if relation else ""


# ---- drawing ----


def draw_picture(scene: Scene, rng: random.Random, style: Style = TRAINED_STYLE) -> "Image":
    """Return the image of a scene, (SIZE, SIZE) in RGB, with shades and the ground drawn by `rng`."""
    shades = [_shade(COLORS[thing.color], rng) if thing.color else rng.choice(_no_colors()) for thing in scene.things]
    gray = (130 + rng.randint(-20, 30),) * 3
    visible = shades if scene.word is None else [*shades, gray]
    ground = drawing.draw_ground(rng, rng.choice(style.patterns), visible, style.has_other_grounds)
    shapes = [(each.shape, each.spot, each.radius, shade) for each, shade in zip(scene.things, shades, strict=True)]
    return drawing.paint(ground, shapes, None if scene.word is None else (scene.word, _word_spot(scene), gray))


def _shade(color: drawing.Color, rng: random.Random) -> drawing.Color:
    light = rng.uniform(*LIGHTS)
    return tuple(min(255, max(0, int(part * light) + rng.randint(-12, 12))) for part in color)


@cache
def _no_colors() -> tuple[drawing.Color, ...]:
    """Return shades that are none of the colors', however light `_shade` makes these, and are seen on dark grounds."""
    import numpy

    levels = numpy.arange(0, 256, 6)
    shades = numpy.stack(numpy.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    colors = [numpy.array(color) * light for color in COLORS.values() for light in numpy.linspace(*LIGHTS, 8)]
    grays = [numpy.full(3, level) for level in drawing.DARK]
    is_other = numpy.ones(len(shades), bool)
    for shade, least in [*((each, UNLIKE) for each in colors), *((each, drawing.CONTRAST) for each in grays)]:
        is_other &= numpy.linalg.norm(shades - shade, axis=1) >= least
    return tuple(map(tuple, shades[is_other].tolist()))


# ---- many of them ----


@dataclass(frozen=True)
class Example:
    """An image, its scene, and questions about it."""

    scene: Scene
    picture: "Image"
    questions: tuple[Question, ...]


def draw_example(
    seed: int,
    number: int,
    held_out: bool = False,
    num_questions: int = 1,
    part: str = "train",
    families: Sequence[str] = FAMILIES,
    numbers: Sequence[int] = NUMBERS,
    style: Style = TRAINED_STYLE,
    is_apart: bool = False,
) -> Example:
    """Return one image with questions: a function of these arguments only, whichever were drawn before.

    Args:
        seed: the same seed, the same bits.
        number: of the image.
        held_out: whether the first thing is a held-out pair and the questions are about it.
        num_questions: questions about the image.
        part: names another stream of the same seed, such as evaluation's.
        families: families to draw questions from; a family listed twice is drawn twice as often.
        numbers: possible numbers of things, likewise.
        style: of the image and the questions. About a crowded one they are about the first of the things.
        is_apart: whether only the shape of each thing has a name.
    """
    rng = random.Random(f"pictures {part} {held_out} {seed} {number}")
    scene = draw_scene(rng, held_out, numbers, style, is_apart)
    picture = draw_picture(scene, rng, style)
    about_first = held_out or style.share_crowded == 1
    questions = tuple(draw_question(scene, rng, about_first, families, style) for _ in range(num_questions))
    return Example(scene, picture, questions)


def draw_examples(
    seed: int, count: int, held_out: bool = False, num_questions: int = 1, part: str = "train"
) -> Iterator[Example]:
    """Yield the first images of a stream: see `draw_example`."""
    return (draw_example(seed, number, held_out, num_questions, part) for number in range(count))


# ---- picture rows ----
#
# Images with questions and answers, row by row: the drawn world, and scikit-learn's digits.
#
# A row is drawn when it is read, from its number only, so that a million of them take no memory and a resumed run
# sees the same ones.


SIDES = ("left", "right")
NUMERALS = tuple(map(str, range(10)))
# Training digits among scikit-learn's 1,797; the rest are held out.
TRAINED_DIGITS = 1400
DIGITS_SIZE = 16
PATCHES, CAPTIONS, QUESTIONS = "patches", "captions", "questions"


def picture_side(name: str) -> int | None:
    """Return the side of a dataset's drawn images in pixels, `None` for a dataset that is not drawn."""
    return {PICTURES: SIZE, DIGITS: DIGITS_SIZE}.get(name)


@dataclass(frozen=True)
class PictureRow:
    """An image, and the questions and answers about it, turn by turn.

    Args:
        picture: in RGB.
        turns: (question, answer) in order.
        family: of its one question, for evaluation.
        gold: columns for the gold reward of its one question.
        scene: the content of the image, for the drawn world.
    """

    picture: "Image"
    turns: tuple[tuple[str, str], ...]
    family: str = ""
    gold: Mapping[str, object] = field(default_factory=dict)
    scene: Scene | None = None

    def prompt(self) -> list[dict[str, object]]:
        """Return its first question as messages with parts; the image comes first."""
        content = [{"type": "image"}, {"type": "text", "text": self.turns[0][0]}]
        return [{"role": "user", "content": content}]

    def messages(self) -> list[dict[str, object]]:
        """Return all turns as messages with parts."""
        (_, answer), *more = self.turns
        conversation = [*self.prompt(), _message("assistant", answer)]
        return conversation + [
            _message(*each) for ask, reply in more for each in (("user", ask), ("assistant", reply))
        ]


def _message(role: str, text: str) -> dict[str, object]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _row(picture: "Image", questions: Sequence[Question]) -> PictureRow:
    first = questions[0]
    turns = tuple((question.text, question.answer) for question in questions)
    return PictureRow(picture, turns, first.family, first.gold_columns())


class DrawnWorld(Sequence[PictureRow]):
    """Rows of the drawn world: images to name, captions, or questions.

    Args:
        seed: of the images.
        count: how many.
        kind: `patches`, images without any turn, `captions` or `questions`.
        num_questions: turns of a row of questions.
        held_out: whether all are about held-out pairs of color and shape.
        part: the stream of images; captions and questions for training are of different ones.
        caption_every: one in so many rows of questions has both captions before them; 0 gives none. With
            `whole_every` only rows whose things have no color: the longer captions of the others would take the room
            of most of their questions.
        whole_every: of the things in all but one of so many images only the shape has a name: what shape something
            is, is then learned without its color. Colors, shapes and absent things are not asked for there, so that
            `families` must have others. 1 gives none.
        families: of questions, see `draw_example`.
        numbers: of things, likewise.
        style: of images and questions, likewise.
    """

    def __init__(
        self,
        seed: int,
        count: int,
        kind: str = QUESTIONS,
        num_questions: int = 1,
        held_out: bool = False,
        part: str = "train",
        caption_every: int = 0,
        families: Sequence[str] = FAMILIES,
        numbers: Sequence[int] = NUMBERS,
        style: Style = TRAINED_STYLE,
        whole_every: int = 1,
    ):
        self.seed, self.count, self.kind, self.num_questions = seed, count, kind, num_questions
        self.held_out, self.part, self.caption_every = held_out, part, caption_every
        self.families, self.numbers, self.style, self.whole_every = families, numbers, style, whole_every

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> PictureRow:
        if not 0 <= number < self.count:
            raise IndexError(number)
        count = 0 if self.kind == PATCHES else self.num_questions
        is_apart = number % self.whole_every != self.whole_every - 1
        families = (
            [each for each in self.families if each not in (COLOR, SHAPE, ABSENT)] if is_apart else self.families
        )
        settings = (count, f"{self.part} {self.kind}", families, self.numbers, self.style, is_apart)
        example = draw_example(self.seed, number, self.held_out, *settings)
        if self.kind == PATCHES:
            return PictureRow(example.picture, (), scene=example.scene)
        turns = captions(example.scene)
        if self.kind == QUESTIONS:
            row = replace(_row(example.picture, example.questions), scene=example.scene)
            may_have = is_apart or self.whole_every == 1
            has_captions = self.caption_every and may_have and number // self.whole_every % self.caption_every == 0
            return replace(row, turns=turns + row.turns) if has_captions else row
        # Either may come first, so that neither is learned only from the other.
        is_turned = number // self.whole_every % 2
        return PictureRow(example.picture, turns[:: -1 if is_turned else 1], scene=example.scene)

    def texts(self) -> list[str]:
        """Return the questions and answers of a sample of rows, for a tokenizer."""
        sample = (self[number] for number in range(min(self.count, 3000)))
        return [text for row in sample for turn in row.turns for text in turn]


@cache
def _digits() -> "tuple[numpy.ndarray, list[int], list[int]]":
    """Return scikit-learn's digits (1797, 8, 8) from 0 to 16, their labels, and their order by chance."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("--dataset_name digits needs scikit-learn: pip install scikit-learn") from None
    digits = load_digits()
    order = list(range(len(digits.target)))
    random.Random(0).shuffle(order)
    return digits.images, [int(label) for label in digits.target], order


class TwoDigits(Sequence[PictureRow]):
    """Rows of two handwritten digits side by side, (16, 16), and the question which one is left or right.

    Handwritten by 43 people and scanned: Alpaydin and Kaynak 1998, "Optical recognition of handwritten digits".

    Args:
        seed: of the pairing of digits.
        count: how many rows.
        is_held_out: whether to use the digits absent from all training rows.
        num_questions: 1, or 2 for both sides in one row.
    """

    def __init__(self, seed: int, count: int, is_held_out: bool = False, num_questions: int = 1):
        self.seed, self.count, self.num_questions = seed, count, num_questions
        order = _digits()[2]
        self.places = order[TRAINED_DIGITS:] if is_held_out else order[:TRAINED_DIGITS]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> PictureRow:
        import numpy
        from PIL import Image

        if not 0 <= number < self.count:
            raise IndexError(number)
        images, labels, _ = _digits()
        rng = random.Random(f"digits {self.seed} {number}")
        pair = [rng.choice(self.places) for _ in SIDES]
        gray = numpy.concatenate([images[index] for index in pair], 1) * (255 / 16)
        # Twice as high as scanned, so that both fill a square.
        gray = gray.astype(numpy.uint8).repeat(2, 0)
        picture = Image.fromarray(gray).convert("RGB")
        sides = rng.sample(range(len(SIDES)), self.num_questions)
        return _row(picture, [_which_digit(SIDES[side], str(labels[pair[side]])) for side in sides])

    def texts(self) -> list[str]:
        """Return the questions and answers of a sample of rows, for a tokenizer."""
        return [text for number in range(min(self.count, 300)) for turn in self[number].turns for text in turn]


def _which_digit(side: str, digit: str) -> Question:
    others = tuple(other for other in (*NUMERALS, *SIDES) if other not in (digit, side))
    return Question(side, f"Which digit is on the {side}?", f"{side}: {digit}", others)
