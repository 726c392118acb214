"""Whether prompts with pictures fit: drawn ones of the same words and sizes are processed once, all others each."""

import numpy
import picture_run as run
import pytest
from PIL import Image

from hfllm.data.formats import OriginRow
from hfllm.errors import InputError
from hfllm.multimodal.processors import encode, filled_prompt, what_is_counted
from hfllm.trainers.ppo import prompts
from hfllm.trainers.ppo.prompts import check_prompts, unfit_prompts


def asked(words, size=None, **columns):
    row = {"prompt": [{"role": "user", "content": words}], **columns}
    return row if size is None else {**row, "image": Image.new("RGB", size)}


@pytest.fixture
def calls(monkeypatch):
    """How many prompts were processed, call by call; a picture takes as many tokens as it is wide."""
    made = []

    def tokens_of(rows, processor, first, tools):
        made.append(len(rows))
        return [[0] * sum(map(tokens_in, filled_prompt(row, "a row"))) for row in rows]

    monkeypatch.setattr(prompts, "_tokens_of", tokens_of)
    return made


def tokens_in(message):
    parts = (
        [{"type": "text", "text": message["content"]}] if isinstance(message["content"], str) else message["content"]
    )
    return sum(len(part["text"].split()) if part["type"] == "text" else part["image"].width for part in parts)


def test_each_prompt_is_counted_as_by_itself():
    processor, rows = run.make_processor(), run.make_rows(45)
    rows += [{**rows[1], "tools": None}, {**rows[2], "prompt": [{**rows[2]["prompt"][0], "name": "me"}]}]
    lengths = [len(encode([row], processor)[0][0]) for row in rows]
    for limit in range(min(lengths), max(lengths) + 1):
        unfit = dict(unfit_prompts(rows, processor, 3, limit + 3))
        assert list(unfit) == [place for place, length in enumerate(lengths) if length > limit]
        assert all(f"has {lengths[place]} tokens" in said for place, said in unfit.items())


def test_a_processor_is_asked_once_for_the_same_words_and_sizes(calls, monkeypatch):
    rows = [asked("which side", (8, 8)) for _ in range(40)]
    rows += [asked("which side", (16, 8)), asked("which side is bright", (8, 8)), asked("which side"), rows[0]]
    processor = run.make_processor()
    ((place, said),) = unfit_prompts(rows, processor, 0, 15)
    assert place == 40 and said.startswith("has 18 tokens;")
    assert calls == [1, 3]
    # What is kept has an end.
    calls.clear()
    monkeypatch.setattr(prompts, "KEPT_COUNTS", 0)
    list(unfit_prompts(rows[:40], processor, 0, 15))
    assert calls == [1, 1, 1]


def turned(image):
    image.getexif()[0x0112] = 6
    return image


def closed(image):
    image.close()
    return image


def of_a_file(image):
    image.format = "PNG"
    return image


def with_metadata(image):
    image.info["exif"] = b"Exif"
    return image


@pytest.mark.parametrize("change", [turned, closed, of_a_file, with_metadata, lambda image: image.convert("La"), str])
def test_a_picture_that_is_not_plainly_drawn_is_like_no_other(change):
    row = asked([run.PLACE, {"type": "text", "text": "which"}], (8, 8))
    assert what_is_counted(row) == what_is_counted({**row, "color": "red"}) is not None
    image = row["image"].convert("LA") if change.__name__ == "<lambda>" else row["image"].copy()
    assert what_is_counted({**row, "image": change(image)}) is None


@pytest.mark.parametrize("content", [(run.PLACE,), None, [{"type": "image", "image": "a.png"}], [{"type": "text"}, 1]])
def test_a_message_with_more_than_words_and_places_is_like_no_other(content):
    assert what_is_counted(asked(content, (8, 8))) is None


@pytest.mark.parametrize(
    "change",
    [
        {"tools": [{}]},
        {"tools": numpy.ones(2)},
        {"prompt": "which"},
        {"prompt": ({"role": "user", "content": "which"},)},
        {"prompt": [{"role": "user", "content": "which", "name": "me"}]},
        {"prompt": [{"role": None, "content": "which"}]},
        {"prompt": ["which"]},
        {"images": "a.png"},
    ],
)
def test_a_row_with_more_than_words_and_pictures_is_like_no_other(change):
    row = asked("which", (8, 8))
    assert what_is_counted(row) is not None and what_is_counted({**row, **change}) is None
    # An empty list stands before the other column, whose picture nothing reads.
    assert what_is_counted({**row, "images": []}) != what_is_counted(row)


def test_what_is_wrong_with_a_row_is_said_whatever_was_asked_before(tmp_path):
    processor, rows = run.make_processor(), run.halves(20)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows.append({**rows[0], "image": str(tmp_path / "broken.png")})
    with pytest.raises(InputError, match=r"prompt 20 of the dataset: picture .*broken\.png"):
        check_prompts(rows, processor, 3, 64)
    rows[20] = {**rows[0], "image": None, "images": [rows[0]["image"]] * 2, "prompt": run.make_rows(2)[1]["prompt"]}
    with pytest.raises(InputError, match=r"prompt 20 of the dataset: 1 place for pictures .* has 2"):
        check_prompts(rows, processor, 3, 64)
    rows[20] = OriginRow(rows[20], "rows.jsonl, line 21")
    with pytest.raises(InputError, match=r"^rows\.jsonl, line 21: 1 place for pictures"):
        check_prompts(rows, processor, 3, 64)
    rows[20] = {**rows[0], "prompt": [{"role": "user", "content": "<image>"}]}
    with pytest.raises(InputError, match="prompt 20 of the dataset: the words spell '<image>'"):
        check_prompts(rows, processor, 3, 64)
    rows[20] = {**rows[0], "prompt": [{"role": "user", "content": [run.PLACE, {"type": "text", "content": "which"}]}]}
    with pytest.raises(InputError, match="prompt 20 of the dataset: the chat template cannot write this prompt"):
        check_prompts(rows, processor, 3, 64)


def test_a_picture_that_is_turned_is_counted_as_it_is_read(calls, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 16)).save(tmp_path / "turned.jpg", exif=exif)
    with Image.open(tmp_path / "turned.jpg") as opened:
        opened.load()
        rows = [asked("which", (8, 16)), *({**asked("which"), "image": each} for each in (opened, opened.copy()))]
        assert [place for place, _ in unfit_prompts(rows, run.make_processor(), 0, 16)] == [1, 2]
    assert calls == [3]
