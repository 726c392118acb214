"""The model to pretrain: the named one, or a new one with its own tokenizer."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hfllm.errors import InputError, refuse
from hfllm.stages.architecture import architecture_of
from hfllm.stages.pretrain import PretrainArguments
from hfllm.stages.tokenizer import make_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import ModelConfig


def load_or_make_base(
    script_args: PretrainArguments, model_args: "ModelConfig", texts: Sequence[str]
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Return the model to pretrain and its tokenizer: the named one, or a new one.

    A new one has the architecture of `--config_name_or_path`, or that of the flags and the tokenizer's size. The
    tokenizer is the named one, or a new one trained on `texts`.

    Raises:
        InputError: for a model or tokenizer that cannot be loaded, or an architecture that cannot be made.
    """
    from hfllm.runs.models import load_policy, load_tokenizer, named_fields

    if model_args.model_name_or_path:
        return load_policy(model_args)
    named = script_args.config_name_or_path
    fields = named_fields(named) if named else architecture_of(script_args)
    size = fields["vocab_size"] if named else None
    if script_args.tokenizer_name_or_path:
        tokenizer = load_tokenizer(script_args.tokenizer_name_or_path)
    else:
        context = fields["max_position_embeddings"]
        wanted = replace(script_args, vocab_size=size or script_args.vocab_size, max_position_embeddings=context)
        tokenizer = make_tokenizer(wanted, texts)
    if size is not None and len(tokenizer) > size:
        raise InputError(
            f"--config_name_or_path {named}: vocab_size={size} is less than the {len(tokenizer)} tokens of the "
            "tokenizer"
        )
    of_the_tokenizer = {
        # A named architecture keeps embedding rows without a token.
        "vocab_size": size or len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return new_model({**fields, **of_the_tokenizer}, script_args.objective == "masked", model_args), tokenizer


def new_model(fields: Mapping[str, object], is_masked: bool, model_args: "ModelConfig") -> "PreTrainedModel":
    """Return a model of the family with new weights.

    Args:
        fields: of its config.
        is_masked: whether it is bidirectional, for masked tokens.
        model_args: its attention and its dtype.

    Raises:
        InputError: for fields that do not describe a valid model, an unavailable attention, or quantized weights.
    """
    import torch

    from hfllm.models.family.modeling_hfllm import HfllmForCausalLM, HfllmForMaskedLM
    from hfllm.models.loading.weights import cast_weights
    from hfllm.runs.models import new_config

    refuse(model_args.load_in_4bit or model_args.load_in_8bit, "--load_in_4bit/8bit", "a new model learns all weights")
    attention = model_args.attn_implementation
    config = new_config({**fields, "is_causal": not is_masked, "attn_implementation": attention})
    try:
        # Not `_from_config`, which under ZeRO-3 partitions the weights before they are initialized.
        model = (HfllmForMaskedLM if is_masked else HfllmForCausalLM)(config)
    except (ImportError, ValueError) as error:
        raise InputError(f"--attn_implementation {attention}: {str(error).splitlines()[0]}") from None
    dtype = "float32" if model_args.dtype == "auto" else model_args.dtype
    return cast_weights(model, getattr(torch, dtype))
