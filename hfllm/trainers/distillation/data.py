"""Data for distillation: tokens, targets, and the teacher's distributions, in memory or in a cache."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hfllm.data.conversations import Conversations
from hfllm.data.formats import Dropped
from hfllm.data.packing import IGNORE, Prepared, token_ids
from hfllm.errors import InputError, refuse_if
from hfllm.fingerprint import file_fingerprint, fingerprint
from hfllm.models.loading.adapters import find_adapter
from hfllm.models.loading.saved import empty_model, location_of, quantization_of, saved_config
from hfllm.runs.command_line import say, say_once
from hfllm.runs.identity import model_files
from hfllm.trainers.distillation.losses import Teacher, TopK

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset
    from torch.utils.data import DataLoader
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.utils.quantization_config import QuantizationConfigMixin


# ---- tokens and targets ----


# A row of a dataset, in one of `FORMATS`.
Row = Mapping[str, Any]
FORMATS = "input_ids (and labels); prompt and completion, text or messages; text"
# Rows tokenized at a time.
ROWS = 1000


def tokenize_dataset(
    dataset: Iterable[Row], tokenizer: "PreTrainedTokenizerBase", max_length: int | None
) -> "Dataset":
    """Return `input_ids` and `labels` of rows in any of `FORMATS`, also mixed.

    In a text all tokens but the first are targets, in a pair the completion and its end token, as in TRL's SFTTrainer;
    in a conversation every turn of the assistant from the completion on.
    Rows are cut to `max_length` tokens, and left out if no target remains.

    Raises:
        InputError: when a row cannot be read, or none remains.
    """
    from datasets import Dataset, Features, List, Value

    rows: dict[str, list] = {"input_ids": [], "labels": []}
    batch: list[tuple[int, Row]] = []
    notes = Dropped()

    def flush() -> None:
        for ids, first in _tokens(batch, tokenizer, notes):
            ids, labels = _labeled(ids, first)
            ids, labels = ids[:max_length], labels[:max_length]
            if any(label != IGNORE for label in labels[1:]):
                rows["input_ids"].append(ids)
                rows["labels"].append(labels)
            else:
                notes.add(f"rows are left out: no token to learn within --max_length {max_length}")
        batch.clear()

    for number, row in enumerate(dataset):
        batch.append((number, row))
        if len(batch) == ROWS:
            flush()
    flush()
    for note, count in notes.reasons.items():
        # The student without its teacher reads the same rows.
        say_once(f"distill: {count:,} {note}")
    refuse_if(not rows["input_ids"], f"no row has a token to learn within max_length={max_length}")
    return Dataset.from_dict(rows, Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))}))


def _labeled(ids: Sequence[int], first: int | Sequence[int]) -> tuple[list[int], list[int]]:
    """Return ids and labels, where `first` is the position of the first label or the labels themselves."""
    ids = list(ids)
    if not isinstance(first, int):
        return ids, list(first)
    return ids, [IGNORE] * first + ids[first:]


def _tokens(
    batch: Sequence[tuple[int, Row]], tokenizer: "PreTrainedTokenizerBase", notes: Dropped
) -> Iterable[tuple[Sequence[int], int | Sequence[int]]]:
    """Return the ids of each row, and the position of its first label or its labels."""
    texts = [row["text"] for _, row in batch if row.get("input_ids") is None and row.get("text") is not None]
    written = iter(token_ids(texts, tokenizer) if texts else [])
    pairs = iter(
        _pairs([entry for entry in batch if _is_pair(entry[1]) and not _is_conversation(entry[1])], tokenizer)
    )
    longer = [row for _, row in batch if _is_conversation(row)]
    conversations = Conversations(tokenizer, notes=notes).label(longer) if longer else iter(())
    for number, row in batch:
        if row.get("input_ids") is not None:
            labels = row.get("labels")
            if labels is not None and len(labels) != len(row["input_ids"]):
                raise InputError(f"row {number}: {len(row['input_ids'])} input_ids and {len(labels)} labels")
            yield row["input_ids"], (1 if labels is None else labels)
        elif row.get("text") is not None:
            yield next(written), 1
        elif _is_conversation(row):
            for labeled in next(conversations):
                yield labeled.input_ids, labeled.labels
        elif _is_pair(row):
            yield next(pairs)
        else:
            raise InputError(f"row {number}: columns {', '.join(row) or '(none)'}; expected one of: {FORMATS}")


def _is_pair(row: Row) -> bool:
    has_more = row.get("input_ids") is not None or row.get("text") is not None
    return not has_more and row.get("prompt") is not None and row.get("completion") is not None


def _is_conversation(row: Row) -> bool:
    """Return whether a row's completion goes on after the first answer, or has tools."""
    completion = row.get("completion")
    return _is_pair(row) and isinstance(completion, list) and (len(completion) > 1 or bool(row.get("tools")))


def _pairs(batch: Sequence[tuple[int, Row]], tokenizer: "PreTrainedTokenizerBase") -> Iterable[tuple[list[int], int]]:
    if not batch:
        return
    prompts, wholes = [], []
    for number, row in batch:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str) != isinstance(completion, str):
            raise InputError(f"row {number}: prompt and completion must both be text, or both lists of messages")
        if isinstance(prompt, str):
            prompts.append(prompt)
            wholes.append(completion + (tokenizer.eos_token or ""))
        else:
            prompts.append(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False))
            wholes.append(tokenizer.apply_chat_template([*prompt, *completion], tokenize=False))
    # A chat template writes the special tokens itself; a text prompt gets the ones added by the tokenizer.
    is_text = [isinstance(row["prompt"], str) for _, row in batch]
    with_special = tokenizer(prompts)["input_ids"]
    without = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    rest = tokenizer(wholes, add_special_tokens=False)["input_ids"]
    for (number, _), text, start, prompt, whole in zip(batch, is_text, with_special, without, rest, strict=True):
        if text:
            yield start + whole, len(start)
        elif whole[: len(prompt)] != prompt:
            raise InputError(
                f"row {number}: with its completion, the prompt's tokens change; the chat template must write the "
                "conversation after the text of the prompt"
            )
        else:
            yield whole, len(prompt)


def targets_of(labels: Sequence[int]) -> list[int]:
    """Return the targets at the positions of a row, `IGNORE` where there is none."""
    return [*labels[1:], IGNORE]


@dataclass
class DistillationCollator:
    """Collator that right-pads rows, with targets in `shift_labels` and the teacher's distributions at the targets.

    Args:
        pad_token_id: the tokenizer's padding id.
        pad_to_multiple_of: pad to lengths of this multiple.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of

        def padded(values: list[list[int]], filler: int) -> torch.Tensor:
            return torch.tensor([[*row, *[filler] * (length - len(row))] for row in values])

        batch = {
            "input_ids": padded([list(row["input_ids"]) for row in rows], self.pad_token_id),
            "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
            "labels": padded([list(row["labels"]) for row in rows], IGNORE),
            "shift_labels": padded([targets_of(row["labels"]) for row in rows], IGNORE),
        }
        if "teacher_rest" in rows[0]:
            for name in ("log_probs", "indices", "rest"):
                batch[f"teacher_{name}"] = torch.cat([torch.as_tensor(row[f"teacher_{name}"]) for row in rows])
        return batch


# ---- teacher cache ----
#
# A teacher's distributions on a dataset, computed once and kept on disk: its top k tokens and the rest as one.


# Version of the stored format: another format makes another cache.
LAYOUT = 1


def description(
    teacher: "str | PreTrainedModel",
    settings: Mapping[str, object],
    dataset: "Dataset",
    temperature: float,
    top_k: int,
) -> dict[str, object]:
    """Return a description of all inputs of a cache: a cache with another description is stale and is made again.

    Args:
        teacher: the model, identified by its weights, or its name, identified by the contents of its files if local.
        settings: arguments to load a named teacher, including its revision and precision.
        dataset: tokenized rows.
    """
    return {
        "layout": LAYOUT,
        "teacher": teacher if isinstance(teacher, str) else weights_hash(teacher),
        "settings": fingerprint(settings, "settings of the teacher") if isinstance(teacher, str) else None,
        "files": file_fingerprint(model_files(teacher), True) if isinstance(teacher, str) else None,
        "rows": rows_hash(dataset),
        "temperature": temperature,
        "top_k": top_k,
    }


def weights_hash(model: "PreTrainedModel") -> str:
    """Return a digest of a model's weights and their names."""
    return fingerprint([(name, fingerprint(value, name)) for name, value in model.state_dict().items()])


def rows_hash(dataset: "Dataset") -> str:
    """Return a digest of tokenized rows and their targets."""
    rows = ((list(row["input_ids"]), [label != IGNORE for label in row["labels"]]) for row in dataset)
    return fingerprint([fingerprint(row, f"row {index}") for index, row in enumerate(rows)])


def open_cache(
    folder: Path,
    name: str,
    made_from: Mapping[str, object],
    make: "Callable[[], Iterator[pyarrow.Table]]",
    is_shared: bool,
) -> "Dataset":
    """Open the cache of one dataset; make it if it is missing, unfinished or stale.

    Args:
        folder: folder of all caches of a run.
        name: name of this cache's dataset.
        made_from: see `description`.
        make: function yielding the tables.
        is_shared: whether several runs share the folder; then stale caches are kept.
    """
    prepared = Prepared(folder / name, made_from, is_shared)
    if prepared.removed:
        why = "what was stored is of other rows or flags, or an older hfllm's"
        say(f"{folder / name}: the teacher is asked again: {why}")
    return prepared.table("teacher", make)


def teacher_tables(
    loader: "DataLoader",
    ask: Callable[[dict[str, torch.Tensor], torch.Tensor], Teacher],
    temperature: float,
    top_k: int,
    chunk_size: int,
) -> Iterator["pyarrow.Table"]:
    """Yield one row per row of the dataset: the `TopK` of each position with a target, flattened.

    Args:
        loader: batches of the dataset in its order.
        ask: function returning the teacher's logits of a batch at the positions of a mask (B, L).
        temperature, top_k: of the stored distributions.
        chunk_size: tokens per chunk of logits; 0 means a whole batch.
    """
    import pyarrow

    kinds = {"log_probs": pyarrow.float32(), "indices": pyarrow.int32(), "rest": pyarrow.float32()}
    schema = pyarrow.schema([(name, pyarrow.large_list(kind)) for name, kind in kinds.items()])
    for batch in loader:
        mask = batch["shift_labels"] != IGNORE
        counts, teacher = mask.sum(1).tolist(), ask(batch, mask)
        size = chunk_size or sum(counts)
        tops = [
            TopK.of(teacher.take(slice(start, start + size)), temperature, top_k)
            for start in range(0, sum(counts), size)
        ]
        columns = {name: torch.cat([getattr(top, name) for top in tops]).cpu() for name in kinds}
        rows = {name: [part.flatten().numpy() for part in values.split(counts)] for name, values in columns.items()}
        yield pyarrow.table(rows, schema=schema)


class WithTeacher(torch.utils.data.Dataset):
    """Tokenized rows together with the teacher's distributions."""

    def __init__(self, rows: "Dataset", cache: "Dataset"):
        if len(rows) != len(cache):
            raise ValueError(f"{len(rows)} rows and {len(cache)} of the teacher's")
        self.rows, self.cache = rows, cache.with_format("torch")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        teacher_row = self.cache[index]
        indices = len(teacher_row["rest"])
        return {
            **self.rows[index],
            "teacher_log_probs": teacher_row["log_probs"].view(indices, -1),
            "teacher_indices": teacher_row["indices"].long().view(indices, -1),
            "teacher_rest": teacher_row["rest"],
        }


# ---- teacher memory ----
#
# Check whether a teacher fits into memory before loading it, by its architecture, without weights.


PROC_MEMORY = Path("/proc/meminfo")
# Folder, limit, use, and the beginning of the names in memory.stat, of version 2 and of version 1.
CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", ""),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)
# Used where neither the settings nor the config say; a possibly fitting model must not be refused.
UNKNOWN_DTYPE_BYTES = 2
QUANTIZE_IT = (
    'load it quantized (--teacher_model_init_kwargs \'{"quantization_config": {"load_in_8bit": true}}\'), or '
)


def check_fits_memory(name: str, settings: Mapping[str, object]) -> None:
    """Refuse a model larger than memory, before it is loaded.

    Args:
        name: a folder or a Hub id; one whose architecture transformers does not have passes: its size is unknown.
        settings: arguments of `from_pretrained`. With a `device_map` the model passes, since it may be spread, also to
            disk; so it does under ZeRO-3, with a part per process.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled

    if settings.get("device_map") is not None or is_deepspeed_zero3_enabled():
        return
    config, free = _config_of(name, settings), available_memory()
    size = None if config is None else loaded_bytes(config, settings)
    if size is not None and free is not None and size > free:
        is_quantized = settings.get("quantization_config") or quantization_of(config)
        raise InputError(
            f"the teacher {name!r} takes {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free: "
            f"{'' if is_quantized else QUANTIZE_IT}let it write answers on a larger machine and train on those with "
            "hfllm sft"
        )


def _config_of(name: str, settings: Mapping[str, object]) -> "PreTrainedConfig | None":
    """Return the config of the model to load, for an adapter the config of its base; `None` if it cannot be read."""
    location = location_of(settings)
    try:
        adapter = find_adapter(name, **location)
        return saved_config(name, **location) if adapter is None else adapter.base_config()
    except (InputError, OSError, TypeError, ValueError, KeyError):
        # Loading will report the error, or may succeed in another way.
        return None


def loaded_bytes(config: "PreTrainedConfig", settings: Mapping[str, object]) -> int | None:
    """Return the bytes of a causal language model's loaded weights; for a quantized one a lower bound.

    Args:
        settings: arguments of `from_pretrained`.

    Returns:
        `None` for an architecture absent from transformers.
    """
    try:
        model = empty_model(config)
    except InputError:
        return None
    model.tie_weights()
    dtype = settings.get("dtype", settings.get("torch_dtype"))
    size = _itemsize(dtype, config)
    quantization = settings.get("quantization_config") or quantization_of(config)
    share = _quantized_bytes(quantization)
    if quantization and not isinstance(dtype, torch.dtype | str):
        size = min(size, UNKNOWN_DTYPE_BYTES)
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    total = 0.0
    for parameter in model.parameters():
        is_matrix = parameter.ndim > 1 and id(parameter) not in tables
        total += parameter.numel() * (min(share, size) if quantization and is_matrix else size)
    return int(total)


def _itemsize(dtype: object, config: "PreTrainedConfig") -> int:
    """Return the bytes of a weight loaded with this `dtype` of `from_pretrained`."""
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    dtype = dtype if isinstance(dtype, torch.dtype) else getattr(config, "dtype", None)
    return dtype.itemsize if isinstance(dtype, torch.dtype) else UNKNOWN_DTYPE_BYTES


def _quantized_bytes(quantization: "QuantizationConfigMixin | dict[str, Any]") -> float:
    """Return the estimated bytes of a weight of a quantized matrix; 0 for an unknown method."""
    values = quantization if isinstance(quantization, dict) else quantization.to_dict()
    if values.get("load_in_8bit") or values.get("quant_method") == "hfllm_int8":
        return 1.0
    return 0.5 if values.get("load_in_4bit") else 0.0


def available_memory() -> int | None:
    """Return the free bytes of the accelerator's memory, else of the machine and container; `None` if unknown."""
    if torch.accelerator.is_available() and hasattr(torch.accelerator, "get_memory_info"):
        return torch.accelerator.get_memory_info()[0]
    return min([*_of_machine(), *(free for group in CGROUPS for free in _of_cgroup(*group))], default=None)


def _of_machine() -> list[int]:
    try:
        lines = PROC_MEMORY.read_text().splitlines()
        return [next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))]
    except (OSError, StopIteration):
        pass
    try:
        return [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    except (OSError, ValueError, AttributeError):
        return []


def _of_cgroup(folder: Path, limit: str, use: str, prefix: str) -> list[int]:
    """Return memory left by a container's limit; cached files count as free, since they are dropped when needed."""
    try:
        most, used = (int((folder / name).read_text()) for name in (limit, use))
        lines = [line.split() for line in (folder / "memory.stat").read_text().splitlines()]
    except (OSError, ValueError):
        # No such group, or "max": no limit.
        return []
    page_cache = sum(int(line[1]) for line in lines if line[0] in (f"{prefix}inactive_file", f"{prefix}active_file"))
    return [max(0, most - used + page_cache)]
