"""The rows of classification, tagging and spans, and their tokens."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hfllm.data import labelled
from hfllm.data.labelled import SPANS, TEXT, Encoded, Row, Window
from hfllm.errors import InputError
from hfllm.runs.command_line import say
from hfllm.stages.classify import ClassifyArguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rows = list[Row]


@dataclass(frozen=True)
class Tokens:
    """Encoded rows, and what tells how they belong to the rows that they are of.

    Args:
        encoded: with `input_ids` and `labels`.
        places: of tagged rows, the token of each word.
        windows: of rows with spans.
        counts: what was cut or split, by name.
    """

    encoded: list[Encoded]
    places: list[list[int]] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


def rows_of(script_args: ClassifyArguments, seed: int) -> tuple[Rows, Rows, list[str]]:
    """Return training rows, held-out rows, and the labels of both.

    Raises:
        InputError: when a row cannot be read, or there are not two labels.
    """
    from hfllm.data.sources import WORLD
    from hfllm.data.world.tasks import labelled_rows
    from hfllm.data.world.world import World
    from hfllm.stages.user_rows import user_rows

    task = script_args.task
    if script_args.dataset_name == WORLD:
        sizes = (script_args.num_examples, script_args.num_eval_examples, seed)
        train, held_out = labelled_rows(World(script_args.world_seed), task, *sizes)
    else:
        reader = labelled.reader_of(task, script_args.class_names)
        most = {"share": script_args.eval_share, "most": script_args.max_eval_samples}
        train, held_out = user_rows(script_args, reader, seed, flaw_of=lambda row: None, **most)
    try:
        labels = labelled.labels_of(task, [*train, *held_out], script_args.class_names)
    except InputError as error:
        raise InputError(f"{script_args.dataset_name}: {error}") from None
    if task == TEXT and (unseen := {row["label"] for row in held_out} - {row["label"] for row in train}):
        names = ", ".join(sorted(unseen))
        say(f"{script_args.dataset_name}: held-out rows have labels that no training row has: {names}")
    return train, held_out, labels


def tokens_of(
    script_args: ClassifyArguments,
    rows: Rows,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    labels: list[str],
    what: str,
) -> Tokens:
    """Return rows as tokens; a line says how many are cut.

    Args:
        max_length: the longest row, in tokens.
        what: what the rows are, for that line.
    """
    from hfllm.data.labelled import encode_spans, encode_texts, encode_words

    if script_args.task == SPANS:
        encoded, windows = encode_spans(rows, tokenizer, max_length, min(script_args.doc_stride, max_length // 3))
        return Tokens(encoded, windows=windows, counts={"windows": len(windows)})
    if script_args.task == TEXT:
        encoded, cut = encode_texts(rows, tokenizer, max_length, labels)
        places, name = [], "cut_rows"
    else:
        encoded, places = encode_words(rows, tokenizer, max_length, labels, script_args.label_token)
        cut, name = sum(place < 0 for row in places for place in row), "cut_words"
    if cut:
        say(f"{what}: {cut:,} {name.removeprefix('cut_')} cut to --max_length {max_length} tokens, or beyond it")
    return Tokens(encoded, places, counts={name: cut} if cut else {})
