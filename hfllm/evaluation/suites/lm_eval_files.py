"""Functions that the shipped YAML tasks of lm-eval name: they read rows of local files, and judge what was said."""

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

# Seconds that a program of HumanEval may run.
SECONDS = 10.0


def arc(rows: "Dataset") -> "Dataset":
    """Return ARC's questions with `question`, `choices` and `gold`, from rows that instruct to choose an answer."""
    return rows.map(_arc, remove_columns=rows.column_names)


def _arc(row: Mapping[str, Any]) -> dict[str, Any]:
    question, _, rest = row["instruction"].partition("question: ")[2].partition("\n\n")
    listed = rest.partition("\n\nAnswer format")[0]
    choices = [each.strip() for each in re.split(r"\s*Answer\d+: ", listed) if each.strip()]
    return {"question": question.strip(), "choices": choices, "gold": int(row["answer"].removeprefix("answer")) - 1}


def gsm8k(rows: "Dataset") -> "Dataset":
    """Return GSM8K's questions with `gold`, the number after `####`, without commas."""
    return rows.map(lambda row: {"gold": row["answer"].split("####")[-1].strip().replace(",", "")})


def humaneval(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return whether the function that a model has completed passes its tests, in a process of its own."""
    from hfllm.environments.python_tool import CodeError, python_within

    # A program that ends before its tests has passed none: what is said after them cannot be guessed.
    passed = secrets.token_hex(8)
    program = f"{doc['prompt']}{results[0]}\n\n{doc['test']}\n\ncheck({doc['entry_point']})\nprint({passed!r})\n"
    try:
        printed = python_within(SECONDS)(program)
    except CodeError:
        return {"pass_at_1": 0.0}
    return {"pass_at_1": float(printed.rstrip().endswith(passed))}


def gsm8k_right(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return whether the number after `####`, or else the last one, of what a model wrote is the right one."""
    marked = re.findall(r"####\s*(-?[\d,.]+)", results[0])
    numbers = marked[:1] or re.findall(r"-?\d[\d,]*(?:\.\d+)?", results[0])[-1:]
    said = numbers[0].replace(",", "").rstrip(".") if numbers else ""
    return {"exact_match": float(said == doc["gold"])}
