"""The user's own rows of a stage: read, without those that cannot be learned from, and with a held-out part."""

from collections.abc import Callable

from hfllm.data.formats import Row
from hfllm.data.loading import RowArguments, held_out_arguments, load_rows, shared_prompts, split_rows
from hfllm.data.rows import Dropped, flaw_of
from hfllm.errors import InputError
from hfllm.runs.command_line import say

Rows = list[Row]
Flaw = Callable[[Row], str | None]
Mapper = Callable[[str, Row], Row]


def user_rows(
    script_args: RowArguments,
    mapper: Mapper,
    seed: int,
    share: float = 0.05,
    most: int | None = None,
    flaw_of: Flaw = flaw_of,
    eval_mapper: Mapper | None = None,
) -> tuple[Rows, Rows]:
    """Return training and held-out rows of the user's dataset, and say how many are left out and why.

    Args:
        script_args: which datasets.
        mapper: converts a row, given its origin.
        seed: of the split, where the user names no held-out rows.
        share: of the rows to hold out then.
        most: held-out rows at most; by default 256, or all that the user names.
        flaw_of: returns why a row is left out, or `None`.
        eval_mapper: converts the rows that the user names to hold out, where paths in them are relative to
            another folder; by default `mapper` does.

    Raises:
        InputError: when a row cannot be read, or none is left.
    """
    rows = kept_rows(script_args, mapper, flaw_of)
    named = held_out_arguments(script_args)
    if named is None:
        return split_rows(rows, seed, share, 256 if most is None else most)
    eval_rows = kept_rows(named, eval_mapper or mapper, flaw_of)[:most]
    if shared := shared_prompts(rows, eval_rows):
        say(f"{named.dataset_name}: {shared:,} of {len(eval_rows):,} held-out rows have the prompt of a training row")
    return rows, eval_rows


def kept_rows(script_args: RowArguments, mapper: Mapper, flaw_of: Flaw, most: int | None = None) -> Rows:
    """Return the rows of a dataset that can be learned from, and say how many are left out and why.

    Args:
        most: of them at most; what follows is not read. By default all.
    """
    dropped = Dropped()
    rows = load_rows(script_args, mapper, dropped, flaw_of, most)
    if not rows:
        raise InputError(f"{script_args.dataset_name}: no row is left: {dropped}")
    if dropped.count:
        say(f"{script_args.dataset_name}: {dropped}")
    return rows
