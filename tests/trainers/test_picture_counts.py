"""Whether prompts with pictures fit: each picture is opened, and what needs no processor again is not given to it."""

import picture_run as run
import pytest
from PIL import Image

from hfllm.errors import InputError
from hfllm.trainers.ppo import prompts
from hfllm.trainers.ppo.picture_tokens import encode
from hfllm.trainers.ppo.prompts import check_prompts, unfit_prompts


def asked(words, size=None, **columns):
    row = {"prompt": [{"role": "user", "content": words}], **columns}
    return row if size is None else {**row, "image": Image.new("RGB", size)}


@pytest.fixture
def calls(monkeypatch):
    """How many prompts were processed, call by call; each picture takes a token for eight of its pixels."""
    made = []

    def tokens_of(rows, processor, first, tools):
        made.append(len(rows))
        return [[0] * sum(map(tokens_in, row["prompt"])) for row in rows]

    monkeypatch.setattr(prompts, "_tokens_of", tokens_of)
    return made


def tokens_in(message):
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    words = [part["text"].split() for part in parts if part["type"] == "text"]
    sizes = [part["image"].size for part in parts if part["type"] == "image"]
    return sum(map(len, words)) + sum(width * height // 8 for width, height in sizes)


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
    rows += [asked("which side", (8, 16)), asked("which side is bright", (8, 8)), asked("which side"), rows[0]]
    processor = run.make_processor()
    ((place, said),) = unfit_prompts(rows, processor, 0, 15)
    assert place == 40 and said.startswith("has 18 tokens;")
    assert calls == [1, 3]
    # A column that its template may read, or a message with more than words: no other prompt is like it.
    calls.clear()
    list(unfit_prompts([asked("which", (8, 8), tools=[{}]), asked("which", (8, 8), tools=[{}])], processor, 0, 15))
    assert calls == [2]
    # What is kept has an end.
    calls.clear()
    monkeypatch.setattr(prompts, "KEPT_COUNTS", 0)
    list(unfit_prompts(rows[:40], processor, 0, 15))
    assert calls == [1, 1, 1]


def test_each_picture_is_opened_whatever_was_asked_before(tmp_path):
    processor, rows = run.make_processor(), run.halves(20)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows.append({**rows[0], "image": str(tmp_path / "broken.png")})
    with pytest.raises(InputError, match=r"prompt 20 of the dataset: picture .*broken\.png"):
        check_prompts(rows, processor, 3, 64)
    rows[20] = {**rows[0], "image": None, "images": [rows[0]["image"]] * 2, "prompt": run.make_rows(2)[1]["prompt"]}
    with pytest.raises(InputError, match=r"prompt 20 of the dataset: 1 place for pictures .* has 2"):
        check_prompts(rows, processor, 3, 64)
    rows[20] = {**rows[0], "prompt": [{"role": "user", "content": "<image>"}]}
    with pytest.raises(InputError, match="prompt 20 of the dataset: the words spell '<image>'"):
        check_prompts(rows, processor, 3, 64)
