"""Constitutional AI: its flags, what it refuses, and the runs of other recipes that it consists of."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hfllm.data.loading import RowArguments
from hfllm.data.sources import WORLD
from hfllm.errors import InputError, refuse
from hfllm.runs.flags import RemoteCodeArguments

if TYPE_CHECKING:
    from trl import ModelConfig

    from hfllm.synthesis.constitution import Constitution

# Arms that must not gain: another constitution, critiques without revisions, AI labels by chance, and none at all.
POLITENESS, CRITIQUES, LABELS, PEOPLE = CONTROLS = ("politeness", "critiques", "labels", "people")
USUAL_CONTROLS = (POLITENESS, CRITIQUES, LABELS)
REVISIONS, SL, RL = LAST_STAGES = ("revisions", "sl", "rl")
# Longest answers in tokens: of the world, and of real models.
WORLD_LENGTH, OWN_LENGTH = 40, 128
AT_LEAST_ONE = ("num_revisions", "num_pairs", "num_eval_prompts", "num_prompts", "num_demonstrations", "batch_size")
# Of each the flag, and the run that it is for.
CONFIGS = ("pretrain_config", "helpful_config", "sl_config", "reward_config", "rlhf_config")
# Of the flags of your model those that hold in every run, and those of an adapter beside `--lora_...`.
HOLD_FOR_ALL = (
    *("dtype", "attn_implementation", "load_in_8bit", "load_in_4bit"),
    *("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"),
)
ADAPTER = ("use_peft", "use_rslora", "use_dora")


@dataclass(frozen=True)
class ConstitutionArguments(RowArguments, RemoteCodeArguments):
    """Prompts, the constitution, and how much is made of each."""

    output_dir: str = field(
        default="outputs/constitution", metadata={"help": "Where the models, the data and the report go."}
    )
    seed: int = field(default=42, metadata={"help": "Of data and weights: the same seed, the same result."})
    constitution: str | None = field(
        default=None,
        metadata={
            "help": "general, world, politeness, or a JSON or YAML file of principles; by default world for the "
            "embedded world's model, general for yours."
        },
    )
    critic_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model that criticizes, revises and judges; by default the model itself."}
    )
    helpful_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Harmless prompts: the model keeps its own answers to them, and PPO goes on with them."},
    )
    preference_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Comparisons of helpfulness by people, for the preference model beside the AI's."},
    )
    last_stage: str = field(
        default=RL,
        metadata={
            "help": "Where to end: with the revisions, the model tuned on them, or PPO on AI preferences.",
            "choices": list(LAST_STAGES),
        },
    )
    controls: list[str] | None = field(
        default=None,
        metadata={
            "help": "Arms of the embedded world that must not gain: politeness (another constitution), critiques "
            "(tuned on critiques without revisions), labels (AI labels by chance), people (no AI labels, people's "
            "comparisons alone), or none; by default all but people."
        },
    )
    num_demonstrations: int = field(
        default=18000,
        metadata={"help": "Demonstrations of helping, critique, revision and judging, for the world's model."},
    )
    num_prompts: int = field(default=800, metadata={"help": "Red-team prompts of the embedded world to revise."})
    num_helpful_prompts: int = field(default=4000, metadata={"help": "Harmless prompts of the embedded world."})
    num_pairs: int = field(
        default=1000, metadata={"help": "Pairs of answers for the judge, at most, and one for each prompt."}
    )
    num_human_pairs: int = field(
        default=4000, metadata={"help": "Comparisons of helpfulness by the world's annotator, with a tenth wrong."}
    )
    num_eval_prompts: int = field(default=100, metadata={"help": "Held-out prompts of each group, at most."})
    num_revisions: int = field(default=2, metadata={"help": "Rounds of critique and revision."})
    revise_only_flagged: bool = field(
        default=False, metadata={"help": "Keep an answer where the critique finds nothing."}
    )
    temperature: float = field(
        default=1.0,
        metadata={
            "help": "Of critiques, revisions and the model's own answers to harmless prompts; its first answers to "
            "red-team prompts are sampled at 1."
        },
    )
    response_length: int | None = field(
        default=None, metadata={"help": "Longest answer in tokens; by default 40 on the world and 128 elsewhere."}
    )
    batch_size: int = field(default=64, metadata={"help": "Prompts that are answered at once."})
    judge_chain_of_thought: bool = field(
        default=False, metadata={"help": "Let the judge write what it thinks before it replies."}
    )
    judge_clamp: bool = field(
        default=False, metadata={"help": "Bound the judge's probabilities to 40 to 60 percent, as in the paper."}
    )
    judge_margin: float = field(
        default=0.0,
        metadata={
            "help": "Log-odds in nats up to which the judge is taken to see no difference: such pairs are ties."
        },
    )
    judge_principles: int | None = field(
        default=None, metadata={"help": "Principles that a pair is judged by, drawn for each; by default all."}
    )
    allow_biased_judge: bool = field(
        default=False, metadata={"help": "Go on with a judge whose position bias exceeds its signal."}
    )
    pretrain_config: str | None = field(default=None, metadata={"help": "YAML flags of the pretraining run."})
    helpful_config: str | None = field(default=None, metadata={"help": "YAML flags of the helpful-only model's run."})
    sl_config: str | None = field(default=None, metadata={"help": "YAML flags of fine-tuning on the revisions."})
    reward_config: str | None = field(default=None, metadata={"help": "YAML flags of the preference model's run."})
    rlhf_config: str | None = field(default=None, metadata={"help": "YAML flags of the run of PPO."})

    takes_any_column: ClassVar[bool] = True

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
        """The controls that run, in their order."""
        chosen = USUAL_CONTROLS if self.controls is None and self.is_world else self.controls or ()
        if self.last_stage == REVISIONS:
            return ()
        by_ppo = (LABELS, PEOPLE)
        return tuple(arm for arm in CONTROLS if arm in chosen and (arm not in by_ppo or self.last_stage == RL))


def check(script_args: ConstitutionArguments, model_args: "ModelConfig") -> None:
    """Refuse flags that have no effect, contradict each other, or would fail later.

    Raises:
        InputError: naming the flag.
    """
    for flag in AT_LEAST_ONE:
        value = getattr(script_args, flag)
        if value < 1:
            raise InputError(f"--{flag} {value}: expected at least 1")
    named = bool(model_args.model_name_or_path)
    if not named and not script_args.is_world:
        raise InputError(
            f"--dataset_name {script_args.dataset_name} needs --model_name_or_path: the embedded world's model does "
            "not know such prompts"
        )
    if named and script_args.is_world:
        raise InputError("--model_name_or_path needs --dataset_name: red-team prompts, for instance a CSV of `prompt`")
    for flag in ("critic_model_name_or_path", "helpful_dataset_name", "preference_dataset_name"):
        refuse(not named and bool(getattr(script_args, flag)), f"--{flag}", "the model is the embedded world's")
    for flag in ("pretrain_config", "helpful_config"):
        refuse(named and bool(getattr(script_args, flag)), f"--{flag}", "the model is named")
    refuse(
        script_args.preference_dataset_name is not None and script_args.last_stage != RL,
        "--preference_dataset_name",
        f"--last_stage {script_args.last_stage} trains no preference model",
    )
    for control in script_args.controls or ():
        if control not in (*CONTROLS, "none"):
            raise InputError(f"--controls {control!r}: expected some of {', '.join(CONTROLS)}, or none")
    refuse(named and set(script_args.controls or ()) - {"none"} != set(), "--controls", "they are the world's arms")


def constitution_of(script_args: ConstitutionArguments) -> "Constitution":
    """Return the constitution that the flags name.

    Raises:
        InputError: when it cannot be read, or the world's demonstrators know none of its principles.
    """
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
    """Return whether every principle has a preference question, by which a judge could compare answers."""
    return all(principle.preference for principle in constitution.principles)


def flags_for_all(model_args: "ModelConfig") -> list[str]:
    """Return the flags of the user's model that hold in every run."""
    return _given(model_args, HOLD_FOR_ALL)


def flags_of_adapter(model_args: "ModelConfig") -> list[str]:
    """Return the flags of the adapter that the first run trains and the others continue."""
    if not model_args.use_peft:
        return []
    return _given(model_args, (*ADAPTER, *(each.name for each in fields(model_args) if _describes_lora(each.name))))


def _describes_lora(flag: str) -> bool:
    # Each run sets the task of its own adapter.
    return flag.startswith("lora_") and flag != "lora_task_type"


def _given(model_args: "ModelConfig", flags: Sequence[str]) -> list[str]:
    """Return those of the flags that are not at their defaults, as words of a command line."""
    words: list[str] = []
    for each in fields(model_args):
        value: Any = getattr(model_args, each.name)
        if each.name in flags and value is not None and value != each.default:
            words.append(f"--{each.name}")
            words += map(str, value) if isinstance(value, list) else [str(value)]
    return words


def data_file(script_args: ConstitutionArguments, name: str) -> Path:
    """Return the file of a run's rows."""
    return Path(script_args.output_dir, "data", f"{name}.jsonl")
