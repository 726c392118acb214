"""Which of several answers to keep: the first that a passage supports, the best by a reward, that of the majority."""

from collections.abc import Callable, Hashable, Mapping, Sequence

from hfllm.errors import InputError
from hfllm.generation.responses import best_by_reward, majority
from hfllm.grounding.meanings import normalized
from hfllm.grounding.verification import SUPPORTED, Check, Splitter, all_supported, claims_of, verify
from hfllm.outputs.report import mean_of, readable, standard_error

# For each prompt the place of the answer to keep, or `None` to abstain.
Choice = list[int | None]


def first_supported(
    samples: Sequence[Sequence[str]],
    passages: Sequence[Sequence[str]],
    check: Check,
    splitter: Splitter = claims_of,
    threshold: float = SUPPORTED,
) -> Choice:
    """Return for each prompt the place of its first answer that passages support; `None` where they support none.

    Args:
        samples: answers per prompt.
        passages: for each prompt the texts to check against.
        check, splitter, threshold: see `hfllm.grounding.verification.verify`.

    Raises:
        InputError: as `verify`.
    """
    _check_rows(samples, passages=passages)
    flat = [(row, place) for row, answers in enumerate(samples) for place in range(len(answers))]
    claims = verify(
        [samples[row][place] for row, place in flat], [passages[row] for row, _ in flat], check, splitter, threshold
    )
    chosen: Choice = [None] * len(samples)
    for (row, place), said in reversed(list(zip(flat, claims, strict=True))):
        if all_supported(said):
            chosen[row] = place
    return chosen


def best_rewarded(
    prompts: Sequence[str | list], samples: Sequence[Sequence[str | list]], reward: Callable[..., Sequence[float]]
) -> Choice:
    """Return for each prompt the place of the answer that a reward, such as a `RewardModel`, scores highest.

    A reward model scores how an answer is put as much as whether it is true, and the best of many is the one that
    exploits it most: it may lose to greedy decoding. Compare them, see `compare_choices`.

    Args:
        prompts: texts or messages.
        samples: answers per prompt, texts or messages.
        reward: `(prompts, completions) -> numbers`.

    Raises:
        InputError: for a prompt without answers, and scores that are NaN.
    """
    _check_rows(samples, prompts=prompts)
    return [place for place, _ in best_by_reward(prompts, samples, reward)]


def majority_of_meaning(
    samples: Sequence[Sequence[str]], meanings: Sequence[Sequence[Hashable]] | None = None
) -> Choice:
    """Return for each prompt the place of the first answer with the most frequent meaning (self-consistency).

    Args:
        samples: answers per prompt.
        meanings: a label for each; by default their normalized words. Empty answers come last.

    Raises:
        InputError: for a prompt without answers, or meanings that do not match.
    """
    _check_rows(samples, **({} if meanings is None else {"meanings": meanings}))
    chosen: Choice = []
    for row, answers in enumerate(samples):
        labels = [normalized(text) for text in answers] if meanings is None else list(meanings[row])
        if len(labels) != len(answers):
            raise InputError(f"prompt {row + 1} has {len(answers)} answers and {len(labels)} meanings")
        # As `majority` takes them: a text for each meaning, none for an empty answer.
        numbers = {label: str(number) for number, label in enumerate(dict.fromkeys(labels), 1)}
        votes = [numbers[label] if text.strip() else "" for text, label in zip(answers, labels, strict=True)]
        chosen.append(votes.index(majority(votes)[0]))
    return chosen


def compare_choices(
    right: Sequence[Sequence[float]],
    choices: Mapping[str, Sequence[int | None]],
    greedy: Sequence[float] | None = None,
) -> tuple[dict[str, float], list[dict[str, str]]]:
    """Return a report's metrics and table of ways to choose an answer, also where they lose.

    Args:
        right: for each prompt how right each of its samples is, from 0 to 1.
        choices: by their names, such as `first_supported`, `best_rewarded` and `majority_of_meaning` return them.
        greedy: how right the greedy answers are.

    Returns:
        The metrics `NAME_right`, `NAME_wrong` and `NAME_abstained` as shares of all prompts, with `_se` and `_n`;
        besides the choices there are `one_sample`, `greedy` and `best_possible`, the best of all samples. And for each
        way a row of a table, whose last column is the difference to one sample of the same prompt with its error.

    Raises:
        InputError: where these do not match, or are empty.
    """
    if not right or not all(len(row) for row in right):
        raise InputError("to compare choices there must be prompts, each with at least one answer")
    first = [float(row[0]) for row in right]
    ways: dict[str, list[float | None]] = {"one_sample": list(first)}
    if greedy is not None:
        ways["greedy"] = [float(value) for value in greedy]
    for name, choice in choices.items():
        _check_rows(right, **{name: choice})
        for row, (values, place) in enumerate(zip(right, choice, strict=True), 1):
            if place is not None and not 0 <= place < len(values):
                raise InputError(f"{name} chose answer {place} of prompt {row}, which has {len(values)}")
        ways[name] = [None if place is None else float(row[place]) for row, place in zip(right, choice, strict=True)]
    ways["best_possible"] = [float(max(row)) for row in right]
    metrics: dict[str, float] = {}
    table = []
    for name, values in ways.items():
        _check_rows(right, **{name: values})
        scores = [value or 0.0 for value in values]
        parts = {
            "right": scores,
            "wrong": [0.0 if value is None else 1 - value for value in values],
            "abstained": [float(value is None) for value in values],
        }
        for part, numbers in parts.items():
            metrics |= mean_of(f"{name}_{part}", numbers)
        gains = [score - single for score, single in zip(scores, first, strict=True)]
        error = standard_error(gains)
        shown = {part: f"{sum(numbers) / len(numbers):.3f}" for part, numbers in parts.items()}
        gain = f"{sum(gains) / len(gains):+.3f}" + ("" if error is None else f" ± {readable(error, 2)}")
        gain = "" if name == "one_sample" else gain
        table.append({"answer kept": name.replace("_", " "), **shown, "right, against one sample": gain})
    return metrics, table


def _check_rows(samples: Sequence[Sequence[object]], **others: Sequence[object]) -> None:
    for name, other in others.items():
        if len(other) != len(samples):
            raise InputError(f"there are answers to {len(samples)} prompts, and {name} of {len(other)}")
    for number, row in enumerate(samples, 1):
        if not len(row):
            raise InputError(f"prompt {number} has no answers to choose from")
