"""Tools for alignment by PPO: the functions that `--tools` names, checked before anything is trained."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hfllm.errors import InputError, refuse

if TYPE_CHECKING:
    from trl import ModelConfig

    from hfllm.environments.episodes import EnvironmentFactory
    from hfllm.environments.tools import Tool
    from hfllm.stages.rlhf import RlhfArguments
    from hfllm.trainers.ppo.config import PPOConfig


class PolicyTools(NamedTuple):
    """What the policy may call.

    Args:
        functions: of `--tools`, `None` without any.
        environment_factory: of `--environment_factory`.
        schemas: what the chat template shows of functions and methods, `None` without any.
        has_reward: whether the environments have a reward of their own.
    """

    functions: "list[Tool] | None" = None
    environment_factory: "EnvironmentFactory | None" = None
    schemas: list[dict[str, Any]] | None = None
    has_reward: bool = False


NO_TOOLS = PolicyTools()
# Tools that need no data, by their names in `environments.built_in`.
BUILT_IN = ("calculator", "python")
OF_TOOLS = ("max_tool_calling_iterations", "tool_timeout", "max_tool_result_length")


def checked_tools(script_args: "RlhfArguments", training_args: "PPOConfig", model_args: "ModelConfig") -> PolicyTools:
    """Return what `--tools` and `--environment_factory` name, once the model's tokenizer can write and read calls.

    Raises:
        InputError: when one does not exist or is no tool, the model is not named or its chat template has no tools, or
            an option of tools has none.
    """
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
    """Return the function that `--tools` names: one of `BUILT_IN`, `lookup:table.json`, or `path/to/file.py:function`.

    Raises:
        InputError: when it does not exist, or the file does not run.
    """
    from hfllm.environments import tools as built_in
    from hfllm.rewards.functions import load_function

    if specification in BUILT_IN:
        return getattr(built_in, specification)
    name, _, path = specification.partition(":")
    if name == "lookup" and path:
        return built_in.lookup_in(_read_table(path))
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
