"""Code shared by several stages: the user's rows, rows with images, and answering models."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm.data.formats import Row
from hfllm.data.images.rows import PictureArguments
from hfllm.data.loading import DataArguments, RowArguments, held_out_arguments, load_rows, shared_prompts, split_rows
from hfllm.data.row_limits import MAX_ROW_BYTES
from hfllm.data.rows import Dropped, Message, flaw_of
from hfllm.errors import InputError, refuse
from hfllm.flags import given_names
from hfllm.outputs.report import Plot, plus_minus
from hfllm.runs.arguments import changed
from hfllm.runs.command_line import say

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import (
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
        TrainingArguments,
    )
    from trl import ModelConfig, SFTConfig

    from hfllm.multimodal.processors import ProcessingClass


# ---- checks of several stages ----


WHOLE = "rows with pictures are read by the model's processor, as they are"
# Flags of TRL that would cut, join or rewrite the tokens of rows read by the processor.
NOT_JOINED = {
    "packing": "rows with pictures are not packed",
    "eval_packing": "rows with pictures are not packed",
    "padding_free": "rows with pictures are padded",
    "assistant_only_loss": "of rows with pictures the answers are found without marks",
    "chat_template_path": WHOLE,
    "eos_token": WHOLE,
}


def check_whole_rows(script_args: RowArguments, training_args: "SFTConfig", is_cut: bool = False) -> None:
    """Refuse flags of fine-tuning that would cut, join or rewrite rows with images, or learn their questions.

    Args:
        is_cut: whether `--max_length` has a meaning: as many questions as fit are put into a row.
    """
    for flag, why in NOT_JOINED.items():
        refuse(bool(getattr(training_args, flag)), f"--{flag}", why)
    check_sampling(training_args)
    refuse(training_args.completion_only_loss is False, "--completion_only_loss false", "answers alone are learned")
    is_given = "max_length" in (given_names(script_args, training_args) or ())
    is_idle = is_given and training_args.max_length is not None and not is_cut
    refuse(is_idle, "--max_length", "rows with pictures are not cut")


def check_sampling(training_args: "TrainingArguments") -> None:
    """Refuse to group rows with images by length, as the length is unknown before a batch is made."""
    is_grouped = training_args.train_sampling_strategy == "group_by_length"
    refuse(
        is_grouped, "--train_sampling_strategy group_by_length", "rows with pictures are read when a batch needs them"
    )


def count_seen(rows: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of rows with images."""
    return sum(bool(row.get("images")) for row in rows)


def is_mixed(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether some rows have images and others have none."""
    return 0 < count_seen(rows) < len(rows)


def check_split_weights(
    training_args: "TrainingArguments",
    train_rows: Sequence[Mapping[str, Any]],
    eval_rows: Sequence[Mapping[str, Any]],
) -> None:
    """Refuse images in only some rows where processes hold parts of the weights, as PPO does.

    A process with no image in its batch does not run the tower, and the others would wait for it to gather or reduce
    the tower.
    """
    from hfllm.trainers.engines import shards_parameters

    if not shards_parameters(training_args):
        return
    for what, rows in (("training", train_rows), ("held-out", eval_rows)):
        if is_mixed(rows):
            raise InputError(
                f"pictures in {count_seen(rows)} of {len(rows)} {what} rows: DeepSpeed and FSDP need one in each row "
                "or in none; train the others by themselves, or by DDP, which takes both mixed"
            )


# ---- user rows ----
#
# The user's own rows of a stage: read, without unusable ones, and with a held-out part.


Rows = list[Row]
Flaw = Callable[[Row], str | None]
Mapper = Callable[[str, Row], Row]


def user_rows(
    script_args: RowArguments,
    mapper: Mapper,
    seed: int,
    share: float = 0.05,
    most: int | None = None,
    flaw_of: Flaw = flaw_of,
    eval_mapper: Mapper | None = None,
) -> tuple[Rows, Rows]:
    """Return training and held-out rows of the user's dataset, and print how many are left out and why.

    Args:
        script_args: the datasets.
        mapper: converts a row, given its origin.
        seed: of the split, where the user names no held-out rows.
        share: of the rows to hold out then.
        most: held-out rows at most; by default 256, or all rows named by the user.
        flaw_of: returns why a row is left out, or `None`.
        eval_mapper: converts the held-out rows named by the user, where paths in them are relative to
            another folder; by default `mapper` does.
    """
    rows = kept_rows(script_args, mapper, flaw_of)
    named = held_out_arguments(script_args)
    if named is None:
        return split_rows(rows, seed, share, 256 if most is None else most)
    eval_rows = kept_rows(named, eval_mapper or mapper, flaw_of)[:most]
    if shared := shared_prompts(rows, eval_rows):
        say(f"{named.dataset_name}: {shared:,} of {len(eval_rows):,} held-out rows have the prompt of a training row")
    return rows, eval_rows


def kept_rows(script_args: RowArguments, mapper: Mapper, flaw_of: Flaw, most: int | None = None) -> Rows:
    """Return the usable rows of a dataset, and print how many are left out and why.

    Args:
        most: maximum number of rows; later ones are not read. By default all.
    """
    dropped = Dropped()
    rows = load_rows(script_args, mapper, dropped, flaw_of, most)
    if not rows:
        raise InputError(f"{script_args.dataset_name}: no row is left: {dropped}")
    if dropped.count:
        say(f"{script_args.dataset_name}: {dropped}")
    return rows


# ---- models that see ----
#
# Processors in place of tokenizers, and policies that read images.


def load_processing_class(model_args: "ModelConfig", config: "PreTrainedConfig") -> "ProcessingClass":
    """Load the tokenizer of the named model, or the processor of a vision-language model, with a padding token."""
    return _processing_class(model_args.model_name_or_path, model_args.model_revision, config)


def processing_class_of(name: str, revision: str = "main") -> "ProcessingClass":
    """Load the tokenizer of a model, or the processor of a vision-language model, as `load_processing_class` does."""
    from hfllm.runs.models import load_config

    return _processing_class(name, revision, load_config(name, revision))


def _processing_class(name: str, revision: str, config: "PreTrainedConfig") -> "ProcessingClass":
    from hfllm.data.tokenizer import padding_token
    from hfllm.models.loading.saved import is_for_pictures
    from hfllm.runs.models import load_tokenizer

    if not is_for_pictures(config):
        return load_tokenizer(name, revision)
    processor = load_processor(name, revision)
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = padding_token(processor.tokenizer)
    return processor


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
    model_args: "ModelConfig", config: "PreTrainedConfig", output_dir: str
) -> "tuple[PreTrainedModel, ProcessingClass]":
    """Load the policy to train with its tokenizer, or with its processor if it reads images.

    Args:
        config: the policy's.
        output_dir: see `load_to_train`.
    """
    from hfllm.models.loading.saved import is_for_pictures
    from hfllm.runs.models import load_to_train

    if not is_for_pictures(config):
        return load_to_train(model_args, output_dir)
    processor = load_processing_class(model_args, config)
    return load_seeing_model(model_args), processor


def load_seeing_model(model_args: "ModelConfig") -> "PreTrainedModel | PeftModel":
    """Load the named vision-language model; an adapter of one is trained further."""
    from transformers import AutoModelForImageTextToText

    from hfllm.models.loading.adapters import find_adapter, load_base, put_on
    from hfllm.models.loading.weights import load_weights_of
    from hfllm.runs.models import load_kwargs, refuse_four_bits_of_pictures

    refuse_four_bits_of_pictures(model_args)
    name, kwargs = model_args.model_name_or_path, load_kwargs(model_args)
    adapter = find_adapter(name, revision=model_args.model_revision)
    if adapter is None:
        return load_weights_of(AutoModelForImageTextToText, name, **kwargs)[0]
    adapter.check("CAUSAL_LM")
    if model_args.use_peft:
        raise InputError(
            f"--use_peft: {name} is an adapter already, which is trained further without that flag; or merge it into "
            f"{adapter.base} by PEFT's merge_and_unload and name the result"
        )
    say(f"adapter {name} of {adapter.base} is trained further")
    base, _ = load_base(adapter, AutoModelForImageTextToText, **kwargs)
    return put_on(base, adapter, is_trainable=True)


# ---- models that answer ----


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


def load_speaking(
    name: str, model_args: "ModelConfig", revision: str = "main", processor: "ProcessorMixin | None" = None
) -> Speaking:
    """Load a model to answer with, on the machine's accelerator if there is one.

    Args:
        processor: of a vision-language model, loaded as such.
    """
    import torch
    from accelerate import PartialState

    from hfllm.data.tokenizer import padding_token
    from hfllm.runs.models import load_policy, load_seeing

    load_args = changed(model_args, model_name_or_path=name, model_revision=revision)
    if processor is None:
        model, tokenizer = load_policy(load_args)
    else:
        model, tokenizer = load_seeing(load_args), processor.tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = padding_token(tokenizer)
    device = PartialState().device if torch.cuda.is_available() else model.device
    return Speaking(model.to(device).eval(), tokenizer)


# ---- figures ----


def figure_text(metrics: Mapping[str, float], name: str) -> str:
    """Return a figure of `metrics` with its error, as `plus_minus` does, or a dash without the figure."""
    return plus_minus(metrics[name], metrics.get(f"{name}_se")) if name in metrics else "-"


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

    from hfllm.data.images.rows import contents_of, existing, named_pictures, written_when
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
