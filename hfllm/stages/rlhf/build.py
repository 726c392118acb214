"""Alignment by PPO: its prompts, rewards and tools, the parts of its trainer, and the checks of models and prompts."""

import json
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from datasets import Dataset

from hfllm.data import formats
from hfllm.data.augmentation import augmented_prompts, begun_prompts, training_texts
from hfllm.data.conversations import check_written, has_more_than_text
from hfllm.data.formats import Dropped, as_completion, flaw_of_prompt, origin_of, read_tools, spells, split_beginning
from hfllm.data.images.rows import WORDS_FOR_A_PICTURE, to_picture_prompts, words_of_places
from hfllm.data.loading import RowArguments, texts_of
from hfllm.data.sources import WORLD, HubPart, folder_of
from hfllm.data.tokenizer import set_chat_template, turn_end
from hfllm.data.world.world import World
from hfllm.environments.episodes import ToolEnvironment
from hfllm.environments.mcp_tools import MCPTools
from hfllm.environments.python_session import PythonSession
from hfllm.environments.python_tool import python
from hfllm.environments.tools import calculator, lookup_in
from hfllm.errors import InputError, one_line, refuse, refuse_if
from hfllm.flags import changed, check_flags
from hfllm.models.devices import forked_random
from hfllm.models.loading.probes import check_template
from hfllm.models.loading.saved import is_for_pictures, max_length_of
from hfllm.multimodal.composed import freeze
from hfllm.multimodal.processors import has_pictures, tokenizer_of
from hfllm.rewards.calls import RewardCalls, RewardLog
from hfllm.rewards.functions import (
    BEGINNING,
    GOLD_COLUMNS,
    GOLD_REWARDS,
    gold_reward,
    load_function,
    load_reward_function,
    reward_columns,
)
from hfllm.rewards.models import RewardEnsemble
from hfllm.rewards.steps import scoring_model
from hfllm.runs.command_line import say
from hfllm.runs.models import (
    NamedModel,
    check_trainable,
    load_reward_model,
    load_tokenizer,
    load_value_model,
    named_model,
    peft_config,
    try_adapter,
)
from hfllm.stages import shared
from hfllm.stages.rlhf.flags import RlhfArguments, Row
from hfllm.stages.shared import Mapper, load_processing_class, user_rows
from hfllm.trainers.ppo.options import REWARD_TIMEOUT
from hfllm.trainers.ppo.prompts import EMPTY, check_pictures, check_prompts, unfit_prompts
from hfllm.trainers.ppo.setup import check_critic
from hfllm.trainers.ppo.shared_base import AdapterReward, saved_scorer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from trl import ModelConfig

    from hfllm.environments.episodes import EnvironmentFactory
    from hfllm.environments.tools import Tool
    from hfllm.multimodal.processors import ProcessingClass
    from hfllm.rewards.functions import RewardFunction
    from hfllm.trainers.ppo.config import PPOConfig
    from hfllm.trainers.ppo.trainer import PPOTrainer


# ---- tools ----
#
# Tools for alignment by PPO: the functions named by `--tools`, checked before any training.


class PolicyTools(NamedTuple):
    """The tools available to the policy.

    Args:
        functions: of `--tools`, `None` without any.
        environment_factory: of `--environment_factory`, several by their names.
        schemas_of: returns the descriptions of a row's tools for the chat template; `None` without tools.
    """

    functions: "list[Tool] | None" = None
    environment_factory: "EnvironmentFactory | dict[str, EnvironmentFactory] | None" = None
    schemas_of: "Callable[[Row], list[dict[str, Any]]] | None" = None


NO_TOOLS = PolicyTools()
# Tools without data, by their names in `environments.tools`.
BUILT_IN = {"calculator": calculator, "python": python}
ENVIRONMENTS = {"python_session": PythonSession}


def checked_tools(
    script_args: RlhfArguments, model: str | None, revision: str = "main", has_reward: bool = False
) -> PolicyTools:
    """Return the tools named by the flags, if the model's tokenizer can write and read calls.

    Args:
        model: the model's name; tools need one.
        has_reward: whether a reward is named, so that environments need none of their own.
    """
    if not script_args.has_tools:
        return NO_TOOLS
    named = script_args.environment_factory or []
    if script_args.mcp_sessions == "episode":
        functions = load_tools(script_args.tools)
        servers = MCPTools(script_args.mcp_servers, "--mcp_servers")
        factory = servers.environment_factory()
        servers.close()
    else:
        functions, factory = load_tools(script_args.tools, script_args.mcp_servers), _factories(named)
    tokenizer = with_template(load_tokenizer(model, revision), script_args.chat_template_path)
    ends = [*({tokenizer.eos_token_id, turn_end(tokenizer)} - {None})]
    environment = ToolEnvironment(functions, tokenizer, ends, factory=factory)
    if named and not (has_reward or environment.has_rewards):
        words = " ".join(named)
        raise InputError(f"--environment_factory {words} needs a reward: its get_reward, or a flag that names one")
    return PolicyTools(functions or None, factory, environment.schemas_of)


def _factories(named: Sequence[str]) -> "EnvironmentFactory | dict[str, EnvironmentFactory] | None":
    """Return the class named by `--environment_factory`, or several by their names."""
    loaded = {name.rpartition(":")[2]: _factory(name) for name in named}
    refuse_if(len(loaded) < len(named), f"--environment_factory {' '.join(named)}: two have the same name")
    return loaded if len(loaded) > 1 else next(iter(loaded.values()), None)


def _factory(name: str) -> "EnvironmentFactory":
    return ENVIRONMENTS[name] if name in ENVIRONMENTS else load_function(name, "--environment_factory")


def load_tools(names: Sequence[str] | None, mcp_servers: str | None = None) -> "list[Tool]":
    """Return the functions named by `--tools`, and the tools of `--mcp_servers`."""
    return [*map(load_tool, names or ()), *(MCPTools(mcp_servers, "--mcp_servers") if mcp_servers else ())]


def load_tool(specification: str) -> "Tool":
    """Return the function named by `--tools`: of `BUILT_IN`, `lookup:table.json` or `path/to/file.py:function`."""
    if specification in BUILT_IN:
        return BUILT_IN[specification]
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


# ---- what the trainer is built from ----


def checked_functions(names: Sequence[str] | None) -> "list[RewardFunction]":
    """Return the reward functions named by `--reward_funcs`."""
    return list(map(load_reward_function, names or ()))


def prompt_data(
    script_args: RowArguments,
    seed: int,
    functions: "Sequence[RewardFunction]",
    tools: PolicyTools = NO_TOOLS,
    timeout: float = REWARD_TIMEOUT,
) -> tuple[list[Row], list[Row]]:
    """Return training and held-out prompt rows; every reward function is tried on two rows, as with these tools.

    Args:
        script_args: the source of the prompts, their numbers and their form.
        seed: of the world's prompts, of the split, and of the prompts in other forms.
        timeout: seconds for each function.
    """

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

    # A recipe without this flag has no prompts in other forms.
    share = getattr(script_args, "augment", 0.0)
    if script_args.dataset_name == WORLD:
        world = World(script_args.world_seed)
        tasks = islice(world.tasks(seed + 2_000_000), script_args.num_prompts)
        train_rows = [task.prompt_row() for task in tasks]
        eval_rows = [task.prompt_row() for task in world.evaluation_tasks(script_args.num_eval_prompts)]
    else:
        settings = {"share": 0.1, "most": script_args.num_eval_prompts, "flaw_of": flaw_of_prompt}
        name, eval_name = script_args.dataset_name, script_args.eval_dataset_name or script_args.dataset_name
        settings["eval_mapper"] = mapper_of(eval_name)
        train_rows, eval_rows = user_rows(script_args.row_sources, mapper_of(name), seed, **settings)
        # A reward function gets the same columns in each batch.
        names = {name: None for row in (*train_rows, *eval_rows) for name in row}
        shows = any(isinstance(row["prompt"], list) and row.get("images") for row in (*train_rows, *eval_rows))
        refuse(shows and bool(share), "--augment", "the prompts have pictures")
        for row in (*train_rows, *eval_rows):
            row |= {name: None for name in names if name not in row}
            if shows:
                # A prompt with images is a conversation, so the others must be conversations too.
                row["prompt"] = formats.as_messages(row["prompt"])
    train_rows = augmented(train_rows, share, seed, script_args.dataset_name, tools.schemas_of is None)
    _check_gold(script_args.dataset_name, functions, train_rows)
    # Some rewards need environments, and these begin with the first episode.
    if tools.environment_factory is None:
        _try_functions(functions, train_rows[:2], tools, timeout)
    return train_rows, eval_rows


def augmented(rows: list[Row], share: float, seed: int, dataset_name: str, may_begin: bool = True) -> list[Row]:
    """Return training prompts, a share of them in other forms.

    Args:
        share: of the prompts, 0 to 1.
        seed: of the choice of these prompts.
        dataset_name: with the prompts, whose language the added sentences have.
        may_begin: whether some may end with the beginning of an answer.
    """
    if not share:
        return rows
    texts = training_texts(dataset_name)
    rows = augmented_prompts(rows, share, seed, texts)
    return begun_prompts(rows, share, seed, texts) if may_begin else rows


def _check_gold(source: str, functions: "Sequence[RewardFunction]", rows: Sequence[Row]) -> None:
    """Refuse the world's exact score on rows without its columns."""
    has_gold = all(row.get(column) is not None for row in rows for column in GOLD_COLUMNS)
    for name, function in GOLD_REWARDS.items():
        if function in functions and not has_gold:
            raise InputError(f"--reward_funcs {name}: only the embedded world has it, not {source!r}")


def _try_functions(
    functions: "Sequence[RewardFunction]", rows: Sequence[Row], tools: PolicyTools, timeout: float
) -> None:
    """Call the reward functions as the trainer does: with the dataset's other columns and the ids of a response."""
    completions = [as_completion(row["prompt"], "This is a trial response.") for row in rows]
    prompts, begun = map(list, zip(*(split_beginning(row["prompt"]) for row in rows), strict=True))
    columns = {**reward_columns(rows), "completion_ids": [[0, 1, 2, 3, 4]] * len(rows), BEGINNING: begun}
    if tools.schemas_of is not None:
        columns |= {"action_mask": [[1, 1, 1, 1, 1]] * len(rows), "tools": [*map(tools.schemas_of, rows)]}
    RewardCalls(functions, prompts, completions, columns, RewardLog().arguments(), timeout).results()


def ptx_texts(name: str | None, num_documents: int, seed: int, world_seed: int, max_row_bytes: int) -> Dataset | None:
    """Return the pretraining texts for the PTX loss, or `None`.

    Args:
        name: the dataset's; the embedded world has `num_documents` documents drawn by `seed`.
        max_row_bytes: of a row of the user's dataset, see `HubPart`.
    """
    if name is None:
        return None
    if name == WORLD:
        texts = World(world_seed).documents(num_documents, seed)
    else:
        # The split, configuration and revision are the prompts'.
        texts = list(texts_of(name, HubPart(max_row_bytes=max_row_bytes)))
    return Dataset.from_dict({"text": texts})


def load_reward(name: str, like: NamedModel, is_shared: bool = False) -> "RewardFunction":
    """Load a reward model, of answers or of their steps, with its tokenizer or processor.

    Args:
        name: the reward model's.
        like: a model with the same attention, dtype and quantization.
        is_shared: whether it is an adapter of the policy's base, put on it by the trainer.
    """
    if is_shared:
        return AdapterReward(name, load_tokenizer(name))
    return scoring_model(load_reward_model(name, like, may_score_tokens=True), load_processing_class(name))


def load_critic(
    value_model: str, like: NamedModel, reward_models: Sequence[str], is_shared: bool = False
) -> "PreTrainedModel | str | None":
    """Load the critic named by `--value_model`; `None` stands for a new head.

    Args:
        like, reward_models: see `load_value_model`.
        is_shared: whether it is an adapter of the policy's base: its name, for the trainer.
    """
    if not is_shared or value_model == "head":
        return load_value_model(value_model, like, reward_models)
    return reward_models[0] if value_model == "reward" else value_model


def build_rewards(
    functions: "Sequence[RewardFunction]",
    members: "Sequence[RewardFunction]",
    aggregation: str,
    uncertainty_coef: float,
) -> "list[RewardFunction]":
    """Return the reward functions, then the reward models as one reward (several form an ensemble)."""
    if len(members) < 2:
        return [*functions, *members]
    return [*functions, RewardEnsemble(members, aggregation, uncertainty_coef)]


def log_gold_reward(
    args: "PPOConfig", rewards: "Sequence[RewardFunction]", dataset_name: str
) -> "tuple[PPOConfig, list[RewardFunction]]":
    """Add the gold reward to those of the world's prompts at weight 0: it is logged, but the policy never sees it.

    Args:
        args: the trainer's.
        dataset_name: the prompts'.
    """
    if dataset_name != WORLD or gold_reward in rewards:
        return args, list(rewards)
    weights = [*(args.reward_weights or [1.0] * len(rewards)), 0.0]
    return changed(args, reward_weights=weights), [*rewards, gold_reward]


def learning_rates(
    trainer: "PPOTrainer", learning_rate: float | None, value_learning_rate: float | None
) -> dict[str, float]:
    """Return the learning rates of a trainer, for the report, and print the rates chosen for the user.

    Args:
        learning_rate: the user's for the policy, if any.
        value_learning_rate: the user's for the critic, if any.
    """
    requested = {"learning_rate": learning_rate, "value_learning_rate": value_learning_rate}
    rates = {name: rate for name in requested if (rate := getattr(trainer.args, name)) is not None}
    chosen = [f"{name} {rate:g}" for name, rate in rates.items() if requested[name] is None]
    if chosen:
        say(f"rlhf: {', '.join(chosen)} by the model's size (docs/guides/ppo.md)")
    return rates


def calibrate(rewards: Sequence[object], trainer: "PPOTrainer", rows: Sequence[Row]) -> None:
    """Normalize the members of ensembles among the rewards on responses of the initial model of the training."""
    for reward in rewards:
        if isinstance(reward, RewardEnsemble):
            _calibrate_ensemble(reward, trainer, rows)


def _calibrate_ensemble(ensemble: RewardEnsemble, trainer: "PPOTrainer", rows: Sequence[Row]) -> None:
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
# The checks of models and prompts, and the prompts left out.


class Room(NamedTuple):
    """What prompts must fit into.

    Args:
        reader: the policy's tokenizer or processor.
        response_length: tokens of a response at most.
        context: tokens of the policy at most, `None` if it has no limit.
        tools: returns the schemas of the policy's tools for a row, part of its prompt.
    """

    reader: "ProcessingClass"
    response_length: int
    context: int | None
    tools: "Callable[[Row], list[dict[str, Any]]] | None" = None


def room_of(
    name: str,
    revision: str,
    config: "PreTrainedConfig",
    response_length: int,
    tools: PolicyTools = NO_TOOLS,
    template: str | None = None,
) -> Room:
    """Return what the prompts of a policy must fit into; its tokenizer or processor is loaded.

    Args:
        config: the policy's.
        response_length: as in `Room`.
        template: of `--chat_template_path`.
    """
    reader = with_template(load_processing_class(name, revision, config), template)
    return Room(reader, response_length, max_length_of(config), tools.schemas_of)


def with_template(reader: "ProcessingClass", template: str | None) -> "ProcessingClass":
    """Return a tokenizer with the template of `--chat_template_path`, `None` for its own.

    Raises:
        InputError: for an unsuitable template, and for a processor, which has its own.
    """
    if template is None:
        return reader
    flag = f"--chat_template_path {template}"
    refuse(tokenizer_of(reader) is not reader, flag, "the model sees: its processor has one")
    try:
        set_chat_template(reader, template)
    except (OSError, ValueError) as error:
        raise InputError(f"{flag}: {one_line(error)}") from None
    if isinstance(reader.chat_template, str):
        check_template(reader.chat_template, f"{flag}: it")
    return reader


def load_policy(
    start: NamedModel, config: "PreTrainedConfig", script_args: RlhfArguments, output_dir: str
) -> "tuple[PreTrainedModel, ProcessingClass]":
    """Load the policy to train with its tokenizer or processor, frozen in part and with another template by the flags.

    Args:
        start: the policy.
        config: of it.
        output_dir: see `load_to_train`.
    """
    policy, reader = shared.load_policy(start, config, output_dir)
    freeze(policy, script_args.freeze_vision, script_args.freeze_text)
    return policy, with_template(reader, script_args.chat_template_path)


def check_models(
    script_args: RlhfArguments,
    training_args: "PPOConfig",
    model_args: "ModelConfig",
    rows: Sequence[Row],
    policy_config: "PreTrainedConfig",
    trains_first: bool,
) -> None:
    """Refuse models with errors otherwise found only after the training of the stages before.

    Args:
        script_args: with the reward and value models' names.
        rows: the prompts.
        policy_config: of the model to align, whether named or not yet trained.
        trains_first: whether stages come before; if not, models are loaded right away, and loading reports errors.
    """
    check_trainable(model_args)
    is_frozen = script_args.freeze_vision or script_args.freeze_text
    shows = is_frozen and any(has_pictures(row, "a row") for row in rows)
    check_flags(script_args, training_args, model_args, shows=shows)
    reward_models = script_args.reward_model_name_or_path or []
    for name in reward_models:
        load_processing_class(name)
        if training_args.shared_base:
            saved_scorer(name)
    # A new head must not change the random numbers drawn later.
    with forked_random(training_args.device):
        if trains_first:
            policy = named_model(model_args)
            for name in reward_models:
                load_reward(name, policy)
            if reward_models or script_args.value_model != "reward":
                check_critic(load_value_model(script_args.value_model, policy, reward_models))
        if model_args.use_peft and not is_for_pictures(policy_config):
            try_adapter(policy_config, peft_config(model_args))


def check_rows(rows: Sequence[Row], config: "PreTrainedConfig") -> None:
    """Refuse rows with images where the policy reads only text."""
    if not is_for_pictures(config):
        check_pictures(rows, None, f"the policy (of type {config.model_type})")


def check_fit(rows: Sequence[Row], room: Room) -> None:
    """Refuse prompts without room for a response, or that spell an image's token, or with tool calls never written."""
    refuse_words(rows, room.reader)
    check_prompts(rows, *room)
    _check_tools(rows, tokenizer_of(room.reader))


def _check_tools(rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse prompts with tool calls left out by the chat template, and print how many tools it does not write."""
    notes = Dropped()
    for row in rows:
        tools, prompt = row.get("tools"), row["prompt"]
        if isinstance(prompt, list) and (tools or has_more_than_text(prompt)):
            text = tokenizer.apply_chat_template(prompt, tools=tools, tokenize=False, add_generation_prompt=True)
            check_written(origin_of(row, "a prompt"), row, prompt, text, notes)
    for note, count in notes.reasons.items():
        say(f"prompts: {count:,} of {len(rows):,} {note}")


def fitting_prompts(rows: Sequence[Row], room: Room, source: str) -> list[Row]:
    """Return the prompts with room for a response, and print how many have none.

    Args:
        source: the dataset's name, for the printed line.
    """
    dropped = Dropped(len(rows))
    unfit = dict.fromkeys(words_for_a_picture(rows, room.reader), WORDS_FOR_A_PICTURE)
    read = [index for index in range(len(rows)) if index not in unfit]
    unfit |= {index: EMPTY for index in read if formats.is_blank(rows[index]["prompt"])}
    unfit |= {read[index]: why for index, why in unfit_prompts([rows[index] for index in read], *room)}
    long = f"too long for --response_length {room.response_length} in a context of {room.context}"
    reasons = {EMPTY: "with an empty prompt", WORDS_FOR_A_PICTURE: WORDS_FOR_A_PICTURE}
    for index, why in sorted(unfit.items()):
        dropped.add(reasons.get(why, long), origin_of(rows[index], ""))
    refuse_if(len(unfit) == len(rows), f"--filter_prompts: no prompt is left: {dropped}")
    if unfit:
        say(f"{source}: {dropped}")
    return [row for index, row in enumerate(rows) if index not in unfit]


def words_for_a_picture(rows: Sequence[Row], processing_class: "ProcessingClass") -> list[int]:
    """Return the indices of prompts with words that spell the image placeholder token; none for a tokenizer."""
    tokens = words_of_places(processing_class)
    prompts = [[row["prompt"], row.get("tools")] for row in rows] if tokens else []
    return [index for index, prompt in enumerate(prompts) if spells(tokens, prompt)]


def refuse_words(rows: Sequence[Row], processing_class: "ProcessingClass") -> None:
    """Refuse prompts with words that spell the image placeholder token."""
    words = " or ".join(map(repr, words_of_places(processing_class)))
    for index in words_for_a_picture(rows, processing_class)[:1]:
        raise InputError(
            f"{origin_of(rows[index], f'prompt {index} of the dataset')}: the words spell "
            f"{words}, which stands for a picture; --filter_prompts leaves such prompts out"
        )
