"""Find answers in texts: the best span by scores of first and last tokens, and how right it is."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy

from hfllm.data.labelled import Row, Window, check_tokenizer, encode_spans

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# ---- finding spans ----


# Number of first and last tokens of a window tried together.
NUM_BEST = 20


def answer_spans(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    questions: Sequence[str],
    contexts: Sequence[str],
    max_length: int = 384,
    stride: int = 128,
    max_answer_length: int = 30,
    may_be_none: bool = True,
    batch_size: int = 16,
) -> list[str]:
    """Return the answers to the questions as they stand in their contexts, nothing where there is none.

    Args:
        model: with a head for spans, such as `HfllmForQuestionAnswering`.
        tokenizer: a fast one.
        contexts: one per question; long ones are read in windows.
        max_length: tokens of a window with its question.
        stride: shared tokens of two neighboring windows.
        max_answer_length: in tokens.
        may_be_none: whether there may be no answer in a context.
        batch_size: windows in one pass.

    Raises:
        InputError: when a question leaves no room for its context.
        ValueError: when there are more questions than contexts, or the other way round.
    """
    import torch

    from hfllm.models.loading.saved import max_length_of

    check_tokenizer(tokenizer)
    pairs = zip(questions, contexts, strict=True)
    rows = [{"question": question, "context": context, "texts": [], "starts": []} for question, context in pairs]
    length = min(max_length, max_length_of(model.config) or max_length)
    encoded, windows = encode_spans(rows, tokenizer, length, min(stride, length // 3))
    starts, ends = [], []
    with torch.inference_mode():
        for first in range(0, len(encoded), batch_size):
            ids = [torch.tensor(row["input_ids"]) for row in encoded[first : first + batch_size]]
            padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
            lengths = torch.tensor([len(each) for each in ids])
            mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
            output = model(input_ids=padded.to(model.device), attention_mask=mask.to(model.device))
            starts += list(output.start_logits.float().cpu().numpy())
            ends += list(output.end_logits.float().cpu().numpy())
    return best_spans(rows, windows, starts, ends, max_answer_length, may_be_none)


def best_spans(
    rows: Sequence[Row],
    windows: Sequence[Window],
    starts: Sequence[numpy.ndarray],
    ends: Sequence[numpy.ndarray],
    max_answer_length: int = 30,
    may_be_none: bool = True,
) -> list[str]:
    """Return the answer to each row: the span with the largest sum of scores among all of its windows.

    Nothing is said where the end token's own two scores add up to more, in the window where they are least.

    Args:
        rows: with `context`.
        windows: of all rows.
        starts, ends: scores of the windows' tokens, in logits, possibly longer than a window.
        max_answer_length: in tokens.
        may_be_none: whether there may be no answer; else the best span is always said.
    """
    result: list[tuple[float, str]] = [(-numpy.inf, "")] * len(rows)
    none = [numpy.inf] * len(rows)
    for window, start, end in zip(windows, starts, ends, strict=True):
        last = len(window.offsets) - 1
        none[window.row] = min(none[window.row], float(start[last] + end[last]))
        best = _best_of(window, start, end, max_answer_length)
        if best is not None and best[0] > result[window.row][0]:
            score, begin, stop = best
            result[window.row] = (score, rows[window.row]["context"][begin:stop].strip())
    return ["" if may_be_none and none[row] > score else text for row, (score, text) in enumerate(result)]


def _best_of(window: Window, starts: numpy.ndarray, ends: numpy.ndarray, most: int) -> tuple[float, int, int] | None:
    """Return score, begin and end of the best span of a window, from its `NUM_BEST` best first and last tokens."""
    indices = [index for index, offset in enumerate(window.offsets) if offset is not None]
    firsts = sorted(indices, key=lambda index: -starts[index])[:NUM_BEST]
    lasts = sorted(indices, key=lambda index: -ends[index])[:NUM_BEST]
    spans = [
        (float(starts[first] + ends[last]), window.offsets[first][0], window.offsets[last][1])
        for first in firsts
        for last in lasts
        if first <= last < first + most
    ]
    return max(spans, default=None)


# ---- spans ----
#
# Answers as spans of a text, scored as in SQuAD.
#
# Exact match and F1 compare lower-cased words without punctuation and without the articles a, an and the, with the
# best-fitting gold answer (Rajpurkar et al. 2016, arXiv:1606.05250, section 6). Of a question without an answer both
# are 1 where nothing is said (Rajpurkar et al. 2018, arXiv:1806.03822).


_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> list[str]:
    """Return the words compared by SQuAD's script."""
    without_marks = text.lower().translate(_PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", without_marks).split()


def exact_and_f1(answer: str, golds: Sequence[str]) -> tuple[float, float]:
    """Return exact match and F1 of an answer against the best-fitting gold one; none stands for no answer."""
    pairs = [_exact_and_f1(normalized(answer), normalized(gold)) for gold in golds or [""]]
    return max(exact for exact, _ in pairs), max(f1 for _, f1 in pairs)


def _exact_and_f1(answer: list[str], gold: list[str]) -> tuple[float, float]:
    exact = float(answer == gold)
    if not answer or not gold:
        return exact, exact
    same = (Counter(answer) & Counter(gold)).total()
    return exact, 2 * same / (len(answer) + len(gold))
