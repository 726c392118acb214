"""Convert checkpoints of native transformers classes to hfllm, and back to the equivalent native class.

Weights are moved without arithmetic, so a round trip gives the same bits.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

from hfllm.errors import InputError
from hfllm.models import tensor_layouts
from hfllm.models.configuration_hfllm import HfllmConfig
from hfllm.models.configuration_hfllm_vision import HfllmVisionConfig
from hfllm.models.family_rows import FAMILIES
from hfllm.models.loading import reason_of, saved_config, saved_model
from hfllm.models.native_families import BAD_CONFIG, config_from_native, config_to_native
from hfllm.models.stored import refuse_quantized
from hfllm.models.vision_conversion import (
    joined_state,
    split_state,
    vision_config_from_native,
    vision_config_to_native,
)
from hfllm.models.whole_folders import whole_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

HEADS = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "Model": "AutoModel",
    "ForConditionalGeneration": "AutoModelForImageTextToText",
}
# What our models with a head call the model inside.
TRUNK = "model"
# Arguments of `push_to_hub`, which `save_pretrained` takes too.
UPLOADING = ("repo_id", "token", "private", "revision", "create_pr", "commit_message", "commit_description")
# How a model computes, not what: asked of the native model, and so of ours too.
ASKED_OF_BOTH = ("attn_implementation", "experts_implementation")


def from_native(
    path_or_id: str | os.PathLike, *, revision: str = "main", gguf_file: str | None = None, **kwargs: object
) -> "PreTrainedModel":
    """Load an hfllm model with the weights of a native checkpoint, in the checkpoint's precision.

    Args:
        path_or_id: a local folder or a Hub id; one of the families in `FAMILIES`, or Llava around one, whole or in
            shards.
        revision: of a Hub id.
        gguf_file: a GGUF file in that folder to read instead, dequantized (needs the `gguf` package).
        kwargs: further arguments of `from_pretrained`, such as `dtype` or `token`.

    Returns:
        The model with the head that the checkpoint's `architectures` names, or without one if it names the trunk; a
        causal language model if it names nothing.

    Raises:
        InputError: for a family or field that cannot be converted, or a checkpoint that is broken or quantized; it is
            named.
    """
    name = os.fspath(path_or_id)
    kwargs |= {"revision": revision, **({"gguf_file": gguf_file} if gguf_file else {})}
    # What cannot be converted is refused before the weights are read.
    settings = read_config(name, **_location(kwargs))
    if settings.model_type == "llava":
        return _seeing_from_native(name, settings, kwargs)
    config_from_native(settings)
    native = load_checked(name, **kwargs)
    # Of the model, since arguments of `from_pretrained` may change fields.
    config = config_from_native(native.config)
    if _is_token_classifier(native):
        config.classifier_dropout = native.dropout.p
    state = tensor_layouts.to_ours(_whole(native), _rules(native.config.model_type, native, config))
    if _is_trunk(native):
        state = tensor_layouts.without_prefix(state, TRUNK)
    model_class = _auto_class(native.config)._model_mapping[HfllmConfig]
    model = _build(model_class, config, state, **{key: kwargs[key] for key in ASKED_OF_BOTH if key in kwargs})
    if native.can_generate():
        model.generation_config = native.generation_config
    return model


def to_native(
    model: "PreTrainedModel | str | os.PathLike",
    path: str | os.PathLike,
    native_type: str | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    **kwargs: object,
) -> Path:
    """Write an hfllm model as the equivalent native class, readable without hfllm.

    Args:
        model: the model, or the folder or Hub id of one.
        path: a folder that does not exist yet or is empty. It appears whole or not at all.
        native_type: the native family, such as `"llama"`; `None` takes the first that can express the model.
        tokenizer: written beside the weights.
        kwargs: further arguments of `save_pretrained`, such as `max_shard_size`. With `push_to_hub=True` what was
            written is uploaded in one commit, to `repo_id`, by default the folder's name.

    Raises:
        InputError: when no native class can express the model (its fields are named), it is quantized, or `path` holds
            something.
    """
    target = Path(path)
    check_empty(target)
    if isinstance(model, str | os.PathLike):
        model = load_checked(os.fspath(model))
    if isinstance(model.config, HfllmVisionConfig):
        return _seeing_to_native(model, target, native_type, tokenizer, kwargs)
    if not isinstance(model.config, HfllmConfig):
        raise InputError(f"expected an hfllm model, got a {type(model).__name__}")
    refuse_quantized(model.config, model.config.name_or_path)
    suffix = type(model).__name__.removeprefix("Hfllm")
    if suffix not in HEADS:
        raise InputError(f"a {type(model).__name__} has no native counterpart; these have: {', '.join(HEADS)}")
    native_config = config_to_native(model.config, native_type, HEADS[suffix])
    native_class = getattr(transformers, HEADS[suffix])._model_mapping[type(native_config)]
    if _is_token_classifier(model):
        native_config.classifier_dropout = model.dropout.p
    state = tensor_layouts.to_theirs(_whole(model), _rules(native_config.model_type, model, model.config))
    if _is_trunk(model):
        state = tensor_layouts.without_prefix(state, native_class.base_model_prefix)
    native = _build(native_class, native_config, state)
    if model.can_generate():
        native.generation_config = model.generation_config
    return _write(native, target, tokenizer, kwargs)


def _write(
    native: "PreTrainedModel", target: Path, tokenizer: "PreTrainedTokenizerBase | None", kwargs: Mapping[str, Any]
) -> Path:
    # Its tensors come from no file, so transformers would give files the names of modules, which other programs do not
    # know where experts or hybrids have others. Now they have the names that the native class gives a new model.
    native._weight_conversions = None
    saving = {name: value for name, value in kwargs.items() if name not in ("push_to_hub", *UPLOADING)}
    with whole_folder(target) as folder:
        native.save_pretrained(folder, **saving)
        if tokenizer is not None:
            # Of a model with pictures it may be a processor.
            tokenizer.save_pretrained(folder)
            _rename_tokenizer_class(folder / "tokenizer_config.json")
    if kwargs.get("push_to_hub"):
        _upload(target, **{name: kwargs[name] for name in UPLOADING if name in kwargs})
    return target


def _upload(
    folder: Path,
    repo_id: str | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    **kwargs: object,
) -> None:
    """Upload what was written, in one commit. The arguments are those of `push_to_hub`."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id or folder.resolve().name, private=private, exist_ok=True).repo_id
    # Hidden files, such as a run's lock, are none of the model's.
    api.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=".*", **kwargs)


def _seeing_from_native(name: str, settings: "PreTrainedConfig", kwargs: Mapping[str, Any]) -> "PreTrainedModel":
    """Load our model with the weights of one of Llava's class."""
    vision_config_from_native(settings)
    native = load_checked(name, **kwargs)
    config = vision_config_from_native(native.config)
    text = native.config.text_config
    media, state = split_state(native.state_dict(), _text_class(text).base_model_prefix)
    state = tensor_layouts.to_ours(state, FAMILIES[text.model_type].rules(config.text_config))
    model_class = transformers.AutoModelForImageTextToText._model_mapping[HfllmVisionConfig]
    asked = {key: kwargs[key] for key in ASKED_OF_BOTH if key in kwargs}
    model = _build(model_class, config, joined_state(media, state, TRUNK), **asked)
    model.generation_config = native.generation_config
    return model


def _seeing_to_native(
    model: "PreTrainedModel",
    target: Path,
    native_type: str | None,
    tokenizer: "PreTrainedTokenizerBase | None",
    kwargs: Mapping[str, Any],
) -> Path:
    """Write our model as one of Llava's class."""
    refuse_quantized(model.config, model.config.name_or_path)
    native_config = vision_config_to_native(model.config, native_type)
    text = native_config.text_config
    media, state = split_state(model.state_dict(), TRUNK)
    state = tensor_layouts.to_theirs(state, FAMILIES[text.model_type].rules(model.config.text_config))
    state = joined_state(media, state, _text_class(text).base_model_prefix)
    native = _build(transformers.LlavaForConditionalGeneration, native_config, state)
    native.generation_config = model.generation_config
    return _write(native, target, tokenizer, kwargs)


def _text_class(config: "PreTrainedConfig") -> "type[PreTrainedModel]":
    return transformers.AutoModelForCausalLM._model_mapping[type(config)]


def _rename_tokenizer_class(path: Path) -> None:
    """Name the general tokenizer as transformers 4 does, which other engines still use; release 5 knows both names."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_empty(path: Path) -> None:
    """Refuse a path that is not new or an empty folder. Hidden files, such as a run's lock, do not count.

    Raises:
        InputError: when it exists and is not an empty folder.
    """
    if path.exists() and (not path.is_dir() or any(not each.name.startswith(".") for each in path.iterdir())):
        raise InputError(f"{path} exists and is not empty")


def read_config(name: str, **location: object) -> "PreTrainedConfig":
    """Load the config of a local folder or Hub id.

    Raises:
        InputError: when it cannot be read, or is that of a quantized model, whose weights no other class can read.
    """
    try:
        config = saved_config(name, **location)
    except (OSError, *BAD_CONFIG) as error:
        raise InputError(f"{name}: {_one_line(error)}") from error
    refuse_quantized(config, name)
    return config


def load_checked(name: str, **kwargs: object) -> "PreTrainedModel":
    """Load the model of a local folder or Hub id, in its own precision and with the head that its config names.

    A checkpoint that does not fit its config is an error here, not a warning.

    Args:
        kwargs: arguments of `from_pretrained`.

    Raises:
        InputError: for missing or unexpected tensors, wrong shapes, or files that cannot be read.
    """
    from safetensors import SafetensorError

    auto_class = _auto_class(read_config(name, **_location(kwargs)))
    if "gguf_file" in kwargs:
        kwargs["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # Mismatched shapes are ignored here and reported below.
    kwargs = {"dtype": "auto", "output_loading_info": True, "ignore_mismatched_sizes": True, **kwargs}
    try:
        model, report = saved_model(auto_class, name, **kwargs)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise InputError(f"{name}: cannot load the weights: {_one_line(error)}") from error
    _check_report(name, report)
    return model


def _location(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that locate a checkpoint."""
    names = ("revision", "gguf_file", "token", "cache_dir", "subfolder", "local_files_only", "force_download")
    return {name: kwargs[name] for name in names if name in kwargs}


def _is_token_classifier(model: "PreTrainedModel") -> bool:
    return type(model).__name__.endswith("ForTokenClassification")


def _is_trunk(model: "PreTrainedModel") -> bool:
    """Return whether a model has no head."""
    # Llama 4's class with a head calls its trunk by another name than its prefix.
    return model.base_model is model and model.get_output_embeddings() is None


def _whole(model: "PreTrainedModel") -> dict[str, "torch.Tensor"]:
    """Return a model's tensors, those of a trunk named as inside a model with a head."""
    state = model.state_dict()
    return tensor_layouts.with_prefix(state, model.base_model_prefix) if _is_trunk(model) else state


def _rules(model_type: str, model: "PreTrainedModel", config: HfllmConfig) -> Iterator[tensor_layouts.Rule]:
    family = FAMILIES[model_type]
    yield from family.rules(config)
    if _is_token_classifier(model):
        yield from tensor_layouts.token_classifier_rules(family.classifier)


def _build(
    model_class: type["PreTrainedModel"],
    config: "PreTrainedConfig",
    state: dict[str, "torch.Tensor"],
    **kwargs: object,
) -> "PreTrainedModel":
    dtype = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    model, report = model_class.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype,
        output_loading_info=True,
        trust_remote_code=False,
        **kwargs,
    )
    _check_report(model_class.__name__, report)
    return model.eval()


def _check_report(name: str, report: Mapping[str, Any]) -> None:
    problems = {
        "tensors are missing": report["missing_keys"],
        "tensors have no place": report["unexpected_keys"],
        "tensors have another shape": report["mismatched_keys"],
    }
    for problem, keys in problems.items():
        if keys:
            shown = ", ".join(str(key) for key in sorted(keys, key=str)[:3])
            raise InputError(f"{name}: {len(keys)} {problem}: {shown}{', ...' if len(keys) > 3 else ''}")


def _auto_class(config: "PreTrainedConfig") -> "type[_BaseAutoModelClass]":
    architecture = (config.architectures or ["ForCausalLM"])[0]
    for suffix, name in HEADS.items():
        # Of a trunk the whole name: GPT2DoubleHeadsModel is none.
        trunk = transformers.AutoModel._model_mapping[type(config)].__name__ if suffix == "Model" else None
        if architecture.endswith(suffix) and trunk in (None, architecture):
            return getattr(transformers, name)
    raise InputError(f"a {architecture} has no counterpart; these have: {', '.join(HEADS)}")


def _one_line(error: Exception) -> str:
    return reason_of(error, 400)
