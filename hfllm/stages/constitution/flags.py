"""Constitutional AI: its flags, its checks, and its runs of other recipes."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hfllm.data.loading import RowArguments
from hfllm.data.sources import PYDOC, WORLD
from hfllm.errors import InputError
from hfllm.flags import NAMED, NOT_NEGATIVE, POSITIVE, SEED, UNNAMED, Fact, Refused, at_least, check_flags, flag
from hfllm.runs import pipeline
from hfllm.runs.arguments import flags_for_all, flags_of_adapter
from hfllm.runs.flags import RemoteCodeArguments
from hfllm.runs.pipeline import Course, Parsed
from hfllm.runs.recipes import load_recipe, settings_file

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
# The config flags, each for the run in its name.
CONFIGS = ("pretrain_config", "helpful_config", "sl_config", "reward_config", "rlhf_config")


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
        "Harmless prompts: the model keeps its own answers to them, and PPO goes on with them.",
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
    )
    num_demonstrations: int = flag(
        18000, "Demonstrations of helping, critique, revision and judging, for the world's model.", takes=at_least(1)
    )
    num_prompts: int = flag(800, "Red-team prompts of the embedded world to revise.", takes=at_least(1))
    num_helpful_prompts: int = flag(4000, "Harmless prompts of the embedded world.", takes=at_least(0))
    num_pairs: int = flag(1000, "Pairs of answers for the judge, at most, and one for each prompt.", takes=at_least(1))
    num_human_pairs: int = flag(
        4000, "Comparisons of helpfulness by the world's annotator, with a tenth wrong.", takes=at_least(0)
    )
    num_eval_prompts: int = flag(100, "Held-out prompts of each group, at most.", takes=at_least(1))
    num_revisions: int = flag(2, "Rounds of critique and revision.", takes=at_least(1))
    revise_only_flagged: bool = flag(False, "Keep an answer where the critique finds nothing.")
    temperature: float = flag(
        1.0,
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
    pretrain_config: str | None = flag(None, "YAML flags of the pretraining run.", never=NAMED)
    helpful_config: str | None = flag(None, "YAML flags of the helpful-only model's run.", never=NAMED)
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


def check(script_args: ConstitutionArguments, model_args: "ModelConfig") -> None:
    """Refuse flags without effect, contradictory flags, and flags that would fail later."""
    check_flags(script_args, model_args)
    named = bool(model_args.model_name_or_path)
    if not named and not script_args.is_world:
        raise InputError(
            f"--dataset_name {script_args.dataset_name} needs --model_name_or_path: the embedded world's model does "
            "not know such prompts"
        )
    if named and script_args.is_world:
        raise InputError("--model_name_or_path needs --dataset_name: red-team prompts, for instance a CSV of `prompt`")


def constitution_of(script_args: ConstitutionArguments) -> "Constitution":
    """Return the constitution named by the flags."""
    from hfllm.data.world.demonstrators import PRINCIPLES
    from hfllm.synthesis.constitution import load_constitution

    constitution = load_constitution(script_args.constitution or ("world" if script_args.is_world else "general"))
    unknown = [each.name for each in constitution.principles if each.name not in PRINCIPLES]
    if script_args.is_world and unknown:
        raise InputError(
            f"--constitution {script_args.constitution}: the embedded world's people know the principles "
            f"{', '.join(PRINCIPLES)}, not {unknown[0]!r}; name your own model by --model_name_or_path"
        )
    return constitution


def has_questions(constitution: "Constitution") -> bool:
    """Return whether every principle has a preference question, needed by a judge to compare answers."""
    return all(principle.preference for principle in constitution.principles)


def data_file(script_args: ConstitutionArguments, name: str) -> Path:
    """Return the file of a run's rows."""
    return Path(script_args.output_dir, "data", f"{name}.jsonl")


# ---- runs ----
#
# The runs of other recipes in constitutional AI, each in its own folder.


PRETRAIN, HELPFUL, REWARD = "pretrain", "helpful", "reward"
# PPO from helpful-only by the AI's labels; the preference models of labels by chance, and of people only.
AI_LABELS, LABELS_REWARD, PEOPLE_REWARD = "ai_labels", "labels_reward", "people_reward"
# Approximate times of the runs on two cores, in minutes.
MINUTES = {
    **{PRETRAIN: 2, HELPFUL: 2, SL: 0.5, REWARD: 0.7, RL: 0.8},
    **{POLITENESS: 0.3, CRITIQUES: 0.2, LABELS_REWARD: 0.7, AI_LABELS: 0.4, LABELS: 0.4},
    **{PEOPLE_REWARD: 0.5, PEOPLE: 0.4},
}


@dataclass(frozen=True)
class ConstitutionCourse(pipeline.Course):
    """The runs in their order, with their flags.

    Args:
        named: the user's model, if named.
    """

    named: str | None
    stage = "constitution"
    minutes = MINUTES

    @property
    def is_timed(self) -> bool:
        """Whether the settings are the timed ones."""
        return self.named is None

    @property
    def helpful(self) -> str:
        """The first model asked for harm: the user's, or the helpful-only one."""
        return self.named or self.folder(HELPFUL)


def course_of(script_args: ConstitutionArguments, model_args: "ModelConfig") -> ConstitutionCourse:
    """Return the runs selected by the flags."""
    recipes: dict[str, str] = {}
    runs: dict[str, Parsed] = {}
    for name, recipe, words in _runs(script_args, model_args):
        recipes[name] = recipe
        folder = ["--seed", str(script_args.seed), "--output_dir", str(Path(script_args.output_dir, name))]
        runs[name] = load_recipe(recipe).parse([*words, *folder])
    return ConstitutionCourse(recipes, runs, model_args.model_name_or_path)


def _runs(script_args: ConstitutionArguments, model_args: "ModelConfig") -> Iterator[tuple[str, str, list[str]]]:
    """Yield names, recipes and flags of the runs, except seed and folder."""
    named, output_dir = model_args.model_name_or_path, script_args.output_dir
    common, world = flags_for_all(model_args), ["--world_seed", str(script_args.world_seed)]

    def made(name: str) -> str:
        return named if named and name == HELPFUL else f"{output_dir}/{name}"

    def learning(run: str, config: str, start: str) -> list[str]:
        config_file = getattr(script_args, f"{'rlhf' if config == RL else config}_config")
        files = [config_file] if config_file else [] if named else [str(settings_file(f"constitution/{config}.yaml"))]
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


# PPO in the controls on labels: in fewer steps, and kept nearer to its start. The preference model of labels by chance
# still prefers polite answers, such as refusals; at the KL coefficient of the run itself PPO amplifies this.
COMPARED = ("--max_steps", "120", "--kl_coef", "1.0")


# ---- checks ----
#
# The checks of constitutional AI before its first run, since the affected run may come hours later.


# The smallest number of demonstrations with some, and a held-out one, for every control.
FEWEST_DEMONSTRATIONS = 10


def check_before(
    script_args: ConstitutionArguments,
    model_args: "ModelConfig",
    constitution: "Constitution",
    course: ConstitutionCourse,
) -> None:
    """Refuse settings that would otherwise fail after the first runs."""
    _check_flags(script_args)
    _check_judge(script_args, constitution)
    _check_inputs(script_args, model_args)
    config = _config_of_first(model_args, course)
    _check_room(script_args, config)
    _check_weights(script_args, model_args, config)
    _check_rewards(course)
    check_runs(course)


def _check_rewards(course: ConstitutionCourse) -> None:
    """Refuse rewards by the world's gold answers, absent from the prompts of these runs."""
    from hfllm.rewards.functions import GOLD_REWARDS

    for name, recipe in course.recipes.items():
        rewards = course.runs[name][0].reward_funcs if recipe == "rlhf" else None
        for reward in GOLD_REWARDS.keys() & set(rewards or ()):
            raise InputError(
                f"--reward_funcs {reward}: only the embedded world has it, not the prompts of this recipe"
            )


def _check_flags(script_args: ConstitutionArguments) -> None:
    if script_args.is_world and script_args.num_demonstrations < FEWEST_DEMONSTRATIONS:
        raise InputError(
            f"--num_demonstrations {script_args.num_demonstrations}: expected at least {FEWEST_DEMONSTRATIONS}"
        )


def _check_judge(script_args: ConstitutionArguments, constitution: "Constitution") -> None:
    number, most = script_args.judge_principles, len(constitution.principles)
    if number is not None and not 1 <= number <= most and has_questions(constitution):
        raise InputError(f"--judge_principles {number}: expected 1 to {most}, the principles of {constitution.name!r}")


def _check_inputs(script_args: ConstitutionArguments, model_args: "ModelConfig") -> None:
    """Refuse models and rows at the output paths of the runs."""
    written = Path(script_args.output_dir)
    indices = {
        **{"model_name_or_path": written, "critic_model_name_or_path": written},
        **{f"{kind}dataset_name": written / "data" for kind in ("", "eval_", "helpful_", "preference_")},
    }
    for each, index in indices.items():
        name = getattr(model_args if each == "model_name_or_path" else script_args, each)
        if name and Path(name).exists() and Path(name).resolve().is_relative_to(index.resolve()):
            raise InputError(f"--{each} {name} lies in {index}, where the runs write: choose another --output_dir")


def _config_of_first(model_args: "ModelConfig", course: ConstitutionCourse) -> "PreTrainedConfig":
    """Return the config of the first model: the named one, or the future one from pretraining."""
    from hfllm.runs.pipeline import Chain
    from hfllm.stages.pretrain.flags import config_to_train

    runs = {PRETRAIN: course.runs[PRETRAIN]} if PRETRAIN in course.runs else {}
    return config_to_train(model_args, Chain("constitution", runs))


def _check_room(script_args: ConstitutionArguments, config: "PreTrainedConfig") -> None:
    """Refuse answers too long to fit answer, critique and revision into the context, for any prompt."""
    from hfllm.models.loading.saved import max_length_of

    context, longest = max_length_of(config), script_args.longest
    if context is not None and 3 * longest >= context:
        raise InputError(
            f"--response_length {longest}: answer, critique and revision may take three times that, and the model's "
            f"context has {context} tokens"
        )


def _check_weights(script_args: ConstitutionArguments, model_args: "ModelConfig", config: "PreTrainedConfig") -> None:
    """Refuse untrainable weights, and an adapter without a matching layer."""
    from hfllm.models.devices import forked_random
    from hfllm.runs.models import check_trainable, peft_config, try_adapter

    if script_args.last_stage == REVISIONS:
        return
    if model_args.model_name_or_path:
        check_trainable(model_args)
    if model_args.use_peft:
        import torch

        with forked_random(torch.device("cpu")):
            try_adapter(config, peft_config(model_args))


# ---- checks of runs ----


def check_runs(course: Course) -> None:
    """Refuse the flags of the runs (YAML files may set them) as the runs would, but before the first one."""
    for name, recipe in course.recipes.items():
        _check_run(recipe, *course.runs[name])


def _check_run(recipe: str, *parsed: Any) -> None:
    from hfllm.runs.arguments import changed
    from hfllm.runs.stage import Stage

    is_written = getattr(parsed[0], "dataset_name", WORLD) != WORLD
    # Its rows do not exist yet; an always available source replaces their file.
    Stage(recipe, *((changed(parsed[0], dataset_name=PYDOC), *parsed[1:]) if is_written else parsed)).check_flags()
    if recipe == "rlhf":
        _check_ppo(*parsed)


def _check_ppo(script_args: Any, training_args: Any, model_args: Any) -> None:
    from hfllm.models.devices import forked_random
    from hfllm.runs.models import load_value_model
    from hfllm.stages.rlhf import build as rlhf
    from hfllm.stages.rlhf import flags as rlhf_flags
    from hfllm.trainers.ppo.setup import check_critic
    from hfllm.trainers.ppo.vllm_sampling import check_vllm

    rlhf_flags.check(script_args, training_args, model_args)
    rlhf.checked_functions(script_args.reward_funcs)
    documents = (script_args.num_prompts, training_args.seed, script_args.world_seed)
    rlhf.ptx_texts(script_args.ptx_dataset_name, *documents, script_args.max_row_bytes)
    if training_args.use_vllm:
        check_vllm(training_args)
    if script_args.value_model not in ("head", "reward"):
        with forked_random(training_args.device):
            check_critic(load_value_model(script_args.value_model, model_args, ()))
