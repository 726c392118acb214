"""The models, tokenizers and adapters of a stage, as its flags name them."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm.data.tokenizer import padding_token, plain_chat_template
from hfllm.durable import temporary_folder, whole_folder
from hfllm.errors import InputError, is_out_of_memory, one_line, refuse
from hfllm.flags import changed
from hfllm.models.conversion.convert import BAD_CONFIG, check_empty, config_from_native
from hfllm.models.family.attention_hfllm import check_implementation
from hfllm.models.family.configuration_fields_hfllm import SPARSE_SIZES, ExpertFields, LatentFields
from hfllm.models.family.configuration_hfllm import HfllmConfig
from hfllm.models.loading.adapters import BASE_FOLDER, HEADS, find_adapter, load_base, put_on, put_under_head
from hfllm.models.loading.saved import (
    check_vocabulary,
    empty_model,
    is_for_pictures,
    max_length_of,
    quantization_method,
    reason_of,
    saved_config,
    saved_processor,
)
from hfllm.models.loading.weights import check_weight_files
from hfllm.outputs.files import MERGED_FROM, read_json
from hfllm.outputs.report import REPORT_FILE
from hfllm.runs.command_line import main_process, say, say_once

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
    from transformers.models.auto.auto_factory import _BaseAutoModelClass
    from trl import ModelConfig

    from hfllm.models.family.configuration_hfllm import HfllmConfig
    from hfllm.models.loading.adapters import SavedAdapter


# ---- models and tokenizers ----


# Quantization methods with possible training of the weights; transformers itself refuses the rest.
TRAINED_QUANTIZED = ("bitnet", "compressed-tensors", "fp_quant")


@dataclass(frozen=True)
class NamedModel:
    """A saved model or adapter, and how to load it.

    See `named_model` for the one that the flags name.

    Args:
        name: its folder, or its id on the Hub.
        revision: its branch, tag or commit.
        settings: further arguments of `from_pretrained`: attention, dtype and quantization.
        trains_adapter: whether a new adapter is trained, of which it is the base.
    """

    name: str
    revision: str = "main"
    settings: Mapping[str, Any] = field(default_factory=dict)
    trains_adapter: bool = False

    @property
    def kwargs(self) -> dict[str, Any]:
        """The arguments of `from_pretrained` besides the name."""
        return {"revision": self.revision, **self.settings}

    @property
    def adapter(self) -> "SavedAdapter | None":
        """The adapter of this name, `None` for a whole model."""
        return find_adapter(self.name, revision=self.revision)


def named_model(model_args: "ModelConfig") -> NamedModel:
    """Return the model named by the flags of `ModelConfig`."""
    from trl import get_quantization_config

    settings = {
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "quantization_config": get_quantization_config(model_args),
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    return NamedModel(
        model_args.model_name_or_path, model_args.model_revision or "main", settings, model_args.use_peft
    )


def load_policy(model: NamedModel) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load a causal language model and its tokenizer; an adapter is merged into its base, unless quantized."""
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(model.name, model.revision)
    policy = _load_writing(model, AutoModelForCausalLM)
    check_vocabulary(policy, tokenizer, model.name)
    return policy, tokenizer


def load_seeing(model: NamedModel) -> "PreTrainedModel":
    """Load a vision-language model; an adapter is merged into its base, unless the base is quantized."""
    from transformers import AutoModelForImageTextToText

    refuse_four_bits_of_pictures(model)
    return _load_writing(model, AutoModelForImageTextToText)


def refuse_four_bits_of_pictures(model: NamedModel) -> None:
    """Refuse to load a vision-language model in 4 bits on a CPU.

    bitsandbytes' CPU kernel assumes contiguous input, and a tower's output for the projector need not be contiguous.
    """
    import torch

    why = "on a CPU bitsandbytes' 4-bit kernel reads pictures wrongly; leave it out, or run on a GPU"
    in_four_bits = getattr(model.settings.get("quantization_config"), "load_in_4bit", False)
    refuse(in_four_bits and not torch.accelerator.is_available(), "--load_in_4bit", why)


def _load_writing(model: NamedModel, auto_class: "type[_BaseAutoModelClass]") -> "PreTrainedModel":
    from hfllm.models.loading.adapters import load_apart, load_merged
    from hfllm.models.loading.weights import load_weights_of

    name, kwargs, adapter = model.name, model.kwargs, model.adapter
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
    """Load the tokenizer of a model; a missing padding token or chat template is added and printed."""
    tokenizer = saved_tokenizer(name, revision)
    if tokenizer.eos_token is None:
        raise InputError(
            f"the tokenizer of {name!r} has no eos_token: set one and save it, "
            "for example tokenizer.eos_token = ...; tokenizer.save_pretrained(...)"
        )
    _complete(tokenizer, name)
    return tokenizer


def saved_tokenizer(name: str, revision: str = "main") -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model as it is; an adapter saved without one has its base's."""
    from hfllm.models.loading.saved import saved_tokenizer

    try:
        return saved_tokenizer(name, revision=revision)
    except Exception as error:
        # The tokenizers library has no error class for unreadable files, and a field may be missing.
        if not isinstance(error, (KeyError, OSError, TypeError, ValueError)) and type(error) is not Exception:
            raise
        adapter = find_adapter(name, revision=revision)
        if adapter is None:
            raise _unloadable(name, error, "the tokenizer of model" if Path(name).is_dir() else "model") from error
    try:
        return saved_tokenizer(adapter.base, **adapter.base_location)
    except (OSError, ValueError) as error:
        raise adapter.unloadable(error) from error


def _complete(tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
    """Set a tokenizer's missing parts: a padding token, a chat template. Both are saved with it."""
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
    """Load the config of the named model; for an adapter, its base's config."""
    try:
        return saved_config(name, revision=revision)
    except (OSError, ValueError) as error:
        adapter = find_adapter(name, revision=revision)
        if adapter is None:
            raise _unloadable(name, error) from error
        return adapter.base_config()


def check_trainable(model_args: "ModelConfig", adapters: bool = True) -> None:
    """Refuse untrainable weights: quantized ones without an adapter.

    Args:
        model_args: with the model's name, if it has one.
        adapters: whether the stage can train an adapter.
    """
    name, revision = model_args.model_name_or_path, model_args.model_revision
    adapter = find_adapter(name, revision=revision) if name else None
    if adapter is not None:
        # Whether its base is there, and whether PEFT can train such a one further.
        adapter.check()
        adapter.base_config()
    elif name:
        check_weight_files(name)
    # A model loaded with an adapter is trained further as an adapter.
    if adapters and (model_args.use_peft or adapter is not None):
        return
    way_out = "--use_peft trains an adapter on them" if adapters else "this stage trains all of a model"
    for flag in ("load_in_8bit", "load_in_4bit"):
        refuse(getattr(model_args, flag), f"--{flag}", f"such weights cannot be trained; {way_out}")
    method = quantization_method(load_config(name, revision)) if name else None
    if method is not None and method not in TRAINED_QUANTIZED:
        raise InputError(
            f"model {name!r} is quantized ({method}), and such weights cannot be trained: name the model in full "
            f"precision that it was made from; {way_out}"
        )


def new_config(fields: dict[str, Any]) -> "HfllmConfig":
    """Return the config of a new model of the family."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        return HfllmConfig(**fields)
    except (TypeError, ValueError, KeyError, StrictDataclassError) as error:
        sizes = ", ".join(f"{name} {fields.get(name)}" for name in ("hidden_size", "num_attention_heads"))
        # In an error of a config check the cause has the explanation; the rest names the check.
        reason = one_line(error.__cause__ or error, 300)
        raise InputError(f"{sizes} and the other fields describe no model: {reason}") from None


def check_attention(implementation: str | None, config: "PreTrainedConfig") -> None:
    """Refuse an attention function of ours, `sparse` or `banded`, unable to compute the model of this config."""
    try:
        if implementation in ("sparse", "banded"):
            check_implementation(implementation, config.get_text_config(decoder=True))
    except ValueError as error:
        raise InputError(f"--attn_implementation {implementation}: {error}") from None


def named_fields(name: str) -> dict[str, Any]:
    """Return the architecture named by `--config_name_or_path`: a preset or a config.json, also a native one."""
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


def load_reward_model(
    name: str, like: NamedModel, revision: str = "main", may_score_tokens: bool = False
) -> "PreTrainedModel":
    """Load a sequence-classification model with one label; its head is new if `name` is a language model.

    Args:
        like: a model with the same attention, dtype and quantization.
        may_score_tokens: load a model that was saved for tokens as such.
    """
    from transformers import AutoModelForSequenceClassification

    from hfllm.models.loading.adapters import load_scorer, scorer_class

    try:
        kind = scorer_class(name, revision=revision) if may_score_tokens else AutoModelForSequenceClassification
        return load_scorer(name, kind, **{**like.kwargs, "revision": revision})
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, InputError) or is_out_of_memory(error):
            raise
        raise _unloadable(name, error) from error


def load_value_model(value_model: str, like: NamedModel, reward_models: Sequence[str]) -> "PreTrainedModel | None":
    """Load the critic named by `--value_model`; `None` stands for a head on the policy's trunk.

    All of its weights are trained, so it is never quantized. `reward` stands for the first of the reward models.
    """
    if value_model == "head":
        return None
    name = reward_models[0] if value_model == "reward" else value_model
    settings = {key: value for key, value in like.settings.items() if key != "quantization_config"}
    return load_reward_model(name, replace(like, settings=settings))


def peft_config(model_args: "ModelConfig", task_type: str = "CAUSAL_LM") -> "PeftConfig | None":
    """Return the adapter described by `--use_peft` and `--lora_*`, or `None`."""
    from trl import get_peft_config

    targets = model_args.lora_target_modules
    # A single name is a pattern for whole paths to PEFT; here it names modules like one of several names.
    if isinstance(targets, str) and re.fullmatch(r"[\w.]+", targets):
        targets = [targets]
    return get_peft_config(changed(model_args, lora_task_type=task_type, lora_target_modules=targets))


def try_adapter(config: "PreTrainedConfig", adapter: "PeftConfig") -> None:
    """Try an adapter on a model without weights."""
    import torch
    from peft import get_peft_model

    # Of the family, a bidirectional model can write nothing.
    is_causal = adapter.task_type in ("CAUSAL_LM", "SEQ_CLS") and getattr(config, "is_causal", True)
    task = "CAUSAL_LM" if is_causal else adapter.task_type
    if task == "CAUSAL_LM" and is_for_pictures(config):
        task = "IMAGE_TEXT"
    model = empty_model(config, task)
    whose = f"a model of type {config.model_type}"
    # PEFT is content if any of several names exists.
    heads = set() if adapter.task_type == "CAUSAL_LM" else {"score", "classifier", "qa_outputs"}
    for flag, targets, names in (
        ("lora_target_modules", adapter.target_modules, [name for name, _ in model.named_modules()]),
        ("lora_modules_to_save", adapter.modules_to_save, [name for name, _ in model.named_modules()]),
        ("lora_target_parameters", adapter.target_parameters, [name for name, _ in model.named_parameters()]),
    ):
        for each in sorted(set() if isinstance(targets, str) else set(targets or ()) - heads):
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
    return InputError(f"{what} {name!r} could not be loaded: {reason_of(error)}")


def fitting_length(max_length: int | None, model: "PreTrainedModel") -> int | None:
    """Return `max_length`, limited to the model's context."""
    return min(filter(None, (max_length, max_length_of(model.config))), default=None)


# ---- adapters ----
# The starting point of a stage when `--model_name_or_path` is an adapter: trained further, or merged under a new one.
#
# Without `--use_peft` the adapter's own weights are trained further, and the result is an adapter of the same base.
# With it the adapter is merged into its base first; the merged model is kept in `<output_dir>/base` as the base of the
# new adapter. Recipes without training merge it.


def load_to_train(
    model: NamedModel, output_dir: str
) -> tuple["PreTrainedModel | PeftModel", "PreTrainedTokenizerBase"]:
    """Load the language model to train in a stage, and its tokenizer."""
    from transformers import AutoModelForCausalLM

    adapter = model.adapter
    if adapter is None:
        return load_policy(model)
    adapter.check("CAUSAL_LM")
    if model.trains_adapter:
        return load_policy(on_merged_base(adapter, model, output_dir))
    say(f"adapter {model.name} of {adapter.base} is trained further")
    base, _ = load_base(adapter, AutoModelForCausalLM, **model.kwargs)
    policy, tokenizer = put_on(base, adapter, is_trainable=True), load_tokenizer(model.name, model.revision)
    check_vocabulary(policy, tokenizer, model.name)
    return policy, tokenizer


def load_scorer_to_train(model: NamedModel, output_dir: str) -> "PreTrainedModel | PeftModel":
    """Load the model to train in a stage, with one score for a sequence. A language model's head is new."""
    from transformers import AutoModelForSequenceClassification

    adapter = model.adapter
    if adapter is None:
        return load_reward_model(model.name, model, model.revision)
    adapter.check("CAUSAL_LM", "SEQ_CLS")
    if model.trains_adapter:
        merged = on_merged_base(adapter, model, output_dir)
        return load_reward_model(merged.name, merged)
    has_head = adapter.task == "SEQ_CLS" or adapter.brings_head
    head = "" if has_head else ", with a new head for scores"
    say(f"adapter {model.name} of {adapter.base} is trained further{head}")
    settings = {"num_labels": 1, "ignore_mismatched_sizes": True, **model.kwargs}
    base, _ = load_base(adapter, AutoModelForSequenceClassification, **settings)
    return put_on(base, adapter, is_trainable=True) if has_head else put_under_head(base, adapter)


def load_head_to_train(
    model: NamedModel,
    output_dir: str,
    auto_class: "type[_BaseAutoModelClass]",
    task_type: str,
    **head: object,
) -> "PreTrainedModel | PeftModel":
    """Load the model with a head to train in a stage; the head of a language model, or of other labels, is new.

    Args:
        output_dir: where an adapter's merged base is kept, for a new adapter of it.
        auto_class: such as `AutoModelForTokenClassification`.
        task_type: of the head, as PEFT names it.
        head: further arguments of `from_pretrained`, such as `id2label`.
    """
    from hfllm.models.loading.weights import load_weights_of

    name, adapter, settings = model.name, model.adapter, {"ignore_mismatched_sizes": True, **head}
    if adapter is not None:
        adapter.check("CAUSAL_LM", task_type)
        if not model.trains_adapter:
            has_head = adapter.task == task_type
            say(f"adapter {name} of {adapter.base} is trained further{'' if has_head else ', with a new head'}")
            base, _ = load_base(adapter, auto_class, **settings, **model.kwargs)
            if has_head:
                return put_on(base, adapter, is_trainable=True)
            return put_under_head(base, adapter, task_type)
        model = on_merged_base(adapter, model, output_dir)
    try:
        return load_weights_of(auto_class, model.name, **{**model.kwargs, **settings})[0]
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise _unloadable(name, error) from error


def on_merged_base(adapter: "SavedAdapter", model: NamedModel, output_dir: str) -> NamedModel:
    """Merge an adapter into its base, kept in the output folder, and return the model to load from there.

    A new adapter is then trained on exactly the base it is loaded on later, to the bit. A restarted run finds it.
    """
    from accelerate import PartialState
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        raise InputError(
            f"--use_peft on the adapter {adapter.name!r} merges it, which ZeRO-3 cannot do: merge it by hfllm merge "
            f"--model_name_or_path {adapter.name} and name the result"
        )
    folder = Path(output_dir) / BASE_FOLDER
    if folder.exists() and not _is_replaceable(folder):
        raise InputError(
            f"{folder} is where the adapter {adapter.name!r} would be merged, and holds something else: move it or "
            "choose another --output_dir"
        )
    # All processes have looked before one of them writes.
    PartialState().wait_for_everyone()
    if main_process() and read_json(folder / MERGED_FROM) != merge_record(adapter):
        shutil.rmtree(folder, ignore_errors=True)
        write_merged(adapter, folder)
    PartialState().wait_for_everyone()
    say(f"adapter {adapter.name} is merged into {adapter.base}: {folder}, which the new adapter is trained on")
    say(f"to keep one adapter of {adapter.base}, which can be published alone, leave out --use_peft")
    return replace(model, name=str(folder), revision="main")


@contextmanager
def whole_model(name: str, revision: str, folder: str | Path) -> Iterator[tuple[str, str]]:
    """Yield name and revision of a whole model: the named one, or an adapter merged into its base, for the time being.

    Args:
        folder: where a merged model may lie in the meantime.
    """
    adapter = find_adapter(name, revision=revision)
    if adapter is None:
        yield name, revision
        return
    with temporary_folder(Path(folder), ".merged-") as index:
        merged = index / (Path(name).name or "merged")
        write_merged(adapter, merged)
        yield str(merged), "main"


def write_merged(adapter: "SavedAdapter", folder: Path, max_shard_size: str = "50GB") -> "PreTrainedModel":
    """Write an adapter's base with the adapter merged into it, in the base's precision, with the tokenizer.

    Args:
        folder: new or empty; it appears whole or not at all.
    """
    from hfllm.models.loading.adapters import auto_class_of, load_merged

    model = load_merged(adapter, auto_class_of(adapter), **scorer_settings(adapter))
    save_merged(model, adapter, folder, max_shard_size)
    return model


def save_merged(model: "PreTrainedModel", adapter: "SavedAdapter", folder: Path, max_shard_size: str = "50GB") -> None:
    """Save a merged model with its tokenizer, and a record of its sources."""
    check_empty(folder)
    tokenizer = saved_tokenizer(adapter.name, adapter.location.get("revision", "main"))
    # In a vision-language model it stands in the config of its decoder.
    config = model.config.get_text_config()
    if adapter.task == "SEQ_CLS" and config.pad_token_id is None:
        # It scores the last non-padding token.
        config.pad_token_id = tokenizer.pad_token_id
    saved = tokenizer
    if is_for_pictures(model.config):
        saved = processor_of(adapter)
    with whole_folder(folder) as index:
        model.save_pretrained(index, max_shard_size=max_shard_size)
        saved.save_pretrained(index)
        (index / MERGED_FROM).write_text(json.dumps(merge_record(adapter), indent=2) + "\n")


def processor_of(adapter: "SavedAdapter") -> "ProcessorMixin":
    """Return the processor saved with an adapter of a vision-language model, or its base's."""
    for name, location in ((adapter.name, adapter.location), (adapter.base, adapter.base_location)):
        with suppress(ImportError, OSError, ValueError):
            processor = saved_processor(name, **location)
            if hasattr(processor, "image_processor"):
                return processor
    raise InputError(f"adapter {adapter.name!r} and its base {adapter.base!r} have no processor of pictures")


def scorer_settings(adapter: "SavedAdapter") -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for a base with a score head from an adapter."""
    if adapter.task not in ("SEQ_CLS", "TOKEN_CLS"):
        return {}
    rows = [value.shape[0] for name, value in adapter.weights().items() if name.split(".")[-2] in HEADS]
    return {"num_labels": rows[0], "ignore_mismatched_sizes": True} if rows else {}


def merge_record(adapter: "SavedAdapter") -> dict[str, Any]:
    """Return the sources of a merged model: the adapter, the time of its last change, and its base."""
    file = Path(adapter.name, "adapter_model.safetensors")
    return {
        "adapter": adapter.name,
        "adapter_revision": adapter.location.get("revision"),
        "adapter_changed_at": file.stat().st_mtime_ns if file.is_file() else None,
        "base_model_name_or_path": adapter.base,
        "base_is_local": Path(adapter.base).is_dir(),
    }


def _is_replaceable(folder: Path) -> bool:
    """Return whether a folder holds files of `on_merged_base`, or nothing; `hfllm merge` also leaves a report."""
    if folder.is_dir() and not any(folder.iterdir()):
        return True
    return (folder / MERGED_FROM).is_file() and not (folder / REPORT_FILE).exists()
