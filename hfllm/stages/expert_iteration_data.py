"""The rows of each round of expert iteration: responses that earn enough, and how many did."""

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm.data.formats import as_completion
from hfllm.data.rows import split_beginning
from hfllm.data.thoughts import thinking_message
from hfllm.errors import InputError
from hfllm.fingerprint import file_fingerprint, fingerprint
from hfllm.generation.responses import sample_responses
from hfllm.outputs.report import write_atomically
from hfllm.runs.command_line import say
from hfllm.runs.identity import model_files
from hfllm.stages.expert_iteration import ExpertIterationArguments, rows_file
from hfllm.trainers.ppo.options import REWARD_TIMEOUT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hfllm.rewards.functions import RewardFunction
    from hfllm.stages.course import Speaking

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Kept:
    """What a round kept.

    Args:
        rows: rows for fine-tuning.
        responses: responses that were sampled.
        right: those with at least the reward that is asked for.
        solved: prompts with at least one of them.
        reward: mean reward of all responses.
    """

    rows: int
    responses: int
    right: int
    solved: int
    reward: float


def rewards_of(
    functions: "Sequence[RewardFunction]",
    rows: Sequence[Row],
    texts: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    timeout: float = REWARD_TIMEOUT,
) -> list[float]:
    """Return the sum of the rewards of a response to each row's prompt; those of tokens or steps are added up.

    Each function has `timeout` seconds, see `time_limit`.
    """
    from hfllm.rewards.functions import BEGINNING, checked_rewards, reward_columns, time_limit

    prompts, begun = map(list, zip(*(split_beginning(row["prompt"]) for row in rows), strict=True))
    completions = [[thinking_message(put + text)] for put, text in zip(begun, texts, strict=True)]
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    columns = {**reward_columns(rows), "completion_ids": ids, BEGINNING: begun}
    total = [0.0] * len(rows)
    for function in functions:
        with time_limit(function, timeout):
            values = checked_rewards(function, prompts, completions, **columns)
        for place, value in enumerate(values):
            total[place] += sum(value) if isinstance(value, list) else value
    return total


def write_round(
    script_args: ExpertIterationArguments,
    name: str,
    rows: Sequence[Row],
    functions: "Sequence[RewardFunction]",
    model: str,
    load: "Callable[[], Speaking]",
    seed: int,
) -> Kept:
    """Sample responses to the rows' prompts, write those that earn enough for fine-tuning, and return the counts.

    A round that was written before, by the same model with the same settings, is read instead.

    Args:
        model: name or folder of the model that samples.
        load: returns it with its tokenizer.

    Raises:
        InputError: when too few prompts have such a response to learn from.
    """
    path = rows_file(script_args, name)
    record = path.with_suffix(".json")
    asked = _description(script_args, rows, model, seed)
    if (before := _read(record)).get("asked") == asked and before.get("rows sha256") == _hash_of(path):
        return Kept(**before["kept"])
    if before:
        say(f"{name}: sampled again: {path} is of another model or other flags, was changed, or is an older hfllm's")
    speaking = load()
    responses = sampled(script_args, speaking, rows, seed, script_args.num_samples, only_ended=True)
    repeated = [row for row, texts in zip(rows, responses, strict=True) for _ in texts]
    texts = [text for each in responses for text in each]
    if not texts:
        raise InputError(f"{name}: no response ends within --response_length {script_args.response_length}")
    rewards = rewards_of(functions, repeated, texts, speaking.tokenizer, script_args.reward_timeout)
    chosen, kept = _chosen(script_args, rows, responses, rewards, seed)
    if kept.solved < 2 or len({str(row["prompt"]) for row in chosen}) < 2:
        raise InputError(
            f"{name}: of {len(rows):,} prompts {kept.solved} have a response with a reward of at least --min_reward "
            f"{script_args.min_reward:g}; fine-tuning needs two. Mean reward {kept.reward:.3g}: more --num_samples, a "
            "lower --min_reward, or a better model to begin with"
        )
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)
    path.parent.mkdir(parents=True, exist_ok=True)
    if _hash_of(path) != _digest(text.encode()):
        write_atomically(path, text)
    written = {"asked": asked, "kept": asdict(kept), "rows sha256": _hash_of(path)}
    write_atomically(record, json.dumps(written, indent=2) + "\n")
    say(
        f"{name}: {kept.right:,} of {kept.responses:,} responses are right, to {kept.solved:,} of {len(rows):,} "
        f"prompts; {kept.rows:,} are learned"
    )
    return kept


def sampled(
    script_args: ExpertIterationArguments,
    speaking: "Speaking",
    rows: Sequence[Row],
    seed: int,
    num_samples: int = 1,
    only_ended: bool = False,
) -> list[list[str]]:
    """Return sampled responses to each row's prompt; with `only_ended` without those that were cut off."""
    return sample_responses(
        *(speaking.model, speaking.tokenizer, [row["prompt"] for row in rows], script_args.response_length),
        num_return_sequences=num_samples,
        batch_size=script_args.batch_size,
        seed=seed,
        only_ended=only_ended,
        fast=True,
        tools=[row.get("tools") for row in rows],
        temperature=script_args.temperature,
    )


def _chosen(
    script_args: ExpertIterationArguments,
    rows: Sequence[Row],
    responses: Sequence[Sequence[str]],
    rewards: Sequence[float],
    seed: int,
) -> tuple[list[dict[str, Any]], Kept]:
    """Return the rows to learn, different responses of each prompt, and the counts."""
    is_right = [reward >= script_args.min_reward for reward in rewards]
    right, mean = sum(is_right), sum(rewards) / max(len(rewards), 1)
    if script_args.shuffle_rewards:
        random.Random(f"expert-iteration-control-{seed}").shuffle(is_right)
    chosen, solved, at = [], 0, 0
    for row, texts in zip(rows, responses, strict=True):
        marks, at = is_right[at : at + len(texts)], at + len(texts)
        # As they were sampled, thoughts and all: a dictionary keeps their order and drops what is said twice.
        kept = list(dict.fromkeys(text for text, mark in zip(texts, marks, strict=True) if mark and text.strip()))
        solved += bool(kept)
        shared = {"tools": row["tools"]} if row.get("tools") else {}
        for text in kept[: script_args.max_kept_per_prompt]:
            prompt, _ = split_beginning(row["prompt"])
            chosen.append({"prompt": prompt, "completion": as_completion(row["prompt"], text), **shared})
    return chosen, Kept(len(chosen), len(is_right), right, solved, mean)


def _description(
    script_args: ExpertIterationArguments, rows: Sequence[Row], model: str, seed: int
) -> dict[str, str | int | float | bool]:
    """Return everything that the rows of a round depend on."""
    names = ("min_reward", "num_samples", "max_kept_per_prompt", "shuffle_rewards", "response_length", "temperature")
    files = model_files(model) if Path(model).is_dir() else []
    functions = [Path(name.rpartition(":")[0]) for name in script_args.reward_funcs or []]
    return {
        **{name: getattr(script_args, name) for name in names},
        "batch_size": script_args.batch_size,
        "seed": seed,
        "model": model,
        "model's files": file_fingerprint(files, dates_large=True),
        "rewards": " ".join(script_args.reward_funcs or []),
        "rewards' files": file_fingerprint(
            (str(place), path) for place, path in enumerate(functions) if path.is_file()
        ),
        "prompts": fingerprint([fingerprint(row, f"prompt {place}") for place, row in enumerate(rows)]),
    }


def _read(record: Path) -> dict[str, Any]:
    try:
        return json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}


def _hash_of(path: Path) -> str:
    return _digest(path.read_bytes()) if path.is_file() else ""


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
