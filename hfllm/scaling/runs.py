"""A table of finished runs: parameters, tokens, final loss."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy

from hfllm.errors import InputError
from hfllm.scaling.laws import FLOPS_A_PARAMETER

# Accepted names of columns, in lower case without spaces, dashes and underscores; the first is preferred.
PARAMETERS = ("n", "parameters", "params", "nparams", "numparams", "numparameters", "modelsize", "size")
TOKENS = ("d", "tokens", "ntokens", "numtokens", "trainingtokens", "traintokens", "tokenstrained", "datasetsize")
COMPUTE = ("c", "flops", "flop", "compute", "trainingflop", "trainingflops")
LOSSES = ("loss", "evalloss", "finalloss", "valloss", "validationloss", "testloss", "heldoutloss")


@dataclass(frozen=True)
class Runs:
    """Finished runs, (R,) each.

    Args:
        parameters: N.
        tokens: D, of the whole run.
        losses: nats per token of held-out text at its end.
        lines: of each run in its file, if it comes from one.

    Raises:
        InputError: for columns of different length, or a value that is not a finite number above 0.
    """

    parameters: numpy.ndarray
    tokens: numpy.ndarray
    losses: numpy.ndarray
    lines: numpy.ndarray | None = None

    def __post_init__(self) -> None:
        for name in ("parameters", "tokens", "losses"):
            values = numpy.asarray(getattr(self, name), dtype=float)
            object.__setattr__(self, name, values)
            if values.shape != (len(self.losses),):
                raise InputError(f"{name}: {values.size} value(s) for {len(self.losses)} loss(es)")
            bad = numpy.flatnonzero(~(numpy.isfinite(values) & (values > 0)))
            if len(bad):
                raise InputError(f"{name} of run {bad[0] + 1} is {values[bad[0]]}: expected a finite number above 0")

    def __len__(self) -> int:
        return len(self.losses)

    @property
    def columns(self) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
        """Return N, D and losses."""
        return self.parameters, self.tokens, self.losses

    @property
    def compute(self) -> numpy.ndarray:
        """Return 6 N D of each run, in FLOPs."""
        return FLOPS_A_PARAMETER * self.parameters * self.tokens

    def subset(self, rows: Sequence[int] | numpy.ndarray) -> "Runs":
        """Return the runs with these indices."""
        rows = numpy.asarray(rows, dtype=int)
        lines = None if self.lines is None else self.lines[rows]
        return Runs(self.parameters[rows], self.tokens[rows], self.losses[rows], lines)

    def split_by_compute(self, share: float) -> tuple["Runs", "Runs"]:
        """Split off the `share` of runs with the most compute (at least one), which a law should predict.

        Raises:
            InputError: for a share outside (0, 1).
        """
        if not 0 < share < 1:
            raise InputError(f"the share of runs to hold out must lie between 0 and 1, got {share}")
        order = numpy.argsort(self.compute, kind="stable")
        count = min(max(1, round(share * len(self))), len(self) - 1)
        return self.subset(numpy.sort(order[:-count])), self.subset(numpy.sort(order[-count:]))


def read_runs(
    path: str | Path, parameters: str | None = None, tokens: str | None = None, losses: str | None = None
) -> Runs:
    """Read runs from a CSV file with a header.

    Args:
        path: the file.
        parameters, tokens, losses: names of the columns; by default common ones (`PARAMETERS`, `TOKENS`, `LOSSES`),
            in any case. Without tokens they are C / (6 N), from a column of FLOPs (`COMPUTE`).

    Raises:
        InputError: naming the file, and the row and column where it can.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{file}: no such file; expected a CSV file of runs")
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            header = list(reader.fieldnames or [])
            rows = [(reader.line_num, row) for row in reader]
            for line, row in rows:
                # Cells beyond the header; empty ones come from a spreadsheet's trailing commas.
                if any(row.get(None, ())):
                    cells = len(header) + len(row[None])
                    raise InputError(
                        f"{file}, line {line}: {cells} cells under {len(header)} columns; decimals need a point, and "
                        "text with a comma quotes"
                    )
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file}: not a CSV file: {error}") from None
    columns = [
        _column(file, header, parameters, PARAMETERS, "parameters"),
        _column(file, header, losses, LOSSES, "losses"),
        _column(file, header, tokens, TOKENS, "tokens", optional=True),
    ]
    from_compute = columns[2] is None
    if from_compute:
        columns[2] = _column(file, header, None, COMPUTE, "tokens", others=TOKENS)
    if not rows:
        raise InputError(f"{file}: no run below the header")
    sizes, final, data = ([_number(file, line, row, name) for line, row in rows] for name in columns)
    data = numpy.array(data) / (FLOPS_A_PARAMETER * numpy.array(sizes)) if from_compute else numpy.array(data)
    return Runs(numpy.array(sizes), data, numpy.array(final), numpy.array([line for line, _ in rows]))


def _column(
    file: Path,
    header: list[str],
    given: str | None,
    known: tuple[str, ...],
    what: str,
    optional: bool = False,
    others: tuple[str, ...] = (),
) -> str | None:
    """Return the column of the header that holds `what`."""
    if given is not None:
        if given not in header:
            raise InputError(f"{file}: no column {given!r} for {what}; it has {', '.join(map(repr, header))}")
        if header.count(given) > 1:
            raise InputError(f"{file}: column {given!r} for {what} comes {header.count(given)} times")
        return given
    plain: dict[str, list[str]] = {}
    for name in filter(None, header):
        plain.setdefault("".join(character for character in name.lower() if character.isalnum()), []).append(name)
    found, *others_found = next((plain[name] for name in known if name in plain), [None])
    if others_found:
        twice = ", ".join(map(repr, (found, *others_found)))
        raise InputError(f"{file}: several columns for {what}: {twice}; keep one, or give them different names")
    if found is None and not optional:
        accepted = ", ".join((*others, *known))
        seen = ", ".join(map(repr, header)) or "no header"
        raise InputError(f"{file}: no column for {what}; it has {seen}; accepted names: {accepted}")
    return found


def _number(file: Path, line: int, row: dict[str, str], column: str) -> float:
    text = row.get(column)
    try:
        value = float(text)
    except (TypeError, ValueError):
        raise InputError(f"{file}, line {line}, column {column!r}: {text!r} is not a number") from None
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{file}, line {line}, column {column!r}: {text!r}; expected a finite number above 0")
    return value
