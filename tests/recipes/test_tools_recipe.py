"""Learning to use tools in miniature: from nothing to its report, repeated, continued, with your own model, refused.

What the method achieves on the embedded world is test_tools_world.py's.
"""

import hashlib
import json
import random
import shutil
from functools import partial
from pathlib import Path

import pytest
import tools
import torch
import yaml
from killed import of_stages
from tool_tokenizer import make
from transformers import AutoModelForCausalLM, AutoTokenizer

import hfllm
from hfllm.data.world.tasks import HELD_OUT, SUM, draw_tool_task
from hfllm.data.world.world import World
from hfllm.errors import InputError
from hfllm.rewards.functions import GOLD_COLUMNS, GOLD_REWARDS
from hfllm.runs import schedule
from hfllm.runs.lock import release_all
from hfllm.stages.rlhf.build import load_tool
from hfllm.stages.tools import build as tools_build
from hfllm.stages.tools.build import PROMISES
from hfllm.stages.tools.flags import course_of

TUNED = {"max_steps": 3, "per_device_train_batch_size": 8, "save_strategy": "no"}
CONFIGS = {
    "pretrain": {
        **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 256},
        **{"vocab_size": 600, "num_documents": 300, "world_tools": 0.3, "max_steps": 4, "sample_steps": 0},
        **{"per_device_train_batch_size": 16, "save_strategy": "no", "learning_rate": 0.003},
    },
    "sft": TUNED,
    "rlhf": {
        **{"max_steps": 4, "per_device_train_batch_size": 8, "num_mini_batches": 2, "num_ppo_epochs": 1},
        **{"learning_rate": 0.0003, "save_strategy": "no", "response_length": 16, "num_eval_prompts": 8},
    },
}
SIZES = {"num_demonstrations": 60, "num_prompts": 40, "num_eval_prompts": 2}
PPO = {"num_mini_batches": 1, "response_length": 24, "per_device_train_batch_size": 4, "num_eval_prompts": 2}
OWN = ["--model_name_or_path", "m", "--dataset_name", "x.jsonl", "--tools", "calculator", "--reward_funcs", "y.py:f"]
SUMS = [draw_tool_task(World(0), random.Random(number), SUM, HELD_OUT) for number in range(20)]
RUNS = ("pretrain", "shown", "rl", "shuffled", "plain")


@pytest.fixture(scope="module", autouse=True)
def short():
    """Untrained models never end by themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tools_build, "RESPONSE_LENGTH", 6)
        yield


@pytest.fixture(autouse=True)
def nothing_held():
    yield
    release_all()


def run(*flags):
    schedule._job = None
    return tools.main(*tools.parse(list(map(str, flags))))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The flags of the tiny world."""
    folder = tmp_path_factory.mktemp("configs")
    words = [str(word) for name, value in SIZES.items() for word in (f"--{name}", value)]
    for name, values in CONFIGS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
        words += [f"--{name}_config", str(folder / f"{name}.yaml")]
    return words


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """The folder of a run that nothing interrupted, and a copy of it."""
    folder = tmp_path_factory.mktemp("world") / "out"
    run(*words, "--output_dir", folder)
    return folder, Path(shutil.copytree(folder, folder.with_name("copy")))


@pytest.fixture
def world(whole, words):
    """The folder, as the run left it, and what repeats the command there with more flags."""
    folder, copy = whole
    shutil.rmtree(folder)
    shutil.copytree(copy, folder)
    return folder, partial(run, *words, "--output_dir", folder)


def digests(folder):
    made = [path for pattern in ("*/*.safetensors", "data/*") for path in sorted(folder.glob(pattern))]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in made}


def trained(printed):
    """The runs that a printed course began, by their folders."""
    return [line.rpartition("/")[2] for line in printed.splitlines() if line.startswith("=== ")][1:]


def test_the_course_from_nothing_leaves_models_rows_and_a_report(whole):
    folder, _ = whole
    report, text = json.loads((folder / "report.json").read_text()), (folder / "report.md").read_text()
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {*RUNS, "data"}
    assert report["artifacts"].keys() >= {*RUNS} and (folder / "right.png").is_file()
    for name in RUNS:
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        assert tokenizer.response_template and len(tokenizer) == model.config.vocab_size
    metrics = report["metrics"]
    parts = ("_before", "_after", "_change", "_change_se", "_n")
    for family in ("unknown", "changed", "sum_2", "unread_value", "failing", "known"):
        assert {f"right_{family}{part}" for part in parts} <= metrics.keys()
        assert f"off_right_{family}_se" in metrics
    # Sampled are the kinds of questions whose rewards PPO has seen.
    assert {f"sampled_right_sum_2{part}" for part in parts} <= metrics.keys()
    assert "sampled_right_failing_after" not in metrics
    # Whatever is promised is measured, by the names of its figures.
    promised = {name for each in PROMISES for name in (each.metric, each.control) if isinstance(name, str)}
    assert promised <= metrics.keys()
    assert {"calls_needed_after", "calls_not_needed_after", "shuffled_right_needed_change"} <= metrics.keys()
    assert metrics["calls_needed_n"] == 10 and metrics["right_known_n"] == metrics["known_facts_lost_n"] == 180
    for title in ("Greedy answers", "Sampled answers", "Where no tool is needed", "Conversations"):
        assert title in text


@pytest.mark.slow
def test_what_is_there_is_reused_and_what_comes_after_a_change_is_not(world, capsys):
    folder, again = world
    before = digests(folder)
    again()
    assert trained(capsys.readouterr().out) == [] and digests(folder) == before
    (folder / "report.json").unlink()
    shutil.rmtree(folder / "rl")
    again()
    # Rows are not written again, and PPO ends with the same bits.
    assert digests(folder) == before and (folder / "rl" / "report.json").is_file()


@pytest.mark.slow
def test_controls_can_be_left_out(world):
    folder, again = world
    shutil.rmtree(folder / "shuffled")
    shutil.rmtree(folder / "plain")
    (folder / "report.json").unlink()
    metrics = again("--controls", "none")
    assert not (folder / "shuffled").exists() and not (folder / "plain").exists()
    assert "right_needed_change" in metrics
    assert not any(name.startswith(("shuffled", "plain", "known_facts_lost")) for name in metrics)


def test_rows_split_demonstrations_from_questions_of_ppo(whole):
    folder, _ = whole
    shown, asked = (
        [json.loads(line) for line in (folder / "data" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("shown", "rl")
    )
    need = [row["prompt"][0]["content"] for row in asked if row["family"] in ("unknown", "changed", "sum")]
    assert need and not {row["messages"][0]["content"] for row in shown} & {*need}
    calls = [any("tool_calls" in message for message in row["messages"]) for row in shown]
    assert any(calls) and not all(calls)
    assert all(row["tools"] for row, called in zip(shown, calls, strict=True) if called)
    plain = (folder / "data" / "plain.jsonl").read_text()
    assert "tool" not in plain and len(plain.splitlines()) < len(shown)


@pytest.fixture
def own(tmp_path):
    """The flags of a model of the user's own, with demonstrations, a tool and a reward."""
    tokenizer = make()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 160}
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    hfllm.HfllmForCausalLM(hfllm.HfllmConfig(vocab_size=len(tokenizer), **sizes, **ids)).save_pretrained(
        tmp_path / "m"
    )
    tokenizer.save_pretrained(tmp_path / "m")
    asked = [{"role": "user", "content": f"Say {number} times 2."} for number in range(12)]
    call = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": "3 * 2"}}}
    said = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "6"}]
    chats = [{"messages": [each, *said, {"role": "assistant", "content": "It is 6."}]} for each in asked]
    for name, rows in (("rows", [{"prompt": [each]} for each in asked]), ("chats", chats)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my.py").write_text(
        "def score(prompts, completions, **columns):\n    return [float(len(str(each))) for each in completions]\n"
    )
    (tmp_path / "table.json").write_text('{"owl": {"color": "gray"}}')
    for name in ("sft", "rlhf"):
        values = CONFIGS[name] | {"max_steps": 2, "per_device_train_batch_size": 2} | ({} if name == "sft" else PPO)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
    table, score = f"lookup:{tmp_path / 'table.json'}", f"{tmp_path / 'my.py'}:score"
    return [
        *("--model_name_or_path", tmp_path / "m", "--dataset_name", tmp_path / "rows.jsonl"),
        *("--tools", "calculator", table, "--reward_funcs", score),
        *("--sft_config", tmp_path / "sft.yaml", "--rlhf_config", tmp_path / "rlhf.yaml"),
        *("--output_dir", tmp_path / "out"),
    ]


@pytest.mark.slow
def test_your_own_model_learns_from_demonstrations_and_then_by_your_rewards(own, tmp_path):
    metrics = run(*own, "--demonstrations_dataset_name", tmp_path / "chats.jsonl")
    assert "proxy_reward_change" in metrics
    reports = {name: json.loads((tmp_path / "out" / name / "report.json").read_text()) for name in ("shown", "rl")}
    assert reports["shown"]["arguments"]["model_name_or_path"] == str(tmp_path / "m")
    assert reports["rl"]["arguments"]["model_name_or_path"] == str(tmp_path / "out" / "shown")
    assert reports["rl"]["arguments"]["tools"][0] == "calculator"
    assert not (tmp_path / "out" / "data").exists()


@pytest.mark.slow
def test_your_own_model_may_know_its_tools_already(own, tmp_path):
    run(*own)
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} == {"rl"}


@pytest.mark.parametrize(
    ("table", "message"),
    [("[1]", "expected a JSON object such as"), ("{", "cannot be read"), (None, "cannot be read")],
)
def test_a_table_that_is_none_is_refused(tmp_path, table, message):
    if table is not None:
        (tmp_path / "table.json").write_text(table)
    with pytest.raises(InputError, match=f"--tools lookup:.*table.json: {message}"):
        load_tool(f"lookup:{tmp_path / 'table.json'}")


def test_shuffled_gold_has_the_rewards_of_gold_in_another_order():
    asked = [task.task.prompt_row() for task in SUMS]
    said = [[{"role": "assistant", "content": task.said if number % 3 else "No."}] for number, task in enumerate(SUMS)]
    columns = {name: [row[name] for row in asked] for name in GOLD_COLUMNS}
    gold, shuffled = (GOLD_REWARDS[name]([], said, **columns) for name in ("gold", "shuffled_gold"))
    assert sorted(gold) == sorted(shuffled) and gold != shuffled
    assert shuffled == GOLD_REWARDS["shuffled_gold"]([], said, **columns)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_name_or_path", "m"], "--model_name_or_path needs --dataset_name"),
        (["--dataset_name", "x.jsonl"], "--dataset_name x.jsonl needs --model_name_or_path"),
        (["--model_name_or_path", "m", "--dataset_name", "x.jsonl"], "--model_name_or_path m needs --tools"),
        (
            ["--model_name_or_path", "m", "--dataset_name", "x.jsonl", "--tools", "calculator"],
            "--model_name_or_path m needs --reward_funcs",
        ),
        (["--tools", "calculator"], "--tools cannot be used here"),
        (["--reward_funcs", "gold"], "--reward_funcs cannot be used here"),
        (["--controls", "labels"], "--controls 'labels': expected some of shuffled, plain, or none"),
        (["--controls", "none", "plain"], "--controls none plain: expected some of shuffled, plain, or none alone"),
        ([*OWN, "--num_prompts", "7"], "--num_prompts cannot be used here: it is of the embedded world's"),
        ([*OWN, "--controls", "plain"], "--controls cannot be used here: it is of the embedded world's"),
        (["--num_prompts", "0"], "--num_prompts 0: expected at least 1"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(flags, message, tmp_path):
    with pytest.raises(InputError) as error:
        run(*flags, "--output_dir", tmp_path / "out")
    assert message in str(error.value) and not (tmp_path / "out").exists()


# ---- killed, see killed.py ----


KILLED = of_stages(lambda files: files.settings(SIZES, CONFIGS))


def test_text_prompts_of_ones_own_become_turns(tmp_path):
    own = ["--model_name_or_path", "NAME", "--dataset_name", "rows.jsonl", "--tools", "calculator"]
    parsed = tools.parse([*own, "--reward_funcs", "exact_match", "--output_dir", str(tmp_path)])
    (run,) = course_of(*parsed).runs.values()
    assert run[0].apply_chat_template and run[0].tools == ["calculator"]
