"""A language model as judge of one answer at a time: a question that it answers with yes or no."""

from collections.abc import Sequence

from hfllm.evaluation.suites.choices import shares
from hfllm.evaluation.suites.subjects import Subject

YES, NO = "Yes", "No"


def yes_shares(judge: Subject, questions: Sequence[str]) -> list[float | None]:
    """Return how likely a judge says yes rather than no to each question; `None` where one does not fit its context.

    The two words' probabilities are compared and nothing is written, so that every judge replies. How far it can be
    relied on shows in questions whose answer is known: suites ask some beside the others.

    Args:
        judge: with its chat template, or, without, as text that ends in `Answer:`.
    """
    if judge.uses_chat_template:
        asked, words = list(questions), [YES, NO]
    else:
        asked, words = [f"{question}\nAnswer:" for question in questions], [f" {YES}", f" {NO}"]
    names = [f"judged answer {number}" for number in range(1, len(asked) + 1)]
    found = judge.iter_choices(asked, [words] * len(asked), names=names)
    return [None if each is None else shares([number.logprob for number in each])[0] for each in found]
