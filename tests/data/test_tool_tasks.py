"""The world's questions that take a tool, and the texts that show how tools are called."""

import ast
import json
import random
import re
import string
from itertools import product

import pytest
from jinja2 import TemplateError
from tool_tokenizer import brief_tokenizer

from hfllm.data.tokenizer import CALL_MARKS, TOOL, TURN_END, brief_template, chat_template, train_tokenizer
from hfllm.data.world.rubric import RIGHT, GoldAnswer, gold_score, words_of
from hfllm.data.world.tasks import (
    CHANGED_FACT,
    HELD_OUT,
    NEED,
    NO_NEED,
    PARTS,
    SHOWN_PART,
    SUM,
    UNKNOWN,
    draw_tool_task,
    table_of,
)
from hfllm.data.world.tool_documents import TOOL_FAILED, WORDS, is_held_out_change, tools_line
from hfllm.data.world.vocabulary import (
    ANIMALS,
    ATTRIBUTES,
    NAME_PARTS,
    UNREAD,
    UNREAD_ANIMALS,
    is_held_out,
    made_up_word,
)
from hfllm.data.world.world import World
from hfllm.environments.tool_turns import ToolTurns
from hfllm.environments.tools import ToolBox
from hfllm.stages.tools.build import tools_of

CALL_BEGIN, CALL_END = CALL_MARKS
NAMES = {"".join(parts) for parts in product(*NAME_PARTS)}
ANY_CALL = re.compile(f"{re.escape(CALL_BEGIN)}(.*?){re.escape(CALL_END)}")
CALL = re.compile(
    f"{re.escape(CALL_BEGIN)}(.*?){re.escape(CALL_END + TURN_END + TOOL)} (.*?){re.escape(TURN_END)}"
    f"<.assistant.>(.*?){re.escape(TURN_END)}"
)


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
    assert 0.10 < share < 0.16  # 52 of a hundred, of a quarter


def exchanges(texts):
    """The tools of each text with calls, by name, its call, what the tool says, and the answer."""
    for text in texts:
        if CALL_BEGIN in text:
            names = {name: arguments.split(", ") for arguments, name in re.findall(r'\(([^)]*)\) "([^"]+)"', text)}
            ((call, result, answer),) = CALL.findall(text)
            yield names, json.loads(call), result, answer


@pytest.mark.slow
def test_texts_show_calls_that_the_tools_answer_as_they_say(texts):
    found, failed, names_of = [*exchanges(texts)], 0, set()
    assert len(found) > 300
    box = ToolBox(tools_of({}))
    for names, call, result, answer in found:
        # The tool is one that the prompt names, and the one that takes these arguments.
        assert names[call["name"]] == [*call["arguments"]] and len(names) == 2
        names_of |= names.keys()
        if result.startswith("{"):
            assert ast.literal_eval(result).keys() == {"error"} and answer == TOOL_FAILED
            failed += 1
        elif "expression" in call["arguments"]:
            asked = {"function": {"name": "calculator", "arguments": call["arguments"]}}
            assert box.call(asked) == ({"role": "tool", "name": "calculator", "content": result}, False)
            assert answer == f"The sum is {result}."
        else:
            assert result in words_of(answer) and call["arguments"]["key"].strip() in words_of(answer)
    assert 0.04 < failed / len(found) < 0.13 and len(names_of) > 300 and {"lookup", "calculator"} < names_of


def test_each_result_is_said_as_it_is(texts):
    marks = (re.escape(TOOL), re.escape(TURN_END), re.escape("<|assistant|>"))
    result = re.compile(r"{} (.+?){}{}(.+?){}".format(*marks, re.escape(TURN_END)))
    found = [result.findall(text) for text in texts]
    for read, said in (pair for pairs in found for pair in pairs):
        assert said == TOOL_FAILED if read.startswith("{") else read in words_of(said)
    # Texts of several results have no question.
    several = [(text, pairs) for text, pairs in zip(texts, found, strict=True) if len(pairs) > 1]
    assert len(several) > 60
    assert all(len(pairs) == 4 and CALL_BEGIN not in text for text, pairs in several)


def test_texts_hold_nothing_of_what_is_held_out(world, texts):
    said = {word for text in texts for word in re.findall(r"[a-z]+", text.lower())}
    names = said & NAMES
    assert len(names) > 150 and not any(is_held_out(f"unknown {name}") for name in names)
    assert not said & UNREAD
    made_up = {call["arguments"]["key"].strip() for _, call, _, _ in exchanges(texts) if "key" in call["arguments"]}
    assert len(made_up) > 150
    assert not any(is_held_out(f"word {word}") for word in made_up - NAMES - {*ANIMALS})
    for text in texts:
        for call in ANY_CALL.findall(text):
            arguments = json.loads(call)["arguments"]
            if arguments.get("key", "").strip() in ANIMALS:
                assert not is_held_out_change(arguments["key"].strip(), arguments["attribute"].strip())
                # What it says is of now, so that no text contradicts the facts.
                assert {"now", "today"} & set(words_of(text))
        for first, second in re.findall(r"(\d{2,}) plus (\d{2,})", text):
            assert not is_held_out(f"sum {first} plus {second}")
    small = {sentence for text in texts for sentence in re.findall(r"The sum (\d(?: plus \d)+) is \d+\.", text)}
    assert len(small) > 100 and not any(is_held_out(f"addition {each}") for each in small)


def test_every_letter_stands_in_made_up_words():
    rng = random.Random(0)
    words = [made_up_word(rng, held_out) for held_out in (False, True) for _ in range(2000)]
    assert {*"".join(words)} == {*string.ascii_lowercase} and not UNREAD & {*words}
    apart = [is_held_out(f"word {word}") or is_held_out(f"unknown {word}") for word in words]
    assert apart == [False] * 2000 + [True] * 2000
    # Hardly a word comes twice.
    assert len({*words[:2000]}) > 1700


def test_numbers_of_sums_have_two_to_four_digits(world):
    rng = random.Random(1)
    for digits in (2, 3, 4):
        tasks = [draw_tool_task(world, rng, SUM, HELD_OUT, digits=digits) for _ in range(50)]
        assert {len(number) for each in tasks for number in each.call[1]["expression"].split(" + ")} == {digits}
    sizes = {
        len(number) for each in drawn(world, SUM, SHOWN_PART) for number in each.call[1]["expression"].split(" + ")
    }
    assert sizes == {2, 3, 4}


def test_a_tool_with_another_name_that_fails_is_called_and_said_to_fail(world):
    (task, *_) = drawn(world, UNKNOWN, SHOWN_PART)
    said = task.messages(True, {"lookup": "zat", "calculator": "b"}, error="{'error': 'x'}")
    assert said[1]["tool_calls"][0]["function"]["name"] == said[2]["name"] == "zat"
    assert said[2]["content"] == "{'error': 'x'}" and said[3]["content"] == TOOL_FAILED
    assert task.messages(False, error="x")[-1]["content"] == "I do not know that animal."


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
    assert set(later) > {*ANIMALS, *NAMES, *UNREAD_ANIMALS}
    values = [value for row in table_of(world, 1, made_up=0.5).values() for value in row.values()]
    assert 0.4 < sum(value not in WORDS for value in values) / len(values) < 0.6


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
    assert prompt.startswith(tools_line({"calculator": "calculator", "lookup": "lookup"}) + "<|user|>")
    text = tokenizer.apply_chat_template(said, tools=box.schemas, tokenize=False)
    turn = tokenizer(text[len(prompt) :], add_special_tokens=False)["input_ids"]
    assert turns.parse(turn)["tool_calls"][0]["function"] == call
    message, _ = box.call(turns.parse(turn)["tool_calls"][0])
    assert tokenizer.decode(turns.reply_ids([message])) == "<|tool|> lake<|end|><|assistant|>"
    bare = [{"type": "function", "function": {"name": "clock"}}, *box.schemas[1:]]
    prompt = tokenizer.apply_chat_template(asked, tools=bare, tokenize=False)
    assert prompt.startswith('<|system|>Tools: () "clock", (key, attribute) "lookup"<|end|>')
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
