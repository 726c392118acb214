"""Write a saved model in another form and compare both: in the native classes or ours, or with its adapter merged."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hfllm.errors import InputError, refuse_if
from hfllm.flags import NAMED, NOT_NEGATIVE, SEED, flag
from hfllm.runs.flags import RemoteCodeArguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfllm.models.loading.adapters import SavedAdapter


# ---- conversion between hfllm and the native classes ----


@dataclass(frozen=True)
class ConvertArguments(RemoteCodeArguments):
    """What to convert, and into what."""

    model_name_or_path: str | None = flag(
        None, "A local folder or a Hub id; without it the world's base model is made first."
    )
    model_revision: str = flag("main", "Branch, tag or commit of a Hub id.")
    gguf_file: str | None = flag(None, "A GGUF file of the source, to dequantize.")
    output_dir: str = flag("outputs/convert", "Where the converted model goes.")
    native_type: str | None = flag(None, "Native family to write, such as llama; by default the first that fits.")
    max_shard_size: str = flag("50GB", "Largest weight file to write.")
    verify: bool = flag(True, "Compare both models' logits on random tokens.")
    pretrain_config: str | None = flag(
        None, "YAML flags of the pretraining that makes the model, if none is named.", never=NAMED
    )
    world_seed: int = flag(0, "Seed of the embedded world's facts.", takes=NOT_NEGATIVE)
    seed: int = flag(42, "Seed of the pretraining and of the random tokens.", takes=SEED)


def convert(
    source: str,
    location: Mapping[str, str],
    target: Path,
    native_type: str | None = None,
    max_shard_size: str = "50GB",
    seed: int | None = None,
) -> dict[str, float]:
    """Write the converted model and its tokenizer to `target`, whole or not at all. Returns the metrics.

    Args:
        source: a folder or a Hub id.
        location: where the weights are in it: `revision`, and `gguf_file` of a GGUF file to dequantize.
        target: new or empty.
        native_type: family of an hfllm model's native form; by default the first that fits.
        max_shard_size: of the largest weight file.
        seed: of random tokens to compare both models' logits on; without it they are not compared.
    """
    from hfllm.durable import whole_folder
    from hfllm.models.conversion.convert import check_empty, from_native, load_checked, read_config, to_native
    from hfllm.models.family.configuration_hfllm import HfllmConfig

    check_empty(target)
    config, tokenizer = read_config(source, **location), find_tokenizer(source, location)
    with whole_folder(target) as folder:
        if isinstance(config, HfllmConfig):
            model = load_checked(source, **location)
            to_native(model, folder, native_type, tokenizer, max_shard_size=max_shard_size)
        else:
            refuse_if(native_type is not None, f"--native_type {native_type}: {source} is native and becomes hfllm")
            model = from_native(source, **location)
            model.save_pretrained(folder, max_shard_size=max_shard_size)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        metrics = {"parameters": model.num_parameters(), "tensors": len(model.state_dict())}
        if seed is not None:
            both = load_checked(source, **location), load_checked(str(folder))
            metrics["max_logit_difference"] = logit_difference(*both, seed)
    return metrics


def find_tokenizer(source: str, location: Mapping[str, str]) -> "PreTrainedTokenizerBase | None":
    """Return the source's tokenizer, or print a line and return `None`: weights can be converted without one."""
    from hfllm.models.loading.saved import reason_of, saved_tokenizer

    try:
        return saved_tokenizer(source, **location)
    except (OSError, ValueError) as error:
        print(f"convert: no tokenizer in {source} ({reason_of(error, 120)})", flush=True)
        return None


def logit_difference(one: "PreTrainedModel", other: "PreTrainedModel", seed: int) -> float:
    """Return the largest difference of two models' outputs on random tokens."""
    import torch

    from hfllm.models.loading.weights import is_rounding, logits_of, random_tokens

    ids = random_tokens(one.config.vocab_size, one.config.max_position_embeddings, seed)
    first, second = (logits_of(model, ids) for model in (one, other))
    difference = (first - second).abs().max().item()
    if not is_rounding(difference, first, in_half=one.dtype != torch.float32):
        raise InputError(f"the converted model's outputs differ by {difference:.3g}: do not use it, and report this")
    return difference


# ---- an adapter merged into its base ----


@dataclass(frozen=True)
class MergeArguments(RemoteCodeArguments):
    """The adapter, and where the whole model goes."""

    model_name_or_path: str | None = flag(None, "The adapter: a local folder or a Hub id.")
    model_revision: str = flag("main", "Branch, tag or commit of a Hub id.")
    output_dir: str = flag("outputs/merge", "Where the whole model goes.")
    max_shard_size: str = flag("50GB", "Largest weight file to write.")
    seed: int = flag(42, "Seed of the random tokens on which both are compared.", takes=SEED)


def adapter_to_merge(name: str | None, revision: str, target: Path) -> "SavedAdapter":
    """Return the adapter to merge; refuse what is none, and a `target` that is not empty."""
    from hfllm.models.conversion.convert import check_empty
    from hfllm.models.loading.adapters import auto_class_of, find_adapter
    from hfllm.models.loading.saved import refuse_quantized

    refuse_if(not name, "--model_name_or_path is needed: the adapter to merge, a folder or a Hub id")
    adapter = find_adapter(name, revision=revision)
    if adapter is None:
        raise InputError(f"--model_name_or_path {name}: no adapter there (no adapter_config.json, or a whole model)")
    check_empty(target)
    auto_class_of(adapter)
    refuse_quantized(adapter.base_config(), adapter.base)
    return adapter


def merge_into_base(adapter: "SavedAdapter", target: Path, max_shard_size: str, seed: int) -> dict[str, float]:
    """Write the base with the adapter merged into it, and compare it with the two apart. Returns the metrics.

    Args:
        target: folder of the whole model, new or empty.
        max_shard_size: of the largest weight file.
        seed: of the random tokens of the comparison.
    """
    from hfllm.models.loading.adapters import auto_class_of, load_to_merge, merge
    from hfllm.models.loading.saved import max_length_of
    from hfllm.models.loading.weights import is_rounding, logits_of, random_tokens
    from hfllm.runs.models import save_merged, scorer_settings

    adapted, dtypes, has_new_head = load_to_merge(adapter, auto_class_of(adapter), **scorer_settings(adapter))
    if has_new_head:
        raise InputError(f"adapter {adapter.name!r} brings no head for scores, and its base {adapter.base!r} has none")
    added = sum(weight.numel() for weight in adapter.weights().values())
    context = max_length_of(adapted.config)
    ids = random_tokens(adapted.config.get_text_config().vocab_size, context, seed)
    # An image placeholder token has no meaning without an image.
    index = getattr(adapted.config, "image_token_id", None)
    ids = ids if index is None else ids.masked_fill(ids == index, index - 1 if index else 1)
    apart = logits_of(adapted, ids)
    with adapted.disable_adapter():
        without = logits_of(adapted, ids)
    model = merge(adapted, dtypes)
    difference = (logits_of(model, ids) - apart).abs().max().item()
    if not is_rounding(difference, apart, in_half=min(dtype.itemsize for dtype in dtypes.values()) < 4):
        what = f"adapter {adapter.name!r} merged into {adapter.base!r}"
        raise InputError(f"{what} gives other outputs, by up to {difference:.3g}: keep it apart")
    save_merged(model, adapter, target, max_shard_size)
    return {
        "parameters": model.num_parameters(),
        "adapter_parameters": added,
        "max_logit_change": (apart - without).abs().max().item(),
        "max_logit_difference": difference,
    }
