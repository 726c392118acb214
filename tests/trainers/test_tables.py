"""Completions reach every back end that can show a table, in the form that it takes."""

from types import SimpleNamespace

import pytest
from transformers.integrations.integration_utils import (
    CometCallback,
    MLflowCallback,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)

from hfllm.trainers.callbacks import BACK_ENDS, log_table, markdown_of, storable

ROWS = [
    {"prompt": "a|b", "completion": "one\ntwo", "reward": 0.123456},
    {"prompt": "c", "completion": "", "reward": 1},
]


def begun(kind, **attributes):
    """A back end's callback as it is once its run has begun, without the package behind it."""
    callback = object.__new__(kind)
    vars(callback).update(attributes)
    return callback


@pytest.fixture
def calls():
    return []


@pytest.fixture
def back_ends(calls):
    def note(*args, **kwargs):
        calls.append((args, kwargs))

    wandb = SimpleNamespace(run=object(), Table=lambda columns, data: ("table", columns, data), log=note)
    trackio = SimpleNamespace(Table=lambda dataframe: ("table", dataframe.to_dict("list")), log=note)
    return {
        WandbCallback: begun(WandbCallback, _wandb=wandb),
        TrackioCallback: begun(TrackioCallback, _trackio=trackio, _initialized=True),
        TensorBoardCallback: begun(TensorBoardCallback, tb_writer=SimpleNamespace(add_text=note)),
        MLflowCallback: begun(
            MLflowCallback, _ml_flow=SimpleNamespace(log_table=note), _initialized=True, _auto_end_run=False
        ),
        CometCallback: begun(CometCallback, _experiment=SimpleNamespace(log_table=note)),
    }


COLUMNS = {"prompt": ["a|b", "c"], "completion": ["one\ntwo", ""], "reward": [0.123456, 1]}
CELLS = [["a|b", "one\ntwo", 0.123456], ["c", "", 1]]
EXPECTED = {
    WandbCallback: (({"completions": ("table", list(COLUMNS), CELLS), "train/global_step": 7},), {}),
    TrackioCallback: (({"completions": ("table", COLUMNS)},), {}),
    TensorBoardCallback: (("completions", markdown_of(ROWS), 7), {}),
    MLflowCallback: (({"step": [7, 7], **COLUMNS}, "completions.json"), {}),
    CometCallback: (("completions_7.csv",), {"tabular_data": CELLS, "headers": list(COLUMNS)}),
}


@pytest.mark.parametrize("kind", list(BACK_ENDS), ids=lambda kind: kind.__name__)
def test_each_gets_the_table(back_ends, calls, kind):
    log_table([object(), back_ends[kind]], "completions", ROWS, 7)
    assert calls == [EXPECTED[kind]]


def test_one_that_has_not_begun_is_passed_over(calls):
    idle = [
        begun(WandbCallback, _wandb=None),
        begun(TrackioCallback, _initialized=False),
        begun(TensorBoardCallback, tb_writer=None),
        begun(MLflowCallback, _initialized=False, _auto_end_run=False),
        begun(CometCallback, _experiment=None),
    ]
    log_table(idle, "completions", ROWS, 7)


def test_markdown_stays_a_table():
    lines = markdown_of(ROWS).splitlines()
    assert lines[2] == "| a\\|b | one / two | 0.1235 |"
    assert len(lines) == 4


def test_messages_whose_calls_have_arguments_of_any_kind_fill_one_column(tmp_path):
    from datasets import Dataset

    def prompt(content, arguments):
        calls = [{"function": {"name": "act", "arguments": arguments}}]
        return [{"role": "user", "content": content}, {"role": "assistant", "content": "", "tool_calls": calls}]

    prompts = [prompt("a", {"x": 1}), prompt([{"type": "text", "text": "b"}], {"x": ["é", {}]}), prompt(None, "x")]
    rows = [{"prompt": each, "reward": 0.5} for each in [*prompts, "text"]]
    kept = storable(rows)
    assert kept[3] == rows[3] and kept[0]["prompt"][0] == prompts[0][0] and kept[2]["prompt"][0] == prompts[2][0]
    assert kept[1]["prompt"][0]["content"] == '[{"type": "text", "text": "b"}]'
    assert kept[1]["prompt"][1]["tool_calls"] == '[{"function": {"name": "act", "arguments": {"x": ["é", {}]}}}]'
    Dataset.from_list(kept[:3]).to_parquet(tmp_path / "kept.parquet")
    (read,) = Dataset.from_parquet(str(tmp_path / "kept.parquet"), cache_dir=str(tmp_path))[1:2]["prompt"]
    assert read[1] == kept[1]["prompt"][1]
