"""Thoughts, of the embedded world's model or your own: the recipe's flags, its checks, and its runs of others."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from hfllm.data.loading import FOREIGN_PROMPTS, RowArguments
from hfllm.data.sources import WORLD
from hfllm.flags import (
    NAMED,
    NOT_WORLDS,
    SEED,
    SHARE,
    UNNAMED,
    WORLD_GROUP,
    Clashes,
    at_least,
    flag,
    flags_for_all,
    given_words,
)
from hfllm.runs import pipeline
from hfllm.runs.flags import RemoteCodeArguments
from hfllm.runs.recipes import settings_file

if TYPE_CHECKING:
    from trl import ModelConfig

PRETRAIN, THOUGHTS, DIRECT, MIXED, RL, SHUFFLED = ("pretrain", "thoughts", "direct", "mixed", "rl", "shuffled")
# Controls, expected not to gain: fine-tuning on answers only, PPO on uninformative rewards.
CONTROLS = (DIRECT, SHUFFLED)
# The longest answer in tokens: a thought about a dial of twelve turns takes 53; growth beyond this has to be visible.
RESPONSE_LENGTH = 80
# The smallest number of rows with a remaining held-out one.
FEWEST_ROWS = 10


# A reason for flags of the user's own model to have no effect.
NOT_OWN = UNNAMED.because("the questions are the embedded world's")


@dataclass(frozen=True)
class ReasonArguments(RowArguments, RemoteCodeArguments):
    """Questions, and what is learned from them."""

    output_dir: str = flag("outputs/reason", "Where models, data and the report go.")
    seed: int = flag(42, "Of data and weights: the same seed, the same result.", takes=SEED)
    show_solutions: bool = flag(
        True,
        "Fine-tune your model on the rows' solutions before PPO: on what stands before #### in the column answer, or "
        "on a column thoughts.",
        never=NOT_OWN,
    )
    response_length: int = flag(256, "Longest answer of your model, in tokens.", takes=at_least(1), never=NOT_OWN)
    num_eval_prompts: int = flag(200, "Held-out questions of yours, at most.", takes=at_least(1), never=NOT_OWN)
    controls: list[str] | None = flag(
        None,
        "Arms that must not gain: direct (fine-tuning on answers alone), shuffled (PPO on the same "
        "rewards, dealt out by chance), or none; by default both.",
        some_of=CONTROLS,
    )
    sft_config: str | None = flag(None, "YAML flags of fine-tuning, with and without.")
    rlhf_config: str | None = flag(None, "YAML flags of the runs of PPO.")
    num_examples: int = flag(
        8000,
        "Questions that fine-tuning answers with thoughts, and the control without.",
        takes=at_least(FEWEST_ROWS),
        never=NOT_WORLDS,
        group=WORLD_GROUP,
    )
    num_mixed_examples: int = flag(
        1600,
        "Questions for the model that PPO starts from, some of them with thoughts.",
        takes=at_least(FEWEST_ROWS),
        never=NOT_WORLDS,
        group=WORLD_GROUP,
    )
    share_of_thoughts: float = flag(
        0.3, "Share of those that are answered with a thought.", takes=SHARE, never=NOT_WORLDS, group=WORLD_GROUP
    )
    num_prompts: int = flag(
        4096,
        "Questions for PPO, which fine-tuning has not seen.",
        takes=at_least(1),
        never=NOT_WORLDS,
        group=WORLD_GROUP,
    )
    num_problems: int = flag(
        100,
        "Held-out questions of each number of hops, and of turns unlike in training, at most; of other dials three "
        "times as many.",
        takes=at_least(1),
        never=NOT_WORLDS,
        group=WORLD_GROUP,
    )
    pretrain_config: str | None = flag(None, "YAML flags of the pretraining run.", never=NOT_WORLDS, group=WORLD_GROUP)
    mixed_config: str | None = flag(None, "YAML flags of fine-tuning before PPO.", never=NOT_WORLDS, group=WORLD_GROUP)

    takes_any_column: ClassVar[bool] = True
    clashes: ClassVar[Clashes] = {
        "--model_name_or_path needs --dataset_name: rows of prompt and answer": lambda flags: (
            NAMED.holds(flags) and flags.dataset_name == WORLD
        ),
        FOREIGN_PROMPTS: lambda flags: not flags.model_name_or_path and flags.dataset_name != WORLD,
        "--controls direct is a control of --show_solutions, which is off": lambda flags: (
            not flags.show_solutions and DIRECT in (flags.controls or ())
        ),
    }

    @property
    def arms(self) -> tuple[str, ...]:
        """The selected controls, in their order."""
        return tuple(arm for arm in CONTROLS if self.controls is None or arm in self.controls)


@dataclass(frozen=True)
class Course(pipeline.Course):
    """The runs of the recipe."""

    stage = "reason"
    minutes = {PRETRAIN: 2.5, THOUGHTS: 0.6, DIRECT: 0.5, MIXED: 0.3, RL: 0.5, SHUFFLED: 0.5}

    @property
    def models(self) -> list[str]:
        """The runs with answering models, in order."""
        return [name for name in self.runs if name != PRETRAIN]


def course_of(script_args: ReasonArguments, model_args: "ModelConfig") -> Course:
    """Return the runs selected by the flags."""
    named, output_dir = model_args.model_name_or_path, script_args.output_dir
    runs = _runs_of_own_model(script_args, model_args) if named else _runs_of_world(script_args)
    return Course(*pipeline.parsed_runs(runs, output_dir, script_args.seed), named)


def _runs_of_world(script_args: ReasonArguments) -> pipeline.Runs:
    output_dir, arms = script_args.output_dir, script_args.arms

    def config(name: str) -> list[str]:
        return ["--config", getattr(script_args, f"{name}_config") or str(settings_file(f"reason/{name}.yaml"))]

    def learning(run: str, start: str) -> list[str]:
        return ["--model_name_or_path", str(Path(output_dir, start)), *pipeline.rows_flag(output_dir, run)]

    yield PRETRAIN, "pretrain", [*config("pretrain"), "--world_seed", str(script_args.world_seed)]
    yield THOUGHTS, "sft", [*config("sft"), *learning(THOUGHTS, PRETRAIN)]
    if DIRECT in arms:
        yield DIRECT, "sft", [*config("sft"), *learning(DIRECT, PRETRAIN)]
    yield MIXED, "sft", [*config("mixed"), *learning(MIXED, THOUGHTS)]
    yield RL, "rlhf", [*config("rlhf"), *learning(RL, MIXED), "--reward_funcs", "right_answer"]
    if SHUFFLED in arms:
        yield SHUFFLED, "rlhf", [*config("rlhf"), *learning(SHUFFLED, MIXED), "--reward_funcs", "shuffled_answer"]


def _runs_of_own_model(script_args: ReasonArguments, model_args: "ModelConfig") -> pipeline.Runs:
    """Yield fine-tuning on solutions and on answers alone, both from the user's model, and PPO after the first."""
    output_dir, arms = script_args.output_dir, script_args.arms
    configs = {name: getattr(script_args, f"{name}_config") for name in ("sft", "rlhf")}
    configs = {name: ["--config", file] if file else [] for name, file in configs.items()}
    shared = given_words(script_args, only=["trust_remote_code"])
    words = start = [*given_words(model_args), *shared]
    if script_args.show_solutions:
        for run in (THOUGHTS, *((DIRECT,) if DIRECT in arms else ())):
            yield run, "sft", [*configs["sft"], *words, *pipeline.rows_flag(output_dir, run)]
        # The adapter trained on the solutions is trained further.
        start = ["--model_name_or_path", str(Path(output_dir, THOUGHTS)), *flags_for_all(model_args), *shared]
    for run, reward in ((RL, "exact_match"), (SHUFFLED, "shuffled_exact_match")):
        if run == RL or run in arms:
            words = ["--reward_funcs", reward, "--response_length", str(script_args.response_length)]
            yield run, "rlhf", [*configs["rlhf"], *start, *pipeline.rows_flag(output_dir, RL), *words]
