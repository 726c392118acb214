"""Answers from passages on the embedded world: the recipe's flags, its checks, and its runs."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hfllm.flags import NOT_NEGATIVE, SEED, Range, at_least, check_flags, flag
from hfllm.runs import pipeline
from hfllm.runs.recipes import settings_file

PRETRAIN, SFT, GROUNDED, REWARD = ("pretrain", "sft", "grounded", "reward")
# The compared models.
MODELS = (SFT, GROUNDED)
# The smallest number of rows with a remaining held-out one.
FEWEST_ROWS = 10
# Every attribute has a question in a known wording and one in a new wording.
FEWEST_QUESTIONS = 6
# An entropy needs two.
FEWEST_SAMPLES = 2
# Number of retrieved passages per question.
TOP_K = 3


@dataclass(frozen=True)
class GroundArguments:
    """How much of each is made, and by which settings."""

    output_dir: str = flag("outputs/ground", "Where models, data and the report go.")
    seed: int = flag(42, "Of data and weights: the same seed, the same result.", takes=SEED)
    world_seed: int = flag(0, "Seed of the embedded world's facts.", takes=NOT_NEGATIVE)
    num_examples: int = flag(
        10000, "Rows of fine-tuning, with passages and without, and of the control's.", takes=at_least(FEWEST_ROWS)
    )
    grounded_fraction: float = flag(
        0.4,
        "Share of the rows that are conversations about passages, in (0, 1].",
        takes=Range("a share above 0, at most 1", lambda value: 0 < value <= 1),
    )
    num_questions: int = flag(300, "Held-out questions of each group.", takes=at_least(FEWEST_QUESTIONS))
    num_samples: int = flag(
        10, "Answers of a question that are sampled, for uncertainty and verification.", takes=at_least(FEWEST_SAMPLES)
    )
    pretrain_config: str | None = flag(None, "YAML flags of the pretraining run.")
    sft_config: str | None = flag(None, "YAML flags of fine-tuning without passages.")
    grounded_config: str | None = flag(None, "YAML flags of fine-tuning with passages.")
    reward_config: str | None = flag(None, "YAML flags of the reward model.")


def check(script_args: GroundArguments) -> None:
    """Refuse flags that would fail later."""
    from hfllm.data.word_index import import_bm25s

    import_bm25s("hfllm ground")
    check_flags(script_args)


@dataclass(frozen=True)
class Course(pipeline.Course):
    """The runs of the recipe."""

    stage = "ground"
    minutes = {PRETRAIN: 3, SFT: 0.6, GROUNDED: 1.2, REWARD: 0.7}


def course_of(script_args: GroundArguments) -> Course:
    """Return the runs selected by the flags."""
    return Course(*pipeline.parsed_runs(_runs(script_args), script_args.output_dir, script_args.seed))


def data_file(script_args: GroundArguments, name: str) -> Path:
    """Return the file of a run's rows."""
    return Path(script_args.output_dir, "data", f"{name}.jsonl")


def _runs(script_args: GroundArguments) -> Iterator[tuple[str, str, list[str]]]:
    """Yield names, recipes and flags of the runs, except seed and folder."""

    def config(name: str) -> list[str]:
        return ["--config", getattr(script_args, f"{name}_config") or str(settings_file(f"ground/{name}.yaml"))]

    yield PRETRAIN, "pretrain", [*config(PRETRAIN), "--world_seed", str(script_args.world_seed)]
    base = str(Path(script_args.output_dir, PRETRAIN))
    for name in MODELS:
        learned = ["--model_name_or_path", base, "--dataset_name", str(data_file(script_args, name))]
        yield name, "sft", [*config(name), *learned]
    tuned = str(Path(script_args.output_dir, GROUNDED))
    world = ["--model_name_or_path", tuned, "--world_seed", str(script_args.world_seed)]
    yield REWARD, "reward", [*config(REWARD), *world]
