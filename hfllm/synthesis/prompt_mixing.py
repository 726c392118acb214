"""Mix prompts from two others: questions in no dataset, for a teacher to answer."""

import random
from collections.abc import Sequence
from typing import Any


def mix_prompts(rows: Sequence[dict[str, Any]], share: float, seed: int) -> list[dict[str, Any]]:
    """Return the rows with a share of prompts continued, from some word on, by the end of another row's prompt.

    A student trained on such prompts agrees with its teacher beyond the data's questions: on what determines
    an answer when the words around it change. This is the input mixing of Beyer et al. 2022 (arXiv:2106.05237,
    section 3), for text.

    Args:
        rows: with `prompt`, text or messages, of which the last is changed; rows without one are unchanged.
        share: share of the prompts to mix, from 0 to 1. Their completions no longer fit: a teacher must answer them.
        seed: seed of the choice.

    Returns:
        As many rows in the same order. Both cuts are drawn uniformly over the words; a prompt of which nothing would
        remain is unchanged.
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
