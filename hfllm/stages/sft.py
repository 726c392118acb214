"""Fine-tuning on instructions: its flags, what it refuses, and its data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm.data.augmentation import PREFILL, AugmentationArguments
from hfllm.data.loading import InstructionArguments
from hfllm.errors import InputError, refuse
from hfllm.runs.chain import Chain, chain_before
from hfllm.runs.recipes import settings_file
from hfllm.stages import sft_retrieval
from hfllm.stages.own_pictures import FreezingArguments, PictureArguments
from hfllm.stages.sft_retrieval import GroundedRow, RetrievalArguments, crowded_out, lacking_room
from hfllm.trainers.learning_rate import BatchArguments

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
    from trl import ModelConfig, SFTConfig

    from hfllm.data.conversations import Labeled

NO_ROWS = "an adapter has no rows for new tokens: train all weights, or leave the flag out"


@dataclass(frozen=True)
class SftArguments(
    InstructionArguments,
    RetrievalArguments,
    AugmentationArguments,
    BatchArguments,
    FreezingArguments,
    PictureArguments,
):
    """Instruction data."""

    num_examples: int = field(default=9600, metadata={"help": "Demonstrations of the embedded world to train on."})
    added_tokens: list[str] | None = field(
        default=None,
        metadata={
            "help": "Tokens to add to the model, such as <think> </think>; without, they are written by those that "
            "there are (docs/reasoning.md)."
        },
    )
    pretrain_config: str | None = field(
        default=None, metadata={"help": "YAML flags of the pretraining that makes the base model, if none is named."}
    )


def default_settings(given: Mapping[str, Any]) -> list[Path]:
    """Return the settings of the embedded world's model if no model is named, and else those of an adapter, if any.

    Args:
        given: what the user gives, by flag. A model that is no folder is looked up on the Hub.
    """
    name = given.get("model_name_or_path")
    if not name:
        return [settings_file("sft/world.yaml")]
    is_adapter = given.get("use_peft") or _is_adapter(name, str(given.get("model_revision") or "main"))
    return [settings_file("sft/adapter.yaml")] if is_adapter else []


def _is_adapter(name: str, revision: str) -> bool:
    if Path(name).is_dir():
        return Path(name, "adapter_config.json").is_file()
    from hfllm.models.loading.adapters import find_adapter

    return find_adapter(name, revision=revision) is not None


def check(script_args: SftArguments, training_args: "SFTConfig", model_args: "ModelConfig") -> None:
    """Refuse flags that have no effect or contradict each other.

    Raises:
        InputError: naming the flag.
    """
    is_named = bool(model_args.model_name_or_path)
    refuse(is_named and bool(script_args.pretrain_config), "--pretrain_config", "the model is named")
    is_everything = training_args.completion_only_loss is False
    reason = "--completion_only_loss false learns every token"
    refuse(is_everything and script_args.loss_on == "last", "--loss_on last", reason)
    refuse(is_everything and training_args.assistant_only_loss, "--assistant_only_loss", reason)
    reason = "rows are tokenized here; name the columns by --column_mapping"
    refuse(training_args.dataset_kwargs is not None, "--dataset_kwargs", reason)
    refuse(bool(script_args.added_tokens) and model_args.use_peft, "--added_tokens", NO_ROWS)
    sft_retrieval.check(script_args)
    if training_args.packing and training_args.max_length is None:
        raise InputError("--packing needs --max_length, the length of a packed row")


def check_head(model: "PreTrainedModel") -> None:
    """Refuse to train an adapter of the output head further: TRL reads the head's own weights, past the adapter.

    Args:
        model: what is trained.

    Raises:
        InputError: naming what can be done.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import TrainableTokensWrapper

    if isinstance(model.get_output_embeddings(), (BaseTunerLayer, TrainableTokensWrapper)):
        raise InputError(
            "the adapter changes the output head by more than a copy of it, which SFTTrainer cannot train further: "
            "train a new one on it (--use_peft), or merge it (hfllm merge)"
        )


def stages_before(script_args: SftArguments, training_args: "TrainingArguments", model_args: "ModelConfig") -> Chain:
    """Return the pretraining that makes the base model, if none is named."""
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
        script_args: where the data comes from, and which turns of a conversation are learned.
        num_examples: demonstrations, where it comes from the embedded world.
        seed: of the demonstrations and of the split.
        model_name: of the model of text that learns, for complaints.
    """
    from hfllm.data import formats
    from hfllm.data.images import refuse_images
    from hfllm.data.loading import split_rows
    from hfllm.data.sources import WORLD, Source
    from hfllm.data.world.demonstrators import instruction_rows
    from hfllm.data.world.world import World
    from hfllm.stages.user_rows import user_rows

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
    """Return the model and the tokenizer with the new tokens, the end token and the chat template that the flags name.

    Raises:
        InputError: when there is no such token or template, or an adapter cannot get new tokens.
    """
    from trl.chat_template_utils import clone_chat_template

    from hfllm.data.tokenizer import BUILT_IN, set_built_in
    from hfllm.models.loading.probes import check_template
    from hfllm.models.loading.saved import add_tokens
    from hfllm.runs.command_line import say

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
    # It reads what another template writes.
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
    """Return the template whose marks `--assistant_only_loss` learns, or `None` without that flag.

    Raises:
        InputError: when the chat template has no marks, and TRL knows no version of it that has.
    """
    from trl.chat_template_utils import get_training_chat_template

    from hfllm.data.conversations import has_markers, template_of

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
        training_args: with the longest row, and what is learned.
        what: what the rows are, in the lines that are printed.
        is_eval: whether they are held out, as `--eval_packing` may tell them from the others.

    Raises:
        InputError: when none is left.
    """
    import numpy
    from datasets import Dataset

    from hfllm.data.conversations import Conversations, read_back
    from hfllm.data.packing import IGNORE
    from hfllm.data.rows import Dropped, origin_of
    from hfllm.runs.command_line import say

    longest, part = training_args.max_length, _kept_part(training_args, is_eval)
    conversations = Conversations(tokenizer, marked_template(training_args, tokenizer))
    dropped, columns, cut = Dropped(len(rows)), {"input_ids": [], "labels": []}, 0
    crowded: list[int] = []
    for row, labeled in zip(rows, conversations.label(rows), strict=True):
        kept = 0
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
                kept += 1
        if not kept:
            is_learned = any(label != IGNORE for each in labeled for label in each.labels)
            why = f"with no answer within --max_length {longest}" if is_learned else "with no token to learn"
            dropped.add(why, origin_of(row, ""))
    for note, count in conversations.notes.reasons.items():
        say(f"{what}: {count:,} of {len(rows):,} {note}")
    if (found := read_back(rows, tokenizer)) is not None:
        say(f"{what}: {found}")
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
    """Return the labels of an answer that begins with `prefill`, of which only what follows is to be learned."""
    from hfllm.data.packing import IGNORE

    begin = next((at for at, label in enumerate(labeled.labels) if label != IGNORE), len(labeled.labels))
    end = begin
    # Counted in letters, since tokenizers differ in where a word begins.
    while end < len(labeled.labels) and len(tokenizer.decode(labeled.input_ids[begin:end]).lstrip()) < len(prefill):
        end += 1
    return [IGNORE] * end + list(labeled.labels[end:])


def augmented(script_args: SftArguments, rows: list[Mapping[str, object]], seed: int) -> list[Mapping[str, object]]:
    """Return training rows, a share `--augment` of them in other forms, and say how many refusals are prefilled."""
    from hfllm.data.augmentation import augmented_demonstrations, training_texts
    from hfllm.evaluation.suites.refusals import refuses
    from hfllm.runs.command_line import say

    if not script_args.augment:
        return rows
    texts = training_texts(script_args.dataset_name)
    rows = augmented_demonstrations(rows, script_args.augment, seed, texts, refuses)
    prefilled = sum(PREFILL in row for row in rows)
    say(f"sft: --augment {script_args.augment:g} of {len(rows):,} questions; {prefilled:,} prefilled refusals")
    return rows


def _kept_part(training_args: "SFTConfig", is_eval: bool) -> slice:
    """Return which part of a row is kept: packing keeps the beginning, or all in other rows where it splits."""
    is_told_apart = is_eval and training_args.eval_packing is not None
    packing, longest = training_args.eval_packing if is_told_apart else training_args.packing, training_args.max_length
    if longest is None or (packing and training_args.packing_strategy != "bfd"):
        return slice(None)
    return slice(longest) if packing or training_args.truncation_mode == "keep_start" else slice(-longest, None)


def joins_rows(training_args: "SFTConfig") -> bool:
    """Return whether several rows become one, in packing or in a batch without padding."""
    return bool(training_args.packing or training_args.eval_packing or training_args.padding_free)


def trained_as_they_are(training_args: "SFTConfig") -> dict[str, bool | None]:
    """Return the changes of TRL's arguments for rows that are tokenized, labeled and cut already."""
    changes = {"assistant_only_loss": False, "completion_only_loss": None, "chat_template_path": None}
    if training_args.padding_free and not training_args.packing:
        # TRL cannot cut such rows, and refuses to without this.
        changes["max_length"] = None
    return changes
