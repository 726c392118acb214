"""Responses to the world's tasks, judged by its gold rubric, family by family."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hfllm.data.world.rubric import RIGHT, gold_reward
from hfllm.data.world.world import Task
from hfllm.generation.responses import sample_responses

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def judge_tasks(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[Task],
    max_new_tokens: int,
    do_sample: bool,
    seed: int = 0,
    num_return_sequences: int = 1,
) -> list[dict[str, Any]]:
    """Answer world tasks and judge the answers.

    Returns:
        `num_return_sequences` rows a task: `family`, `is_new_phrasing`, `prompt`, `response`, `gold`.
    """
    prompts = [task.prompt_row()["prompt"] for task in tasks]
    answers = sample_responses(model, tokenizer, prompts, max_new_tokens, do_sample, num_return_sequences, seed=seed)
    return [
        {
            "family": task.family,
            "is_new_phrasing": task.is_new_phrasing,
            "prompt": task.question,
            "response": response,
            "gold": gold_reward(response, task.gold),
        }
        for task, responses in zip(tasks, answers, strict=True)
        for response in responses
    ]


def mean_gold(rows: Sequence[Mapping[str, Any]]) -> float:
    """Mean gold reward of judged rows; 0 for none."""
    return sum(row["gold"] for row in rows) / max(len(rows), 1)


def right_share(rows: Sequence[Mapping[str, Any]]) -> float:
    """Share of judged rows whose answer is right, however it is put."""
    return sum(row["gold"] >= RIGHT for row in rows) / max(len(rows), 1)


def gold_by_group(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean gold reward in all, on known and held-out phrasings, and of each family."""
    groups: dict[str, list] = defaultdict(list)
    for row in rows:
        groups["all"].append(row)
        groups["held-out phrasings" if row["is_new_phrasing"] else "held-out instances"].append(row)
    for row in rows:
        groups[row["family"]].append(row)
    return {name: mean_gold(group) for name, group in groups.items()}
