"""The data of a packed pretraining run: the rows of each source, their order, and what is masked."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from hfllm.data.loading import mixture_of
from hfllm.data.prepared import Prepared
from hfllm.errors import InputError
from hfllm.stages.pretrain import CHINCHILLA, PretrainArguments

if TYPE_CHECKING:
    import pyarrow
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from hfllm.trainers.pretraining.trainer import BatchPlan

Batch = dict[str, "torch.Tensor"]
Masking = Callable[[Batch, Sequence[int]], Batch]
TOKENS_PER_PARAMETER = 20  # Chinchilla's, Hoffmann et al. 2022, arXiv:2203.15556


def packed_rows(
    script_args: PretrainArguments,
    training_args: "TrainingArguments",
    tokenizer: "PreTrainedTokenizerBase",
    sources: Mapping[str, "Dataset"],
    prepared: Prepared,
) -> "list[Dataset]":
    """Return the packed rows of each source, on disk; one process per machine makes them."""
    from hfllm.data.packing import packed_tables

    def tables(source: "Dataset") -> "Iterator[pyarrow.Table]":
        texts: Iterable[str] = source["text"]
        if script_args.objective == "infilling":
            texts = infilled(texts, tokenizer, script_args.max_length, training_args.seed)
        return packed_tables(texts, tokenizer, script_args.max_length)

    with training_args.main_process_first(desc="packing"):
        return [
            prepared.table(f"rows-{number}", lambda source=source: tables(source))
            for number, source in enumerate(sources.values())
        ]


def plan_of_run(
    script_args: PretrainArguments,
    training_args: "TrainingArguments",
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: "Sequence[Dataset]",
    mask: Masking | None,
) -> "BatchPlan":
    """Return the plan of the run: the sources' rows that each optimizer step learns from, on this process."""
    from hfllm.trainers.pretraining.trainer import BatchPlan, Schedule

    length, processes = script_args.max_length, training_args.world_size
    batch_rows = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps * processes
    weights = [weight for _, weight in mixture_of(script_args)]
    return BatchPlan(
        rows,
        length,
        rows_of_run(script_args, training_args, model, sum(map(len, rows)), batch_rows),
        Schedule.parse(script_args.batch_ramp or batch_rows * length, "--batch_ramp"),
        Schedule.parse(script_args.length_curriculum or length, "--length_curriculum"),
        pad_token_id=tokenizer.pad_token_id,
        seed=training_args.seed if training_args.data_seed is None else training_args.data_seed,
        weights=None if None in weights else weights,
        process=training_args.process_index,
        processes=processes,
        transform=mask,
    )


def rows_of_run(
    script_args: PretrainArguments,
    training_args: "TrainingArguments",
    model: "PreTrainedModel",
    rows: int,
    batch_rows: int,
) -> int:
    """Return how many rows the whole run takes.

    Args:
        rows: of the data.
        batch_rows: rows per optimizer step, over all processes.

    Raises:
        InputError: when they do not fill one batch.
    """
    if script_args.total_tokens == CHINCHILLA:
        wanted = TOKENS_PER_PARAMETER * model.num_parameters() // script_args.max_length
    elif script_args.total_tokens is not None:
        wanted = int(script_args.total_tokens) // script_args.max_length
    elif training_args.max_steps > 0:
        wanted = training_args.max_steps * batch_rows
    else:
        wanted = int(training_args.num_train_epochs * rows)
    if wanted < training_args.world_size:
        raise InputError(
            f"the run has {wanted} row(s) of {script_args.max_length} tokens, fewer than {training_args.world_size} "
            "process(es): more text, --total_tokens or --num_train_epochs, or a smaller --max_length"
        )
    return wanted


def masking(tokenizer: "PreTrainedTokenizerBase", seed: int) -> Masking:
    """Return the function that masks packed rows by row number: the same tokens on any process and at any time.

    Raises:
        InputError: for a tokenizer without a mask token.
    """
    import torch

    from hfllm.data.packing import masked_tokens, seeded_generator

    if tokenizer.mask_token_id is None:
        raise InputError(f"--objective masked: the tokenizer {tokenizer.name_or_path!r} has no mask_token")

    settings = tokenizer.all_special_ids, tokenizer.mask_token_id, len(tokenizer)

    def mask(batch: Batch, numbers: Sequence[int]) -> Batch:
        rows = zip(batch["input_ids"].split(1), numbers, strict=True)
        masked = [masked_tokens(row, *settings, seeded_generator(seed, number)) for row, number in rows]
        ids, labels = map(torch.cat, zip(*masked, strict=True))
        return {**batch, "input_ids": ids, "labels": labels}

    return mask


def infilled(texts: Iterable[str], tokenizer: "PreTrainedTokenizerBase", max_length: int, seed: int) -> Iterator[str]:
    """Yield documents that fit into a row in Code Llama's infilling format, nine of ten; the others as they are.

    Raises:
        InputError: for a tokenizer without the tokens of the format.
    """
    from hfllm.data.packing import check_infilling_tokens, fill_in_the_middle
    from hfllm.data.prepared import windows

    check_infilling_tokens(tokenizer)
    number = 0
    for window in windows(texts, 1000, 1 << 24):
        for text, ids in zip(window, tokenizer(window, add_special_tokens=False)["input_ids"], strict=True):
            # The document token, the four tokens of the format, and those that splitting words may add.
            fits = len(ids) + 12 <= max_length
            yield fill_in_the_middle(text, number, seed) if fits else text
            number += 1
