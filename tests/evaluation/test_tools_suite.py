"""The suite of questions with tools: calls where they are needed and nowhere else, and what comes of errors."""

import json
import re
import sys
from pathlib import Path

import evaluate
import pytest
import torch
from tool_tokenizer import make

from hfllm.environments import runner as runners
from hfllm.environments.tools import calculator, lookup_in
from hfllm.errors import InputError
from hfllm.evaluation.suites.base import Subject
from hfllm.evaluation.suites.tools import ERROR, FAILING, NEEDED, NEEDLESS, WITHOUT, Tools

SERVER = Path(__file__).parents[1] / "environments" / "mcp_server.py"
ROWS = [
    {"prompt": "What is 12 * 3?", "answer": "36", "tool": "calculator"},
    {"prompt": [{"role": "user", "content": "What is 2 + 5?"}], "answer": 7, "tool": "calculator"},
    {"prompt": "Who are you?", "answer": "a model", "tool": None},
]


def call(name, arguments):
    return f'<tool_call>{{"name": "{name}", "arguments": {json.dumps(arguments)}}}</tool_call><|end|>'


def sum_of(text):
    return re.findall(r"\d+ [+*] \d+", text)[-1]


def good(text):
    """Calls for sums, again after an error, and never else."""
    if "?" not in text or "Who" in text:
        return "a model<|end|>"
    results = text.split("<|tool|>")[1:]
    if not results or "error" in results[-1]:
        return call("calculator", {"expression": sum_of(text)})
    return results[-1].split("<|end|>")[0] + "<|end|>"


def gives_up(text):
    return "I can not.<|end|>" if "error" in text else good(text)


def always(text):
    return call("calculator", {"expression": "1 + 1"}) if "<|tool|>" not in text else good(text.replace("Who", ""))


def wrong_tool(text):
    return call("lookup", {"key": "owl", "attribute": "color"}) if "<|tool|>" not in text else "36<|end|>"


@pytest.fixture
def judge(make_model, tmp_path, monkeypatch):
    tokenizer = make()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.setattr(runners, "fast_option", lambda *arguments: {})
    model = make_model(vocab_size=len(tokenizer), max_position_embeddings=400)

    def judge(say, rows="rows.jsonl", batch_size=2, max_new_tokens=60):
        def generate(input_ids, attention_mask, max_new_tokens, eos_token_id, **settings):
            texts = [tokenizer.decode(row[own.bool()]) for row, own in zip(input_ids, attention_mask, strict=True)]
            new = [tokenizer(say(text))["input_ids"][:max_new_tokens] for text in texts]
            longest = max(map(len, new))
            filled = [row + [tokenizer.pad_token_id] * (longest - len(row)) for row in new]
            return torch.cat([input_ids, torch.tensor(filled)], dim=1)

        subject = Subject("m", model, tokenizer, uses_chat_template=True, batch_size=batch_size)
        monkeypatch.setattr(subject.model, "generate", generate)
        monkeypatch.setattr(subject, "iter_answers", lambda prompts, most: (say("")[:-7] for _ in prompts))
        suite = Tools(str(tmp_path / rows), [calculator, lookup_in({"owl": {"color": "gray"}})], None, max_new_tokens)
        items = suite.items()
        records = list(suite.judge(subject, items))
        assert sorted(record["item"] for record in records) == sorted(item.key for item in items)
        return records

    return judge


def means(records):
    result = {}
    for record in records:
        for name, value in record["scores"].items():
            result.setdefault((record["group"], name), []).append(value)
    return {key: sum(values) / len(values) for key, values in result.items()}


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_good_model_calls_where_it_must(judge, batch_size):
    records = judge(good, batch_size=batch_size)
    assert all((ERROR in each["said"]) == (each["group"] == FAILING) for each in records)
    assert means(records) == {
        (NEEDED, "right"): 1.0,
        (NEEDED, "called"): 1.0,
        (NEEDED, "failed_calls"): 0.0,
        (FAILING, "right"): 1.0,
        (FAILING, "called"): 1.0,
        (WITHOUT, "right"): 0.0,
        (NEEDLESS, "right"): 1.0,
        (NEEDLESS, "called_needlessly"): 0.0,
    }


@pytest.mark.parametrize(
    ("say", "expected"),
    [
        (gives_up, {(NEEDED, "right"): 1.0, (FAILING, "right"): 0.0, (FAILING, "called"): 1.0}),
        (always, {(NEEDLESS, "called_needlessly"): 1.0, (NEEDED, "called"): 1.0, (NEEDED, "right"): 0.0}),
        (wrong_tool, {(NEEDED, "called"): 0.0, (NEEDED, "right"): 0.5, (NEEDED, "failed_calls"): 0.0}),
        (lambda text: "36<|end|>", {(NEEDED, "called"): 0.0, (NEEDED, "right"): 0.5, (WITHOUT, "right"): 0.5}),
        (lambda text: call("calculator", {"wrong": 1}), {(NEEDED, "failed_calls"): 1.0, (NEEDED, "right"): 0.0}),
    ],
)
def test_each_fault_has_its_figure(judge, say, expected):
    found = means(judge(say))
    assert {key: found[key] for key in expected} == expected


def test_rows_without_the_column_say_only_whether_tools_are_called(judge, tmp_path):
    rows = [{key: row[key] for key in ("prompt", "answer")} for row in ROWS]
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = means(judge(good, "plain.jsonl"))
    assert found[("asked", "right")] == 1.0 and found[("asked", "called")] == pytest.approx(2 / 3)


def test_what_has_no_room_is_skipped(judge):
    assert all(record["skipped"] for record in judge(good, max_new_tokens=99) if record["group"] != WITHOUT)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Hi", "answer": "a", "tool": "fly"}, "line 1: its tool is 'fly'; there are: calculator, lookup"),
        ({"prompt": [], "answer": "a"}, "line 1: prompt is '[]'; expected a text, or messages up to the user's"),
        ({"prompt": [{"role": "assistant", "content": "a"}], "answer": "a"}, "expected a text, or messages up to the"),
        ({"prompt": "Hi"}, "line 1: no column 'answer'"),
    ],
)
def test_bad_rows_are_named(judge, tmp_path, row, message):
    (tmp_path / "bad.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError) as error:
        judge(good, "bad.jsonl")
    assert message in str(error.value)


@pytest.mark.slow
def test_the_recipe_judges_a_model_with_its_tools(make_model, tmp_path):
    tokenizer = make()
    make_model(vocab_size=len(tokenizer), max_position_embeddings=400).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "table.json").write_text(json.dumps({"owl": {"color": "gray"}}))
    words = ["--model_name_or_path", tmp_path / "m", "--dataset_name", tmp_path / "rows.jsonl"]
    words += ["--tools", "calculator", f"lookup:{tmp_path / 'table.json'}", "--output_dir", tmp_path / "out"]
    metrics = evaluate.main(*evaluate.parse([*map(str, words)]))
    assert {name for name in metrics if name.startswith("tools")} and (tmp_path / "out" / "report.md").is_file()
    again = evaluate.main(*evaluate.parse([*map(str, words)]))
    assert again == metrics


@pytest.mark.slow
def test_the_recipe_takes_tools_of_servers(make_model, tmp_path):
    tokenizer = make()
    make_model(vocab_size=len(tokenizer), max_position_embeddings=400).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    server = {"command": sys.executable, "args": [str(SERVER)]}
    (tmp_path / "servers.json").write_text(json.dumps({"mcpServers": {"test": server}}))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "What is 1 + 1?", "answer": "2", "tool": "add"}) + "\n")
    words = ["--model_name_or_path", tmp_path / "m", "--dataset_name", tmp_path / "rows.jsonl"]
    words += ["--mcp_servers", tmp_path / "servers.json", "--output_dir", tmp_path / "out"]
    metrics = evaluate.main(*evaluate.parse([*map(str, words)]))
    assert any(name.startswith("tools") for name in metrics)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suites", "tools"], "--suites tools needs --dataset_name"),
        (["--suites", "tools", "--dataset_name", "r.jsonl"], "--suites tools needs --tools or --mcp_servers"),
        (["--tools", "calculator"], "--tools cannot be used here: it is for --suites tools"),
        (["--dataset_name", "r.jsonl", "--tools", "calculator"], "--suites tools needs --model_name_or_path"),
    ],
)
def test_flags_without_effect_are_refused(words, message):
    with pytest.raises(InputError, match=message):
        evaluate.main(*evaluate.parse(words))
