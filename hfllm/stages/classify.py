"""Classification, tagging and spans: flags, what they refuse, the stages before, and the model with its head."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hfllm.data.labelled import COLUMNS, SPANS, TASKS, TEXT, WORDS, Row
from hfllm.data.loading import RowArguments, renaming_of
from hfllm.errors import InputError, refuse
from hfllm.runs.chain import Chain, chain_before
from hfllm.runs.recipes import settings_file
from hfllm.trainers.learning_rate import BatchArguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
    from trl import ModelConfig

# The libraries' dataclasses of flags that the recipe takes besides its own.
LIBRARY = ("transformers.TrainingArguments", "trl.ModelConfig")
HEADS = {
    TEXT: ("AutoModelForSequenceClassification", "SEQ_CLS"),
    WORDS: ("AutoModelForTokenClassification", "TOKEN_CLS"),
    SPANS: ("AutoModelForQuestionAnswering", "QUESTION_ANS"),
}


@dataclass(frozen=True)
class ClassifyArguments(RowArguments, BatchArguments):
    """Which labels are learned, and from what."""

    task: str = field(
        default=TEXT,
        metadata={
            "help": "text-classification: a label for a text; token-classification: a tag for each word; "
            "question-answering: a span of a context.",
            "choices": [*TASKS],
        },
    )
    num_examples: int = field(default=3000, metadata={"help": "Rows of the embedded world to train on."})
    num_eval_examples: int = field(default=600, metadata={"help": "Held-out rows of the embedded world."})
    class_names: list[str] | None = field(
        default=None, metadata={"help": "Names of the labels, in order, where the rows write them as numbers from 0."}
    )
    max_length: int = field(
        default=384,
        metadata={"help": "Tokens of a row; of a longer text the end is cut, of a context windows are made."},
    )
    doc_stride: int = field(
        default=128, metadata={"help": "Tokens that two neighboring windows of a long context share."}
    )
    max_answer_length: int = field(default=30, metadata={"help": "The longest answer that is looked for, in tokens."})
    label_token: str = field(
        default="first",
        metadata={
            "help": "The token of a word that has its tag: the first, as is usual, or the last, at which a causal "
            "model has read the whole word.",
            "choices": ["first", "last"],
        },
    )
    eval_share: float = field(default=0.2, metadata={"help": "Share of your rows to hold out, if you name no others."})
    max_eval_samples: int = field(default=2000, metadata={"help": "Held-out rows at most."})
    pretrain_config: str | None = field(
        default=None, metadata={"help": "YAML flags of the pretraining that makes the base model, if none is named."}
    )

    # Its columns are no format's of conversations; `check` looks at them.
    takes_any_column: ClassVar[bool] = True

    def __post_init__(self):
        if not 0 < self.eval_share < 1:
            raise ValueError(f"eval_share must lie between 0 and 1, got {self.eval_share}")
        for name in ("max_length", "max_answer_length", "num_examples", "num_eval_examples", "max_eval_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.task == SPANS and not 0 <= self.doc_stride < self.max_length:
            raise ValueError(f"doc_stride must lie in [0, max_length), got {self.doc_stride} of {self.max_length}")


def default_settings(given: Mapping[str, Any]) -> list[Path]:
    """Return the settings of the embedded world's model, of an adapter, or of all weights of your own model."""
    if not given.get("model_name_or_path"):
        return [settings_file("classify/world.yaml")]
    return [settings_file("classify/adapter.yaml" if given.get("use_peft") else "classify/model.yaml")]


def check(script_args: ClassifyArguments, training_args: "TrainingArguments", model_args: "ModelConfig") -> None:
    """Refuse flags that have no effect or contradict each other.

    Raises:
        InputError: naming the flag.
    """
    from hfllm.data.sources import WORLD

    task, is_world = script_args.task, script_args.dataset_name == WORLD
    refuse(
        bool(model_args.model_name_or_path and script_args.pretrain_config), "--pretrain_config", "a model is named"
    )
    refuse(task == SPANS and bool(script_args.class_names), "--class_names", "spans have no labels")
    refuse(is_world and bool(script_args.class_names), "--class_names", "the world's labels have names")
    refuse(task != WORDS and script_args.label_token != "first", "--label_token", f"it is for {WORDS}")
    refuse(training_args.label_smoothing_factor > 0, "--label_smoothing_factor", "labels are learned as they are")
    for ours in renaming_of(script_args):
        if ours not in COLUMNS[task]:
            raise InputError(
                f"--column_mapping {ours}=...: {task} has no column {ours!r}; it has: {', '.join(COLUMNS[task])}"
            )


def stages_before(
    script_args: ClassifyArguments, training_args: "TrainingArguments", model_args: "ModelConfig"
) -> Chain:
    """Return the pretraining that makes the base model, if none is named."""
    return chain_before(
        "classify",
        training_args.output_dir,
        training_args.seed,
        script_args.world_seed,
        given_models={"pretrain": model_args.model_name_or_path},
        configs={"pretrain": script_args.pretrain_config},
    )


def load_with_head(
    task: str, labels: Sequence[str], model_args: "ModelConfig", output_dir: str
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load the model with the head of a task, new for a language model, and its tokenizer.

    Args:
        labels: of the head; none for spans.
        model_args: which model; with `--use_peft` an adapter is put on it, and an adapter that is named is merged.
        output_dir: where a merged base is kept.

    Raises:
        InputError: when either cannot be loaded, or the tokenizer cannot say where its tokens are.
    """
    import transformers

    from hfllm.data.labelled import check_tokenizer
    from hfllm.runs.models import load_head_to_train, load_tokenizer, peft_config

    auto_name, task_type = HEADS[task]
    tokenizer = load_tokenizer(model_args.model_name_or_path, model_args.model_revision)
    check_tokenizer(tokenizer)
    names = dict(enumerate(labels))
    head = {"id2label": names, "label2id": {name: number for number, name in names.items()}} if labels else {}
    model = load_head_to_train(model_args, output_dir, getattr(transformers, auto_name), task_type, **head)
    model.config.pad_token_id = tokenizer.pad_token_id
    adapter = peft_config(model_args, task_type)
    if adapter is not None:
        from peft import get_peft_model

        model = get_peft_model(model, adapter)
    return model, tokenizer


def next_lines(task: str, folder: str, example: Row, is_adapter: bool, labels: Sequence[str]) -> list[str]:
    """Return the lines of Python that load the result, and try it where transformers has a pipeline for the task."""
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
