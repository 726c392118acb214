"""Every recipe that keeps what it has done resumes when its process is killed and the same command is given again.

The second process has other addresses and another order of sets, as each new one has. `CASES` and `KEEP_NOTHING` name
every recipe there is, so that a new one has its place in one of them.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import kill_run
import pytest
import test_constitution_recipe
import test_extend
import test_ground_recipe
import test_reason_recipe
import test_tools_recipe
import test_vision_recipe
import yaml

from hfllm.runs.pipeline import STAGES

RECIPES = {path.stem for path in (kill_run.ROOT / "recipes").glob("*.py")}
SAVES = ["--save_strategy", "steps", "--save_steps", "1", "--resume_from_checkpoint", "auto", "--max_steps", "3"]
REWARD = "def one(prompts, completions, **columns):\n    return [1.0] * len(completions)\n"


@dataclass(frozen=True)
class Files:
    """What flags name: tiny settings by stage, a tiny model, and a folder for rows and settings of its own."""

    tiny: dict[str, str]
    base: Path
    folder: Path

    def rows(self, *rows):
        path = self.folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return ["--dataset_name", str(path)]

    def settings(self, module):
        """The flags of a recipe's own tiny test, which names YAML files of its runs and numbers."""
        words = [str(word) for name, value in module.SIZES.items() for word in (f"--{name}", value)]
        for name, values in module.CONFIGS.items():
            (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
            words += [f"--{name}_config", str(self.folder / f"{name}.yaml")]
        return words

    def model(self, flag="model_name_or_path"):
        return [f"--{flag}", str(self.base)]


@dataclass(frozen=True)
class Case:
    """How a recipe is killed, and what its next process says if it resumes.

    Args:
        flags: of a tiny run.
        says: a line of the next process.
        place: the process ends before a call of this function, see kill_run.py.
        number: of that call.
    """

    flags: Callable[[Files], list[str]]
    says: str = "resuming from checkpoint-"
    place: str = "hfllm.trainers.callbacks:write_checksums"
    number: int = 2


def of_stages(flags):
    """A recipe of several stages, killed in the second: the first has finished."""
    return Case(flags, "already done in", "hfllm.runs.stage:Stage.announce", 3)


def trained(name, *more):
    return Case(lambda files: ["--config", files.tiny[name], *files.model(), *SAVES, *more])


def distilled(files):
    chain = [word for name in ("pretrain", "sft", "reward", "rlhf") for word in (f"--{name}_config", "")]
    teacher = files.model("teacher_model_name_or_path")
    return ["--config", files.tiny["distill"], *chain, *teacher, "--answers", "data", *SAVES]


def classified(files):
    rows = files.rows(*({"text": f"the {word} is {kind}", "label": kind} for word in "abcdef" for kind in ("x", "y")))
    return [*files.model(), *rows, "--task", "text-classification", "--per_device_train_batch_size", "4", *SAVES]


def extended(files):
    rows = files.rows({"text": "The fox lives in the forest and eats fish. The owl is grey. " * 400})
    sizes = ["--factor", "2", "--original_max_position_embeddings", "64", "--per_device_train_batch_size", "2"]
    return [*files.model(), *rows, *sizes, *test_extend.QUICK, *SAVES]


def federated(files):
    names = []
    for name in ("shop", "school"):
        turns = [{"role": "user", "content": f"Say {name}."}, {"role": "assistant", "content": name}]
        (files.folder / f"{name}.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 3)
        names.append(str(files.folder / f"{name}.jsonl"))
    sizes = ["--rounds", "3", "--local_steps", "1", "--per_device_train_batch_size", "2", "--controls", "none"]
    return ["--organisation_files", *names, *files.model(), "--average", "full", "--max_length", "64", *sizes]


def iterated(files):
    (files.folder / "mine.py").write_text(REWARD)
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


CASES = {
    "pretrain": Case(lambda files: ["--config", files.tiny["pretrain"], *SAVES]),
    "sft": trained("sft"),
    "reward": trained("reward", "--on_policy_fraction", "0"),
    "rlhf": trained("rlhf", "--reward_funcs", "gold"),
    "distill": Case(distilled),
    "classify": Case(classified),
    "extend": Case(extended),
    "vision": Case(lambda files: [*test_vision_recipe.DRAWN, *SAVES]),
    "federated": Case(federated, "round 3/3", "hfllm.federation.rounds:save_state", 3),
    "expert_iteration": of_stages(iterated),
    "constitution": of_stages(lambda files: files.settings(test_constitution_recipe)),
    "ground": of_stages(lambda files: files.settings(test_ground_recipe)),
    "reason": of_stages(lambda files: files.settings(test_reason_recipe)),
    "tools": of_stages(lambda files: files.settings(test_tools_recipe)),
}
# They keep nothing of a run that did not finish, or their own tests kill them.
KEEP_NOTHING = {
    **dict.fromkeys(
        ("compare", "convert", "merge", "plan", "push", "quantize", "speculative", "tokenizer"), "nothing is kept"
    ),
    "curate": "test_curate.py",
    "evaluate": "test_evaluate_recipe.py",
    "scaling_laws": "test_scaling_laws.py",
}


def test_every_recipe_has_its_place():
    assert CASES.keys() | KEEP_NOTHING.keys() == RECIPES and not CASES.keys() & KEEP_NOTHING.keys()
    for name, why in KEEP_NOTHING.items():
        groups = import_module(name).parse([])
        assert not any(hasattr(group, "resume_from_checkpoint") for group in groups), name
        has_stages = any(entry.recipe == name and entry.runs_own_chain for entry in STAGES.values())
        assert not has_stages or why != "nothing is kept", name


def start(name, place, number, seed, flags):
    """Run a recipe in a new process of Python."""
    command = [sys.executable, kill_run.__file__, place, str(number), name, *flags]
    environment = {**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": str(kill_run.ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=kill_run.ROOT)


@pytest.mark.slow
@pytest.mark.turn(5)
@pytest.mark.parametrize("name", list(CASES))
def test_what_was_killed_resumes_in_a_fresh_process(tiny, base, tmp_path, name):
    case = CASES[name]
    flags = [*case.flags(Files(tiny, base, tmp_path)), "--output_dir", str(tmp_path / "out")]
    killed = start(name, case.place, case.number, 1, flags)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    # What a run reads is known by what it holds.
    for path in tmp_path.glob("*.*"):
        os.utime(path, ns=(1, 1))
    again = start(name, "none", 0, 2, flags)
    assert again.returncode == 0, again.stderr[-2000:]
    assert case.says in again.stdout and "round 1/3" not in again.stdout
    assert (tmp_path / "out" / "report.json").is_file()
