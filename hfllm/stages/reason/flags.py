"""Thoughts on the embedded world: the recipe's flags, its checks, and its runs of other recipes."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hfllm.flags import NOT_NEGATIVE, SEED, SHARE, at_least, flag
from hfllm.runs import pipeline
from hfllm.runs.recipes import settings_file

PRETRAIN, THOUGHTS, DIRECT, MIXED, RL, SHUFFLED = ("pretrain", "thoughts", "direct", "mixed", "rl", "shuffled")
# Controls, expected not to gain: fine-tuning on answers only, PPO on uninformative rewards.
CONTROLS = (DIRECT, SHUFFLED)
# The longest answer in tokens: a thought about a dial takes 34; growth beyond this has to be visible.
RESPONSE_LENGTH = 64
# The smallest number of rows with a remaining held-out one.
FEWEST_ROWS = 10


@dataclass(frozen=True)
class ReasonArguments:
    """How much of each is made, and by which settings."""

    output_dir: str = flag("outputs/reason", "Where models, data and the report go.")
    seed: int = flag(42, "Of data and weights: the same seed, the same result.", takes=SEED)
    world_seed: int = flag(0, "Seed of the embedded world's facts.", takes=NOT_NEGATIVE)
    num_examples: int = flag(
        8000, "Questions that fine-tuning answers with thoughts, and the control without.", takes=at_least(FEWEST_ROWS)
    )
    num_mixed_examples: int = flag(
        1600, "Questions for the model that PPO starts from, some of them with thoughts.", takes=at_least(FEWEST_ROWS)
    )
    share_of_thoughts: float = flag(0.3, "Share of those that are answered with a thought.", takes=SHARE)
    num_prompts: int = flag(4096, "Questions for PPO, which fine-tuning has not seen.", takes=at_least(1))
    num_problems: int = flag(
        100, "Held-out questions of each number of hops, at most; of the dial three times as many.", takes=at_least(1)
    )
    controls: list[str] | None = flag(
        None,
        "Arms that must not gain: direct (fine-tuning on answers alone), shuffled (PPO on the same "
        "rewards, dealt out by chance), or none; by default both.",
        some_of=CONTROLS,
    )
    pretrain_config: str | None = flag(None, "YAML flags of the pretraining run.")
    sft_config: str | None = flag(None, "YAML flags of fine-tuning, with and without.")
    mixed_config: str | None = flag(None, "YAML flags of fine-tuning before PPO.")
    rlhf_config: str | None = flag(None, "YAML flags of the runs of PPO.")

    @property
    def arms(self) -> tuple[str, ...]:
        """The selected controls, in their order."""
        return tuple(arm for arm in CONTROLS if self.controls is None or arm in self.controls)


@dataclass(frozen=True)
class Course(pipeline.Course):
    """The runs of the recipe."""

    stage = "reason"
    minutes = {PRETRAIN: 1.2, THOUGHTS: 0.4, DIRECT: 0.3, MIXED: 0.2, RL: 0.4, SHUFFLED: 0.4}

    @property
    def models(self) -> list[str]:
        """The runs with answering models, in order."""
        return [name for name in self.runs if name != PRETRAIN]


def course_of(script_args: ReasonArguments) -> Course:
    """Return the runs selected by the flags."""
    output_dir, arms = script_args.output_dir, script_args.arms

    def config(name: str) -> list[str]:
        return ["--config", getattr(script_args, f"{name}_config") or str(settings_file(f"reason/{name}.yaml"))]

    def learning(run: str, start: str) -> list[str]:
        rows = str(pipeline.data_file(output_dir, run))
        return ["--model_name_or_path", str(Path(output_dir, start)), "--dataset_name", rows]

    def runs() -> Iterator[tuple[str, str, list[str]]]:
        yield PRETRAIN, "pretrain", [*config("pretrain"), "--world_seed", str(script_args.world_seed)]
        yield THOUGHTS, "sft", [*config("sft"), *learning(THOUGHTS, PRETRAIN)]
        if DIRECT in arms:
            yield DIRECT, "sft", [*config("sft"), *learning(DIRECT, PRETRAIN)]
        yield MIXED, "sft", [*config("mixed"), *learning(MIXED, THOUGHTS)]
        yield RL, "rlhf", [*config("rlhf"), *learning(RL, MIXED), "--reward_funcs", "right_answer"]
        if SHUFFLED in arms:
            yield SHUFFLED, "rlhf", [*config("rlhf"), *learning(SHUFFLED, MIXED), "--reward_funcs", "shuffled_answer"]

    return Course(*pipeline.parsed_runs(runs(), output_dir, script_args.seed))
