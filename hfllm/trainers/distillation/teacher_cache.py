"""A teacher's distributions on a dataset, computed once and kept on disk: its top k tokens and the rest as one."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hfllm.data.packing import IGNORE
from hfllm.data.prepared import Prepared
from hfllm.fingerprint import file_fingerprint, fingerprint
from hfllm.runs.command_line import say
from hfllm.runs.identity import model_files
from hfllm.trainers.distillation.data import Row
from hfllm.trainers.distillation.losses import Teacher, TopK

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset
    from torch.utils.data import DataLoader
    from transformers import PreTrainedModel

# Version of the stored format: another format makes another cache.
LAYOUT = 1


def description(
    teacher: "str | PreTrainedModel",
    settings: Mapping[str, object],
    dataset: "Dataset",
    temperature: float,
    top_k: int,
) -> dict[str, object]:
    """Return what a cache's content depends on: a cache with another description is stale and is made again.

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
    return fingerprint([fingerprint(row, f"row {place}") for place, row in enumerate(rows)])


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
        make: function that yields the tables.
        is_shared: whether several runs share the folder, so that stale caches are kept.
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
        ask: function that returns the teacher's logits of a batch at the positions of a mask (B, L).
        temperature, top_k: of the stored distributions.
        chunk_size: tokens per chunk of logits; 0 means a whole batch.
    """
    import pyarrow

    kinds = {"log_probs": pyarrow.float32(), "indices": pyarrow.int32(), "rest": pyarrow.float32()}
    schema = pyarrow.schema([(name, pyarrow.large_list(kind)) for name, kind in kinds.items()])
    for batch in loader:
        kept = batch["shift_labels"] != IGNORE
        counts, teacher = kept.sum(1).tolist(), ask(batch, kept)
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
        said = self.cache[index]
        places = len(said["rest"])
        return {
            **self.rows[index],
            "teacher_log_probs": said["log_probs"].view(places, -1),
            "teacher_indices": said["indices"].long().view(places, -1),
            "teacher_rest": said["rest"],
        }
