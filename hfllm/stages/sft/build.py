"""Fine-tuning on instructions: its data, with images and with retrieved passages, and the checks of them."""

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm.data import formats
from hfllm.data.augmentation import PREFILL, augmented_demonstrations, training_texts
from hfllm.data.conversations import Conversations, has_markers, read_back, template_of
from hfllm.data.images.rows import (
    Convert,
    Rows,
    as_dataset,
    by_turns,
    flaw_of_pictures,
    picture_mapper,
    place_images,
    refuse_images,
    refuse_tools,
    words_of_places,
    words_or_pictures,
)
from hfllm.data.loading import InstructionArguments, split_rows
from hfllm.data.packing import IGNORE
from hfllm.data.rows import Dropped, OriginRow, flaw_of, origin_of
from hfllm.data.sources import PYDOC, WORLD, Source
from hfllm.data.tokenizer import BUILT_IN, plain_text, set_built_in
from hfllm.data.world.demonstrators import instruction_rows
from hfllm.data.world.world import World
from hfllm.errors import InputError, refuse
from hfllm.evaluation.before_after import MOST_ROWS, evaluate_tuned, tuning_metrics
from hfllm.evaluation.pictures import other_places
from hfllm.evaluation.suites.refusals import refuses
from hfllm.fingerprint import file_fingerprint
from hfllm.flags import check_flags
from hfllm.grounding.answers import grounded, last_question
from hfllm.grounding.passages import FILE, Passages
from hfllm.grounding.retrieval import BM25Retriever, scoring_enough
from hfllm.models.loading.saved import add_tokens, is_for_pictures
from hfllm.outputs.report import plus_minus
from hfllm.runs.arguments import changed
from hfllm.runs.command_line import say
from hfllm.runs.models import load_config
from hfllm.runs.pipeline import Chain, chain_before
from hfllm.stages import shared
from hfllm.stages.sft.flags import FRACTION, NO_ROWS, TOP_K, RetrievalArguments, SftArguments, passage_files
from hfllm.stages.shared import check_split_weights, check_whole_rows, load_processor, user_rows
from hfllm.stages.vision.build import own_trainer

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import (
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
        TrainingArguments,
    )
    from trl import ModelConfig, SFTConfig

    from hfllm.data.conversations import Labeled
    from hfllm.data.formats import Row
    from hfllm.evaluation.before_after import TunedEvaluation
    from hfllm.grounding.passages import Passages
    from hfllm.grounding.retrieval import BM25Retriever, Found
    from hfllm.multimodal.processors import ProcessingClass
    from hfllm.trainers.trl_trainers import SFTTrainer


# ---- rows ----


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


def stages_before(script_args: SftArguments, training_args: "TrainingArguments", model_args: "ModelConfig") -> Chain:
    """Return the pretraining of the base model, if none is named."""
    return chain_before(
        "sft",
        training_args.output_dir,
        training_args.seed,
        script_args.world_seed,
        given_models={"pretrain": model_args.model_name_or_path},
        configs={"pretrain": script_args.pretrain_config},
    )


def instruction_data(
    script_args: InstructionArguments, num_examples: int, seed: int, model_name: str | None = None
) -> tuple[list[Mapping[str, object]], list[Mapping[str, object]]]:
    """Return training and held-out rows with `prompt` and `completion` messages.

    Args:
        script_args: the source of the data, and the learned turns of a conversation.
        num_examples: demonstrations, where it comes from the embedded world.
        seed: of the demonstrations and of the split.
        model_name: of the trained text model, for error messages.
    """

    def mapper(origin: str, row: formats.Row) -> formats.Row:
        refuse_images(origin, row, f"the model {model_name!r}" if model_name else "the model")
        row = formats.to_sft(origin, row)
        return formats.last_turn(row) if script_args.loss_on == "last" else row

    if script_args.dataset_name != WORLD:
        return user_rows(script_args, mapper, seed)
    rows = instruction_rows(World(script_args.world_seed), num_examples, seed)
    source = Source(rows, [f"world, row {number}" for number in range(1, len(rows) + 1)])
    return split_rows(formats.convert(source, mapper), seed)


# ---- what is learned of the rows ----


def with_template(
    training_args: "SFTConfig",
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    added_tokens: Sequence[str] | None = None,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Return the model and the tokenizer with the new tokens, end token and chat template named by the flags."""
    from trl.chat_template_utils import clone_chat_template

    from hfllm.models.loading.probes import check_template

    if added_tokens:
        refuse(hasattr(model, "peft_config"), "--added_tokens", NO_ROWS)
        new = add_tokens(model, tokenizer, added_tokens)
        say(f"sft: new tokens: {' '.join(new) or 'none, the model has all of them'}")
    if (end := training_args.eos_token) is not None:
        if end not in tokenizer.get_vocab():
            raise InputError(f"--eos_token {end!r}: the tokenizer has no such token")
        tokenizer.eos_token = end
    if (name := training_args.chat_template_path) is None:
        return model, tokenizer
    # It reads the output of another template.
    tokenizer.response_template = None
    try:
        if Path(name).is_file():
            tokenizer.chat_template = Path(name).read_text(encoding="utf-8")
        elif name in BUILT_IN and not Path(name).exists():
            set_built_in(tokenizer, name)
        else:
            model, tokenizer, _ = clone_chat_template(model, tokenizer, name)
    except (OSError, ValueError) as error:
        raise InputError(f"--chat_template_path {name}: {' '.join(str(error).split())[:200]}") from None
    if isinstance(tokenizer.chat_template, str):
        check_template(tokenizer.chat_template, f"--chat_template_path {name}: it")
    return model, tokenizer


def marked_template(training_args: "SFTConfig", tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Return the template with the marks for `--assistant_only_loss`, or `None` without this flag."""
    from trl.chat_template_utils import get_training_chat_template

    if not training_args.assistant_only_loss:
        return None
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


def examples(
    rows: list[Mapping[str, object]],
    tokenizer: "PreTrainedTokenizerBase",
    training_args: "SFTConfig",
    what: str,
    is_eval: bool = False,
) -> "tuple[Dataset, int]":
    """Return rows as `input_ids` and `labels`, cut to `--max_length`, and how many are left out for nothing to learn.

    Args:
        rows: with `prompt` and `completion` messages.
        tokenizer: with the chat template.
        training_args: with the longest row, and the choice of learned tokens.
        what: name of the rows, in the printed lines.
        is_eval: whether they are held out, as `--eval_packing` may distinguish them from the others.
    """
    import numpy
    from datasets import Dataset

    longest, part = training_args.max_length, _kept_part(training_args, is_eval)
    conversations = Conversations(tokenizer, marked_template(training_args, tokenizer))
    dropped, columns, cut = Dropped(len(rows)), {"input_ids": [], "labels": []}, 0
    crowded: list[int] = []
    for row, labeled in zip(rows, conversations.label(rows), strict=True):
        num_examples = 0
        if isinstance(row, GroundedRow) and part.stop is not None and labeled:
            crowded += lacking_room(labeled[-1].labels, longest)
        for each in labeled:
            if row.get(PREFILL):
                each.labels = without_prefill(each, row[PREFILL], tokenizer)
            labels = each.input_ids if training_args.completion_only_loss is False else each.labels
            if any(label != IGNORE for label in labels[part]):
                cut += part != slice(None) and len(each.input_ids) > longest
                columns["input_ids"].append(numpy.asarray(each.input_ids[part], dtype=numpy.int32))
                columns["labels"].append(numpy.asarray(labels[part], dtype=numpy.int32))
                num_examples += 1
        if not num_examples:
            is_learned = any(label != IGNORE for each in labeled for label in each.labels)
            why = f"with no answer within --max_length {longest}" if is_learned else "with no token to learn"
            dropped.add(why, origin_of(row, ""))
    for note, count in conversations.notes.reasons.items():
        say(f"{what}: {count:,} of {len(rows):,} {note}")
    if (result := read_back(rows, tokenizer)) is not None:
        say(f"{what}: {result}")
    if crowded:
        say(f"{what}: {crowded_out(crowded, longest, len(rows))}")
    if not columns["input_ids"]:
        raise InputError(f"{what}: nothing to learn is left: {dropped}")
    if dropped.count:
        say(f"{what}: {dropped}")
    if cut:
        say(f"{what}: {cut:,} of {len(rows):,} rows cut to --max_length {longest}")
    return Dataset.from_dict(columns), dropped.count


def without_prefill(labeled: "Labeled", prefill: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the labels of an answer beginning with `prefill`, with only the tokens after it to be learned."""
    begin = next((at for at, label in enumerate(labeled.labels) if label != IGNORE), len(labeled.labels))
    end = begin
    # Counted in letters, since tokenizers differ in where a word begins.
    while end < len(labeled.labels) and len(tokenizer.decode(labeled.input_ids[begin:end]).lstrip()) < len(prefill):
        end += 1
    return [IGNORE] * end + list(labeled.labels[end:])


def augmented(script_args: SftArguments, rows: list[Mapping[str, object]], seed: int) -> list[Mapping[str, object]]:
    """Return training rows, a share `--augment` of them in other forms, and print how many refusals are prefilled."""
    if not script_args.augment:
        return rows
    texts = training_texts(script_args.dataset_name)
    rows = augmented_demonstrations(rows, script_args.augment, seed, texts, refuses)
    prefilled = sum(PREFILL in row for row in rows)
    say(f"sft: --augment {script_args.augment:g} of {len(rows):,} questions; {prefilled:,} prefilled refusals")
    return rows


def _kept_part(training_args: "SFTConfig", is_eval: bool) -> slice:
    """Return the part of a row to keep: packing keeps the beginning, or all in other rows where it splits."""
    is_told_apart = is_eval and training_args.eval_packing is not None
    packing, longest = training_args.eval_packing if is_told_apart else training_args.packing, training_args.max_length
    if longest is None or (packing and training_args.packing_strategy != "bfd"):
        return slice(None)
    return slice(longest) if packing or training_args.truncation_mode == "keep_start" else slice(-longest, None)


def joins_rows(training_args: "SFTConfig") -> bool:
    """Return whether several rows become one, in packing or in a batch without padding."""
    return bool(training_args.packing or training_args.eval_packing or training_args.padding_free)


def trained_as_they_are(training_args: "SFTConfig") -> dict[str, bool | None]:
    """Return the changes of TRL's arguments for rows already tokenized, labeled and cut."""
    changes = {"assistant_only_loss": False, "completion_only_loss": None, "chat_template_path": None}
    if training_args.padding_free and not training_args.packing:
        # TRL cannot cut such rows, and refuses to without this.
        changes["max_length"] = None
    return changes


# ---- pictures ----
#
# Fine-tuning of vision-language models: on rows with images, on text only, or on both mixed.


STAGE = "hfllm sft"
ANSWER_TOKENS = 48


def processor_of(model_args: "ModelConfig") -> "ProcessorMixin | None":
    """Return the processor of a named vision-language model; `None` for a text model, or if no model is named."""
    name, revision = model_args.model_name_or_path, model_args.model_revision
    return load_processor(name, revision) if name and is_for_pictures(load_config(name, revision)) else None


def picture_instructions(
    script_args: SftArguments, seed: int, processor: "ProcessorMixin | None", model_name: str | None
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Return training and held-out rows as `instruction_data` does; for a vision-language model, also with `images`.

    If one row has images, the messages of all rows have parts as their content.

    Args:
        processor: the model's, `None` for a text model.
        model_name: of the model, for error messages.
    """
    if processor is None or script_args.dataset_name == WORLD:
        return instruction_data(script_args, script_args.num_examples, seed, model_name)

    def words(origin: str, row: formats.Row) -> formats.Row:
        row = formats.to_sft(origin, row)
        return formats.last_turn(row) if script_args.loss_on == "last" else row

    def mapper_of(name: str) -> Convert:
        tokens = words_of_places(processor)
        return words_or_pictures(picture_mapper(script_args, name, words, STAGE, tokens), words, tokens)

    def flaw(row: formats.Row) -> str | None:
        return flaw_of_pictures(row) if row.get("images") else flaw_of(row)

    name, eval_name = script_args.dataset_name, script_args.eval_dataset_name or script_args.dataset_name
    parts = user_rows(script_args, mapper_of(name), seed, flaw_of=flaw, eval_mapper=mapper_of(eval_name))
    if not shows_pictures(*parts):
        return parts
    for row in (row for part in parts for row in part if not row.get("images")):
        origin = origin_of(row, "a row")
        refuse_tools(origin, row, STAGE)
        row |= {**place_images(origin, row, 0), "images": []}
    return parts


def shows_pictures(*parts: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a row has images."""
    return any(row.get("images") for part in parts for row in part)


def check_pictures(
    script_args: SftArguments,
    training_args: "SFTConfig",
    model_args: "ModelConfig",
    train_rows: Sequence[Mapping[str, Any]],
    eval_rows: Sequence[Mapping[str, Any]],
) -> bool:
    """Return whether a row has images; refuse flags incompatible with this, or without effect on rows of text."""
    shows = shows_pictures(train_rows, eval_rows)
    name, revision = model_args.model_name_or_path, model_args.model_revision
    sees = shows or bool(name and is_for_pictures(load_config(name, revision)))
    check_flags(script_args, training_args, model_args, shows=shows, sees=sees)
    if not shows:
        return False
    # The first answers of a conversation may come before its first image.
    turns = ([turn for row in rows for turn in by_turns(row)] for rows in (train_rows, eval_rows))
    check_split_weights(training_args, *turns)
    check_whole_rows(script_args, training_args)
    return True


def load_policy(
    script_args: SftArguments, training_args: "SFTConfig", model_args: "ModelConfig", config: "PreTrainedConfig"
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase, ProcessingClass]":
    """Load the model to train on text, its tokenizer, and the object to save with it: the tokenizer or the processor.

    Args:
        config: the model's.
    """
    model, processing_class = shared.load_policy(model_args, config, training_args.output_dir)
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = processing_class.chat_template
    sees = tokenizer is not processing_class
    model, tokenizer = with_template(training_args, model, tokenizer, script_args.added_tokens)
    return model, tokenizer, processing_class if sees else tokenizer


def trainer_of(
    script_args: SftArguments,
    training_args: "SFTConfig",
    model_args: "ModelConfig",
    train_rows: Rows,
    eval_rows: Rows,
) -> "tuple[SFTTrainer, Rows]":
    """Return TRL's trainer on rows with images, and the held-out rows, one per answer, as it reads them.

    Rows become tokens batch by batch, in TRL's `DataCollatorForVisionLanguageModeling`.
    """
    train, held_out = ([turn for row in rows for turn in by_turns(row)] for rows in (train_rows, eval_rows))
    args = changed(training_args, max_length=None)
    trainer, _ = own_trainer(script_args, args, model_args, train, held_out, stage="sft")
    return trainer, held_out


# ---- what it has learned ----


def evaluate(trainer: "SFTTrainer", held_out: Rows) -> "TunedEvaluation | None":
    """Evaluate the trainer's current model on the first held-out rows, and let it answer the first of them."""
    from hfllm.multimodal.answers import answer_pictures

    def answer(model: "PreTrainedModel", rows: Sequence[Mapping[str, Any]]) -> list[str]:
        prompts = [row["prompt"] for row in rows]
        return answer_pictures(
            model, trainer.processing_class, prompts, [row["images"] for row in rows], ANSWER_TOKENS
        )

    return evaluate_tuned(trainer, held_out, answer=answer)


def control(script_args: SftArguments, trainer: "SFTTrainer", held_out: Rows) -> dict[str, float]:
    """Return the loss of held-out rows with images of other rows, and its increase over the loss with their own."""
    rows = held_out[:MOST_ROWS]
    others = other_places([row["images"] for row in rows])
    indices = [index for index, other in enumerate(others) if rows[index]["images"] and other != index]
    if not indices:
        return {}

    def measured(pictures_of: Callable[[int], int]) -> "TunedEvaluation | None":
        swapped = [{**rows[index], "images": rows[pictures_of(index)]["images"]} for index in indices]
        dataset = as_dataset(swapped, script_args.max_pixels)
        return evaluate_tuned(trainer, [], dataset, collate=trainer.data_collator)

    result = tuning_metrics(measured(int), measured(others.__getitem__))
    new = {"other_pictures_loss": "held_out_loss_after", "other_pictures_extra_loss": "held_out_loss_change"}
    metrics = {f"{ours}{end}": result.get(f"{theirs}{end}") for ours, theirs in new.items() for end in ("", "_se")}
    metrics |= {f"{ours}_n": result.get("held_out_loss_n") for ours in new}
    return {name: value for name, value in metrics.items() if value is not None}


def control_summary(metrics: Mapping[str, float]) -> str:
    """Return the control in words; an empty string if it was not measured."""
    if "other_pictures_loss" not in metrics:
        return ""
    loss, change = (
        plus_minus(metrics[name], metrics.get(f"{name}_se"))
        for name in ("other_pictures_loss", "other_pictures_extra_loss")
    )
    return f"; with the pictures of other rows {loss}, which is {change} more"


# ---- retrieval ----
#
# Passages in the rows of fine-tuning: flags, their checks, and the assignment of passages to rows.


class GroundedRow(OriginRow):
    """A row with added passages."""


def contents(script_args: RetrievalArguments) -> dict[str, str]:
    """Return a hash of the local files with the passages, by name, to distinguish runs."""
    name = script_args.retrieval_dataset_name
    files = passage_files(name) if name else []
    # The location of a folder does not matter, the names of its files do.
    named = [(str(file.relative_to(name)) if Path(name).is_dir() else "", file) for file in files]
    return {"retrieval content": file_fingerprint(named)} if files else {}


def with_passages(
    rows: Sequence["Row"],
    eval_rows: Sequence["Row"],
    script_args: RetrievalArguments,
    tokenizer: "PreTrainedTokenizerBase",
    seed: int,
) -> tuple[list["Row"], list["Row"], dict[str, int]]:
    """Return training and held-out rows, a share of them with passages, and the number with passages, by metric.

    Args:
        rows: with `prompt` and `completion` messages; they are not changed.
        eval_rows: the same, held out.
        script_args: the source of the passages, and how many rows get them.
        tokenizer: cuts texts to passages.
        seed: of the choice of these rows.
    """
    name = script_args.retrieval_dataset_name
    if name is None:
        return list(rows), list(eval_rows), {}
    passages = _passages(name, tokenizer)
    if (top_k := script_args.retrieval_top_k or TOP_K) > len(passages):
        raise InputError(f"--retrieval_top_k {top_k}: {name} has {len(passages)} passages")
    retriever, results, metrics, plain = BM25Retriever(passages), [], {}, plain_text(tokenizer)
    share = FRACTION if script_args.grounded_fraction is None else script_args.grounded_fraction
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
        result = _found(retriever, selected, top_k, script_args.retrieval_min_score, each is rows)
        passages_by_row = dict(zip(chosen, result, strict=True))
        results.append([_grounded(row, passages_by_row.get(index, []), plain) for index, row in enumerate(each)])
        metrics[metric] = sum(map(bool, result))
        missing = len(chosen) - metrics[metric]
        others = f"; for {missing:,} more none was found" if missing else ""
        say(f"{what}: {metrics[metric]:,} of {len(each):,} have passages of {name}{others}")
    return results[0], results[1], metrics


def _passages(name: str, tokenizer: "PreTrainedTokenizerBase") -> "Passages":
    if name != PYDOC and Path(name, FILE).is_file():
        return Passages.load(name, tokenizer)
    return Passages.from_source(name, tokenizer)


def _found(
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
        if best is None:
            raise InputError(f"--retrieval_dataset_name: no passage has a word of {len(rows):,} questions")
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


def _grounded(row: "Row", found: Sequence["Found"], plain: Callable[[str], str]) -> "Row":
    """Return a row with passages before its last question, possibly later than the question of its prompt.

    Args:
        plain: breaks text in a passage that would open or end a turn.
    """
    if not found:
        return row
    size = len(row["prompt"])
    messages = grounded([*row["prompt"], *row["completion"]], [plain(each.passage.text) for each in found])
    return GroundedRow({**row, "prompt": messages[:size], "completion": messages[size:]}, origin_of(row, "a row"))
