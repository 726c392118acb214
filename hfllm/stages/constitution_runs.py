"""The runs of other recipes that constitutional AI consists of, each in a folder of its own."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hfllm.runs.chain import Parsed
from hfllm.runs.recipes import load_recipe, settings_file
from hfllm.stages import course
from hfllm.stages.constitution import (
    CRITIQUES,
    LABELS,
    PEOPLE,
    POLITENESS,
    REVISIONS,
    RL,
    ConstitutionArguments,
    data_file,
    flags_for_all,
    flags_of_adapter,
)

if TYPE_CHECKING:
    from trl import ModelConfig

PRETRAIN, HELPFUL, SL, REWARD = "pretrain", "helpful", "sl", "reward"
# PPO from helpful-only by the AI's labels; the preference models of labels by chance, and of people alone.
AI_LABELS, LABELS_REWARD, PEOPLE_REWARD = "ai_labels", "labels_reward", "people_reward"
# About how long each takes on two cores, in minutes.
MINUTES = {
    **{PRETRAIN: 2, HELPFUL: 2, SL: 0.5, REWARD: 0.7, RL: 0.8},
    **{POLITENESS: 0.3, CRITIQUES: 0.2, LABELS_REWARD: 0.7, AI_LABELS: 0.4, LABELS: 0.4},
    **{PEOPLE_REWARD: 0.5, PEOPLE: 0.4},
}


@dataclass(frozen=True)
class Course(course.Course):
    """The runs in their order, with their flags.

    Args:
        named: the user's model, where one is named.
    """

    named: str | None
    stage = "constitution"
    minutes = MINUTES

    @property
    def is_timed(self) -> bool:
        """Whether the settings are those that were timed."""
        return self.named is None

    @property
    def helpful(self) -> str:
        """The model that is asked for harm first: the user's, or the one that wants to help alone."""
        return self.named or self.folder(HELPFUL)


def course_of(script_args: ConstitutionArguments, model_args: "ModelConfig") -> Course:
    """Return the runs that the flags ask for.

    Raises:
        InputError: when a config of one of them is wrong.
    """
    recipes: dict[str, str] = {}
    runs: dict[str, Parsed] = {}
    for name, recipe, words in _runs(script_args, model_args):
        recipes[name] = recipe
        folder = ["--seed", str(script_args.seed), "--output_dir", str(Path(script_args.output_dir, name))]
        runs[name] = load_recipe(recipe).parse([*words, *folder])
    return Course(recipes, runs, model_args.model_name_or_path)


def _runs(script_args: ConstitutionArguments, model_args: "ModelConfig") -> Iterator[tuple[str, str, list[str]]]:
    """Yield the name of each run, its recipe, and its flags but for seed and folder."""
    named, output_dir = model_args.model_name_or_path, script_args.output_dir
    common, world = flags_for_all(model_args), ["--world_seed", str(script_args.world_seed)]

    def made(name: str) -> str:
        return named if named and name == HELPFUL else f"{output_dir}/{name}"

    def learning(run: str, config: str, start: str) -> list[str]:
        given = getattr(script_args, f"{'rlhf' if config == RL else config}_config")
        files = [given] if given else [] if named else [str(settings_file(f"constitution/{config}.yaml"))]
        rows = ["--model_name_or_path", made(start), "--dataset_name", str(data_file(script_args, run))]
        if named and start == HELPFUL:
            rows += ["--model_revision", model_args.model_revision]
        return [*(word for file in files for word in ("--config", file)), *rows, *common]

    def tuned_by(run: str, reward: str, start: str, *more: str) -> tuple[str, str, list[str]]:
        words = [*learning(run, RL, start), "--reward_model_name_or_path", made(reward)]
        return run, "rlhf", [*words, "--response_length", str(script_args.longest), *more]

    if not named:
        config = script_args.pretrain_config or str(settings_file("constitution/pretrain.yaml"))
        yield PRETRAIN, "pretrain", ["--config", config, *world]
        yield HELPFUL, "sft", learning(HELPFUL, HELPFUL, PRETRAIN)
    if script_args.last_stage == REVISIONS:
        return
    yield SL, "sft", learning(SL, SL, HELPFUL) + flags_of_adapter(model_args)
    if script_args.last_stage == RL:
        yield REWARD, "reward", learning(REWARD, REWARD, SL)
        yield tuned_by(RL, REWARD, SL)
    arms = script_args.arms
    if POLITENESS in arms:
        yield POLITENESS, "sft", learning(POLITENESS, SL, HELPFUL) + flags_of_adapter(model_args)
    if LABELS in arms:
        yield LABELS_REWARD, "reward", learning(LABELS_REWARD, REWARD, SL)
        yield tuned_by(AI_LABELS, REWARD, HELPFUL, *COMPARED)
        yield tuned_by(LABELS, LABELS_REWARD, HELPFUL, *COMPARED)
    if PEOPLE in arms:
        yield PEOPLE_REWARD, "reward", learning(PEOPLE_REWARD, REWARD, SL)
        yield tuned_by(PEOPLE, PEOPLE_REWARD, HELPFUL, *COMPARED)
    if CRITIQUES in arms:
        yield CRITIQUES, "sft", learning(CRITIQUES, SL, HELPFUL)


# PPO in the arms that compare labels: in fewer steps, and held nearer to its start. The preference model of labels by
# chance still likes answers that are not rude, such as refusals; at the KL of the run itself PPO makes much of that.
COMPARED = ("--max_steps", "120", "--kl_coef", "1.0")
