"""Responses to the world's tasks, scored exactly by its gold rubric, per family; thoughts do not count."""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

from hfllm.data.thoughts import split_thoughts
from hfllm.data.world.rubric import RIGHT, gold_score
from hfllm.data.world.world import Task
from hfllm.generation.responses import sample_responses

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class JudgedAnswer(TypedDict):
    """An answer to a task of the world, and its gold reward."""

    family: str
    is_new_phrasing: bool
    prompt: str
    response: str
    gold: float


def judge_tasks(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[Task],
    max_new_tokens: int,
    do_sample: bool,
    seed: int = 0,
    num_return_sequences: int = 1,
) -> list[JudgedAnswer]:
    """Answer world tasks and judge the answers: `num_return_sequences` answers per task, in the tasks' order."""
    prompts = [task.prompt_row()["prompt"] for task in tasks]
    answers = sample_responses(model, tokenizer, prompts, max_new_tokens, do_sample, num_return_sequences, seed=seed)
    return [
        {
            "family": task.family,
            "is_new_phrasing": task.is_new_phrasing,
            "prompt": task.question,
            "response": response,
            "gold": gold_score(split_thoughts(response)[1], task.gold),
        }
        for task, responses in zip(tasks, answers, strict=True)
        for response in responses
    ]


def mean_gold(rows: Sequence[JudgedAnswer]) -> float:
    """Return the mean gold reward of judged answers; 0 for none."""
    return sum(row["gold"] for row in rows) / max(len(rows), 1)


def right_share(rows: Sequence[JudgedAnswer]) -> float:
    """Return the share of judged answers that are right, regardless of style."""
    return sum(row["gold"] >= RIGHT for row in rows) / max(len(rows), 1)


def by_group(rows: Sequence[JudgedAnswer]) -> dict[str, list[JudgedAnswer]]:
    """Return judged answers all together, on known and held-out phrasings, and per family."""
    groups: dict[str, list[JudgedAnswer]] = defaultdict(list)
    for row in rows:
        groups["all"].append(row)
        groups["held-out phrasings" if row["is_new_phrasing"] else "held-out instances"].append(row)
    for row in rows:
        groups[row["family"]].append(row)
    return dict(groups)


def gold_by_group(rows: Sequence[JudgedAnswer]) -> dict[str, float]:
    """Return the mean gold reward overall, on known and held-out phrasings, and per family."""
    return {name: mean_gold(group) for name, group in by_group(rows).items()}
