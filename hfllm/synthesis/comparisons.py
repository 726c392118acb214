"""Comparisons that a model's own samples make, judged by the world's gold rubric: what a reward model learns from."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from hfllm.data import formats
from hfllm.data.sources import Source
from hfllm.data.world.demonstrators import preference_rows
from hfllm.data.world.world import Task, World
from hfllm.generation.responses import sample_responses

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Rows = list[Mapping[str, object]]


@dataclass(frozen=True)
class ComparisonSettings:
    """How many comparisons, between what, and how well they are labeled.

    Args:
        num_pairs: prompts to compare responses to.
        num_eval_prompts: held-out prompts.
        on_policy_fraction: share of the comparisons between the model's own samples; the rest is demonstrators'.
        num_samples: samples of the model for each prompt of that share.
        label_noise: share of wrong labels; held-out labels have none.
        response_length: longest response, in tokens.
        seed: of prompts, samples and labels.
    """

    num_pairs: int
    num_eval_prompts: int
    on_policy_fraction: float
    num_samples: int
    label_noise: float
    response_length: int
    seed: int


def compare_samples(
    world: World, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", settings: ComparisonSettings
) -> tuple[Rows, Rows]:
    """Return training and held-out comparisons, with `prompt`, `chosen` and `rejected` messages.

    InstructGPT collected its comparisons so, between the samples of the model that is to be aligned (Ouyang et al.
    2022, section 3.4): a reward model that knows demonstrators only is soon over-optimized.
    """
    from accelerate.utils import broadcast_object_list

    def compare(tasks: Sequence[Task], noise: float) -> Rows:
        on_policy = round(settings.on_policy_fraction * len(tasks))
        prompts = [task.prompt_row()["prompt"] for task in tasks[:on_policy]]
        sampled = sample_responses(
            *(model, tokenizer, prompts, settings.response_length),
            num_return_sequences=settings.num_samples,
            seed=settings.seed,
            fast=True,
        )
        rows = preference_rows(world, tasks, sampled, noise, settings.seed)
        source = Source(rows, [f"world, comparison {number}" for number in range(1, len(rows) + 1)])
        return formats.convert(source, formats.to_preference)

    # A seed of its own: the prompts are others than those of the demonstrations.
    tasks = list(islice(world.tasks(settings.seed + 1_000_000), settings.num_pairs))
    held_out = world.evaluation_tasks(settings.num_eval_prompts)
    random.Random(settings.seed).shuffle(held_out)
    # One process's samples for all: processes that draw other samples would train on other comparisons.
    return tuple(broadcast_object_list([compare(tasks, settings.label_noise), compare(held_out, 0.0)]))
