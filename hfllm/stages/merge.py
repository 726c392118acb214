"""Merging an adapter into its base: its flags and checks, and the comparison of both."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hfllm.errors import InputError, refuse_if
from hfllm.flags import SEED, flag
from hfllm.runs.flags import RemoteCodeArguments

if TYPE_CHECKING:
    from hfllm.models.loading.adapters import SavedAdapter


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
