"""The models and tokenizers of a stage, as its flags name them."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm.errors import InputError, is_out_of_memory, refuse
from hfllm.models.loading.saved import max_length_of
from hfllm.runs.arguments import changed
from hfllm.runs.command_line import say_once

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.models.auto.auto_factory import _BaseAutoModelClass
    from trl import ModelConfig

    from hfllm.models.family.configuration_hfllm import HfllmConfig

# Quantization methods that may allow training the weights; transformers itself refuses where they do not.
TRAINED_QUANTIZED = ("bitnet", "compressed-tensors", "fp_quant")


def load_kwargs(model_args: "ModelConfig") -> dict[str, Any]:
    """Return the `from_pretrained` arguments that the flags of `ModelConfig` stand for."""
    from trl import get_quantization_config

    kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "quantization_config": get_quantization_config(model_args),
    }
    return {name: value for name, value in kwargs.items() if value is not None}


def load_policy(model_args: "ModelConfig") -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load a causal language model and its tokenizer; an adapter is merged into its base, unless that is quantized.

    Raises:
        InputError: when either cannot be loaded or is not whole, they do not fit, or the tokenizer has no padding or
            end token.
    """
    from transformers import AutoModelForCausalLM

    from hfllm.models.loading.saved import check_vocabulary

    name = model_args.model_name_or_path
    tokenizer = load_tokenizer(name, model_args.model_revision)
    model = _load_writing(model_args, AutoModelForCausalLM)
    check_vocabulary(model, tokenizer, name)
    return model, tokenizer


def load_seeing(model_args: "ModelConfig") -> "PreTrainedModel":
    """Load a model of pictures and text; an adapter is merged into its base, unless that is quantized.

    Raises:
        InputError: when it cannot be loaded or is not whole, and for 4 bits on a CPU.
    """
    from transformers import AutoModelForImageTextToText

    refuse_four_bits_of_pictures(model_args)
    return _load_writing(model_args, AutoModelForImageTextToText)


def refuse_four_bits_of_pictures(model_args: "ModelConfig") -> None:
    """Refuse to load a model that sees in 4 bits on a CPU.

    bitsandbytes' kernel there takes its input for contiguous, which what a tower hands to the projector need not be.

    Raises:
        InputError: naming the flag.
    """
    import torch

    why = "on a CPU bitsandbytes' 4-bit kernel reads pictures wrongly; leave it out, or run on a GPU"
    refuse(model_args.load_in_4bit and not torch.accelerator.is_available(), "--load_in_4bit", why)


def _load_writing(model_args: "ModelConfig", auto_class: "type[_BaseAutoModelClass]") -> "PreTrainedModel":
    from hfllm.models.loading.adapters import find_adapter, load_apart, load_merged
    from hfllm.models.loading.weights import load_weights_of

    name, kwargs = model_args.model_name_or_path, load_kwargs(model_args)
    adapter = find_adapter(name, revision=model_args.model_revision)
    if adapter is not None:
        adapter.check("CAUSAL_LM")
    try:
        if adapter is None:
            return load_weights_of(auto_class, name, **kwargs)[0]
        if adapter.stays_apart(**kwargs):
            return load_apart(adapter, auto_class, **kwargs)[0]
        return load_merged(adapter, auto_class, **kwargs)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise _unloadable(name, error) from error


def load_tokenizer(name: str, revision: str = "main") -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model; without a padding token or a chat template it gets one, and a line says which.

    Raises:
        InputError: when it cannot be loaded, or has no end token.
    """
    tokenizer = saved_tokenizer(name, revision)
    if tokenizer.eos_token is None:
        raise InputError(
            f"the tokenizer of {name!r} has no eos_token: set one and save it, "
            "for example tokenizer.eos_token = ...; tokenizer.save_pretrained(...)"
        )
    _complete(tokenizer, name)
    return tokenizer


def saved_tokenizer(name: str, revision: str = "main") -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model as it is; an adapter that was saved without one has that of its base.

    Raises:
        InputError: when it cannot be loaded.
    """
    from hfllm.models.loading import saved as loading
    from hfllm.models.loading.adapters import find_adapter

    try:
        return loading.saved_tokenizer(name, revision=revision)
    except Exception as error:
        # The tokenizers library has no class for what it cannot read, and a field may be missing.
        if not isinstance(error, (KeyError, OSError, TypeError, ValueError)) and type(error) is not Exception:
            raise
        adapter = find_adapter(name, revision=revision)
        if adapter is None:
            raise _unloadable(name, error, "the tokenizer of model" if Path(name).is_dir() else "model") from error
    try:
        return loading.saved_tokenizer(adapter.base, **adapter.base_location)
    except (OSError, ValueError) as error:
        raise adapter.unloadable(error) from error


def _complete(tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
    """Set what a tokenizer lacks: a padding token, a chat template. Both are saved with it."""
    from hfllm.data.tokenizer import padding_token, plain_chat_template

    if tokenizer.pad_token is None:
        tokenizer.pad_token = padding_token(tokenizer)
        say_once(f"the tokenizer of {name!r} has no padding token: {tokenizer.pad_token!r} is set")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = plain_chat_template()
        say_once(
            f"the tokenizer of {name!r} has no chat template: a plain one is set ('User:', 'Assistant:', "
            f"{tokenizer.eos_token!r} after each answer)"
        )


def load_config(name: str, revision: str = "main") -> "PreTrainedConfig":
    """Load the config of the named model; for an adapter that of its base.

    Raises:
        InputError: when it cannot be loaded.
    """
    from hfllm.models.loading.adapters import find_adapter
    from hfllm.models.loading.saved import saved_config

    try:
        return saved_config(name, revision=revision)
    except (OSError, ValueError) as error:
        adapter = find_adapter(name, revision=revision)
        if adapter is None:
            raise _unloadable(name, error) from error
        return adapter.base_config()


def check_trainable(model_args: "ModelConfig", adapters: bool = True) -> None:
    """Refuse weights that cannot be trained: quantized ones without an adapter.

    Args:
        model_args: with the model's name, if it has one.
        adapters: whether the stage can train an adapter.

    Raises:
        InputError: naming the flag or the model, or when the model's config cannot be loaded or its files are damaged.
    """
    from hfllm.models.loading.adapters import find_adapter
    from hfllm.models.loading.saved import quantization_method
    from hfllm.models.loading.weights import check_weight_files

    name, revision = model_args.model_name_or_path, model_args.model_revision
    adapter = find_adapter(name, revision=revision) if name else None
    if adapter is not None:
        # Whether its base is there, and whether PEFT can train such a one further.
        adapter.check()
        adapter.base_config()
    elif name:
        check_weight_files(name)
    # A model that is loaded with an adapter is trained further as an adapter.
    trains_adapter = adapters and (model_args.use_peft or adapter is not None)
    way_out = "--use_peft trains an adapter on them" if adapters else "this stage trains all of a model"
    for flag in ("load_in_8bit", "load_in_4bit"):
        is_frozen = getattr(model_args, flag) and not trains_adapter
        refuse(is_frozen, f"--{flag}", f"such weights cannot be trained; {way_out}")
    if not name or trains_adapter:
        return
    method = quantization_method(load_config(name, revision))
    if method is not None and method not in TRAINED_QUANTIZED:
        raise InputError(
            f"model {name!r} is quantized ({method}), and such weights cannot be trained: name the model in full "
            f"precision that it was made from; {way_out}"
        )


def new_config(fields: dict[str, Any]) -> "HfllmConfig":
    """Return the config of a new model of the family.

    Raises:
        InputError: when the fields do not describe a valid model.
    """
    from huggingface_hub.errors import StrictDataclassError

    from hfllm.models.family.configuration_hfllm import HfllmConfig

    try:
        return HfllmConfig(**fields)
    except (TypeError, ValueError, KeyError, StrictDataclassError) as error:
        sizes = ", ".join(f"{name} {fields.get(name)}" for name in ("hidden_size", "num_attention_heads"))
        # Of a check of the config the cause says what it is; the rest names the check.
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise InputError(f"{sizes} and the other fields describe no model: {reason}") from None


def check_attention(implementation: str | None, config: "PreTrainedConfig") -> None:
    """Refuse an attention function of ours, `sparse` or `banded`, that cannot compute the model of this config.

    Raises:
        InputError: naming `--attn_implementation`.
    """
    from hfllm.models.family.attention_hfllm import check_implementation

    try:
        if implementation in ("sparse", "banded"):
            check_implementation(implementation, config.get_text_config(decoder=True))
    except ValueError as error:
        raise InputError(f"--attn_implementation {implementation}: {error}") from None


def named_fields(name: str) -> dict[str, Any]:
    """Return the architecture that `--config_name_or_path` names: a preset or a config.json, also a native one.

    Raises:
        InputError: for a name that is neither, or a config that describes no model of this family.
    """
    from hfllm.models.conversion.convert import BAD_CONFIG, config_from_native
    from hfllm.models.family.configuration_fields_hfllm import SPARSE_SIZES, ExpertFields, LatentFields
    from hfllm.models.family.configuration_hfllm import HfllmConfig

    if Path(name).exists():
        try:
            config = load_config(name)
            config = config if isinstance(config, HfllmConfig) else config_from_native(config)
        except (TypeError, *BAD_CONFIG) as error:
            raise InputError(f"--config_name_or_path {name}: {' '.join(str(error).split())[:200]}") from None
    else:
        try:
            config = HfllmConfig.from_preset(name)
        except ValueError as error:
            raise InputError(f"--config_name_or_path {name}: no such file or folder, and {error}") from None
    # How the loss is computed is a flag of the run.
    fields = {**LatentFields.__annotations__, **ExpertFields.__annotations__, **HfllmConfig.__annotations__}
    fields |= {field: None for field in SPARSE_SIZES if hasattr(config, field)}
    return {field: getattr(config, field) for field in fields if field != "loss_chunk_size"}


def load_reward_model(name: str, model_args: "ModelConfig", revision: str = "main") -> "PreTrainedModel":
    """Load a sequence-classification model with one label; its head is new if `name` is a language model.

    Args:
        model_args: how to load it, except `--model_revision`, which belongs to the model named there.

    Raises:
        InputError: when it cannot be loaded, or has another number of labels.
    """
    from hfllm.models.loading import adapters as scorers

    try:
        return scorers.load_scorer(name, **{**load_kwargs(model_args), "revision": revision})
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, InputError) or is_out_of_memory(error):
            raise
        raise _unloadable(name, error) from error


def load_value_model(
    value_model: str, model_args: "ModelConfig", reward_models: Sequence[str]
) -> "PreTrainedModel | None":
    """Load the critic that `--value_model` names; `None` stands for a head on the policy's trunk.

    All of its weights are trained, so it is never quantized. `reward` stands for the first of the reward models.

    Raises:
        InputError: when it cannot be loaded, or has another number of labels.
    """
    if value_model == "head":
        return None
    name = reward_models[0] if value_model == "reward" else value_model
    return load_reward_model(name, replace(model_args, load_in_8bit=False, load_in_4bit=False))


def peft_config(model_args: "ModelConfig", task_type: str = "CAUSAL_LM") -> "PeftConfig | None":
    """Return the adapter that `--use_peft` and `--lora_*` describe, or `None`."""
    from trl import get_peft_config

    targets = model_args.lora_target_modules
    # A single name is a pattern for whole paths to PEFT; here it names modules as each of several names does.
    if isinstance(targets, str) and re.fullmatch(r"[\w.]+", targets):
        targets = [targets]
    return get_peft_config(changed(model_args, lora_task_type=task_type, lora_target_modules=targets))


def try_adapter(config: "PreTrainedConfig", adapter: "PeftConfig") -> None:
    """Try an adapter on a model without weights.

    Raises:
        InputError: when it does not fit, such as for target modules that the model does not have.
    """
    import torch
    from peft import get_peft_model

    from hfllm.models.loading.saved import empty_model, is_for_pictures

    # Of the family, a bidirectional model can write nothing.
    is_causal = adapter.task_type in ("CAUSAL_LM", "SEQ_CLS") and getattr(config, "is_causal", True)
    task = "CAUSAL_LM" if is_causal else adapter.task_type
    if task == "CAUSAL_LM" and is_for_pictures(config):
        task = "IMAGE_TEXT"
    model = empty_model(config, task)
    whose = f"a model of type {config.model_type}"
    # PEFT is content if any of several names exists.
    heads = set() if adapter.task_type == "CAUSAL_LM" else {"score", "classifier", "qa_outputs"}
    for flag, wanted, names in (
        ("lora_target_modules", adapter.target_modules, [name for name, _ in model.named_modules()]),
        ("lora_modules_to_save", adapter.modules_to_save, [name for name, _ in model.named_modules()]),
        ("lora_target_parameters", adapter.target_parameters, [name for name, _ in model.named_parameters()]),
    ):
        for each in sorted(set() if isinstance(wanted, str) else set(wanted or ()) - heads):
            if not any(f".{name}".endswith(f".{each}") for name in names):
                there = {name.rpartition(".")[2] for name in linear_layers(model)}
                raise InputError(f"--{flag} {each}: not in {whose}; its linear layers are {', '.join(sorted(there))}")
    try:
        with torch.device("meta"):
            get_peft_model(model, adapter)
    except (KeyError, ValueError, re.error) as error:
        raise InputError(f"--use_peft on {whose}: {str(error).splitlines()[0]}") from None


def linear_layers(model: "PreTrainedModel") -> list[str]:
    """Return the names of a model's linear layers."""
    from torch import nn

    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _unloadable(name: str, error: Exception, what: str = "model") -> InputError:
    if isinstance(error, InputError):
        return error
    from hfllm.models.loading.saved import reason_of

    return InputError(f"{what} {name!r} could not be loaded: {reason_of(error)}")


def fitting_length(max_length: int | None, model: "PreTrainedModel") -> int | None:
    """Return `max_length`, limited to the model's context."""
    return min(filter(None, (max_length, max_length_of(model.config))), default=None)
