"""What a teacher says about each token of a dataset, asked once and kept on disk: its top k, and the rest as one."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hfllm.data.packing import IGNORE
from hfllm.data.prepared import Prepared
from hfllm.trainers.distillation.data import Row
from hfllm.trainers.distillation.losses import Teacher, TopK

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset
    from torch.utils.data import DataLoader
    from transformers import PreTrainedModel

# Of what is stored: another layout makes another cache.
LAYOUT = 1


def description(
    teacher: "str | PreTrainedModel",
    settings: Mapping[str, object],
    dataset: "Dataset",
    temperature: float,
    top_k: int,
) -> dict[str, object]:
    """What a cache's content depends on: a cache with another description is stale, and made anew.

    Args:
        teacher: the model, known by its weights, or its name, known by the state of its files where it is local.
        settings: what a named teacher is loaded with, its revision and precision among them.
        dataset: tokenized rows.
    """
    return {
        "layout": LAYOUT,
        "teacher": teacher if isinstance(teacher, str) else weights_hash(teacher),
        "settings": repr(sorted(settings.items())) if isinstance(teacher, str) else None,
        "files": files_state(teacher) if isinstance(teacher, str) else None,
        "rows": rows_hash(dataset),
        "temperature": temperature,
        "top_k": top_k,
    }


def files_state(name: str) -> list[list[str | int]]:
    """Name, size and time of change of a local model's config and weights."""
    paths = [path for pattern in ("*.safetensors", "*.bin", "config.json") for path in Path(name).glob(pattern)]
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(paths)]


def weights_hash(model: "PreTrainedModel") -> str:
    """A digest of a model's weights and their names."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def rows_hash(dataset: "Dataset") -> str:
    """A digest of tokenized rows and of what counts in them."""
    digest = hashlib.blake2b(digest_size=16)
    for row in dataset:
        digest.update(repr((list(row["input_ids"]), [label != IGNORE for label in row["labels"]])).encode())
    return digest.hexdigest()


def open_cache(
    folder: Path,
    name: str,
    made_from: Mapping[str, object],
    make: "Callable[[], Iterator[pyarrow.Table]]",
    is_shared: bool,
) -> "Dataset":
    """The cache of one dataset: as it is on disk, or made now if it is not there, not finished or stale.

    Args:
        folder: of all caches of a run.
        name: of this one's dataset.
        made_from: see `description`.
        make: gives the tables.
        is_shared: whether the folder is no run's own, so that stale caches stay.
    """
    return Prepared(folder / name, made_from, is_shared).table("teacher", make)


def teacher_tables(
    loader: "DataLoader",
    ask: Callable[[dict[str, torch.Tensor], torch.Tensor], Teacher],
    temperature: float,
    top_k: int,
    chunk_size: int,
) -> Iterator["pyarrow.Table"]:
    """One row per row of the dataset: the `TopK` of each place that has a target, flat.

    Args:
        loader: batches of the dataset in its order.
        ask: what the teacher says of a batch at the places of a mask (B, L).
        temperature, top_k: of what is kept.
        chunk_size: tokens whose logits exist at a time; 0 is all of a batch.
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
    """Tokenized rows together with what the teacher said about them."""

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
