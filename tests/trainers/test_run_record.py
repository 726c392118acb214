"""What a checkpoint records of its run's rows is the same wherever they are read again."""

from types import SimpleNamespace

import pytest
import row_kinds
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PIL

from hfllm.data.world.pictures import DrawnWorld
from hfllm.errors import InputError
from hfllm.trainers.run_record import MOST_ROWS, content_of_rows


def content(*sources, **more):
    trainer = SimpleNamespace(plan=SimpleNamespace(sources=sources), **more) if len(sources) > 1 else None
    return content_of_rows(trainer or SimpleNamespace(train_dataset=sources[0]))


@pytest.mark.parametrize("kind", list(row_kinds.rows_by_kind()))
def test_rows_that_are_made_again_are_the_same(kind):
    # Both are kept, so that nothing has the address of anything else.
    first, again = (row_kinds.rows_by_kind()[kind] for _ in range(2))
    assert content(first) == content(again)
    assert content(first)["count"] == len(first) and content(first[:-1]) != content(first)


def test_rows_differ_by_one_pixel_and_one_row():
    first, again = DrawnWorld(0, 4), [*DrawnWorld(0, 4)]
    assert content(first) == content(again)
    again[2].picture.putpixel((0, 0), (1, 2, 3))
    assert content(first) != content(again) and content(first) != content(DrawnWorld(1, 4))
    rows = [{"input_ids": [number]} for number in range(4)]
    assert content(rows) != content([*rows[:3], {"input_ids": ["3"]}])
    # Where one source ends and the next begins is the run's, too.
    assert content(rows[:2], rows[2:]) == content(rows[:2], rows[2:]) != content(rows[:1], rows[1:])
    many = [{"input_ids": [number]} for number in range(2 * MOST_ROWS)]
    changed = [*many[:-2], {"input_ids": [0]}, many[-1]]
    assert content(many)["count"] == 2 * MOST_ROWS and content(many) != content(changed)


def test_images_of_a_dataset_are_compared_as_they_are_stored(tmp_path):
    """By their bytes, wherever the files are; a transform that draws them for training changes nothing."""
    features = Features({"text": Value("string"), "images": [Image()]})
    found = []
    for place, color in (("a", "red"), ("b", "red"), ("c", "blue")):
        (tmp_path / place).mkdir()
        PIL.new("RGB", (4, 4), color).save(tmp_path / place / "0.png")
        rows = {"text": ["What?"], "images": [[str(tmp_path / place / "0.png")]]}
        dataset = Dataset.from_dict(rows, features=features)
        assert content(dataset.with_transform(lambda batch: {"text": [torch.rand(2)]})) == content(dataset)
        found.append(content(dataset)["content"])
    assert found[0] == found[1] != found[2]


def test_a_value_without_contents_is_named_with_its_row_and_field():
    rows = [{"prompt": "a", "score": 1}, {"prompt": "b", "score": open}]
    with pytest.raises(InputError, match=r"training row 1\['score'\]: a value of type builtins.builtin_function"):
        content(rows)
