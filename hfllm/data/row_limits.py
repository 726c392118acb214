"""Size limits: of rows and of the expanded content of compressed files, and parquet read within them."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm.errors import InputError

if TYPE_CHECKING:
    from pyarrow import Array, RecordBatch
    from pyarrow.parquet import FileMetaData


# ---- limits ----


# Of a row: some four million tokens, or a photograph. Reading and tokenizing one takes forty times its length.
MAX_ROW_BYTES = 1 << 24
# The content that a file may hold per byte of its length, once it holds much: text compresses to a tenth, tables of
# repeated texts to a hundredth.
MOST_EXPANSION, MUCH = 200, 1 << 28
# Python's memory for the shortest row.
ROW_BYTES = 100


class OverLimit(InputError):
    """A row or a file over its limit; `advice` says how to lift it, for commands with the flag."""

    def __init__(self, message: str, advice: str):
        super().__init__(message)
        self.advice = advice


def too_long(origin: str, limit: int) -> OverLimit:
    """Return the complaint about a row of more than `limit` bytes."""
    advice = "--max_row_bytes N reads longer ones, 0 all of them"
    return OverLimit(f"{origin}: a row of more than {limit:,} bytes", advice)


class Expansion:
    """Adds up the content of a file, to stop at one made to fill the memory.

    Args:
        file: the file.
        limit: the most bytes of a row; 0 stops at nothing.
    """

    def __init__(self, file: Path, limit: int):
        self.file, self.total = file, 0
        self.most = max(MUCH, MOST_EXPANSION * file.stat().st_size) if limit else None

    def add(self, size: int, rows: int = 1) -> None:
        """Count rows of so many bytes together.

        Raises:
            OverLimit: when the file holds too much for its length.
        """
        self.total += size + ROW_BYTES * rows
        if self.most is not None and self.total > self.most:
            size = self.file.stat().st_size
            message = f"{self.file}: holds more than {MOST_EXPANSION} times its {size:,} bytes"
            raise OverLimit(message, "if that is meant, --max_row_bytes 0 reads it")


# ---- parquet rows ----
#
# Read parquet row by row in little memory, whatever its encodings stand for.
#
# A few bytes of it may stand for gigabytes: a dictionary holds a text once for all rows that repeat it, and pages are
# compressed. So the file's own figures are looked at first, dictionaries stay as they are, and each row is measured
# before Python makes objects of it.


# Rows, and their approximate bytes, read at once.
MOST_ROWS, BATCH_BYTES = 1000, 1 << 26


def parquet_rows(file: Path, limit: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of a parquet file.

    Args:
        limit: the most bytes of a row; 0 is no limit.

    Raises:
        InputError: when it is damaged, or a row is longer than the limit, or the whole would fill the memory.
    """
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            metadata = table.metadata
        rows_at_once = _rows_at_once(file, limit)
        expansion = Expansion(file, limit)
        with pyarrow.parquet.ParquetFile(file, read_dictionary=_dictionaries(metadata)) as table:
            for batch in table.iter_batches(rows_at_once):
                for part, size in _parts(batch, limit, f"{file}, row", number):
                    expansion.add(size, part.num_rows)
                    yield from part.to_pylist()
                    number += part.num_rows
    except UnicodeDecodeError:
        # Named by the reader of all kinds of files.
        raise
    except InputError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, TypeError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        after = f" after row {number}" if number else ""
        raise InputError(f"{file}: not parquet, or damaged{after}: {reason[:200]}") from None


def _rows_at_once(file: Path, limit: int) -> int:
    """Return how many rows to read at once, by the file's own figures.

    Raises:
        InputError: when its rows are longer than the limit by these, or the whole would fill the memory.
        ValueError: when it has no readable figures.
    """
    expansion, rows_at_once, before = Expansion(file, limit), MOST_ROWS, 0
    for num_rows, columns in _row_groups(file):
        sizes = [max(size, 8 * num_values, 0) for size, num_values in columns]
        mean = sum(sizes) // max(num_rows, 1)
        if limit and mean > limit:
            raise too_long(f"{file}, row {before + 1} or one after it", limit)
        expansion.add(sum(sizes), max(num_rows, 0))
        rows_at_once = min(rows_at_once, max(1, BATCH_BYTES // max(mean, 1)))
        before += num_rows
    return rows_at_once


def _row_groups(file: Path) -> list[tuple[int, list[tuple[int, int]]]]:
    """Return the rows of each row group, and of each of its columns the bytes without compression and the values.

    They are read from the file's end without pyarrow, which ends the process at some damaged figures of columns.
    """
    with file.open("rb") as stream:
        stream.seek(0, 2)
        end = stream.tell()
        stream.seek(max(end - 8, 0))
        length = int.from_bytes(stream.read(4), "little")
        if length > end - 8:
            raise ValueError("its end is damaged")
        stream.seek(end - 8 - length)
        footer = _Thrift(stream.read(length))
    try:
        groups = footer.struct()[4]
        # https://github.com/apache/parquet-format: RowGroup 1 and 3, ColumnChunk 3, ColumnMetaData 6 and 5.
        return [(group[3], [(each[3][6], each[3][5]) for each in group[1]]) for group in groups]
    except (IndexError, KeyError, OverflowError, RecursionError, TypeError):
        raise ValueError("its end is damaged") from None


class _Thrift:
    """Values in Thrift's compact protocol: a struct becomes a dictionary by the numbers of its fields."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def varint(self) -> int:
        value, shift = 0, 0
        while (byte := self.byte()) & 0x80:
            value, shift = value | (byte & 0x7F) << shift, shift + 7
            if shift > 63:
                raise OverflowError
        return value | byte << shift

    def number(self) -> int:
        value = self.varint()
        return value >> 1 ^ -(value & 1)

    def struct(self) -> dict[int, Any]:
        result, field = {}, 0
        while head := self.byte():
            field = field + (head >> 4) if head >> 4 else self.number()
            kind = head & 15
            # The value of a truth value is its type.
            result[field] = kind == 1 if kind in (1, 2) else self.value(kind)
        return result

    def value(self, kind: int) -> Any:
        if kind in (4, 5, 6):
            return self.number()
        if kind == 12:
            return self.struct()
        if kind in (9, 10):
            head = self.byte()
            count = head >> 4 if head >> 4 < 15 else self.varint()
            return [self.value(head & 15) for _ in range(count)]
        if kind == 11:
            count = self.varint()
            kinds = self.byte() if count else 0
            return [(self.value(kinds >> 4), self.value(kinds & 15)) for _ in range(count)]
        length = {1: 1, 2: 1, 3: 1, 7: 8, 13: 16}.get(kind) if kind != 8 else self.varint()
        if self.at + length > len(self.data):
            raise IndexError
        self.at += length
        return self.data[self.at - length : self.at]


def _dictionaries(metadata: "FileMetaData") -> list[str]:
    """Return the columns of texts or bytes, which may be stored as a dictionary."""
    columns = map(metadata.schema.column, range(metadata.num_columns))
    return [
        column.path
        for column in columns
        if column.physical_type == "BYTE_ARRAY" and column.logical_type.type in ("STRING", "NONE")
    ]


def _parts(batch: "RecordBatch", limit: int, origin: str, before: int) -> "Iterator[tuple[RecordBatch, int]]":
    """Yield a batch, or halves of it, none of them longer than a row may be, each with its bytes.

    Args:
        origin: of a row, without its number.
        before: rows before the batch.
    """
    size = sum(map(arrow_bytes, batch.columns))
    if not limit or size <= limit:
        yield batch, size
    elif batch.num_rows == 1:
        raise too_long(f"{origin} {before + 1}", limit)
    else:
        half = batch.num_rows // 2
        yield from _parts(batch.slice(0, half), limit, origin, before)
        yield from _parts(batch.slice(half), limit, origin, before + half)


def arrow_bytes(array: "Array") -> int:
    """Return about how many bytes the values of an array have as Python objects, repeated ones each time."""
    import pyarrow
    import pyarrow.compute as compute

    kind, count = array.type, len(array)
    if isinstance(array, pyarrow.ExtensionArray):
        return arrow_bytes(array.storage)
    if pyarrow.types.is_dictionary(kind) and _is_text(kind.value_type):
        lengths = compute.take(compute.binary_length(array.dictionary), array.indices)
        return 8 * count + (compute.sum(lengths).as_py() or 0)
    if _is_text(kind):
        return 8 * count + (compute.sum(compute.binary_length(array)).as_py() or 0)
    if pyarrow.types.is_map(kind):
        begin, end = (array.offsets[0].as_py(), array.offsets[-1].as_py()) if count else (0, 0)
        return 8 * count + sum(arrow_bytes(part.slice(begin, end - begin)) for part in (array.keys, array.items))
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind):
        return 8 * count + arrow_bytes(array.flatten())
    if pyarrow.types.is_struct(kind):
        return 8 * count + sum(map(arrow_bytes, array.flatten()))
    return max(8 * count, array.nbytes)


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind)
