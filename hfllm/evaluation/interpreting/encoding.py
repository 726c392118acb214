"""A `Material` in the tokens of a model, and which of its items the model can be asked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hfllm.evaluation.interpreting.material import Material
from hfllm.evaluation.interpreting.probes import entity_folds, token_halves
from hfllm.evaluation.interpreting.prompts import Fact, FactPrompt, encode_facts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What methods have a figure for.
FACTS, SOME, PAIRS, SUBJECTS, TOLD = UNITS = ("facts", "some", "pairs", "subjects", "told")
# Ways to part subjects into those to learn from and those to test on.
SPLITS = 8
SHARED = "the subject's tokens are in those of others in every way to part them"
NO_SUBJECT = "its tokens do not show where the subject is"
UNEQUAL = "the two prompts have not as many tokens, or the same first token of their values"


@dataclass(frozen=True)
class Prompts:
    """What a model is asked.

    Args:
        facts: those that fit its context.
        some: places among them, for methods that take long.
        pairs: places of two of them whose states can be exchanged.
        subjects: questions about subjects, with `labels` and `splits` for a probe.
        told: questions about passages.
        columns: for each of `UNITS` the item that each figure of a method is of, by its number in the material.
        skipped: for each of them why other items are not asked, by number.
    """

    facts: Sequence[FactPrompt]
    some: Sequence[int]
    pairs: Sequence[tuple[int, int]]
    subjects: Sequence[FactPrompt]
    labels: Sequence[int]
    splits: torch.Tensor
    told: Sequence[FactPrompt]
    columns: Mapping[str, Sequence[int]]
    skipped: Mapping[str, Mapping[int, str]]


def names_of(material: Material) -> dict[str, list[str]]:
    """Return for each of `UNITS` the names of its items, in the order of their numbers."""
    facts = [f"{number} {fact.subject}" for number, fact in enumerate(material.facts, 1)]
    return {
        FACTS: facts,
        SOME: [facts[place] for place in material.some],
        PAIRS: [f"{facts[one]}, {facts[other]}" for one, other in material.pairs],
        SUBJECTS: list(dict.fromkeys(fact.subject for fact, _ in material.subjects)),
        TOLD: [f"{number} {fact.value}" for number, fact in enumerate(material.told, 1)],
    }


def encode_material(
    tokenizer: "PreTrainedTokenizerBase",
    material: Material,
    uses_chat_template: bool,
    max_length: int | None,
    too_long: str,
) -> Prompts:
    """Return a material in tokens, without what is longer than a context.

    Args:
        max_length: the context's, in tokens; `None` for no limit.
        too_long: why an item that is longer is not asked.

    Raises:
        InputError: as `encode_facts` does.
    """

    def encoded(facts: Sequence[Fact]) -> tuple[list[FactPrompt], list[int], dict[int, str]]:
        prompts, kept, skipped = [], [], {}
        for number, prompt in enumerate(encode_facts(tokenizer, facts, uses_chat_template)):
            reason = NO_SUBJECT if not prompt.mentions else ""
            reason = too_long if max_length is not None and len(prompt.ids) > max_length else reason
            if reason:
                skipped[number] = reason
            else:
                prompts.append(prompt)
                kept.append(number)
        return prompts, kept, skipped

    facts, kept, without = encoded(material.facts)
    told, told_kept, told_without = encoded(material.told)
    place = {number: at for at, number in enumerate(kept)}
    some = [number for number, fact in enumerate(material.some) if fact in place]
    pairs, unpaired = [], {}
    for number, (one, other) in enumerate(material.pairs):
        if one not in place or other not in place:
            unpaired[number] = without.get(one) or without[other]
        elif not _can_exchange(facts[place[one]], facts[place[other]]):
            unpaired[number] = UNEQUAL
        else:
            pairs.append(number)
    about = encode_facts(tokenizer, [fact for fact, _ in material.subjects], uses_chat_template)
    subjects, labels, splits = _to_probe(about, [label for _, label in material.subjects])
    names = names_of(material)[SUBJECTS]
    parted = {prompt.fact.subject for prompt in subjects}
    return Prompts(
        facts=facts,
        some=[place[material.some[number]] for number in some],
        pairs=[(place[one], place[other]) for one, other in (material.pairs[number] for number in pairs)],
        subjects=subjects,
        labels=labels,
        splits=splits,
        told=told,
        columns={
            **{FACTS: kept, SOME: some, PAIRS: pairs, TOLD: told_kept},
            # In the order of the material, which is that of the prompts.
            SUBJECTS: [number for number, name in enumerate(names) if name in parted],
        },
        skipped={
            FACTS: without,
            SOME: {number: without[fact] for number, fact in enumerate(material.some) if fact in without},
            PAIRS: unpaired,
            SUBJECTS: {number: SHARED for number, name in enumerate(names) if name not in parted},
            TOLD: told_without,
        },
    )


def _to_probe(
    prompts: Sequence[FactPrompt], labels: Sequence[int]
) -> tuple[list[FactPrompt], list[int], torch.Tensor]:
    """Return the prompts that a probe learns from or is tested on, their labels, and the ways to part them."""
    if not prompts:
        return [], [], torch.zeros(0, 0, dtype=torch.long)
    entities = [prompt.fact.subject for prompt in prompts]
    tokens = [{prompt.ids[place] for place in prompt.subject_places} for prompt in prompts]
    splits = token_halves(tokens, entities, labels, SPLITS)
    if not len(splits):
        splits = entity_folds(entities, labels)
    rows = [row for row, is_in in enumerate((splits >= 0).any(0).tolist()) if is_in]
    return [prompts[row] for row in rows], [labels[row] for row in rows], splits[:, rows]


def _can_exchange(one: FactPrompt, other: FactPrompt) -> bool:
    return len(one.ids) == len(other.ids) and one.mentions == other.mentions and one.value != other.value
