"""What is measured of a model with tools, on policies that are written down."""

import json

import pytest
import torch
from tool_tokenizer import brief_tokenizer

from hfllm.data.tokenizer import CALL_MARKS
from hfllm.data.world.tasks import CHANGED_FACT, NEED, NO_NEED, SUM, UNKNOWN, table_of
from hfllm.data.world.world import World
from hfllm.environments.runner import ToolRunner
from hfllm.stages.tools.build import (
    KNOWN,
    OFF,
    PLAIN,
    RL,
    SHOWN,
    SHUFFLED,
    answer,
    figures,
    held_out_questions,
    report,
)

CALL_BEGIN = CALL_MARKS[0]
WORLD = World(3)
TABLE = table_of(WORLD, 2)
COUNT = 8


@pytest.fixture(scope="module")
def tokenizer():
    return brief_tokenizer(WORLD.documents(1500, 1, tools=0.4), 700)


@pytest.fixture(scope="module")
def asked():
    return held_out_questions(WORLD, TABLE, COUNT)


@pytest.fixture
def answered(tokenizer, asked, make_model, monkeypatch):
    """A function that lets a written policy answer: `policy(task, result)` is its turn, given what a tool said."""
    model = make_model(vocab_size=len(tokenizer))
    tasks = {each.task.task.question: each.task for each in asked}
    seen = []

    def run(policy, table=TABLE):
        def continuing(runner):
            def continue_ids(sequences, most):
                turns = []
                for ids in sequences:
                    text = tokenizer.decode(ids)
                    seen.append(text)
                    question = text.partition("<|user|>")[2].partition("<|end|>")[0]
                    result = text.partition("<|tool|> ")[2].partition("<|end|>")[0]
                    turn = policy(tasks[question], result) + "<|end|>"
                    turns.append((tokenizer(turn, add_special_tokens=False)["input_ids"], True))
                return turns

            return continue_ids

        monkeypatch.setattr(ToolRunner, "_continuing", continuing)
        del seen[:]
        return answer(model, tokenizer, asked, table, batch_size=50)

    run.seen = seen
    return run


def calling(task, result):
    """Call where it takes a call, and say what the tool has said."""
    if task.call is None:
        return task.said
    if not result:
        name, arguments = task.call
        return f"{CALL_BEGIN}{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"
    return task.said.replace(task.result, result)


def remembering(task, result):
    return task.from_memory or task.said


def always_calling(task, result):
    return result or f'{CALL_BEGIN}{{"name": "calculator", "arguments": {{"expression": "1 + 1"}}}}</tool_call>'


def test_questions_are_held_out_and_different(asked):
    groups = {group: [each for each in asked if each.group == group] for group in (*NEED, *NO_NEED, KNOWN)}
    assert [len(each) for each in groups.values()] == [COUNT] * 7 + [180]
    assert len({each.task.task.question for each in asked if each.group != KNOWN}) == 7 * COUNT
    assert all(each.task.call for group in NEED for each in groups[group])


@pytest.mark.slow
def test_a_policy_that_calls_where_it_should_is_right(answered):
    found = figures(answered(calling))
    assert found["calls_needed"] == 1.0 and found["calls_not_needed"] == 0.0
    assert all(found[f"right_{group}"] == 1.0 for group in (*NEED, *NO_NEED, KNOWN))
    assert found["calls_needed_n"] == 3 * COUNT and found["calls_not_needed_n"] == 4 * COUNT + 180
    assert all('Tools: ["calculator", "lookup"]' in text for text in answered.seen)


def test_a_policy_that_remembers_knows_what_it_knew(answered):
    found = figures(answered(remembering))
    assert found["calls_needed"] == found["calls_not_needed"] == 0.0 and found[f"right_{KNOWN}"] == 1.0
    assert found[f"right_{UNKNOWN}"] == found[f"right_{CHANGED_FACT}"] == 0.0 and found[f"right_{SUM}"] < 0.2


@pytest.mark.slow
def test_a_policy_that_always_calls_is_told_of_it(answered):
    found = figures(answered(always_calling))
    assert found["calls_needed"] == found["calls_not_needed"] == 1.0 and found["right_needed"] == 0.0


def test_what_an_old_table_said_is_wrong_by_the_new_one(answered):
    found = figures(answered(calling, table_of(WORLD, 3, TABLE)))
    assert found[f"right_{CHANGED_FACT}"] == found[f"right_{UNKNOWN}"] == 0.0 and found[f"right_{SUM}"] == 1.0


@pytest.mark.slow
def test_tools_that_are_switched_off_are_neither_named_nor_called(tokenizer, asked, make_model):
    torch.manual_seed(0)
    model = make_model(vocab_size=len(tokenizer))
    begin = tokenizer.convert_tokens_to_ids(CALL_BEGIN)
    with torch.no_grad():
        # It would say nothing but that.
        model.get_output_embeddings().weight[begin] = 3 * model.get_output_embeddings().weight.abs().sum(0)
    off = answer(model, tokenizer, asked[:8], None)
    on = answer(model, tokenizer, asked[:8], TABLE, do_sample=True, seed=1)
    assert not any(begin in each.episode.response_ids for each in off)
    assert not any("Tools" in tokenizer.decode(each.episode.prompt_ids) for each in off)
    assert all("Tools" in tokenizer.decode(each.episode.prompt_ids) for each in on)
    again = answer(model, tokenizer, asked[:8], TABLE, do_sample=True, seed=1)
    assert [each.episode.response_ids for each in on] == [each.episode.response_ids for each in again]


@pytest.mark.slow
def test_the_report_has_ppo_beside_its_controls(answered):
    called, remembered = answered(calling), answered(remembering)
    answers = {
        **{SHOWN: remembered, f"{SHOWN} sampled": remembered, RL: called, f"{RL} sampled": called},
        **{OFF: remembered, SHUFFLED: remembered, f"{SHUFFLED} sampled": remembered, PLAIN: remembered},
    }
    found = report(answers)
    assert found.metrics["right_needed_change"] == pytest.approx(1 - found.metrics["right_needed_before"])
    assert found.metrics["sampled_calls_needed_change"] == 1.0 and found.metrics["shuffled_calls_needed_change"] == 0
    assert found.metrics["off_right_unknown"] == found.metrics["known_facts_lost"] == 0.0
    assert "by shuffled rewards" in found.summary and "known facts of a model without tools" in found.summary
    assert len(found.tables["Conversations"]) == 14
    without = report({name: said for name, said in answers.items() if name.split()[0] not in (SHUFFLED, PLAIN)})
    assert "shuffled" not in without.summary and "Where no tool is needed" not in without.tables
