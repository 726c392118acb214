"""Load configs, tokenizers and models of transformers without running code or kernels that a model brings along.

Without `trust_remote_code` transformers asks on standard input whether to run a folder's code, and `yes |` answers.
Here that is always said, and only a recipe's `--trust_remote_code` says yes. All of the package loads by this file.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError

from hfllm.errors import InputError
from hfllm.models.probes import check_tokenizer
from hfllm.models.stored import location_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

TRUST_FLAG = "--trust_remote_code"
# Fields of a config that may name a kernel of the Hub, and what is none.
CHOICES = {
    "attn_implementation": ("eager", "sdpa", "flex_attention"),
    "experts_implementation": ("eager", "batched_mm", "grouped_mm"),
}

_is_trusted = False


def trusts_remote_code() -> bool:
    """Return whether the recipe that runs was told to trust the code of the models that it loads."""
    return _is_trusted


@contextmanager
def trusting_remote_code(is_trusted: bool) -> Iterator[None]:
    """Context manager in which code of models is run, if `is_trusted`, or if it is trusted already."""
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
            # What transformers' own classes do with a value of another type than theirs.
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
        InputError: when the config names kernels of the Hub that are not trusted, or an index of weights files that
            are elsewhere.
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

    transformers downloads and runs what a config names there. What the user names by a flag is the user's choice.

    Args:
        kwargs: arguments of `from_pretrained`; an `attn_implementation` among them wins over the config's.

    Raises:
        InputError: naming the field and the kernel.
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
    """Refuse a local model with a damaged file of settings that is empty, or JSON still, but no object.

    transformers ends in errors of its own with these, or goes without; what begins as an object it reports itself.

    Raises:
        InputError: naming the file.
    """
    for file in files:
        path = Path(name, file)
        if path.is_file():
            with path.open("rb") as stream:
                beginning = stream.read(64).lstrip()
            if not beginning.startswith(b"{"):
                raise InputError(f"model {name!r}: {file} is damaged: it holds no JSON object")


def check_index(name: str) -> None:
    """Refuse a local model whose index of weights names files outside of its folder.

    Raises:
        InputError: naming the index and the file.
    """
    for index in sorted(Path(name).glob("*.index.json")) if Path(name).is_dir() else []:
        try:
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError):
            # Loading will report it, if it is read at all.
            continue
        if outside := next(filter(is_outside, sorted(map(str, files))), None):
            raise InputError(f"model {name!r}: {index.name} names {outside!r}, which is not in its folder")


@contextmanager
def _named_settings(name: str) -> Iterator[None]:
    """Context manager that names the model whose settings transformers, or Python's JSON, cannot take.

    Raises:
        InputError: for a field of another type or a value that means nothing, and for JSON deeper than the stack.
    """
    try:
        yield
    except RecursionError as error:
        if "JSON" not in str(error):
            raise
        raise InputError(f"model {name!r}: one of its JSON files is damaged: it is nested too deeply") from None
    except (AttributeError, StrictDataclassError) as error:
        # Of a dtype, transformers takes what torch has of that name.
        if isinstance(error, AttributeError) and "module 'torch'" not in str(error):
            raise
        raise InputError(f"model {name!r} could not be loaded: {reason_of(error)}") from None


def is_outside(file: str) -> bool:
    """Return whether a relative name of a file leads out of the folder that it is relative to."""
    return file.startswith(("/", "\\")) or ":" in file or ".." in file.replace("\\", "/").split("/")


def reason_of(error: Exception, most: int = 200) -> str:
    """Return why something could not be loaded, in one line; for code that is not trusted, the flag that trusts it."""
    text = " ".join(str(error).split())
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
    """Return arguments of `from_pretrained` that say whether code is trusted; they may say so themselves."""
    given = kwargs.get("trust_remote_code")
    return {**kwargs, "trust_remote_code": _is_trusted if given is None else bool(given)}


def _base_of(name: str, location: Mapping[str, Any]) -> str:
    """Return the name of an adapter's base, else `name`."""
    from transformers.utils import find_adapter_config_file

    if Path(name, "config.json").is_file():
        return name
    found = find_adapter_config_file(name, **location)
    return name if found is None else json.loads(Path(found).read_text(encoding="utf-8"))["base_model_name_or_path"]


def _named_kernels(settings: object) -> Iterator[tuple[str, str]]:
    """Yield field and value of the kernels that a config, or one in it, names."""
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
    """Return the implementations that a field names: one, or one for each part of a model."""
    if isinstance(value, Mapping):
        return [name for each in value.values() for name in _names(each)]
    return [] if value is None else [str(value)]


def is_kernel(field: str, name: str) -> bool:
    """Return whether an implementation of attention or of experts is downloaded from the Hub.

    Args:
        field: `attn_implementation` or `experts_implementation`.
        name: what it is set to, such as `sdpa`, `flash_attention_2` or `owner/kernel`.
    """
    if "/" in name or field == "experts_implementation":
        return name not in CHOICES[field]
    from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX as FLASH

    # Where flash attention is not installed, a kernel stands in for it.
    version = name.removeprefix("paged|").removeprefix("flash_attention_")
    is_flash = version.isdecimal() and int(version) in FLASH
    return is_flash and not FLASH[int(version)]["general_availability_check"]()
