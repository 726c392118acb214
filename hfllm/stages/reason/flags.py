"""Thoughts on the embedded world: the recipe's flags, its checks, and its runs of other recipes."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hfllm.flags import NOT_NEGATIVE, SEED, SHARE, at_least, check_flags, flag
from hfllm.runs import pipeline
from hfllm.runs.pipeline import Parsed
from hfllm.runs.recipes import load_recipe, settings_file

PRETRAIN, THOUGHTS, DIRECT, MIXED, RL, SHUFFLED = (
    *("pretrain", "thoughts", "direct", "mixed"),
    *("rl", "shuffled"),
)
# Controls, expected not to gain: fine-tuning on answers only, PPO on uninformative rewards.
CONTROLS = (DIRECT, SHUFFLED)
# The longest answer in tokens: a thought about a dial takes 34; growth beyond this has to be visible.
RESPONSE_LENGTH = 64
# The smallest number of rows with a remaining held-out one.
FEWEST_ROWS = 10
# Runs by flag of their config.
CONFIGS = {"pretrain": (PRETRAIN,), "sft": (THOUGHTS, DIRECT), "mixed": (MIXED,), "rlhf": (RL, SHUFFLED)}


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


def check(script_args: ReasonArguments) -> None:
    """Refuse contradictory flags and flags that would fail later."""
    check_flags(script_args)


@dataclass(frozen=True)
class Course(pipeline.Course):
    """The runs of the recipe."""

    stage = "reason"
    minutes = {PRETRAIN: 2, THOUGHTS: 0.6, DIRECT: 0.5, MIXED: 0.4, RL: 0.8, SHUFFLED: 0.8}

    @property
    def models(self) -> list[str]:
        """The runs with answering models, in order."""
        return [name for name in self.runs if name != PRETRAIN]


def course_of(script_args: ReasonArguments) -> Course:
    """Return the runs selected by the flags."""
    recipes: dict[str, str] = {}
    runs: dict[str, Parsed] = {}
    for name, recipe, words in _runs(script_args):
        recipes[name] = recipe
        own = ["--config", _config(script_args, name), "--seed", str(script_args.seed)]
        own += ["--output_dir", str(Path(script_args.output_dir, name))]
        runs[name] = load_recipe(recipe).parse([*own, *words])
    return Course(recipes, runs)


def data_file(script_args: ReasonArguments, name: str) -> Path:
    """Return the file of a run's rows."""
    return Path(script_args.output_dir, "data", f"{name}.jsonl")


def _config(script_args: ReasonArguments, name: str) -> str:
    each = next(each for each, runs in CONFIGS.items() if name in runs)
    return getattr(script_args, f"{each}_config") or str(settings_file(f"reason/{each}.yaml"))


def _runs(script_args: ReasonArguments) -> Iterator[tuple[str, str, list[str]]]:
    """Yield names and recipes of the runs, and their flags not set by a config."""

    def learning(name: str, start: str) -> list[str]:
        model_path = str(Path(script_args.output_dir, start))
        return ["--model_name_or_path", model_path, "--dataset_name", str(data_file(script_args, name))]

    yield PRETRAIN, "pretrain", ["--world_seed", str(script_args.world_seed)]
    for name, start in ((THOUGHTS, PRETRAIN), (DIRECT, PRETRAIN), (MIXED, THOUGHTS)):
        if name not in CONTROLS or name in script_args.arms:
            yield name, "sft", learning(name, start)
    for name, reward in ((RL, "right_answer"), (SHUFFLED, "shuffled_answer")):
        if name not in CONTROLS or name in script_args.arms:
            yield name, "rlhf", [*learning(name, MIXED), "--reward_funcs", reward]
