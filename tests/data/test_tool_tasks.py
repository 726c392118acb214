"""The world's questions that take a tool, and the texts that show how tools are called."""

import json
import random
import re
from itertools import product

import pytest
from jinja2 import TemplateError
from tool_tokenizer import brief_tokenizer

from hfllm.data.tokenizer import CALL_MARKS, TOOL, TURN_END, brief_template, chat_template, train_tokenizer
from hfllm.data.world.rubric import RIGHT, GoldAnswer, gold_score, words_of
from hfllm.data.world.tasks import CHANGED_FACT, HELD_OUT, NEED, NO_NEED, PARTS, SUM, UNKNOWN, draw_tool_task, table_of
from hfllm.data.world.tool_documents import is_held_out_change
from hfllm.data.world.vocabulary import ANIMALS, ATTRIBUTES, NAME_PARTS, is_held_out
from hfllm.data.world.world import World
from hfllm.environments.tool_turns import ToolTurns
from hfllm.environments.tools import ToolBox
from hfllm.stages.tools.build import tools_of

CALL_BEGIN, CALL_END = CALL_MARKS
NAMES = {"".join(parts) for parts in product(*NAME_PARTS)}
ANY_CALL = re.compile(f"{re.escape(CALL_BEGIN)}(.*?){re.escape(CALL_END)}")
CALL = re.compile(f"{re.escape(CALL_BEGIN)}(.*?){re.escape(CALL_END + TURN_END + TOOL)} (.*?)<")


@pytest.fixture(scope="module")
def world():
    return World(3)


@pytest.fixture(scope="module")
def texts(world):
    return world.documents(4000, 7, tools=0.25)


def drawn(world, family, part, count=200, table=None):
    rng = random.Random(f"{family} {part}")
    return [draw_tool_task(world, rng, family, part, table) for _ in range(count)]


def test_texts_of_tools_come_on_request_alone(world, texts):
    plain = world.documents(3000, 5)
    assert plain == world.documents(3000, 5, 0.0, 0.0, 0.0)
    assert not any(CALL_BEGIN in text or set(words_of(text)) & NAMES for text in plain)
    share = sum(CALL_BEGIN in text for text in texts) / len(texts)
    assert 0.14 < share < 0.21  # seven of ten of a quarter


@pytest.mark.slow
def test_texts_show_calls_that_the_tools_answer_as_they_say(world, texts):
    found = [match for text in texts for match in CALL.findall(text)]
    assert len(found) > 300
    box = ToolBox(tools_of({}))
    for call, result in found:
        read = json.loads(call)
        if read["name"] == "calculator":
            assert box.call({"function": read}) == ({"role": "tool", "name": "calculator", "content": result}, False)
        else:
            attribute = read["arguments"]["attribute"].strip()
            assert result in ATTRIBUTES[attribute]


def test_each_result_of_a_sum_is_said_as_it_is(texts):
    marks = (re.escape(TOOL), re.escape(TURN_END), re.escape("<|assistant|>"))
    result = re.compile(r"{} (\d+){}{}The sum is (\d+)\.".format(*marks))
    found = [result.findall(text) for text in texts]
    assert all(read == said for pairs in found for read, said in pairs)
    # Texts of five results have no question.
    several = [(text, pairs) for text, pairs in zip(texts, found, strict=True) if len(pairs) > 1]
    assert len(several) > 100
    assert all(len(pairs) == 5 and CALL_BEGIN not in text for text, pairs in several)


def test_texts_hold_nothing_of_what_is_held_out(world, texts):
    names = {word for text in texts for word in words_of(text)} & NAMES
    assert len(names) > 300 and not any(is_held_out(f"unknown {name}") for name in names)
    for text in texts:
        for call in ANY_CALL.findall(text):
            arguments = json.loads(call)["arguments"]
            if arguments.get("key", "").strip() in ANIMALS:
                assert not is_held_out_change(arguments["key"].strip(), arguments["attribute"].strip())
                # What it says is of now, so that no text contradicts the facts.
                assert {"now", "today"} & set(words_of(text))
        for first, second in re.findall(r"(\d{3}) plus (\d{3})", text):
            assert not is_held_out(f"sum {first} plus {second}")


def test_no_room_for_facts_is_refused(world):
    with pytest.raises(ValueError, match=r"0\.5 texts of deeds, 0\.0 to reason about, 0\.5 of tools"):
        world.documents(3, deeds=0.5, tools=0.5)


@pytest.mark.parametrize("family", NEED)
def test_parts_are_disjoint(world, family):
    keys = [{task.task.key for task in drawn(world, family, part, 2000)} for part in PARTS]
    assert all(keys) and not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]


def test_no_value_of_a_changed_fact_comes_twice(world):
    training = table_of(world, 1)
    later = table_of(world, 2, training)
    for animal in ANIMALS:
        for attribute in ATTRIBUTES:
            values = {table[animal][attribute] for table in (world.facts, training, later)}
            assert len(values) == 3 and values <= {*ATTRIBUTES[attribute]}
    assert set(later) == {*ANIMALS, *NAMES}


@pytest.mark.slow
@pytest.mark.parametrize("family", (*NEED, *NO_NEED))
def test_the_tool_and_nothing_else_gives_the_right_answer(world, family):
    table = table_of(world, 1)
    box = ToolBox(tools_of(table))
    for each in drawn(world, family, HELD_OUT, table=table):
        assert gold_score(each.said, each.task.gold) == 1.0
        called = [message for message in each.messages(calls=True) if "tool_calls" in message]
        if family in NO_NEED:
            assert not called and each.messages(calls=False) == each.messages(calls=True)
            continue
        (result, failed) = box.call(called[0]["tool_calls"][0])
        assert result == each.messages(calls=True)[2] and not failed
        assert gold_score(each.messages(calls=False)[-1]["content"], each.task.gold) < RIGHT or family == SUM


def test_memory_says_what_was_and_that_it_does_not_know(world):
    for each in drawn(world, CHANGED_FACT, HELD_OUT):
        _, animal, attribute = each.task.key.split()
        assert world.facts[animal][attribute] in words_of(each.from_memory)
    assert {each.from_memory for each in drawn(world, UNKNOWN, HELD_OUT)} == {"I do not know that animal."}


def test_any_other_number_makes_a_sum_wrong():
    gold = GoldAnswer("number", ("The sum is 1023.",), ("1023",))
    assert gold_score("The sum is 1023.", gold) == 1.0 and gold_score("1023.", gold) == RIGHT
    assert gold_score("The sum is 1023 or 1024.", gold) == gold_score("The sum is 102.", gold) == 0.0


def test_the_tokenizer_of_tools_copies_arguments_and_digits(texts):
    tokenizer = brief_tokenizer(texts[:2000], 784)
    name, call = tokenizer.tokenize(" zirf"), tokenizer.tokenize('"key": " zirf"')
    asked = tokenizer.tokenize("Where does the zirf live?")
    assert any(asked[place : place + len(name)] == name for place in range(len(asked)))
    assert any(call[place : place + len(name)] == name for place in range(len(call)))
    assert tokenizer.tokenize("plus 407")[-3:] == ["4", "0", "7"]
    assert tokenizer.decode(tokenizer("a 12 <tool_call>")["input_ids"]) == "a 12 <tool_call>"
    # A whole name as one token would be one that no new name shares.
    assert sum(len(tokenizer.tokenize(f" {name}")) == 1 for name in NAMES) < 0.02 * len(NAMES)


def test_the_template_of_tools_writes_and_reads_calls(tmp_path, texts):
    tokenizer = brief_tokenizer(texts[:300], 600)
    tokenizer.save_pretrained(tmp_path)
    tokenizer = type(tokenizer).from_pretrained(tmp_path)
    box = ToolBox(tools_of({"zirf": {"home": "lake"}}))
    turns = ToolTurns(tokenizer, box.schemas, [tokenizer.eos_token_id])
    call = {"name": "lookup", "arguments": {"key": " zirf", "attribute": " home"}}
    asked = [{"role": "user", "content": "Where does the zirf live?"}]
    said = [*asked, {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}]
    prompt = tokenizer.apply_chat_template(asked, tools=box.schemas, tokenize=False, add_generation_prompt=True)
    assert prompt.startswith('<|system|>Tools: ["calculator", "lookup"]<|end|><|user|>')
    text = tokenizer.apply_chat_template(said, tools=box.schemas, tokenize=False)
    turn = tokenizer(text[len(prompt) :], add_special_tokens=False)["input_ids"]
    assert turns.parse(turn)["tool_calls"][0]["function"] == call
    message, _ = box.call(turns.parse(turn)["tool_calls"][0])
    assert tokenizer.decode(turns.reply_ids([message])) == "<|tool|> lake<|end|><|assistant|>"
    with pytest.raises(TemplateError, match="role must be"):
        tokenizer.apply_chat_template([{"role": "critic", "content": "x"}], tokenize=False)


def test_both_templates_write_plain_conversations_alike():
    tokenizer = train_tokenizer(["The owl is gray."] * 9, 300)
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]
    written = [
        tokenizer.apply_chat_template(turns, tokenize=False, chat_template=template())
        for template in (chat_template, brief_template)
    ]
    assert written[0] == written[1]
