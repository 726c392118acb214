"""Examples of the documents that a step dropped, for the report."""

import json
import os
from collections import Counter
from pathlib import Path

from datatrove.data import Document

EXCERPT = 300


class Examples:
    """Writer for the documents that datatrove's filters drop, which keeps the first few per reason.

    Args:
        folder: where `<step>-<rank>.json` goes when the step ends.
        step: the step's name.
        most: documents per reason.
    """

    def __init__(self, folder: str, step: str, most: int):
        self.folder, self.step, self.most = folder, step, most
        self.rows: list[dict[str, str]] = []
        self.counts: Counter[str] = Counter()
        self.rank = 0

    def __enter__(self) -> "Examples":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        # After an error the task runs again; on a full disk another error would be printed here.
        if self.rows and kind is None:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            path = Path(self.folder) / f"{self.step}-{self.rank:05d}.json"
            part = path.with_suffix(".part")
            part.write_text(json.dumps(self.rows), encoding="utf-8")
            # A killed run leaves it whole or not at all.
            os.replace(part, path)

    def write(self, document: Document, rank: int = 0) -> None:
        """Record a dropped document; its reason is in `metadata["filter_reason"]`."""
        reason = document.metadata.get("filter_reason", self.step)
        self.rank = rank
        self.counts[reason] += 1
        if self.counts[reason] <= self.most:
            text = " ".join(document.text[: 2 * EXCERPT].split())[:EXCERPT]
            self.rows.append({"step": self.step, "reason": reason, "document": document.id, "text": text})


def read_examples(folder: str | Path) -> list[dict[str, str]]:
    """Return all rows written to `folder`, ordered by step name and rank."""
    return [row for path in sorted(Path(folder).glob("*.json")) for row in json.loads(path.read_text("utf-8"))]
