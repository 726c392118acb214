"""Sampling responses: rows that have ended leave the batch, so that the long ones do not hold them up."""

from collections.abc import Sequence
from copy import copy

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

# Below this many rows a step costs what it costs for one.
FEWEST_TO_SPLIT = 8
# What begins anew, or reads the prompt again, with each call of `generate`.
COUNTED_FROM_THE_PROMPT = ("exponential_decay_length_penalty", "guidance_scale", "begin_suppress_tokens", "max_time")


class Ended(StoppingCriteria):
    """Notes where each row ends, and stops all of them once half have ended.

    Args:
        end_token_ids: tokens that end a response.
        stop_strings: texts that do, or `None`.
        may_split: whether to stop all rows at half time.
    """

    def __init__(self, end_token_ids: Sequence[int], stop_strings: StopStringCriteria | None, may_split: bool):
        self.end_token_ids, self.stop_strings, self.may_split = list(end_token_ids), stop_strings, may_split
        self.has_split = False
        self.has_ended: torch.Tensor | None = None
        self.lengths: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        ended = torch.isin(input_ids[:, -1], torch.tensor(self.end_token_ids, device=input_ids.device))
        if self.stop_strings is not None:
            ended |= self.stop_strings(input_ids, scores)
        if self.has_ended is None:
            self.has_ended = torch.zeros_like(ended)
            self.lengths = torch.zeros_like(input_ids[:, 0])
        self.lengths[~self.has_ended] = input_ids.shape[1]
        self.has_ended = self.has_ended | ended
        rows = len(ended)
        if self.may_split and rows >= FEWEST_TO_SPLIT and self.has_ended.sum() * 2 >= rows:
            self.has_split = True
            return torch.ones_like(ended)
        return self.has_ended


@torch.no_grad()
def sample_responses(
    policy: PreTrainedModel,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    generation_config: GenerationConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, torch.Tensor]:
    """Sample one response a prompt by `generate`.

    Whenever half of the rows have ended, the other half goes on without them, with its part of the cache.

    Args:
        prompt_ids, prompt_mask: (N, P), padded on the left.
        generation_config: without beams; caches other than the dynamic one, and what counts from the prompt, keep all
            rows to the end. The policy's own generation config plays no part.

    Returns:
        `response_ids` and `response_mask`, (N, R): the token or text that ends a response is its last, then comes the
        padding token. And `is_ended`, (N,): whether it has ended by itself.
    """
    was_training, own_config = policy.training, policy.generation_config
    policy.eval()
    # generate() fills what is unset from it.
    policy.generation_config = GenerationConfig()
    start, longest = prompt_ids.shape[1], generation_config.max_new_tokens
    responses = prompt_ids.new_full((len(prompt_ids), longest), generation_config.pad_token_id)
    lengths = torch.zeros(len(prompt_ids), dtype=torch.long, device=prompt_ids.device)
    is_ended = torch.zeros_like(lengths, dtype=torch.bool)
    stop_strings = None
    if generation_config.stop_strings:
        stop_strings = StopStringCriteria(tokenizer, generation_config.stop_strings)
    may_split = generation_config.cache_implementation in (None, "dynamic") and not any(
        getattr(generation_config, name, None) for name in COUNTED_FROM_THE_PROMPT
    )
    rows, ids, mask, cache = torch.arange(len(prompt_ids), device=prompt_ids.device), prompt_ids, prompt_mask, None
    while len(rows):
        ended = Ended(generation_config.eos_token_id, stop_strings, may_split=may_split)
        output = policy.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=_rest_of(generation_config, ids.shape[1] - start),
            stopping_criteria=StoppingCriteriaList([ended]),
            return_dict_in_generate=True,
            **({"tokenizer": tokenizer} if stop_strings is not None else {}),
            **({"cache": cache} if cache is not None else {}),
        )
        ids = output.sequences
        seen = ids[:, start:]
        responses[rows, : seen.shape[1]] = seen
        lengths[rows], is_ended[rows] = ended.lengths - start, ended.has_ended
        goes_on = ~ended.has_ended
        if seen.shape[1] >= longest or not goes_on.any() or not ended.has_split:
            break
        kept = goes_on.nonzero().squeeze(1)
        # Another cache may not let rows be picked: those that go on are then read again from their beginning.
        cache = output.cache if type(output.cache) is DynamicCache else None
        if cache is not None:
            cache.batch_select_indices(kept)
        new = mask.new_ones(len(kept), ids.shape[1] - mask.shape[1])
        rows, ids, mask = rows[kept], ids[kept], torch.cat((mask[kept], new), dim=1)
    policy.train(was_training)
    policy.generation_config = own_config
    width = max(int(lengths.max()), 1)
    mask = (torch.arange(width, device=lengths.device) < lengths.unsqueeze(1)).long()
    response_ids = responses[:, :width].masked_fill(mask == 0, generation_config.pad_token_id)
    return {"response_ids": response_ids, "response_mask": mask, "is_ended": is_ended}


def _rest_of(config: GenerationConfig, done: int) -> GenerationConfig:
    """The same settings for responses of which `done` tokens are there already."""
    if not done:
        return config
    rest = copy(config)
    rest.cache_implementation = None
    rest.max_new_tokens = config.max_new_tokens - done
    if config.min_new_tokens is not None:
        rest.min_new_tokens = max(config.min_new_tokens - done, 0)
    return rest
