"""Revisions on disk: whole chunks of rows, and what they were made from, so that a stopped run can be continued."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm.errors import InputError
from hfllm.outputs.report import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_FILE, STATE_FILE = "revisions.jsonl", "revisions.state"
# What a difference is called where values are digests, or too long for a line.
DIGESTS = {
    **{"prompts": "other prompts", "constitution": "another constitution", "model": "other weights of the model"},
    **{
        "tokenizer": "another tokenizer",
        "critic": "other weights of the critic",
        "layout": "another version of hfllm",
    },
    **{"critic_tokenizer": "another tokenizer of the critic"},
}


class RevisionFile:
    """The rows of a run, `revisions.jsonl`, and beside it `revisions.state`, which says what they were made from.

    A chunk of rows counts once the state says where it ends; what follows was cut off and is written again.

    Args:
        folder: is made if it is missing.
        made_from: JSON values that decide the rows.

    Raises:
        InputError: when the folder holds the rows of another run, naming the first difference, or rows of which
            nothing is known.
    """

    def __init__(self, folder: str | Path, made_from: Mapping[str, Any]):
        self.rows_path, self.state_path = Path(folder) / ROWS_FILE, Path(folder) / STATE_FILE
        self.made_from = json.loads(json.dumps(made_from))
        self.ends, self.figures = self._read_state()
        size = self.rows_path.stat().st_size if self.rows_path.is_file() else 0
        whole = sum(end <= size for end in self.ends)
        self.ends, self.figures = self.ends[:whole], self.figures[:whole]
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._write_state()
        with self.rows_path.open("ab") as stream:
            stream.truncate(self.ends[-1] if self.ends else 0)

    def rows(self) -> list[dict[str, Any]]:
        """Return all rows, as they were when they were written."""
        with self.rows_path.open(encoding="utf-8") as stream:
            return [json.loads(line) for line in stream]

    def append(self, rows: Sequence[Mapping[str, Any]], figures: Mapping[str, int]) -> None:
        """Write the rows of a chunk and its figures: both, or after a kill neither."""
        with self.rows_path.open("ab") as stream:
            stream.writelines(json.dumps(row).encode() + b"\n" for row in rows)
            stream.flush()
            os.fsync(stream.fileno())
            end = stream.tell()
        self.ends, self.figures = [*self.ends, end], [*self.figures, dict(figures)]
        self._write_state()

    def _write_state(self) -> None:
        state = {"made_from": self.made_from, "ends": self.ends, "figures": self.figures}
        write_atomically(self.state_path, json.dumps(state, indent=1) + "\n")

    def _read_state(self) -> tuple[list[int], list[dict[str, int]]]:
        try:
            state = json.loads(self.state_path.read_text(encoding="utf-8"))
            before, ends, figures = state["made_from"], state["ends"], state["figures"]
        except FileNotFoundError:
            # The state is there before the first row.
            if self.rows_path.exists():
                raise InputError(
                    f"{self.rows_path} would be overwritten, and no {STATE_FILE} beside it says that hfllm wrote it: "
                    "move it or choose another folder"
                ) from None
            return [], []
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{self.state_path}: damaged; remove it and {ROWS_FILE} to begin again") from None
        for key in {**before, **self.made_from}:
            was, now = before.get(key), self.made_from.get(key)
            if was != now:
                difference = DIGESTS.get(key) or f"{key}={was!r}, this run has {key}={now!r}"
                raise InputError(
                    f"{self.rows_path} holds revisions made with {difference}: choose another folder or remove it"
                )
        return ends, figures


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a digest of a tokenizer's vocabulary and chat template."""
    return digest_of([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template])


def digest_of(value: object) -> str:
    """Return a digest of JSON values."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
