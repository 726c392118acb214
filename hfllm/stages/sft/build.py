"""Fine-tuning on instructions: its rows, with images and with passages, their tokens, and what has been learned."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm.data import formats
from hfllm.data.augmentation import PREFILL, augmented_demonstrations, training_texts
from hfllm.data.conversations import Conversations, has_markers, read_back, template_of
from hfllm.data.formats import Dropped, OriginRow, learned_turns, origin_of
from hfllm.data.images.rows import Rows, as_dataset, without_images, words_of_places
from hfllm.data.loading import InstructionArguments, split_rows
from hfllm.data.packing import IGNORE
from hfllm.data.receipt import note_figures
from hfllm.data.sources import PYDOC, WORLD, Source
from hfllm.data.tokenizer import BUILT_IN, OWN, plain_text, set_chat_template
from hfllm.data.world.demonstrators import instruction_rows
from hfllm.data.world.world import World
from hfllm.errors import InputError, refuse, refuse_if
from hfllm.evaluation.before_after import ANSWER_LENGTH, MOST_ROWS, evaluate_tuned, tuning_metrics
from hfllm.evaluation.pictures import answer_pictures, other_places
from hfllm.evaluation.suites.refusals import refuses
from hfllm.fingerprint import file_fingerprint
from hfllm.flags import changed
from hfllm.grounding.answers import grounded, last_question
from hfllm.grounding.passages import FILE, Passages
from hfllm.grounding.retrieval import BM25Retriever, scoring_enough
from hfllm.models.loading.saved import add_tokens
from hfllm.multimodal.processors import tokenizer_of
from hfllm.outputs.figures import shown
from hfllm.runs.command_line import say
from hfllm.stages.sft.flags import FRACTION, NO_ROWS, TOP_K, RetrievalArguments, passage_files
from hfllm.stages.shared import rows_with_images, user_rows

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
    from trl import SFTConfig

    from hfllm.data.conversations import Labeled
    from hfllm.data.formats import Row
    from hfllm.evaluation.before_after import TunedEvaluation
    from hfllm.grounding.retrieval import Found
    from hfllm.multimodal.processors import ProcessingClass
    from hfllm.trainers.trl_trainers import SFTTrainer


# ---- rows ----


STAGE = "hfllm sft"


def instruction_data(
    script_args: InstructionArguments,
    num_examples: int,
    seed: int,
    model_name: str | None = None,
    processor: "ProcessorMixin | None" = None,
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Return training and held-out rows with `prompt` and `completion` messages, and perhaps `images`.

    If one row has images, the messages of all rows have parts as their content.

    Args:
        script_args: the source of the data, and the learned turns of a conversation.
        num_examples: demonstrations, where it comes from the embedded world.
        seed: of the demonstrations and of the split.
        model_name: of the trained model, for error messages.
        processor: the model's, `None` for a text model.
    """

    def convert(origin: str, row: formats.Row) -> formats.Row:
        row = formats.to_sft(origin, row)
        return formats.to_be_learned(origin, formats.last_turn(row)) if script_args.loss_on == "last" else row

    if script_args.dataset_name == WORLD:
        rows = instruction_rows(World(script_args.world_seed), num_examples, seed)
        source = Source(rows, [f"world, row {number}" for number in range(1, len(rows) + 1)])
        return split_rows(formats.convert(source, convert), seed)
    if processor is not None:
        reading = script_args.image_reading(words_of_places(processor))
        return rows_with_images(script_args.row_sources, reading, convert, STAGE, seed)
    model = f"the model {model_name!r}" if model_name else "the model"
    return user_rows(script_args.row_sources, without_images(convert, model), seed)


def augmented(rows: list[Mapping[str, Any]], share: float, seed: int, dataset_name: str) -> list[Mapping[str, Any]]:
    """Return training rows, a share of them in other forms, and print how many refusals are prefilled.

    Args:
        share: of the rows, 0 to 1.
        seed: of the choice of these rows.
        dataset_name: with the rows, whose language the added sentences have.
    """
    if not share:
        return rows
    rows = augmented_demonstrations(rows, share, seed, training_texts(dataset_name), refuses)
    prefilled = sum(PREFILL in row for row in rows)
    say(f"sft: --augment {share:g} of {len(rows):,} questions; {prefilled:,} prefilled refusals")
    return rows


# ---- what is learned of the rows ----


def check_head(model: "PreTrainedModel") -> None:
    """Refuse to train an adapter of the output head further: TRL reads the head's own weights, past the adapter.

    Args:
        model: the trained model.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import TrainableTokensWrapper

    if isinstance(model.get_output_embeddings(), (BaseTunerLayer, TrainableTokensWrapper)):
        raise InputError(
            "the adapter changes the output head by more than a copy of it, which SFTTrainer cannot train further: "
            "train a new one on it (--use_peft), or merge it (hfllm merge)"
        )


def with_template(
    model: "PreTrainedModel",
    processing_class: "ProcessingClass",
    chat_template_path: str | None,
    eos_token: str | None,
    added_tokens: Sequence[str] | None = None,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Return the model and its tokenizer, changed, with the new tokens, end token and chat template of these flags.

    Args:
        processing_class: the tokenizer, or the processor with it and perhaps with its template.
    """
    from trl.chat_template_utils import clone_chat_template

    from hfllm.models.loading.probes import check_template

    tokenizer = tokenizer_of(processing_class)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = processing_class.chat_template
    if added_tokens:
        refuse(hasattr(model, "peft_config"), "--added_tokens", NO_ROWS)
        new = add_tokens(model, tokenizer, added_tokens)
        say(f"sft: new tokens: {' '.join(new) or 'none, the model has all of them'}")
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise InputError(f"--eos_token {eos_token!r}: the tokenizer has no such token")
        tokenizer.eos_token = eos_token
    if (name := chat_template_path) is None:
        return model, tokenizer
    try:
        if Path(name).is_file() or (name in (*BUILT_IN, OWN) and not Path(name).exists()):
            set_chat_template(tokenizer, name)
        else:
            tokenizer.response_template = None
            model, tokenizer, _ = clone_chat_template(model, tokenizer, name)
    except (OSError, ValueError) as error:
        raise InputError(f"--chat_template_path {name}: {' '.join(str(error).split())[:200]}") from None
    if isinstance(tokenizer.chat_template, str):
        check_template(tokenizer.chat_template, f"--chat_template_path {name}: it")
    return model, tokenizer


def marked_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a tokenizer's chat template with the marks for `--assistant_only_loss`."""
    from trl.chat_template_utils import get_training_chat_template

    template = template_of(tokenizer)
    if has_markers(template):
        return template
    try:
        return get_training_chat_template(tokenizer)
    except ValueError:
        raise InputError(
            "--assistant_only_loss: the chat template has no {% generation %} markers; without that flag the turns of "
            "the assistant are found without them (--loss_on all)"
        ) from None


@dataclass(frozen=True)
class Tokenization:
    """How rows become tokens.

    Args:
        max_length: the longest row, in tokens; `None`: any.
        part: the part of a row to keep.
        learns_all: whether questions are learned, too.
        uses_marks: whether answers are found by marks in the chat template.
    """

    max_length: int | None
    part: slice
    learns_all: bool
    uses_marks: bool


def tokenization_of(training_args: "SFTConfig", is_eval: bool = False) -> Tokenization:
    """Return how rows become tokens by TRL's flags.

    Packing keeps the beginning of a row, or all of it in other rows where it splits.

    Args:
        is_eval: whether the rows are held out, as `--eval_packing` may distinguish them from the others.
    """
    length, packing = training_args.max_length, training_args.packing
    if is_eval and training_args.eval_packing is not None:
        packing = training_args.eval_packing
    if length is None or (packing and training_args.packing_strategy != "bfd"):
        part = slice(None)
    else:
        part = slice(length) if packing or training_args.truncation_mode == "keep_start" else slice(-length, None)
    return Tokenization(length, part, training_args.completion_only_loss is False, training_args.assistant_only_loss)


def as_tokenized(args: "SFTConfig") -> "SFTConfig":
    """Return a trainer's arguments for rows already tokenized, labeled and cut."""
    changes = {"assistant_only_loss": False, "completion_only_loss": None, "chat_template_path": None}
    if args.padding_free and not args.packing:
        # TRL cannot cut such rows, and refuses to without this.
        changes["max_length"] = None
    return changed(args, **changes)


def examples(
    rows: list[Mapping[str, object]], tokenizer: "PreTrainedTokenizerBase", tokenization: Tokenization, what: str
) -> "tuple[Dataset, int]":
    """Return rows as `input_ids` and `labels`, cut to `--max_length`, and how many are left out for nothing to learn.

    Args:
        rows: with `prompt` and `completion` messages.
        tokenizer: with the chat template.
        tokenization: with the longest row, and the choice of learned tokens.
        what: name of the rows, in the printed lines.
    """
    import numpy
    from datasets import Dataset

    longest, part = tokenization.max_length, tokenization.part
    conversations = Conversations(tokenizer, marked_template(tokenizer) if tokenization.uses_marks else None)
    dropped, columns, cut = Dropped(len(rows)), {"input_ids": [], "labels": []}, 0
    crowded: list[int] = []
    learned_rows: list[Mapping[str, object]] = []
    for row, labeled in zip(rows, conversations.label(rows), strict=True):
        num_examples = 0
        if isinstance(row, GroundedRow) and part.stop is not None and labeled:
            crowded += lacking_room(labeled[-1].labels, longest)
        for each in labeled:
            if row.get(PREFILL):
                each.labels = without_prefill(each, row[PREFILL], tokenizer)
            labels = each.input_ids if tokenization.learns_all else each.labels
            if any(label != IGNORE for label in labels[part]):
                cut += part != slice(None) and len(each.input_ids) > longest
                columns["input_ids"].append(numpy.asarray(each.input_ids[part], dtype=numpy.int32))
                columns["labels"].append(numpy.asarray(labels[part], dtype=numpy.int32))
                num_examples += 1
        if num_examples:
            learned_rows.append(row)
        else:
            is_learned = any(label != IGNORE for each in labeled for label in each.labels)
            why = f"with no answer within --max_length {longest}" if is_learned else "with no token to learn"
            dropped.add(why, origin_of(row, ""))
    for note, count in conversations.notes.reasons.items():
        say(f"{what}: {count:,} of {len(rows):,} {note}")
    if (result := read_back(rows, tokenizer)) is not None:
        say(f"{what}: {result}")
    if crowded:
        say(f"{what}: {crowded_out(crowded, longest, len(rows))}")
    refuse_if(not columns["input_ids"], f"{what}: nothing to learn is left: {dropped}")
    figures = figures_of(learned_rows, columns)
    note_figures(what, figures | {"left_out": dict(dropped.reasons)})
    unlearned = f", {figures['answers_not_learned']:,} not" if figures["answers_not_learned"] else ""
    say(
        f"{what}: {figures['answers']:,} answers to learn{unlearned}; {figures['tokens']:,} tokens, "
        f"{figures['learned_tokens']:,} of them learned; the longest row has {figures['longest']:,}"
    )
    if dropped.count:
        say(f"{what}: {dropped}")
    if cut:
        say(f"{what}: {cut:,} of {len(rows):,} rows cut to --max_length {longest}")
    return Dataset.from_dict(columns), dropped.count


def figures_of(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Sequence[Any]]) -> dict[str, int]:
    """Return the numbers of answers and tokens of tokenized rows, for the data receipt."""
    answers = [message for row in rows for message in row["completion"] if message["role"] == "assistant"]
    learned = len(learned_turns(answers))
    return {
        "answers": learned,
        "answers_not_learned": len(answers) - learned,
        "tokens": sum(map(len, columns["input_ids"])),
        "learned_tokens": sum(int((labels != IGNORE).sum()) for labels in columns["labels"]),
        "longest": max(map(len, columns["input_ids"])),
    }


def without_prefill(labeled: "Labeled", prefill: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the labels of an answer beginning with `prefill`, with only the tokens after it to be learned."""
    begin = next((at for at, label in enumerate(labeled.labels) if label != IGNORE), len(labeled.labels))
    end = begin
    # Counted in letters, since tokenizers differ in where a word begins.
    while end < len(labeled.labels) and len(tokenizer.decode(labeled.input_ids[begin:end]).lstrip()) < len(prefill):
        end += 1
    return [IGNORE] * end + list(labeled.labels[end:])


# ---- what it has learned ----


def answers_about_pictures(
    processor: "ProcessorMixin", model: "PreTrainedModel", rows: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Return a model's answers to rows with images."""
    prompts, images = [row["prompt"] for row in rows], [row["images"] for row in rows]
    return answer_pictures(model, processor, prompts, images, ANSWER_LENGTH)


def other_pictures_loss(trainer: "SFTTrainer", held_out: Rows, max_pixels: int) -> dict[str, float]:
    """Return the loss of held-out rows with images of other rows, and its increase over the loss with their own.

    Nothing where no other row has as many images.
    """
    rows = held_out[:MOST_ROWS]
    others = other_places([row.get("images") or () for row in rows])
    indices = [index for index, other in enumerate(others) if other != index]
    if not indices:
        return {}

    def measured(pictures_of: Callable[[int], int]) -> "TunedEvaluation | None":
        swapped = [{**rows[index], "images": rows[pictures_of(index)]["images"]} for index in indices]
        return evaluate_tuned(trainer, [], as_dataset(swapped, max_pixels), collate=trainer.data_collator)

    result = tuning_metrics(measured(int), measured(others.__getitem__))
    new = {"other_pictures_loss": "held_out_loss_after", "other_pictures_extra_loss": "held_out_loss_change"}
    metrics = {f"{ours}{end}": result.get(f"{theirs}{end}") for ours, theirs in new.items() for end in ("", "_se")}
    metrics |= {f"{ours}_n": result.get("held_out_loss_n") for ours in new}
    return {name: value for name, value in metrics.items() if value is not None}


def other_pictures_summary(metrics: Mapping[str, float]) -> str:
    """Return the result of `other_pictures_loss` in words; an empty string if it was not measured."""
    if "other_pictures_loss" not in metrics:
        return ""
    loss, change = (shown(metrics, name) for name in ("other_pictures_loss", "other_pictures_extra_loss"))
    return f"; with the pictures of other rows {loss}, which is {change} more"


# ---- retrieval ----
#
# Passages in the rows of fine-tuning: which rows get them, and which of them.


class GroundedRow(OriginRow):
    """A row with added passages."""


def passage_contents(name: str | None) -> dict[str, str]:
    """Return a hash of the local files with the passages of this source, by name, to distinguish runs."""
    files = passage_files(name) if name else []
    # The location of a folder does not matter, the names of its files do.
    named = [(str(file.relative_to(name)) if Path(name).is_dir() else "", file) for file in files]
    return {"retrieval content": file_fingerprint(named)} if files else {}


def with_passages(
    rows: Sequence["Row"],
    eval_rows: Sequence["Row"],
    retrieval: RetrievalArguments,
    tokenizer: "PreTrainedTokenizerBase",
    seed: int,
) -> tuple[list["Row"], list["Row"], dict[str, int]]:
    """Return training and held-out rows, a share of them with passages, and the number with passages, by metric.

    Args:
        rows: with `prompt` and `completion` messages; they are not changed.
        eval_rows: the same, held out.
        retrieval: the source of the passages, and how many rows get them.
        tokenizer: cuts texts to passages.
        seed: of the choice of these rows.
    """
    name = retrieval.retrieval_dataset_name
    if name is None:
        return list(rows), list(eval_rows), {}
    is_saved = name != PYDOC and Path(name, FILE).is_file()
    passages = (Passages.load if is_saved else Passages.from_source)(name, tokenizer)
    if (top_k := retrieval.retrieval_top_k or TOP_K) > len(passages):
        raise InputError(f"--retrieval_top_k {top_k}: {name} has {len(passages)} passages")
    retriever, results, metrics, plain = BM25Retriever(passages), [], {}, plain_text(tokenizer)
    share = FRACTION if retrieval.grounded_fraction is None else retrieval.grounded_fraction
    for metric, what, each in (
        ("grounded_rows", "training rows", rows),
        ("grounded_eval_rows", "held-out rows", eval_rows),
    ):
        chosen = random.Random(f"{metric} {seed}").sample(range(len(each)), round(share * len(each)))
        if each is rows and not chosen:
            raise InputError(
                f"--grounded_fraction {share:g}: none of {len(rows):,} rows gets passages; expected more than "
                f"{0.5 / max(len(rows), 1):.3g}"
            )
        selected = [each[index] for index in chosen]
        result = _retrieved(retriever, selected, top_k, retrieval.retrieval_min_score, each is rows)
        passages_by_row = dict(zip(chosen, result, strict=True))
        results.append([_grounded(row, passages_by_row.get(index, []), plain) for index, row in enumerate(each)])
        metrics[metric] = sum(map(bool, result))
        missing = len(chosen) - metrics[metric]
        others = f"; for {missing:,} more none was found" if missing else ""
        say(f"{what}: {metrics[metric]:,} of {len(each):,} have passages of {name}{others}")
    return results[0], results[1], metrics


def _retrieved(
    retriever: "BM25Retriever", rows: Sequence["Row"], top_k: int, min_score: float | None, is_training: bool
) -> list[list["Found"]]:
    """Return the passages of each row; none for a row without a question.

    Args:
        is_training: whether the rows are for training, so some must have passages.
    """
    queries = []
    for row in rows:
        messages = [*row["prompt"], *row["completion"]]
        index = last_question(messages)
        queries.append("" if index is None else messages[index]["content"])
    result = retriever.retrieve(queries, top_k)
    rankings = result if min_score is None else scoring_enough(result, min_score)
    if is_training and rows and not any(rankings):
        best = max((each.score for ranking in result for each in ranking), default=None)
        refuse_if(best is None, f"--retrieval_dataset_name: no passage has a word of {len(rows):,} questions")
        raise InputError(f"--retrieval_min_score {min_score}: no row gets a passage; the best score is {best:.3g}")
    return rankings


def lacking_room(labels: Sequence[int], longest: int) -> list[int]:
    """Return the length of a row with passages if the cut removes its whole last answer; nothing for other rows.

    Args:
        labels: of the row; `IGNORE` for tokens not learned.
        longest: the number of tokens kept, from the first on.
    """
    learned = [index for index, label in enumerate(labels) if label != IGNORE]
    # The answer to the question with the passages is the last one: adjacent learned tokens.
    begins = next((index for index in reversed(learned) if labels[index - 1] == IGNORE), 0)
    return [len(labels)] if learned and begins >= longest else []


def crowded_out(sizes: Sequence[int], longest: int, of: int) -> str:
    """Return the message about rows with passages that leave no room for the answer.

    Args:
        sizes: the number of tokens of each row.
        longest: the maximum number of tokens in a row.
        of: the number of rows.
    """
    return (
        f"{len(sizes):,} of {of:,} rows have passages that leave no room for the answer within --max_length "
        f"{longest}, which is not learned: --max_length {max(sizes)} holds all, if the model's context does, or take "
        "a smaller --retrieval_top_k, or passages that are cut shorter (docs/guides/grounding.md)"
    )


def _grounded(row: "Row", passages: Sequence["Found"], plain: Callable[[str], str]) -> "Row":
    """Return a row with passages before its last question, possibly later than the question of its prompt.

    Args:
        plain: breaks text in a passage that would open or end a turn.
    """
    if not passages:
        return row
    size = len(row["prompt"])
    messages = grounded([*row["prompt"], *row["completion"]], [plain(each.passage.text) for each in passages])
    return GroundedRow({**row, "prompt": messages[:size], "completion": messages[size:]}, origin_of(row, "a row"))
