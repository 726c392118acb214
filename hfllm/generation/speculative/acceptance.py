"""Speculative decoding's options, acceptance rule and expected speedup (Leviathan et al. 2023, arXiv:2211.17192).

Shapes: B rows, G drafted tokens of each, V vocabulary size. Rows may have fewer than G drafted tokens; `counts` says
how many, and later entries are ignored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hfllm.errors import InputError, refuse_if

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase


# ---- acceptance ----


def residual(target_probs: torch.Tensor, draft_probs: torch.Tensor) -> torch.Tensor:
    """Return `norm(max(p - q, 0))`, for replacing a rejected token (section 2.3), shape (..., V).

    Where p and q are equal, tokens can be rejected only through rounding, and p itself is returned.
    """
    rest = (target_probs - draft_probs).clamp(min=0)
    total = rest.sum(-1, keepdim=True)
    return torch.where(total > 0, rest / total, target_probs)


def acceptance_probability(target_probs: torch.Tensor, draft_probs: torch.Tensor) -> torch.Tensor:
    """Return `min(1, p / q)` of drafted tokens, elementwise; q is above 0 for any drawn token."""
    return (target_probs / draft_probs).clamp(max=1.0)


def accept_sampled(
    draft_tokens: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target_probs: torch.Tensor,
    counts: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accept drafted tokens with an output following the target's distribution (algorithm 1 of the paper).

    Args:
        draft_tokens: (B, G), drawn from the draft's distributions of their positions.
        draft_probs: (B, G, V), these distributions q; `None` when all tokens were certain (q = 1), as for n-grams
            of the prompt.
        target_probs: (B, G + 1, V), the target's distributions p after the same temperature, top-k and top-p.
        counts: (B,) number of tokens that each row has drafted; by default G.
        generator: the source of randomness.

    Returns:
        How many of each row's tokens are accepted, (B,), and the next token, (B,): from the residual
        distribution after a rejection, from the target's own after the last draft.
    """
    rows, drafted = draft_tokens.shape
    device = target_probs.device
    counts = torch.full((rows,), drafted, device=device) if counts is None else counts
    chosen = draft_tokens.unsqueeze(-1)
    p_chosen = target_probs[:, :drafted].gather(-1, chosen).squeeze(-1)
    q_chosen = torch.ones_like(p_chosen) if draft_probs is None else draft_probs.gather(-1, chosen).squeeze(-1)
    draws = torch.rand(rows, drafted, generator=generator, device=device, dtype=target_probs.dtype)
    accepted = leading(draws < acceptance_probability(p_chosen, q_chosen), counts)
    at = accepted.view(-1, 1, 1)
    p = target_probs.gather(1, at.expand(-1, 1, target_probs.shape[-1])).squeeze(1)
    if drafted == 0:
        return accepted, draw(p, generator)
    at = at.clamp(max=drafted - 1)
    if draft_probs is None:
        q = torch.zeros_like(p).scatter_(1, draft_tokens.gather(1, at.squeeze(-1)), 1.0)
    else:
        q = draft_probs.gather(1, at.expand(-1, 1, p.shape[-1])).squeeze(1)
    rejected = (accepted < counts).unsqueeze(-1)
    return accepted, draw(torch.where(rejected, residual(p, q), p), generator)


def accept_greedy(
    draft_tokens: torch.Tensor, target_tokens: torch.Tensor, counts: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accept drafted tokens as long as they are the target's own choice.

    Args:
        draft_tokens: (B, G).
        target_tokens: (B, G + 1), the most probable tokens at the positions and after the last.
        counts: (B,) number of tokens that each row has drafted; by default G.

    Returns:
        How many of each row's tokens are accepted, (B,), and the target's next choice, (B,).
    """
    rows, drafted = draft_tokens.shape
    counts = torch.full((rows,), drafted, device=target_tokens.device) if counts is None else counts
    accepted = leading(draft_tokens == target_tokens[:, :drafted], counts)
    return accepted, target_tokens.gather(1, accepted.unsqueeze(1)).squeeze(1)


def leading(passes: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Count the leading `True` among the first `counts` of each row: (B, G) and (B,) to (B,)."""
    within = torch.arange(passes.shape[1], device=passes.device) < counts.unsqueeze(1)
    return (passes & within).long().cumprod(1).sum(1)


def draw(probs: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw one token per row from its distribution: (B, V) to (B,).

    Raises:
        FloatingPointError: for a distribution that is not finite, on a CPU.
    """
    if probs.device.type != "cpu":
        return torch.multinomial(probs, 1, generator=generator).squeeze(1)
    # There `multinomial` draws a number per token of the vocabulary. One per row is enough: the first token whose
    # cumulative probability is above it, in double precision, so that a long vocabulary adds up to no less than it is.
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    if not bool(total.isfinite().all()):
        raise FloatingPointError("the distribution that tokens are drawn from holds NaN, or is not finite")
    number = torch.rand(total.shape, generator=generator, dtype=torch.float64) * total
    # Below the total, where a token of probability 0 at the end would be the first above it.
    number = number.minimum(total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, number, right=True).squeeze(1)


def expected_tokens(alpha: float, gamma: float) -> float:
    """Return the expected tokens per run of the target: `(1 - alpha^(gamma + 1)) / (1 - alpha)` (equation 1).

    Args:
        alpha: probability that a drafted token is accepted, in [0, 1].
        gamma: drafted tokens, at least 0.
    """
    return float(gamma + 1) if alpha == 1 else (1 - alpha ** (gamma + 1)) / (1 - alpha)


def speedup(alpha: float, gamma: float, c: float) -> float:
    """Return the expected speedup over plain decoding, `expected_tokens / (gamma * c + 1)` (theorem 3.8).

    Args:
        alpha: probability that a drafted token is accepted.
        gamma: drafted tokens.
        c: time of one draft step, in runs of the target. The theorem assumes the target's time to be the same for
            gamma + 1 tokens as for one; if an additional token costs a share v of a run, use `c + v`.
    """
    return expected_tokens(alpha, gamma) / (gamma * c + 1)


def operations(alpha: float, gamma: float, c_hat: float) -> float:
    """Return the expected factor on operations, `(gamma * c_hat + gamma + 1) / expected_tokens` (theorem 3.11).

    Args:
        alpha: probability that a drafted token is accepted.
        gamma: drafted tokens.
        c_hat: operations of one draft step, relative to the target's for one token.
    """
    return (gamma * c_hat + gamma + 1) / expected_tokens(alpha, gamma)


def optimal_num_draft_tokens(alpha: float, c: float, maximum: int = 32) -> int:
    """Return the number of drafted tokens, from 0 to `maximum`, with the largest `speedup` (section 3.5).

    0 means that drafting does not pay; this holds if and only if `alpha <= c` (corollary 3.9).
    """
    return max(range(maximum + 1), key=lambda gamma: speedup(alpha, gamma, c))


# ---- options ----
#
# Options of speculative decoding, read from the options of transformers' `generate`.


# Processors depending only on the logits. Others depend on earlier tokens, possibly unverified drafts.
STATELESS = (
    *("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TypicalLogitsWarper"),
    *("TopHLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper", "SuppressTokensLogitsProcessor"),
    *("InfNanRemoveLogitsProcessor", "LogitNormalization"),
)
# Options with changes of or additions to the result, and their values without effect.
REFUSED = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "stop_strings": (None,),
    "max_time": (None,),
    "penalty_alpha": (None,),
    "dola_layers": (None,),
    "output_scores": (None, False),
    "output_logits": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "return_dict_in_generate": (None, False),
    "prompt_lookup_num_tokens": (None,),
    "use_mtp": (None, False),
    # Options comparing with the prompt; their processors need it.
    "encoder_repetition_penalty": (None, 1.0),
    "encoder_no_repeat_ngram_size": (None, 0),
}


@dataclass
class Sampler:
    """Chooses tokens from logits: the most probable one, or drawn after temperature, top-k, top-p and so on.

    Attributes:
        do_sample: draw, or take the most probable.
        processors: transformers' logits processors, in its order.
        generator: the source of randomness.
    """

    do_sample: bool
    processors: "LogitsProcessorList"
    generator: torch.Generator | None = None

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Return processed logits in fp32, (..., V) as the logits."""
        scores = logits.to(torch.float32).flatten(0, -2)
        # One by one: the list reads each one's signature at every token.
        for processor in self.processors:
            scores = processor(None, scores)
        return scores.view(logits.shape)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the distribution to draw from, (..., V)."""
        return self.scores(logits).softmax(-1)

    def greedy(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the most probable tokens, (...)."""
        return self.scores(logits).argmax(-1)

    def draft(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return one token per row from logits (B, V), and its distribution if it was drawn."""
        if not self.do_sample:
            return self.greedy(logits), None
        probs = self.probabilities(logits)
        return draw(probs, self.generator), probs

    def accept(
        self, draft_tokens: torch.Tensor, draft_probs: torch.Tensor | None, logits: torch.Tensor, counts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return accepted counts and next tokens of the rows; see `accept_sampled`."""
        if not self.do_sample:
            choice = self.greedy(logits)
            # Plain decoding, where nothing has to be accepted.
            return accept_greedy(draft_tokens, choice, counts) if draft_tokens.numel() else (counts, choice[:, 0])
        probs = self.probabilities(logits)
        return accept_sampled(draft_tokens, draft_probs, probs, counts, self.generator)


@dataclass
class Options:
    """Options of the decoding loop: sampler, length, and a row's end and padding tokens."""

    sampler: Sampler
    max_new_tokens: int
    eos_token_ids: frozenset[int]
    pad_token_id: int


def read_options(
    model: "PreTrainedModel",
    generation_config: "GenerationConfig | None",
    generator: torch.Generator | None,
    prompt_length: int,
    **kwargs: Any,
) -> Options:
    """Read options as `model.generate` does: arguments override `generation_config`, which overrides the model's own.

    Raises:
        InputError: for an option without effect here or impossible with drafts.
    """
    config, unknown = model._prepare_generation_config(generation_config, **kwargs)
    refuse_if(unknown, f"speculative decoding takes no argument {', '.join(sorted(unknown))}")
    check_config(config)
    if "cache_implementation" in kwargs:
        raise InputError("cache_implementation: speculative decoding has its own cache; leave it out")
    most = config.max_new_tokens
    if most is None or most < 1:
        raise InputError(f"max_new_tokens={most}: give the maximum number of tokens to generate, at least 1")
    model._prepare_special_tokens(config, True, device=model.device)
    processors = model._get_logits_processor(config, input_ids_seq_length=prompt_length, device=model.device)
    return make_options(config, processors, config.max_new_tokens, generator)


def check_config(config: "GenerationConfig", handled: Sequence[str] = ()) -> None:
    """Refuse options without effect here, except the caller's."""
    for option, harmless in REFUSED.items():
        value = getattr(config, option, None)
        if value not in harmless and option not in handled:
            raise InputError(
                f"{option}={value!r} cannot be combined with speculative decoding, which follows one sequence per "
                "row: leave it out, or use model.generate"
            )


def make_options(
    config: "GenerationConfig",
    processors: "LogitsProcessorList",
    max_new_tokens: int,
    generator: torch.Generator | None,
) -> Options:
    """Make options from a prepared `generation_config` and its logits processors.

    Raises:
        InputError: for a processor depending on earlier tokens.
    """
    for processor in processors:
        if type(processor).__name__ not in STATELESS:
            raise InputError(
                f"{type(processor).__name__} depends on earlier tokens, which speculative decoding does not support: "
                "set its option to the default, or use model.generate"
            )
    eos, pad = config._eos_token_tensor, config._pad_token_tensor
    return Options(
        sampler=Sampler(bool(config.do_sample), processors, generator),
        max_new_tokens=max_new_tokens,
        eos_token_ids=frozenset() if eos is None else frozenset(eos.view(-1).tolist()),
        pad_token_id=0 if pad is None else int(pad.view(-1)[0]),
    )


def check_same_vocabulary(
    target: "PreTrainedModel",
    draft: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    draft_tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> None:
    """Refuse a draft model with other tokens than the target's."""
    instead = (
        "use prompt lookup or early exit as the draft, or train one with the target's tokenizer "
        "(hfllm pretrain --tokenizer_name_or_path)"
    )
    sizes = [model.config.get_text_config(decoder=True).vocab_size for model in (target, draft)]
    refuse_if(sizes[0] != sizes[1], f"the draft model has vocab_size={sizes[1]}, the target {sizes[0]}: {instead}")
    if tokenizer is None or draft_tokenizer is None:
        return
    ours, theirs = tokenizer.get_vocab(), draft_tokenizer.get_vocab()
    if ours != theirs:
        different = next(token for token in sorted({*ours, *theirs}) if ours.get(token) != theirs.get(token))
        raise InputError(
            f"the draft model has another tokenizer: token {different!r} is number {theirs.get(different)} there, "
            f"{ours.get(different)} in the target's; {instead}"
        )
