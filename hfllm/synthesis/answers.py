"""Answers for training: a model's own samples compared by gold, a teacher's answers, and mixed prompts."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from hfllm.data import formats
from hfllm.data.augmentation import WORLD_TRAINING, AddedTexts, begun_prompts, in_another_form
from hfllm.data.formats import as_completion, split_beginning
from hfllm.data.sources import Source
from hfllm.data.tokenizer import tokenize_prompts
from hfllm.data.world.demonstrators import preference_rows
from hfllm.data.world.world import Task, World
from hfllm.errors import InputError
from hfllm.generation import responses
from hfllm.generation.responses import sample_responses
from hfllm.models.loading.saved import max_length_of
from hfllm.runs.command_line import main_process

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# ---- samples compared ----


Rows = list[Mapping[str, object]]


@dataclass(frozen=True)
class ComparisonSettings:
    """Number of comparisons, their sources, and the quality of their labels.

    Args:
        num_pairs: prompts to compare responses to.
        num_eval_prompts: held-out prompts.
        on_policy_fraction: share of the comparisons between the model's own samples; the rest are demonstrators'.
        num_samples: samples of the model per prompt of this share.
        label_noise: share of wrong labels; held-out labels have none.
        response_length: longest response, in tokens.
        seed: seed of prompts, samples and labels.
        augment: share of the questions in another form, see `hfllm.data.augmentation`; held-out ones are as they are.
    """

    num_pairs: int
    num_eval_prompts: int
    on_policy_fraction: float
    num_samples: int
    label_noise: float
    response_length: int
    seed: int
    augment: float = 0.0


def compare_samples(
    world: World, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", settings: ComparisonSettings
) -> tuple[Rows, Rows]:
    """Return training and held-out comparisons, with `prompt`, `chosen` and `rejected` messages.

    InstructGPT also collected comparisons between samples of the model to align (Ouyang et al.
    2022, section 3.4): a reward model trained only on demonstrators is soon over-optimized.
    """
    from accelerate.utils import broadcast_object_list

    def compare(tasks: Sequence[Task], noise: float, begun: float = 0.0) -> Rows:
        on_policy = round(settings.on_policy_fraction * len(tasks))
        rows = [task.prompt_row() for task in tasks]
        if begun:
            rows = begun_prompts(rows, begun, settings.seed, WORLD_TRAINING)
        prompts = [row["prompt"] for row in rows]
        sampled = sample_responses(
            *(model, tokenizer, prompts[:on_policy], settings.response_length),
            num_return_sequences=settings.num_samples,
            seed=settings.seed,
        )
        beginnings = [split_beginning(prompt)[1] for prompt in prompts] if begun else ()
        rows = preference_rows(world, tasks, sampled, noise, settings.seed, beginnings=beginnings)
        source = Source(rows, [f"world, comparison {number}" for number in range(1, len(rows) + 1)])
        return formats.convert(source, formats.to_preference)

    # Its own seed, so the prompts differ from the demonstrations' prompts.
    tasks = list(islice(world.tasks(settings.seed + 1_000_000), settings.num_pairs))
    if settings.augment:
        tasks = augmented_tasks(tasks, settings.augment, settings.seed, WORLD_TRAINING)
    held_out = world.evaluation_tasks(settings.num_eval_prompts)
    random.Random(settings.seed).shuffle(held_out)
    # One process samples for all; otherwise processes would train on different comparisons.
    both = [compare(tasks, settings.label_noise, settings.augment), compare(held_out, 0.0)]
    return tuple(broadcast_object_list(both))


def augmented_tasks(tasks: Sequence[Task], share: float, seed: int, texts: AddedTexts) -> list[Task]:
    """Return tasks, a share of them with the question in another form; its subject and the answer stay."""
    rng = random.Random(f"augment-{seed}")
    return [
        replace(task, instruction=in_another_form(task.instruction, rng, texts)) if rng.random() < share else task
        for task in tasks
    ]


# ---- teacher answers ----
#
# Replace the data's answers by a teacher's, to train a student on.


# Prompts tokenized at a time.
ROWS = 1000


def write_answers(
    teacher: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[dict[str, Any]],
    response_length: int,
    do_sample: bool,
    seed: int,
) -> list[dict[str, Any]]:
    """Return prompts with the teacher's answers in place of the completions, then the texts unchanged.

    Rows are left out if the prompt leaves no room for an answer, or the answer is cut off: cut-off answers would teach
    a student to stop in the middle. Their numbers are printed.

    Args:
        rows: with `prompt`, all text or all messages, whose other columns but `tools` are dropped; or with `text`.
        response_length: longest answer in tokens.
        do_sample: sample at temperature 1; greedy if false.
        seed: seed of the sampling; the caller's random state is not changed.

    Raises:
        InputError: when no prompt has room for an answer, or no answer ends.
    """
    prompt_rows = _with_room(teacher, tokenizer, [row for row in rows if "prompt" in row], response_length)
    prompts, tools = [row["prompt"] for row in prompt_rows], [row.get("tools") for row in prompt_rows]
    settings = {"seed": seed, "only_ended": True, "tools": tools}
    answers = responses.sample_responses(teacher, tokenizer, prompts, response_length, do_sample, **settings)
    written = []
    for prompt, row_tools, ended in zip(prompts, tools, answers, strict=True):
        columns = {"prompt": split_beginning(prompt)[0]} | ({"tools": row_tools} if row_tools else {})
        written += [columns | {"completion": as_completion(prompt, answer)} for answer in ended]
    cut = len(prompts) - len(written)
    if cut and not written:
        raise InputError(f"none of the teacher's answers ends within --response_length {response_length}: allow more")
    if cut and main_process():
        print(f"distill: {cut} of {len(prompts)} answers of the teacher are left out: longer than {response_length}")
    return [*written, *(row for row in rows if "prompt" not in row)]


def _with_room(
    teacher: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: list, response_length: int
) -> list:
    """Return the rows after whose prompt `response_length` tokens fit in the teacher's context."""
    context = max_length_of(teacher.config)
    if context is None or not rows:
        return rows
    limit, shortest, remaining = context - response_length, context, []
    for start in range(0, len(rows), ROWS):
        some = rows[start : start + ROWS]
        tokens = tokenize_prompts([row["prompt"] for row in some], tokenizer, [row.get("tools") for row in some])
        shortest = min(shortest, *map(len, tokens))
        remaining += [row for row, ids in zip(some, tokens, strict=True) if len(ids) <= limit]
    if not remaining:
        raise InputError(
            f"no prompt has room for --response_length {response_length} in the teacher's context of {context} "
            f"tokens: the shortest leaves {context - shortest}"
        )
    if len(remaining) < len(rows) and main_process():
        left_out = len(rows) - len(remaining)
        print(f"distill: {left_out} of {len(rows)} prompts are left out: longer than {limit} tokens")
    return remaining


# ---- prompt mixing ----
#
# Mix prompts from two others: questions in no dataset, for a teacher to answer.


def mix_prompts(rows: Sequence[dict[str, Any]], share: float, seed: int) -> list[dict[str, Any]]:
    """Return the rows with a share of prompts continued, from some word on, by the end of another row's prompt.

    A student trained on such prompts agrees with its teacher beyond the data's questions: on the facts that determine
    an answer when the words around it change. This is the input mixing of Beyer et al. 2022 (arXiv:2106.05237,
    section 3), for text.

    Args:
        rows: with `prompt`, text or messages (the last one is changed); rows without one are unchanged.
        share: share of the prompts to mix, from 0 to 1. Their completions no longer fit: a teacher must answer them.
        seed: seed of the choice.

    Returns:
        As many rows in the same order. Both cuts are drawn uniformly over the words; a prompt that would become empty
        is unchanged.
    """
    rng = random.Random(f"mix-prompts-{seed}")
    pool = [_last_said(row["prompt"]).split(" ") for row in rows if "prompt" in row]
    return [_mixed(row, rng, pool) if "prompt" in row and rng.random() < share else row for row in rows]


def _mixed(row: dict[str, Any], rng: random.Random, pool: list[list[str]]) -> dict[str, Any]:
    prompt = row["prompt"]
    words, other = _last_said(prompt).split(" "), rng.choice(pool)
    text = " ".join([*words[: rng.randint(0, len(words))], *other[rng.randint(0, len(other)) :]])
    if not text.strip():
        return row
    return {**row, "prompt": text if isinstance(prompt, str) else [*prompt[:-1], {**prompt[-1], "content": text}]}


def _last_said(prompt: str | list[dict[str, str]]) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]
