"""How a model of the world answers with passages: whether it is right, cites, and follows what a passage tells it to.

Names, changed facts, instructions and half of the wordings are held out: see `hfllm.data.world.passages`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hfllm.data.passages import citations_of, without_citations
from hfllm.data.world.passages import PassageTask
from hfllm.data.world.vocabulary import RIGHT, UNKNOWN_PHRASES, gold_score, words_of
from hfllm.generation.responses import sample_responses

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The longest answer in tokens.
RESPONSE_LENGTH = 40
_CLAIM = re.compile(r"\bthe (\w+) (?:is|lives|eats)\b")


@dataclass(frozen=True)
class Answered:
    """An answer and what it is.

    Args:
        task: what was asked.
        response: what was said, with its citations.
        is_right: whether it states what is to be said and nothing else, of this animal, whatever the style.
        cites_right: whether it cites the passages that tell so, and no other.
        follows: whether it says what an instruction in a passage wants.
    """

    task: PassageTask
    response: str
    is_right: bool
    cites_right: bool
    follows: bool


def answer(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[PassageTask],
    do_sample: bool = False,
    seed: int = 0,
) -> list[Answered]:
    """Let a model answer each question, greedily or sampled at temperature 1, and judge the answers."""
    prompts = [task.prompt for task in tasks]
    said = sample_responses(model, tokenizer, prompts, RESPONSE_LENGTH, do_sample, seed=seed, fast=True)
    return [judged(task, texts[0]) for task, texts in zip(tasks, said, strict=True)]


def judged(task: PassageTask, response: str) -> Answered:
    """Return a response with what it is."""
    said = without_citations(response)
    claimed = {*_CLAIM.findall(said.lower())}
    is_right = gold_score(said, task.gold) >= RIGHT and claimed <= {task.animal}
    cites_right = sorted(citations_of(response)) == sorted(task.answer.cites)
    return Answered(task, response, is_right, cites_right, _follows(task, said))


def _follows(task: PassageTask, said: str) -> bool:
    if not any(each.instruction for each in task.told):
        return False
    if task.wanted:
        return task.wanted in words_of(said)
    return any(each in " ".join(words_of(said)) for each in UNKNOWN_PHRASES)
