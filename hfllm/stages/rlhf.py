"""Alignment by PPO: its flags, what it refuses, the stages before it, and the parts of its trainer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

from hfllm.data.loading import RowArguments
from hfllm.errors import InputError, refuse
from hfllm.runs.arguments import changed
from hfllm.runs.chain import Chain, chain_before
from hfllm.runs.remote_code import RemoteCodeArguments
from hfllm.stages.rlhf_tools import NO_TOOLS, PolicyTools
from hfllm.trainers.learning_rate import BatchArguments

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase
    from trl import ModelConfig

    from hfllm.rewards.ensembles import RewardEnsemble
    from hfllm.rewards.functions import RewardFunction
    from hfllm.trainers.ppo.config import PPOConfig
    from hfllm.trainers.ppo.trainer import PPOTrainer

Row = Mapping[str, Any]
CALIBRATION_PROMPTS = 256


@dataclass(frozen=True)
class RlhfArguments(RowArguments, BatchArguments, RemoteCodeArguments):
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
        metadata={"help": "Leave out prompts that are empty or leave no room for a response, instead of stopping."},
    )
    num_prompts: int = field(default=8192, metadata={"help": "Prompts of the embedded world to sample from."})
    num_eval_prompts: int = field(default=360, metadata={"help": "Held-out prompts, at most this many."})
    pretrain_config: str | None = field(default=None, metadata={"help": "YAML flags of the pretraining stage."})
    sft_config: str | None = field(default=None, metadata={"help": "YAML flags of the fine-tuning stage."})
    reward_config: str | None = field(default=None, metadata={"help": "YAML flags of the reward-model stage."})

    # Other columns go to the reward functions.
    takes_any_column: ClassVar[bool] = True


# ---- what is refused ----


def check(training_args: "PPOConfig") -> None:
    """Refuse flags that have no effect, and a learning rate that nothing decides.

    YAML flags of stages that do not run are accepted, so that one file serves with and without a named model.

    Raises:
        InputError: naming the flag.
    """
    refuse(training_args.model_init_kwargs, "--model_init_kwargs", "use --dtype, --attn_implementation or the like")
    plugin = getattr(training_args, "deepspeed_plugin", None)
    if training_args.learning_rate is None and plugin is not None and "optimizer" in plugin.deepspeed_config:
        raise InputError("--learning_rate is needed: DeepSpeed's file has an optimizer section, which reads it")


def check_rewards(
    script_args: RlhfArguments, training_args: "PPOConfig", function_count: int, has_own: bool = False
) -> None:
    """Refuse reward settings that would otherwise fail only after the stages before have been trained.

    Args:
        has_own: whether environments have a reward of their own.

    Raises:
        InputError: for a missing reward, a bad `--value_model` or `--reward_weights`, or a bad ensemble.
    """
    from hfllm.data.sources import WORLD
    from hfllm.rewards.ensembles import RewardEnsemble

    named = script_args.reward_model_name_or_path
    if script_args.environment_factory and not (named or function_count or has_own):
        name = script_args.environment_factory
        raise InputError(f"--environment_factory {name} needs a reward: its get_reward, or a flag that names one")
    if not (named or function_count or has_own) and script_args.dataset_name != WORLD:
        raise InputError(
            f"--dataset_name {script_args.dataset_name} needs a reward: --reward_model_name_or_path (train one with "
            "hfllm reward) or --reward_funcs path/to/file.py:function"
        )
    if script_args.value_model == "reward" and script_args.reward_funcs and not named:
        raise InputError("--value_model reward needs a reward model; with --reward_funcs use 'head' or a model's name")
    rewards = function_count + bool(named or not (function_count or has_own))
    weights = training_args.reward_weights
    if weights is not None and len(weights) != rewards:
        raise InputError(f"--reward_weights has {len(weights)} values for {rewards} reward(s)")
    if script_args.reward_aggregation not in RewardEnsemble.AGGREGATIONS:
        raise InputError(
            f"--reward_aggregation {script_args.reward_aggregation!r} is not one of "
            f"{', '.join(RewardEnsemble.AGGREGATIONS)}"
        )
    if script_args.num_reward_models < 1 or (script_args.num_reward_models > 1 and (named or function_count)):
        raise InputError(
            f"--num_reward_models {script_args.num_reward_models}: at least 1, and more only where none is named"
        )


def check_models(
    script_args: RlhfArguments,
    training_args: "PPOConfig",
    model_args: "ModelConfig",
    rows: Sequence[Row],
    policy_config: "PreTrainedConfig",
    trains_first: bool,
    tools: PolicyTools = NO_TOOLS,
) -> None:
    """Refuse models and prompts that would otherwise fail only after the stages before have been trained.

    Args:
        script_args: with the reward and value models' names.
        rows: the prompts.
        policy_config: of the model to align, whether named or not yet trained.
        trains_first: whether stages come before; if not, models are loaded right away, and loading reports errors.
        tools: from `rlhf_tools.checked_tools`.

    Raises:
        InputError: for a reward or value model that cannot be loaded or used, prompts that do not fit the named model,
            an adapter that does not, weights that cannot be trained, or `--use_vllm` without vLLM.
    """
    from hfllm.models.devices import forked_random
    from hfllm.rewards.models import RewardModel
    from hfllm.runs.models import (
        check_trainable,
        load_reward_model,
        load_tokenizer,
        load_value_model,
        max_length_of,
        peft_config,
        try_adapter,
    )
    from hfllm.trainers.ppo.prompts import check_prompts
    from hfllm.trainers.ppo.setup import check_critic
    from hfllm.trainers.ppo.vllm_sampling import check_vllm

    check_trainable(model_args)
    if training_args.use_vllm:
        check_vllm(training_args)
    named = script_args.reward_model_name_or_path or []
    for name in named:
        load_tokenizer(name)
    # A new head must not change the random numbers drawn later.
    with forked_random(training_args.device):
        if trains_first:
            for name in named:
                RewardModel(load_reward_model(name, model_args), load_tokenizer(name))
            if named or script_args.value_model != "reward":
                check_critic(load_value_model(script_args.value_model, model_args, named))
        if model_args.use_peft:
            try_adapter(policy_config, peft_config(model_args))
    if model_args.model_name_or_path and not script_args.filter_prompts:
        tokenizer = load_tokenizer(model_args.model_name_or_path, model_args.model_revision)
        context = max_length_of(policy_config)
        check_prompts(rows, tokenizer, training_args.response_length, context, tools.schemas)
        _check_tools(rows, tokenizer)


def _check_tools(rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse prompts whose calls of tools the chat template leaves out, and say how many tools it does not write."""
    from hfllm.data.conversations import check_written, has_more_than_text
    from hfllm.data.rows import Dropped, origin_of
    from hfllm.runs.command_line import say

    notes = Dropped()
    for row in rows:
        tools, prompt = row.get("tools"), row["prompt"]
        if isinstance(prompt, list) and (tools or has_more_than_text(prompt)):
            text = tokenizer.apply_chat_template(prompt, tools=tools, tokenize=False, add_generation_prompt=True)
            check_written(origin_of(row, "a prompt"), row, prompt, text, notes)
    for note, count in notes.reasons.items():
        say(f"prompts: {count:,} of {len(rows):,} {note}")


def fitting_prompts(
    script_args: RlhfArguments,
    training_args: "PPOConfig",
    model_args: "ModelConfig",
    rows: Sequence[Row],
    policy_config: "PreTrainedConfig",
    tools: PolicyTools = NO_TOOLS,
) -> list[Row]:
    """Return the prompts; with `--filter_prompts` those that leave room for a response, and say how many do not.

    Raises:
        InputError: when none does, or the model is not named.
    """
    from hfllm.data import formats
    from hfllm.data.rows import Dropped, origin_of
    from hfllm.runs.command_line import say
    from hfllm.runs.models import load_tokenizer, max_length_of
    from hfllm.trainers.ppo.prompts import EMPTY, unfit_prompts

    if not script_args.filter_prompts:
        return list(rows)
    refuse(not model_args.model_name_or_path, "--filter_prompts", "it needs --model_name_or_path, to count tokens")
    tokenizer = load_tokenizer(model_args.model_name_or_path, model_args.model_revision)
    context = max_length_of(policy_config)
    dropped = Dropped(len(rows))
    unfit = {place: EMPTY for place, row in enumerate(rows) if formats.is_blank(row["prompt"])}
    unfit |= dict(unfit_prompts(rows, tokenizer, training_args.response_length, context, tools.schemas))
    for place, why in sorted(unfit.items()):
        long = f"too long for --response_length {training_args.response_length} in a context of {context}"
        dropped.add("with an empty prompt" if why == EMPTY else long, origin_of(rows[place], ""))
    if len(unfit) == len(rows):
        raise InputError(f"--filter_prompts: no prompt is left: {dropped}")
    if unfit:
        say(f"{script_args.dataset_name}: {dropped}")
    return [row for place, row in enumerate(rows) if place not in unfit]


# ---- the stages before ----


def stages_before(script_args: RlhfArguments, training_args: "PPOConfig", model_args: "ModelConfig") -> Chain:
    """Return the stages whose models are not named: pretraining, fine-tuning and reward models.

    Raises:
        InputError: when one of their configs is wrong.
    """
    own_model, seed = model_args.model_name_or_path, training_args.seed
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
        more_flags={"reward": ["--model_revision", model_args.model_revision]} if own_model else {},
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
    script_args: RlhfArguments, seed: int, functions: "Sequence[RewardFunction]", tools: PolicyTools = NO_TOOLS
) -> tuple[list[Row], list[Row]]:
    """Return training and held-out prompt rows; every reward function is tried on two rows, as with these tools."""
    from hfllm.data import formats
    from hfllm.data.messages import read_tools
    from hfllm.data.rows import flaw_of_prompt
    from hfllm.data.sources import WORLD
    from hfllm.data.world.world import World
    from hfllm.stages.user_rows import user_rows

    def mapper(origin: str, row: formats.Row) -> formats.Row:
        row = formats.to_prompt(origin, row)
        if script_args.apply_chat_template:
            row["prompt"] = formats.as_messages(row["prompt"])
        if isinstance(row["prompt"], list) and "tools" in row:
            row["tools"] = read_tools(origin, row["tools"])
        return row

    if script_args.dataset_name == WORLD:
        world = World(script_args.world_seed)
        tasks = islice(world.tasks(seed + 2_000_000), script_args.num_prompts)
        train_rows = [task.prompt_row() for task in tasks]
        eval_rows = [task.prompt_row() for task in world.evaluation_tasks(script_args.num_eval_prompts)]
    else:
        settings = {"share": 0.1, "most": script_args.num_eval_prompts, "flaw_of": flaw_of_prompt}
        train_rows, eval_rows = user_rows(script_args, mapper, seed, **settings)
        # A reward function gets the same columns in each batch.
        names = {name: None for row in (*train_rows, *eval_rows) for name in row}
        for row in (*train_rows, *eval_rows):
            row |= {name: None for name in names if name not in row}
    _check_gold(script_args, functions, train_rows)
    # Some rewards ask for environments, which begin with the first episode.
    if getattr(script_args, "environment_factory", None) is None:
        _try_functions(functions, train_rows[:2], tools)
    return train_rows, eval_rows


def _check_gold(script_args: RlhfArguments, functions: "Sequence[RewardFunction]", rows: Sequence[Row]) -> None:
    """Refuse the world's exact score on rows without its columns."""
    from hfllm.rewards.functions import GOLD_COLUMNS, GOLD_REWARDS

    source = script_args.dataset_name
    has_gold = all(row.get(column) is not None for row in rows for column in GOLD_COLUMNS)
    for name, function in GOLD_REWARDS.items():
        if function in functions and not has_gold:
            raise InputError(f"--reward_funcs {name}: only the embedded world has it, not {source!r}")


def _try_functions(functions: "Sequence[RewardFunction]", rows: Sequence[Row], tools: PolicyTools) -> None:
    """Call the reward functions as the trainer does: with the dataset's other columns and the ids of a response."""
    from hfllm.data.formats import as_completion
    from hfllm.rewards.functions import checked_rewards, reward_columns

    prompts = [row["prompt"] for row in rows]
    completions = [as_completion(prompt, "This is a trial response.") for prompt in prompts]
    columns = {**reward_columns(rows), "completion_ids": [[0, 1, 2, 3, 4]] * len(rows)}
    if tools.schemas is not None:
        columns |= {"action_mask": [[1, 1, 1, 1, 1]] * len(rows), "tools": [tools.schemas] * len(rows)}
    for function in functions:
        checked_rewards(function, prompts, completions, **columns)


def ptx_texts(script_args: RlhfArguments, training_args: "PPOConfig") -> "Dataset | None":
    """Return the pretraining texts for the PTX loss, or `None`.

    Raises:
        InputError: for texts without `--ptx_coef`, or the reverse.
    """
    from datasets import Dataset

    from hfllm.data.loading import texts_of
    from hfllm.data.sources import WORLD
    from hfllm.data.world.world import World

    name, coefficient = script_args.ptx_dataset_name, training_args.ptx_coef
    if (name is None) != (coefficient == 0):
        raise InputError(f"--ptx_coef {coefficient} and --ptx_dataset_name {name}: give both, or neither")
    if name is None:
        return None
    if name == WORLD:
        texts = World(script_args.world_seed).documents(script_args.num_prompts, training_args.seed)
    else:
        texts = list(texts_of(name))
    return Dataset.from_dict({"text": texts})


def build_rewards(
    functions: "Sequence[RewardFunction]", names: Sequence[str], script_args: RlhfArguments, model_args: "ModelConfig"
) -> "list[RewardFunction]":
    """Return the reward functions, then the named reward models as one reward (several form an ensemble)."""
    from hfllm.rewards.ensembles import RewardEnsemble
    from hfllm.rewards.models import RewardModel
    from hfllm.runs.models import load_reward_model, load_tokenizer

    members = [RewardModel(load_reward_model(name, model_args), load_tokenizer(name)) for name in names]
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
    from hfllm.models.devices import forked_random
    from hfllm.rewards.functions import reward_columns

    size, texts = trainer.args.local_rollout_batch_size, []
    with forked_random(trainer.args.device):
        torch.manual_seed(trainer.args.seed)
        for first in range(0, len(rows), size):
            ids = trainer.sample(rows[first : first + size])["response_ids"]
            texts += trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
    prompts = [row["prompt"] for row in rows]
    completions = [as_completion(*pair) for pair in zip(prompts, texts, strict=True)]
    ensemble.calibrate(prompts, completions, **reward_columns(rows))
