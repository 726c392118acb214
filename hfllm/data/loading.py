"""The data of a stage: the embedded world's or the user's rows, and what is held out of them."""

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
        metadata={"help": "Several datasets in place of --dataset_name, each NAME:WEIGHT, their share of the text."},
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
    """The embedded world, if that is where the data comes from."""
    return World(script_args.world_seed) if script_args.dataset_name == WORLD else None


def limited(rows: list, script_args: DataArguments) -> list:
    """The first `--max_samples` rows."""
    return rows if script_args.max_samples is None else rows[: script_args.max_samples]


def split_rows(rows: list, seed: int, share: float = 0.05, most: int = 256) -> tuple[list, list]:
    """Shuffle rows by `seed` and set about `share` of them, at most `most`, aside for evaluation.

    Rows with the same prompt (or the same text) stay together, so that none is met on both sides.
    """
    keys = [str(row["prompt"] if isinstance(row, dict) else row) for row in rows]
    train, held_out = split_places(keys, seed, share, most)
    return [rows[place] for place in train], [rows[place] for place in held_out]


def split_places(
    keys: Iterable[Hashable], seed: int, share: float = 0.05, most: int = 256
) -> tuple[list[int], list[int]]:
    """`split_rows` by what stands for each row: the places of the training rows, and of those held out.

    Raises:
        InputError: when all rows are alike.
    """
    groups: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    if len(groups) < 2:
        raise InputError(f"the dataset has {len(groups)} different prompt(s) or text(s); at least 2 are needed")
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    wanted, held_out = min(max(1, int(sum(map(len, order)) * share)), most), []
    # Groups that are too large come last, by size: what fills half of the data must not be all that is held out.
    order.sort(key=lambda group: max(len(group), wanted))
    while not held_out or (len(order) > 1 and len(held_out) + len(order[0]) <= wanted):
        held_out += order.pop(0)
    return [place for group in order for place in group], held_out


def load_texts(script_args: TextArguments, seed: int, prepared: Prepared, name: str) -> tuple["Dataset", list[str]]:
    """Pretraining texts (a `text` column) and held-out texts, of the world or of the user's dataset.

    Args:
        script_args: the flags of the data, but for a mixture's.
        seed: of the split, and of the world's texts.
        prepared: where the user's texts are kept, so that they need not fit into memory.
        name: of the table there.
    """
    from datasets import Dataset, Features, Value

    if script_args.dataset_name == WORLD:
        world = World(script_args.world_seed)
        texts = world.documents(script_args.num_documents, seed=seed)
        # A document of the world may be written twice; what is held out must be new.
        known = set(texts)
        held_out = [text for text in world.documents(1000, seed=-1 - seed) if text not in known]
        # Of the type that `prepared` stores, so that both can be parts of one mixture.
        return Dataset.from_dict({"text": texts}, Features({"text": Value("large_string")})), held_out

    source = (script_args.dataset_name, script_args.dataset_train_split, script_args.max_samples)
    stored = prepared.texts(name, lambda: texts_of(*source))
    train, held_out = split_places((hash_of(text) for text in stored["text"]), seed)
    return stored.select(train), stored.select(held_out)["text"][:]


def texts_of(name: str, split: str = "train", most: int | None = None) -> Iterator[str]:
    """The texts of the first `most` rows of a user's dataset, one by one, without blank ones."""
    for origin, row in islice(iterate_source(name, split), most):
        text = formats.to_text(origin, row)
        if text.strip():
            yield text


def hash_of(text: str) -> bytes:
    """What two texts share only if they are the same, for all practical purposes."""
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=16).digest()


def load_rows(
    script_args: DataArguments, mapper: Callable[[str, formats.Row], formats.Converted]
) -> list[formats.Converted]:
    """The user's dataset, each row as `mapper(origin, row)` makes it."""
    source = load_source(script_args.dataset_name, script_args.dataset_train_split)
    return limited(formats.convert(source, mapper), script_args)
