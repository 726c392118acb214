"""The data of a stage: the embedded world's or the user's rows, the held-out part, and mixtures of sources."""

import hashlib
import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from typing import TYPE_CHECKING, ClassVar

from hfllm.data import formats
from hfllm.data.formats import BadRow, Dropped, OriginRow, flaw_of
from hfllm.data.images.files import image_key
from hfllm.data.packing import Prepared
from hfllm.data.receipt import Receipt, begin_receipt
from hfllm.data.row_limits import MAX_ROW_BYTES
from hfllm.data.sources import (
    DIGITS,
    EMBEDDED,
    PICTURES,
    TRAIN,
    WORLD,
    HubPart,
    JoinedRow,
    iterate_source,
    renamed,
    source_files,
)
from hfllm.data.world.world import World
from hfllm.errors import InputError, check_choice, refuse_if
from hfllm.flags import BELOW_ONE, NOT_NEGATIVE, WORLD_GROUP, Fact, Flags, Refused, at_least, check_flags, flag

if TYPE_CHECKING:
    from datasets import Dataset


# ---- rows and texts ----


# Of the embedded world, for pretraining.
NUM_HELD_OUT_DOCUMENTS = 1000


ON_WORLD = Fact(lambda flags: flags.dataset_name == WORLD, "the data is the embedded world's")
OFF_WORLD = Fact(
    lambda flags: not _names_world(flags),
    "it is of the embedded world, and the data is your own; --max_samples takes the first of your rows",
)
MIXED = Fact(lambda flags: flags.dataset_mixture, "a mixture has several datasets")
# For recipes that ask your model your prompts, or the embedded world's model the world's.
FOREIGN_PROMPTS = (
    "--dataset_name {dataset_name} needs --model_name_or_path: the embedded world's model does not know such prompts"
)
# Drawn or told here, in the amount of a run's request. A federation may have a file of each organisation instead.
MADE_HERE = Fact(
    lambda flags: (
        flags.dataset_name in (WORLD, PICTURES, DIGITS) and not (flags.dataset_mixture or flags.organisation_files)
    ),
    "the data is the embedded world's",
)
NOT_ON_THE_HUB = Fact(
    lambda flags: (
        not flags.dataset_mixture
        and all(_is_here(name) for name in (flags.dataset_name, flags.eval_dataset_name) if name is not None)
    ),
    "it is for a dataset on the Hub",
)
SLICED = Fact(
    lambda flags: "[" in flags.dataset_train_split or "[" in (flags.dataset_test_split or ""),
    "a stream has no slices: name a whole split, and --max_samples",
)
HELD_WHOLE = Fact(
    lambda flags: flags.holds_rows and flags.max_samples is None,
    "the rows are held in memory: say how many by --max_samples",
)


def _names_world(flags: Flags) -> bool:
    """Return whether some of a run's data is the embedded world's."""
    mixed = [each.rpartition(":")[0] for each in flags.dataset_mixture or ()]
    return WORLD in (*(mixed or [flags.dataset_name]), flags.ptx_dataset_name)


def _is_here(name: str) -> bool:
    return name in EMBEDDED or source_files(name) is not None


@dataclass(frozen=True)
class RowSource:
    """The rows of a dataset to read; an iterator over (origin, row), with columns under our names.

    Args:
        name: of the dataset: a local file or folder, or an id on the Hub.
        part: of a dataset on the Hub.
        max_samples: rows at most; `None` means all.
        renaming: the dataset's names of columns by ours.
        bad_rows: what happens to rows that cannot be learned from: drop or refuse.
    """

    name: str
    part: HubPart = TRAIN
    max_samples: int | None = None
    renaming: Mapping[str, str] = field(default_factory=dict)
    bad_rows: str = "drop"

    def __iter__(self) -> Iterator[tuple[str, formats.Row]]:
        return self.read()[1]

    def read(self) -> tuple[Receipt, Iterator[tuple[str, formats.Row]]]:
        """Return the receipt of the rows, which grows while they are read, and the rows."""
        receipt = begin_receipt(self.name, self.part.split)

        def rows() -> Iterator[tuple[str, formats.Row]]:
            for origin, row in islice(iterate_source(self.name, self.part), self.max_samples):
                if isinstance(row, JoinedRow):
                    receipt.joined.append(origin)
                yield origin, receipt.take(origin, renamed(origin, row, self.renaming))

        return receipt, rows()


@dataclass(frozen=True)
class RowSources:
    """The user's rows to train on, and the held-out ones.

    Args:
        train: the rows to train on.
        held_out: the held-out rows, if the user names some; without them a part of the others is held out.
    """

    train: RowSource
    held_out: RowSource | None = None


@dataclass(frozen=True)
class WorldTexts:
    """Texts of the embedded world to write.

    Args:
        world_seed: of the world's facts.
        num_documents: to train on.
        shares: of documents of each kind, 0 to 1, as `World.documents` names them.
    """

    world_seed: int
    num_documents: int
    shares: Mapping[str, float]

    def split(self, seed: int) -> tuple["Dataset", list[str]]:
        """Return texts to train on (a `text` column) and held-out texts, drawn by a seed."""
        from datasets import Dataset, Features, Value

        world = World(self.world_seed)
        texts = world.documents(self.num_documents, seed, **self.shares)
        # The world may write a document twice; held-out texts must not occur in training.
        train_texts = set(texts)
        unseen = world.documents(NUM_HELD_OUT_DOCUMENTS, -1 - seed, **self.shares)
        held_out = [text for text in unseen if text not in train_texts]
        # The type in `Prepared`, so that both can be in one mixture.
        return Dataset.from_dict({"text": texts}, Features({"text": Value("large_string")})), held_out


TextSource = RowSource | WorldTexts


@dataclass(frozen=True)
class DataArguments:
    """Where the data comes from."""

    dataset_name: str = flag(
        WORLD,
        "'world' (embedded), a local file or folder, or a dataset id on the Hub; for text also 'pydoc', "
        "the documentation of this Python.",
    )
    dataset_train_split: str = flag(
        "train", "Split of a Hub dataset to train on, or a slice of it: train[:1%%].", never=NOT_ON_THE_HUB
    )
    dataset_config: str | None = flag(None, "Configuration of a Hub dataset.", never=(MIXED, NOT_ON_THE_HUB))
    dataset_revision: str | None = flag(None, "Branch, tag or commit of a Hub dataset.", never=(MIXED, NOT_ON_THE_HUB))
    dataset_streaming: bool = flag(
        False,
        "Read a Hub dataset row by row, without downloading all of it first.",
        never=(NOT_ON_THE_HUB, SLICED, HELD_WHOLE),
    )
    max_samples: int | None = flag(
        None,
        "Use at most this many rows of a dataset.",
        takes=at_least(1),
        never=MADE_HERE.because("the world is sized by --num_..."),
    )
    max_row_bytes: int = flag(
        MAX_ROW_BYTES, "Refuse a dataset with a longer row, before it is in memory; 0: none.", takes=at_least(0)
    )
    column_mapping: list[str] | None = flag(
        None,
        "Other names of the dataset's columns, each OURS=THEIRS: prompt=question response=answer.",
        never=MADE_HERE,
    )
    world_seed: int = flag(0, "Seed of the embedded world's facts.", takes=NOT_NEGATIVE, group=WORLD_GROUP)

    # Whether a column outside of all formats may be of use, such as to a reward function.
    takes_any_column: ClassVar[bool] = False
    # Whether all rows are in memory at once: texts of pretraining go to the disk as they arrive.
    holds_rows: ClassVar[bool] = True

    @property
    def hub_part(self) -> HubPart:
        """The part of a Hub dataset to train on."""
        named = (self.dataset_train_split, self.dataset_config, self.dataset_revision, self.dataset_streaming)
        return HubPart(*named, max_row_bytes=self.max_row_bytes)

    @property
    def row_source(self) -> RowSource:
        """The rows of the named dataset."""
        bad_rows = getattr(self, "bad_rows", "drop")
        return RowSource(self.dataset_name, self.hub_part, self.max_samples, self.renaming, bad_rows)

    @property
    def renaming(self) -> dict[str, str]:
        """The mapping of `--column_mapping`: the dataset's names of columns by ours.

        Raises:
            InputError: for an entry that is not OURS=THEIRS, a column that comes twice, or one of no format.
        """
        renaming: dict[str, str] = {}
        for entry in self.column_mapping or []:
            ours, equals, theirs = entry.partition("=")
            named, is_twice = f"--column_mapping {entry!r}", ours in renaming or theirs in renaming.values()
            refuse_if(not (ours and equals and theirs), f"{named}: expected OURS=THEIRS, such as prompt=question")
            refuse_if(is_twice, f"{named}: a column comes twice")
            if not self.takes_any_column:
                check_choice(f"{named}: no format has a column {ours!r}; those there are:", ours, formats.COLUMNS)
            renaming[ours] = theirs
        return renaming

    @property
    def world(self) -> World | None:
        """The embedded world if the data comes from it, else `None`."""
        return World(self.world_seed) if self.dataset_name == WORLD else None

    def check_source(self) -> None:
        """Refuse flags of the data without effect, files that do not exist, and columns of no format."""
        of_data = {item.name for kind in (RowArguments, TextArguments) for item in fields(kind)}
        check_flags(self, names=of_data)
        if not getattr(self, "dataset_mixture", None):
            for name in (self.dataset_name, getattr(self, "eval_dataset_name", None)):
                _ = name is None or _is_here(name)
        _ = self.renaming


@dataclass(frozen=True)
class RowArguments(DataArguments):
    """Where the data comes from, what is held out, and which rows are left out."""

    eval_dataset_name: str | None = flag(
        None, "Held-out rows of your own, named as --dataset_name; by default a part of the rows.", never=MADE_HERE
    )
    dataset_test_split: str | None = flag(
        None,
        "Split of held-out rows: of --eval_dataset_name (test by default), or of --dataset_name.",
        never=(MADE_HERE, NOT_ON_THE_HUB),
    )
    bad_rows: str = flag(
        "drop",
        "What happens to rows with an empty answer, two turns of one side in a row, equal answers or a "
        "tie: drop (and count) or refuse (name the first and stop).",
        choices=["drop", "refuse"],
    )

    @property
    def row_sources(self) -> RowSources:
        """The rows of the named dataset, and held-out rows, if some are named."""
        source, name, split = self.row_source, self.eval_dataset_name, self.dataset_test_split
        if name is None and split is None:
            return RowSources(source)
        part = replace(source.part, split=split or "test")
        if name is not None:
            # The configuration and the revision belong to --dataset_name.
            part = replace(part, config=None, revision=None)
        # A stream needs an end.
        most = self.max_samples if self.dataset_streaming else None
        return RowSources(source, replace(source, name=name or source.name, part=part, max_samples=most))


@dataclass(frozen=True)
class InstructionArguments(RowArguments):
    """Instructions and conversations, and what is learned of them."""

    loss_on: str = flag(
        "all",
        "Which of the assistant's turns of a conversation are learned: all of them, or the last alone.",
        choices=["all", "last"],
    )


@dataclass(frozen=True)
class TextArguments(DataArguments):
    """Which texts, and how many."""

    num_documents: int = flag(
        40000, "Documents of the embedded world to train on.", takes=at_least(0), never=OFF_WORLD, group=WORLD_GROUP
    )
    world_deeds: float = flag(
        0.0,
        "Share of them that speak of deeds, harmful ones too: constitutional AI starts from such a model.",
        takes=BELOW_ONE,
        never=OFF_WORLD,
        group=WORLD_GROUP,
    )
    world_reasoning: float = flag(
        0.0,
        "Share of them to reason about, with thoughts that do: recipes/reason.py starts from them.",
        takes=BELOW_ONE,
        never=OFF_WORLD,
        group=WORLD_GROUP,
    )
    world_tools: float = flag(
        0.0,
        "Share of them in which people call tools: a model that is to use tools starts from them.",
        takes=BELOW_ONE,
        never=OFF_WORLD,
        group=WORLD_GROUP,
    )
    world_passages: float = flag(
        0.0,
        "Share of them in which people answer from passages: recipes/ground.py starts from them.",
        takes=BELOW_ONE,
        never=OFF_WORLD,
        group=WORLD_GROUP,
    )
    world_forms: float = flag(
        0.0,
        "Share of them in upper case or without punctuation, so that questions may be asked so too.",
        never=OFF_WORLD,
        group=WORLD_GROUP,
    )
    dataset_mixture: list[str] | None = flag(
        None, "Several datasets in place of --dataset_name, each NAME:WEIGHT (share of the text)."
    )

    holds_rows: ClassVar[bool] = False
    refused: ClassVar[Refused] = {"dataset_name": MIXED.because("--dataset_mixture takes its place")}

    @property
    def text_sources(self) -> dict[str, TextSource]:
        """The texts of each dataset, by its name."""
        return {name: self._text_source(name) for name, _ in mixture_of(self.dataset_name, self.dataset_mixture)}

    @property
    def mixture_weights(self) -> list[float] | None:
        """The weights of the datasets of a mixture; `None` for a single dataset."""
        weights = [weight for _, weight in mixture_of(self.dataset_name, self.dataset_mixture)]
        return None if None in weights else weights

    @property
    def world_texts(self) -> WorldTexts | None:
        """The texts of the embedded world if it is the only source, else `None`."""
        return self._text_source(WORLD) if self.dataset_name == WORLD and not self.dataset_mixture else None

    def _text_source(self, name: str) -> TextSource:
        if name != WORLD:
            return replace(self.row_source, name=name)
        kinds = ("deeds", "reasoning", "tools", "passages", "forms")
        shares = {kind: getattr(self, f"world_{kind}") for kind in kinds}
        return WorldTexts(self.world_seed, self.num_documents, shares)


def split_rows(rows: list, seed: int, share: float = 0.05, most: int = 256) -> tuple[list, list]:
    """Shuffle rows by `seed` and hold out about `share` of them, at most `most`, for evaluation.

    Rows with the same prompt (or the same text) stay together, so none is on both sides; the prompt of a conversation
    is the part before its first answer.
    """
    keys = list(map(prompt_key, rows))
    if len(set(keys)) < 2:
        # Conversations with the same greeting at the beginning.
        keys = list(map(str, rows))
    train, held_out = split_places(keys, seed, share, most)
    return [rows[index] for index in train], [rows[index] for index in held_out]


def prompt_key(row: formats.Row | str) -> str:
    """Return the value that must not occur on both sides of a split: a row's prompt, its text, or its images."""
    if isinstance(row, str):
        return row
    if images := row.get("images") or row.get("image"):
        # Many images are asked about in the same words.
        return str([image_key(image) for image in (images if isinstance(images, list | tuple) else [images])])
    prompt = row["prompt"]
    if isinstance(prompt, list) and not any(message["role"] == "user" for message in prompt):
        # The assistant speaks first.
        prompt = [*prompt, *row.get("completion", [])]
    return str(prompt)


def split_places(
    keys: Iterable[Hashable], seed: int, share: float = 0.05, most: int = 256
) -> tuple[list[int], list[int]]:
    """Split rows as `split_rows` does, given a key per row; return the indices of training and of held-out rows.

    Raises:
        InputError: when all keys are equal.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    refuse_if(len(groups) < 2, f"the dataset has {len(groups)} different prompt(s) or text(s); at least 2 are needed")
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    target_size, held_out = min(max(1, int(sum(map(len, order)) * share)), most), []
    # Too large groups come last, by size: a group of half the data must not be the whole held-out set.
    order.sort(key=lambda group: max(len(group), target_size))
    while not held_out or (len(order) > 1 and len(held_out) + len(order[0]) <= target_size):
        held_out += order.pop(0)
    return [index for group in order for index in group], held_out


def load_texts(source: TextSource, seed: int, prepared: Prepared, name: str) -> tuple["Dataset", list[str]]:
    """Load pretraining texts (a `text` column) and held-out texts, of the world or of the user's dataset.

    Args:
        source: the texts.
        seed: seed of the split, and of the world's texts.
        prepared: the storage for the user's texts, so that they need not fit into memory.
        name: name of the table there.
    """
    if isinstance(source, WorldTexts):
        return source.split(seed)
    named = (source.name, source.part, source.max_samples, source.renaming)
    stored = prepared.texts(name, lambda: texts_of(*named))
    train, held_out = split_places((hash_of(text) for text in stored["text"]), seed)
    return stored.select(train), stored.select(held_out)["text"][:]


def texts_of(
    name: str, part: HubPart = TRAIN, most: int | None = None, renaming: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Yield the texts of the first `most` rows of a user's dataset, without blank ones."""
    receipt, rows = RowSource(name, part, most, renaming or {}).read()
    for origin, row in rows:
        text = formats.to_text(origin, row)
        if text.strip():
            yield text
        else:
            receipt.dropped.add("without a text", origin)
    receipt.dropped.total = receipt.rows


def hash_of(text: str) -> bytes:
    """Return a hash of a text, in practice different for different texts."""
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=16).digest()


def load_rows(
    source: RowSource,
    mapper: Callable[[str, formats.Row], formats.Converted],
    dropped: Dropped | None = None,
    flaw_of: Callable[[formats.Converted], str | None] = flaw_of,
    most: int | None = None,
) -> list[formats.Converted]:
    """Load the user's dataset, with each row converted by `mapper(origin, row)`; rows keep their origin.

    Args:
        source: the rows.
        mapper: the conversion; it may raise `BadRow`.
        dropped: counts the rows left out since they cannot be learned from; without it all are kept.
        flaw_of: returns why a converted row cannot, or `None`.
        most: rows to keep at most; the following ones are not read.

    Raises:
        InputError: for an unreadable row, or with `--bad_rows refuse` one that cannot be learned from.
    """
    receipt, read = source.read()
    rows = []
    for origin, row in read:
        try:
            converted = mapper(origin, row)
            flaw = flaw_of(converted) if dropped is not None else None
            if flaw:
                raise BadRow(f"{origin}: a row {flaw}; --bad_rows drop leaves such rows out", flaw)
        except BadRow as error:
            if dropped is None or source.bad_rows == "refuse":
                raise
            dropped.add(error.kind, origin)
            receipt.drop()
        else:
            receipt.add_converted(converted)
            rows.append(OriginRow(converted, origin) if isinstance(converted, dict) else converted)
            if len(rows) == most:
                break
    if dropped is not None:
        dropped.total = len(rows) + dropped.count
        receipt.dropped = dropped
    return rows


def shared_prompts(train_rows: Sequence[formats.Row], eval_rows: Sequence[formats.Row]) -> int:
    """Return how many held-out rows have the prompt of a training row."""
    train_prompts = set(map(prompt_key, train_rows))
    return sum(prompt_key(row) in train_prompts for row in eval_rows)


# ---- mixtures ----
#
# Training and held-out texts of one dataset, or of several with weights.


def mixture_of(dataset_name: str, dataset_mixture: Sequence[str] | None) -> list[tuple[str, float | None]]:
    """Return the datasets and their weights; a single dataset has the weight `None`.

    Raises:
        InputError: for an entry that is not NAME:WEIGHT, or a name that comes twice.
    """
    if not dataset_mixture:
        return [(dataset_name, None)]
    pairs = []
    for entry in dataset_mixture:
        name, _, weight = entry.rpartition(":")
        try:
            pairs.append((name, float(weight)))
        except ValueError:
            pairs.append(("", 0.0))
        if not name or not pairs[-1][1] > 0:
            raise InputError(f"--dataset_mixture {entry!r}: expected NAME:WEIGHT with a weight above 0")
    if len({name for name, _ in pairs}) < len(pairs):
        raise InputError(f"--dataset_mixture {' '.join(dataset_mixture)}: a dataset comes twice")
    return pairs


def load_sources(
    text_sources: Mapping[str, TextSource], weights: Sequence[float] | None, seed: int, prepared: Prepared
) -> tuple[dict[str, "Dataset"], Sequence[str], list[str]]:
    """Load training texts by source, all of them as one dataset, and held-out texts of all sources.

    In a mixture, any first part of all texts has the sources by weight, as long as each has text left, so that a
    tokenizer or a baseline learns from the same mixture as the model. A text held out by one source and used in
    training by another is removed from the held-out texts.

    Args:
        text_sources: by name.
        weights: of the sources of a mixture.
        seed, prepared: see `load_texts`.

    Raises:
        InputError: when no held-out text is left.
    """
    from datasets import concatenate_datasets

    sources, held_out = {}, []
    for number, (name, source) in enumerate(text_sources.items()):
        sources[name], test_texts = load_texts(source, seed, prepared, f"texts-{number}")
        held_out += test_texts
    together = concatenate_datasets(list(sources.values()))
    if len(sources) > 1:
        together = together.select(by_weight(sources.values(), weights))
        held_out_hashes = {hash_of(text) for text in held_out}
        shared_hashes = held_out_hashes.intersection(hash_of(text) for text in together["text"])
        held_out = [text for text in held_out if hash_of(text) not in shared_hashes]
        refuse_if(not held_out, "every held-out text of the mixture is a training text of another of its datasets")
    return sources, together["text"], held_out


def by_weight(sources: Sequence["Dataset"], weights: Sequence[float]) -> list[int]:
    """Return an order of the concatenated sources' texts in which their bytes follow the weights throughout."""
    import numpy
    import pyarrow.compute

    progress = []
    for source, weight in zip(sources, weights, strict=True):
        batches = source.with_format("arrow").iter(10_000)
        sizes = numpy.concatenate([pyarrow.compute.binary_length(batch["text"]) for batch in batches])
        progress.append(sizes.cumsum() / weight)
    return numpy.concatenate(progress).argsort(kind="stable").tolist()
