"""What a stage starts from when `--model_name_or_path` is an adapter: trained further, or merged under a new one.

Without `--use_peft` the adapter's own weights are trained further, and the result is an adapter of the same base. With
it the adapter is merged into its base first; that model is kept in `<output_dir>/base`, and the new adapter is one of
it. Recipes that train nothing merge it.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm.errors import InputError
from hfllm.models.loading.saved import reason_of
from hfllm.outputs.files import MERGED_FROM, read_json
from hfllm.outputs.report import REPORT_FILE
from hfllm.runs.command_line import main_process, say
from hfllm.runs.models import load_kwargs, load_policy, load_reward_model, load_tokenizer, saved_tokenizer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
    from transformers.models.auto.auto_factory import _BaseAutoModelClass
    from trl import ModelConfig

    from hfllm.models.loading.adapters import SavedAdapter


def load_to_train(
    model_args: "ModelConfig", output_dir: str
) -> tuple["PreTrainedModel | PeftModel", "PreTrainedTokenizerBase"]:
    """Load the language model that a stage trains, and its tokenizer.

    Raises:
        InputError: when either cannot be loaded, or an adapter does not fit its base or is not one of words.
    """
    from transformers import AutoModelForCausalLM

    from hfllm.models.loading.adapters import find_adapter, load_base, put_on
    from hfllm.models.loading.saved import check_vocabulary

    name, revision = model_args.model_name_or_path, model_args.model_revision
    adapter = find_adapter(name, revision=revision)
    if adapter is None:
        return load_policy(model_args)
    adapter.check("CAUSAL_LM")
    if model_args.use_peft:
        return load_policy(on_merged_base(adapter, model_args, output_dir))
    say(f"adapter {name} of {adapter.base} is trained further")
    base, _ = load_base(adapter, AutoModelForCausalLM, **load_kwargs(model_args))
    model, tokenizer = put_on(base, adapter, is_trainable=True), load_tokenizer(name, revision)
    check_vocabulary(model, tokenizer, name)
    return model, tokenizer


def load_scorer_to_train(model_args: "ModelConfig", output_dir: str) -> "PreTrainedModel | PeftModel":
    """Load the model with one score for a sequence that a stage trains. A language model's head is new.

    Raises:
        InputError: when it cannot be loaded, or an adapter does not fit its base or is for another task.
    """
    from transformers import AutoModelForSequenceClassification

    from hfllm.models.loading.adapters import find_adapter, load_base, put_on, put_under_head

    name, revision = model_args.model_name_or_path, model_args.model_revision
    adapter = find_adapter(name, revision=revision)
    if adapter is None:
        return load_reward_model(name, model_args, revision)
    adapter.check("CAUSAL_LM", "SEQ_CLS")
    if model_args.use_peft:
        merged_args = on_merged_base(adapter, model_args, output_dir)
        return load_reward_model(merged_args.model_name_or_path, merged_args)
    has_head = adapter.task == "SEQ_CLS" or adapter.brings_head
    say(f"adapter {name} of {adapter.base} is trained further{'' if has_head else ', with a new head for scores'}")
    settings = {"num_labels": 1, "ignore_mismatched_sizes": True, **load_kwargs(model_args)}
    model, _ = load_base(adapter, AutoModelForSequenceClassification, **settings)
    return put_on(model, adapter, is_trainable=True) if has_head else put_under_head(model, adapter)


def load_head_to_train(
    model_args: "ModelConfig",
    output_dir: str,
    auto_class: "type[_BaseAutoModelClass]",
    task_type: str,
    **head: object,
) -> "PreTrainedModel | PeftModel":
    """Load the model with a head that a stage trains; that of a language model, or of other labels, is new.

    Args:
        output_dir: where an adapter's merged base is kept, for a new adapter of it.
        auto_class: such as `AutoModelForTokenClassification`.
        task_type: of the head, as PEFT names it.
        head: further arguments of `from_pretrained`, such as `id2label`.

    Raises:
        InputError: when it cannot be loaded, or an adapter does not fit its base or is for another task.
    """
    from hfllm.models.loading.adapters import find_adapter, load_base, put_on, put_under_head
    from hfllm.models.loading.weights import load_weights_of

    name, revision = model_args.model_name_or_path, model_args.model_revision
    settings = {"ignore_mismatched_sizes": True, **head}
    adapter = find_adapter(name, revision=revision)
    if adapter is not None:
        adapter.check("CAUSAL_LM", task_type)
        if not model_args.use_peft:
            has_head = adapter.task == task_type
            say(f"adapter {name} of {adapter.base} is trained further{'' if has_head else ', with a new head'}")
            model, _ = load_base(adapter, auto_class, **settings, **load_kwargs(model_args))
            if has_head:
                return put_on(model, adapter, is_trainable=True)
            return put_under_head(model, adapter, task_type)
        model_args = on_merged_base(adapter, model_args, output_dir)
    kwargs = {**load_kwargs(model_args), **settings}
    try:
        model, _ = load_weights_of(auto_class, model_args.model_name_or_path, **kwargs)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"model {name!r} could not be loaded: {reason_of(error)}") from error
    return model


def on_merged_base(adapter: "SavedAdapter", model_args: "ModelConfig", output_dir: str) -> "ModelConfig":
    """Merge an adapter into its base, kept in the output folder, and return the flags that load it from there.

    What a new adapter is trained on is then what it is loaded on later, to the bit. A run that is started again finds
    it.

    Raises:
        InputError: see `write_merged`; and when the place holds something that no such run has put there.
    """
    from accelerate import PartialState
    from transformers.integrations import is_deepspeed_zero3_enabled

    from hfllm.models.loading.adapters import BASE_FOLDER

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
    return replace(model_args, model_name_or_path=str(folder), model_revision="main")


@contextmanager
def whole_model(name: str, revision: str, folder: str | Path) -> Iterator[tuple[str, str]]:
    """Yield name and revision of a whole model: the named one, or an adapter merged into its base, for the time being.

    Args:
        folder: where a merged model may lie in the meantime.
    """
    from hfllm.models.loading.adapters import find_adapter
    from hfllm.models.loading.folders import temporary_folder

    adapter = find_adapter(name, revision=revision)
    if adapter is None:
        yield name, revision
        return
    with temporary_folder(Path(folder), ".merged-") as place:
        merged = place / (Path(name).name or "merged")
        write_merged(adapter, merged)
        yield str(merged), "main"


def write_merged(adapter: "SavedAdapter", folder: Path, max_shard_size: str = "50GB") -> "PreTrainedModel":
    """Write an adapter's base with the adapter merged into it, in the base's precision, with the tokenizer.

    Args:
        folder: new or empty; it appears whole or not at all.

    Raises:
        InputError: when either cannot be loaded, they do not fit, or cannot be merged.
    """
    from hfllm.models.loading.adapters import auto_class_of, load_merged

    model = load_merged(adapter, auto_class_of(adapter), **scorer_settings(adapter))
    save_merged(model, adapter, folder, max_shard_size)
    return model


def save_merged(model: "PreTrainedModel", adapter: "SavedAdapter", folder: Path, max_shard_size: str = "50GB") -> None:
    """Save a merged model with its tokenizer, and a record of what it is made from."""
    from hfllm.models.conversion.convert import check_empty
    from hfllm.models.loading.folders import whole_folder
    from hfllm.models.loading.saved import is_for_pictures

    check_empty(folder)
    tokenizer = saved_tokenizer(adapter.name, adapter.location.get("revision", "main"))
    # That of a model that sees stands in the config of its decoder.
    config = model.config.get_text_config()
    if adapter.task == "SEQ_CLS" and config.pad_token_id is None:
        # It scores the last token that is not padding.
        config.pad_token_id = tokenizer.pad_token_id
    saved = tokenizer
    if is_for_pictures(model.config):
        saved = processor_of(adapter)
    with whole_folder(folder) as place:
        model.save_pretrained(place, max_shard_size=max_shard_size)
        saved.save_pretrained(place)
        (place / MERGED_FROM).write_text(json.dumps(merge_record(adapter), indent=2) + "\n")


def processor_of(adapter: "SavedAdapter") -> "ProcessorMixin":
    """Return the processor that was saved with an adapter of a model that sees, or that of its base.

    Raises:
        InputError: when neither has one.
    """
    from hfllm.models.loading.saved import saved_processor

    for name, location in ((adapter.name, adapter.location), (adapter.base, adapter.base_location)):
        with suppress(ImportError, OSError, ValueError):
            processor = saved_processor(name, **location)
            if hasattr(processor, "image_processor"):
                return processor
    raise InputError(f"adapter {adapter.name!r} and its base {adapter.base!r} have no processor of pictures")


def scorer_settings(adapter: "SavedAdapter") -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for a base that gets its head for scores from an adapter."""
    from hfllm.models.loading.adapters import HEADS

    if adapter.task not in ("SEQ_CLS", "TOKEN_CLS"):
        return {}
    rows = [value.shape[0] for name, value in adapter.weights().items() if name.split(".")[-2] in HEADS]
    return {"num_labels": rows[0], "ignore_mismatched_sizes": True} if rows else {}


def merge_record(adapter: "SavedAdapter") -> dict[str, Any]:
    """Return what a merged model is made from: the adapter, when it last changed, and what it was trained on."""
    file = Path(adapter.name, "adapter_model.safetensors")
    return {
        "adapter": adapter.name,
        "adapter_revision": adapter.location.get("revision"),
        "adapter_changed_at": file.stat().st_mtime_ns if file.is_file() else None,
        "base_model_name_or_path": adapter.base,
        "base_is_local": Path(adapter.base).is_dir(),
    }


def _is_replaceable(folder: Path) -> bool:
    """Return whether a folder holds what `on_merged_base` left, or nothing; `hfllm merge` leaves a report too."""
    if folder.is_dir() and not any(folder.iterdir()):
        return True
    return (folder / MERGED_FROM).is_file() and not (folder / REPORT_FILE).exists()
