"""Log tables of completions to the integrations of `report_to`."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import (
    CometCallback,
    MLflowCallback,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)

Rows = Sequence[dict[str, Any]]


def log_table(callbacks: Sequence[TrainerCallback], name: str, rows: Rows, step: int) -> None:
    """Log rows to every integration among a trainer's callbacks that supports tables or text.

    Args:
        callbacks: the trainer's; those that are not integrations, or not yet set up, are skipped.
        name: the name of the table.
        rows: rows with the same columns.
        step: the optimizer step.
    """
    for callback in callbacks:
        for kind, log in BACK_ENDS.items():
            if isinstance(callback, kind):
                log(callback, name, rows, step)


def storable(rows: Rows) -> list[dict[str, Any]]:
    """Return rows in which a message's fields are text, other values as JSON text.

    A column of a file has values of one kind: arguments of calls have any, and content is text or a list of parts.
    """

    def message(fields: Mapping[str, Any]) -> dict[str, str | None]:
        return {
            name: value if isinstance(value, str | None) else json.dumps(value, ensure_ascii=False, default=str)
            for name, value in fields.items()
        }

    return [
        {name: [message(each) for each in value] if isinstance(value, list) else value for name, value in row.items()}
        for row in rows
    ]


def columns_of(rows: Rows) -> dict[str, list]:
    """Return rows as columns."""
    return {column: [row[column] for row in rows] for column in rows[0]}


def markdown_of(rows: Rows) -> str:
    """Return rows as a markdown table, with line breaks and vertical bars escaped."""

    def line(cells: Sequence) -> str:
        shown = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells]
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " / ") for cell in shown) + " |"

    return "\n".join([line(list(rows[0])), line(["-"] * len(rows[0])), *(line(list(row.values())) for row in rows)])


def _wandb(callback: WandbCallback, name: str, rows: Rows, step: int) -> None:
    if callback._wandb is not None and callback._wandb.run is not None:
        table = callback._wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        callback._wandb.log({name: table, "train/global_step": step})


def _trackio(callback: TrackioCallback, name: str, rows: Rows, step: int) -> None:
    import pandas

    if callback._initialized:
        callback._trackio.log({name: callback._trackio.Table(dataframe=pandas.DataFrame(columns_of(rows)))})


def _tensorboard(callback: TensorBoardCallback, name: str, rows: Rows, step: int) -> None:
    if callback.tb_writer is not None:
        callback.tb_writer.add_text(name, markdown_of(rows), step)


def _mlflow(callback: MLflowCallback, name: str, rows: Rows, step: int) -> None:
    if callback._initialized:
        callback._ml_flow.log_table(columns_of([{"step": step, **row} for row in rows]), f"{name}.json")


def _comet(callback: CometCallback, name: str, rows: Rows, step: int) -> None:
    if callback._experiment is not None:
        data = [list(row.values()) for row in rows]
        callback._experiment.log_table(f"{name}_{step}.csv", tabular_data=data, headers=list(rows[0]))


BACK_ENDS: dict[type[TrainerCallback], Callable[[Any, str, Rows, int], None]] = {
    WandbCallback: _wandb,
    TrackioCallback: _trackio,
    TensorBoardCallback: _tensorboard,
    MLflowCallback: _mlflow,
    CometCallback: _comet,
}
