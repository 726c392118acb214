"""The data of a stage: the embedded world's or the user's rows, and the held-out part."""

import hashlib
import random
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from hfllm.data import formats
from hfllm.data.prepared import Prepared
from hfllm.data.sources import WORLD, iterate_source, load_source
from hfllm.data.world.world import World
from hfllm.errors import InputError, refuse

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class DataArguments:
    """Where the data comes from."""

    dataset_name: str = field(
        default=WORLD,
        metadata={
            "help": "'world' (embedded), a local file or folder, or a dataset id on the Hub; for text also 'pydoc', "
            "the documentation of this Python."
        },
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split of a Hub dataset to train on."})
    max_samples: int | None = field(default=None, metadata={"help": "Use at most this many rows of a dataset."})
    world_seed: int = field(default=0, metadata={"help": "Seed of the embedded world's facts."})


@dataclass(frozen=True)
class TextArguments(DataArguments):
    """Which texts, and how many."""

    num_documents: int = field(default=40000, metadata={"help": "Documents of the embedded world to train on."})
    dataset_mixture: list[str] | None = field(
        default=None,
        metadata={"help": "Several datasets in place of --dataset_name, each NAME:WEIGHT (share of the text)."},
    )


def check_source(script_args: DataArguments) -> None:
    """Refuse flags of the data that would have no effect.

    Raises:
        InputError: naming the flag.
    """
    is_world, is_mixed = script_args.dataset_name == WORLD, bool(getattr(script_args, "dataset_mixture", None))
    refuse(is_mixed and not is_world, "--dataset_name", "--dataset_mixture takes its place")
    is_sized = is_world and not is_mixed
    refuse(is_sized and script_args.max_samples is not None, "--max_samples", "the world is sized by --num_...")


def world_of(script_args: DataArguments) -> World | None:
    """Return the embedded world if the data comes from it, else `None`."""
    return World(script_args.world_seed) if script_args.dataset_name == WORLD else None


def limited(rows: list, script_args: DataArguments) -> list:
    """Return the first `--max_samples` rows."""
    return rows if script_args.max_samples is None else rows[: script_args.max_samples]


def split_rows(rows: list, seed: int, share: float = 0.05, most: int = 256) -> tuple[list, list]:
    """Shuffle rows by `seed` and hold out about `share` of them, at most `most`, for evaluation.

    Rows with the same prompt (or the same text) stay together, so none is on both sides.
    """
    keys = [str(row["prompt"] if isinstance(row, dict) else row) for row in rows]
    train, held_out = split_places(keys, seed, share, most)
    return [rows[place] for place in train], [rows[place] for place in held_out]


def split_places(
    keys: Iterable[Hashable], seed: int, share: float = 0.05, most: int = 256
) -> tuple[list[int], list[int]]:
    """Split rows as `split_rows` does, given a key per row; return the indices of training and of held-out rows.

    Raises:
        InputError: when all keys are equal.
    """
    groups: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    if len(groups) < 2:
        raise InputError(f"the dataset has {len(groups)} different prompt(s) or text(s); at least 2 are needed")
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    wanted, held_out = min(max(1, int(sum(map(len, order)) * share)), most), []
    # Groups that are too large come last, by size: a group of half the data must not be the whole held-out set.
    order.sort(key=lambda group: max(len(group), wanted))
    while not held_out or (len(order) > 1 and len(held_out) + len(order[0]) <= wanted):
        held_out += order.pop(0)
    return [place for group in order for place in group], held_out


def load_texts(script_args: TextArguments, seed: int, prepared: Prepared, name: str) -> tuple["Dataset", list[str]]:
    """Load pretraining texts (a `text` column) and held-out texts, of the world or of the user's dataset.

    Args:
        script_args: the flags of the data, except `--dataset_mixture`.
        seed: seed of the split, and of the world's texts.
        prepared: where the user's texts are stored, so that they need not fit into memory.
        name: name of the table there.
    """
    from datasets import Dataset, Features, Value

    if script_args.dataset_name == WORLD:
        world = World(script_args.world_seed)
        texts = world.documents(script_args.num_documents, seed=seed)
        # The world may write a document twice; held-out texts must not occur in training.
        known = set(texts)
        held_out = [text for text in world.documents(1000, seed=-1 - seed) if text not in known]
        # The type that `prepared` stores, so that both can be in one mixture.
        return Dataset.from_dict({"text": texts}, Features({"text": Value("large_string")})), held_out

    source = (script_args.dataset_name, script_args.dataset_train_split, script_args.max_samples)
    stored = prepared.texts(name, lambda: texts_of(*source))
    train, held_out = split_places((hash_of(text) for text in stored["text"]), seed)
    return stored.select(train), stored.select(held_out)["text"][:]


def texts_of(name: str, split: str = "train", most: int | None = None) -> Iterator[str]:
    """Yield the texts of the first `most` rows of a user's dataset, without blank ones."""
    for origin, row in islice(iterate_source(name, split), most):
        text = formats.to_text(origin, row)
        if text.strip():
            yield text


def hash_of(text: str) -> bytes:
    """Return a hash of a text, in practice different for different texts."""
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=16).digest()


def load_rows(
    script_args: DataArguments, mapper: Callable[[str, formats.Row], formats.Converted]
) -> list[formats.Converted]:
    """Load the user's dataset, with each row converted by `mapper(origin, row)`."""
    source = load_source(script_args.dataset_name, script_args.dataset_train_split)
    return limited(formats.convert(source, mapper), script_args)
