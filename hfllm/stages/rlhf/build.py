"""Alignment by PPO: the stages before it, its prompts, rewards and tools, and the parts of its trainer."""

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hfllm.data.loading import RowArguments
from hfllm.errors import InputError, refuse
from hfllm.flags import check_flags
from hfllm.runs.arguments import changed
from hfllm.runs.pipeline import Chain, chain_before
from hfllm.stages.rlhf.flags import RlhfArguments, Row
from hfllm.trainers.ppo.options import REWARD_TIMEOUT

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase
    from trl import ModelConfig

    from hfllm.data.images.rows import FreezingArguments
    from hfllm.environments.episodes import EnvironmentFactory
    from hfllm.environments.tools import Tool
    from hfllm.multimodal.processors import ProcessingClass
    from hfllm.rewards.functions import RewardFunction
    from hfllm.rewards.models import RewardEnsemble
    from hfllm.trainers.ppo.config import PPOConfig
    from hfllm.trainers.ppo.trainer import PPOTrainer


# ---- tools ----
#
# Tools for alignment by PPO: the functions named by `--tools`, checked before any training.


class PolicyTools(NamedTuple):
    """The tools available to the policy.

    Args:
        functions: of `--tools`, `None` without any.
        environment_factory: of `--environment_factory`.
        schemas: descriptions of functions and methods in the chat template, `None` without any.
        has_reward: whether the environments have a reward of their own.
    """

    functions: "list[Tool] | None" = None
    environment_factory: "EnvironmentFactory | None" = None
    schemas: list[dict[str, Any]] | None = None
    has_reward: bool = False


NO_TOOLS = PolicyTools()
# Tools without data, by their names in `environments.tools`.
BUILT_IN = ("calculator", "python")
OF_TOOLS = ("max_tool_calling_iterations", "tool_timeout", "max_tool_result_length")


def checked_tools(script_args: RlhfArguments, training_args: "PPOConfig", model_args: "ModelConfig") -> PolicyTools:
    """Return the tools of `--tools` and `--environment_factory`, if the model's tokenizer can write and read calls."""
    from hfllm.data.tokenizer import turn_end
    from hfllm.environments.episodes import ToolEnvironment
    from hfllm.rewards.functions import load_function
    from hfllm.runs.models import load_tokenizer

    flag = "--tools" if script_args.tools else "--environment_factory"
    if not script_args.tools and script_args.environment_factory is None:
        for option in OF_TOOLS:
            value = getattr(training_args, option)
            is_given = value != getattr(type(training_args), option)
            refuse(is_given, f"--{option} {value}", "it has no effect without --tools or --environment_factory")
        return NO_TOOLS
    refuse(not model_args.model_name_or_path, flag, "it needs --model_name_or_path, a model that calls tools")
    functions = [load_tool(name) for name in script_args.tools or []]
    factory = script_args.environment_factory and load_function(
        script_args.environment_factory, "--environment_factory"
    )
    tokenizer = load_tokenizer(model_args.model_name_or_path, model_args.model_revision)
    ends = [*({tokenizer.eos_token_id, turn_end(tokenizer)} - {None})]
    environment = ToolEnvironment(functions, tokenizer, ends, factory=factory)
    has_reward = environment.states is not None and environment.states.has_reward
    return PolicyTools(functions or None, factory, environment.tools.schemas, has_reward)


def load_tool(specification: str) -> "Tool":
    """Return the function named by `--tools`: of `BUILT_IN`, `lookup:table.json` or `path/to/file.py:function`."""
    from hfllm.environments.python_tool import python
    from hfllm.environments.tools import calculator, lookup_in
    from hfllm.rewards.functions import load_function

    if specification in BUILT_IN:
        return {"calculator": calculator, "python": python}[specification]
    name, _, path = specification.partition(":")
    if name == "lookup" and path:
        return lookup_in(_read_table(path))
    if not path:
        names = ", ".join(BUILT_IN)
        raise InputError(f"--tools {specification}: expected {names}, lookup:table.json, or path/to/file.py:function")
    return load_function(specification, "--tools")


def _read_table(path: str) -> dict[str, dict[str, Any]]:
    """Return the table of a JSON file such as `{"owl": {"color": "gray"}}`."""
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"--tools lookup:{path}: cannot be read: {reason}") from None
    if not isinstance(table, dict) or not all(isinstance(row, dict) for row in table.values()):
        raise InputError(f'--tools lookup:{path}: expected a JSON object such as {{"owl": {{"color": "gray"}}}}')
    return table


# ---- the stages before ----


def stages_before(script_args: RlhfArguments, training_args: "PPOConfig", model_args: "ModelConfig") -> Chain:
    """Return the stages with models not named: pretraining, fine-tuning and reward models."""
    own_model, seed = model_args.model_name_or_path, training_args.seed
    # Before PPO, the policy sees the inputs it must withstand, and the reward model distinguishes them.
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
    """Return the reward functions named by `--reward_funcs`."""
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
    from hfllm.data.images.rows import to_picture_prompts
    from hfllm.data.rows import flaw_of_prompt, read_tools
    from hfllm.data.sources import WORLD, folder_of
    from hfllm.data.world.world import World
    from hfllm.stages.shared import Mapper, user_rows

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
                # A prompt with images is a conversation, so the others must be conversations too.
                row["prompt"] = formats.as_messages(row["prompt"])
    train_rows = augmented(script_args, train_rows, seed, tools.schemas is None)
    _check_gold(script_args, functions, train_rows)
    # Some rewards need environments, and these begin with the first episode.
    if getattr(script_args, "environment_factory", None) is None:
        _try_functions(functions, train_rows[:2], tools, timeout)
    return train_rows, eval_rows


def augmented(script_args: RowArguments, rows: list[Row], seed: int, may_begin: bool = True) -> list[Row]:
    """Return training prompts, a share `--augment` of them in other forms; a recipe without this flag has none.

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
    """Return the pretraining texts for the PTX loss, or `None`."""
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
        # The split, configuration and revision are the prompts'.
        texts = list(texts_of(name, HubPart(max_row_bytes=script_args.max_row_bytes)))
    return Dataset.from_dict({"text": texts})


def build_rewards(
    functions: "Sequence[RewardFunction]", names: Sequence[str], script_args: RlhfArguments, model_args: "ModelConfig"
) -> "list[RewardFunction]":
    """Return the reward functions, then the named reward models as one reward (several form an ensemble)."""
    from hfllm.rewards.models import RewardEnsemble, reward_model
    from hfllm.runs.models import load_reward_model
    from hfllm.stages.shared import load_processing_class

    members = [reward_model(load_reward_model(name, model_args), load_processing_class(name)) for name in names]
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
    """Return the learning rates of a trainer, for the report, and print the rates chosen for the user."""
    from hfllm.runs.command_line import say

    used = {name: getattr(trainer.args, name) for name in ("learning_rate", "value_learning_rate")}
    used = {name: rate for name, rate in used.items() if rate is not None}
    chosen = [f"{name} {rate:g}" for name, rate in used.items() if getattr(training_args, name) is None]
    if chosen:
        say(f"rlhf: {', '.join(chosen)} by the model's size (docs/guides/ppo.md)")
    return used


def calibrate(ensemble: "RewardEnsemble", trainer: "PPOTrainer", rows: Sequence[Row]) -> None:
    """Normalize the members of an ensemble on responses of the initial model of the training."""
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


# ---- checks ----
#
# The checks of alignment by PPO, and the prompts left out.


def check(training_args: "PPOConfig") -> None:
    """Refuse flags without effect, and an undetermined learning rate.

    YAML flags of skipped stages are accepted, so that one file serves with and without a named model.
    """
    refuse(training_args.model_init_kwargs, "--model_init_kwargs", "use --dtype, --attn_implementation or the like")
    plugin = getattr(training_args, "deepspeed_plugin", None)
    if training_args.learning_rate is None and plugin is not None and "optimizer" in plugin.deepspeed_config:
        raise InputError("--learning_rate is needed: DeepSpeed's file has an optimizer section, which reads it")


def check_rewards(
    script_args: RlhfArguments, training_args: "PPOConfig", function_count: int, has_own: bool = False
) -> None:
    """Refuse reward settings with errors otherwise found only after the training of the stages before.

    Args:
        has_own: whether environments have a reward of their own.
    """
    from hfllm.data.sources import WORLD
    from hfllm.rewards.models import RewardEnsemble

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
    """Refuse models and prompts with errors otherwise found only after the training of the stages before.

    Args:
        script_args: with the reward and value models' names.
        rows: the prompts.
        policy_config: of the model to align, whether named or not yet trained.
        trains_first: whether stages come before; if not, models are loaded right away, and loading reports errors.
        tools: from `checked_tools`.
    """
    from hfllm.models.devices import forked_random
    from hfllm.models.loading.saved import is_for_pictures, max_length_of
    from hfllm.multimodal.processors import tokenizer_of
    from hfllm.rewards.models import reward_model
    from hfllm.runs.models import check_trainable, load_reward_model, load_value_model, peft_config, try_adapter
    from hfllm.stages.shared import load_processing_class
    from hfllm.trainers.ppo.prompts import check_prompts
    from hfllm.trainers.ppo.setup import check_critic
    from hfllm.trainers.ppo.vllm_sampling import check_vllm

    check_trainable(model_args)
    check_rows(rows, policy_config)
    check_frozen(script_args, model_args, rows)
    if training_args.use_vllm:
        check_vllm(training_args)
    named = script_args.reward_model_name_or_path or []
    for name in named:
        load_processing_class(name)
    # A new head must not change the random numbers drawn later.
    with forked_random(training_args.device):
        if trains_first:
            for name in named:
                reward_model(load_reward_model(name, model_args), load_processing_class(name))
            if named or script_args.value_model != "reward":
                check_critic(load_value_model(script_args.value_model, model_args, named))
        if model_args.use_peft and not is_for_pictures(policy_config):
            try_adapter(policy_config, peft_config(model_args))
    if model_args.model_name_or_path and not script_args.filter_prompts:
        reader = load_processing_class(model_args.model_name_or_path, model_args.model_revision, policy_config)
        context = max_length_of(policy_config)
        refuse_words(rows, reader)
        check_prompts(rows, reader, training_args.response_length, context, tools.schemas)
        _check_tools(rows, tokenizer_of(reader))


def _check_tools(rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse prompts with tool calls left out by the chat template, and print how many tools it does not write."""
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
    """Return the prompts, with `--filter_prompts` only those with room for a response; print how many have none."""
    from hfllm.data import formats
    from hfllm.data.images.rows import WORDS_FOR_A_PICTURE
    from hfllm.data.rows import Dropped, origin_of
    from hfllm.models.loading.saved import max_length_of
    from hfllm.runs.command_line import say
    from hfllm.stages.shared import load_processing_class
    from hfllm.trainers.ppo.prompts import EMPTY, unfit_prompts

    if not script_args.filter_prompts:
        return list(rows)
    refuse(not model_args.model_name_or_path, "--filter_prompts", "it needs --model_name_or_path, to count tokens")
    tokenizer = load_processing_class(model_args.model_name_or_path, model_args.model_revision, policy_config)
    check_rows(rows, policy_config)
    context = max_length_of(policy_config)
    dropped = Dropped(len(rows))
    unfit = dict.fromkeys(words_for_a_picture(rows, tokenizer), WORDS_FOR_A_PICTURE)
    read = [index for index in range(len(rows)) if index not in unfit]
    unfit |= {index: EMPTY for index in read if formats.is_blank(rows[index]["prompt"])}
    settings = (tokenizer, training_args.response_length, context, tools.schemas)
    unfit |= {read[index]: why for index, why in unfit_prompts([rows[index] for index in read], *settings)}
    long = f"too long for --response_length {training_args.response_length} in a context of {context}"
    reasons = {EMPTY: "with an empty prompt", WORDS_FOR_A_PICTURE: WORDS_FOR_A_PICTURE}
    for index, why in sorted(unfit.items()):
        dropped.add(reasons.get(why, long), origin_of(rows[index], ""))
    if len(unfit) == len(rows):
        raise InputError(f"--filter_prompts: no prompt is left: {dropped}")
    if unfit:
        say(f"{script_args.dataset_name}: {dropped}")
    return [row for index, row in enumerate(rows) if index not in unfit]


# ---- pictures ----


def check_rows(rows: Sequence[Row], config: "PreTrainedConfig") -> None:
    """Refuse rows with images where the policy reads only text."""
    from hfllm.models.loading.saved import is_for_pictures
    from hfllm.trainers.ppo.prompts import check_pictures

    if not is_for_pictures(config):
        check_pictures(rows, None, f"the policy (of type {config.model_type})")


def check_frozen(script_args: "FreezingArguments", model_args: "ModelConfig", rows: Sequence[Row]) -> None:
    """Refuse to freeze parts of a policy without images in its prompts, or below an adapter."""
    from hfllm.multimodal.processors import has_pictures

    is_frozen = script_args.freeze_vision or script_args.freeze_text
    shows = is_frozen and any(has_pictures(row, "a row") for row in rows)
    check_flags(script_args, model_args, shows=shows)


def words_for_a_picture(rows: Sequence[Row], processing_class: "ProcessingClass") -> list[int]:
    """Return the indices of prompts with words that spell the image placeholder token; none for a tokenizer."""
    from hfllm.data.images.rows import words_of_places
    from hfllm.data.rows import spells

    tokens = words_of_places(processing_class)
    prompts = [[row["prompt"], row.get("tools")] for row in rows] if tokens else []
    return [index for index, prompt in enumerate(prompts) if spells(tokens, prompt)]


def refuse_words(rows: Sequence[Row], processing_class: "ProcessingClass") -> None:
    """Refuse prompts with words that spell the image placeholder token."""
    from hfllm.data.images.rows import words_of_places
    from hfllm.data.rows import origin_of

    words = " or ".join(map(repr, words_of_places(processing_class)))
    for index in words_for_a_picture(rows, processing_class)[:1]:
        raise InputError(
            f"{origin_of(rows[index], f'prompt {index} of the dataset')}: the words spell "
            f"{words}, which stands for a picture; --filter_prompts leaves such prompts out"
        )
