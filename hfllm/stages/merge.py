"""Merging an adapter into its base: its flags, what it refuses, and the comparison of both."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hfllm.errors import InputError
from hfllm.runs.flags import RemoteCodeArguments

if TYPE_CHECKING:
    from hfllm.models.loading.adapters import SavedAdapter


@dataclass(frozen=True)
class MergeArguments(RemoteCodeArguments):
    """The adapter, and where the whole model goes."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "The adapter: a local folder or a Hub id."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a Hub id."})
    output_dir: str = field(default="outputs/merge", metadata={"help": "Where the whole model goes."})
    max_shard_size: str = field(default="50GB", metadata={"help": "Largest weight file to write."})
    seed: int = field(default=42, metadata={"help": "Seed of the random tokens on which both are compared."})


def adapter_to_merge(script_args: MergeArguments) -> "SavedAdapter":
    """Return the adapter that the flags name.

    Raises:
        InputError: when it is none or cannot be merged, its base is not there, or the output folder is not empty.
    """
    from hfllm.models.conversion.convert import check_empty
    from hfllm.models.loading.adapters import auto_class_of, find_adapter
    from hfllm.models.loading.saved import refuse_quantized

    name = script_args.model_name_or_path
    if not name:
        raise InputError("--model_name_or_path is needed: the adapter to merge, a folder or a Hub id")
    adapter = find_adapter(name, revision=script_args.model_revision)
    if adapter is None:
        raise InputError(f"--model_name_or_path {name}: no adapter there (no adapter_config.json, or a whole model)")
    check_empty(Path(script_args.output_dir))
    auto_class_of(adapter)
    refuse_quantized(adapter.base_config(), adapter.base)
    return adapter


def merge_into_base(adapter: "SavedAdapter", script_args: MergeArguments) -> dict[str, float]:
    """Write the base with the adapter merged into it, and compare it with the two apart. Returns the metrics.

    Raises:
        InputError: when they do not fit or cannot be merged, or the outputs differ by more than rounding.
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
    ids = random_tokens(adapted.config.get_text_config().vocab_size, context, script_args.seed)
    # A token that stands for a picture has no meaning alone.
    place = getattr(adapted.config, "image_token_id", None)
    ids = ids if place is None else ids.masked_fill(ids == place, place - 1 if place else 1)
    apart = logits_of(adapted, ids)
    with adapted.disable_adapter():
        without = logits_of(adapted, ids)
    model = merge(adapted, dtypes)
    difference = (logits_of(model, ids) - apart).abs().max().item()
    if not is_rounding(difference, apart, in_half=min(dtype.itemsize for dtype in dtypes.values()) < 4):
        raise InputError(
            f"adapter {adapter.name!r} merged into {adapter.base!r} gives other outputs, by up to {difference:.3g}: "
            "keep it apart"
        )
    save_merged(model, adapter, Path(script_args.output_dir), script_args.max_shard_size)
    return {
        "parameters": model.num_parameters(),
        "adapter_parameters": added,
        "max_logit_change": (apart - without).abs().max().item(),
        "max_logit_difference": difference,
    }
