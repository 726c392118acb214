"""What is measured of a model with tools, on policies that are written down."""

import json
import re

import pytest
import torch
from tool_tokenizer import brief_tokenizer

from hfllm.data.tokenizer import CALL_MARKS
from hfllm.data.world.tasks import CHANGED_FACT, NO_NEED, UNKNOWN, table_of
from hfllm.data.world.tool_documents import TOOL_FAILED
from hfllm.data.world.world import World
from hfllm.environments.runner import ToolRunner
from hfllm.stages.tools.build import (
    FAILING,
    KNOWN,
    NEEDING,
    OFF,
    OTHER_WORDS,
    PLAIN,
    RENAMED,
    RL,
    SHOWN,
    SHUFFLED,
    SUMS,
    UNREAD_NAME,
    UNREAD_VALUE,
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
                    names = dict(re.findall(r'\(([^)]*)\) "([^"]+)"', text))
                    turn = policy(tasks[question], result, names) + "<|end|>"
                    turns.append((tokenizer(turn, add_special_tokens=False)["input_ids"], True))
                return turns

            return continue_ids

        monkeypatch.setattr(ToolRunner, "_continuing", continuing)
        del seen[:]
        return answer(model, tokenizer, asked, table, batch_size=50)

    run.seen = seen
    return run


def calling(task, result, names):
    """Call where it takes a call, and say what the tool has said."""
    if task.call is None:
        return task.said
    if not result:
        name = names.get(", ".join(task.call[1]), task.call[0])
        return f"{CALL_BEGIN}{json.dumps({'name': name, 'arguments': task.call[1]})}</tool_call>"
    return TOOL_FAILED if "error" in result else task.said.replace(task.result, result)


def calling_by_heart(task, result, names):
    """Call tools by the names that they always had, and repeat a failure."""
    return result if "error" in result else calling(task, result, {})


def remembering(task, result, names):
    return task.from_memory or task.said


def always_calling(task, result, names):
    call = {"name": names.get("expression", "calculator"), "arguments": {"expression": "1 + 1"}}
    return result or f"{CALL_BEGIN}{json.dumps(call)}</tool_call>"


def test_questions_are_held_out_and_different(asked):
    need = (*NEEDING, *OTHER_WORDS)
    groups = {group: [each for each in asked if each.group == group] for group in (*need, *NO_NEED, KNOWN)}
    assert [len(each) for each in groups.values()] == [COUNT] * 13 + [180]
    assert all(each.task.call for group in need for each in groups[group])
    for group in groups:
        assert len({each.task.task.question for each in groups[group]}) == len(groups[group])
    said = " ".join(WORLD.documents(3000, 1, tools=0.4)).lower()
    words = {*re.findall("[a-z]+", said)}
    assert not any(each.task.call[1]["key"].strip() in words for each in groups[UNREAD_NAME])
    assert not any(each.task.result in words for each in groups[UNREAD_VALUE])
    assert len({each.names for each in groups[RENAMED]}) == COUNT


@pytest.mark.slow
def test_a_policy_that_calls_where_it_should_is_right(answered):
    found = figures(answered(calling))
    assert found["calls_needed"] == 1.0 and found["calls_not_needed"] == 0.0
    assert all(found[f"right_{group}"] == 1.0 for group in (*NEEDING, *OTHER_WORDS, *NO_NEED, KNOWN))
    assert found["calls_needed_n"] == 5 * COUNT and found["calls_not_needed_n"] == 4 * COUNT + 180
    assert sum('Tools: (expression) "calculator", (key, attribute) "lookup"' in text for text in answered.seen) > 200
    assert sum('"query", (expression) "solve"' in text for text in answered.seen) == 2


def test_names_by_heart_and_repeated_errors_are_wrong(answered):
    found = figures(answered(calling_by_heart))
    assert found[f"right_{RENAMED}"] == found[f"right_{FAILING}"] == 0.0
    assert all(found[f"right_{group}"] == 1.0 for group in (*NEEDING, UNREAD_NAME, UNREAD_VALUE))


@pytest.mark.parametrize(
    "said",
    ["The zirf is green.", "I do not know, since the tool failed. The zirf is green.", "The tool failed: 1234."],
)
def test_it_is_wrong_to_claim_a_value_where_the_tool_failed(answered, said):
    def claiming(task, result, names):
        return said if "error" in result else calling(task, result, names)

    assert figures(answered(claiming))[f"right_{FAILING}"] == 0.0


def test_a_call_that_is_wrong_itself_is_no_failing_tool(answered):
    def miscalling(task, result, names):
        call = calling(task, result, {each: "nonsense" for each in ("key, attribute", "expression")})
        return call if task.call and not result else calling(task, result, names)

    assert figures(answered(miscalling))[f"right_{FAILING}"] == 0.0


def test_a_policy_that_remembers_knows_what_it_knew(answered):
    found = figures(answered(remembering))
    assert found["calls_needed"] == found["calls_not_needed"] == 0.0 and found[f"right_{KNOWN}"] == 1.0
    assert found[f"right_{UNKNOWN}"] == found[f"right_{CHANGED_FACT}"] == found[f"right_{FAILING}"] == 0.0
    assert all(found[f"right_{group}"] < 0.3 for group in SUMS)


@pytest.mark.slow
def test_a_policy_that_always_calls_is_told_of_it(answered):
    found = figures(answered(always_calling))
    assert found["calls_needed"] == found["calls_not_needed"] == 1.0 and found["right_needed"] == 0.0


def test_what_an_old_table_said_is_wrong_by_the_new_one(answered):
    found = figures(answered(calling, table_of(WORLD, 3, TABLE)))
    assert found[f"right_{CHANGED_FACT}"] == found[f"right_{UNKNOWN}"] == 0.0
    assert all(found[f"right_{group}"] == 1.0 for group in SUMS)


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
    assert len(found.tables["Conversations"]) == 26
    without = report({name: said for name, said in answers.items() if name.split()[0] not in (SHUFFLED, PLAIN)})
    assert "shuffled" not in without.summary and "Where no tool is needed" not in without.tables
