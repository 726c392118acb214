"""Quantization of models that see: the questions about pictures on which their forms are compared."""

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from hfllm.data.loading import DataArguments, RowArguments
from hfllm.data.picture_batches import words_of_places
from hfllm.data.sources import DIGITS, PICTURES, WORLD
from hfllm.errors import InputError, refuse
from hfllm.stages.own_pictures import by_turns, picture_mapper

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin
    from trl import ModelConfig

    from hfllm.evaluation.before_after import PictureQuantization
    from hfllm.evaluation.pictures import Asked
    from hfllm.stages.quantize import QuantizeArguments

STAGE = "hfllm quantize"


def sees(model_args: "ModelConfig") -> bool:
    """Return whether a model is named, and sees.

    Raises:
        InputError: when its config cannot be loaded.
    """
    from hfllm.models.loading.saved import is_for_pictures
    from hfllm.runs.models import load_config

    name = model_args.model_name_or_path
    return bool(name) and is_for_pictures(load_config(name, model_args.model_revision))


def schemes_to_compare(script_args: "QuantizeArguments") -> list[str]:
    """Return the names of the schemes as `quantize.schemes_to_compare` does, without those that read pictures wrongly.

    bitsandbytes' 4-bit kernel for CPUs takes its input for contiguous. What SigLIP hands to the projector may not be:
    patches are the columns of what a convolution gave, and sums keep them so.

    Raises:
        InputError: when one of these is asked for.
    """
    from hfllm.compression.schemes import NF4_CPU_MULTIPLES, SCHEMES, default_device
    from hfllm.stages import quantize

    names = quantize.schemes_to_compare(script_args)
    if default_device() != "cpu":
        return names
    wrong = [name for name, scheme in SCHEMES.items() if scheme.cpu_multiples == NF4_CPU_MULTIPLES]
    for name in wrong:
        if name in (*(script_args.schemes or ()), script_args.save_scheme):
            raise InputError(
                f"scheme {name!r}: on a CPU bitsandbytes' 4-bit kernel reads pictures wrongly; for a model that sees: "
                f"{', '.join(each for each in SCHEMES if each not in wrong)}"
            )
    return [name for name in names if name not in wrong]


def check(script_args: "QuantizeArguments", name: str) -> None:
    """Refuse flags that do not go with a model that sees.

    Args:
        name: the model's.

    Raises:
        InputError: naming the flag.
    """
    if script_args.dataset_name == WORLD:
        raise InputError(
            f"--model_name_or_path {name}: it sees, and --dataset_name world is of texts: name rows with pictures, "
            f"or {PICTURES} or {DIGITS}, which are drawn here"
        )
    is_given = script_args.max_length != type(script_args).max_length
    refuse(is_given, "--max_length", "rows with pictures are not cut")


def questions_of(script_args: "QuantizeArguments", processor: "ProcessorMixin") -> "list[Asked]":
    """Return questions about pictures with their answers: drawn ones, or the first answer of each of the user's rows.

    Raises:
        InputError: when a row or, with `--bad_images refuse`, a picture cannot be read.
    """
    from hfllm.data.formats import to_sft
    from hfllm.data.images import flaw_of_pictures
    from hfllm.stages.user_rows import kept_rows
    from hfllm.stages.vision import DRAWN, VisionArguments
    from hfllm.stages.vision_data import SHUFFLED, asked_of, eval_parts

    name, count = script_args.dataset_name, script_args.num_eval_prompts
    if name in DRAWN:
        parts = eval_parts(VisionArguments(dataset_name=name, num_eval_examples=max(count, 2)))
        kept = [questions for part, questions in parts.items() if part != SHUFFLED]
        # As many of each, in turns: those that training has shown, and those that it has not.
        return [question for turn in zip(*kept, strict=True) for question in turn][:count]
    read = RowArguments(**{each.name: getattr(script_args, each.name) for each in fields(DataArguments)})
    mapper = picture_mapper(script_args, name, to_sft, STAGE, words_of_places(processor))
    rows = kept_rows(read, mapper, flaw_of_pictures, most=count)
    return [asked_of(by_turns(row)[0]) for row in rows]


def load(model_args: "ModelConfig") -> "tuple[PreTrainedModel, ProcessorMixin]":
    """Return the model in full precision and its processor."""
    from hfllm.data.tokenizer import padding_token
    from hfllm.multimodal.processors import check_template
    from hfllm.runs.models import load_seeing
    from hfllm.stages.rlhf_pictures import load_processor

    processor = load_processor(model_args.model_name_or_path, model_args.model_revision)
    check_template(processor, model_args.model_name_or_path)
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = padding_token(processor.tokenizer)
    return load_seeing(model_args), processor


def make_evaluation(
    script_args: "QuantizeArguments", processor: "ProcessorMixin", questions: "Sequence[Asked]"
) -> "PictureQuantization":
    """Return what the model and its quantized forms are evaluated on."""
    from hfllm.evaluation.before_after import PictureQuantization

    return PictureQuantization(
        processor.tokenizer,
        texts=(),
        max_length=0,
        response_length=script_args.response_length,
        timing={"prompt_tokens": script_args.prompt_tokens, "new_tokens": script_args.new_tokens},
        rounds=script_args.rounds,
        processor=processor,
        questions=questions,
        num_losses=script_args.num_eval_texts,
    )
