"""Saved PEFT adapters and scorers: find one and its base, put it on the base, and merge it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import find_adapter_config_file

from hfllm.errors import InputError, one_line, refuse_if
from hfllm.models.loading.saved import (
    is_for_pictures,
    location_of,
    quantization_method,
    reason_of,
    refuse_quantized,
    saved_config,
)
from hfllm.models.loading.weights import cast_weights, load_weights_of

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from transformers.models.auto.auto_factory import _BaseAutoModelClass


# ---- saved adapters ----


# The name of the base's folder in a recipe that trains a new adapter on a merged one.
BASE_FOLDER = "base"
# The auto classes of the tasks of adapters; an adapter without a named task belongs to a language model.
AUTO_CLASSES = {
    None: "AutoModelForCausalLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
HEADS = ("score", "classifier", "qa_outputs")


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter in a folder or a repository of the Hub.

    Args:
        name: the folder or the Hub id.
        settings: its adapter_config.json.
        location: arguments of `from_pretrained` for locating it, such as `revision`.
    """

    name: str
    settings: Mapping[str, Any]
    location: Mapping[str, Any]

    @cached_property
    def base(self) -> str:
        """The name of its base model; a base written by a recipe into the run's folder may have moved with it."""
        named = self.settings.get("base_model_name_or_path")
        if not named:
            raise InputError(
                f"adapter {self.name!r} names no base model: give it base_model_name_or_path in adapter_config.json"
            )
        if Path(named).name == BASE_FOLDER and not Path(named).is_dir():
            run = Path(self.name).parent if Path(self.name).name.startswith("checkpoint-") else Path(self.name)
            if (run / BASE_FOLDER / "config.json").is_file():
                return str(run / BASE_FOLDER)
        return named

    @cached_property
    def folder(self) -> str:
        """The local folder of its files: of a Hub id, where they are downloaded to."""
        from transformers.utils import cached_file

        try:
            for name in WEIGHT_FILES:
                result = cached_file(self.name, name, _raise_exceptions_for_missing_entries=False, **self.location)
                if result is not None:
                    return str(Path(result).parent)
        except OSError as error:
            raise InputError(f"adapter {self.name!r}: its weights cannot be read: {one_line(error)}") from error
        raise InputError(f"adapter {self.name!r} has no {' or '.join(WEIGHT_FILES)}")

    @property
    def base_location(self) -> dict[str, Any]:
        """The arguments of `from_pretrained` for locating the base: its revision is its own."""
        location = {name: value for name, value in self.location.items() if name not in ("revision", "subfolder")}
        revision = self.settings.get("revision")
        return {**location, **({"revision": revision} if revision else {})}

    @property
    def task(self) -> str | None:
        """The task of the adapter, such as CAUSAL_LM or SEQ_CLS."""
        return self.settings.get("task_type")

    @cached_property
    def brings_head(self) -> bool:
        """Whether a trained head for scores is among its weights."""
        return any(part in HEADS for name in self.weights() for part in name.split("."))

    def check(self, *tasks: str) -> None:
        """Refuse an adapter of another task, or of a kind outside the weights.

        Args:
            tasks: accepted ones; by default all.
        """
        if tasks and self.task not in (None, *tasks):
            raise InputError(f"adapter {self.name!r} is for the task {self.task}; expected {' or '.join(tasks)}")
        if self.config().is_prompt_learning:
            kind = str(self.settings.get("peft_type"))
            raise InputError(
                f"adapter {self.name!r} is of the kind {kind}, which adds tokens and changes no weights: it can be "
                "neither merged nor trained further here; LoRA, DoRA, IA3 and others that change weights can"
            )

    def config(self) -> "PeftConfig":
        """Return its settings as PEFT reads them.

        Raises:
            InputError: when PEFT does not know them.
        """
        from peft import PeftConfig

        try:
            return PeftConfig.from_pretrained(self.folder)
        except (KeyError, OSError, TypeError, ValueError) as error:
            raise InputError(f"adapter {self.name!r}: its settings cannot be read: {one_line(error)}") from error

    def weights(self) -> "dict[str, torch.Tensor]":
        """Return its weights, by their names in the file.

        Raises:
            InputError: when there are none, or the file cannot be read.
        """
        from peft.utils import load_peft_weights
        from safetensors import SafetensorError

        try:
            return load_peft_weights(self.folder, device="cpu")
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"adapter {self.name!r}: its weights cannot be read: {one_line(error)}") from error

    def base_config(self) -> PreTrainedConfig:
        """Return the config of its base model."""
        try:
            return saved_config(self.base, **self.base_location)
        except (OSError, ValueError) as error:
            raise self.unloadable(error) from error

    def stays_apart(self, **kwargs: object) -> bool:
        """Return whether its base is quantized, as saved or while loading by these arguments of `from_pretrained`."""
        return bool(kwargs.get("quantization_config")) or quantization_method(self.base_config()) is not None

    def unloadable(self, error: Exception) -> InputError:
        """Return the complaint about a base that could not be loaded."""
        return InputError(
            f"adapter {self.name!r} is one of the model {self.base!r}, which could not be loaded "
            f"({reason_of(error)}): if that has moved, write where it is into base_model_name_or_path "
            "of the adapter's adapter_config.json"
        )


def find_adapter(name: str, **location: object) -> SavedAdapter | None:
    """Return the adapter called `name`; `None` for a whole model, or where there is nothing.

    Args:
        location: where `name` is, as `from_pretrained` takes it.
    """
    from transformers.utils import find_adapter_config_file

    try:
        result = find_adapter_config_file(name, **location)
    except OSError:
        return None
    # A folder with both configs is a whole model.
    if result is None or Path(name, "config.json").exists():
        return None
    try:
        settings = json.loads(Path(result).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"adapter {name!r}: adapter_config.json is not JSON: {error}") from None
    refuse_if(not isinstance(settings, dict), f"adapter {name!r}: adapter_config.json is no JSON object")
    return SavedAdapter(name, settings, location_of(location))


# ---- the base ----


def auto_class_of(adapter: SavedAdapter) -> "type[_BaseAutoModelClass]":
    """Return the auto class of an adapter's model.

    Raises:
        InputError: for a task without a recipe.
    """
    import transformers

    adapter.check(*(task for task in AUTO_CLASSES if task))
    if adapter.task in (None, "CAUSAL_LM") and is_for_pictures(adapter.base_config()):
        return transformers.AutoModelForImageTextToText
    return getattr(transformers, AUTO_CLASSES[adapter.task])


def load_base(
    adapter: SavedAdapter, auto_class: "type[_BaseAutoModelClass]", **kwargs: object
) -> tuple[PreTrainedModel, bool]:
    """Load an adapter's base model, with as many embeddings as the adapter was saved with.

    Args:
        kwargs: arguments of `from_pretrained`, except for the location of the model.

    Returns:
        The model, and whether it has a new head for scores, also absent from the adapter.
    """
    kwargs = {name: value for name, value in kwargs.items() if name not in location_of(kwargs)}
    weights = adapter.weights()
    try:
        model, info = load_weights_of(auto_class, adapter.base, **adapter.base_location, **kwargs)
    except InputError as error:
        # Its base may have moved.
        if isinstance(error.__cause__, OSError):
            raise adapter.unloadable(error.__cause__) from error
        raise
    if info["mismatched_keys"] and not adapter.brings_head:
        key, saved, _ = sorted(info["mismatched_keys"])[0]
        raise InputError(f"model {adapter.base!r}: {key} is of the shape {tuple(saved)}; expected one label")
    is_new = any(not key.startswith(f"{model.base_model_prefix}.") for key in info["missing_keys"])
    for path in embeddings_of(model):
        rows = [value.shape[0] for key, value in weights.items() if _is_whole(key, path)]
        if rows and rows[0] != model.get_submodule(path).weight.shape[0]:
            model.resize_token_embeddings(rows[0], mean_resizing=False)
    return model, is_new and not adapter.brings_head


def load_apart(
    adapter: SavedAdapter, auto_class: "type[_BaseAutoModelClass]", **kwargs: object
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load an adapter on its quantized base as transformers does, with all of the base's weights.

    Returns:
        The model, and transformers' report of loading the adapter.

    Raises:
        InputError: when the base cannot be loaded or is not whole.
    """
    model, _ = load_base(adapter, auto_class, **kwargs)
    report = model.load_adapter(adapter.folder)
    return model, report.to_dict()


def embeddings_of(model: PreTrainedModel) -> list[str]:
    """Return the names of a model's input and output embeddings."""
    parts = [part for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None]
    return [name for name, module in model.named_modules() if any(module is part for part in parts)]


# ---- the adapter on it ----


def put_on(model: PreTrainedModel, adapter: SavedAdapter, is_trainable: bool = False) -> "PeftModel":
    """Put a saved adapter on its base model.

    Raises:
        InputError: when it does not fit: weights of another shape, some without a matching module, or some missing.
    """
    from peft import PeftModel

    paths = embeddings_of(model)
    try:
        adapted = PeftModel.from_pretrained(model, adapter.folder, is_trainable=is_trainable)
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        raise _misfit(adapter, _mismatch(error)) from error
    check_names(adapter, adapted, adapter.weights(), paths)
    # Where it was found; files saved from here on name this place.
    adapted.peft_config[adapted.active_adapter].base_model_name_or_path = adapter.base
    return adapted


def put_under_head(model: PreTrainedModel, adapter: SavedAdapter, task_type: str = "SEQ_CLS") -> "PeftModel":
    """Put a language model's adapter on the same model with a new head, to train both.

    Args:
        task_type: of the head, as PEFT names it.

    Raises:
        InputError: when it does not fit, see `put_on`.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    config, whole = adapter.config(), "base_model.model."
    trunk, paths = f"{whole}{model.base_model_prefix}.", embeddings_of(model)
    config.task_type, config.inference_mode, config.base_model_name_or_path = task_type, False, adapter.base
    # Its effect on the head for words ends here.
    if config.modules_to_save:
        names = dict(model.named_modules())
        config.modules_to_save = [
            each for each in config.modules_to_save if any(f".{name}".endswith(f".{each}") for name in names)
        ] or None
    weights = {key: value for key, value in adapter.weights().items() if key.startswith(trunk) or whole not in key}
    try:
        adapted = get_peft_model(model, config)
        config.base_model_name_or_path = adapter.base
        own = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        # PEFT wants the head too: its new weights stay.
        head = {key: value for key, value in own.items() if whole in key and not key.startswith(trunk)}
        set_peft_model_state_dict(adapted, {**head, **weights})
    except (KeyError, RuntimeError, ValueError) as error:
        raise _misfit(adapter, _mismatch(error)) from error
    check_names(adapter, adapted, weights, paths, has_new_head=True)
    return adapted


def check_names(
    adapter: SavedAdapter,
    adapted: "PeftModel",
    saved: Iterable[str],
    embeddings: Sequence[str],
    has_new_head: bool = False,
) -> None:
    """Refuse weights of an adapter without a module in the model, and modules without weights.

    PEFT drops the first without a word.

    Args:
        saved: the names of its weights.
        embeddings: the names of the base's embeddings, which may be saved whole next to an adapter.
        has_new_head: whether a head for scores was put on the model, absent from the adapter.
    """
    from peft import get_peft_model_state_dict

    own = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    brought, indices = (
        {key for key in keys if not any(_is_whole(key, path) for path in embeddings)} for keys in (saved, own)
    )
    if has_new_head:
        indices = {key for key in indices if not set(key.split(".")) & set(HEADS)}
    for left, what in ((brought - indices, "has no place"), (indices - brought, "is missing")):
        if left:
            raise _misfit(adapter, f"{min(left)} {what}")


def _is_whole(key: str, path: str) -> bool:
    """Return whether a weight of an adapter belongs to a whole module, and is not an added one."""
    return key.endswith((f".{path}.weight", f".{path}.base_layer.weight"))


def _misfit(adapter: SavedAdapter, reason: str) -> InputError:
    return InputError(f"adapter {adapter.name!r} does not fit its base model {adapter.base!r}: {reason}")


def _mismatch(error: Exception) -> str:
    """Return the line of an error that names the mismatch."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "size mismatch" in line), lines[0] if lines else type(error).__name__)[:300]


# ---- merging ----
#
# Merge saved PEFT adapters into the weights of their base models.


Dtypes = Mapping[str, "torch.dtype"]


def load_to_merge(
    adapter: SavedAdapter, auto_class: "type[_BaseAutoModelClass]", **kwargs: object
) -> tuple["PeftModel", Dtypes, bool]:
    """Load an adapter on its base in single precision, for rounding only once when merging, at the end.

    Args:
        kwargs: arguments of `from_pretrained`.

    Returns:
        The model, the stored precisions of the base's weights, and whether it has a new head.

    Raises:
        InputError: when either cannot be loaded or they do not fit, or the base is quantized.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    adapter.check()
    model, has_new_head = load_base(adapter, auto_class, **{**kwargs, "dtype": "auto"})
    refuse_quantized(model.config, adapter.base)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    _untie(model, adapter)
    # A language model's adapter below a head for scores.
    writes = auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText)
    is_headless = not writes and adapter.task in (None, "CAUSAL_LM")
    put = put_under_head if is_headless and not adapter.brings_head else put_on
    return put(cast_weights(model, torch.float32), adapter), dtypes, has_new_head


def merge(adapted: "PeftModel", dtypes: Dtypes, dtype: "str | torch.dtype | None" = "auto") -> PreTrainedModel:
    """Return the model with the adapter merged into its weights.

    Args:
        adapted: in single precision, from `load_to_merge`; not to be used any more.
        dtypes: the precision of the base's weights.
        dtype: of the result; `auto` is the base's.

    Raises:
        InputError: when this kind of adapter cannot be merged, or the result is not finite.
    """
    import torch

    try:
        model = adapted.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        kind = adapted.peft_config[adapted.active_adapter].peft_type
        raise InputError(f"an adapter of the kind {getattr(kind, 'value', kind)} cannot be merged: {error}") from error
    if hasattr(model, "peft_config"):
        del model.peft_config
    target_dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    stored = next(iter(dtypes.values()))
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(
            dtypes.get(name, stored) if target_dtype in (None, "auto") else target_dtype
        )
    return model.requires_grad_(True)


def load_merged(
    adapter: SavedAdapter,
    auto_class: "type[_BaseAutoModelClass]",
    dtype: "str | torch.dtype | None" = "auto",
    **kwargs: object,
) -> PreTrainedModel:
    """Load an adapter's base with the adapter merged into it. Its `has_new_head` is as in `load_scorer`.

    Raises:
        InputError: see `load_to_merge` and `merge`.
    """
    adapted, dtypes, has_new_head = load_to_merge(adapter, auto_class, **kwargs)
    model = merge(adapted, dtypes, dtype)
    model.has_new_head = has_new_head
    model.name_or_path = model.config._name_or_path = adapter.name
    return model.eval()


def _untie(model: PreTrainedModel, adapter: SavedAdapter) -> None:
    """Give a model with tied embeddings a head of its own if the adapter changes only one of the two.

    Merged into the tied weight, the training of one would change the other as well.
    """
    from torch import nn

    head, inputs = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = head is not None and head.weight is inputs.weight
    paths = embeddings_of(model)
    # PEFT trains single tokens in both at once.
    keys = [key for key in adapter.weights() if ".token_adapter." not in key and "trainable_tokens" not in key]
    is_touched = any(
        f".{path}." in f"{key}." and not key.endswith("base_layer.weight") for path in paths for key in keys
    )
    if not (is_tied and is_touched) or adapter.settings.get("ensure_weight_tying"):
        return
    head.weight = nn.Parameter(head.weight.detach().clone())
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {
        name: other
        for name, other in model.all_tied_weights_keys.items()
        if not any(name == f"{path}.weight" for path in paths)
    }


# ---- scorers ----
#
# Load models with one number per sequence or per token, for rewards and values.


AutoClass = type[AutoModelForSequenceClassification] | type[AutoModelForTokenClassification]


def load_scorer(
    name: str, auto_class: AutoClass = AutoModelForSequenceClassification, **kwargs: object
) -> PreTrainedModel:
    """Load a model with one label. Its `has_new_head` says whether its head is random, as for a language model.

    Args:
        name: name of a model, or of an adapter to merge into its base model; a quantized base keeps it apart.
        kwargs: arguments of `from_pretrained`.

    Raises:
        InputError: when its head has another number of labels.
    """
    # Otherwise a mismatch would raise a long error that does not name the model.
    kwargs = {"num_labels": 1, "ignore_mismatched_sizes": True, **kwargs}
    adapter = find_adapter(name, **location_of(kwargs))
    if adapter is not None and not adapter.stays_apart(**kwargs):
        return load_merged(adapter, auto_class, **kwargs)
    if adapter is None:
        model, info = load_weights_of(auto_class, name, **kwargs)
    else:
        model, info = load_apart(adapter, auto_class, **kwargs)
    for key, saved, _ in sorted(info["mismatched_keys"]):
        raise InputError(f"model {name!r}: {key} is of the shape {tuple(saved)}; expected one label (num_labels=1)")
    model.has_new_head = _has_new_head(model, info["missing_keys"])
    return model


def scorer_class(name: str, **kwargs: object) -> AutoClass:
    """Return the auto class for a saved model or adapter: for tokens if it was saved as such, else for sequences."""
    if (adapter := find_adapter_config_file(name, **kwargs)) is not None:
        is_for_tokens = json.loads(Path(adapter).read_text()).get("task_type") == "TOKEN_CLS"
    else:
        fields, _ = PreTrainedConfig.get_config_dict(name, **kwargs)
        is_for_tokens = (fields.get("architectures") or [""])[0].endswith("ForTokenClassification")
    return AutoModelForTokenClassification if is_for_tokens else AutoModelForSequenceClassification


def _has_new_head(model: PreTrainedModel, missing: set[str]) -> bool:
    if not getattr(model, "_hf_peft_config_loaded", False):
        return any(not name.startswith(f"{model.base_model_prefix}.") for name in missing)
    # Missing keys of the base model are not known: the head comes with the adapter, or the base was saved with one.
    is_saved = any(".modules_to_save." in name for name, _ in model.named_parameters())
    return not is_saved and not (model.config.architectures or [""])[0].endswith("Classification")
