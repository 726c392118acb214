"""What to run after a stage: the next command, as one would type it."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfllm.data.sources import WORLD
from hfllm.outputs.files import ADAPTER_CONFIG
from hfllm.outputs.verdict import IS_BETTER, IS_NOT_COMPARED

# Stages that end with a model to talk to.
WITH_ANSWERS = ("rlhf", "distill", "extend", "constitution", "expert_iteration", "ground", "reason", "tools", "vision")
# What they make is not talked to.
WITHOUT_ANSWERS = ("classify", "reward", "label")
# Rows that no earlier stage has written.
YOUR_ROWS = "YOUR_ROWS.jsonl"
FOLLOWED_BY_CHAT = ("convert", "federated", "quantize")


def chat_command(folder: str) -> str:
    """Return the command to talk to a model."""
    return command("chat", folder)


def next_command(stage: str, arguments: Mapping[str, Any], folder: str, decision: str = IS_NOT_COMPARED) -> str:
    """Return the command after a stage; empty where none follows.

    A model that is not better than before is to be talked to before anything is built on it.

    Args:
        stage: the finished stage.
        arguments: its flags.
        folder: of the model that it made.
        decision: of its verdict.
    """
    if stage not in WITHOUT_ANSWERS and stage in _FOLLOWING and decision not in (IS_BETTER, IS_NOT_COMPARED):
        return chat_command(folder)
    is_adapter = (Path(folder) / ADAPTER_CONFIG).is_file()
    if stage in WITH_ANSWERS or (stage in WITHOUT_ANSWERS[:1]):
        return command("merge", folder, output_dir=f"{folder}-merged") if is_adapter else push_command(folder)
    return _FOLLOWING[stage](arguments, folder) if stage in _FOLLOWING else ""


def push_command(folder: str) -> str:
    """Return the command to publish a model in the user's own account."""
    return command("push", folder, hub_model_id=Path(folder).resolve().name)


def command(recipe: str, model: str | None = None, **flags: str | None) -> str:
    """Return a command of hfllm with its flags, quoted for a shell; flags without a value are left out."""
    named = {"model_name_or_path": model, **flags}
    words = [word for flag, value in named.items() if value for word in (f"--{flag}", shlex.quote(value))]
    if recipe == "chat":
        words = words[1:]
    return " ".join(["hfllm", recipe, *words])


def _data(arguments: Mapping[str, Any], otherwise: str = YOUR_ROWS) -> str | None:
    """Return the dataset of the stage after; `None` for the embedded world, its default."""
    name = arguments.get("dataset_name")
    return None if name == WORLD else otherwise


def _after_sft(arguments: Mapping[str, Any], folder: str) -> str:
    if arguments.get("dataset_name") == WORLD:
        return command("reward", folder)
    # There are no comparisons of its answers yet: people write them.
    return command("label", folder, dataset_name=arguments.get("dataset_name"))


def _after_reward(arguments: Mapping[str, Any], folder: str) -> str:
    # The prompts of the comparisons are prompts for PPO too.
    own = _data(arguments, arguments.get("dataset_name"))
    start = arguments.get("model_name_or_path") or str(Path(folder) / "sft")
    return command("rlhf", start, reward_model_name_or_path=folder, dataset_name=own)


_FOLLOWING = {
    "curate": lambda arguments, folder: command("pretrain", dataset_name=str(Path(folder) / "data")),
    "tokenizer": lambda arguments, folder: command(
        "pretrain", tokenizer_name_or_path=folder, dataset_name=_data(arguments, arguments.get("dataset_name"))
    ),
    "pretrain": lambda arguments, folder: command("sft", folder, dataset_name=_data(arguments)),
    "sft": _after_sft,
    "label": lambda arguments, folder: command(
        "reward", arguments.get("model_name_or_path"), dataset_name=str(Path(folder) / "labels.jsonl")
    ),
    "reward": _after_reward,
    "merge": lambda arguments, folder: push_command(folder),
    **dict.fromkeys(WITH_ANSWERS, lambda arguments, folder: push_command(folder)),
    **dict.fromkeys(FOLLOWED_BY_CHAT, lambda arguments, folder: chat_command(folder)),
}
