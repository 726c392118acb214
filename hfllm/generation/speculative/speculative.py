"""Speculative decoding: a draft proposes several tokens, one run of the target verifies them all.

Leviathan et al. 2023, arXiv:2211.17192, algorithm 1, for a batch whose rows accept different numbers of tokens. Greedy
output equals the target's own, and samples follow the target's distribution.

    output = speculative_generate(model, ModelDraft(small), **tokenizer(texts, return_tensors="pt"), max_new_tokens=64)

Or by transformers' own `generate`, with the best known settings; the tokens are the same as from `generate` without
it, or samples of the same distribution:

    model.generate(**batch, max_new_tokens=64, custom_generate=fast_generate)
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from hfllm.errors import InputError, check_positive, refuse_if
from hfllm.generation.packed.decoding import Continuations, Observer, continue_prompts
from hfllm.generation.packed.model import has_int8, unsupported_reason
from hfllm.generation.packed.ragged_model import check_context, check_model, padded_right, ragged_model
from hfllm.generation.packed.turns import Turns
from hfllm.generation.speculative.acceptance import Options, check_config, make_options, read_options
from hfllm.generation.speculative.drafts import (
    Draft,
    DraftLength,
    Int8Draft,
    ModelDraft,
    Proposal,
    Rows,
    as_draft_length,
    weights_read,
)

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

# Compiled shapes include the cache's size, which is rounded up to this many tokens to change it seldom.
COMPILED_BLOCK = 128


@dataclass
class Statistics:
    """Statistics of a run, over all rows.

    Attributes:
        tokens: generated and kept tokens.
        target_calls: runs of the target, counted once per row, including the prompt's.
        drafted: drafted tokens.
        tested: drafted tokens verified by the target: up to the first rejected one of every draft.
        accepted: right drafted tokens.
        steps: drafted tokens per row, by run of the target.
    """

    tokens: int = 0
    target_calls: int = 0
    drafted: int = 0
    tested: int = 0
    accepted: int = 0
    steps: list[int] = field(default_factory=list)

    def add(self, calls: int, drafted: int, tested: int, accepted: int) -> None:
        """Count one run of the target with `calls` rows."""
        self.target_calls += calls
        self.drafted += drafted
        self.tested += tested
        self.accepted += accepted
        self.steps.append(drafted // max(calls, 1))

    def include(self, other: "Statistics") -> None:
        """Count the rows of another call too."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def acceptance_rate(self) -> float:
        """Return the share of verified tokens accepted: the maximum-likelihood estimate of the paper's alpha."""
        return self.accepted / self.tested if self.tested else 0.0

    @property
    def tokens_per_target_call(self) -> float:
        """Return a row's new tokens per run of the target."""
        return self.tokens / self.target_calls if self.target_calls else 0.0


@dataclass
class SpeculativeOutput:
    """`sequences` (B, S) as `generate` returns them, prompt included, and the `statistics` of the run."""

    sequences: torch.Tensor
    statistics: Statistics


@torch.no_grad()
def speculative_generate(
    model: "PreTrainedModel",
    draft: "Draft | PreTrainedModel | None",
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    generation_config: "GenerationConfig | None" = None,
    *,
    num_draft_tokens: int | str | DraftLength = "adaptive",
    generator: torch.Generator | None = None,
    compile: bool = False,
    packed: bool | None = None,
    **kwargs: Any,
) -> SpeculativeOutput:
    """Continue prompts as `model.generate` would, with fewer runs of the model.

    Args:
        model: the target, any causal language model of transformers.
        draft: a `Draft`, a smaller model with the same tokenizer, or `None` for plain decoding over the same cache.
        input_ids: (B, S) prompts, padded on either side.
        attention_mask: (B, S), 0 at padding; by default there is none.
        generation_config: transformers' options. `max_new_tokens`, `do_sample`, `temperature`, `top_k`, `top_p`,
            `min_p`, `eos_token_id`, `pad_token_id` and other options depending only on the logits.
        num_draft_tokens: tokens to draft before the target verifies them; `"adaptive"` follows the acceptance.
        generator: the source of randomness; by default torch's own.
        compile: run the models through `torch.compile` on fixed shapes. The first calls take long; ended rows stay in
            the batch.
        packed: call kernels directly, over packed copies of the weights on a CPU (`hfllm.generation.packed.model`); by
            default for models of the family, and native ones that convert to it, in evaluation mode, with their
            weights copied by the first call.
        kwargs: single options in place of `generation_config`'s, as in `generate`.

    Raises:
        InputError: for an unsupported model, draft or option.
    """
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    check_prompts(input_ids, attention_mask)
    packed = _is_packed(model, compile, packed)
    if not packed:
        check_model(model)
    options = read_options(model, generation_config, generator, input_ids.shape[1], **kwargs)
    return decode(model, draft, input_ids, attention_mask, options, num_draft_tokens, compile, packed)


def decode(
    model: "PreTrainedModel",
    draft: "Draft | PreTrainedModel | None",
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    options: Options,
    num_draft_tokens: int | str | DraftLength = "adaptive",
    compile: bool = False,
    packed: bool | None = None,
    most_rows: int | None = None,
) -> SpeculativeOutput:
    """Decode as `speculative_generate` does, with options already read.

    Args:
        most_rows: of the cache; without drafts other prompts wait for a place (`continue_prompts`), with them each so
            many are decoded together.
    """
    if draft is not None and not hasattr(draft, "propose"):
        draft = ModelDraft(draft)
    packed = _is_packed(model, compile, packed)
    if draft is not None:
        rows = len(input_ids) if packed else None
        draft_length = as_draft_length(num_draft_tokens, draft.cost_ratio(model), model.device.type, rows)
    with many_shapes() if compile else nullcontext():
        if draft is None or not draft_length.maximum:
            return _decode_plainly(model, input_ids, attention_mask, options, compile, packed, most_rows)
        if most_rows is not None and most_rows < len(input_ids):
            parts = zip(input_ids.split(most_rows), attention_mask.split(most_rows), strict=True)
            more = (options, num_draft_tokens, compile, packed)
            return _joined([decode(model, draft, *part, *more) for part in parts], options.pad_token_id)
        run = _Run(model, draft, options, draft_length, input_ids, attention_mask, compile, packed)
        while run.is_running():
            run.step()
    return SpeculativeOutput(run.sequences(input_ids), run.statistics)


def _is_packed(model: "PreTrainedModel", compile: bool, packed: bool | None) -> bool:
    """Return whether to decode over packed weights: by default where this is possible."""
    refuse_if(compile and packed, "packed=True and compile=True exclude each other: leave one out")
    return not compile and unsupported_reason(model) is None if packed is None else packed


def _joined(parts: Sequence[SpeculativeOutput], pad_token_id: int) -> SpeculativeOutput:
    """Return the rows of all parts, padded on the right, and the sums of their statistics."""
    width = max(part.sequences.shape[1] for part in parts)
    padded = [F.pad(part.sequences, (0, width - part.sequences.shape[1]), value=pad_token_id) for part in parts]
    total = Statistics()
    for part in parts:
        total.include(part.statistics)
    return SpeculativeOutput(torch.cat(padded), total)


def _decode_plainly(
    model: "PreTrainedModel",
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    options: Options,
    compile: bool,
    packed: bool,
    most_rows: int | None,
) -> SpeculativeOutput:
    """Decode without drafts: one run and one token per row."""
    new = continued(model, input_ids, attention_mask, options, compile, packed, most_rows=most_rows)
    statistics = Statistics(tokens=int(new.lengths.sum()))
    for running in new.running:
        statistics.add(running, 0, 0, 0)
    return SpeculativeOutput(torch.cat((input_ids, new.tokens), dim=1), statistics)


def continued(
    model: "PreTrainedModel",
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    options: Options,
    compile: bool = False,
    packed: bool | None = None,
    observe: Observer | None = None,
    with_states: bool = False,
    turns: Turns | None = None,
    most_rows: int | None = None,
) -> Continuations:
    """Continue prompts without drafts, as `speculative_generate` does, and return only the new tokens.

    Args:
        observe: called for every token.
        with_states: whether `observe` gets the input of the head.
        turns: what is known of the prompts' beginnings; it gets to know these and the new tokens.
        most_rows: of the cache, where prompts may wait (`continue_prompts`): not with `compile` or `turns`.
    """
    packed = _is_packed(model, compile, packed)
    sizes = attention_mask.sum(1).tolist()
    capacity = max(sizes) + options.max_new_tokens
    check_context(model, capacity)
    if compile:
        capacity = -(-capacity // COMPILED_BLOCK) * COMPILED_BLOCK
    prompts = padded_right(input_ids, attention_mask, max(sizes))
    known = None if turns is None else turns.known(prompts, sizes)
    if known is not None:
        # Rows may be read together, also those with fewer new tokens.
        new = max(size - own for size, own in zip(sizes, known, strict=True))
        capacity = max(capacity, max(known) + new)
    target = ragged_model(model, capacity, compile, packed, with_states)
    if turns is not None:
        turns.fill(target.cache, 0 if known is None else max(known))
    result = continue_prompts(
        target,
        prompts,
        sizes,
        lambda logits, rows, steps: options.sampler.draft(logits)[0],
        options.max_new_tokens,
        options.eos_token_ids,
        options.pad_token_id,
        observe,
        known,
        None if turns is None else turns.leave,
        None if compile or turns is not None else most_rows,
    )
    if turns is not None:
        turns.end(prompts, sizes, result)
    return result


def many_shapes() -> AbstractContextManager:
    """Allow one forward to be compiled for more shapes than torch's default: batches, drafts, cache sizes."""
    import torch._dynamo

    return torch._dynamo.config.patch(recompile_limit=64)


class _Run:
    """The state of one call: rows still running, and all rows' tokens so far.

    Lengths and ends are kept as Python numbers next to the tensors, so a step waits for the device only once.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        draft: Draft,
        options: Options,
        draft_length: DraftLength,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        compile: bool,
        packed: bool,
    ):
        self.draft, self.options, self.draft_length, self.compile = draft, options, draft_length, compile
        self.has_begun = False
        lengths = attention_mask.sum(1).tolist()
        longest = max(lengths) + options.max_new_tokens
        check_context(model, longest)
        capacity = longest + draft_length.maximum + 1
        if compile:
            capacity = -(-capacity // COMPILED_BLOCK) * COMPILED_BLOCK
        # New tokens of the rows, and the rows still running, by their index in the batch.
        self.new: list[list[int]] = [[] for _ in lengths]
        self.running = list(range(len(lengths)))
        self.limits = [length + options.max_new_tokens for length in lengths]
        self.rows = self._rows(padded_right(input_ids, attention_mask, capacity), lengths)
        self.target = ragged_model(model, capacity, compile, packed)
        self.statistics = Statistics()
        self._begin()

    def _begin(self) -> None:
        """Read the prompts, for the first token as in plain decoding; then prepare the draft."""
        rows = self.rows
        logits = self.target.prefill(rows.tokens[:, : max(rows.sizes)], rows.lengths, rows.last, rows.sizes)
        self._verify(Proposal(rows.tokens[:, :0], torch.zeros_like(rows.lengths)), logits)
        if self.is_running():
            self.draft.begin(self.target, self.rows, self.compile)
            self.has_begun = True

    def is_running(self) -> bool:
        return any(not self._has_ended(number) for number in self.running)

    def step(self) -> None:
        """Draft, verify, append; then drop ended rows."""
        rows = self.rows
        proposal = self._proposal()
        drafted = proposal.tokens.shape[1]
        end = rows.lengths.unsqueeze(1) - 1
        window = torch.cat((rows.tokens.gather(1, end), proposal.tokens), dim=1)
        columns = end + torch.arange(drafted + 1, device=end.device)
        level = rows.are_level and drafted == 0
        self._verify(proposal, self.target(window, columns, rows.last, max(rows.sizes) + drafted, level=level))

    def _verify(self, proposal: Proposal, logits: torch.Tensor) -> None:
        """Accept the tokens allowed by the logits (B, G + 1, V), and append them."""
        rows = self.rows
        accepted, following = self.options.sampler.accept(proposal.tokens, proposal.probs, logits, proposal.counts)
        # The accepted drafts and the token after them, in place of the first rejected one.
        fresh = torch.cat((proposal.tokens, following.unsqueeze(1)), dim=1)
        fresh.scatter_(1, accepted.unsqueeze(1), following.unsqueeze(1))
        columns = rows.lengths.unsqueeze(1) + torch.arange(fresh.shape[1], device=fresh.device)
        rows.tokens.scatter_(1, columns, fresh)
        self._append(torch.cat((accepted.unsqueeze(1), proposal.counts.unsqueeze(1), fresh), dim=1).tolist())

    def _proposal(self) -> Proposal:
        """Return as many drafted tokens as the draft length says and the rows have room for."""
        rows, steps = self.rows, self.draft_length.steps()
        # The target adds one token itself.
        room = max(self.limits[number] - size for number, size in zip(self.running, rows.sizes, strict=True)) - 1
        if min(steps, room) > 0:
            proposal = self.draft.propose(rows, min(steps, room), self.options.sampler)
        else:
            proposal = Proposal(rows.tokens[:, :0], torch.zeros_like(rows.lengths))
        missing = self.draft_length.maximum - proposal.tokens.shape[1]
        if self.compile and missing:
            # One shape for every run of the target; the counts mark these as no drafts.
            proposal.tokens = torch.nn.functional.pad(proposal.tokens, (0, missing))
            if proposal.probs is not None:
                proposal.probs = torch.nn.functional.pad(proposal.probs, (0, 0, 0, missing))
        return proposal

    def _append(self, outcome: list[list[int]]) -> None:
        """Append the rows' new tokens, up to their ends, and record accepted and drafted counts."""
        sizes, calls, drafted, tested, accepted = list(self.rows.sizes), 0, 0, 0, 0
        for row, (number, (right, count, *tokens)) in enumerate(zip(self.running, outcome, strict=True)):
            if self._has_ended(number):
                continue
            new = tokens[: min(right + 1, self.limits[number] - sizes[row])]
            stop = next((at for at, token in enumerate(new) if token in self.options.eos_token_ids), len(new))
            new = new[: stop + 1]
            self.new[number] += new
            sizes[row] += len(new)
            calls, drafted = calls + 1, drafted + count
            # Tokens after the end of a row were verified too.
            tested, accepted = tested + min(right + 1, count), accepted + right
            self.statistics.tokens += len(new)
        self.statistics.add(calls, drafted, tested, accepted)
        self.draft_length.update(accepted, tested)
        active_rows = [row for row, number in enumerate(self.running) if self.compile or not self._has_ended(number)]
        tokens = self.rows.tokens
        if len(active_rows) < len(self.running):
            index = torch.tensor(active_rows, device=tokens.device, dtype=torch.long)
            tokens = tokens[index]
            self.target.cache.keep(index)
            if self.has_begun:
                self.draft.keep(index)
            self.running = [self.running[row] for row in active_rows]
        if active_rows:
            self.rows = self._rows(tokens, [sizes[row] for row in active_rows])

    def _has_ended(self, number: int) -> bool:
        new = self.new[number]
        return bool(new) and (len(new) >= self.options.max_new_tokens or new[-1] in self.options.eos_token_ids)

    def _rows(self, tokens: torch.Tensor, sizes: list[int]) -> Rows:
        make = {"device": tokens.device, "dtype": torch.long}
        last = [self.limits[number] - 1 for number in self.running]
        return Rows(tokens, torch.tensor(sizes, **make), torch.tensor(last, **make), sizes)

    def sequences(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return (B, S): the prompts as given, then the new tokens, padded on the right."""
        longest = max(map(len, self.new))
        padded = [new + [self.options.pad_token_id] * (longest - len(new)) for new in self.new]
        return torch.cat((input_ids, input_ids.new_tensor(padded)), dim=1)


def check_prompts(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> None:
    """Refuse input without prompts."""
    if input_ids.dim() != 2 or input_ids.shape != attention_mask.shape:
        raise InputError(
            f"input_ids of shape {tuple(input_ids.shape)} and attention_mask of shape {tuple(attention_mask.shape)}: "
            "expected (rows, tokens) for both"
        )
    empty = (attention_mask.sum(1) == 0).nonzero().flatten().tolist()
    if empty or not len(input_ids):
        raise InputError(f"row {empty[0] if empty else 0} of input_ids has no token: give at least one, such as bos")


# ---- by transformers' own generate ----

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
    most_rows: int | None = None,
    **model_kwargs: Any,
) -> torch.Tensor:
    """Decode faster: pass it to `model.generate` as `custom_generate`, together with its own arguments.

    Args:
        draft: `"auto"` is `recommended_draft(model)`, `None` is no draft; else a `Draft`, or a smaller model with the
            same tokenizer.
        num_draft_tokens, generator: as in `hfllm.generation.speculative.speculative_generate`.
        most_rows: rows of the cache; more prompts wait, and take the places of rows that have ended. By default all
            are decoded together.

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
    if most_rows is not None:
        check_positive(most_rows=most_rows)
    return decode(model, draft, input_ids, mask, options, num_draft_tokens, most_rows=most_rows).sequences
