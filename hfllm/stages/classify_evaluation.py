"""What a fine-tuned head gives, beside controls that learn from the same rows."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hfllm.data.labelled import SPANS, TEXT, WORDS, Row
from hfllm.evaluation import classification
from hfllm.evaluation.classification import bag_of_words, majority
from hfllm.generation import spans
from hfllm.generation.spans import best_spans
from hfllm.outputs.report import Bars, Found, plus_minus
from hfllm.stages.classify import ClassifyArguments
from hfllm.stages.classify_data import Tokens

if TYPE_CHECKING:
    from hfllm.trainers.trl_trainers import HeadTrainer

CONTROLS = {"majority": majority, "bag_of_words": bag_of_words}
# The figure of each task that says most, and its name in words.
MAIN = {
    TEXT: ("accuracy", "accuracy"),
    WORDS: ("entity_f1", "F1 of entities"),
    SPANS: ("f1", "F1 of answers"),
}
SAMPLES = 12


def predictions(
    script_args: ClassifyArguments, trainer: "HeadTrainer", rows: Sequence[Row], tokens: Tokens, labels: Sequence[str]
) -> list[Any]:
    """Return what the model says of each row: a label, a tag for each word, or an answer; empty for none.

    A word that is cut off gets the tag O, or the first of all where there is none such.
    """
    import numpy

    scores = trainer.predict(tokens.encoded).predictions
    if script_args.task == SPANS:
        has_none = any(not row["texts"] for row in rows)
        return best_spans(
            rows, tokens.windows, scores[0], scores[1], script_args.max_answer_length, may_be_none=has_none
        )
    best = numpy.asarray(scores).argmax(-1)
    if script_args.task == TEXT:
        return [labels[place] for place in best.tolist()]
    other = classification.OUTSIDE if classification.OUTSIDE in labels else labels[0]
    return [
        [labels[row[place]] if place >= 0 else other for place in places]
        for row, places in zip(best.tolist(), tokens.places, strict=True)
    ]


def judged(task: str, predicted: Sequence[Any], rows: Sequence[Row], prefix: str = "") -> dict[str, float]:
    """Return the figures of predictions, with errors."""
    if task == TEXT:
        return classification.label_metrics(predicted, [row["label"] for row in rows], prefix)
    if task == WORDS:
        return classification.tag_metrics(predicted, [row["tags"] for row in rows], prefix)
    scores = [spans.exact_and_f1(said, row["texts"]) for said, row in zip(predicted, rows, strict=True)]
    return classification.span_metrics(scores, prefix)


def evaluate(
    script_args: ClassifyArguments,
    trainer: "HeadTrainer",
    train_rows: Sequence[Row],
    rows: Sequence[Row],
    tokens: Tokens,
    labels: Sequence[str],
) -> Found:
    """Judge the model and both controls on the held-out rows."""
    task = script_args.task
    said = {"": predictions(script_args, trainer, rows, tokens, labels)}
    said |= {f"{name}_": control(task, train_rows, rows) for name, control in CONTROLS.items()}
    metrics: dict[str, float] = {}
    for prefix, predicted in said.items():
        metrics |= judged(task, predicted, rows, prefix)
    name, words = MAIN[task]
    shown = {"the model": "", "majority": "majority_", "bag of words": "bag_of_words_"}
    parts = [f"{label} {plus_minus(metrics[p + name], metrics.get(f'{p}{name}_se'))}" for label, p in shown.items()]
    plot = Bars(
        f"{words} on {len(rows):,} held-out rows",
        words,
        {label: metrics[prefix + name] for label, prefix in shown.items()},
        {
            label: plus_minus(metrics[prefix + name], metrics.get(f"{prefix}{name}_se"))
            for label, prefix in shown.items()
        },
    )
    tables = {**_class_table(task, said[""], rows), "Samples": _samples(task, said[""], rows)}
    summary = f"{words} on {len(rows):,} held-out rows: {', '.join(parts)}"
    return Found(metrics, summary, tables, {"held_out": plot})


def _class_table(task: str, predicted: Sequence[Any], rows: Sequence[Row]) -> dict[str, list[dict[str, object]]]:
    if task == SPANS:
        return {}
    gold = [row["label"] if task == TEXT else row["tags"] for row in rows]
    if task == WORDS:
        predicted, gold = ([tag for row in each for tag in row] for each in (predicted, gold))
    return {"Classes" if task == TEXT else "Tags of words": classification.class_table(predicted, gold)}


def _samples(task: str, predicted: Sequence[Any], rows: Sequence[Row]) -> list[dict[str, str]]:
    """Return some rows with what the model says: wrong ones first, as these tell most."""
    table = []
    for said, row in zip(predicted, rows, strict=True):
        gold = {TEXT: row.get("label"), WORDS: row.get("tags"), SPANS: row.get("texts")}[task]
        if task == WORDS:
            text, shown = row["prompt"], [" ".join(said), " ".join(gold)]
        elif task == SPANS:
            text, shown = f"{row['question']} | {row['context']}", [said or "(none)", " / ".join(gold) or "(none)"]
        else:
            text, shown = row["prompt"], [said, gold]
        is_right = said in gold if task == SPANS and gold else said == gold or (task == SPANS and not said)
        table.append({"prompt": text, "said": shown[0], "gold": shown[1], "right": "yes" if is_right else "no"})
    table.sort(key=lambda row: row["right"])
    return table[: SAMPLES // 2] + table[-(SAMPLES // 2) :]
