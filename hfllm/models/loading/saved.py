"""Load configs, tokenizers and models without running the code or kernels they bring, and read their properties.

Without `trust_remote_code` transformers asks on standard input whether to run a folder's code, and `yes |` answers.
Here the answer is always given, and only a recipe's `--trust_remote_code` says yes. All of the package loads by this
file.
"""

import inspect
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError

from hfllm.errors import InputError, one_line, refuse_if
from hfllm.models.loading.probes import check_tokenizer

if TYPE_CHECKING:
    from torch import nn
    from transformers import (
        GenerationConfig,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
    )
    from transformers.models.auto.auto_factory import _BaseAutoModelClass


# ---- loading ----


TRUST_FLAG = "--trust_remote_code"
# Fields of a config that may name a kernel of the Hub, and their values other than kernels.
CHOICES = {
    "attn_implementation": ("eager", "sdpa", "flex_attention"),
    "experts_implementation": ("eager", "batched_mm", "grouped_mm"),
}

_is_trusted = False


def trusts_remote_code() -> bool:
    """Return whether the current recipe was told to trust the code of its loaded models."""
    return _is_trusted


@contextmanager
def trusting_remote_code(is_trusted: bool) -> Iterator[None]:
    """Context manager for running code of models, if `is_trusted`, or if it is trusted already."""
    global _is_trusted
    before = _is_trusted
    _is_trusted = before or is_trusted
    try:
        yield
    finally:
        _is_trusted = before


def saved_config(name: str, **kwargs: object) -> "PreTrainedConfig":
    """Return `AutoConfig.from_pretrained(name, **kwargs)`, without kernels of the Hub unless they are trusted.

    A model without weights may be built of it; `saved_model` refuses them.
    """
    from transformers import AutoConfig

    check_objects(name, "config.json")
    kwargs = _with_trust(kwargs)
    with _named_settings(name):
        try:
            config = AutoConfig.from_pretrained(name, **kwargs)
        except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
            # Errors of transformers' own classes for a value of another type than theirs.
            if kwargs["trust_remote_code"] or "module 'torch'" in str(error):
                raise
            raise InputError(f"model {name!r}: config.json cannot be loaded: {reason_of(error)}") from error
    if not kwargs["trust_remote_code"]:
        _remove_kernels(config)
    return config


def saved_tokenizer(name: str, **kwargs: object) -> "PreTrainedTokenizerBase":
    """Return `AutoTokenizer.from_pretrained(name, **kwargs)`, whose patterns and chat templates end."""
    from transformers import AutoTokenizer

    check_objects(name, "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    with _named_settings(name):
        tokenizer = AutoTokenizer.from_pretrained(name, **_with_trust(kwargs))
    check_tokenizer(name, tokenizer)
    return tokenizer


def saved_processor(name: str, **kwargs: object) -> "ProcessorMixin":
    """Return `AutoProcessor.from_pretrained(name, **kwargs)`, whose patterns and chat templates end."""
    from transformers import AutoProcessor

    check_objects(name, "config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json")
    with _named_settings(name):
        processor = AutoProcessor.from_pretrained(name, **_with_trust(kwargs))
    check_tokenizer(name, processor)
    return processor


def saved_model(model_class: "type[_BaseAutoModelClass | PreTrainedModel]", name: str, **kwargs: object) -> Any:
    """Return `model_class.from_pretrained(name, **kwargs)`.

    Args:
        model_class: an auto class, or a class of models.
        name: a folder or a Hub id, also of an adapter.

    Raises:
        InputError: when the config names untrusted kernels of the Hub, or an index of weights files
            elsewhere.
    """
    check_objects(name, "config.json", "generation_config.json")
    check_index(name)
    kwargs = _with_trust(kwargs)
    with _named_settings(name):
        if not kwargs["trust_remote_code"]:
            check_kernels(name, **kwargs)
        return model_class.from_pretrained(name, **kwargs)


def check_kernels(name: str, **kwargs: object) -> None:
    """Refuse a model whose config names kernels of the Hub for its attention or its experts.

    transformers downloads and runs the kernels named there by a config. A kernel named by a flag is the user's choice.

    Args:
        kwargs: arguments of `from_pretrained`; an `attn_implementation` among them wins over the config's.
    """
    from transformers import PreTrainedConfig

    location = location_of(kwargs)
    try:
        settings, _ = PreTrainedConfig.get_config_dict(_base_of(name, location), **location)
    except (OSError, ValueError):
        # Loading will report it.
        return
    chosen = {field for field in CHOICES if kwargs.get(field) is not None}
    for field, value in _named_kernels(settings):
        if field not in chosen:
            way_out = "give --attn_implementation sdpa, or " if field == "attn_implementation" else ""
            raise InputError(
                f"model {name!r}: its config names {field}={value!r}, which would be downloaded and run: take it out, "
                f"{way_out}give {TRUST_FLAG} if you trust it"
            )


def check_objects(name: str, *files: str) -> None:
    """Refuse a local model with a damaged file of settings: empty, or still JSON, but no object.

    transformers ends in errors of its own with these, or goes without; it reports damaged objects itself.
    """
    for file in files:
        path = Path(name, file)
        if path.is_file():
            with path.open("rb") as stream:
                beginning = stream.read(64).lstrip()
            refuse_if(not beginning.startswith(b"{"), f"model {name!r}: {file} is damaged: it holds no JSON object")


def check_index(name: str) -> None:
    """Refuse a local model whose index of weights names files outside of its folder."""
    for index in sorted(Path(name).glob("*.index.json")) if Path(name).is_dir() else []:
        try:
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError):
            # Loading will report it, if it is read at all.
            continue
        refuse_outside(sorted(map(str, files)), f"model {name!r}: {index.name}")


@contextmanager
def _named_settings(name: str) -> Iterator[None]:
    """Context manager that names the model with settings that transformers, or Python's JSON, cannot read."""
    try:
        yield
    except RecursionError as error:
        if "JSON" not in str(error):
            raise
        raise InputError(f"model {name!r}: one of its JSON files is damaged: it is nested too deeply") from None
    except (AttributeError, StrictDataclassError) as error:
        # For a dtype, transformers takes the attribute of torch with this name.
        if isinstance(error, AttributeError) and "module 'torch'" not in str(error):
            raise
        raise InputError(f"model {name!r} could not be loaded: {reason_of(error)}") from None


def refuse_outside(files: Iterable[str], index: str) -> None:
    """Refuse an index of weights with files outside of its folder; `index` names it in the complaint."""
    if outside := next(filter(is_outside, files), None):
        raise InputError(f"{index} names {outside!r}, which is not in its folder")


def is_outside(file: str) -> bool:
    """Return whether a relative name of a file leads out of its folder."""
    return file.startswith(("/", "\\")) or ":" in file or ".." in file.replace("\\", "/").split("/")


def reason_of(error: Exception, most: int = 200) -> str:
    """Return why something could not be loaded, in one line; for untrusted code, with the flag for trusting it."""
    text = one_line(error, None)
    if "trust_remote_code" in text and not isinstance(error, InputError):
        return f"it needs code of its own, which is run only by {TRUST_FLAG}: read that code first"
    return text[:most] or type(error).__name__


def _remove_kernels(config: "PreTrainedConfig") -> None:
    for key in config.sub_configs:
        if (part := getattr(config, key, None)) is not None and hasattr(part, "sub_configs"):
            _remove_kernels(part)
    if is_kernel("attn_implementation", config._attn_implementation or ""):
        config._attn_implementation = None
    if is_kernel("experts_implementation", config._experts_implementation or "eager"):
        config._experts_implementation = None


def _with_trust(kwargs: Mapping[str, object]) -> dict[str, Any]:
    """Return arguments of `from_pretrained` about trusting code; the given ones may already have it."""
    trust_remote_code = kwargs.get("trust_remote_code")
    return {**kwargs, "trust_remote_code": _is_trusted if trust_remote_code is None else bool(trust_remote_code)}


def _base_of(name: str, location: Mapping[str, Any]) -> str:
    """Return the name of an adapter's base, else `name`."""
    from transformers.utils import find_adapter_config_file

    if Path(name, "config.json").is_file():
        return name
    result = find_adapter_config_file(name, **location)
    return name if result is None else json.loads(Path(result).read_text(encoding="utf-8"))["base_model_name_or_path"]


def _named_kernels(settings: object) -> Iterator[tuple[str, str]]:
    """Yield field and value of the kernels named by a config, or by one in it."""
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            field = key.removeprefix("_").removesuffix("_internal")
            if field in CHOICES:
                yield from ((field, each) for each in _names(value) if is_kernel(field, each))
            else:
                yield from _named_kernels(value)
    elif isinstance(settings, list):
        for each in settings:
            yield from _named_kernels(each)


def _names(value: object) -> list[str]:
    """Return the implementations named by a field: one, or one per part of a model."""
    if isinstance(value, Mapping):
        return [name for each in value.values() for name in _names(each)]
    return [] if value is None else [str(value)]


def is_kernel(field: str, name: str) -> bool:
    """Return whether an implementation of attention or of experts is downloaded from the Hub.

    Args:
        field: `attn_implementation` or `experts_implementation`.
        name: its value, such as `sdpa`, `flash_attention_2` or `owner/kernel`.
    """
    if "/" in name or field == "experts_implementation":
        return name not in CHOICES[field]
    from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX as FLASH

    # Where flash attention is not installed, a kernel stands in for it.
    version = name.removeprefix("paged|").removeprefix("flash_attention_")
    is_flash = version.isdecimal() and int(version) in FLASH
    return is_flash and not FLASH[int(version)]["general_availability_check"]()


# ---- stored ----
#
# Inspect a saved model before reading its weights: where it is, whether it is quantized, and its modules.


# Arguments of `from_pretrained` for locating a model, for its config and an adapter's.
LOCATION = ("revision", "cache_dir", "token", "subfolder", "local_files_only", "force_download", "proxies")


def location_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for locating a model."""
    return {name: settings[name] for name in LOCATION if settings.get(name) is not None}


def quantization_of(config: "PreTrainedConfig") -> dict[str, Any]:
    """Return the `quantization_config` of a model's config as a dictionary, empty in full precision."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None or isinstance(quantization, dict):
        return quantization or {}
    return quantization.to_dict()


def quantization_method(config: "PreTrainedConfig") -> str | None:
    """Return the quantization method of a model, such as `bitsandbytes`; `None` if it is in full precision."""
    quantization = quantization_of(config)
    method = quantization.get("quant_method") or ("unknown" if quantization else None)
    return getattr(method, "value", method)


def refuse_quantized(config: "PreTrainedConfig", name: str) -> None:
    """Refuse an already quantized model: its full weights are lost.

    Raises:
        InputError: if it is.
    """
    method, instead = quantization_method(config), "name the model in full precision that it was made from"
    refuse_if(method is not None, f"model {name!r} is quantized already ({method}): {instead}")


def empty_model(config: "PreTrainedConfig", task_type: str = "CAUSAL_LM") -> "PreTrainedModel":
    """Build a causal language model without weights, or one with another head.

    Args:
        task_type: of the head, as PEFT names it, or `IMAGE_TEXT` for one that writes about images.

    Raises:
        InputError: when transformers has no such model for this config.
    """
    import torch
    import transformers

    kind = {
        "SEQ_CLS": "SEQUENCE_CLASSIFICATION",
        "TOKEN_CLS": "TOKEN_CLASSIFICATION",
        "QUESTION_ANS": "QUESTION_ANSWERING",
        "IMAGE_TEXT": "IMAGE_TEXT_TO_TEXT",
    }.get(task_type, "CAUSAL_LM")
    try:
        with torch.device("meta"):
            # By the constructor, not intercepted by DeepSpeed.
            return getattr(transformers, f"MODEL_FOR_{kind}_MAPPING")[type(config)](config)
    except (KeyError, ValueError, ImportError) as error:
        what = "causal language model" if kind == "CAUSAL_LM" else f"model for {kind.lower().replace('_', ' ')}"
        reason = str(error).splitlines()[0]
        raise InputError(f"a {what} of type {config.model_type} cannot be made: {reason}") from None


def is_for_pictures(config: "PreTrainedConfig | None") -> bool:
    """Return whether a saved model reads images next to its tokens; the only place for this question about a config.

    Some types, such as Gemma 3, are also types of causal language models in transformers; they still read images.
    """
    from transformers import AutoModelForImageTextToText

    mapping = AutoModelForImageTextToText._model_mapping
    return type(config) in mapping and reads_pictures(mapping[type(config)])


def reads_pictures(model: "nn.Module | type[nn.Module]") -> bool:
    """Return whether a model, or a class, reads images; with an adapter, the model below it."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "pixel_values" in inspect.signature(model.forward).parameters


def scores_tokens(model: "PreTrainedModel") -> bool:
    """Return whether a model gives one number per token (`...ForTokenClassification`)."""
    return type(model).__name__.endswith("ForTokenClassification")


# ---- context ----
#
# The longest sequence of a model.


def max_length_of(config: "PreTrainedConfig") -> int | None:
    """Return the longest sequence of a model, in tokens, or `None` if its config does not say."""
    context = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    # XLNet's config says -1: no limit.
    return context if context and context > 0 else None


# ---- generation settings ----
#
# Settings of generation in a saved model that transformers would not save again.


# Without effect unless `do_sample` is true, and with one beam.
SAMPLING = ("temperature", "top_p", "top_k", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
BEAMS = ("early_stopping", "length_penalty")


def leave_out_idle_settings(model: "PreTrainedModel", whose: str) -> None:
    """Leave out settings of generation without effect: transformers loads a model with them, but does not save it.

    Older models have them, such as a temperature without `do_sample`. A run would end with them after its training,
    without a model. The default behavior of `generate` stays the same.

    Args:
        model: just loaded; changed in place.
        whose: its name in messages, such as `model 'name'`.

    Raises:
        InputError: when the settings cannot be saved even so.
    """
    config = getattr(model, "generation_config", None)
    if config is None or _fault(config) is None:
        return
    idle = [*(() if config.do_sample is True else SAMPLING), *(BEAMS if config.num_beams in (None, 1) else ())]
    names = [name for name in idle if getattr(config, name, None) is not None]
    for name in names:
        setattr(config, name, None)
    if fault := _fault(config):
        raise InputError(f"{whose}: its generation_config.json could not be saved again: {fault}")
    warnings.warn(
        f"{whose}: without effect in its generation_config.json, and left out: {', '.join(names)} (do_sample is "
        f"{config.do_sample}, num_beams {config.num_beams})",
        stacklevel=2,
    )


def _fault(config: "GenerationConfig") -> str | None:
    try:
        config.validate(strict=True)
    except ValueError as error:
        return reason_of(error)
    return None


# ---- vocabulary ----
#
# Whether a model has an embedding for every token of a tokenizer, and embeddings for new tokens.


def check_padding(tokenizer: "PreTrainedTokenizerBase", whose: str = "the") -> None:
    """Refuse a tokenizer without a padding token, which batches need; `whose` begins the complaint."""
    refuse_if(tokenizer.pad_token_id is None, f"{whose} tokenizer has no padding token: set tokenizer.pad_token")


def check_vocabulary(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", name: str | None = None) -> None:
    """Refuse a tokenizer with tokens without an embedding in the model: training would end at the first of them.

    Tokens impossible in texts here, such as the placeholder of an image in a text model (Gemma 3), bring a warning.

    Args:
        name: of the model, for the complaint.
    """
    embeddings = model.get_input_embeddings()
    if embeddings is None or getattr(embeddings, "weight", None) is None:
        return
    # ZeRO-3 keeps a part of the rows per process.
    rows = getattr(embeddings.weight, "ds_shape", embeddings.weight.shape)[0]
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    if not beyond:
        return
    name = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
    sizes = f"the tokenizer has {max(beyond.values()) + 1} tokens and model {name!r} embeddings for {rows}"
    unusable = [token for token in beyond if not _is_special_and_unused(token, tokenizer)]
    if unusable:
        first = min(unusable, key=beyond.__getitem__)
        raise InputError(
            f"{sizes}, none for {first!r}: take the model's own tokenizer, or give it rows for the new ones and save "
            "it (model.resize_token_embeddings(len(tokenizer)))"
        )
    warnings.warn(f"{sizes}: texts must not contain {', '.join(sorted(beyond)[:3])}", stacklevel=2)


def _is_special_and_unused(token: str, tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether a token is a mark unused by padding, ends, beginnings and the chat template."""
    added = tokenizer.added_tokens_decoder.get(tokenizer.convert_tokens_to_ids(token))
    used = (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token)
    is_special = added is not None and added.special
    return is_special and token not in used and token not in str(tokenizer.chat_template or "")


def add_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[str]) -> list[str]:
    """Add tokens to a tokenizer and give the model rows for them; return the new ones.

    A new row is the mean of the rows of the tokens that wrote the same text before, so the model begins with its
    knowledge of that text. Tokens of the form `<|...|>` become special ones; others are ordinary, kept by decoding
    with `skip_special_tokens=True`.

    Raises:
        InputError: under DeepSpeed ZeRO-3, where each process has a part of the rows.
    """
    import torch
    from transformers import AddedToken
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        raise InputError("new tokens cannot be added under DeepSpeed ZeRO-3: add them in one process first")
    new = [token for token in dict.fromkeys(tokens) if token not in tokenizer.get_vocab()]
    pieces = [tokenizer(token, add_special_tokens=False)["input_ids"] for token in new]
    for token in new:
        is_special = re.fullmatch(r"<\|.*\|>", token) is not None
        tokenizer.add_tokens([AddedToken(token, special=is_special, normalized=False)], special_tokens=is_special)
    if not new:
        return new
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    ids = tokenizer.convert_tokens_to_ids(new)
    tables = {id(each.weight): each for each in (model.get_input_embeddings(), model.get_output_embeddings()) if each}
    with torch.no_grad():
        for table in tables.values():
            for row, parts in zip(ids, pieces, strict=True):
                table.weight[row] = table.weight[parts].mean(0)
                if getattr(table, "bias", None) is not None:
                    table.bias[row] = table.bias[parts].mean()
    return new
