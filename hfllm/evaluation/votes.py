"""What people say of pairs of answers: on the disk at once, as rows for a reward model, and how far they agree."""

import json
import os
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfllm.data.formats import Message
from hfllm.errors import InputError, refuse_if
from hfllm.outputs.report import write_atomically

FIRST, SECOND, TIE, BAD, SKIP = "first", "second", "tie", "both_bad", "skip"
CHOICES = (FIRST, SECOND, TIE, BAD, SKIP)
# Seconds between two times that all rows are written, images among them.
REST = 2.0
VOTES, LABELS, EDITS = "votes.jsonl", "labels.jsonl", "edits.jsonl"


@dataclass(frozen=True)
class Pair:
    """A prompt with two answers.

    Args:
        id: of the pair.
        prompt: text or messages, with the positions of its images.
        answers: text or messages, of the two.
        sources: where they come from.
        images: data URLs, in the order of their positions.
        tools: schemas of the row.
    """

    id: str
    prompt: str | list[Message]
    answers: Sequence[str | list[Message]]
    sources: Sequence[str]
    images: Sequence[str] = ()
    tools: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Vote:
    """What one annotator said of one pair.

    Args:
        pair: its id.
        annotator: the name.
        choice: one of `CHOICES`; `first` and `second` are the pair's own order, whatever was shown on the left.
        is_swapped: whether the second answer was shown on the left.
        seconds: from the sight of the pair to the choice.
        edited: a better text of the chosen answer.
        is_undone: whether this takes back the annotator's vote on that pair.
        time: seconds since 1970.
    """

    pair: str
    annotator: str
    choice: str
    is_swapped: bool = False
    seconds: float = 0.0
    edited: str | None = None
    is_undone: bool = False
    time: float = field(default_factory=time.time)


class Votes:
    """The votes in a folder: an earlier session's are read, each new one is on the disk before it counts.

    Args:
        folder: of the files.
        pairs: to vote on.
        annotators: their names; empty for anybody.
        overlap: share of the pairs for all named annotators.
        seed: of the order of the pairs and of the sides.
    """

    def __init__(
        self, folder: Path, pairs: Sequence[Pair], annotators: Sequence[str] = (), overlap: float = 0.2, seed: int = 0
    ):
        self.folder, self.annotators, self.seed = folder, list(annotators), seed
        shuffled = random.Random(seed).sample(list(pairs), len(pairs))
        self.pairs = {pair.id: pair for pair in shuffled}
        # The common ones come first: whoever stops early has labeled them.
        shared = round(overlap * len(shuffled)) if annotators else len(shuffled)
        self._shared, self._divided = [*self.pairs][:shared], [*self.pairs][shared:]
        self._lock = threading.RLock()
        self.votes: list[Vote] = []
        self._written = 0.0
        for vote in _read_votes(folder / VOTES):
            self._count(vote)
        self.write_rows()

    def pairs_of(self, name: str) -> list[str]:
        """Return the ids of an annotator's pairs, in order."""
        if not self.annotators:
            return self._shared
        if name not in self.annotators:
            return [vote.pair for vote in self.votes if vote.annotator == name]
        index = self.annotators.index(name)
        return [*self._shared, *self._divided[index :: len(self.annotators)]]

    def next_of(self, name: str) -> Pair | None:
        """Return the first pair that an annotator has not voted on; `None` after the last."""
        voted = {vote.pair for vote in self.votes if vote.annotator == name}
        return next((self.pairs[each] for each in self.pairs_of(name) if each not in voted), None)

    def is_swapped(self, name: str, pair: str) -> bool:
        """Return whether an annotator sees the second answer on the left: the same after a reload."""
        return random.Random(f"{self.seed} {name} {pair}").random() < 0.5

    def add(self, vote: Vote) -> None:
        """Write a vote to the disk, then count it.

        Raises:
            InputError: for a choice, a pair or a name that there is not, and when the disk refuses.
        """
        refuse_if(vote.choice not in CHOICES, f"choice {vote.choice!r}: expected {', '.join(CHOICES)}")
        refuse_if(vote.pair not in self.pairs, f"pair {vote.pair!r}: not among the {len(self.pairs)} here")
        is_known = not self.annotators or vote.annotator in self.annotators
        refuse_if(not is_known, f"name {vote.annotator!r}: expected {', '.join(self.annotators)}")
        with self._lock:
            _append(self.folder / VOTES, json.dumps(vote.__dict__, ensure_ascii=False) + "\n")
            self._count(vote)
            # Votes are what counts: rows are made from them again, so that they may wait.
            if time.monotonic() - self._written >= REST:
                with suppress(OSError):
                    self.write_rows()

    def undo(self, name: str) -> Pair | None:
        """Take back the last vote of an annotator; return its pair, `None` without any."""
        with self._lock:
            own = [vote for vote in self.votes if vote.annotator == name]
            if not own:
                return None
            self.add(Vote(own[-1].pair, name, own[-1].choice, is_undone=True))
            return self.pairs[own[-1].pair]

    def _count(self, vote: Vote) -> None:
        if vote.pair not in self.pairs:
            return
        # A second vote on a pair, of two open pages, takes the place of the first.
        self.votes = [each for each in self.votes if (each.pair, each.annotator) != (vote.pair, vote.annotator)]
        if not vote.is_undone:
            self.votes.append(vote)

    def progress(self, name: str) -> tuple[int, int, float | None]:
        """Return an annotator's number of votes, of pairs, and the median seconds of a vote."""
        pairs = self.pairs_of(name)
        own = [vote for vote in self.votes if vote.annotator == name and vote.pair in pairs]
        seconds = statistics.median(vote.seconds for vote in own) if own else None
        return len(own), len(pairs), seconds

    # ---- rows ----

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield rows that `hfllm reward` reads: the answer that most prefer, and edits before what they edit."""
        by_pair: dict[str, list[Vote]] = {}
        for vote in self.votes:
            by_pair.setdefault(vote.pair, []).append(vote)
        for number, votes in by_pair.items():
            pair = self.pairs[number]
            counts = Counter(vote.choice for vote in votes)
            best = int(counts[SECOND] > counts[FIRST])
            if counts[(FIRST, SECOND)[best]] > max(counts[(SECOND, FIRST)[best]], counts[TIE] + counts[BAD]):
                yield self._row(pair, pair.answers[best], pair.answers[1 - best])
            for vote in votes:
                if vote.edited is not None:
                    original = pair.answers[int(vote.choice == SECOND)]
                    yield self._row(pair, _in_form_of(original, vote.edited), original)

    def edits(self) -> Iterator[dict[str, Any]]:
        """Yield rows that `hfllm sft` reads: the answers that people wrote."""
        for vote in self.votes:
            if vote.edited is not None:
                pair = self.pairs[vote.pair]
                row = self._row(pair, _in_form_of(pair.answers[int(vote.choice == SECOND)], vote.edited), "")
                yield {("completion" if name == "chosen" else name): row[name] for name in row if name != "rejected"}

    @staticmethod
    def _row(pair: Pair, chosen: str | list[Message], rejected: str | list[Message]) -> dict[str, Any]:
        row = {"prompt": pair.prompt, "chosen": chosen, "rejected": rejected}
        return (
            row
            | ({"images": list(pair.images)} if pair.images else {})
            | ({"tools": pair.tools} if pair.tools else {})
        )

    def write_rows(self) -> None:
        """Write the rows of all votes."""
        self._written = time.monotonic()
        for name, rows in ((LABELS, self.rows()), (EDITS, self.edits())):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            if text or (self.folder / name).exists():
                write_atomically(self.folder / name, text)

    # ---- agreement ----

    def agreement(self) -> tuple[str, float | None, int]:
        """Return the name of the kappa over the pairs that all annotators have labeled, its value and their number."""
        names = list(dict.fromkeys(vote.annotator for vote in self.votes))
        by_pair: dict[str, dict[str, str]] = {}
        for vote in self.votes:
            if vote.choice != SKIP:
                by_pair.setdefault(vote.pair, {})[vote.annotator] = vote.choice
        common = [[labels[name] for name in names] for labels in by_pair.values() if len(labels) == len(names)]
        if len(names) < 2 or not common:
            return "kappa", None, 0
        if len(names) == 2:
            return "cohens_kappa", cohens_kappa(*map(list, zip(*common, strict=True))), len(common)
        return "fleiss_kappa", fleiss_kappa(common), len(common)


def _in_form_of(original: str | list[Message], text: str) -> str | list[Message]:
    """Return an edited text in the form of the answer: text, or the assistant's last message."""
    if isinstance(original, str):
        return text
    return [*original[:-1], {**original[-1], "content": text}]


def _append(path: Path, line: str) -> None:
    """Add a line to a file, on the disk, or leave the file as it was."""
    with path.open("ab") as file:
        size = file.seek(0, os.SEEK_END)
        try:
            file.write(line.encode("utf-8", "replace"))
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            with suppress(OSError):
                file.truncate(size)
            raise InputError(f"{path}: {error.strerror}: the vote is not saved") from None


def _read_votes(path: Path) -> Iterator[Vote]:
    """Yield the votes of earlier sessions; a line that was cut off while it was written is no vote, and removed."""
    if not path.exists():
        return
    data, _, rest = path.read_bytes().rpartition(b"\n")
    try:
        whole = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is no UTF-8: expected votes that hfllm label wrote") from None
    if rest:
        write_atomically(path, whole + "\n" if whole else "")
    for number, line in enumerate(whole.split("\n") if whole else (), 1):
        if not line.strip():
            continue
        try:
            yield _checked(Vote(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}, line {number}: {error}: expected a vote that hfllm label wrote") from None


def _checked(vote: Vote) -> Vote:
    """Return a vote whose fields are of their types."""
    texts = all(isinstance(each, str) for each in (vote.pair, vote.annotator, vote.edited or ""))
    numbers = all(isinstance(each, int | float) for each in (vote.seconds, vote.time))
    if not texts or not numbers or vote.choice not in CHOICES:
        raise ValueError("a value is of another kind")
    return vote


# ---- kappa ----


def cohens_kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """Return the agreement of two annotators beyond chance (Cohen 1960, Educ. Psychol. Meas. 20:37).

    Args:
        first, second: their labels of the same items in the same order.

    Returns:
        1 for full agreement, 0 for that of chance; `None` where both give one label to all, so that chance agrees too.

    Raises:
        InputError: for no items, or different numbers of them.
    """
    refuse_if(not first or len(first) != len(second), f"{len(first)} and {len(second)} labels of the same items")
    count = len(first)
    agreed = sum(one == other for one, other in zip(first, second, strict=True)) / count
    ours, theirs = Counter(first), Counter(second)
    chance = sum(ours[label] * theirs[label] for label in ours) / count**2
    return None if chance == 1 else (agreed - chance) / (1 - chance)


def fleiss_kappa(labels: Sequence[Sequence[str]]) -> float | None:
    """Return the agreement of several annotators beyond chance (Fleiss 1971, Psychol. Bull. 76:378).

    Args:
        labels: of each item, as many for each; the annotators of two items may be others.

    Returns:
        As `cohens_kappa`.

    Raises:
        InputError: for no items, fewer than two labels of one, or different numbers of them.
    """
    raters = len(labels[0]) if labels else 0
    refuse_if(
        raters < 2 or any(len(each) != raters for each in labels), "expected as many labels of each item, 2 or more"
    )
    counts = [Counter(each) for each in labels]
    agreed = sum(sum(n * (n - 1) for n in each.values()) for each in counts) / (len(labels) * raters * (raters - 1))
    total: Counter[str] = sum(counts, Counter())
    chance = sum((n / (len(labels) * raters)) ** 2 for n in total.values())
    return None if chance == 1 else (agreed - chance) / (1 - chance)
