"""Replace the data's answers by a teacher's, to train a student on."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hfllm.data.formats import as_completion
from hfllm.data.rows import split_beginning
from hfllm.data.tokenizer import tokenize_prompts
from hfllm.errors import InputError
from hfllm.generation import responses
from hfllm.models.loading.saved import max_length_of
from hfllm.runs.command_line import main_process

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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

    Rows are left out if the prompt leaves no room for an answer, or the answer is cut off, from which a student would
    learn to stop in the middle. Their numbers are printed.

    Args:
        rows: with `prompt`, all text or all messages, whose other columns but `tools` are dropped; or with `text`.
        response_length: longest answer in tokens.
        do_sample: sample at temperature 1; greedy if false.
        seed: seed of the sampling; the caller's random state is not changed.

    Raises:
        InputError: when no prompt has room for an answer, or no answer ends.
    """
    asked = _with_room(teacher, tokenizer, [row for row in rows if "prompt" in row], response_length)
    prompts, tools = [row["prompt"] for row in asked], [row.get("tools") for row in asked]
    settings = {"seed": seed, "only_ended": True, "tools": tools}
    answers = responses.sample_responses(teacher, tokenizer, prompts, response_length, do_sample, **settings)
    written = []
    for prompt, shown, ended in zip(prompts, tools, answers, strict=True):
        said = {"prompt": split_beginning(prompt)[0]} | ({"tools": shown} if shown else {})
        written += [said | {"completion": as_completion(prompt, answer)} for answer in ended]
    cut = len(prompts) - len(written)
    if cut and not written:
        raise InputError(f"none of the teacher's answers ends within --response_length {response_length}: allow more")
    if cut and main_process():
        print(f"distill: {cut} of {len(prompts)} answers of the teacher are left out: longer than {response_length}")
    return [*written, *(row for row in rows if "prompt" not in row)]


def _with_room(
    teacher: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", asked: list, response_length: int
) -> list:
    """Return the rows after whose prompt `response_length` tokens fit in the teacher's context."""
    context = max_length_of(teacher.config)
    if context is None or not asked:
        return asked
    limit, shortest, kept = context - response_length, context, []
    for start in range(0, len(asked), ROWS):
        some = asked[start : start + ROWS]
        tokens = tokenize_prompts([row["prompt"] for row in some], tokenizer, [row.get("tools") for row in some])
        shortest = min(shortest, *map(len, tokens))
        kept += [row for row, ids in zip(some, tokens, strict=True) if len(ids) <= limit]
    if not kept:
        raise InputError(
            f"no prompt has room for --response_length {response_length} in the teacher's context of {context} "
            f"tokens: the shortest leaves {context - shortest}"
        )
    if len(kept) < len(asked) and main_process():
        left_out = len(asked) - len(kept)
        print(f"distill: {left_out} of {len(asked)} prompts are left out: longer than {limit} tokens")
    return kept
