"""Answers from passages on the embedded world: the recipe's flags, its checks, and its runs."""

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
    output_dir, world = script_args.output_dir, ["--world_seed", str(script_args.world_seed)]

    def run(name: str, recipe: str, *words: str) -> tuple[str, str, list[str]]:
        config = getattr(script_args, f"{name}_config") or str(settings_file(f"ground/{name}.yaml"))
        return name, recipe, ["--config", config, *words]

    def tuned(name: str, recipe: str, start: str, *words: str) -> tuple[str, str, list[str]]:
        return run(name, recipe, "--model_name_or_path", str(Path(output_dir, start)), *words)

    rows = {name: ["--dataset_name", str(pipeline.data_file(output_dir, name))] for name in MODELS}
    runs = [
        run(PRETRAIN, "pretrain", *world),
        *(tuned(name, "sft", PRETRAIN, *rows[name]) for name in MODELS),
        tuned(REWARD, "reward", GROUNDED, *world),
    ]
    return Course(*pipeline.parsed_runs(runs, output_dir, script_args.seed))
