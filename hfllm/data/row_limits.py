"""How large a row may be, and how much more a compressed file may hold than it is long."""

from pathlib import Path

from hfllm.errors import InputError

# Of a row: some four million tokens, or a photograph. Reading and tokenizing one takes forty times its length.
MAX_ROW_BYTES = 1 << 24
# What a file may hold per byte that it is long, once it holds much: text compresses to a tenth, tables of repeated
# texts to a hundredth.
MOST_EXPANSION, MUCH = 200, 1 << 28
# What Python needs for the shortest row.
ROW_BYTES = 100


class OverLimit(InputError):
    """A row or a file over its limit; `advice` says how to lift it, for commands that have the flag."""

    def __init__(self, message: str, advice: str):
        super().__init__(message)
        self.advice = advice


def too_long(origin: str, limit: int) -> OverLimit:
    """Return the complaint about a row of more than `limit` bytes."""
    advice = "--max_row_bytes N reads longer ones, 0 all of them"
    return OverLimit(f"{origin}: a row of more than {limit:,} bytes", advice)


class Expansion:
    """Adds up what a file holds, to stop at one that was made to fill the memory.

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
            said = f"{self.file}: holds more than {MOST_EXPANSION} times its {size:,} bytes"
            raise OverLimit(said, "if that is meant, --max_row_bytes 0 reads it")
