"""Expert iteration in miniature: what is kept and learned, a run that was stopped, the control, bad input."""

import json
import os
from collections import Counter

import expert_iteration
import pytest
import yaml
from killed import of_stages

from hfllm.errors import InputError
from hfllm.runs import schedule
from hfllm.runs.lock import release_all
from hfllm.stages import expert_iteration as expert_iteration_module
from hfllm.stages.expert_iteration import ExpertIterationArguments, Reward, RoundWriter, chosen_rows, rewards_of

REWARD = """
def even(prompts, completions, **columns):
    return [float(len(each[0]["content"]) % 2 == 0) for each in completions]

def never(prompts, completions, **columns):
    return [0.0 for each in completions]
"""


@pytest.fixture(autouse=True)
def nothing_held():
    yield
    release_all()
    schedule._job = None


@pytest.fixture
def flags(saved, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"Say {at}."}) + "\n" for at in range(12)))
    (tmp_path / "mine.py").write_text(REWARD)
    (tmp_path / "round.yaml").write_text("max_steps: 1\nsave_strategy: 'no'\nper_device_train_batch_size: 4\n")

    def make(reward="even", **more):
        values = {
            **{"model_name_or_path": saved, "dataset_name": tmp_path / "rows.jsonl", "output_dir": tmp_path / "out"},
            **{"reward_funcs": f"{tmp_path / 'mine.py'}:{reward}", "round_config": tmp_path / "round.yaml"},
            **{"num_rounds": 2, "num_samples": 3, "response_length": 48, "num_eval_prompts": 2, **more},
        }
        return [str(word) for name, value in values.items() if value is not None for word in (f"--{name}", value)]

    return make


def run(words):
    return expert_iteration.main(*expert_iteration.parse(words))


@pytest.fixture
def talkative(monkeypatch):
    """A model that says something else each time, thinks in every third response, and notes who was asked."""
    asked = []

    def sample(model, tokenizer, prompts, longest, num_return_sequences=1, only_ended=False, **settings):
        asked.append((model.config._name_or_path, only_ended, settings["seed"]))
        said, number = [], 0
        for prompt in prompts:
            said.append([])
            for at in range(num_return_sequences):
                number += 1
                said[-1].append(f"<think>{prompt[-1]['content']}</think>" * (at == 2) + "a" * (number % 4))
        return said

    monkeypatch.setattr(expert_iteration_module, "sample_responses", sample)
    return asked


def rows_of(tmp_path, number):
    lines = (tmp_path / "out" / "data" / f"round_{number}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("start_from", ["base", "last"])
def test_each_round_learns_what_was_right(flags, talkative, saved, tmp_path, start_from):
    metrics = run(flags(start_from=start_from))
    out = tmp_path / "out"
    for number in (1, 2):
        rows = rows_of(tmp_path, number)
        assert rows and all(
            len(row["completion"][0]["content"].partition("</think>")[2]) % 2 == 0
            or len(row["completion"][0]["content"]) % 2 == 0
            for row in rows
        )
        assert any("<think>Say" in row["completion"][0]["content"] for row in rows)
        report = json.loads((out / f"round_{number}" / "report.json").read_text())
        start = str(saved) if number == 1 or start_from == "base" else str(out / "round_1")
        assert report["arguments"]["model_name_or_path"] == start
        assert metrics[f"kept_rows_round_{number}"] == len(rows)
    # Who samples: the model of the beginning, then the last one; only what came to an end is learned.
    assert talkative[:2] == [(str(saved), True, 42), (str(out / "round_1"), True, 43)]
    assert metrics["right_n"] == 1 and metrics["right_before"] == metrics["right_after"]
    report = json.loads((out / "report.json").read_text())
    assert "right responses" in report["summary"]
    # As many are right as before: nothing was learned.
    assert report["warnings"] == ["change of right responses to held-out prompts: 0, not above no change (0)"]


def test_a_run_that_was_stopped_goes_on_with_its_round(flags, talkative, tmp_path, monkeypatch):
    from hfllm.stages.expert_iteration import Rounds

    tune = Rounds.run

    def stop(self, name):
        if name == "round_2":
            raise KeyboardInterrupt
        return tune(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Rounds, "run", stop)
        with pytest.raises(KeyboardInterrupt):
            run(flags())
    release_all()
    schedule._job = None
    files = [*(tmp_path / "out" / "data").iterdir(), tmp_path / "out" / "round_1" / "model.safetensors"]
    times = {path: path.stat().st_mtime_ns for path in files}
    del talkative[:]
    run(flags())
    assert {path: path.stat().st_mtime_ns for path in files} == times
    # Only the evaluation asked again.
    assert len(talkative) == 3 and not any(only_ended for _, only_ended, _ in talkative)
    assert (tmp_path / "out" / "round_2" / "model.safetensors").is_file()
    del talkative[:]
    run(flags())
    assert not talkative


@pytest.fixture
def write(flags, talkative, tmp_path, saved):
    """Writes the rows of a round, with other flags if asked."""
    arguments = expert_iteration.parse(flags())[0]
    rows = [{"prompt": [{"role": "user", "content": f"Say {at}."}]} for at in range(4)]

    def load(model):
        from types import SimpleNamespace

        from transformers import AutoModelForCausalLM, AutoTokenizer

        loaded = (AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model))
        return SimpleNamespace(model=loaded[0], tokenizer=loaded[1])

    def even(prompts, completions, **columns):
        return [float(len(each[0]["content"]) % 2 == 0) for each in completions]

    def write(**changes):
        from dataclasses import replace

        reward = Reward([even], arguments.reward_funcs, arguments.reward_timeout)
        loading = changes.pop("loading", "")
        writer = RoundWriter(rows, reward, replace(arguments, **changes).of_rounds, loading)
        return writer.write(tmp_path / "out" / "data" / "round_1.jsonl", str(saved), load, 7)

    return write


def test_rows_that_were_changed_are_made_again(write, talkative, tmp_path, saved, capsys):
    kept = write()
    assert write() == kept and len(talkative) == 1
    assert "made again" not in capsys.readouterr().out
    path = tmp_path / "out" / "data" / "round_1.jsonl"
    path.write_text(path.read_text() + "\n")
    assert write() == kept and len(talkative) == 1
    assert "round_1: made again: " in capsys.readouterr().out
    os.utime(saved / "model.safetensors", ns=(1, 1))
    write()
    assert len(talkative) == 1
    with (saved / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x01")
    write()
    assert len(talkative) == 2
    # Another choice among the same responses samples nothing.
    for changes in ({"min_reward": 0.5}, {"shuffle_rewards": True}, {"max_kept_per_prompt": 1}):
        write(**changes)
    assert len(talkative) == 2 and "round_1_responses: read from " in capsys.readouterr().out
    write(num_samples=2)
    write(loading="--dtype bfloat16")
    assert len(talkative) == 4


@pytest.mark.parametrize("damage", [lambda text: text.replace("Say", "Tell", 1), lambda text: "[]", lambda text: "{"])
def test_damaged_responses_are_sampled_again(write, talkative, tmp_path, damage):
    kept = write()
    responses = tmp_path / "out" / "data" / "round_1_responses.json"
    responses.write_text(damage(responses.read_text()))
    assert write(min_reward=0.5) == kept and len(talkative) == 2


def settings_of(**changes):
    return ExpertIterationArguments(**{"max_kept_per_prompt": 9, **changes}).of_rounds


RESPONSES = [["one", "two", "one"], ["three"], [], ["", "four"]]
ROWS = [{"prompt": [{"role": "user", "content": str(at)}]} for at in range(4)]


@pytest.mark.parametrize(("of_round", "expected"), [("max_steps: 1\n", "bfloat16"), ("dtype: float32\n", "float32")])
def test_a_round_may_train_in_another_type_than_it_samples_in(flags, tmp_path, of_round, expected):
    (tmp_path / "round.yaml").write_text(of_round)
    rounds = expert_iteration_module.rounds_of(*expert_iteration.parse(flags(dtype="bfloat16")))
    assert {parsed[-1].dtype for parsed in rounds.runs.values()} == {expected}


def test_what_is_kept_of_a_round():
    rewards = [1.0, 0.9, 1.0, 1.0, 1.0, 0.0]
    rows, kept = chosen_rows(ROWS, RESPONSES, rewards, settings_of(), 0)
    said = [(row["prompt"][0]["content"], row["completion"][0]["content"]) for row in rows]
    # Not what was said twice, nor what says nothing.
    assert said == [("0", "one"), ("1", "three")]
    assert (kept.rows, kept.responses, kept.right, kept.solved) == (2, 6, 4, 2) and abs(kept.reward - 4.9 / 6) < 1e-9
    rows, _ = chosen_rows(ROWS, RESPONSES, rewards, settings_of(min_reward=0.5, max_kept_per_prompt=1), 0)
    assert [row["completion"][0]["content"] for row in rows] == ["one", "three"]


@pytest.mark.parametrize("most", [1, 2, 9])
def test_the_control_learns_as_many_by_chance(most):
    responses = [[f"{row} {at}" for at in range(10)] for row in range(40)]
    # Right responses are of few prompts: the cap takes rows from them, and would take few from any.
    rewards = [float(row < 4 and at < 5) for row in range(40) for at in range(10)]
    right, of_right = chosen_rows(ROWS * 10, responses, rewards, settings_of(max_kept_per_prompt=most), 0)
    settings = settings_of(max_kept_per_prompt=most, shuffle_rewards=True)
    drawn, of_drawn = chosen_rows(ROWS * 10, responses, rewards, settings, 0)
    said = [row["completion"][0]["content"] for row in drawn]
    assert len(set(said)) == len(drawn) == len(right) == 4 * min(most, 5) and of_drawn == of_right
    assert sum(int(text.split()[0]) < 4 for text in said) <= len(said) / 2
    assert max(Counter(text.split()[0] for text in said).values()) <= most


def test_rewards_get_thoughts_apart_and_are_added(tokenizer):
    seen = []

    def outcome(prompts, completions, completion_ids, level, **columns):
        seen.extend([prompts, completions, level])
        return [1.0, 2.0]

    def steps(prompts, completions, completion_ids, **columns):
        return [[0.5] * len(ids) for ids in completion_ids]

    rows = [{**row, "level": at} for at, row in enumerate(ROWS[:2])]
    texts = ["<think>a</think>b", "c"]
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    total = rewards_of([outcome, steps], rows, texts, tokenizer)
    assert total == [1 + lengths[0] / 2, 2 + lengths[1] / 2]
    apart = {"role": "assistant", "content": "b", "reasoning_content": "a"}
    assert seen == [[row["prompt"] for row in rows], [[apart], [{"role": "assistant", "content": "c"}]], [0, 1]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_rounds": 0}, "--num_rounds 0: expected at least 1"),
        ({"temperature": 0}, "--temperature 0.0: expected a number above 0"),
        ({"model_name_or_path": None}, "--model_name_or_path and --dataset_name: give both, or neither"),
        ({"dataset_name": None}, "--model_name_or_path and --dataset_name: give both, or neither"),
        ({"reward_funcs": None}, "--reward_funcs is needed: exact_match"),
        ({"reward_funcs": "gold"}, "--reward_funcs gold: only the embedded world has it"),
        ({"reward_funcs": "exact_match"}, "the rows have no column 'answer', which it needs"),
        ({"sft_config": "x.yaml"}, "--sft_config cannot be used here: the model is named"),
        ({"start_from": "middle"}, "start_from"),
        ({"response_length": 256}, "leave no room for --response_length 256"),
    ],
)
def test_what_cannot_work_is_refused_first(flags, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        run(flags(**changes))
    assert not (tmp_path / "out").exists()


def test_nothing_right_is_an_error_that_says_so(flags, talkative, tmp_path):
    with pytest.raises(InputError, match="round_1: of 11 prompts 0 have a response with a reward of at least"):
        run(flags(reward="never"))
    assert not (tmp_path / "out" / "round_1").exists()


def test_inputs_may_not_lie_where_rounds_write(flags, tmp_path, saved):
    with pytest.raises(InputError, match=r"lies in .*, where the rounds write"):
        run(flags(output_dir=tmp_path))


@pytest.mark.slow
def test_from_nothing_on_the_embedded_world(tmp_path):
    configs = {
        "pretrain": {
            **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 256},
            **{"vocab_size": 600, "num_documents": 300, "max_steps": 4, "sample_steps": 0, "save_strategy": "no"},
        },
        "sft": {"num_examples": 60, "max_steps": 2, "max_length": 256, "save_strategy": "no"},
        "round": {"max_steps": 1, "max_length": 256, "save_strategy": "no"},
    }
    words = ["--output_dir", str(tmp_path / "out"), "--num_prompts", "24", "--num_eval_prompts", "8"]
    # Whatever it says, so that there is something to learn.
    words += ["--min_reward", "-1", "--response_length", "12", "--num_rounds", "1"]
    for name, values in configs.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
        words += [f"--{name}_config", str(tmp_path / f"{name}.yaml")]
    metrics = run(words)
    assert metrics["train_prompts"] == 24 and metrics["right_after"] == 1
    assert -1 <= metrics["reward_after"] <= 1 and metrics["reward_n"] == metrics["eval_prompts"] == 8
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"pretrain", "sft", "round_1", "data", "report.json", "report.md"} <= made


# ---- killed, see killed.py ----


def killed_flags(files):
    (files.folder / "mine.py").write_text(
        "def one(prompts, completions, **columns):\n    return [1.0] * len(completions)\n"
    )
    (files.folder / "round.yaml").write_text("max_steps: 1\nsave_strategy: 'no'\nper_device_train_batch_size: 4\n")
    rows = files.rows(*({"prompt": f"Say {at}."} for at in range(12)))
    sizes = ["--num_rounds", "2", "--num_samples", "8", "--response_length", "64", "--num_eval_prompts", "2"]
    settings = [
        "--reward_funcs",
        f"{files.folder / 'mine.py'}:one",
        "--round_config",
        str(files.folder / "round.yaml"),
    ]
    return [*files.model(), *rows, *sizes, *settings]


KILLED = of_stages(killed_flags)
