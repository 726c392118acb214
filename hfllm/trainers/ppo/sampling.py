"""Sampling responses: finished rows leave the batch, and turns of an episode keep their caches."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from typing import NamedTuple

import torch
from torch import nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.cache_utils import DynamicLayer
from transformers.utils import ModelOutput

from hfllm.errors import InputError
from hfllm.generation.packed.turns import Turns, shared
from hfllm.generation.responses import undecodable_reason, warn_of_generate, without_cpu_autocast
from hfllm.generation.speculative.acceptance import Options, read_options
from hfllm.generation.speculative.speculative import continued
from hfllm.models import devices
from hfllm.models.family.configuration_fields_hfllm import cached_numbers
from hfllm.multimodal.processors import Pictures
from hfllm.trainers.ppo.actor_critic import entropy_of, log_distribution

# The keys and values of all sequences sampled together take at most this share of a device's memory.
CACHE_SHARE = 1 / 4


def most_cached_rows(model: PreTrainedModel, length: int, device: torch.device) -> int | None:
    """Return the most sequences of `length` tokens to sample together; `None` is no limit, as on a CPU."""
    memory, config = devices.device_memory(device), model.config.get_text_config()
    numbers = cached_numbers(config)
    if memory is None or numbers is None:
        return None
    bytes_per_row = config.num_hidden_layers * numbers * length * model.dtype.itemsize
    return max(int(memory * CACHE_SHARE / bytes_per_row), 1)


# ---- turn caches ----
#
# Keys and values of unfinished episodes: the policy's next turn does not read earlier tokens again.
#
# Shapes: B rows of a batch, H key-value heads, S tokens of the longest sequence, W columns of a cache, D head_dim.


class Kept(NamedTuple):
    """A sequence whose keys and values are known.

    Args:
        tokens: the sequence, up to the last token fed to the model.
        part: the number of the cache among the kept ones.
        row: its row there.
        begin: the column of its first token.
    """

    tokens: list[int]
    part: int
    row: int
    begin: int


class TurnCaches:
    """Caches of the last turn of each episode, on a CPU.

    On an accelerator memory is scarcer than the time for reading. Those of `generate` are kept for layers of full
    attention, and ragged ones in `turns`.
    """

    def __init__(self) -> None:
        self.turns = Turns()
        self._kept: dict[int, Kept] = {}
        self._parts: list[list[tuple[torch.Tensor, torch.Tensor]]] = []

    def keep(
        self,
        episodes: Sequence[int],
        cache: object,
        rows: torch.Tensor,
        ids: torch.Tensor,
        begins: torch.Tensor,
        ends: torch.Tensor,
    ) -> None:
        """Keep the rows of a cache whose turns have ended.

        Args:
            episodes: of the rows.
            rows: (B,), indices in the cache.
            ids: (B, S) of these rows.
            begins: (B,), the columns of the first tokens.
            ends: (B,), the columns after the last tokens fed to the model.
        """
        if not len(rows) or not _is_plain(cache):
            return
        spans = zip(ids.tolist(), begins.tolist(), ends.tolist(), strict=True)
        for row, (episode, (tokens, begin, end)) in enumerate(zip(episodes, spans, strict=True)):
            self._kept[episode] = Kept(tokens[begin:end], len(self._parts), row, begin)
        self._parts.append([(layer.keys[rows], layer.values[rows]) for layer in cache.layers])

    def before(self, episodes: Sequence[int], ids: torch.Tensor, mask: torch.Tensor) -> DynamicCache | None:
        """Return a cache of the known part of the episodes' sequences, `None` if nothing is known, and forget it.

        It has the same columns for all rows: where some have fewer new tokens than others, their last known ones are
        read again.

        Args:
            ids, mask: (B, S), the sequences, padded on the left.
        """
        entries, parts, self._kept, self._parts = self._kept, self._parts, {}, []
        if any(episode not in entries for episode in episodes):
            return None
        rows, width = [entries[episode] for episode in episodes], ids.shape[1]
        begins = mask.argmax(1).tolist()
        sequences = [row[begin:] for row, begin in zip(ids.tolist(), begins, strict=True)]
        new = [len(all_) - shared(row.tokens, all_) for row, all_ in zip(rows, sequences, strict=True)]
        columns = width - max(new)
        if columns <= 0:
            return None
        # The old column of each new one; columns of padding are masked, whatever they hold.
        shifts = torch.tensor([row.begin - begin for row, begin in zip(rows, begins, strict=True)])
        sources = (shifts.unsqueeze(1) + torch.arange(columns)).clamp(min=0)
        layers = []
        for at in range(len(parts[0])):
            pair = [part[at] for part in parts]
            layers.append(tuple(_gathered([each[side] for each in pair], rows, sources) for side in (0, 1)))
        return DynamicCache(layers)


def _gathered(tensors: Sequence[torch.Tensor], rows: Sequence[Kept], sources: torch.Tensor) -> torch.Tensor:
    """Return (B, H, W, D): of each row's tensor its columns `sources` (B, W)."""
    heads, size = tensors[0].shape[1], tensors[0].shape[3]
    result = tensors[0].new_empty(len(rows), heads, sources.shape[1], size)
    for number, tensor in enumerate(tensors):
        indices = [position for position, row in enumerate(rows) if row.part == number]
        if indices:
            index = torch.tensor([rows[position].row for position in indices]).unsqueeze(1)
            columns = sources[indices].clamp(max=tensor.shape[2] - 1)
            result[indices] = tensor[index, :, columns].transpose(1, 2)
    return result


def _is_plain(cache: object) -> bool:
    """Return whether a cache has the keys and values of every token, and nothing else."""
    layers = cache.layers if type(cache) is DynamicCache else []
    return bool(layers) and all(
        type(layer) is DynamicLayer and layer.is_initialized and layer.keys.device.type == "cpu" for layer in layers
    )


# ---- sampling ----


# With fewer rows than this, a step costs as much as with one row.
FEWEST_TO_SPLIT = 8
# Settings that restart, or read the prompt again, with every call of `generate`.
COUNTED_FROM_THE_PROMPT = ("exponential_decay_length_penalty", "guidance_scale", "begin_suppress_tokens", "max_time")


class Ended(StoppingCriteria):
    """Stopping criterion that records the ends of the rows, and stops all rows once half have ended.

    Args:
        end_token_ids: tokens ending a response.
        stop_strings: texts ending a response, or `None`.
        may_split: whether to stop all rows when half have ended.
        observe: called with every new column of tokens, or `None`.
    """

    def __init__(
        self,
        end_token_ids: Sequence[int],
        stop_strings: StopStringCriteria | None,
        may_split: bool,
        observe: Callable[[torch.Tensor], None] | None = None,
    ):
        self.end_token_ids, self.stop_strings, self.may_split = list(end_token_ids), stop_strings, may_split
        self.observe = observe
        self.has_split = False
        self._ends: torch.Tensor | None = None
        self.has_ended: torch.Tensor | None = None
        self.lengths: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        if self.observe is not None:
            self.observe(input_ids[:, -1])
        if self._ends is None:
            self._ends = torch.tensor(self.end_token_ids, device=input_ids.device)
        ended = torch.isin(input_ids[:, -1], self._ends)
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


class OnlyFinite(LogitsProcessor):
    """Logits processor that stops sampling when logits are not finite, and changes nothing.

    Raises:
        FloatingPointError: when the logits of a row hold NaN, or their largest is infinite.
    """

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if not bool(scores.amax(-1).isfinite().all()):
            raise FloatingPointError("the logits that responses are sampled from are not finite")
        return scores


def below_adapter(policy: PreTrainedModel) -> PreTrainedModel:
    """Return the model called by `generate`: with an adapter, the model below it."""
    return policy.get_base_model() if hasattr(policy, "get_base_model") else policy


@contextmanager
def plainly(policy: PreTrainedModel) -> Iterator[None]:
    """Put the policy in evaluation mode, and ignore its own generation config, which fills unset values."""
    was_training = policy.training
    # A policy with an adapter passes its config to the model below it.
    configs = [(model, model.generation_config) for model in (policy, below_adapter(policy))]
    policy.eval()
    for model, _ in configs:
        model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        policy.train(was_training)
        for model, config in configs:
            model.generation_config = config


class SampledLogprobs:
    """Recorder of the policy's log-probabilities while it samples, to save a second pass.

    Args:
        shape: (N, R), prompts and longest response.
        temperature, never_sampled: see `log_distribution`.
        value_head: also applied to the state from which each token is sampled, or `None`.

    Attributes:
        logprobs, entropy, values: (N, R + 1), unspecified where the policy chose no token of a response.
        tokens: (N, R + 1), the recorded ones, and -1.
        turns: responses recorded together.
        caches: of the episodes, for their next turns, or `None`.
        is_checked: whether earlier recordings of its kind were found right; if not, it is compared with a second pass.
        is_wrong: whether it was found wrong.
    """

    is_checked = is_wrong = False
    caches: TurnCaches | None = None

    def __init__(
        self,
        shape: tuple[int, int],
        temperature: float,
        never_sampled: Sequence[int],
        value_head: nn.Module | None,
        device: torch.device,
    ):
        self.temperature, self.never_sampled, self.value_head = temperature, never_sampled, value_head
        rows, self.room = shape
        # The last column takes tokens sampled beyond the room of an episode, and cut off.
        self.logprobs, self.entropy, self.values = (torch.zeros(rows, self.room + 1, device=device) for _ in range(3))
        self.tokens = torch.full((rows, self.room + 1), -1, device=device)
        self._logits = self._states = None
        self.begin(range(rows), [0] * rows)

    def begin(self, rows: Sequence[int], columns: Sequence[int]) -> None:
        """Let the next responses be turns of episodes: of these rows, each from its column on."""
        self.turns, device = len(rows), self.tokens.device
        self._rows, self._columns = (torch.tensor(list(indices), device=device) for indices in (rows, columns))

    def turns_of(self, rows: int) -> Turns | None:
        """Return what is known of the episodes about to be continued, where these are as many."""
        if self.caches is None or rows != self.turns:
            return None
        self.caches.turns.begin(self._rows.tolist())
        return self.caches.turns

    def cache_before(self, ids: torch.Tensor, mask: torch.Tensor) -> DynamicCache | None:
        """Return the known parts of the sequences (N, P) about to be continued, see `TurnCaches.before`."""
        if self.caches is None or len(ids) != self.turns:
            return None
        return self.caches.before(self._rows.tolist(), ids, mask)

    def keep(self, rows: torch.Tensor, output: ModelOutput, mask: torch.Tensor, ended: Ended) -> None:
        """Keep the caches of `generate` for the rows with finished turns among these, see `TurnCaches.keep`."""
        done = ended.has_ended.nonzero().squeeze(1)
        episodes, begins = self._rows[rows[done]].tolist(), mask[done].argmax(1)
        # The last token was sampled and not fed to the model.
        self.caches.keep(episodes, output.cache, done, output.sequences[done], begins, ended.lengths[done] - 1)

    def saw(self, response_ids: torch.Tensor, action_mask: torch.Tensor) -> bool:
        """Return whether the policy's tokens among responses (N, R) are the recorded ones."""
        chosen = action_mask > 0
        return torch.equal(self.tokens[:, : chosen.shape[1]][chosen], response_ids[chosen])

    @contextmanager
    def watching(self, policy: PreTrainedModel) -> Iterator[None]:
        """Keep the policy's last logits and states at all of its calls."""

        def keep_states(module: nn.Module, args: tuple) -> None:
            self._states = args[0][:, -1]

        def keep_logits(module: nn.Module, args: tuple, output: ModelOutput) -> None:
            self._logits = output.logits[:, -1]

        model = below_adapter(policy)
        handles = [model.register_forward_hook(keep_logits)]
        if self.value_head is not None:
            handles.append(model.get_output_embeddings().register_forward_pre_hook(keep_states))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def note(
        self,
        rows: torch.Tensor,
        column: int | torch.Tensor,
        logits: torch.Tensor,
        states: torch.Tensor | None,
        tokens: torch.Tensor,
    ) -> None:
        """Record the tokens (B,) of `rows`, as `begin` places them, in a column of theirs.

        Args:
            column: one for all, or each row's, (B,).
            logits: (B, V), from which they were sampled.
            states: (B, E), from which the logits were computed; needed for the value head alone.
        """
        at = self._rows[rows], (self._columns[rows] + column).clamp(max=self.room)
        distribution = log_distribution(logits.clone(), self.temperature, self.never_sampled)
        self.tokens[at] = tokens
        self.logprobs[at] = distribution.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        self.entropy[at] = entropy_of(distribution)
        if self.value_head is not None:
            self.values[at] = self.value_head(states).squeeze(-1)

    def of(self, rows: torch.Tensor, column: int) -> Callable[[torch.Tensor], None]:
        """Return a function for recording the tokens of `rows` while `watching`, from a column of theirs on."""

        def note(tokens: torch.Tensor) -> None:
            nonlocal column
            self.note(rows, column, self._logits, self._states, tokens)
            column += 1

        return note


@torch.no_grad()
def generate_responses(
    policy: PreTrainedModel,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    generation_config: GenerationConfig,
    tokenizer: PreTrainedTokenizerBase,
    witness: SampledLogprobs | None = None,
    most_rows: int | None = None,
    pictures: Pictures | None = None,
) -> dict[str, torch.Tensor]:
    """Sample one response per prompt.

    A policy of the family, or a native one that converts to it, decodes over packed weights on a CPU, in a cache
    allocated once. Others do by `generate`: whenever half of the rows have ended, the other half continues without
    them, with its part of the cache.

    Args:
        prompt_ids, prompt_mask: (N, P), padded on the left.
        generation_config: without beams; other than dynamic caches, and settings that count from the prompt, keep all
            rows to the end. The policy's own generation config is ignored.
        witness: records the policy's log-probabilities of the tokens.
        most_rows: prompts answered at a time; by default all.
        pictures: the images of the prompts.

    Returns:
        `response_ids` and `response_mask`, (N, R): a response ends with its end token or text, followed by the
        padding token. And `is_ended`, (N,): whether it ended before the length limit.

    Raises:
        FloatingPointError: see `OnlyFinite`.
    """
    settings = (generation_config, tokenizer, witness)
    if most_rows is None or len(prompt_ids) <= most_rows:
        return _generate_together(policy, prompt_ids, prompt_mask, *settings, 0, pictures)
    parts = []
    for rows in torch.arange(len(prompt_ids)).split(most_rows):
        own = None if pictures is None else pictures[rows]
        parts.append(_generate_together(policy, prompt_ids[rows], prompt_mask[rows], *settings, int(rows[0]), own))
    return _joined(parts, generation_config.pad_token_id)


def _generate_together(
    policy: PreTrainedModel,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    generation_config: GenerationConfig,
    tokenizer: PreTrainedTokenizerBase,
    witness: SampledLogprobs | None,
    first_row: int,
    pictures: Pictures | None,
) -> dict[str, torch.Tensor]:
    """Sample all responses at once; `first_row` is the index of the first prompt in the witness's records."""
    if pictures is None and (options := _fast_options(policy, prompt_ids, generation_config)) is not None:
        return _continue(policy, prompt_ids, prompt_mask, options, witness, first_row)
    start, longest = prompt_ids.shape[1], generation_config.max_new_tokens
    responses = prompt_ids.new_full((len(prompt_ids), longest), generation_config.pad_token_id)
    lengths = torch.zeros(len(prompt_ids), dtype=torch.long, device=prompt_ids.device)
    is_ended = torch.zeros_like(lengths, dtype=torch.bool)
    texts = generation_config.stop_strings
    stop_strings = StopStringCriteria(tokenizer, texts) if texts else None
    rows, ids, mask = torch.arange(len(prompt_ids), device=prompt_ids.device), prompt_ids, prompt_mask
    # Images of a later turn are read with all before them.
    keeps = witness is not None and witness.caches is not None and pictures is None
    cache = witness.cache_before(ids, mask) if keeps else None
    while len(rows):
        observe = None if witness is None else witness.of(rows + first_row, ids.shape[1] - start)
        ended = Ended(generation_config.eos_token_id, stop_strings, _may_split(generation_config), observe)
        # A cache holds the states of the images already.
        unread = pictures is not None and cache is None
        seen_too = pictures[rows].inputs(ids, mask.argmax(1).tolist()) if unread else {}
        with plainly(policy), nullcontext() if witness is None else witness.watching(policy):
            output = policy.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=_rest_of(generation_config, ids.shape[1] - start, cache),
                logits_processor=LogitsProcessorList([OnlyFinite()]),
                stopping_criteria=StoppingCriteriaList([ended]),
                **({"tokenizer": tokenizer} if stop_strings is not None else {}),
                **({"cache": cache} if cache is not None else {}),
                **seen_too,
            )
        ids = output.sequences
        generated = ids[:, start:]
        responses[rows, : generated.shape[1]] = generated
        lengths[rows], is_ended[rows] = ended.lengths - start, ended.has_ended
        if keeps:
            witness.keep(rows + first_row, output, mask, ended)
        goes_on = ~ended.has_ended
        if generated.shape[1] >= longest or not goes_on.any() or not ended.has_split:
            break
        remaining = goes_on.nonzero().squeeze(1)
        # Other caches may not allow selecting rows: the continuing rows are then read again from their beginning.
        cache = output.cache if _selects_rows(output.cache, policy) else None
        if cache is not None:
            cache.batch_select_indices(remaining)
        new = mask.new_ones(len(remaining), ids.shape[1] - mask.shape[1])
        rows, ids, mask = rows[remaining], ids[remaining], torch.cat((mask[remaining], new), dim=1)
    width = max(int(lengths.max()), 1)
    mask = (torch.arange(width, device=lengths.device) < lengths.unsqueeze(1)).long()
    response_ids = responses[:, :width].masked_fill(mask == 0, generation_config.pad_token_id)
    return {"response_ids": response_ids, "response_mask": mask, "is_ended": is_ended}


def _fast_options(
    policy: PreTrainedModel, prompt_ids: torch.Tensor, generation_config: GenerationConfig
) -> Options | None:
    """Return the options of decoding over a ragged cache; `None` where `generate` must, and a line says why once."""
    with plainly(policy), without_cpu_autocast(policy):
        reason = undecodable_reason(policy, prompt_ids.shape[1] + generation_config.max_new_tokens)
        if reason is None:
            try:
                return read_options(policy, generation_config, None, prompt_ids.shape[1])
            except InputError as error:
                reason = str(error)
    warn_of_generate(policy, reason)
    return None


def _continue(
    policy: PreTrainedModel,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    options: Options,
    witness: SampledLogprobs | None,
    first_row: int,
) -> dict[str, torch.Tensor]:
    """Sample all responses over a ragged cache; see `_generate_together`."""
    options.sampler.processors.append(OnlyFinite())

    def observe(
        steps: torch.Tensor,
        rows: torch.Tensor,
        logits: torch.Tensor,
        states: torch.Tensor | None,
        tokens: torch.Tensor,
    ) -> None:
        if witness is not None:
            witness.note(rows + first_row, steps, logits, states, tokens)

    more = {"with_states": witness is not None and witness.value_head is not None}
    more["turns"] = None if witness is None else witness.turns_of(len(prompt_ids))
    with plainly(policy), without_cpu_autocast(policy):
        new = continued(policy, prompt_ids, prompt_mask, options, packed=True, observe=observe, **more)
    mask = (torch.arange(new.tokens.shape[1], device=new.lengths.device) < new.lengths.unsqueeze(1)).long()
    return {"response_ids": new.tokens, "response_mask": mask, "is_ended": new.has_ended}


def _may_split(config: GenerationConfig) -> bool:
    """Return whether the rows may go on in several calls of `generate`."""
    is_counted = any(getattr(config, name, None) for name in COUNTED_FROM_THE_PROMPT)
    return config.cache_implementation in (None, "dynamic") and not is_counted


def _selects_rows(cache: object, policy: nn.Module) -> bool:
    """Return whether rows of a cache can be selected.

    States of linear attention cannot, nor can the values of a batch that Qwen2-VL and related models keep on the
    model: the shift of a row's positions by its images.
    """
    if any(getattr(module, "rope_deltas", None) is not None for module in policy.modules()):
        return False
    return type(cache) is DynamicCache and all(hasattr(layer, "batch_select_indices") for layer in cache.layers)


def _joined(parts: Sequence[dict[str, torch.Tensor]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Return the rows of all parts, padded to the widest."""
    width = max(part["response_ids"].shape[1] for part in parts)
    wide = {}
    for name, value in (("response_ids", pad_token_id), ("response_mask", 0)):
        padded = [nn.functional.pad(part[name], (0, width - part[name].shape[1]), value=value) for part in parts]
        wide[name] = torch.cat(padded)
    return {**wide, "is_ended": torch.cat([part["is_ended"] for part in parts])}


def _rest_of(config: GenerationConfig, done: int, cache: DynamicCache | None) -> GenerationConfig:
    """Return the same settings for responses with `done` tokens already; `generate` returns its cache too."""
    rest = copy(config)
    rest.return_dict_in_generate = True
    if done or cache is not None:
        rest.cache_implementation = None
    if not done:
        return rest
    rest.max_new_tokens = config.max_new_tokens - done
    if config.min_new_tokens is not None:
        rest.min_new_tokens = max(config.min_new_tokens - done, 0)
    return rest
