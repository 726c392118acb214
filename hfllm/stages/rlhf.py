"""Alignment by PPO: its flags, the stages before it, its prompts, and the parts of its trainer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

from hfllm.data.augmentation import AugmentationArguments
from hfllm.data.loading import RowArguments
from hfllm.errors import InputError, refuse
from hfllm.runs.arguments import changed
from hfllm.runs.chain import Chain, chain_before
from hfllm.runs.flags import RemoteCodeArguments
from hfllm.stages.own_pictures import FreezingArguments
from hfllm.stages.rlhf_tools import NO_TOOLS, PolicyTools
from hfllm.trainers.learning_rate import BatchArguments
from hfllm.trainers.ppo.options import REWARD_TIMEOUT

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import ModelConfig

    from hfllm.rewards.functions import RewardFunction
    from hfllm.rewards.models import RewardEnsemble
    from hfllm.trainers.ppo.config import PPOConfig
    from hfllm.trainers.ppo.trainer import PPOTrainer

Row = Mapping[str, Any]
CALIBRATION_PROMPTS = 256


@dataclass(frozen=True)
class RlhfArguments(RowArguments, AugmentationArguments, BatchArguments, RemoteCodeArguments, FreezingArguments):
    """Prompts, rewards, and the settings of the stages before."""

    reward_model_name_or_path: list[str] | None = field(
        default=None,
        metadata={
            "help": "Sequence-classification model with one label, used as the reward; several form an ensemble."
        },
    )
    num_reward_models: int = field(
        default=1, metadata={"help": "Reward models to train on the same comparisons, when none is named."}
    )
    reward_aggregation: str = field(
        default="worst",
        metadata={"help": "How the scores of an ensemble are combined.", "choices": ["mean", "worst", "uncertainty"]},
    )
    uncertainty_coef: float = field(
        default=1.0, metadata={"help": "Weight of the ensemble's variance with --reward_aggregation uncertainty."}
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions: path/to/file.py:function, exact_match (the final answer is that of the column "
            "answer), thinks (has thoughts and an answer), or gold (the embedded world's)."
        },
    )
    tools: list[str] | None = field(
        default=None,
        metadata={
            "help": "Functions that the policy may call: path/to/file.py:function, calculator, python (docs/tools.md)."
        },
    )
    environment_factory: str | None = field(
        default=None,
        metadata={"help": "Class of environments whose methods the policy may call: path/to/file.py:Class."},
    )
    value_model: str = field(
        default="head",
        metadata={"help": "'head' on the policy's trunk, 'reward' (starts as the reward model), or a model's name."},
    )
    ptx_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Texts for --ptx_coef, as pretrain takes them; 'world' gives as many documents as --num_prompts."
        },
    )
    apply_chat_template: bool = field(
        default=False,
        metadata={"help": "Wrap text prompts as a user's turn of the chat template, as sft does."},
    )
    filter_prompts: bool = field(
        default=False,
        metadata={
            "help": "Leave out prompts that are empty, leave no room for a response or spell the token of a picture, "
            "instead of stopping."
        },
    )
    num_prompts: int = field(default=8192, metadata={"help": "Prompts of the embedded world to sample from."})
    num_eval_prompts: int = field(default=360, metadata={"help": "Held-out prompts, at most this many."})
    pretrain_config: str | None = field(default=None, metadata={"help": "YAML flags of the pretraining stage."})
    sft_config: str | None = field(default=None, metadata={"help": "YAML flags of the fine-tuning stage."})
    reward_config: str | None = field(default=None, metadata={"help": "YAML flags of the reward-model stage."})

    # Other columns go to the reward functions.
    takes_any_column: ClassVar[bool] = True


# ---- the stages before ----


def stages_before(script_args: RlhfArguments, training_args: "PPOConfig", model_args: "ModelConfig") -> Chain:
    """Return the stages whose models are not named: pretraining, fine-tuning and reward models.

    Raises:
        InputError: when one of their configs is wrong.
    """
    own_model, seed = model_args.model_name_or_path, training_args.seed
    # What the policy is to withstand is shown to it, and told apart by the reward model, before.
    augment = {
        name: ["--augment", str(script_args.augment)] if script_args.augment and not config else []
        for name, config in (("sft", script_args.sft_config), ("reward", script_args.reward_config))
    }
    revision = ["--model_revision", model_args.model_revision] if own_model else []
    has_reward = script_args.reward_model_name_or_path or script_args.reward_funcs or script_args.environment_factory
    further = range(1, script_args.num_reward_models)
    return chain_before(
        "rlhf",
        training_args.output_dir,
        seed,
        script_args.world_seed,
        given_models={"sft": own_model},
        configs={
            "pretrain": script_args.pretrain_config,
            "sft": script_args.sft_config,
            "reward": script_args.reward_config,
        },
        more_flags={"sft": augment["sft"], "reward": [*revision, *augment["reward"]]},
        # Members of an ensemble see the same comparisons.
        copies={"reward": [["--seed", str(seed + each), "--comparison_seed", str(seed)] for each in further]},
        skip=["reward"] if has_reward else [],
    )


# ---- what the trainer is built from ----


def checked_functions(script_args: RlhfArguments) -> "list[RewardFunction]":
    """Return the reward functions that `--reward_funcs` names.

    Raises:
        InputError: when one does not exist.
    """
    from hfllm.rewards.functions import load_reward_function

    return [load_reward_function(name) for name in script_args.reward_funcs or []]


def prompt_data(
    script_args: RlhfArguments,
    seed: int,
    functions: "Sequence[RewardFunction]",
    tools: PolicyTools = NO_TOOLS,
    timeout: float = REWARD_TIMEOUT,
) -> tuple[list[Row], list[Row]]:
    """Return training and held-out prompt rows; every reward function is tried on two rows, as with these tools.

    Each function has `timeout` seconds for them.
    """
    from hfllm.data import formats
    from hfllm.data.images import to_picture_prompts
    from hfllm.data.rows import flaw_of_prompt, read_tools
    from hfllm.data.sources import WORLD, folder_of
    from hfllm.data.world.world import World
    from hfllm.stages.user_rows import Mapper, user_rows

    def mapper_of(name: str) -> Mapper:
        read = to_picture_prompts(formats.to_prompt, folder_of(name))

        def mapper(origin: str, row: formats.Row) -> formats.Row:
            row = read(origin, row)
            if script_args.apply_chat_template:
                row["prompt"] = formats.as_messages(row["prompt"])
            if isinstance(row["prompt"], list) and "tools" in row:
                row["tools"] = read_tools(origin, row["tools"])
            return row

        return mapper

    if script_args.dataset_name == WORLD:
        world = World(script_args.world_seed)
        tasks = islice(world.tasks(seed + 2_000_000), script_args.num_prompts)
        train_rows = [task.prompt_row() for task in tasks]
        eval_rows = [task.prompt_row() for task in world.evaluation_tasks(script_args.num_eval_prompts)]
    else:
        settings = {"share": 0.1, "most": script_args.num_eval_prompts, "flaw_of": flaw_of_prompt}
        name, eval_name = script_args.dataset_name, script_args.eval_dataset_name or script_args.dataset_name
        settings["eval_mapper"] = mapper_of(eval_name)
        train_rows, eval_rows = user_rows(script_args, mapper_of(name), seed, **settings)
        # A reward function gets the same columns in each batch.
        names = {name: None for row in (*train_rows, *eval_rows) for name in row}
        shows = any(isinstance(row["prompt"], list) and row.get("images") for row in (*train_rows, *eval_rows))
        refuse(shows and bool(getattr(script_args, "augment", 0)), "--augment", "the prompts have pictures")
        for row in (*train_rows, *eval_rows):
            row |= {name: None for name in names if name not in row}
            if shows:
                # A prompt with pictures is a conversation, and so must the others be.
                row["prompt"] = formats.as_messages(row["prompt"])
    train_rows = augmented(script_args, train_rows, seed, tools.schemas is None)
    _check_gold(script_args, functions, train_rows)
    # Some rewards ask for environments, which begin with the first episode.
    if getattr(script_args, "environment_factory", None) is None:
        _try_functions(functions, train_rows[:2], tools, timeout)
    return train_rows, eval_rows


def augmented(script_args: RowArguments, rows: list[Row], seed: int, may_begin: bool = True) -> list[Row]:
    """Return training prompts, a share `--augment` of them in other forms; a recipe without that flag has none.

    Args:
        may_begin: whether some may end with the beginning of an answer.
    """
    from hfllm.data.augmentation import augmented_prompts, begun_prompts, training_texts

    share = getattr(script_args, "augment", 0.0)
    if not share:
        return rows
    texts = training_texts(script_args.dataset_name)
    rows = augmented_prompts(rows, share, seed, texts)
    return begun_prompts(rows, share, seed, texts) if may_begin else rows


def _check_gold(script_args: RlhfArguments, functions: "Sequence[RewardFunction]", rows: Sequence[Row]) -> None:
    """Refuse the world's exact score on rows without its columns."""
    from hfllm.rewards.functions import GOLD_COLUMNS, GOLD_REWARDS

    source = script_args.dataset_name
    has_gold = all(row.get(column) is not None for row in rows for column in GOLD_COLUMNS)
    for name, function in GOLD_REWARDS.items():
        if function in functions and not has_gold:
            raise InputError(f"--reward_funcs {name}: only the embedded world has it, not {source!r}")


def _try_functions(
    functions: "Sequence[RewardFunction]", rows: Sequence[Row], tools: PolicyTools, timeout: float
) -> None:
    """Call the reward functions as the trainer does: with the dataset's other columns and the ids of a response."""
    from hfllm.data.formats import as_completion
    from hfllm.data.rows import split_beginning
    from hfllm.rewards.functions import BEGINNING, checked_rewards, reward_columns, time_limit

    completions = [as_completion(row["prompt"], "This is a trial response.") for row in rows]
    prompts, begun = map(list, zip(*(split_beginning(row["prompt"]) for row in rows), strict=True))
    columns = {**reward_columns(rows), "completion_ids": [[0, 1, 2, 3, 4]] * len(rows), BEGINNING: begun}
    if tools.schemas is not None:
        columns |= {"action_mask": [[1, 1, 1, 1, 1]] * len(rows), "tools": [tools.schemas] * len(rows)}
    for function in functions:
        with time_limit(function, timeout):
            checked_rewards(function, prompts, completions, **columns)


def ptx_texts(script_args: RlhfArguments, training_args: "PPOConfig") -> "Dataset | None":
    """Return the pretraining texts for the PTX loss, or `None`.

    Raises:
        InputError: for texts without `--ptx_coef`, or the reverse.
    """
    from datasets import Dataset

    from hfllm.data.loading import texts_of
    from hfllm.data.sources import WORLD, HubPart
    from hfllm.data.world.world import World

    name, coefficient = script_args.ptx_dataset_name, training_args.ptx_coef
    if (name is None) != (coefficient == 0):
        raise InputError(f"--ptx_coef {coefficient} and --ptx_dataset_name {name}: give both, or neither")
    if name is None:
        return None
    if name == WORLD:
        texts = World(script_args.world_seed).documents(script_args.num_prompts, training_args.seed)
    else:
        # The split, configuration and revision are those of the prompts.
        texts = list(texts_of(name, HubPart(max_row_bytes=script_args.max_row_bytes)))
    return Dataset.from_dict({"text": texts})


def build_rewards(
    functions: "Sequence[RewardFunction]", names: Sequence[str], script_args: RlhfArguments, model_args: "ModelConfig"
) -> "list[RewardFunction]":
    """Return the reward functions, then the named reward models as one reward (several form an ensemble)."""
    from hfllm.rewards.models import RewardEnsemble, reward_model
    from hfllm.runs.models import load_reward_model
    from hfllm.stages.rlhf_pictures import processing_class_of

    members = [reward_model(load_reward_model(name, model_args), processing_class_of(name)) for name in names]
    if len(members) < 2:
        return [*functions, *members]
    return [*functions, RewardEnsemble(members, script_args.reward_aggregation, script_args.uncertainty_coef)]


def log_gold_reward(
    script_args: RlhfArguments, training_args: "PPOConfig", rewards: "Sequence[RewardFunction]"
) -> "tuple[PPOConfig, list[RewardFunction]]":
    """Add the world's gold reward at weight 0: it is logged, but the policy never sees it."""
    from hfllm.data.sources import WORLD
    from hfllm.rewards.functions import gold_reward

    if script_args.dataset_name != WORLD or gold_reward in rewards:
        return training_args, list(rewards)
    weights = [*(training_args.reward_weights or [1.0] * len(rewards)), 0.0]
    return changed(training_args, reward_weights=weights), [*rewards, gold_reward]


def rates_used(training_args: "PPOConfig", trainer: "PPOTrainer") -> dict[str, float]:
    """Return the learning rates that a trainer uses, for the report, and print those that were chosen for the user."""
    from hfllm.runs.command_line import say

    used = {name: getattr(trainer.args, name) for name in ("learning_rate", "value_learning_rate")}
    used = {name: rate for name, rate in used.items() if rate is not None}
    chosen = [f"{name} {rate:g}" for name, rate in used.items() if getattr(training_args, name) is None]
    if chosen:
        say(f"rlhf: {', '.join(chosen)} by the model's size (docs/ppo.md)")
    return used


def calibrate(ensemble: "RewardEnsemble", trainer: "PPOTrainer", rows: Sequence[Row]) -> None:
    """Normalize the members of an ensemble on responses of the model that training starts from."""
    import torch

    from hfllm.data.formats import as_completion
    from hfllm.data.rows import split_beginning
    from hfllm.models.devices import forked_random
    from hfllm.rewards.functions import reward_columns

    size, texts = trainer.args.local_rollout_batch_size, []
    with forked_random(trainer.args.device):
        torch.manual_seed(trainer.args.seed)
        for first in range(0, len(rows), size):
            ids = trainer.sample(rows[first : first + size])["response_ids"]
            texts += trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
    completions = [as_completion(row["prompt"], text) for row, text in zip(rows, texts, strict=True)]
    prompts = [split_beginning(row["prompt"])[0] for row in rows]
    ensemble.calibrate(prompts, completions, **reward_columns(rows))
