"""What to run after a stage: the next command, as one would type it."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from hfllm.data.loading import DataArguments
from hfllm.data.sources import WORLD
from hfllm.outputs.files import ADAPTER_CONFIG
from hfllm.outputs.report import read_report
from hfllm.outputs.verdict import IS_EQUAL, IS_NOT_COMPARED, IS_WORSE

Flags = Mapping[str, Any]
# Stages that end with a model to publish, once it is worth it.
PUBLISHED = (
    *("rlhf", "distill", "extend", "constitution", "expert_iteration", "ground", "reason", "tools", "vision"),
    *("classify", "merge"),
)
# What they make is not talked to.
WITHOUT_ANSWERS = ("classify", "reward", "label", "curate", "tokenizer")
# Rows that no earlier stage has written.
YOUR_ROWS = "YOUR_ROWS.jsonl"
# The part of a dataset that was read.
PART = ("dataset_config", "dataset_train_split", "dataset_revision", "dataset_streaming", "max_samples")


def next_command(
    stage: str, arguments: Flags, folder: str, decision: str = IS_NOT_COMPARED, output_dir: str | None = None
) -> str:
    """Return the command after a stage; empty where none follows.

    A model that is no better than before is to be talked to before anything is built on it.

    Args:
        stage: the finished stage.
        arguments: its flags.
        folder: of the model that it made.
        decision: of its verdict.
        output_dir: the run's folder, which names what is published; by default the model's.
    """
    folder = str(Path(folder))
    if arguments.get("learner") == "reward":
        stage = "reward"
    # Too few items to tell are no reason to stop: whoever has more rows has named them.
    if decision in (IS_WORSE, IS_EQUAL) and stage not in WITHOUT_ANSWERS and stage in (*_FOLLOWING, *PUBLISHED):
        return command("chat", folder)
    if stage in PUBLISHED:
        return _publishing(folder, output_dir)
    return _FOLLOWING[stage](arguments, folder) if stage in _FOLLOWING else ""


def after_chat(folder: str) -> str:
    """Return the command after a conversation with a model that a stage has made here; empty for any other model.

    Whoever has talked to it goes on, whatever the verdict.
    """
    report = read_report(folder)
    if report is None or report["stage"] in WITHOUT_ANSWERS:
        return ""
    following = next_command(report["stage"], report["arguments"], folder)
    return _publishing(folder) if following.startswith("hfllm chat") else following


def _publishing(folder: str, output_dir: str | None = None) -> str:
    """Return the command that publishes a model, or first merges an adapter."""
    if (Path(folder) / ADAPTER_CONFIG).is_file():
        return command("merge", folder, output_dir=f"{folder}-merged")
    return command("push", folder, hub_model_id=Path(output_dir or folder).resolve().name)


def command(recipe: str, model: str | None = None, **flags: object) -> str:
    """Return a command of hfllm with its flags, quoted for a shell; flags without a value are left out."""
    words = [] if model is None else [model] if recipe == "chat" else ["--model_name_or_path", model]
    for flag, value in flags.items():
        if value not in (None, False, ""):
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [f"--{flag}", *map(str, values)]
    return " ".join(["hfllm", recipe, *map(shlex.quote, words)])


def _data(arguments: Flags) -> dict[str, object]:
    """Return the flags of the same dataset for another recipe; none for the embedded world, their default."""
    name = arguments.get("dataset_name")
    if name == WORLD:
        return {}
    defaults = {item.name: item.default for item in fields(DataArguments)}
    part = {flag: arguments.get(flag) for flag in PART if arguments.get(flag) != defaults[flag]}
    prompts = [each for each in arguments.get("column_mapping") or [] if each.startswith("prompt=")]
    return {"dataset_name": name, **part, "column_mapping": prompts or None}


def _after_pretrain(arguments: Flags, folder: str) -> str:
    is_world = arguments.get("dataset_name") == WORLD and not arguments.get("dataset_mixture")
    # A masked model writes nothing: it is for labels.
    recipe = "classify" if arguments.get("objective") == "masked" else "sft"
    return command(recipe, folder, dataset_name=None if is_world else YOUR_ROWS)


def _after_sft(arguments: Flags, folder: str) -> str:
    if arguments.get("dataset_name") == WORLD:
        return command("reward", folder)
    # There are no comparisons of its answers yet: people make them.
    return command("label", folder, **_data(arguments))


def _after_label(arguments: Flags, folder: str) -> str:
    labels = Path(folder) / "labels.jsonl"
    if not labels.is_file() or not labels.stat().st_size:
        return command("label", arguments.get("model_name_or_path"), **_data(arguments), output_dir=folder)
    return command("reward", arguments.get("model_name_or_path") or "YOUR_MODEL", dataset_name=str(labels))


def _after_reward(arguments: Flags, folder: str) -> str:
    start = arguments.get("model_name_or_path") or str(Path(folder) / "sft")
    revision = arguments.get("model_revision")
    named = {"model_revision": None if revision == "main" else revision, "reward_model_name_or_path": folder}
    # The prompts of the comparisons are prompts for PPO too.
    return command(
        "rlhf", start, **named, **_data(arguments), trust_remote_code=arguments.get("trust_remote_code") or None
    )


_FOLLOWING: dict[str, Callable[[Flags, str], str]] = {
    "curate": lambda arguments, folder: command("pretrain", dataset_name=str(Path(folder) / "data")),
    "tokenizer": lambda arguments, folder: command("pretrain", tokenizer_name_or_path=folder, **_data(arguments)),
    "pretrain": _after_pretrain,
    "sft": _after_sft,
    "label": _after_label,
    "reward": _after_reward,
    **dict.fromkeys(("convert", "federated", "quantize"), lambda arguments, folder: command("chat", folder)),
}
