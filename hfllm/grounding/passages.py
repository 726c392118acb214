"""Passages of a user's texts: cut into chunks, kept in memory or in a folder, and read from there."""

import hashlib
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import accumulate, chain, islice
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, overload

from hfllm import durable
from hfllm.data.formats import to_text
from hfllm.data.passages import Passage
from hfllm.data.receipt import receipted
from hfllm.data.sources import TRAIN, HubPart, iterate_source
from hfllm.errors import InputError, first_line, refuse_if

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerBase


# ---- chunking ----
#
# Cut documents into overlapping passages of a number of tokens, between words where possible.


# Allowed ends of a passage: a word with the space before it. Longer strings than any word may be cut.
_PIECE = re.compile(r"\s*\S{1,64}")
# Characters of a document processed together, and word lengths kept in a cache: limits of the memory.
SEGMENT, MOST_KNOWN = 1 << 20, 1 << 20


@dataclass(frozen=True)
class Cut:
    """How documents were cut.

    Args:
        max_tokens: the most tokens of a passage.
        overlap: the most tokens at its beginning that the passage before it has too.
        tokenizer: the name of the tokenizer, empty where words were counted.
        digest: of the tokenizer's vocabulary.
        vocab_size: its number of tokens.
    """

    max_tokens: int
    overlap: int
    tokenizer: str = field(default="", compare=False)
    digest: str = ""
    vocab_size: int = field(default=0, compare=False)

    def __str__(self) -> str:
        name = f"tokens of {self.tokenizer or 'a tokenizer'} ({self.vocab_size:,} tokens)" if self.digest else "words"
        return f"{self.max_tokens} {name}, {self.overlap} of them overlapping"

    def as_json(self) -> str:
        """Return it as JSON text."""
        return json.dumps(asdict(self))


def vocabulary_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a digest of a tokenizer's vocabulary, without added tokens."""
    added = tokenizer.get_added_vocab()
    pairs = sorted((number, token) for token, number in tokenizer.get_vocab().items() if token not in added)
    return hashlib.blake2b(json.dumps(pairs).encode(), digest_size=16).hexdigest()


class Chunker:
    """Cuts documents.

    Tokens are counted word by word, each with a space before it, as a passage stands in a prompt. This is exact where
    no token spans two words, as in nearly all tokenizers, and several times faster than tokenizing all text.

    Args:
        tokenizer: counts tokens; without one, words are counted.
        max_tokens: the most tokens of a passage; at least 1.
        overlap: the most tokens at its beginning that the passage before it has too; less than `max_tokens`.

    Raises:
        InputError: for other numbers.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase | None" = None, max_tokens: int = 200, overlap: int = 20):
        for name, number in (("max_tokens", max_tokens), ("overlap", overlap)):
            refuse_if(not isinstance(number, Integral), f"{name}={number!r:.40}: expected a whole number")
        refuse_if(max_tokens < 1, f"max_tokens={max_tokens}: a passage has at least 1 token")
        if not 0 <= overlap < max_tokens:
            raise InputError(f"overlap={overlap}: expected 0 to {max_tokens - 1}, less than max_tokens={max_tokens}")
        self.tokenizer, self.max_tokens, self.overlap = tokenizer, max_tokens, overlap
        self._known: dict[str, int] = {}
        self._before = 0 if tokenizer is None else len(tokenizer("a", add_special_tokens=False)["input_ids"])

    @property
    def cut(self) -> Cut:
        """How it cuts."""
        if self.tokenizer is None:
            return Cut(self.max_tokens, self.overlap)
        name, digest = str(self.tokenizer.name_or_path), vocabulary_digest(self.tokenizer)
        return Cut(self.max_tokens, self.overlap, name, digest, len(self.tokenizer))

    def chunks(self, text: str) -> Iterator[tuple[int, str]]:
        """Yield the passages of a document, with the positions of their first characters; none of a blank one.

        They are parts of the document as they are, without the space around them. Each ends after the last one.
        """
        start, length = 0, SEGMENT
        while start < len(text):
            segment = text[start : start + length]
            spans = self._spans(segment)
            is_last = start + length >= len(text)
            # The following text may belong to the last passage of a segment, and move its beginning: both are done
            # again.
            for first, end in spans if is_last else spans[:-2]:
                passage = segment[first:end].lstrip()
                yield start + end - len(passage), passage
            if is_last:
                return
            if len(spans) < 3:
                length *= 2
            else:
                start, length = start + spans[-2][0], SEGMENT

    def _spans(self, text: str) -> list[tuple[int, int]]:
        """Return beginnings and ends of the passages of a text, in characters."""
        # Spaces at the end are no piece; a search from every one of them would take the square of their number.
        pieces = _PIECE.findall(text.rstrip())
        if not pieces:
            return []
        sizes = self._sizes(pieces)
        if max(sizes) > self.max_tokens:
            pieces = [part for piece, size in zip(pieces, sizes, strict=True) for part in self._broken(piece, size)]
            sizes = self._sizes(pieces)
        ends, totals = [0, *accumulate(map(len, pieces))], [0, *accumulate(sizes)]
        spans, first = [], 0
        while True:
            last = max(bisect_right(totals, totals[first] + self.max_tokens) - 1, first + 1)
            spans.append((ends[first], ends[last]))
            if last >= len(pieces):
                return spans
            # The next passage has room for at least one more piece.
            begins = bisect_left(totals, max(totals[last] - self.overlap, totals[last + 1] - self.max_tokens, 0))
            first = min(max(begins, first + 1), last)

    def _sizes(self, pieces: list[str]) -> list[int]:
        """Return the pieces' numbers of tokens."""
        if self.tokenizer is None:
            return [1] * len(pieces)
        sizes = list(map(self._known.get, pieces))
        if None in sizes:
            new = list({piece for piece, size in zip(pieces, sizes, strict=True) if size is None})
            # After another word, since some tokenizers begin every text with a space of their own.
            tokens = self.tokenizer([f"a {piece.lstrip()}" for piece in new], add_special_tokens=False)["input_ids"]
            if len(self._known) > MOST_KNOWN:
                self._known = {}
            new_sizes = dict(zip(new, (len(each) - self._before for each in tokens), strict=True))
            sizes = [new_sizes[piece] if size is None else size for piece, size in zip(pieces, sizes, strict=True)]
            self._known |= new_sizes
        return sizes

    def _broken(self, piece: str, size: int) -> list[str]:
        """Return a piece as parts of at most `max_tokens`, or single characters."""
        if size <= self.max_tokens or len(piece.lstrip()) < 2:
            return [piece]
        middle = len(piece) - len(piece.lstrip()) + len(piece.lstrip()) // 2
        parts = [piece[:middle], piece[middle:]]
        return [
            each for part, size in zip(parts, self._sizes(parts), strict=True) for each in self._broken(part, size)
        ]


# ---- passages ----


FILE, ABOUT = "passages.arrow", "passages.json"
FORMAT = "hfllm passages 1"
# The settings of the cut are in both files, to detect an interrupted save.
CUT = b"cut"
# Passages written together.
BATCH = 1 << 13


class Passages(Sequence[Passage]):
    """Passages in the order of their addition; an index of them knows their positions.

        passages = Passages.from_source("docs/", tokenizer, max_tokens=200, overlap=20)
        passages.save("outputs/passages")
        passages = Passages.load("outputs/passages")

    They are a table of Arrow with the columns `text`, `source` and `start`: in memory about the size of the text, and
    after `load` the file itself, kept in memory by the system as far as it has room.

    Args:
        passages: the passages.
        cut: how they were cut, where known.
    """

    def __init__(self, passages: Iterable[Passage] = (), cut: Cut | None = None):
        import pyarrow

        self.cut = cut
        self._table = pyarrow.Table.from_batches(_batches(passages), _schema())
        self._hash, self._hashed = hashlib.blake2b(digest_size=16), 0

    @classmethod
    def from_texts(cls, texts: Iterable[str], sources: Sequence[str] | None = None) -> "Passages":
        """Return texts as passages, unchanged.

        Args:
            texts: the texts.
            sources: their origins; by default the text's number, such as `text 1`.

        Raises:
            InputError: for a blank text, a value other than a text, or another number of sources.
        """
        if isinstance(texts, str):
            raise InputError(f"Passages.from_texts: expected a list of texts, got the text {texts!r:.40}")
        texts = list(texts)
        if sources is not None and len(sources) != len(texts):
            raise InputError(f"Passages.from_texts: {len(texts)} texts and {len(sources)} sources")
        for number, text in enumerate(texts, 1):
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"Passages.from_texts: text {number} is {text!r:.40}; expected words")
        named = sources if sources is not None else [f"text {number}" for number in range(1, len(texts) + 1)]
        return cls(Passage(text, source) for text, source in zip(texts, named, strict=True))

    @classmethod
    def from_source(
        cls,
        name: str,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        max_tokens: int = 200,
        overlap: int = 20,
        part: HubPart = TRAIN,
        max_samples: int | None = None,
        folder: str | Path | None = None,
    ) -> "Passages":
        """Return the passages of a dataset's texts (columns `text` or `content`), with its files and lines as sources.

        Args:
            name: a file (jsonl, json, csv, parquet, txt and others, see `hfllm.data.sources`), a folder of such files,
                `pydoc`, or the id of a dataset on the Hub.
            tokenizer: counts the tokens of a passage, best that of the model which reads them; without one, words are
                counted.
            max_tokens: the most tokens of a passage.
            overlap: the most tokens at its beginning that the one before it has too.
            part: which part of a Hub dataset.
            max_samples: read at most this many rows.
            folder: where to save them as they are read, so that they need not fit into memory; see `save`.

        Raises:
            InputError: when nothing is found, a row has no text, or the numbers make no sense.
        """
        chunker = Chunker(tokenizer, max_tokens, overlap)
        if max_samples is not None and (not isinstance(max_samples, Integral) or max_samples < 1):
            raise InputError(f"max_samples={max_samples!r:.40}: expected a whole number of at least 1, or None")

        def passages() -> Iterator[Passage]:
            for origin, row in receipted(name, islice(iterate_source(name, part), max_samples), part.split):
                for start, text in chunker.chunks(to_text(origin, row)):
                    yield Passage(text, origin, start)

        cut = passages()
        first = next(cut, None)
        refuse_if(first is None, f"dataset {name!r} has no text to make passages of")
        if folder is None:
            return cls(chain([first], cut), chunker.cut)
        _write(Path(folder), chain([first], cut), chunker.cut)
        return cls.load(folder, tokenizer)

    def __len__(self) -> int:
        return self._table.num_rows

    @overload
    def __getitem__(self, index: int) -> Passage: ...

    @overload
    def __getitem__(self, index: slice) -> list[Passage]: ...

    def __getitem__(self, index: int | slice) -> Passage | list[Passage]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"place {index} of {len(self)} passages")
        return Passage(*(column[index % len(self)].as_py() for column in self._table.columns))

    def at(self, indices: Iterable[int]) -> dict[int, Passage]:
        """Return the passages of indexes by index: of many at once, this is much faster than one by one."""
        import numpy as np

        unique, result, first = np.unique(np.fromiter(indices, np.int64)), {}, 0
        batches = self._table.to_batches()
        ends = np.cumsum([batch.num_rows for batch in batches])
        for number, inside in enumerate(np.split(unique, np.searchsorted(unique, ends))[: len(batches)]):
            if len(inside):
                # Taken batch by batch, since joined ones would be copied.
                columns = batches[number].take(inside - first).columns
                texts = map(Passage, *(column.to_pylist() for column in columns))
                result.update(zip(inside.tolist(), texts, strict=True))
            first = int(ends[number])
        return result

    def __iter__(self) -> Iterator[Passage]:
        for batch in self._table.to_batches(BATCH):
            yield from map(Passage, *(column.to_pylist() for column in batch.columns))

    def texts(self, start: int = 0) -> Iterator[str]:
        """Yield the texts from index `start` on, without holding all of them."""
        for batch in self._table.slice(start).to_batches(BATCH):
            yield from batch.column(0).to_pylist()

    @property
    def digest(self) -> str:
        """A digest of the texts in their order."""
        for text in self.texts(self._hashed):
            encoded = text.encode()
            self._hash.update(b"%d\n" % len(encoded))
            self._hash.update(encoded)
        self._hashed = len(self)
        return self._hash.hexdigest()

    def add(self, more: "Passages | Iterable[Passage]") -> None:
        """Add passages at the end, with the next indexes. Retrievers index them with their next query.

        Raises:
            InputError: when they were cut by another tokenizer, or to another length.
        """
        import pyarrow

        added = more if isinstance(more, Passages) else Passages(more)
        if self.cut and added.cut and self.cut != added.cut:
            raise InputError(f"passages cut to {added.cut} cannot be added to passages cut to {self.cut}")
        self.cut = self.cut or added.cut
        self._table = pyarrow.concat_tables([self._table, added._table])
        parts = self._table.column(0).num_chunks
        if parts > 100 and len(self) < 100 * parts:
            # Many small additions would make every look-up slow.
            self._table = self._table.combine_chunks()

    def save(self, folder: str | Path) -> None:
        """Write them to a folder, as `passages.arrow` and `passages.json`; existing passages are replaced."""
        _write(Path(folder), self, self.cut)

    @classmethod
    def load(cls, folder: str | Path, tokenizer: "PreTrainedTokenizerBase | None" = None) -> "Passages":
        """Return the passages saved by `save` to a folder, mapped into memory.

        Args:
            folder: where they are.
            tokenizer: that of the model which reads them, to be compared with the one that cut them.

        Raises:
            InputError: when there are none, a file is damaged, or another tokenizer cut them.
        """
        import pyarrow

        path = Path(folder, FILE)
        refuse_if(not path.is_file(), f"{folder}: no saved passages: there is no {FILE}")
        about, passages = _read_about(Path(folder, ABOUT)), cls()
        try:
            table = pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()
            table.validate(full=True)
            names, stored_cut = ", ".join(table.column_names), (table.schema.metadata or {}).get(CUT)
        # A damaged name is no UTF-8.
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: damaged: {first_line(error, 80)}") from None
        if table.schema != _schema() or any(column.null_count for column in table.columns):
            raise InputError(f"{path}: its columns are {names}; expected those of save")
        passages._table = table.replace_schema_metadata(None)
        count, stated = len(passages), about["passages"]
        refuse_if(count != stated, f"{path}: {count} passages, and {ABOUT} says {stated}: save them again")
        passages.cut = about["cut"]
        if stored_cut != _encoded(passages.cut):
            raise InputError(
                f"{path}: {ABOUT} is of other passages, such as by a save that was stopped: save them again"
            )
        check_tokenizer(passages, tokenizer, str(folder))
        return passages


def loaded_passages(
    folder: str | Path, passages: Passages | None = None, tokenizer: "PreTrainedTokenizerBase | None" = None
) -> Passages:
    """Return the passages of a folder, or those given in their place, cut by this tokenizer if one is given."""
    if passages is None:
        return Passages.load(folder, tokenizer)
    check_tokenizer(passages, tokenizer, str(folder))
    return passages


def check_tokenizer(passages: Passages, tokenizer: "PreTrainedTokenizerBase | None", name: str = "passages") -> None:
    """Refuse passages cut by another tokenizer than this, if any: lengths in tokens differ from the stated ones."""
    cut = passages.cut
    if tokenizer is not None and cut is not None and cut.digest and cut.digest != vocabulary_digest(tokenizer):
        raise InputError(
            f"{name}: cut to {cut}, and the tokenizer here is {tokenizer.name_or_path or 'another one'} "
            f"({len(tokenizer):,} tokens): cut them again by Passages.from_source"
        )


def _encoded(cut: Cut | None) -> bytes:
    return b"null" if cut is None else cut.as_json().encode()


def _schema() -> "pyarrow.Schema":
    import pyarrow

    # Offsets of 64 bits: an uncut passage may be large.
    columns = [("text", pyarrow.large_string()), ("source", pyarrow.large_string()), ("start", pyarrow.int64())]
    return pyarrow.schema(columns)


def _batches(passages: Iterable[Passage]) -> Iterator["pyarrow.RecordBatch"]:
    """Yield passages as batches of a table."""
    import pyarrow

    passages, count = iter(passages), 0
    while batch := list(islice(passages, BATCH)):
        for number, each in enumerate(batch, count + 1):
            if not isinstance(each, Passage) or not isinstance(each.text, str) or not isinstance(each.source, str):
                raise InputError(f"passage {number} is {each!r:.60}; expected a Passage with a text and a source")
        columns = zip(*((each.text, each.source, each.start) for each in batch), strict=True)
        try:
            yield pyarrow.record_batch([list(column) for column in columns], schema=_schema())
        except UnicodeEncodeError:
            number, wrong = next(pair for pair in enumerate(batch, count + 1) if not _is_whole(pair[1]))
            raise InputError(
                f"passage {number} of {wrong.source!r:.40} has half a character (a lone surrogate): {wrong.text!r:.40}"
            ) from None
        count += len(batch)


def _is_whole(passage: Passage) -> bool:
    try:
        f"{passage.text}{passage.source}".encode()
    except UnicodeEncodeError:
        return False
    return True


def _write(folder: Path, passages: Iterable[Passage], cut: Cut | None) -> None:
    """Write passages to a folder as they come; the files of before stay until all are there."""
    import pyarrow

    folder.mkdir(parents=True, exist_ok=True)
    schema, count = _schema().with_metadata({CUT: _encoded(cut)}), 0
    # The table is in place before its description.
    with durable.written_whole(folder / ABOUT) as description, durable.written_whole(folder / FILE) as table:
        with pyarrow.OSFile(str(table), "wb") as sink, pyarrow.ipc.new_file(sink, schema) as writer:
            for batch in _batches(passages):
                writer.write_batch(batch)
                count += batch.num_rows
        about = {"format": FORMAT, "passages": count, "cut": None if cut is None else json.loads(cut.as_json())}
        description.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _read_about(path: Path) -> dict[str, int | Cut | None]:
    """Return the content of `passages.json`: how many passages, and how they were cut."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        cut = None if about["cut"] is None else Cut(**about["cut"])
        if about["format"] != FORMAT or not isinstance(about["passages"], int):
            raise ValueError(f"format {about['format']!r}, expected {FORMAT!r}")
        for each in fields(Cut) if cut is not None else ():
            if not isinstance(getattr(cut, each.name), each.type):
                raise ValueError(f"{each.name} is {getattr(cut, each.name)!r}")
        return {"passages": about["passages"], "cut": cut}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: missing or damaged: {first_line(error, 80)}") from None
