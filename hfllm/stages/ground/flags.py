"""Answers from passages, of the embedded world's model or your own: the recipe's flags, its checks, its runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from hfllm.data.loading import FOREIGN_PROMPTS, RowArguments
from hfllm.data.sources import WORLD
from hfllm.flags import NAMED, NOT_WORLDS, SEED, WORLD_GROUP, Clashes, Range, at_least, check_flags, flag, given_words
from hfllm.runs import pipeline
from hfllm.runs.flags import RemoteCodeArguments
from hfllm.runs.recipes import settings_file

if TYPE_CHECKING:
    from trl import ModelConfig

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
class GroundArguments(RowArguments, RemoteCodeArguments):
    """Questions and passages, and what is learned from them."""

    output_dir: str = flag("outputs/ground", "Where models, data and the report go.")
    seed: int = flag(42, "Of data and weights: the same seed, the same result.", takes=SEED)
    num_questions: int = flag(
        300, "Held-out questions of each group; of your rows at most.", takes=at_least(FEWEST_QUESTIONS)
    )
    sft_config: str | None = flag(None, "YAML flags of fine-tuning without passages.")
    grounded_config: str | None = flag(None, "YAML flags of fine-tuning with passages.")
    num_examples: int = flag(
        10000,
        "Rows of fine-tuning, with passages and without, and of the control's.",
        takes=at_least(FEWEST_ROWS),
        never=NOT_WORLDS,
        group=WORLD_GROUP,
    )
    grounded_fraction: float = flag(
        0.4,
        "Share of the rows that are conversations about passages, in (0, 1].",
        takes=Range("a share above 0, at most 1", lambda value: 0 < value <= 1),
        never=NOT_WORLDS,
        group=WORLD_GROUP,
    )
    num_samples: int = flag(
        10,
        "Answers of a question that are sampled, for uncertainty and verification.",
        takes=at_least(FEWEST_SAMPLES),
        never=NOT_WORLDS,
        group=WORLD_GROUP,
    )
    pretrain_config: str | None = flag(None, "YAML flags of the pretraining run.", never=NOT_WORLDS, group=WORLD_GROUP)
    reward_config: str | None = flag(None, "YAML flags of the reward model.", never=NOT_WORLDS, group=WORLD_GROUP)

    takes_any_column: ClassVar[bool] = True
    clashes: ClassVar[Clashes] = {
        "--model_name_or_path needs --dataset_name: rows of prompt, answer and passage": lambda flags: (
            NAMED.holds(flags) and flags.dataset_name == WORLD
        ),
        FOREIGN_PROMPTS: lambda flags: not flags.model_name_or_path and flags.dataset_name != WORLD,
    }


def check(script_args: GroundArguments, model_args: "ModelConfig") -> None:
    """Refuse flags that would fail later."""
    from hfllm.data.word_index import import_bm25s

    import_bm25s("hfllm ground")
    check_flags(script_args, model_args)


@dataclass(frozen=True)
class Course(pipeline.Course):
    """The runs of the recipe."""

    stage = "ground"
    minutes = {PRETRAIN: 5, SFT: 1, GROUNDED: 1.5, REWARD: 0.7}


def course_of(script_args: GroundArguments, model_args: "ModelConfig") -> Course:
    """Return the runs selected by the flags."""
    named = model_args.model_name_or_path
    runs = _runs_of_own_model(script_args, model_args) if named else _runs_of_world(script_args)
    return Course(*pipeline.parsed_runs(runs, script_args.output_dir, script_args.seed), named)


def _runs_of_world(script_args: GroundArguments) -> pipeline.Runs:
    output_dir, world = script_args.output_dir, ["--world_seed", str(script_args.world_seed)]

    def run(name: str, recipe: str, *words: str) -> tuple[str, str, list[str]]:
        config = getattr(script_args, f"{name}_config") or str(settings_file(f"ground/{name}.yaml"))
        return name, recipe, ["--config", config, *words]

    def tuned(name: str, recipe: str, start: str, *words: str) -> tuple[str, str, list[str]]:
        return run(name, recipe, "--model_name_or_path", str(Path(output_dir, start)), *words)

    yield run(PRETRAIN, "pretrain", *world)
    for name in MODELS:
        yield tuned(name, "sft", PRETRAIN, *pipeline.rows_flag(output_dir, name))
    yield tuned(REWARD, "reward", GROUNDED, *world)


def _runs_of_own_model(script_args: GroundArguments, model_args: "ModelConfig") -> pipeline.Runs:
    """Yield fine-tuning of the user's model without passages, the control, and with them."""
    words = [*given_words(model_args), *given_words(script_args, only=["trust_remote_code"])]
    for name in MODELS:
        file = getattr(script_args, f"{name}_config")
        config = ["--config", file] if file else []
        yield name, "sft", [*config, *words, *pipeline.rows_flag(script_args.output_dir, name)]
