"""Convert checkpoints of native transformers classes to hfllm, and back, vision-language models too.

Weights are moved without arithmetic, so a round trip gives the same bits.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.utils import is_gguf_available

from hfllm.durable import whole_folder
from hfllm.errors import InputError, check_choice, check_whole_number, one_line, refuse_if
from hfllm.models.conversion import tensor_layouts
from hfllm.models.conversion.families import FAMILIES, missing_part
from hfllm.models.conversion.family_rows import WIDTHS, Family, irrelevant_fields, plain_rope
from hfllm.models.family.configuration_fields_hfllm import SPARSE_SIZES, has_sparse_sizes, longrope_limits
from hfllm.models.family.configuration_hfllm import HfllmConfig
from hfllm.models.family.configuration_hfllm_vision import HfllmVisionConfig
from hfllm.models.loading.saved import reason_of, refuse_quantized, saved_config, saved_model, scores_tokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import LlavaConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    from hfllm.models.family.modeling_hfllm import HfllmForCausalLM


# ---- conversion ----


HEADS = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "Model": "AutoModel",
    "ForConditionalGeneration": "AutoModelForImageTextToText",
}
# The name of the inner model in our models with a head.
TRUNK = "model"
# Arguments of `push_to_hub`, also accepted by `save_pretrained`.
UPLOADING = ("repo_id", "token", "private", "revision", "create_pr", "commit_message", "commit_description")
# The way a model computes, not its results: read from the native model, and so from ours too.
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
        The model with the head named by the checkpoint's `architectures`, or without one if it names the trunk; a
        causal language model if it names nothing.

    Raises:
        InputError: for an unsupported family or field, or a broken or quantized checkpoint; it is
            named.
    """
    name = os.fspath(path_or_id)
    kwargs |= {"revision": revision, **({"gguf_file": gguf_file} if gguf_file else {})}
    # Unsupported models are refused before the weights are read.
    settings = read_config(name, **_location(kwargs))
    if settings.model_type == "llava":
        return _seeing_from_native(name, settings, kwargs)
    config_from_native(settings)
    native = load_checked(name, **kwargs)
    # Of the model, since arguments of `from_pretrained` may change fields.
    config = config_from_native(native.config)
    if scores_tokens(native):
        config.classifier_dropout = native.dropout.p
    state = tensor_layouts.to_ours(_whole(native), _rules(native.config.model_type, native, config))
    if _is_trunk(native):
        state = tensor_layouts.without_prefix(state, TRUNK)
    model_class = _auto_class(native.config)._model_mapping[HfllmConfig]
    model = _build(model_class, config, state, **{key: kwargs[key] for key in ASKED_OF_BOTH if key in kwargs})
    if native.can_generate():
        model.generation_config = native.generation_config
    return model


def in_family(native: "PreTrainedModel", config: HfllmConfig | None = None) -> "HfllmForCausalLM":
    """Return the same causal language model as one of the family, for inference; no file is written or read.

    Where a conversion only renames or splits tensors, the weights are the native model's own memory, and a change
    there is one here. Where it transposes or sorts them, as GPT-2's projections, they are copies.

    Args:
        native: of transformers' own class. Embeddings and head must be tied if its config says so.
        config: what `config_from_native` makes of its config, if that is known already.

    Raises:
        InputError: for an unsupported family or field, or tensors that do not fit; they are named.
    """
    from accelerate import init_empty_weights

    from hfllm.models.family.modeling_hfllm import HfllmForCausalLM

    name = type(native).__name__
    config = deepcopy(config) if config is not None else config_from_native(native.config)
    refuse_if(not ties_as_configured(native), f"{name}: its head and embeddings are not tied as its config says")
    config.dtype = native.dtype
    config._attn_implementation = native.config._attn_implementation
    config._experts_implementation = native.config._experts_implementation
    state = tensor_layouts.to_ours(_whole(native), _rules(native.config.model_type, native, config))
    # Buffers are real: the angles of rotations are in no state dict.
    with init_empty_weights(include_buffers=False):
        model = HfllmForCausalLM(config)
    expected = model.state_dict()
    report = {"missing_keys": expected.keys() - state.keys(), "unexpected_keys": state.keys() - expected.keys()}
    shared = expected.keys() & state.keys()
    _check_report(name, report | {"mismatched_keys": {at for at in shared if expected[at].shape != state[at].shape}})
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    _share_angles(native, model)
    return model.eval().requires_grad_(False)


def ties_as_configured(native: "PreTrainedModel") -> bool:
    """Return whether head and embeddings are one tensor if the config says so."""
    head, embeddings = native.get_output_embeddings(), native.get_input_embeddings()
    return not native.config.tie_word_embeddings or head is None or head.weight is embeddings.weight


def _share_angles(native: "PreTrainedModel", model: "HfllmForCausalLM") -> None:
    """Take over rotary frequencies, which casting a whole native model to another type has rounded."""
    rotary = getattr(model.model, "rotary_emb", None)
    theirs = [each for each in native.modules() if getattr(each, "original_inv_freq", None) is not None]
    own = getattr(rotary, "original_inv_freq", None)
    if own is not None and len(theirs) == 1 and theirs[0].original_inv_freq.shape == own.shape:
        # The frequencies of a new model: those of type `dynamic` follow the text.
        rotary.inv_freq = rotary.original_inv_freq = theirs[0].original_inv_freq


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
        path: a new or empty folder. It appears whole or not at all.
        native_type: the native family, such as `"llama"`; `None` takes the first one able to express the model.
        tokenizer: written next to the weights.
        kwargs: further arguments of `save_pretrained`, such as `max_shard_size`. With `push_to_hub=True` the written
            files are uploaded in one commit, to `repo_id`, by default the folder's name.

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
    name = type(model).__name__
    refuse_if(not isinstance(model.config, HfllmConfig), f"expected an hfllm model, got a {name}")
    refuse_quantized(model.config, model.config.name_or_path)
    suffix = name.removeprefix("Hfllm")
    refuse_if(suffix not in HEADS, f"a {name} has no native counterpart; these have: {', '.join(HEADS)}")
    native_config = config_to_native(model.config, native_type, HEADS[suffix])
    native_class = getattr(transformers, HEADS[suffix])._model_mapping[type(native_config)]
    if scores_tokens(model):
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
    # Its tensors come from no file, so transformers would give files the names of modules, unknown to other
    # programs where experts or hybrids have others. Now they have the names from a new model of the native class.
    native._weight_conversions = None
    saving = {name: value for name, value in kwargs.items() if name not in ("push_to_hub", *UPLOADING)}
    with whole_folder(target) as folder:
        native.save_pretrained(folder, **saving)
        if tokenizer is not None:
            # For a vision-language model it may be a processor.
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
    """Upload the written files in one commit. The arguments are as in `push_to_hub`."""
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
    model_kwargs = {key: kwargs[key] for key in ASKED_OF_BOTH if key in kwargs}
    model = _build(model_class, config, joined_state(media, state, TRUNK), **model_kwargs)
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
    """Name the general tokenizer as transformers 4 does, still used by other engines; release 5 knows both names."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_empty(path: Path) -> None:
    """Refuse a path other than a new or an empty folder. Hidden files, such as a run's lock, do not count.

    Raises:
        InputError: when it exists and is not an empty folder.
    """
    if path.exists() and (not path.is_dir() or any(not each.name.startswith(".") for each in path.iterdir())):
        raise InputError(f"{path} exists and is not empty")


def read_config(name: str, **location: object) -> "PreTrainedConfig":
    """Load the config of a local folder or Hub id."""
    if "gguf_file" in location and not is_gguf_available():
        raise InputError(f"gguf_file {location['gguf_file']!r} needs gguf: pip install 'gguf>=0.10'")
    try:
        config = saved_config(name, **location)
    except (OSError, *BAD_CONFIG) as error:
        raise InputError(f"{name}: {reason_of(error, 400)}") from error
    refuse_quantized(config, name)
    return config


def load_checked(name: str, **kwargs: object) -> "PreTrainedModel":
    """Load the model of a local folder or Hub id, in its own precision and with the head named by its config.

    A mismatch between checkpoint and config is an error here, not a warning.

    Args:
        kwargs: arguments of `from_pretrained`.

    Raises:
        InputError: for missing or unexpected tensors, wrong shapes, or unreadable files.
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
        raise InputError(f"{name}: cannot load the weights: {reason_of(error, 400)}") from error
    _check_report(name, report)
    return model


def _location(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for locating a checkpoint."""
    names = ("revision", "gguf_file", "token", "cache_dir", "subfolder", "local_files_only", "force_download")
    return {name: kwargs[name] for name in names if name in kwargs}


def _is_trunk(model: "PreTrainedModel") -> bool:
    """Return whether a model has no head."""
    # Llama 4's class with a head calls its trunk by another name than its prefix.
    return model.base_model is model and model.get_output_embeddings() is None


def _whole(model: "PreTrainedModel") -> dict[str, "torch.Tensor"]:
    """Return a model's tensors; the tensors of a trunk are named as inside a model with a head."""
    state = model.state_dict()
    return tensor_layouts.with_prefix(state, model.base_model_prefix) if _is_trunk(model) else state


def _rules(model_type: str, model: "PreTrainedModel", config: HfllmConfig) -> Iterator[tensor_layouts.Rule]:
    family = FAMILIES[model_type]
    yield from family.rules(config)
    if scores_tokens(model):
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
            examples = ", ".join(str(key) for key in sorted(keys, key=str)[:3])
            raise InputError(f"{name}: {len(keys)} {problem}: {examples}{', ...' if len(keys) > 3 else ''}")


def _auto_class(config: "PreTrainedConfig") -> "type[_BaseAutoModelClass]":
    architecture = (config.architectures or ["ForCausalLM"])[0]
    for suffix, name in HEADS.items():
        # Of a trunk the whole name: GPT2DoubleHeadsModel is none.
        trunk = transformers.AutoModel._model_mapping[type(config)].__name__ if suffix == "Model" else None
        if architecture.endswith(suffix) and trunk in (None, architecture):
            return getattr(transformers, name)
    raise InputError(f"a {architecture} has no counterpart; these have: {', '.join(HEADS)}")


# ---- native families ----
#
# Configs of native transformers architectures as configs of hfllm, and back.
#
# Whether a config can be expressed on the other side is tested by converting it there and back: a field changed
# by this is named and refused.


# Exceptions of configs refusing a value; a missing key is a RoPE parameter.
BAD_CONFIG = (ValueError, KeyError, StrictDataclassError)
# These change training or storage, not the results of a loaded model, so losing them is accepted.
HARMLESS_OURS = {
    *("initializer_range", "residual_init", "use_cache", "loss_chunk_size", "attention_dropout", "hidden_dropout"),
    *("router_aux_loss_coef", "output_router_logits", "pad_token_id", "bos_token_id", "eos_token_id"),
    *("classifier_dropout", "router_bias_update_rate"),
}
HARMLESS_THEIRS = {
    *("initializer_range", "use_cache", "attention_dropout", "hidden_dropout", "classifier_dropout", "attn_pdrop"),
    *("resid_pdrop", "embd_pdrop", "residual_dropout", "embedding_dropout", "router_aux_loss_coef"),
    *("output_router_logits", "router_jitter_noise", "pad_token_id", "bos_token_id", "eos_token_id"),
    *("pretraining_tp", "reorder_and_upcast_attn", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"),
    *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
    # Read in full, and written in one of several equivalent ways.
    *("is_decoder", "head_dim", "n_inner", "max_window_layers", "sliding_window", "use_sliding_window"),
    *("layer_types", "num_ln_in_parallel_attn", "num_kv_heads", "multi_query", "parallel_attn"),
}
# Sizes in every config.json, with their largest plausible values.
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
LARGEST, MAX_LAYERS = 10**9, 10**5
# A value in a message is cut at this many characters.
LONGEST_VALUE = 80


def config_from_native(native: "PreTrainedConfig") -> HfllmConfig:
    """Convert a native config to ours.

    Raises:
        InputError: when the family is unknown, with its unsupported part if known; or when one of its
            fields has no counterpart; it is named.
    """
    kind = native.model_type
    family = FAMILIES.get(kind)
    if family is None:
        why = missing_part(kind)
        raise InputError(f"model_type {kind!r} cannot be converted{why}; these can: {', '.join(FAMILIES)}")
    try:
        config = family.ours(native)
        back = family.theirs(config, type(native))
    except BAD_CONFIG as error:
        raise InputError(f"{kind}: {one_line(error, None)}") from error
    for name in sorted(_fields(native) - HARMLESS_THEIRS - family.idle):
        for lost in _differences(name, getattr(native, name), getattr(back, name)):
            unfit = f"{lost.name}={lost.value}"
            raise InputError(f"{kind} with {unfit} has no place in HfllmConfig, only {lost.other} has")
    _copy_labels(native, config)
    return config


def fields_from_native(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return our fields for the model of a config.json of another architecture, for counting its parameters.

    Args:
        values: its content. Missing values are the defaults of transformers' class, except for the four sizes of every
            model.

    Raises:
        InputError: when the family cannot be converted, a size is missing or is none, or a field has no counterpart.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise InputError(f"model_type {kind!r} is not one of hfllm, {', '.join(FAMILIES)}{missing_part(kind)}")
    native_class = transformers.CONFIG_MAPPING[kind]
    for name in SIZES:
        theirs = native_class.attribute_map.get(name, name)
        result = name if values.get(name) is not None else theirs
        refuse_if(values.get(result) is None, f"{theirs} is missing")
        check_whole_number(result, values[result], 1, LARGEST)
        if name == "num_hidden_layers" and values[result] > MAX_LAYERS:
            # The native classes make lists of them.
            raise InputError(f"{result}={values[result]} must be at most {MAX_LAYERS:,}")
    try:
        config = config_from_native(native_class.from_dict(deepcopy(dict(values))))
    except InputError:
        raise
    except (*BAD_CONFIG, TypeError, AttributeError, ArithmeticError) as error:
        raise InputError(f"{kind}: {one_line(error, None)}") from error
    fields = _fields(config) | {"tie_word_embeddings"}
    return {name: value for name, value in config.to_dict().items() if name in fields}


def config_to_native(
    config: HfllmConfig, native_type: str | None = None, auto_class: str = "AutoModelForCausalLM"
) -> "PreTrainedConfig":
    """Return the equivalent native config: of `native_type`, or of the first family able to express it.

    Args:
        auto_class: of the head, required of the family.

    Raises:
        InputError: when none can; the fields without a counterpart are named, with their value
            there.
    """
    if native_type is not None:
        check_choice(f"native type {native_type!r} is not one of", native_type, FAMILIES)
    if has_sparse_sizes(config) and config._attn_implementation in (None, "sparse"):
        sizes = ", ".join(f"{name}={getattr(config, name, None)}" for name in SPARSE_SIZES)
        raise InputError(
            f"no native class has sparse attention ({sizes}): load the model with attn_implementation='sdpa' to write "
            "it as one of full attention"
        )
    reasons: dict[str, list[str]] = {}
    for name in [native_type] if native_type else FAMILIES:
        try:
            native, lost = _native_and_lost(config, FAMILIES[name], name)
        except BAD_CONFIG as error:
            # Values refused by the native class itself, such as a width not divisible by its heads.
            if native_type:
                raise InputError(f"{name} refuses this model: {one_line(error, None)}") from error
            continue
        reasons[name] = [f"{each.name}={each.value} (it has {each.other})" for each in lost]
        if type(native) not in getattr(transformers, auto_class)._model_mapping:
            reasons[name].append(f"the head of {auto_class}")
        if not reasons[name]:
            _copy_labels(config, native)
            return native
    refuse_if(not reasons, f"no native class takes this model's sizes; the classes are {', '.join(FAMILIES)}")
    nearest = min(reasons, key=lambda name: len(reasons[name]))
    subject = (
        f"{nearest} has" if native_type else f"no native class can express this model; the nearest, {nearest}, has"
    )
    raise InputError(f"{subject} no place for {', '.join(reasons[nearest])}")


@dataclasses.dataclass(frozen=True)
class _Lost:
    """A field whose `value` came back as `other`, both as text."""

    name: str
    value: str
    other: str


def _native_and_lost(config: HfllmConfig, family: Family, native_type: str) -> "tuple[PreTrainedConfig, list[_Lost]]":
    """Return the native config, and our fields lost in it."""
    native = family.theirs(config, transformers.CONFIG_MAPPING[native_type])
    back = family.ours(native)
    irrelevant = set(HARMLESS_OURS)
    if config.norm_type == "rmsnorm":
        irrelevant.add("norm_bias")
    if "linear_attention" not in config.layer_types:
        irrelevant |= {name for name in _fields(config) if name.startswith("linear_")}
    if not config.qk_norm:
        irrelevant.add("qk_norm_scope")
    if not config.parallel_block:
        irrelevant.add("shared_norm")
    irrelevant |= irrelevant_fields(config)
    if len({*config.layer_types, *back.layer_types}) > 1 and len(set(config.layer_types)) == 1:
        # The window says so already.
        irrelevant.add("layer_types")
    names = sorted(_fields(config) - irrelevant)
    return native, [
        lost for name in names for lost in _differences(name, _meaning_of(config, name), _meaning_of(back, name))
    ]


def _meaning_of(config: HfllmConfig, name: str) -> object:
    """Return the value of our field, or its meaning where several values mean the same."""
    return WIDTHS[name](config) if name in WIDTHS else getattr(config, name)


def _differences(name: str, one: object, other: object) -> list[_Lost]:
    """Return where two values of a field differ: of a dictionary, the differing entries."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        one, other = plain_rope(one), plain_rope(other)
        keys = [key for key in sorted({*one, *other}) if one.get(key) != other.get(key)]
        return [_Lost(f"{name}.{key}", _shortened(one.get(key)), _shortened(other.get(key))) for key in keys]
    return [] if one == other else [_Lost(name, _shortened(one), _shortened(other))]


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def _fields(config: "PreTrainedConfig") -> set[str]:
    """Return the names of a config's own fields, without fields of every config and without class variables."""
    every = set(transformers.PreTrainedConfig().to_dict())
    return {field.name for field in dataclasses.fields(config) if not field.name.startswith("_")} - every


def _copy_labels(source: "PreTrainedConfig", target: "PreTrainedConfig") -> None:
    for name in ("id2label", "label2id"):
        if getattr(source, name) is not None:
            setattr(target, name, dict(getattr(source, name)))
    target.problem_type = source.problem_type


# ---- vision conversion ----
#
# Convert models with a vision tower between Llava's class around a native decoder and ours around an hfllm one.
#
# The tower and the projector are the same modules in both; the decoder and the head are converted like a text model.


VISION_TRUNK, DECODER = "model.", "model.language_model."
# Parts of a text model's head or embeddings not computed by Llava's class, with their neutral values.
LEFT_OUT = {"logit_scale": 1, "final_logit_softcapping": None, "lm_head_bias": False, "embedding_multiplier": 1}
# Of the composed configs, in addition to their parts.
SHARED = (
    *("image_token_index", "image_seq_length", "projector_hidden_act", "vision_feature_select_strategy"),
    *("vision_feature_layer", "multimodal_projector_bias", "tie_word_embeddings"),
)


def vision_config_from_native(native: "LlavaConfig") -> HfllmVisionConfig:
    """Return our config of a model of Llava's class.

    Raises:
        InputError: when its text model cannot be converted; the field is named.
    """
    shared = {name: getattr(native, name) for name in SHARED}
    text = config_from_native(native.text_config)
    _refuse_left_out(text)
    return HfllmVisionConfig(vision_config=native.vision_config, text_config=text, **shared)


def vision_config_to_native(config: HfllmVisionConfig, native_type: str | None = None) -> "LlavaConfig":
    """Return Llava's config of our model, with a text model of `native_type` or of the first suitable family.

    Raises:
        InputError: when none is suitable, or Llava's class leaves out a step of its head; the field is named.
    """
    from transformers import LlavaConfig

    _refuse_left_out(config.text_config)
    shared = {name: getattr(config, name) for name in SHARED}
    text = config_to_native(config.text_config, native_type)
    refuse_other_table(text, "Llava's class")
    return LlavaConfig(vision_config=config.vision_config, text_config=text, **shared)


def refuse_other_table(config: "PreTrainedConfig", layout: str) -> None:
    """Refuse a native text model whose head is tied to embeddings not found by composed classes.

    They tie the head to `embed_tokens`, whatever the text model calls its table, and fail if its name is `wte`.

    Args:
        config: of the text model.
        layout: for the message.
    """
    from transformers import AutoModelForCausalLM

    if not config.tie_word_embeddings or type(config) not in AutoModelForCausalLM._model_mapping:
        return
    tables = (AutoModelForCausalLM._model_mapping[type(config)]._tied_weights_keys or {}).values()
    if not all(name.endswith("embed_tokens.weight") for name in tables):
        raise InputError(
            f"{layout} cannot hold a text model of type {config.model_type!r} with tie_word_embeddings=True: it ties "
            "the head to a module named embed_tokens"
        )


def split_state(state: Mapping[str, "Tensor"], prefix: str) -> tuple[dict[str, "Tensor"], dict[str, "Tensor"]]:
    """Return the tensors of tower, projector and text model, the last named as in a text model of its own.

    Args:
        prefix: the text model's name for its trunk.
    """
    media = {
        name: tensor
        for name, tensor in state.items()
        if name.startswith(VISION_TRUNK) and not name.startswith(DECODER)
    }
    text = {name: tensor for name, tensor in state.items() if name not in media}
    return media, {name.replace(DECODER, f"{prefix}.", 1): tensor for name, tensor in text.items()}


def joined_state(media: Mapping[str, "Tensor"], text: Mapping[str, "Tensor"], prefix: str) -> dict[str, "Tensor"]:
    """Return the inverse of `split_state`."""
    begin = f"{prefix}."
    moved = {
        f"{DECODER}{name.removeprefix(begin)}" if name.startswith(begin) else name: tensor
        for name, tensor in text.items()
    }
    return {**media, **moved}


def _refuse_left_out(config: "PreTrainedConfig") -> None:
    for field, plain in LEFT_OUT.items():
        if (value := getattr(config, field)) != plain:
            raise InputError(f"Llava's class leaves out {field}={value} of its text model")
    if longrope_limits(config):
        raise InputError("Llava's class generates with keys of other factors where rope_type='longrope' changes them")
