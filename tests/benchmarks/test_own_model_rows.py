"""The benchmarks on a model of one's own: what is asked is held out, and what is taught is right."""

import csv
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hfllm.environments.tools import calculator, lookup_in
from hfllm.errors import InputError
from hfllm.rewards.functions import exact_match

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def parts_beside(monkeypatch):
    """A script's folder, as where it runs."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def own_tools():
    return load("own_tools")


def rows_of(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_calls_that_are_taught_give_the_answers_that_are_said(own_tools, tmp_path):
    own_tools.write_rows(tmp_path, 1, 240, 120)
    tools = {"calculator": calculator, "lookup": lookup_in(json.loads((tmp_path / "table.json").read_text()))}
    calls, direct = rows_of(tmp_path, "calls"), rows_of(tmp_path, "direct")
    failed = 0
    for taught, control in zip(calls, direct, strict=True):
        asked, *turns, final = taught["messages"]
        assert control["messages"] == [asked, final] and control["tools"] == taught["tools"]
        for call, result in zip(turns[::2], turns[1::2], strict=True):
            (function,) = (each["function"] for each in call["tool_calls"])
            is_right = result["content"] == tools[function["name"]](**function["arguments"]) == final["content"]
            failed += not is_right
            assert is_right or (result["content"].startswith("{'error'") and result is not turns[-1])
    assert 0.05 * len(calls) < failed < 0.2 * len(calls)
    assert {len(each["messages"]) for each in calls} == {2, 4, 6}


def test_questions_have_other_wordings_people_and_numbers(own_tools, tmp_path):
    own_tools.write_rows(tmp_path, 2, 240, 120)
    taught = " ".join(row["messages"][0]["content"] for row in rows_of(tmp_path, "calls"))
    table = list(json.loads((tmp_path / "table.json").read_text()))
    unseen = table[own_tools.PEOPLE :]
    assert len(table) == len({*table}) and not any(name in taught for name in unseen)
    kinds = [own_tools.OF_NUMBERS, *own_tools.OF_PEOPLE.values(), own_tools.OF_WORDS]
    held_out = [words for kind in kinds for wording in kind[-2:] for words in wording.split("{}") if len(words) > 12]
    assert held_out and not any(words in taught for words in held_out)
    for row in rows_of(tmp_path, "questions"):
        assert row["prompt"] not in taught
        assert row["tool"] != "lookup" or any(name in row["prompt"] for name in unseen)
        # A right answer said alone is found right.
        said = [{"role": "assistant", "content": row["answer"]}]
        assert exact_match([row["prompt"]], [said], answer=[row["answer"]]) == [1.0]


def test_the_parts_of_xstest_share_no_prompt_and_the_critic_finds_harm_alone(tmp_path):
    own = load("own_constitution")
    file = tmp_path / "xstest.csv"
    rows = [
        {"prompt": f"{label} {number}", "type": "t", "label": label}
        for label in ("safe", "unsafe")
        for number in range(20)
    ]
    own.write_csv(file, rows)
    parts = own.dealt(str(file), 1)
    assert [len(part) for part in parts] == [16, 12, 12]
    assert sorted(row["prompt"] for part in parts for row in part) == sorted(row["prompt"] for row in rows)
    assert all(sum(row["label"] == "safe" for row in part) == len(part) / 2 for part in parts)
    taught = own.critiques(parts[0][:-3], [f"said {row['prompt']}" for row in parts[0][:-3]], 1)
    harmful, harmless, refused = [], [], []
    for row in taught:
        asked, answer, question, *_ = (message["content"] for message in row["prompt"])
        assert answer == f"said {asked}" and question == own.PRINCIPLE["critique"]
        assert [message["role"] for message in row["prompt"]][:3] == ["user", "assistant", "user"]
        (said,) = row["completion"]
        assert said["role"] == "assistant"
        if row["prompt"][-1]["content"] == own.PRINCIPLE["revision"]:
            assert asked.startswith("unsafe") and said["content"] in own.REFUSALS
            refused.append(asked)
        else:
            (harmful if said["content"].startswith("Yes") else harmless).append(asked)
    assert all(asked.startswith("unsafe") for asked in [*harmful, *refused]) and refused
    assert all(asked.startswith("safe") for asked in harmless) and len(harmful) == len(harmless)


def test_prompts_known_to_be_harmless_are_never_revised_and_held_out_ones_never_learned(tmp_path, monkeypatch):
    own, file = load("own_constitution"), tmp_path / "xstest.csv"
    labels = {f"{label} {number}": label for label in ("safe", "unsafe") for number in range(20)}
    own.write_csv(file, [{"prompt": prompt, "type": "t", "label": label} for prompt, label in labels.items()])
    (tmp_path / "helpful.json").write_text(json.dumps([{"instruction": f"Say {n}.", "input": ""} for n in range(9)]))
    monkeypatch.setattr(
        own, "load_speaking", lambda named: SimpleNamespace(answers=lambda asked, *_: [["It is."]] * 16)
    )
    args = SimpleNamespace(model_name_or_path="m", xstest_file=file, helpful=4)
    args.helpful_dataset_name = str(tmp_path / "helpful.json")
    own.write_rows(args, tmp_path / "seed", 1)
    helpful = [row["prompt"] for row in rows_of(tmp_path / "seed", "helpful")]
    with open(tmp_path / "seed" / "revised.csv") as revised, open(tmp_path / "seed" / "held_out.csv") as held_out:
        revised, asked = ({row["prompt"] for row in csv.DictReader(file)} for file in (revised, held_out))
    criticized = {row["prompt"][0]["content"] for row in rows_of(tmp_path / "seed", "critiques")}
    safe = {prompt for prompt in criticized if labels[prompt] == "safe"}
    assert sorted(each for each in helpful if each in labels) == sorted([*safe] * own.KEPT)
    assert len(helpful) == 4 + own.KEPT * len(safe)
    assert not revised & safe and criticized - safe <= revised
    assert revised | safe | asked == set(labels) and not asked & (revised | safe)


def test_word_problems_are_short_without_notes_and_held_out_ones_are_not_learned(tmp_path):
    own, file = load("own_reasoning"), tmp_path / "problems.jsonl"
    rows = [
        {"question": f"What is {n} and 2?", "answer": f"It is <<{n}+2={n + 2}>>{n + 2}.\n#### {n + 2}"}
        for n in range(30)
    ]
    long = {"question": "What is it?" * 30, "answer": "It is 1.\n#### 1"}
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, long]))
    problems = own.problems_of(str(file), 300)
    solution = "It is 5.\n#### 5"
    assert len(problems) == 30
    assert problems[3] == {"prompt": "What is 3 and 2?", "answer": solution, "completion": solution}
    counts = {"problems": 14, "answered": 6, "held_out": 10}
    own.write_rows(tmp_path, problems, 1, counts)
    parts = {name: rows_of(tmp_path, name) for name in counts}
    assert {name: len(part) for name, part in parts.items()} == counts
    drawn = [row["prompt"] for part in parts.values() for row in part]
    assert sorted(drawn) == sorted(row["prompt"] for row in problems)
    own.write_rows(tmp_path, problems, 2, counts)
    assert rows_of(tmp_path, "held_out") != parts["held_out"]


def test_expert_iteration_starts_from_the_tuned_model_and_its_control_only_shuffles(tmp_path, monkeypatch, capsys):
    own, runs = load("own_reasoning"), []

    def recipe(name):
        def main(words):
            runs.append((name, words))
            return {"right_before": 0.1, "right_after": 0.3 if "--shuffle_rewards" not in words else 0.2}

        return SimpleNamespace(parse=lambda words: [words], main=main)

    monkeypatch.setattr(sys.modules["own_parts"], "load_recipe", recipe)
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"question": f"{n}?", "answer": f"#### {n}"}) + "\n" for n in range(30)))
    words = ["--model_name_or_path", "m", "--problems", str(problems), "--output_dir", str(tmp_path), "--seeds", "7"]
    words += ["--rows", "9", "--answered", "8", "--questions", "5", "--expert_config", "ei.yaml"]
    own.main(words)
    (first, tuned), (_, iterated), (_, drawn) = runs
    folder = tmp_path / "seed_7"
    assert first == "sft" and tuned[tuned.index("--dataset_name") + 1] == str(folder / "problems.jsonl")
    assert iterated[iterated.index("--model_name_or_path") + 1] == tuned[tuned.index("--output_dir") + 1]
    assert iterated[iterated.index("--dataset_name") + 1] == str(folder / "answered.jsonl")
    assert set(drawn) - set(iterated) == {"--shuffle_rewards", str(folder / "drawn")}
    assert len(rows_of(folder, "answered")) == 8 and len(rows_of(folder, "held_out")) == 5
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition("|")[0].rpartition("| ")[2].strip() for line in lines[2:]] == ["0.1", "0.3", "0.2"]
    for refused in (["--use_peft"], ["--rlhf_config", "ppo.yaml"], ["--seed", "3"]):
        with pytest.raises(SystemExit):
            own.main([*words, *refused])
    with pytest.raises(InputError, match=r"rows of --rows 9, not 8: name another folder"):
        own.main([*words, "--rows", "8"])
    with pytest.raises(InputError, match=r"30 problems of at most --longest 300 characters; .* ask for 43"):
        own.main([*words, "--rows", "30", "--output_dir", str(tmp_path / "more")])
    problems.write_text(json.dumps({"question": "1?", "solution": "1"}) + "\n")
    with pytest.raises(InputError, match=r"problems.jsonl: no column 'answer'; its columns are question, solution"):
        own.main([*words[:4], "--output_dir", str(tmp_path / "other")])
