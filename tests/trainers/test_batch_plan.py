"""What each step learns from is known beforehand: every row in its turn, in the size and length of its time."""

from collections import Counter

import pytest
import torch
from datasets import Dataset

from hfllm.errors import InputError
from hfllm.trainers.pretraining.trainer import BatchPlan, Schedule

LENGTH = 8


def source(first, count):
    """Rows of one piece whose tokens are all the row's number."""
    numbers = range(first, first + count)
    return Dataset.from_dict({"input_ids": [[n] * LENGTH for n in numbers], "seq_lengths": [[LENGTH]] * count})


def plan(sources=None, total_rows=40, batch_tokens="32", lengths="8", **more):
    settings = {"pad_token_id": 0, "seed": 3, **more}
    schedules = Schedule.parse(batch_tokens, "--batch_ramp"), Schedule.parse(lengths, "--length_curriculum")
    return BatchPlan(sources or [source(100, 20)], LENGTH, total_rows, *schedules, **settings)


def rows_of(batches):
    """Row numbers in the order that they are learned from."""
    return [row for batch in batches for row in batch["input_ids"].view(-1, LENGTH)[:, 0].tolist()]


def test_each_pass_over_the_data_has_every_row_once_in_another_order():
    steps = plan()
    assert len(steps) == 10
    order = rows_of(steps[at] for at in range(10))
    assert sorted(order[:20]) == sorted(order[20:]) == list(range(100, 120))
    assert order[:20] != order[20:] != list(range(100, 120))
    assert order != rows_of(plan(seed=4)[at] for at in range(10))


def test_a_step_is_known_without_the_steps_before():
    steps = list(range(10))
    expected = [plan()[at] for at in steps]
    fresh = plan()
    for at in reversed(steps):
        torch.testing.assert_close(fresh[at], expected[at], rtol=0, atol=0)


def test_processes_share_each_batch():
    whole, parts = plan(), [plan(process=at, processes=2) for at in range(2)]
    for step in range(len(whole)):
        together = {name: torch.cat([part[step][name] for part in parts]) for name in whole[step]}
        torch.testing.assert_close(together, whole[step], rtol=0, atol=0)


def test_each_process_has_as_many_rows():
    parts = [plan(total_rows=17, process=at, processes=3) for at in range(3)]
    assert len({len(part) for part in parts}) == 1
    for step in range(len(parts[0])):
        assert len({len(part[step]["input_ids"]) for part in parts}) == 1


def test_batches_grow_and_rows_lengthen_by_schedule():
    steps = plan(total_rows=40, batch_tokens="0:16,0.2:32,0.5:64", lengths="0:2,0.5:4,0.75:8")
    shapes = [tuple(steps[at]["input_ids"].shape) for at in range(len(steps))]
    # 8 rows in batches of 2, then 12 in batches of 4, then 20 in batches of 8 and what is left.
    assert shapes == [(8, 2)] * 4 + [(16, 2)] * 3 + [(16, 4), (16, 4), (4, 8)]
    assert [steps.tokens_at(at) for at in (0, 1, 4, 7, len(steps))] == [0, 16, 64, 160, 320]
    assert sum(rows * columns for rows, columns in shapes) == 40 * LENGTH


def test_sources_are_mixed_by_weight():
    sources = [source(100, 10), source(200, 50)]
    mixed = plan(sources, total_rows=400, weights=[3, 1])
    order = rows_of(mixed[at] for at in range(len(mixed)))
    first = [row for row in order if row < 200]
    assert len(first) == mixed.rows_by_source()[0] == pytest.approx(300, abs=30)
    # The small source comes round again and again, each of its rows as often as the others.
    assert set(Counter(first[: len(first) // 10 * 10]).values()) == {len(first) // 10}
    by_size = plan(sources, total_rows=600)
    assert by_size.rows_by_source()[0] == pytest.approx(100, abs=30)


@pytest.mark.parametrize("processes", [1, 2])
def test_each_row_of_a_run_has_a_number_of_its_own(processes):
    """Masks are drawn by it: in no step, length, pass over the data or process may it come again."""

    def numbered(batch, numbers):
        return {**batch, "numbers": torch.tensor(numbers)}

    schedule = {"total_rows": 40, "batch_tokens": "0:16,0.5:64", "lengths": "0:2,0.25:4,0.75:8"}
    parts = [plan(**schedule, process=at, processes=processes, transform=numbered) for at in range(processes)]
    batches = [part[step] for step in range(len(parts[0])) for part in parts]
    assert all(len(batch["numbers"]) == len(batch["input_ids"]) for batch in batches)
    numbers = [number for batch in batches for number in batch["numbers"].tolist()]
    # Rows 0 to 9 are cut in four. Steps of 8 rows begin at row 20: the last that begins before 0.75 ends with row 35.
    assert len(set(numbers)) == len(numbers) == 10 * 4 + 26 * 2 + 4
    alone = plan(**schedule, transform=numbered)
    assert numbers == [number for step in range(len(alone)) for number in alone[step]["numbers"].tolist()]


@pytest.mark.parametrize(
    "text", ["", "0.1:8", "0:8,0:4", "0:8,0.5:4,0.4:2", "0:8,1:4", "0:0", "a:8", "8.5", "0:8;0.5:4"]
)
def test_bad_schedules_are_refused_by_name(text):
    with pytest.raises(InputError, match="--length_curriculum"):
        Schedule.parse(text, "--length_curriculum")


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="length of 3 does not divide the row length of 8"):
        plan(lengths="0:3,0.5:8")
    with pytest.raises(InputError, match=r"a batch of 8 tokens has 1 rows of 8 tokens, fewer than the 2 process"):
        plan(batch_tokens="0:8,0.5:64", processes=2)
    with pytest.raises(InputError, match="2 weights for 1 source"):
        plan(weights=[1, 2])
    with pytest.raises(InputError, match="1 weights for 2 source"):
        plan([source(1, 4), source(9, 4)], weights=[1])
