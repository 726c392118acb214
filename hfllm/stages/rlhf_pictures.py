"""Policies that read pictures, in alignment by PPO."""

from typing import TYPE_CHECKING

from hfllm.errors import InputError, refuse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin
    from trl import ModelConfig

    from hfllm.data.rows import Message
    from hfllm.multimodal.processors import ProcessingClass
    from hfllm.stages.own_pictures import FreezingArguments
    from hfllm.stages.rlhf import Row


def load_processing_class(model_args: "ModelConfig", config: "PreTrainedConfig") -> "ProcessingClass":
    """Load the tokenizer of the named model; of one that reads pictures the processor, with a padding token.

    Raises:
        InputError: when it cannot be loaded, or there is no processor.
    """
    return _processing_class(model_args.model_name_or_path, model_args.model_revision, config)


def processing_class_of(name: str, revision: str = "main") -> "ProcessingClass":
    """Load the tokenizer of a model, or the processor of one that reads pictures, as `load_processing_class` does."""
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
    """Return the processor of a model that reads pictures.

    Raises:
        InputError: when there is none, it cannot be loaded, or its pictures do not fit the model.
    """
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
    """Load the policy to train with its tokenizer, or with its processor if it reads pictures.

    Args:
        config: the policy's.
        output_dir: see `load_to_train`.

    Raises:
        InputError: when either cannot be loaded.
    """
    from hfllm.models.loading.saved import is_for_pictures
    from hfllm.runs.models import load_to_train

    if not is_for_pictures(config):
        return load_to_train(model_args, output_dir)
    processor = load_processing_class(model_args, config)
    return load_seeing_model(model_args), processor


def load_seeing_model(model_args: "ModelConfig") -> "PreTrainedModel | PeftModel":
    """Load the named model of pictures and text; an adapter of one is trained further.

    Raises:
        InputError: when it cannot be loaded, with `--use_peft` for an adapter, and for 4 bits on a CPU.
    """
    from transformers import AutoModelForImageTextToText

    from hfllm.models.loading.adapters import find_adapter, load_base, put_on
    from hfllm.models.loading.weights import load_weights_of
    from hfllm.runs.command_line import say
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


def check_rows(rows: "Sequence[Row]", config: "PreTrainedConfig") -> None:
    """Refuse rows with pictures where the policy reads text alone.

    Raises:
        InputError: naming the row.
    """
    from hfllm.models.loading.saved import is_for_pictures
    from hfllm.trainers.ppo.prompts import check_pictures

    if not is_for_pictures(config):
        check_pictures(rows, None, f"the policy (of type {config.model_type})")


def check_frozen(script_args: "FreezingArguments", model_args: "ModelConfig", rows: "Sequence[Row]") -> None:
    """Refuse to freeze parts of a policy that is shown no picture, or below an adapter.

    Raises:
        InputError: naming the flag.
    """
    from hfllm.multimodal.processors import has_pictures
    from hfllm.stages.own_pictures import FREEZING, check_freezing, given_flags

    frozen = given_flags(script_args, FREEZING)
    shows = bool(frozen) and any(has_pictures(row, "a row") for row in rows)
    for flag in frozen:
        refuse(not shows, f"--{flag}", "no row has a picture")
    check_freezing(script_args, model_args)


def words_for_a_picture(rows: "Sequence[Row]", processing_class: "ProcessingClass") -> list[int]:
    """Return the places of prompts whose words spell the token of a picture's place; of a tokenizer none."""
    from hfllm.data.picture_batches import words_of_places
    from hfllm.data.rows import spells

    tokens = words_of_places(processing_class)
    asked = [[row["prompt"], row.get("tools")] for row in rows] if tokens else []
    return [place for place, said in enumerate(asked) if spells(tokens, said)]


def refuse_words(rows: "Sequence[Row]", processing_class: "ProcessingClass") -> None:
    """Refuse prompts whose words spell the token of a picture's place.

    Raises:
        InputError: naming the first.
    """
    from hfllm.data.picture_batches import words_of_places
    from hfllm.data.rows import origin_of

    words = " or ".join(map(repr, words_of_places(processing_class)))
    for place in words_for_a_picture(rows, processing_class)[:1]:
        raise InputError(
            f"{origin_of(rows[place], f'prompt {place} of the dataset')}: the words spell "
            f"{words}, which stands for a picture; --filter_prompts leaves such prompts out"
        )


def next_lines(folder: str, prompt: "str | list[Message]", config: "PreTrainedConfig", is_adapter: bool) -> list[str]:
    """Return the lines of Python that load the aligned policy and ask it: a prompt, or about a picture.

    Args:
        prompt: one of the held-out prompts.
        config: the policy's.
        is_adapter: whether an adapter is saved.
    """
    from hfllm.models.loading.saved import is_for_pictures
    from hfllm.outputs.card import chat_lines
    from hfllm.outputs.pictures import picture_lines

    return picture_lines(folder, is_adapter) if is_for_pictures(config) else chat_lines(folder, prompt)
