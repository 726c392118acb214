"""Comparisons between a model's own samples, judged by the world's gold (exact) rubric, to train a reward model."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from hfllm.data import formats
from hfllm.data.augmentation import in_another_form
from hfllm.data.sources import Source
from hfllm.data.tokenizer import WORLD_TRAINING, AddedTexts
from hfllm.data.world.demonstrators import preference_rows
from hfllm.data.world.world import Task, World
from hfllm.generation.responses import sample_responses

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Rows = list[Mapping[str, object]]


@dataclass(frozen=True)
class ComparisonSettings:
    """Number of comparisons, their sources, and the quality of their labels.

    Args:
        num_pairs: prompts to compare responses to.
        num_eval_prompts: held-out prompts.
        on_policy_fraction: share of the comparisons between the model's own samples; the rest are demonstrators'.
        num_samples: samples of the model per prompt of that share.
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

    # Its own seed, so that the prompts differ from those of the demonstrations.
    tasks = list(islice(world.tasks(settings.seed + 1_000_000), settings.num_pairs))
    if settings.augment:
        tasks = augmented_tasks(tasks, settings.augment, settings.seed, WORLD_TRAINING)
    held_out = world.evaluation_tasks(settings.num_eval_prompts)
    random.Random(settings.seed).shuffle(held_out)
    # One process samples for all; otherwise processes would train on different comparisons.
    return tuple(broadcast_object_list([compare(tasks, settings.label_noise), compare(held_out, 0.0)]))


def augmented_tasks(tasks: Sequence[Task], share: float, seed: int, texts: AddedTexts) -> list[Task]:
    """Return tasks, a share of them with the question in another form; what it is about and the answer stay."""
    rng = random.Random(f"augment-{seed}")
    return [
        replace(task, instruction=in_another_form(task.instruction, rng, texts)) if rng.random() < share else task
        for task in tasks
    ]
