"""Faster decoding through transformers' own `generate`, with the best known settings.

    model.generate(**batch, max_new_tokens=64, custom_generate=fast_generate)

The tokens are the same as from `generate` without it, or samples of the same distribution.
"""

from typing import TYPE_CHECKING, Any

import torch

from hfllm.errors import InputError, refuse_if
from hfllm.generation.packed.model import has_int8, unsupported_reason
from hfllm.generation.speculative.acceptance import check_config, make_options
from hfllm.generation.speculative.drafts import Draft, DraftLength, Int8Draft, weights_read
from hfllm.generation.speculative.speculative import check_prompts, decode

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

# Below this many weights a token waits for Python, not for memory, and a draft of the same depth costs as much.
INT8_FROM = 4_000_000
CRITERIA = ("MaxLengthCriteria", "EosTokenCriteria")


def recommended_draft(model: "PreTrainedModel") -> Draft | None:
    """Return the draft without a second model: int8 for models limited by reading their weights, else none."""
    if unsupported_reason(model) is None and has_int8(model.dtype, model.device) and weights_read(model) >= INT8_FROM:
        return Int8Draft()
    return None


def fast_generate(
    model: "PreTrainedModel",
    input_ids: torch.Tensor,
    logits_processor: "LogitsProcessorList",
    stopping_criteria: "StoppingCriteriaList",
    generation_config: "GenerationConfig",
    draft: "Draft | PreTrainedModel | str | None" = "auto",
    num_draft_tokens: int | str | DraftLength = "adaptive",
    generator: torch.Generator | None = None,
    **model_kwargs: Any,
) -> torch.Tensor:
    """Decode faster: pass it to `model.generate` as `custom_generate`, together with its own arguments.

    Args:
        draft: `"auto"` is `recommended_draft(model)`, `None` is no draft; else a `Draft`, or a smaller model with the
            same tokenizer.
        num_draft_tokens, generator: as in `hfllm.generation.speculative.speculative_generate`.

    Returns:
        (B, S) token ids as `generate` returns them. Streamers and `return_dict_in_generate` are refused.

    Raises:
        InputError: for an unsupported model or option.
    """
    # `generate` has repeated the prompts already.
    check_config(generation_config, handled=("num_return_sequences",))
    for criterion in stopping_criteria:
        if type(criterion).__name__ not in CRITERIA:
            raise InputError(f"{type(criterion).__name__} cannot be combined with fast_generate: leave it out")
    refuse_if(model_kwargs.get("inputs_embeds") is not None, "inputs_embeds: fast_generate starts from input_ids")
    cache = model_kwargs.get("cache")
    if generation_config.cache_implementation is not None or (cache is not None and cache.get_seq_length()):
        raise InputError("cache, cache_implementation: fast_generate has its own cache; leave them out")
    if draft == "auto":
        draft = recommended_draft(model)
    elif isinstance(draft, str):
        raise InputError(f"draft {draft!r}: expected 'auto', None, a Draft or a model")
    new = generation_config.max_length - input_ids.shape[1]
    options = make_options(generation_config, logits_processor, new, generator)
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    check_prompts(input_ids, mask)
    return decode(model, draft, input_ids, mask, options, num_draft_tokens).sequences
