"""The embedded world's questions in other words: the same question in a wording that training never sees."""

import random
import re
from dataclasses import replace

from hfllm.data.world.vocabulary import HELD_OUT_PHRASINGS, OPENERS, PHRASINGS
from hfllm.data.world.world import Task


def paraphrase(task: Task, rng: random.Random) -> Task:
    """Return a task with its question in a held-out wording, and the same sentence before it, if any.

    Raises:
        ValueError: for a question in none of the world's wordings.
    """
    opener = next((each for each in OPENERS if task.instruction.startswith(f"{each} ")), "")
    family, slots = _read(task.instruction.removeprefix(opener).strip())
    wording = rng.choice(PHRASINGS[family][-HELD_OUT_PHRASINGS:]).format(**slots)
    return replace(task, instruction=f"{opener} {wording}".strip(), is_new_phrasing=True)


def _read(asked: str) -> tuple[str, dict[str, str]]:
    """Return the family that words a question so, and what stands in the gaps of that wording."""
    found: list[tuple[int, str, dict[str, str]]] = []
    for family, wordings in PHRASINGS.items():
        for wording in wordings:
            parts = re.split(r"\{(\w+)\}", wording)
            # The names of gaps stand at odd places.
            pattern = "".join(f"(?P<{part}>.+)" if at % 2 else re.escape(part) for at, part in enumerate(parts))
            if match := re.fullmatch(pattern, asked):
                found.append((sum(map(len, parts[::2])), family, match.groupdict()))
    if not found:
        raise ValueError(f"{asked!r} is in none of the world's wordings")
    # A wording that says more is meant: "What is a good way to ..." is no "What is 2 plus 3?".
    _, family, slots = max(found, key=lambda each: each[0])
    return family, slots
