"""Classification, tagging and spans: flags, their checks, data, model, and evaluation."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hfllm.data import labelled
from hfllm.data.labelled import COLUMNS, SPANS, TASKS, TEXT, WORDS, Encoded, Row, Window
from hfllm.data.loading import ON_WORLD, RowArguments
from hfllm.data.receipt import MAX_NAMES, note_figures
from hfllm.errors import InputError
from hfllm.evaluation import classification
from hfllm.evaluation.classification import bag_of_words, majority
from hfllm.flags import ALWAYS, NAMED, Clashes, Fact, Range, Refused, at_least, check_flags, flag
from hfllm.generation import spans
from hfllm.generation.spans import best_spans
from hfllm.outputs.figures import shown
from hfllm.outputs.report import Bars, Found
from hfllm.outputs.verdict import Promise
from hfllm.runs.command_line import say
from hfllm.runs.recipes import settings_file
from hfllm.trainers.learning_rate import BatchArguments

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
    from trl import ModelConfig

    from hfllm.runs.models import NamedModel
    from hfllm.trainers.trl_trainers import HeadTrainer


# ---- flags ----


# The libraries' dataclasses of flags accepted by the recipe in addition to its own.
LIBRARY = ("transformers.TrainingArguments", "trl.ModelConfig")
HEADS = {
    TEXT: ("AutoModelForSequenceClassification", "SEQ_CLS"),
    WORDS: ("AutoModelForTokenClassification", "TOKEN_CLS"),
    SPANS: ("AutoModelForQuestionAnswering", "QUESTION_ANS"),
}


@dataclass(frozen=True)
class ClassifyArguments(RowArguments, BatchArguments):
    """Which labels are learned, and from what."""

    task: str = flag(
        TEXT,
        "text-classification: a label for a text; token-classification: a tag for each word; "
        "question-answering: a span of a context.",
        choices=[*TASKS],
    )
    num_examples: int = flag(3000, "Rows of the embedded world to train on.", takes=at_least(1))
    num_eval_examples: int = flag(600, "Held-out rows of the embedded world.", takes=at_least(1))
    class_names: list[str] | None = flag(
        None,
        "Names of the labels, in order, where the rows write them as numbers from 0.",
        never=(
            Fact(lambda flags: flags.task == SPANS, "spans have no labels"),
            ON_WORLD.because("the world's labels have names"),
        ),
    )
    max_length: int = flag(
        384, "Tokens of a row; of a longer text the end is cut, of a context windows are made.", takes=at_least(1)
    )
    doc_stride: int = flag(128, "Tokens that two neighboring windows of a long context share.")
    max_answer_length: int = flag(30, "The longest answer that is looked for, in tokens.", takes=at_least(1))
    label_token: str = flag(
        "first",
        "The token of a word that has its tag: the first, as is usual, or the last, at which a causal "
        "model has read the whole word.",
        choices=["first", "last"],
        never=Fact(lambda flags: flags.task != WORDS, f"it is for {WORDS}"),
    )
    eval_share: float = flag(
        0.2,
        "Share of your rows to hold out, if you name no others.",
        takes=Range("a share between 0 and 1", lambda value: 0 < value < 1),
    )
    max_eval_samples: int = flag(2000, "Held-out rows at most.", takes=at_least(1))
    pretrain_config: str | None = flag(
        None,
        "YAML flags of the pretraining that makes the base model, if none is named.",
        never=NAMED.because("a model is named"),
    )

    # Its columns are no format's of conversations; `check` looks at them.
    takes_any_column: ClassVar[bool] = True

    refused: ClassVar[Refused] = {"label_smoothing_factor": ALWAYS.because("labels are learned as they are")}
    clashes: ClassVar[Clashes] = {
        "--doc_stride {doc_stride}: expected at least 0 and less than --max_length {max_length}": lambda flags: (
            flags.task == SPANS and not 0 <= flags.doc_stride < flags.max_length
        ),
    }


def default_settings(user_flags: Mapping[str, Any]) -> list[Path]:
    """Return the settings of the embedded world's model, of an adapter, or of all weights of your own model."""
    if not user_flags.get("model_name_or_path"):
        return [settings_file("classify/world.yaml")]
    return [settings_file("classify/adapter.yaml" if user_flags.get("use_peft") else "classify/model.yaml")]


def check(script_args: ClassifyArguments, training_args: "TrainingArguments", model_args: "ModelConfig") -> None:
    """Refuse flags without effect, and contradictory flags."""
    check_flags(script_args, training_args, model_args)
    task, known = script_args.task, COLUMNS[script_args.task]
    for ours in script_args.renaming:
        if ours not in known:
            raise InputError(f"--column_mapping {ours}=...: {task} has no column {ours!r}; it has: {', '.join(known)}")


def load_with_head(
    task: str, labels: Sequence[str], model: "NamedModel", adapter: "PeftConfig | None", output_dir: str
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load the model with the head of a task, new for a language model, and its tokenizer.

    Args:
        labels: of the head; none for spans.
        model: the model; a named adapter is merged if a new one is trained.
        adapter: the new one.
        output_dir: folder of a merged base.
    """
    import transformers

    from hfllm.data.labelled import check_tokenizer
    from hfllm.runs.models import load_head_to_train, load_tokenizer

    auto_name, task_type = HEADS[task]
    tokenizer = load_tokenizer(model.name, model.revision)
    check_tokenizer(tokenizer)
    names = dict(enumerate(labels))
    head = {"id2label": names, "label2id": {name: number for number, name in names.items()}} if labels else {}
    loaded = load_head_to_train(model, output_dir, getattr(transformers, auto_name), task_type, **head)
    loaded.config.pad_token_id = tokenizer.pad_token_id
    if adapter is not None:
        from peft import get_peft_model

        loaded = get_peft_model(loaded, adapter)
    return loaded, tokenizer


def next_lines(task: str, folder: str, example: Row, is_adapter: bool, labels: Sequence[str]) -> list[str]:
    """Return the lines of Python to load the result, and to try it where transformers has a pipeline for the task."""
    kind = HEADS[task][0].removeprefix("AutoModelFor")
    if is_adapter:
        names = f", id2label={dict(enumerate(labels))!r}" if labels else ""
        load = f"model = AutoPeftModelFor{kind}.from_pretrained({folder!r}{names})"
        return ["import hfllm", f"from peft import AutoPeftModelFor{kind}", load]
    if task == SPANS:
        return [
            "import hfllm",
            "from transformers import AutoModelForQuestionAnswering, AutoTokenizer",
            "from hfllm.generation.spans import answer_spans",
            f"model = AutoModelForQuestionAnswering.from_pretrained({folder!r})",
            f"tokenizer = AutoTokenizer.from_pretrained({folder!r})",
            f"print(answer_spans(model, tokenizer, [{example['question']!r}], [{example['context']!r}]))",
        ]
    return [
        "import hfllm",
        "from transformers import pipeline",
        f"classify = pipeline({task!r}, {folder!r})",
        f"print(classify({example['prompt']!r}))",
    ]


# ---- data ----
#
# The rows of classification, tagging and spans, and their tokens.


Rows = list[Row]


@dataclass(frozen=True)
class LabelTask:
    """A task with its labels, and the settings of its rows.

    Args:
        name: one of `TASKS`.
        labels: of the head; none for spans.
        doc_stride: tokens that two neighboring windows of a long context share.
        label_token: the token of a word that has its tag, first or last.
        max_answer_length: the longest span, in tokens.
    """

    name: str
    labels: Sequence[str]
    doc_stride: int
    label_token: str
    max_answer_length: int


@dataclass(frozen=True)
class Tokens:
    """Encoded rows, and their relation to the original rows.

    Args:
        encoded: with `input_ids` and `labels`.
        indices: of tagged rows, the token of each word.
        windows: of rows with spans.
        counts: numbers of cut or split items, by name.
    """

    encoded: list[Encoded]
    indices: list[list[int]] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


def labels_of(
    task: str, train_rows: Rows, held_out: Rows, class_names: Sequence[str] | None, dataset_name: str
) -> list[str]:
    """Return the labels of training and held-out rows, and print those that no training row has.

    Args:
        class_names: of the labels, where the rows write them as numbers.
        dataset_name: with the rows, for errors.
    """
    try:
        labels = labelled.labels_of(task, [*train_rows, *held_out], class_names)
    except InputError as error:
        raise InputError(f"{dataset_name}: {error}") from None
    if task == TEXT:
        counts = Counter(row["label"] for row in train_rows)
        note_figures("labels of training rows", counts)
        most = ", ".join(f"{name} {count:,}" for name, count in counts.most_common(MAX_NAMES))
        say(f"{dataset_name}: training rows by label: {most}{' ...' if len(counts) > MAX_NAMES else ''}")
    if task == TEXT and (unseen := {row["label"] for row in held_out} - {row["label"] for row in train_rows}):
        names = ", ".join(sorted(unseen))
        say(f"{dataset_name}: held-out rows have labels that no training row has: {names}")
    return labels


def tokens_of(
    task: LabelTask, rows: Rows, tokenizer: "PreTrainedTokenizerBase", max_length: int, title: str
) -> Tokens:
    """Return rows as tokens; a printed line gives the number of cuts.

    Args:
        max_length: the longest row, in tokens.
        title: of the rows, for this line.
    """
    from hfllm.data.labelled import encode_spans, encode_texts, encode_words

    if task.name == SPANS:
        encoded, windows = encode_spans(rows, tokenizer, max_length, min(task.doc_stride, max_length // 3))
        return Tokens(encoded, windows=windows, counts={"windows": len(windows)})
    if task.name == TEXT:
        encoded, cut = encode_texts(rows, tokenizer, max_length, task.labels)
        indices, name = [], "cut_rows"
    else:
        encoded, indices = encode_words(rows, tokenizer, max_length, task.labels, task.label_token)
        cut, name = sum(index < 0 for row in indices for index in row), "cut_words"
    if cut:
        say(f"{title}: {cut:,} {name.removeprefix('cut_')} cut to --max_length {max_length} tokens, or beyond it")
    return Tokens(encoded, indices, counts={name: cut} if cut else {})


def make_trainer(
    args: "TrainingArguments",
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    train_tokens: Tokens,
    test_tokens: Tokens,
) -> "HeadTrainer":
    """Return a trainer of the model's head."""
    from hfllm.trainers.callbacks import use_plain_lines
    from hfllm.trainers.monitors import StalledWeights
    from hfllm.trainers.trl_trainers import HeadTrainer

    trainer = HeadTrainer(
        model=model,
        args=args,
        train_dataset=train_tokens.encoded,
        eval_dataset=test_tokens.encoded,
        processing_class=tokenizer,
    )
    use_plain_lines(trainer)
    trainer.add_callback(StalledWeights())
    return trainer


# ---- evaluation ----
#
# The results of a fine-tuned head, next to controls trained on the same rows.


CONTROLS = {"majority": majority, "bag_of_words": bag_of_words}
# The most informative figure of each task, and its name in words.
MAIN = {
    TEXT: ("accuracy", "accuracy"),
    WORDS: ("entity_f1", "F1 of entities"),
    SPANS: ("f1", "F1 of answers"),
}
SAMPLES = 12


def predictions(task: LabelTask, trainer: "HeadTrainer", rows: Sequence[Row], tokens: Tokens) -> list[Any]:
    """Return the model's output for each row: a label, a tag per word, or an answer; empty for none.

    A truncated word gets the tag O, or the first of all tags where there is no O.
    """
    import numpy

    scores = trainer.predict(tokens.encoded).predictions
    if task.name == SPANS:
        has_none = any(not row["texts"] for row in rows)
        return best_spans(rows, tokens.windows, *scores[:2], task.max_answer_length, may_be_none=has_none)
    best, labels = numpy.asarray(scores).argmax(-1).tolist(), task.labels
    if task.name == TEXT:
        return [labels[index] for index in best]
    other = classification.OUTSIDE if classification.OUTSIDE in labels else labels[0]
    return [
        [labels[row[index]] if index >= 0 else other for index in indices]
        for row, indices in zip(best, tokens.indices, strict=True)
    ]


def task_metrics(task: str, predicted: Sequence[Any], rows: Sequence[Row], prefix: str = "") -> dict[str, float]:
    """Return the figures of predictions, with errors."""
    if task == TEXT:
        return classification.label_metrics(predicted, [row["label"] for row in rows], prefix)
    if task == WORDS:
        return classification.tag_metrics(predicted, [row["tags"] for row in rows], prefix)
    scores = [spans.exact_and_f1(prediction, row["texts"]) for prediction, row in zip(predicted, rows, strict=True)]
    return classification.span_metrics(scores, prefix)


def judge_held_out(task: str, predicted: Sequence[Any], train_rows: Sequence[Row], rows: Sequence[Row]) -> Found:
    """Judge the model and both controls on the held-out rows.

    Args:
        predicted: the model's output for each held-out row.
        train_rows: of the controls.
        rows: held out.
    """
    outputs = {"": predicted} | {f"{name}_": control(task, train_rows, rows) for name, control in CONTROLS.items()}
    metrics: dict[str, float] = {}
    for prefix, output in outputs.items():
        metrics |= task_metrics(task, output, rows, prefix)
    name, words = MAIN[task]
    title = f"{words} on {len(rows):,} held-out rows"
    keys = {"the model": name, "majority": f"majority_{name}", "bag of words": f"bag_of_words_{name}"}
    notes = {label: shown(metrics, key) for label, key in keys.items()}
    plot = Bars(title, words, {label: metrics[key] for label, key in keys.items()}, notes)
    tables = {**_class_table(task, predicted, rows), "Samples": _samples(task, predicted, rows)}
    summary = f"{title}: {', '.join(f'{label} {note}' for label, note in notes.items())}"
    return Found(metrics, summary, tables, {"held_out": plot})


def claims_of(task: str) -> list[Promise]:
    """Return what a head must surpass: the most frequent label, and a bag of words."""
    name, words = MAIN[task]
    controls = {"majority": "of the most frequent", "bag_of_words": "of a bag of words"}
    return [Promise(words, name, f"{control}_{name}", beside) for control, beside in controls.items()]


def _class_table(task: str, predicted: Sequence[Any], rows: Sequence[Row]) -> dict[str, list[dict[str, object]]]:
    if task == SPANS:
        return {}
    gold = [row["label"] if task == TEXT else row["tags"] for row in rows]
    if task == WORDS:
        predicted, gold = ([tag for row in each for tag in row] for each in (predicted, gold))
    return {"Classes" if task == TEXT else "Tags of words": classification.class_table(predicted, gold)}


def _samples(task: str, predicted: Sequence[Any], rows: Sequence[Row]) -> list[dict[str, str]]:
    """Return some rows with the model's output: wrong ones first, as the most informative."""
    table = []
    for prediction, row in zip(predicted, rows, strict=True):
        if task == SPANS:
            prompt, golds = f"{row['question']} | {row['context']}", row["texts"]
            output, gold = prediction or "(none)", " / ".join(golds) or "(none)"
            is_right = prediction in golds if golds else not prediction
        else:
            prompt, gold = row["prompt"], row["label" if task == TEXT else "tags"]
            is_right = prediction == gold
            output, gold = (prediction, gold) if task == TEXT else (" ".join(prediction), " ".join(gold))
        table.append({"prompt": prompt, "said": output, "gold": gold, "right": "yes" if is_right else "no"})
    table.sort(key=lambda row: row["right"])
    return table[: SAMPLES // 2] + table[-(SAMPLES // 2) :]
