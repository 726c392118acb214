"""Code shared by several stages: the user's rows, rows with images, models that see, and answering models."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm.data.formats import Dropped, Message, Row, flaw_of, origin_of
from hfllm.data.images.rows import (
    Convert,
    ImageReading,
    PictureArguments,
    by_turns,
    contents_of,
    existing,
    flaw_of_pictures,
    named_pictures,
    picture_mapper,
    place_images,
    refuse_tools,
    words_or_pictures,
    written_when,
)
from hfllm.data.loading import DataArguments, RowSource, RowSources, load_rows, shared_prompts, split_rows
from hfllm.data.receipt import unprinted_lines
from hfllm.data.row_limits import MAX_ROW_BYTES
from hfllm.errors import InputError, refuse, refuse_if
from hfllm.flags import Fact, changed, check_flags
from hfllm.outputs.figures import shown
from hfllm.outputs.report import Plot
from hfllm.runs.command_line import say

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from peft import PeftModel
    from torch import nn
    from transformers import (
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
        TrainingArguments,
    )
    from trl import ModelConfig, SFTConfig

    from hfllm.multimodal.processors import ProcessingClass
    from hfllm.runs.models import NamedModel


# ---- user rows ----
#
# The user's own rows of a stage: read, without unusable ones, and with a held-out part.


Rows = list[Row]
Flaw = Callable[[Row], str | None]
Mapper = Callable[[str, Row], Row]


def user_rows(
    sources: RowSources,
    mapper: Mapper,
    seed: int,
    share: float = 0.05,
    most: int | None = None,
    flaw_of: Flaw = flaw_of,
    eval_mapper: Mapper | None = None,
) -> tuple[Rows, Rows]:
    """Return training and held-out rows of the user's dataset, and print how many are left out and why.

    Args:
        sources: the rows.
        mapper: converts a row, given its origin.
        seed: of the split, where the user names no held-out rows.
        share: of the rows to hold out then.
        most: held-out rows at most; by default 256, or all rows named by the user.
        flaw_of: returns why a row is left out, or `None`.
        eval_mapper: converts the held-out rows named by the user, where paths in them are relative to
            another folder; by default `mapper` does.
    """
    rows, named = kept_rows(sources.train, mapper, flaw_of), sources.held_out
    if named is None:
        return split_rows(rows, seed, share, 256 if most is None else most)
    eval_rows = kept_rows(named, eval_mapper or mapper, flaw_of)[:most]
    if shared := shared_prompts(rows, eval_rows):
        say(f"{named.name}: {shared:,} of {len(eval_rows):,} held-out rows have the prompt of a training row")
    return rows, eval_rows


def kept_rows(source: RowSource, mapper: Mapper, flaw_of: Flaw, most: int | None = None) -> Rows:
    """Return the usable rows of a dataset, and print its receipt: what is read, and what is left out and why.

    Args:
        most: maximum number of rows; later ones are not read. By default all.
    """
    dropped = Dropped()
    rows = load_rows(source, mapper, dropped, flaw_of, most)
    refuse_if(not rows, f"{source.name}: no row is left: {dropped}")
    say_receipts({"dataset_name": source.name})
    return rows


def say_receipts(arguments: Mapping[str, Any]) -> None:
    """Print what was read of the datasets that flags name, and what was not."""
    for line in unprinted_lines(arguments):
        say(line)


# ---- rows with images ----
#
# Training on rows some of which have images: how they are read, and what is refused then.


WHOLE = "rows with pictures are read by the model's processor, as they are"
NOT_CUT = "rows with pictures are not cut"
# Flags of TRL that would cut, join or rewrite the tokens of rows read by the processor.
NOT_JOINED = {
    "packing": "rows with pictures are not packed",
    "eval_packing": "rows with pictures are not packed",
    "padding_free": "rows with pictures are padded",
    "assistant_only_loss": "of rows with pictures the answers are found without marks",
    "chat_template_path": WHOLE,
    "eos_token": WHOLE,
}


def refused_with_images(fact: Fact) -> dict[str, Fact]:
    """Return what fine-tuning refuses of TRL's flags where this fact gives its rows images, for `refused`."""

    def where_on(flag: str, why: str) -> Fact:
        # Switched off it asks for nothing, whatever its default is.
        return Fact(lambda flags: fact.holds(flags) and bool(flags[flag]), why)

    return {flag: where_on(flag, why) for flag, why in NOT_JOINED.items()}


def check_batches(train_sampling_strategy: str, completion_only_loss: bool | None = None) -> None:
    """Refuse to group rows with images by length, unknown before a batch is made, and to learn their questions."""
    why = "rows with pictures are read when a batch needs them"
    refuse(train_sampling_strategy == "group_by_length", "--train_sampling_strategy group_by_length", why)
    refuse(completion_only_loss is False, "--completion_only_loss false", "answers alone are learned")


def check_rows(
    script_args: "DataclassInstance",
    training_args: "TrainingArguments",
    model_args: "ModelConfig",
    parts: tuple[Rows, Rows],
    sees: bool,
) -> bool:
    """Return whether a row has images; refuse flags incompatible with this, or without effect on rows of text.

    Args:
        parts: training and held-out rows.
        sees: whether the model reads images.
    """
    from hfllm.trainers.engines import shards_parameters

    shows = shows_pictures(*parts)
    check_flags(script_args, training_args, model_args, shows=shows, sees=sees)
    if shows:
        check_batches(training_args.train_sampling_strategy, getattr(training_args, "completion_only_loss", None))
        if shards_parameters(training_args):
            refuse_mixed(*parts)
    return shows


def refuse_mixed(train_rows: Sequence[Mapping[str, Any]], eval_rows: Sequence[Mapping[str, Any]] = ()) -> None:
    """Refuse images in only some rows, for processes with parts of the weights, as PPO does.

    A process with no image in its batch does not run the tower, and the others would wait for it to gather or reduce
    the tower.
    """
    for what, rows in (("training", train_rows), ("held-out", eval_rows)):
        # The first answers of a conversation may come before its first image.
        turns = [turn for row in rows for turn in (by_turns(row) if "completion" in row else [row])]
        if is_mixed(turns):
            raise InputError(
                f"pictures in {_count_images(turns)} of {len(turns)} {what} rows: DeepSpeed and FSDP need one in each "
                "row or in none; train the others by themselves, or by DDP, which takes both mixed"
            )


def is_mixed(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether some rows have images and others have none."""
    return 0 < _count_images(rows) < len(rows)


def _count_images(rows: Sequence[Mapping[str, Any]]) -> int:
    return sum(bool(row.get("images")) for row in rows)


def rows_with_images(
    sources: RowSources,
    reading: ImageReading,
    convert: Convert,
    stage: str,
    seed: int,
    needs_images: bool = False,
    most: int | None = None,
) -> tuple[Rows, Rows]:
    """Return rows as `user_rows` does, for a vision-language model: some, or all of them, may have `images`.

    If one row has images, the messages of all rows have parts as their content.

    Args:
        sources: the rows.
        reading: of their images.
        convert: converts a row of text, such as `formats.to_sft`.
        stage: the command, for complaints.
        seed: of the split.
        needs_images: whether rows without images are left out.
        most: see `user_rows`.
    """

    def mapper_of(name: str) -> Convert:
        pictures = picture_mapper(name, reading, convert, stage)
        return pictures if needs_images else words_or_pictures(pictures, convert, reading.tokens)

    def flaw(row: Row) -> str | None:
        return flaw_of_pictures(row) if row.get("images") else flaw_of(row)

    # Paths are relative to the folder of their own dataset.
    mapper, eval_mapper = mapper_of(sources.train.name), mapper_of((sources.held_out or sources.train).name)
    parts = user_rows(sources, mapper, seed, most=most, flaw_of=flaw, eval_mapper=eval_mapper)
    if shows_pictures(*parts):
        for row in (row for part in parts for row in part if not row.get("images")):
            origin = origin_of(row, "a row")
            refuse_tools(origin, row, stage)
            row |= {**place_images(origin, row, 0), "images": []}
    return parts


def shows_pictures(*parts: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a row has images."""
    return any(row.get("images") for part in parts for row in part)


# ---- models that see ----
#
# Processors in place of tokenizers, and policies that read images.


def load_processing_class(
    name: str, revision: str = "main", config: "PreTrainedConfig | None" = None
) -> "ProcessingClass":
    """Load the tokenizer of a model, or the processor of a vision-language model, with a padding token.

    Args:
        config: the model's, if it is loaded already.
    """
    from hfllm.data.tokenizer import padding_token
    from hfllm.models.loading.saved import is_for_pictures
    from hfllm.runs.models import load_config, load_tokenizer

    if not is_for_pictures(config or load_config(name, revision)):
        return load_tokenizer(name, revision)
    processor = load_processor(name, revision)
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = padding_token(processor.tokenizer)
    return processor


def processor_of(name: str | None, revision: str = "main") -> "ProcessorMixin | None":
    """Return the processor of a named vision-language model; `None` for a text model, or if no model is named."""
    from hfllm.models.loading.saved import is_for_pictures
    from hfllm.runs.models import load_config

    return load_processor(name, revision) if name and is_for_pictures(load_config(name, revision)) else None


def load_processor(name: str, revision: str) -> "ProcessorMixin":
    """Return the processor of a vision-language model."""
    from hfllm.models.loading.saved import reason_of, saved_processor
    from hfllm.multimodal.processors import check_fit
    from hfllm.runs.models import load_config

    try:
        processor = saved_processor(name, revision=revision)
    except (ImportError, OSError, ValueError) as error:
        raise InputError(f"model {name!r}: its processor could not be loaded: {reason_of(error)}") from error
    if not hasattr(processor, "image_processor"):
        raise InputError(f"model {name!r} has no processor of pictures: save one with it, see hfllm.vision_processor")
    try:
        check_fit(processor, load_config(name, revision))
    except InputError as error:
        raise InputError(f"model {name!r}: {error}") from None
    return processor


def load_policy(
    model: "NamedModel", config: "PreTrainedConfig", output_dir: str
) -> "tuple[PreTrainedModel, ProcessingClass]":
    """Load the policy to train with its tokenizer, or with its processor if it reads images.

    Args:
        model: the policy.
        config: of it.
        output_dir: see `load_to_train`.
    """
    from hfllm.models.loading.saved import is_for_pictures
    from hfllm.runs.models import load_to_train

    if not is_for_pictures(config):
        return load_to_train(model, output_dir)
    processor = load_processing_class(model.name, model.revision, config)
    return load_seeing_model(model), processor


def load_seeing_model(model: "NamedModel") -> "PreTrainedModel | PeftModel":
    """Load the named vision-language model; an adapter of one is trained further."""
    from transformers import AutoModelForImageTextToText

    from hfllm.models.loading.adapters import load_base, put_on
    from hfllm.models.loading.weights import load_weights_of
    from hfllm.runs.models import refuse_four_bits_of_pictures

    refuse_four_bits_of_pictures(model)
    adapter = model.adapter
    if adapter is None:
        return load_weights_of(AutoModelForImageTextToText, model.name, **model.kwargs)[0]
    adapter.check("CAUSAL_LM")
    if model.trains_adapter:
        raise InputError(
            f"--use_peft: {model.name} is an adapter already, which is trained further without that flag; or merge it "
            f"into {adapter.base} by PEFT's merge_and_unload and name the result"
        )
    say(f"adapter {model.name} of {adapter.base} is trained further")
    base, _ = load_base(adapter, AutoModelForImageTextToText, **model.kwargs)
    return put_on(base, adapter, is_trainable=True)


# ---- training on images ----
#
# The user's vision-language model, and the arguments of TRL's trainer of it on rows with images.


def picture_processor(name: str, revision: str) -> "ProcessorMixin":
    """Return the processor of the user's vision-language model, with a chat template for images."""
    from hfllm.models.loading.saved import is_for_pictures
    from hfllm.multimodal.processors import check_template
    from hfllm.runs.models import load_config

    config = load_config(name, revision)
    if not is_for_pictures(config):
        raise InputError(
            f"--model_name_or_path {name}: a {config.model_type} model reads text alone; name a vision-language "
            "model, or give it eyes by hfllm.with_vision"
        )
    processor = load_processor(name, revision)
    check_template(processor, name)
    return processor


def load_picture_model(
    model: "NamedModel", freeze_vision: bool = False, freeze_text: bool = False
) -> "tuple[PreTrainedModel, ProcessorMixin]":
    """Load the user's vision-language model to train on images, and its processor with a padding token.

    Args:
        model: the user's.
        freeze_vision: whether the tower stays as it is, see `freeze`.
        freeze_text: whether the decoder does.
    """
    from hfllm.models.loading.saved import reason_of
    from hfllm.multimodal.composed import freeze

    processor = picture_processor(model.name, model.revision)
    try:
        loaded = load_seeing_model(model)
    except InputError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"model {model.name!r} could not be loaded: {reason_of(error)}") from error
    freeze(loaded, freeze_vision, freeze_text)
    tokenizer = processor.tokenizer
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError(f"the tokenizer of {model.name!r} has no end token (eos_token): answers end with one")
        tokenizer.pad_token = tokenizer.eos_token
    return loaded, processor


def picture_args(args: "SFTConfig", rows: Sequence[Mapping[str, Any]]) -> "SFTConfig":
    """Return a trainer's arguments for training rows with images, which are not cut.

    Rows become tokens batch by batch, in TRL's `DataCollatorForVisionLanguageModeling`.
    """
    # In a batch without images the tower gets no gradient, and several processes would wait for it.
    waits = is_mixed(rows) and args.ddp_find_unused_parameters is None
    return changed(args, max_length=None, **({"ddp_find_unused_parameters": True} if waits else {}))


def warn_of_frozen_projector(model: "nn.Module", has_adapter: bool, stage: str) -> None:
    """Warn if an adapter leaves the projector untrained."""
    learned = [name for name, weight in model.named_parameters() if weight.requires_grad]
    if has_adapter and not any("projector" in name for name in learned):
        say(f"{stage}: the adapter leaves the projector as it is; --lora_modules_to_save with its name lets it learn")


# ---- models that answer ----
#
# Models to answer with in a stage, and the lines of a report to ask a trained one.


@dataclass(frozen=True)
class Speaking:
    """An answering model, with its tokenizer."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"

    def answers(
        self, prompts: Sequence[list[Message]], length: int, seed: int, samples: int = 1, temperature: float = 1.0
    ) -> list[list[str]]:
        """Return `samples` sampled answers to each prompt."""
        from hfllm.generation.responses import sample_responses

        settings = {"num_return_sequences": samples, "seed": seed, "fast": True, "temperature": temperature}
        return sample_responses(self.model, self.tokenizer, prompts, length, **settings)


def load_speaking(model: "NamedModel", processor: "ProcessorMixin | None" = None) -> Speaking:
    """Load a model to answer with, on the machine's accelerator if there is one.

    Args:
        model: the model.
        processor: of a vision-language model, loaded as such.
    """
    import torch
    from accelerate import PartialState

    from hfllm.data.tokenizer import padding_token
    from hfllm.runs.models import load_policy, load_seeing

    if processor is None:
        loaded, tokenizer = load_policy(model)
    else:
        loaded, tokenizer = load_seeing(model), processor.tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = padding_token(tokenizer)
    device = PartialState().device if torch.cuda.is_available() else loaded.device
    return Speaking(loaded.to(device).eval(), tokenizer)


def next_lines(folder: str, prompt: str | list[Message], config: "PreTrainedConfig", is_adapter: bool) -> list[str]:
    """Return the lines of Python to load a trained policy and ask it: a prompt, or a question about an image.

    Args:
        prompt: one of the held-out prompts.
        config: the policy's.
        is_adapter: whether an adapter is saved.
    """
    from hfllm.models.loading.saved import is_for_pictures
    from hfllm.outputs.card import chat_lines, picture_lines

    return picture_lines(folder, is_adapter) if is_for_pictures(config) else chat_lines(folder, prompt)


# ---- figures ----


def figure_text(metrics: Mapping[str, float], name: str) -> str:
    """Return a figure of `metrics` with its error, as `plus_minus` does, or a dash without the figure."""
    return shown(metrics, name) if name in metrics else "-"


def plot_of_right(shares: Mapping[str, Sequence[float]], groups: Sequence[str]) -> Plot:
    """Return the plot of right answers by group of questions, a point for each model.

    Args:
        shares: of right answers, one per group, by model.
        groups: their names.
    """
    indices = list(range(len(groups)))
    lines = {model: (indices, values) for model, values in shares.items()}
    ticks = dict(enumerate(groups))
    return Plot("Right answers", "", "share of questions", lines, xticks=ticks, points_only=True)


# ---- files of pictures ----


def files_changed(
    script_args: DataArguments | PictureArguments, models: Sequence[str | None], revision: str = "main"
) -> dict[str, str]:
    """Return fingerprints to detect replaced image files named by local rows, by flag, for `Stage`.

    Args:
        script_args: with `dataset_name`, and perhaps `eval_dataset_name`.
        models: readers of the images; without a vision-language model among them, rows are not read.
        revision: of the models.
    """
    from transformers import AutoModelForImageTextToText

    from hfllm.outputs.report import CHANGED, CONTENTS
    from hfllm.runs.identity import PICTURES_OF
    from hfllm.runs.models import load_config

    def sees(model: str) -> bool:
        try:
            return type(load_config(model, revision)) in AutoModelForImageTextToText._model_mapping
        except InputError:
            # Reported where the model is needed.
            return False

    flags = ("dataset_name", "eval_dataset_name")
    sets = {flag: name for flag in flags if (name := getattr(script_args, flag, None)) and Path(name).exists()}
    if not sets or not any(sees(model) for model in models if model):
        return {}
    mapping, most = getattr(script_args, "column_mapping", None), getattr(script_args, "max_samples", None)
    limit = getattr(script_args, "max_row_bytes", MAX_ROW_BYTES)
    files = {
        flag: named_pictures(name, mapping, most if flag == flags[0] else None, limit) for flag, name in sets.items()
    }
    fingerprints = {}
    for flag, result in files.items():
        if result:
            fingerprints[f"{PICTURES_OF.format(flag)}{CHANGED}"] = written_when(result)
            fingerprints[f"{PICTURES_OF.format(flag)}{CONTENTS}"] = contents_of(existing(result))
    return fingerprints
