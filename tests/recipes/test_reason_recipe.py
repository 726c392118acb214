"""The recipe on thoughts in miniature: from nothing to its report, resumed, and refused.

What thoughts gain on the embedded world is test_reason_world.py's.
"""

import hashlib
import json
from functools import partial

import pytest
import reason
import yaml
from killed import of_stages
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfllm.data.thoughts import CLOSE, OPEN
from hfllm.errors import InputError
from hfllm.runs import schedule
from hfllm.runs.lock import LOCK_FILE, release_all
from hfllm.stages.reason.build import PROMISES

TUNED = {"max_steps": 3, "per_device_train_batch_size": 8, "max_length": 256, "save_strategy": "no"}
CONFIGS = {
    "pretrain": {
        **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 256},
        **{"vocab_size": 500, "num_documents": 320, "world_reasoning": 0.5, "max_steps": 4, "sample_steps": 0},
        **{"per_device_train_batch_size": 16, "save_strategy": "no", "learning_rate": 0.003},
    },
    "sft": TUNED,
    "mixed": TUNED,
    "rlhf": {
        **{"max_steps": 4, "per_device_train_batch_size": 8, "num_mini_batches": 2, "num_ppo_epochs": 1},
        **{"learning_rate": 0.0003, "response_length": 8, "num_eval_prompts": 8, "save_strategy": "no"},
        **{"logging_steps": 2},
    },
}
SIZES = {"num_examples": 60, "num_mixed_examples": 40, "num_prompts": 40, "num_problems": 3}
RUNS = ("pretrain", "thoughts", "direct", "mixed", "rl", "shuffled")


@pytest.fixture(autouse=True)
def nothing_held(monkeypatch):
    monkeypatch.setattr("hfllm.stages.reason.build.RESPONSE_LENGTH", 8)
    yield
    release_all()


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The flags of a tiny run."""
    folder = tmp_path_factory.mktemp("configs")
    for name, values in CONFIGS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    configs = [word for name in CONFIGS for word in (f"--{name}_config", str(folder / f"{name}.yaml"))]
    return [*configs, *(str(word) for name, value in SIZES.items() for word in (f"--{name}", value))]


def run(*flags):
    schedule._job = None
    return reason.main(*reason.parse(list(map(str, flags))))


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """The folder of a run that nothing interrupted, and what repeats the command there with more flags."""
    folder = tmp_path_factory.mktemp("reason") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hfllm.stages.reason.build.RESPONSE_LENGTH", 8)
        run(*words, "--output_dir", folder)
    return folder, partial(run, *words, "--output_dir", folder)


def digests(folder):
    made = [*sorted(folder.glob("*/*.safetensors")), *sorted(folder.glob("data/*.jsonl"))]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in made}


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def rows_of(folder, name):
    return [json.loads(line) for line in (folder / "data" / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_course_from_nothing_leaves_models_rows_and_a_report(whole):
    folder, _ = whole
    report, text = report_of(folder), (folder / "report.md").read_text()
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {*RUNS, "data"}
    assert not list(folder.rglob(LOCK_FILE)) and not list(folder.rglob("*.tmp*"))
    for name in RUNS:
        model, tokenizer = (kind.from_pretrained(folder / name) for kind in (AutoModelForCausalLM, AutoTokenizer))
        assert len(tokenizer) <= model.config.vocab_size and report["artifacts"][name] == name
        for mark in (OPEN, CLOSE):
            (number,) = tokenizer(mark, add_special_tokens=False)["input_ids"]
            assert tokenizer.decode([number], skip_special_tokens=True) == mark
    assert report["metrics"].keys() >= {
        *("thoughts_hops_right", "thoughts_hops_right_se", "thoughts_hops_right_n", "direct_dial_right"),
        *("right_before", "right_after", "right_change", "right_change_se", "thinks_change", "tokens_change"),
        *("shuffled_right_change", "shuffled_thinks_change", "shuffled_tokens_change"),
    }
    assert report["metrics"]["right_n"] == 15 and report["metrics"]["thoughts_dial_right_n"] == 5
    assert report["metrics"]["thoughts_dial_12_right_n"] == report["metrics"]["direct_dial_4_right_n"] == 3
    # Whatever is promised is measured, by the names of its figures.
    promised = {name for each in PROMISES for name in (each.metric, each.control) if isinstance(name, str)}
    assert promised <= report["metrics"].keys()
    # A few steps teach nothing, and the report says so.
    assert any(line.startswith("dials of 5 to 9 turns answered right with thoughts: ") for line in report["warnings"])
    for title in ("## Right answers, greedy", "## PPO on dials, sampled answers", "PPO, rewards by chance"):
        assert title in text
    for name in ("ppo_rewards", "ppo_lengths"):
        assert (folder / report["artifacts"][name]).read_bytes().startswith(b"\x89PNG")
    # Each arm has learned something of its own.
    assert len({value for name, value in digests(folder).items() if name.endswith("model.safetensors")}) == len(RUNS)


@pytest.mark.slow
def test_arms_learn_the_same_questions_and_ppo_has_others(whole):
    folder, _ = whole
    turns = {name: [row["messages"] for row in rows_of(folder, name)] for name in ("thoughts", "direct", "mixed")}
    asked, said = ({name: [each[turn]["content"] for each in rows] for name, rows in turns.items()} for turn in (0, 1))
    assert asked["thoughts"] == asked["direct"] and len(asked["direct"]) == 60
    assert all(OPEN in text for text in said["thoughts"]) and not any(OPEN in text for text in said["direct"])
    for thought, direct in zip(said["thoughts"], said["direct"], strict=True):
        assert thought.partition(f"{CLOSE} ")[2] == direct
    assert sum(OPEN in text for text in said["mixed"]) == 16 and len(said["mixed"]) == 40
    prompts = rows_of(folder, "rl")
    assert prompts == rows_of(folder, "shuffled") and len(prompts) == 40
    learned = {*asked["thoughts"], *asked["mixed"]}
    assert not learned & {row["prompt"][0]["content"] for row in prompts}


@pytest.mark.slow
def test_the_same_command_reuses_and_another_flag_is_refused_by_its_name(whole, capsys):
    folder, again = whole
    before = digests(folder)
    assert again() == report_of(folder)["metrics"]
    assert f"reason: already done in {folder} (remove that folder to redo it)" in capsys.readouterr().out
    for flags, difference in (
        (("--seed", 7), "seed=42, this one has seed=7"),
        (("--controls", "none"), r"controls=None, this one has controls=\['none'\]"),
        (("--share_of_thoughts", 0.5), "share_of_thoughts=0.4, this one has share_of_thoughts=0.5"),
    ):
        with pytest.raises(InputError, match=f"holds a finished run with {difference}") as error:
            again(*flags)
        assert "\n" not in str(error.value)
    assert digests(folder) == before


@pytest.mark.slow
def test_a_run_that_was_stopped_makes_what_is_missing_with_the_same_bits(whole, capsys):
    folder, again = whole
    before, metrics = digests(folder), report_of(folder)["metrics"]
    # As if it had been killed while PPO ran.
    for path in (folder / "report.json", *(folder / "rl").glob("report.*"), *(folder / "rl").glob("*.safetensors")):
        path.unlink()
    capsys.readouterr()
    assert again() == metrics
    printed = capsys.readouterr().out
    assert f"sft: already done in {folder / 'mixed'}" in printed and f"=== rlhf -> {folder / 'rl'}" in printed
    assert digests(folder) == before


def test_arms_that_are_not_asked_for_do_not_run(words, tmp_path):
    from hfllm.stages.reason.flags import course_of

    for controls, expected in (
        (["none"], ("pretrain", "thoughts", "mixed", "rl")),
        (["direct"], ("pretrain", "thoughts", "direct", "mixed", "rl")),
        (["shuffled"], ("pretrain", "thoughts", "mixed", "rl", "shuffled")),
    ):
        parsed = reason.parse([*words, "--controls", *controls, "--output_dir", str(tmp_path)])
        assert tuple(course_of(*parsed).runs) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num_examples", 3), "--num_examples 3: expected at least 10"),
        (("--num_problems", 0), "--num_problems 0: expected at least 1"),
        (("--share_of_thoughts", 1.5), "--share_of_thoughts 1.5: expected a share in [0, 1]"),
        (("--controls", "dirct"), "--controls 'dirct': expected some of direct, shuffled, or none"),
        (("--controls", "none", "direct"), "--controls none direct: expected some of direct, shuffled, or none alone"),
        (("--num_exampels", 3), "num_exampels"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_made(words, tmp_path, flags, message):
    folder = tmp_path / "out"
    with pytest.raises(InputError) as error:
        run(*words, *flags, "--output_dir", folder)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not folder.exists()


def test_a_config_of_a_later_run_is_refused_before_the_first(words, tmp_path):
    (tmp_path / "rlhf.yaml").write_text("reward_weights: [1.0, 2.0]\n")
    with pytest.raises(InputError, match="--reward_weights has 2 values for 1 reward"):
        run(*words, "--rlhf_config", tmp_path / "rlhf.yaml", "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- killed, see killed.py ----


KILLED = of_stages(lambda files: files.settings(SIZES, CONFIGS))
