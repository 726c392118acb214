"""Store texts and packed rows of a run on disk: made once, then memory-mapped, and reused after a crash."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm import durable
from hfllm.errors import refuse_if

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

# Characters of text written at a time.
BATCH = 1 << 24
# Prefix of the folders made here; nothing else is ever removed.
OURS = "[0-9a-f]" * 16


class Prepared:
    """Tables of one run, in their own folder.

    Machines with a shared disk may make the same table at once: each writes its own file, and renames it.

    Args:
        folder: the parent of the tables' folder, which is made when the first table is written.
        description: JSON values that determine the tables' content.
        is_shared: keep tables of runs with other descriptions next to them; otherwise these are removed.
    """

    def __init__(self, folder: Path, description: Mapping[str, Any], is_shared: bool = False):
        written = json.dumps(description, sort_keys=True).encode()
        self.folder = folder / hashlib.blake2b(written, digest_size=8).hexdigest()
        # Of other descriptions, which nothing reads again.
        self.removed = [] if is_shared else [other for other in folder.glob(OURS) if other != self.folder]
        for other in self.removed:
            shutil.rmtree(other, ignore_errors=True)

    def texts(self, name: str, make: Callable[[], Iterable[str]]) -> "Dataset":
        """Return a dataset with a `text` column of the texts from `make`, called only if the table is missing."""
        return self.table(name, lambda: _text_tables(make()))

    def table(self, name: str, make: Callable[[], Iterable["pyarrow.Table"]]) -> "Dataset":
        """Return the tables from `make`, all of one schema, concatenated as one dataset.

        Raises:
            InputError: when there is none.
        """
        import pyarrow
        from datasets import Dataset

        path = self.folder / f"{name}.arrow"
        if not path.is_file():
            tables = iter(make())
            # Before the folder is made, since most bad input shows here.
            first = next(tables, None)
            refuse_if(first is None, f"{name}: nothing to write: no row has any text")
            self.folder.mkdir(parents=True, exist_ok=True)
            with (
                durable.written_whole(path) as unfinished,
                pyarrow.OSFile(str(unfinished), "wb") as sink,
                pyarrow.ipc.new_stream(sink, first.schema) as writer,
            ):
                for table in chain([first], tables):
                    writer.write_table(table)
        return Dataset.from_file(str(path))

    def remove(self) -> None:
        """Delete all tables once they are no longer needed, and the parent folder if it is empty."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            self.folder.parent.rmdir()


def _text_tables(texts: Iterable[str]) -> Iterator["pyarrow.Table"]:
    import pyarrow

    # Offsets have 64 bits: a single document may be large.
    schema = pyarrow.schema([("text", pyarrow.large_string())])
    for batch in windows(texts, most_texts=100_000, most_characters=BATCH):
        yield pyarrow.table({"text": batch}, schema=schema)


def windows(texts: Iterable[str], most_texts: int, most_characters: int) -> Iterator[list[str]]:
    """Yield lists of consecutive texts; a list ends once it has this many texts or characters."""
    window: list[str] = []
    characters = 0
    for text in texts:
        window.append(text)
        characters += len(text)
        if len(window) >= most_texts or characters >= most_characters:
            yield window
            window, characters = [], 0
    if window:
        yield window
