"""Tools for alignment by PPO: the functions that `--tools` names, checked before anything is trained."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm.errors import InputError, refuse

if TYPE_CHECKING:
    from trl import ModelConfig

    from hfllm.environments.tools import Tool
    from hfllm.stages.rlhf import RlhfArguments
    from hfllm.trainers.ppo.config import PPOConfig


OF_TOOLS = ("max_tool_calling_iterations", "tool_timeout", "max_tool_result_length")


def checked_tools(
    script_args: "RlhfArguments", training_args: "PPOConfig", model_args: "ModelConfig"
) -> "list[Tool] | None":
    """Return the functions that `--tools` names, once the named model's tokenizer can write and read their calls.

    Raises:
        InputError: when one does not exist or is no tool, the model is not named or its chat template has no tools, or
            an option of tools has none.
    """
    from hfllm.data.tokenizer import turn_end
    from hfllm.environments.tool_environment import ToolEnvironment
    from hfllm.runs.models import load_tokenizer

    if not script_args.tools:
        for flag in OF_TOOLS:
            value = getattr(training_args, flag)
            is_given = value != getattr(type(training_args), flag)
            refuse(is_given, f"--{flag} {value}", "it has no effect without --tools")
        return None
    refuse(not model_args.model_name_or_path, "--tools", "it needs --model_name_or_path, a model that calls tools")
    tools = [load_tool(name) for name in script_args.tools]
    tokenizer = load_tokenizer(model_args.model_name_or_path, model_args.model_revision)
    ToolEnvironment(tools, tokenizer, [*({tokenizer.eos_token_id, turn_end(tokenizer)} - {None})])
    return tools


def load_tool(specification: str) -> "Tool":
    """Return the tool that `--tools` names: `calculator`, `lookup:table.json`, or `path/to/file.py:function`.

    Raises:
        InputError: when the file or the function does not exist, or is none.
    """
    from hfllm.environments.built_in import calculator, lookup_in
    from hfllm.rewards.functions import load_function

    name, _, path = specification.partition(":")
    if specification == "calculator":
        return calculator
    return lookup_in(_read_table(path)) if name == "lookup" else load_function(specification, "--tools")


def _read_table(path: str) -> dict[str, dict[str, Any]]:
    """Return the table of a JSON file such as `{"owl": {"color": "gray"}}`."""
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"--tools lookup:{path}: cannot be read: {reason}") from None
    if not isinstance(table, dict) or not all(isinstance(row, dict) for row in table.values()):
        raise InputError(f'--tools lookup:{path}: expected a JSON object such as {{"owl": {{"color": "gray"}}}}')
    return table


def schemas_of(tools: "Sequence[Tool] | None") -> list[dict[str, Any]] | None:
    """Return what the chat template shows of the tools, `None` without any."""
    from hfllm.environments.tools import ToolBox

    return ToolBox(tools).schemas if tools else None
