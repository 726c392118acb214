"""benchmarks/tools.py in miniature: demonstrations, both sides, and the page."""

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from hfllm.environments.tools import ToolBox

FILE = Path(__file__).parents[2] / "benchmarks" / "tools.py"
TINY = ["--sft_steps", "3", "--rollouts", "2", "--episodes", "8", "--hidden_size", "16", "--num_hidden_layers", "1"]


@pytest.fixture
def benchmark():
    # A recipe has this name, too.
    spec = importlib.util.spec_from_file_location("tools_benchmark", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(line):
    return json.loads(line.removeprefix("RESULT "))


@pytest.mark.slow
def test_both_sides_train_on_the_same_episodes(benchmark, tmp_path, capsys):
    given = [*TINY, "--seed", "1", "--model", str(tmp_path / "m")]
    benchmark.main([*given, "--side", "model"])
    assert (tmp_path / "m" / "model.safetensors").is_file()
    for side in benchmark.SIDES:
        capsys.readouterr()
        benchmark.main([*given, "--side", side])
        result = read(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("RESULT")))
        assert result["episodes"] == 16 and len(result["rollouts"]) == 2
        seconds = [each["cpu"] for each in result["rollouts"]]
        assert 0 < seconds[0] < seconds[1] < result["cpu"]
        assert all(0 <= each[name] <= 1 for each in result["rollouts"] for name in ("right", "calls"))


def test_tools_that_wait_answer_as_the_others_and_have_a_table(benchmark):
    row = benchmark.rows_of(1, 1)[0]
    plain, waited = (benchmark.tool_of(1, kind, 0.01) for kind in ("plain", "async"))
    assert plain(row["key"], row["attribute"]) == row["value"] and plain.__name__ == "lookup"
    assert benchmark.asyncio.run(waited(row["key"], row["attribute"])) == row["value"]
    assert ToolBox([waited]).schemas == ToolBox([benchmark.tool_of(1)]).schemas
    sides = {"ppo": {"wall": 5.0, "cpu": 3.0}, "grpo": {"wall": 130.0, "cpu": 9.0}}
    args = benchmark.argparse.Namespace(slow_seconds=1.0, episodes=128)
    lines = benchmark.slow_table({"plain": sides}, args)
    assert lines[-1] == "| `def`, which sleeps | 5.0, 3.0 | 130.0, 9.0 |" and "a tool of 1 s" in lines[3]


def test_a_demonstrator_looks_up_half_of_the_time_and_is_right_then(benchmark):
    rng, tool = random.Random(0), benchmark.tool_of(1)
    rows = benchmark.rows_of(1, 400)
    said = [benchmark.turns_of(row, rng) for row in rows]
    calls = [turns for turns in said if len(turns) == 3]
    assert 150 < len(calls) < 250
    for row, turns in zip(rows, said, strict=True):
        if len(turns) == 3:
            arguments = turns[0]["tool_calls"][0]["function"]["arguments"]
            assert tool(**arguments) == turns[1]["content"] == row["value"]
    reward = benchmark.Reward()
    right = reward([], said, [row["value"] for row in rows])
    assert all(value == 1 for value, turns in zip(right, said, strict=True) if len(turns) == 3)
    prompts = benchmark.rows_of(1, 400, "prompts")
    assert prompts != rows and all(tool(row["key"], row["attribute"]) == row["value"] for row in prompts)
    # Guesses are right by chance.
    assert 0.02 < (sum(right) - len(calls)) / (len(rows) - len(calls)) < 0.25
    assert reward.rollouts[0]["calls"] == len(calls) / 400 and reward.rollouts[0]["right"] == sum(right) / 400


def test_demonstrations_teach_the_assistants_turns_and_the_calls_can_be_read(benchmark):
    args = benchmark.argparse.Namespace(seed=1)
    tokenizer = benchmark.build_tokenizer(1)
    ids, labels = next(benchmark.demonstrations(args, tokenizer))
    texts = [tokenizer.decode(row[row != -100]) for row in labels]
    called = [text for text in texts if "<tool_call>" in text]
    assert len(ids) == 32 and 0 < len(called) < 32
    for text in texts:
        assert text.endswith(".<|end|>") and "It is " in text and "What" not in text and "<|tool|>" not in text
        assert "Tools" not in text
        if text in called:
            call, answer = text.split("<|end|>")[:2]
            read = tokenizer.parse_response(tokenizer(f"{call}<|end|>")["input_ids"], prefix="<|assistant|>")
            assert read["tool_calls"][0]["function"]["name"] == "lookup" and answer.startswith("It is ")
    # What is asked is copied token by token.
    animal = tokenizer(" owl")["input_ids"]
    assert len(animal) == 1 and animal[0] in tokenizer('{"key": " owl"}')["input_ids"]


def test_the_page_compares_the_sides(benchmark, monkeypatch, tmp_path, capsys):
    asked = []

    def launch(args, side, seed, model, waiting=None, rollouts=2):
        asked.append((side, seed) if waiting is None else (side, seed, waiting, rollouts))
        scale = {"ppo": 1.0, "grpo": 4.0, "model": 0}[side]
        rollouts = [{"cpu": scale * place, "right": 0.5 * place, "calls": 0.25 * place} for place in (1, 2)]
        return {"cpu": 3 * scale, "wall": 5.0, "rollouts": rollouts, "episodes": 256}

    monkeypatch.setattr(benchmark, "launch", launch)
    benchmark.main(["--seeds", "1", "2", "--rollouts", "2", "--output", str(tmp_path / "tools.md")])
    assert asked[:6] == [(side, seed) for seed in (1, 2) for side in ("model", "ppo", "grpo")]
    assert asked[6:] == [(side, 2, kind, 1) for kind in ("async", "plain") for side in ("ppo", "grpo")]
    text = (tmp_path / "tools.md").read_text()
    assert text.partition("<!-- tables -->\n")[2].partition("\n<!-- end")[0] in capsys.readouterr().out
    assert "| 1 | hfllm, PPO | 3.0 | 0.25 | 0.50 | 1.00 | 0.25 | 0.50 | 2.0 |" in text
    assert "| 2 | TRL, GRPO | 12.0 | 1.00 |" in text
    assert "PPO 6 CPU-seconds, GRPO 24, a ratio of 0.25" in text
    assert "| 2 | 2.0 | 1.00 | 8.0 | 1.00 |" in text
    never = {"rollouts": [{"cpu": 1.0, "right": 0.5}]}
    assert benchmark.seconds_until(never, 0.9) is None


def test_the_text_around_the_tables_stays(benchmark, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "launch", lambda args, **options: options)
    monkeypatch.setattr(benchmark, "page", lambda runs, args, slow: f"| of {len(runs)} seeds |")
    page, begin, end = tmp_path / "tools.md", *benchmark.MARKS
    page.write_text(f"# Mine\n\nBefore.\n\n{begin}\n| old |\n{end}\n\nAfter.\n")
    for _ in range(2):
        benchmark.main(["--seeds", "1", "2", "--output", str(page)])
        assert page.read_text() == f"# Mine\n\nBefore.\n\n{begin}\n| of 2 seeds |\n{end}\n\nAfter.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["tools.md"]


@pytest.mark.parametrize("text", ["# Mine\n", "<!-- tables -->\n", "<!-- end of the tables --><!-- tables -->", ""])
def test_a_page_without_a_place_for_tables_is_not_touched(benchmark, monkeypatch, tmp_path, text):
    monkeypatch.setattr(benchmark, "launch", None)
    page = tmp_path / "tools.md"
    page.write_text(text)
    with pytest.raises(SystemExit, match=r"tools\.md: it has no lines <!-- tables --> and <!-- end of the tables -->"):
        benchmark.main(["--seeds", "1", "--output", str(page)])
    assert page.read_text() == text
    with pytest.raises(SystemExit, match="there is no folder"):
        benchmark.main(["--seeds", "1", "--output", str(tmp_path / "none" / "tools.md")])


def test_help_imports_nothing_heavy():
    code = f"""
import runpy, sys
sys.argv = ["tools.py", "--help"]
try:
    runpy.run_path({str(FILE)!r}, run_name="__main__")
except SystemExit:
    assert not {{"torch", "transformers", "trl", "datasets"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "--rollouts" in done.stdout, done.stderr
