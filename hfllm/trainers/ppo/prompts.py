"""Prompts for rollouts, their order, tokens and fit, and pretraining texts mixed in (PTX)."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import ProcessorMixin

from hfllm.data.formats import OriginRow, is_begun, origin_of
from hfllm.data.tokenizer import template_errors, tokenize_prompts
from hfllm.errors import InputError, one_line, refuse_if
from hfllm.multimodal.processors import TOGETHER, ProcessingClass, encode, has_pictures, tokenizer_of, what_is_counted
from hfllm.trainers.ppo.config import PPOConfig

if TYPE_CHECKING:
    from datasets import Dataset as HubDataset
    from transformers import PreTrainedTokenizerBase


# ---- prompts ----


# Of the trainer's tools, or what returns those of a row.
Schemas = Sequence[dict[str, Any]] | Callable[[Mapping[str, Any]], Sequence[dict[str, Any]]]
EMPTY = "is empty"
# Prompts with images whose numbers of tokens are kept.
KEPT_COUNTS = 100_000


class RolloutSampler(Sampler[int]):
    """Sampler of the indices of one rollout after the other, each rollout's block `repeats` times.

    The order depends on `seed` and the epoch only, so a resumed run skips to the right position. A dataset
    without enough prompts for its last rollout starts again from its first prompts.

    Args:
        dataset_size: rows of the dataset.
        rollout_size: prompts of one rollout over all processes.
        repeats: backward passes on one rollout.
        seed: of the shuffling.
        epoch: function returning the current epoch.
        num_generations: how often each prompt occurs in its rollout.
    """

    def __init__(
        self,
        dataset_size: int,
        rollout_size: int,
        repeats: int,
        seed: int,
        epoch: Callable[[], int],
        num_generations: int = 1,
    ):
        self.dataset_size, self.rollout_size, self.repeats = dataset_size, rollout_size, repeats
        self.seed, self.epoch, self.num_generations = seed, epoch, num_generations

    @property
    def rollouts(self) -> int:
        return -(-self.dataset_size * self.num_generations // self.rollout_size)

    def __len__(self) -> int:
        return self.rollouts * self.rollout_size * self.repeats

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch())
        order = torch.randperm(self.dataset_size, generator=generator).tolist()
        for rollout in range(self.rollouts):
            first = rollout * self.rollout_size
            indices = range(first, first + self.rollout_size)
            block = [order[index // self.num_generations % self.dataset_size] for index in indices]
            for _ in range(self.repeats):
                yield from block


class Rows(list):
    """Rows of a dataset as a batch, moved to a device once, however often it is asked for."""

    _placed: "Rows | None" = None

    def to(self, device: torch.device, non_blocking: bool = False) -> "Rows":
        """Return the rows with their tensors, if they have any, on the device."""
        if self._placed is None:
            self._placed = Rows(send_to_device(list(self), device, non_blocking=non_blocking))
        return self._placed


class RolloutRows(Dataset):
    """Dataset that keeps the last requested rows, since every backward pass on a rollout requests the same."""

    def __init__(self, dataset: "HubDataset | Sequence[dict]"):
        self.dataset = dataset
        self._places: list[int] | None = None
        self._rows = Rows()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[index]

    def __getitems__(self, indices: list[int]) -> Rows:
        if indices != self._places:
            together = getattr(self.dataset, "__getitems__", None)
            rows = together(indices) if together is not None else [self.dataset[index] for index in indices]
            self._places, self._rows = list(indices), Rows(rows)
        return self._rows


def _as_it_is(rows: Rows) -> Rows:
    return rows


def check_prompts(
    dataset: "HubDataset | Sequence[dict]",
    tokenizer: ProcessingClass,
    response_length: int,
    context: int | None,
    tools: Schemas | None = None,
    reader: str | None = None,
) -> int:
    """Refuse a dataset without rows, without `prompt`, or with a prompt without room for a response.

    Args:
        tokenizer: with images the model's processor.
        tools: schemas of the trainer's tools, part of all prompts, or what returns those of a row.
        reader: see `check_pictures`.

    Returns:
        The number of prompts with images.
    """
    refuse_if(len(dataset) == 0, "the prompt dataset is empty")
    if "prompt" not in dataset[0]:
        raise InputError(f"the prompt dataset has no column 'prompt'; it has: {', '.join(dataset[0])}")
    if len({isinstance(row["prompt"], str) for row in dataset}) > 1:
        raise InputError("the prompt dataset mixes text prompts and lists of messages: use one format")
    if tools is not None and isinstance(dataset[0]["prompt"], str):
        raise InputError("tools: the dataset's prompts are text; a policy with tools reads lists of messages")
    if tools is not None and any(begun := [is_begun(row["prompt"]) for row in dataset]):
        raise InputError(f"tools: prompt {begun.index(True)} of the dataset ends with the assistant's message")
    if tools is not None and any(row.get("tools") for row in dataset):
        raise InputError("tools: the dataset has a column 'tools' of its own; leave one of them out")
    count = check_pictures(dataset, tokenizer, reader)
    for index, why in unfit_prompts(dataset, tokenizer, response_length, context, tools):
        origin = origin_of(dataset[index], "")
        raise InputError(f"{f'{origin}: the prompt' if origin else f'prompt {index} of the dataset'} {why}")
    return count


def check_pictures(
    dataset: "HubDataset | Sequence[dict]", processing_class: ProcessingClass, reader: str | None = None
) -> int:
    """Refuse images without a reader, and return the number of prompts with some.

    Args:
        processing_class: the policy's.
        reader: the part that reads no images, such as `the policy (HfllmForCausalLM)`; `None` where all do.
    """
    named = ((row, origin_of(row, f"prompt {index} of the dataset")) for index, row in enumerate(dataset))
    shown = [origin for row, origin in named if has_pictures(row, origin)]
    first, kind = next(iter(shown), None), type(processing_class).__name__
    if shown and reader is not None:
        raise InputError(f"{first} has a picture, and {reader} reads none: take a model with vision, or leave it out")
    if shown and not isinstance(processing_class, ProcessorMixin):
        raise InputError(f"{first} has a picture, and processing_class is a tokenizer ({kind}): give the processor")
    return len(shown)


def unfit_prompts(
    dataset: "HubDataset | Sequence[dict]",
    tokenizer: ProcessingClass,
    response_length: int,
    context: int | None,
    tools: Schemas | None = None,
) -> Iterator[tuple[int, str]]:
    """Yield the index of each prompt without tokens or without room for a response, and its problem."""
    limit = None if context is None else context - response_length
    for index, count in enumerate(_token_counts(dataset, tokenizer, tools)):
        if not count:
            yield index, EMPTY
        elif limit is not None and count > limit:
            yield (
                index,
                f"has {count} tokens; with response_length={response_length} the model's context of "
                f"{context} leaves room for {limit}; a value model's counts too",
            )


def _token_counts(
    dataset: "HubDataset | Sequence[dict]", tokenizer: ProcessingClass, tools: Schemas | None
) -> Iterator[int]:
    """Yield the numbers of tokens of the prompts."""
    if isinstance(tokenizer, ProcessorMixin) and not tools:
        yield from _counts_with_pictures(dataset, tokenizer)
        return
    # Pixels of images are many, and here only counted.
    step = TOGETHER if isinstance(tokenizer, ProcessorMixin) else 1000
    for start in range(0, len(dataset), step):
        rows = [dataset[index] for index in range(start, min(start + step, len(dataset)))]
        yield from map(len, _tokens_of(rows, tokenizer, start, tools))


def _counts_with_pictures(dataset: "HubDataset | Sequence[dict]", processor: ProcessorMixin) -> Iterator[int]:
    """Yield the numbers of tokens of the prompts; drawn images are processed only where words or sizes are new."""
    cached_counts: dict[Hashable, int] = {}
    for start in range(0, len(dataset), TOGETHER):
        rows = [dataset[index] for index in range(start, min(start + TOGETHER, len(dataset)))]
        # By its index a prompt is like no other.
        keys = [what_is_counted(row) or index for index, row in enumerate(rows, start)]
        new = {}
        for index, (key, row) in enumerate(zip(keys, rows, strict=True), start):
            if key not in cached_counts and key not in new:
                new[key] = OriginRow(row, origin_of(row, f"prompt {index} of the dataset"))
        if new:
            counts = map(len, _tokens_of(list(new.values()), processor, start, None))
            cached_counts.update(zip(new, counts, strict=True))
        yield from [cached_counts[key] for key in keys]
        if len(cached_counts) > KEPT_COUNTS:
            cached_counts.clear()


def read_rows(
    rows: Sequence[Mapping[str, Any]],
    processing_class: ProcessingClass,
    tools: Schemas | None = None,
    first: int = 0,
) -> tuple[list[list[int]], dict[str, Any]]:
    """Return the token ids of the rows' prompts, and where some have images, `pictures` and `prompts` with them.

    Args:
        tools: see `check_prompts`.
        first: see `processors.encode`.
    """
    if callable(tools):
        origins = [origin_of(row, f"prompt {index} of the dataset") for index, row in enumerate(rows, first)]
        own = [{**row, "tools": tools(OriginRow(row, each))} for row, each in zip(rows, origins, strict=True)]
        rows, tools = [OriginRow(*each) for each in zip(own, origins, strict=True)], None
    is_text = all(isinstance(row["prompt"], str) and not has_pictures(row, "a prompt") for row in rows)
    if isinstance(processing_class, ProcessorMixin) and not is_text:
        ids, pictures, prompts = encode(rows, processing_class, tools, first)
        return ids, {} if pictures is None else {"pictures": pictures, "prompts": prompts}
    prompts, row_tools = [row["prompt"] for row in rows], [tools or row.get("tools") for row in rows]
    return tokenize_prompts(prompts, tokenizer_of(processing_class), row_tools), {}


def _tokens_of(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: ProcessingClass,
    first: int,
    tools: Schemas | None,
) -> list[list[int]]:
    """Return the tokens of the rows' prompts; `first` is the index of the first row in its dataset."""
    refusals = template_errors()
    try:
        return read_rows(rows, tokenizer, tools, first)[0]
    except InputError:
        raise
    except refusals:
        for index, row in enumerate(rows, first):
            try:
                read_rows([row], tokenizer, tools, index)
            except refusals as error:
                origin, reason = origin_of(row, f"prompt {index} of the dataset"), one_line(error)
                raise InputError(f"{origin}: the chat template cannot write this prompt: {reason}") from None
        raise


def rollout_loader(dataset: "HubDataset", args: PPOConfig, epoch: Callable[[], int]) -> DataLoader:
    """Return a loader of a rollout's rows per process, each batch repeated for every backward pass on it."""
    sampler = RolloutSampler(
        len(dataset),
        rollout_size=args.local_rollout_batch_size * args.world_size,
        repeats=args.steps_per_rollout * args.gradient_accumulation_steps,
        seed=args.data_seed if args.data_seed is not None else args.seed,
        epoch=epoch,
        num_generations=args.num_generations,
    )
    return DataLoader(
        RolloutRows(dataset),
        batch_size=args.local_rollout_batch_size,
        sampler=sampler,
        collate_fn=_as_it_is,
        drop_last=True,
        num_workers=args.dataloader_num_workers,
    )


# ---- ptx ----
#
# Pretraining data for the PTX term of PPO (Ouyang et al. 2022, arXiv:2203.02155, equation 2).


class PretrainingBatches:
    """Batches of a text dataset in an order dependent only on the seed, so a resumed run continues in it.

    Args:
        dataset: rows with a column `text`.
        tokenizer: the policy's; longer texts are cut at `max_length` tokens.
    """

    def __init__(
        self,
        dataset: "Dataset | Sequence[dict]",
        tokenizer: "PreTrainedTokenizerBase",
        max_length: int | None,
        batch_size: int,
        seed: int,
    ):
        if len(dataset) == 0 or "text" not in dataset[0]:
            columns = ", ".join(dataset[0]) if len(dataset) else "no rows"
            raise InputError(f"ptx_dataset needs rows with a column 'text'; it has: {columns}")
        self.dataset, self.tokenizer, self.max_length = dataset, tokenizer, max_length
        self.batch_size, self.seed = batch_size, seed
        self._order: tuple[int, torch.Tensor] | None = None

    @classmethod
    def build(
        cls,
        dataset: "Dataset | Sequence[dict] | None",
        tokenizer: "PreTrainedTokenizerBase",
        context: int | None,
        args: PPOConfig,
    ) -> "PretrainingBatches | None":
        """Return the batches for `args.ptx_coef`, or `None`.

        Raises:
            InputError: when only one of dataset and coefficient is given.
        """
        if (dataset is None) != (args.ptx_coef == 0):
            raise InputError(
                f"ptx_coef={args.ptx_coef} and {'no ' if dataset is None else 'a '}ptx_dataset: give both, or neither"
            )
        if dataset is None:
            return None
        return cls(dataset, tokenizer, context, args.per_device_train_batch_size, args.seed)

    def batch(self, step: int, process: int, processes: int, device: torch.device) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `attention_mask` and `labels` (B, S) of a process for backward pass `step`."""
        first = (step * processes + process) * self.batch_size
        rows = [self.dataset[self._row(index)]["text"] for index in range(first, first + self.batch_size)]
        ids = self.tokenizer(rows, truncation=self.max_length is not None, max_length=self.max_length)["input_ids"]
        if max(map(len, ids)) < 2:
            raise InputError(f"ptx_dataset: no next token to learn in {rows!r}: texts need two tokens")
        batch = self.tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt").to(device)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}

    @staticmethod
    def targets(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the number of next tokens to predict in a batch."""
        return (batch["labels"][:, 1:] != -100).sum()

    def _row(self, position: int) -> int:
        epoch, within = divmod(position, len(self.dataset))
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed + 7_000_003 * (epoch + 1))
            self._order = epoch, torch.randperm(len(self.dataset), generator=generator)
        return int(self._order[1][within])
