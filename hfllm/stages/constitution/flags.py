"""Constitutional AI: its flags, its checks, and its runs of other recipes."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from hfllm.data.loading import FOREIGN_PROMPTS, RowArguments
from hfllm.data.sources import WORLD
from hfllm.errors import InputError
from hfllm.flags import (
    NAMED,
    NOT_NEGATIVE,
    NOT_WORLDS,
    POSITIVE,
    SEED,
    UNNAMED,
    WORLD_GROUP,
    Clashes,
    Fact,
    Refused,
    at_least,
    flag,
    flags_for_all,
    flags_of_adapter,
)
from hfllm.runs import pipeline
from hfllm.runs.flags import RemoteCodeArguments
from hfllm.runs.recipes import settings_file

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from trl import ModelConfig

    from hfllm.synthesis.constitution import Constitution


# ---- flags ----


# Controls, expected not to gain: another constitution, critiques without revisions, AI labels by chance, no AI labels.
POLITENESS, CRITIQUES, LABELS, PEOPLE = CONTROLS = ("politeness", "critiques", "labels", "people")
USUAL_CONTROLS = (POLITENESS, CRITIQUES, LABELS)
REVISIONS, SL, RL = LAST_STAGES = ("revisions", "sl", "rl")
# Longest answers in tokens: of the world, and of real models.
WORLD_LENGTH, OWN_LENGTH = 40, 128
IS_WORLDS = "the model is the embedded world's"
NO_PPO = Fact(lambda flags: flags.last_stage != RL, "--last_stage {last_stage} has no PPO")
# The smallest number of demonstrations with some, and a held-out one, for every control.
FEWEST_DEMONSTRATIONS = 10


@dataclass(frozen=True)
class ConstitutionArguments(RowArguments, RemoteCodeArguments):
    """Prompts, the constitution, and how much is made of each."""

    output_dir: str = flag("outputs/constitution", "Where the models, the data and the report go.")
    seed: int = flag(42, "Of data and weights: the same seed, the same result.", takes=SEED)
    constitution: str | None = flag(
        None,
        "general, world, politeness, or a JSON or YAML file of principles; by default world for the "
        "embedded world's model, general for yours.",
    )
    critic_model_name_or_path: str | None = flag(
        None,
        "Model that criticizes, revises and judges; by default the model itself.",
        never=UNNAMED.because(IS_WORLDS),
    )
    helpful_dataset_name: str | None = flag(
        None,
        "Harmless prompts: the model keeps its own answers to them, and PPO goes on with them. A fifth of ten or more "
        "is held out.",
        never=UNNAMED.because(IS_WORLDS),
    )
    preference_dataset_name: str | None = flag(
        None,
        "Comparisons of helpfulness by people, for the preference model beside the AI's.",
        never=(UNNAMED.because(IS_WORLDS), NO_PPO.because("--last_stage {last_stage} trains no preference model")),
    )
    last_stage: str = flag(
        RL,
        "Where to end: with the revisions, the model tuned on them, or PPO on AI preferences.",
        choices=list(LAST_STAGES),
    )
    controls: list[str] | None = flag(
        None,
        "Arms of the embedded world that must not gain: politeness (another constitution), critiques "
        "(tuned on critiques without revisions), labels (AI labels by chance), people (no AI labels, people's "
        "comparisons alone), or none; by default all but people.",
        some_of=CONTROLS,
        never=Fact(
            lambda flags: flags.model_name_or_path and [*flags.controls] != ["none"], "they are the world's arms"
        ),
        group=WORLD_GROUP,
    )
    num_demonstrations: int = flag(
        18000,
        "Demonstrations of helping, critique, revision and judging, for the world's model.",
        takes=at_least(FEWEST_DEMONSTRATIONS),
        never=NOT_WORLDS,
        group=WORLD_GROUP,
    )
    num_prompts: int = flag(
        800,
        "Red-team prompts of the embedded world to revise.",
        takes=at_least(1),
        never=NOT_WORLDS,
        group=WORLD_GROUP,
    )
    num_helpful_prompts: int = flag(
        4000, "Harmless prompts of the embedded world.", takes=at_least(0), never=NOT_WORLDS, group=WORLD_GROUP
    )
    num_pairs: int = flag(1000, "Pairs of answers for the judge, at most, and one for each prompt.", takes=at_least(1))
    num_human_pairs: int = flag(
        4000,
        "Comparisons of helpfulness by the world's annotator, with a tenth wrong.",
        takes=at_least(0),
        never=NOT_WORLDS,
        group=WORLD_GROUP,
    )
    num_eval_prompts: int = flag(100, "Held-out prompts of each group, at most.", takes=at_least(1))
    num_revisions: int = flag(2, "Rounds of critique and revision.", takes=at_least(1))
    revise_only_flagged: bool = flag(False, "Keep an answer where the critique finds nothing.")
    temperature: float = flag(
        0.5,
        "Of critiques, revisions and the model's own answers to harmless prompts; its first answers to "
        "red-team prompts are sampled at 1.",
        takes=POSITIVE,
    )
    response_length: int | None = flag(
        None, "Longest answer in tokens; by default 40 on the world and 128 elsewhere.", takes=at_least(1)
    )
    batch_size: int = flag(64, "Prompts that are answered at once.", takes=at_least(1))
    judge_chain_of_thought: bool = flag(
        False,
        "Let the judge write what it thinks before it replies.",
        never=NO_PPO.because("--last_stage {last_stage} needs no judge"),
    )
    judge_clamp: bool = flag(
        False,
        "Bound the judge's probabilities to 40 to 60 percent, as in the paper.",
        never=NO_PPO.because("--last_stage {last_stage} needs no judge"),
    )
    judge_margin: float = flag(
        0.0,
        "Log-odds in nats up to which the judge is taken to see no difference: such pairs are ties.",
        takes=NOT_NEGATIVE,
    )
    judge_principles: int | None = flag(
        None,
        "Principles that a pair is judged by, drawn for each; by default all.",
        never=NO_PPO.because("--last_stage {last_stage} needs no judge"),
    )
    allow_biased_judge: bool = flag(False, "Go on with a judge whose position bias exceeds its signal.")
    pretrain_config: str | None = flag(None, "YAML flags of the pretraining run.", never=NAMED, group=WORLD_GROUP)
    helpful_config: str | None = flag(
        None, "YAML flags of the helpful-only model's run.", never=NAMED, group=WORLD_GROUP
    )
    sl_config: str | None = flag(None, "YAML flags of fine-tuning on the revisions.")
    reward_config: str | None = flag(None, "YAML flags of the preference model's run.")
    rlhf_config: str | None = flag(None, "YAML flags of the run of PPO.")

    takes_any_column: ClassVar[bool] = True
    refused: ClassVar[Refused] = {
        "model_revision": UNNAMED.because(IS_WORLDS),
        **dict.fromkeys(
            ("load_in_8bit", "load_in_4bit"), UNNAMED.because(f"{IS_WORLDS}, which is trained whole first")
        ),
        "use_peft": Fact(
            lambda flags: flags.last_stage == REVISIONS, f"--last_stage {REVISIONS} trains nothing of yours"
        ),
    }
    clashes: ClassVar[Clashes] = {
        FOREIGN_PROMPTS: lambda flags: not (flags.model_name_or_path or flags.is_world),
        "--model_name_or_path needs --dataset_name: red-team prompts, for instance a CSV of `prompt`": lambda flags: (
            NAMED.holds(flags) and flags.is_world
        ),
    }

    @property
    def is_world(self) -> bool:
        """Whether the prompts are the embedded world's."""
        return self.dataset_name == WORLD

    @property
    def longest(self) -> int:
        """The longest answer, in tokens."""
        return self.response_length or (WORLD_LENGTH if self.is_world else OWN_LENGTH)

    @property
    def arms(self) -> tuple[str, ...]:
        """The selected controls, in their order."""
        chosen = USUAL_CONTROLS if self.controls is None and self.is_world else self.controls or ()
        if self.last_stage == REVISIONS:
            return ()
        by_ppo = (LABELS, PEOPLE)
        return tuple(arm for arm in CONTROLS if arm in chosen and (arm not in by_ppo or self.last_stage == RL))


def constitution_of(name: str | None, is_world: bool) -> "Constitution":
    """Return the named constitution, or the default one of the embedded world's model or of the user's."""
    from hfllm.data.world.demonstrators import PRINCIPLES
    from hfllm.synthesis.constitution import load_constitution

    constitution = load_constitution(name or ("world" if is_world else "general"))
    unknown = [each.name for each in constitution.principles if each.name not in PRINCIPLES]
    if is_world and unknown:
        raise InputError(
            f"--constitution {name}: the embedded world's people know the principles "
            f"{', '.join(PRINCIPLES)}, not {unknown[0]!r}; name your own model by --model_name_or_path"
        )
    return constitution


def has_questions(constitution: "Constitution") -> bool:
    """Return whether every principle has a preference question, needed by a judge to compare answers."""
    return all(principle.preference for principle in constitution.principles)


# ---- runs ----
#
# The runs of other recipes in constitutional AI, each in its own folder.


PRETRAIN, HELPFUL, REWARD = "pretrain", "helpful", "reward"
# PPO from helpful-only by the AI's labels; the preference models of labels by chance, and of people only.
AI_LABELS, LABELS_REWARD, PEOPLE_REWARD = "ai_labels", "labels_reward", "people_reward"


@dataclass(frozen=True)
class ConstitutionCourse(pipeline.Course):
    """The runs in their order, with their flags."""

    stage = "constitution"
    minutes = {
        **{PRETRAIN: 2, HELPFUL: 2, SL: 0.5, REWARD: 0.7, RL: 0.8},
        **{POLITENESS: 0.3, CRITIQUES: 0.2, LABELS_REWARD: 0.7, AI_LABELS: 0.4, LABELS: 0.4},
        **{PEOPLE_REWARD: 0.5, PEOPLE: 0.4},
    }

    @property
    def helpful(self) -> str:
        """The first model asked for harm: the user's, or the helpful-only one."""
        return self.named or self.folder(HELPFUL)


# PPO in the controls on labels: in fewer steps, and kept nearer to its start. The preference model of labels by chance
# still prefers polite answers, such as refusals; at the KL coefficient of the run itself PPO amplifies this.
COMPARED = ("--max_steps", "120", "--kl_coef", "1.0")


def course_of(script_args: ConstitutionArguments, model_args: "ModelConfig") -> ConstitutionCourse:
    """Return the runs selected by the flags."""
    named, output_dir, arms = model_args.model_name_or_path, script_args.output_dir, script_args.arms
    common, adapter = flags_for_all(model_args), flags_of_adapter(model_args)

    def model(name: str) -> str:
        return named if named and name == HELPFUL else f"{output_dir}/{name}"

    def learning(run: str, config: str, start: str) -> list[str]:
        config_file = getattr(script_args, f"{'rlhf' if config == RL else config}_config")
        files = [config_file] if config_file else [] if named else [str(settings_file(f"constitution/{config}.yaml"))]
        rows = str(pipeline.data_file(output_dir, run))
        words = ["--model_name_or_path", model(start), "--dataset_name", rows]
        if named and start == HELPFUL:
            words += ["--model_revision", model_args.model_revision]
        return [*(word for file in files for word in ("--config", file)), *words, *common]

    def tuned_by(run: str, reward: str, start: str, *more: str) -> tuple[str, str, list[str]]:
        words = [*learning(run, RL, start), "--reward_model_name_or_path", model(reward)]
        return run, "rlhf", [*words, "--response_length", str(script_args.longest), *more]

    def runs() -> Iterator[tuple[str, str, list[str]]]:
        if not named:
            config = script_args.pretrain_config or str(settings_file("constitution/pretrain.yaml"))
            yield PRETRAIN, "pretrain", ["--config", config, "--world_seed", str(script_args.world_seed)]
            yield HELPFUL, "sft", learning(HELPFUL, HELPFUL, PRETRAIN)
        if script_args.last_stage == REVISIONS:
            return
        yield SL, "sft", learning(SL, SL, HELPFUL) + adapter
        if script_args.last_stage == RL:
            yield REWARD, "reward", learning(REWARD, REWARD, SL)
            yield tuned_by(RL, REWARD, SL)
        if POLITENESS in arms:
            yield POLITENESS, "sft", learning(POLITENESS, SL, HELPFUL) + adapter
        if LABELS in arms:
            yield LABELS_REWARD, "reward", learning(LABELS_REWARD, REWARD, SL)
            yield tuned_by(AI_LABELS, REWARD, HELPFUL, *COMPARED)
            yield tuned_by(LABELS, LABELS_REWARD, HELPFUL, *COMPARED)
        if PEOPLE in arms:
            yield PEOPLE_REWARD, "reward", learning(PEOPLE_REWARD, REWARD, SL)
            yield tuned_by(PEOPLE, PEOPLE_REWARD, HELPFUL, *COMPARED)
        if CRITIQUES in arms:
            yield CRITIQUES, "sft", learning(CRITIQUES, SL, HELPFUL)

    return ConstitutionCourse(*pipeline.parsed_runs(runs(), output_dir, script_args.seed), named)


# ---- checks ----
#
# The checks of constitutional AI before its first run, since the affected run may come hours later.


def check_before(
    script_args: ConstitutionArguments,
    model_args: "ModelConfig",
    constitution: "Constitution",
    course: ConstitutionCourse,
) -> None:
    """Refuse settings that would otherwise fail after the first runs."""
    from hfllm.runs.models import check_trainable
    from hfllm.stages.courses import check_runs, refuse_inputs_in
    from hfllm.stages.pretrain.flags import check_adapter, config_to_train

    _check_judge(script_args.judge_principles, constitution)
    written, named = Path(script_args.output_dir), model_args.model_name_or_path
    refuse_inputs_in(
        written, {"model_name_or_path": named, "critic_model_name_or_path": script_args.critic_model_name_or_path}
    )
    datasets = [f"{kind}dataset_name" for kind in ("", "eval_", "helpful_", "preference_")]
    refuse_inputs_in(written / "data", {each: getattr(script_args, each) for each in datasets})
    first = pipeline.Chain("constitution", {name: course.runs[name] for name in (PRETRAIN,) if name in course.runs})
    _check_room(script_args.longest, config_to_train(named, model_args.model_revision, first))
    if script_args.last_stage != REVISIONS:
        check_trainable(model_args)
        check_adapter(model_args, first)
    _check_rewards(course)
    check_runs(course)


def _check_judge(count: int | None, constitution: "Constitution") -> None:
    most = len(constitution.principles)
    if count is not None and not 1 <= count <= most and has_questions(constitution):
        raise InputError(f"--judge_principles {count}: expected 1 to {most}, the principles of {constitution.name!r}")


def _check_room(longest: int, config: "PreTrainedConfig") -> None:
    """Refuse answers too long to fit answer, critique and revision into the context, for any prompt."""
    from hfllm.models.loading.saved import max_length_of

    context = max_length_of(config)
    if context is not None and 3 * longest >= context:
        raise InputError(
            f"--response_length {longest}: answer, critique and revision may take three times that, and the model's "
            f"context has {context} tokens"
        )


def _check_rewards(course: ConstitutionCourse) -> None:
    """Refuse rewards by the world's gold answers, absent from the prompts of these runs."""
    from hfllm.rewards.functions import GOLD_REWARDS

    for name, recipe in course.recipes.items():
        rewards = course.runs[name][0].reward_funcs if recipe == "rlhf" else None
        for each in GOLD_REWARDS.keys() & set(rewards or ()):
            raise InputError(f"--reward_funcs {each}: only the embedded world has it, not the prompts of this recipe")
