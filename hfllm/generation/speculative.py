"""Speculative decoding: a draft guesses several tokens, one run of the target judges them all.

Leviathan et al. 2023, arXiv:2211.17192, algorithm 1, for a batch whose rows accept different numbers of tokens. Greedy
output is the target's own, and samples follow the target's distribution.

    output = speculative_generate(model, ModelDraft(small), **tokenizer(texts, return_tensors="pt"), max_new_tokens=64)
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from hfllm.errors import InputError
from hfllm.generation.drafts import Draft, ModelDraft, Proposal, Rows
from hfllm.generation.lookahead import FixedLookahead, Lookahead, as_lookahead
from hfllm.generation.options import Options, read_options
from hfllm.generation.ragged_cache import RaggedModel, check_model, compiled_forward, padded_right

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

# Compiled shapes include the cache's size, which is rounded up to this many tokens so that it seldom changes.
COMPILED_BLOCK = 128


@dataclass
class Statistics:
    """What a run has seen, over all rows.

    Attributes:
        tokens: generated tokens that were kept.
        target_calls: runs of the target, each counted once for every row in it; the prompt's is left out.
        drafted: drafted tokens.
        tested: drafted tokens that the target judged: up to the first rejected one of each draft.
        accepted: drafted tokens that were right.
        steps: drafted tokens a row by run of the target, in order.
    """

    tokens: int = 0
    target_calls: int = 0
    drafted: int = 0
    tested: int = 0
    accepted: int = 0
    steps: list[int] = field(default_factory=list)

    @property
    def acceptance_rate(self) -> float:
        """Share of the judged tokens that were right: the maximum-likelihood estimate of the paper's alpha."""
        return self.accepted / self.tested if self.tested else 0.0

    @property
    def tokens_per_target_call(self) -> float:
        """Tokens that a row gains by one run of the target."""
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
    lookahead: int | str | Lookahead = "adaptive",
    generator: torch.Generator | None = None,
    compile: bool = False,
    **kwargs: Any,
) -> SpeculativeOutput:
    """Continue prompts as `model.generate` would, with fewer runs of the model.

    Args:
        model: the target, any causal language model of transformers.
        draft: a `Draft`, a smaller model with the same tokenizer, or `None` for plain decoding over the same cache.
        input_ids: (B, S) prompts, padded on either side.
        attention_mask: (B, S), 0 at padding; by default nothing is.
        generation_config: transformers' options. `max_new_tokens`, `do_sample`, `temperature`, `top_k`, `top_p`,
            `min_p`, `eos_token_id`, `pad_token_id` and whatever else looks at the logits alone.
        lookahead: tokens to draft before the target judges; `"adaptive"` follows the acceptance.
        generator: the source of randomness; by default torch's own.
        compile: run the models through `torch.compile` on fixed shapes. The first calls take long; rows that have
            ended stay in the batch.
        kwargs: single options over `generation_config`, as `generate` takes them.

    Raises:
        InputError: for a model, a draft or an option that this cannot work with.
    """
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    check_prompts(input_ids, attention_mask)
    check_model(model)
    options = read_options(model, generation_config, generator, input_ids.shape[1], **kwargs)
    if draft is not None and not hasattr(draft, "propose"):
        draft = ModelDraft(draft)
    lookahead = FixedLookahead(0) if draft is None else as_lookahead(lookahead, draft.cost_ratio(model))
    run = _Run(model, draft, options, lookahead, input_ids, attention_mask, compile)
    while run.is_running():
        run.step()
    return SpeculativeOutput(run.sequences(input_ids), run.statistics)


class _Run:
    """The state of one call: rows that still run, and the place where all of them end up."""

    def __init__(
        self,
        model: "PreTrainedModel",
        draft: Draft | None,
        options: Options,
        lookahead: Lookahead,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        compile: bool,
    ):
        self.draft, self.options, self.lookahead, self.compile = draft, options, lookahead, compile
        prompt = attention_mask.sum(1)
        capacity = int(prompt.max()) + options.max_new_tokens + lookahead.maximum + 1
        check_context(model, capacity - lookahead.maximum - 1)
        if compile:
            capacity = -(-capacity // COMPILED_BLOCK) * COMPILED_BLOCK
        self.prompt, self.limits = prompt, prompt + options.max_new_tokens
        self.results = padded_right(input_ids, attention_mask, capacity)
        self.ends = prompt.clone()
        # Rows that still run, by their number in the batch.
        self.numbers = torch.arange(len(prompt), device=input_ids.device)
        self.done = torch.zeros_like(prompt, dtype=torch.bool)
        self.rows = self._rows(self.results.clone(), prompt.clone())
        self.target = RaggedModel(model, capacity, compiled_forward(model) if compile else None)
        self.target.prefill(self.rows.tokens[:, : self.rows.longest - 1], self.rows.last)
        self.statistics = Statistics()
        if draft is not None and lookahead.maximum:
            draft.begin(self.target, self.rows, compile)

    def is_running(self) -> bool:
        return len(self.numbers) > 0 and not bool(self.done.all())

    def step(self) -> None:
        """Draft, judge, append; then let go of rows that have ended."""
        rows = self.rows
        proposal = self._proposal()
        window = torch.cat((rows.tokens.gather(1, rows.lengths.unsqueeze(1) - 1), proposal.tokens), dim=1)
        steps = torch.arange(window.shape[1], device=window.device)
        columns = rows.lengths.unsqueeze(1) - 1 + steps
        logits = self.target(window, columns, rows.last, rows.longest + len(steps) - 1)
        accepted, following = self.options.sampler.accept(proposal.tokens, proposal.probs, logits, proposal.counts)
        # The accepted drafts and the token after them, which takes the place of the first rejected one.
        fresh = torch.cat((proposal.tokens, following.unsqueeze(1)), dim=1)
        fresh.scatter_(1, accepted.unsqueeze(1), following.unsqueeze(1))
        rows.tokens.scatter_(1, columns + 1, fresh)
        is_eos = torch.isin(fresh, self.options.eos_token_ids) & (steps <= accepted.unsqueeze(1))
        first_eos = torch.where(is_eos.any(1), is_eos.long().argmax(1), len(steps))
        gained = torch.minimum(torch.minimum(accepted, first_eos) + 1, self.limits[self.numbers] - rows.lengths)
        gained = gained.masked_fill(self.done, 0)
        self._count(proposal, accepted, gained)
        lengths = rows.lengths + gained
        self.done |= (first_eos < gained) | (lengths >= self.limits[self.numbers])
        self.rows = self._rows(rows.tokens, lengths)
        if bool(self.done.any()):
            self._let_go()

    def _proposal(self) -> Proposal:
        """Drafted tokens, as many as the lookahead says and the rows have room for."""
        rows, steps = self.rows, self.lookahead.steps()
        room = int((self.limits[self.numbers] - rows.lengths).masked_fill(self.done, 0).max()) - 1
        steps = min(steps, room)
        if steps > 0:
            proposal = self.draft.propose(rows, steps, self.options.sampler)
        else:
            none = torch.zeros_like(rows.lengths)
            proposal = Proposal(rows.tokens[:, :0], none)
        missing = self.lookahead.maximum - proposal.tokens.shape[1]
        if self.compile and missing:
            # One shape for every run of the target; the counts say that these are no drafts.
            proposal.tokens = torch.nn.functional.pad(proposal.tokens, (0, missing))
            if proposal.probs is not None:
                proposal.probs = torch.nn.functional.pad(proposal.probs, (0, 0, 0, missing))
        return proposal

    def _count(self, proposal: Proposal, accepted: torch.Tensor, gained: torch.Tensor) -> None:
        """Add to the statistics; tokens behind the end of a row were judged all the same."""
        running = ~self.done
        tested = torch.minimum(accepted + 1, proposal.counts)
        sums = torch.stack((gained, running, proposal.counts * running, tested * running, accepted * running)).sum(1)
        tokens, calls, drafted, tested, accepted = sums.tolist()
        seen = self.statistics
        seen.tokens, seen.target_calls = seen.tokens + tokens, seen.target_calls + calls
        seen.drafted, seen.tested, seen.accepted = (
            seen.drafted + drafted,
            seen.tested + tested,
            seen.accepted + accepted,
        )
        seen.steps.append(drafted // max(calls, 1))
        self.lookahead.update(accepted, tested)

    def _rows(self, tokens: torch.Tensor, lengths: torch.Tensor) -> Rows:
        shortest, longest = (int(value) for value in lengths.aminmax())
        return Rows(tokens, lengths, self.limits[self.numbers] - 1, longest, shortest)

    def _let_go(self) -> None:
        """Note down rows that have ended and, unless shapes must stay, drop them."""
        ended = self.numbers[self.done]
        self.results[ended], self.ends[ended] = self.rows.tokens[self.done], self.rows.lengths[self.done]
        if self.compile:
            return
        kept = (~self.done).nonzero().squeeze(1)
        self.numbers, self.done = self.numbers[kept], self.done[kept]
        if len(kept):
            self.rows = self._rows(self.rows.tokens[kept], self.rows.lengths[kept])
            self.target.cache.keep(kept)
            if self.draft is not None and self.lookahead.maximum:
                self.draft.keep(kept)

    def sequences(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, S): the prompts as they were given, then the new tokens, padded on the right."""
        longest = int((self.ends - self.prompt).max())
        columns = self.prompt.unsqueeze(1) + torch.arange(longest, device=input_ids.device)
        new = self.results.gather(1, columns.clamp(max=self.results.shape[1] - 1))
        new = new.masked_fill(columns >= self.ends.unsqueeze(1), self.options.pad_token_id)
        return torch.cat((input_ids, new), dim=1)


def check_prompts(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> None:
    """Refuse what holds no prompts.

    Raises:
        InputError: naming the shape or the row.
    """
    if input_ids.dim() != 2 or input_ids.shape != attention_mask.shape:
        raise InputError(
            f"input_ids of shape {tuple(input_ids.shape)} and attention_mask of shape {tuple(attention_mask.shape)}: "
            "expected (rows, tokens) for both"
        )
    empty = (attention_mask.sum(1) == 0).nonzero().flatten().tolist()
    if empty or not len(input_ids):
        raise InputError(f"row {empty[0] if empty else 0} of input_ids has no token: give at least one, such as bos")


def check_context(model: "PreTrainedModel", length: int) -> None:
    """Refuse sequences that a table of learned positions does not reach.

    Raises:
        InputError: naming both lengths.
    """
    config = model.config.get_text_config(decoder=True)
    context, rotary = getattr(config, "max_position_embeddings", None), getattr(config, "rope_parameters", None)
    if context is not None and rotary is None and length > context:
        raise InputError(
            f"prompt and max_new_tokens make {length} tokens, but {config.model_type} has positions for {context}: "
            "shorten the prompt or max_new_tokens"
        )
