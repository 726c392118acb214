"""Greedy coordinate gradient: search for tokens after a question that make a given beginning of an answer likely.

As in Zou et al. 2023 (arXiv:2307.15043, algorithm 1): the gradient of the target's loss with respect to the one-hot
tokens of the suffix says which replacements promise most; a batch of random ones among these is tried, and the best is
kept. In one point it differs: the suffix that is kept is the best so far, not the best of the last batch.

    found = attack(model, AttackTarget.of_question(tokenizer, question, "Sure, first"), AttackSettings())

A suffix is to be typed, so that it counts only if its text is read as the same tokens again. Tokens that cannot be
typed are never tried, and of the others only replacements after which the whole question survives.

`random_search` is the control: the same search, as often, with replacements drawn from all tokens. An attack that does
not beat it has learned nothing from the gradient.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hfllm.errors import InputError
from hfllm.models.loading.saved import max_length_of
from hfllm.rewards.passes import evaluating, pass_precision

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    # Returns candidates for one place of a suffix.
    Propose = Callable[[list[int], int, random.Random], list[int]]


@dataclass(frozen=True)
class AttackSettings:
    """How long and how widely is searched.

    Args:
        num_tokens: of the suffix.
        steps: of the search.
        top_k: replacements of each token that the gradient may propose.
        num_candidates: suffixes that a step tries.
        batch_size: of them in one pass.
        seed: of the draws.
    """

    num_tokens: int = 8
    steps: int = 40
    top_k: int = 64
    num_candidates: int = 64
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self):
        for name in ("num_tokens", "steps", "top_k", "num_candidates", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"a gradient attack's {name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class AttackTarget:
    """Where the suffix goes, and what it is to make likely.

    Args:
        tokenizer: the model's.
        before: text before the suffix: the chat template's beginning and the question.
        after: text between suffix and answer, such as the beginning of the assistant's turn.
        target: the beginning of an answer.
    """

    tokenizer: "PreTrainedTokenizerBase"
    before: str
    after: str
    target: str

    @classmethod
    def of_question(
        cls, tokenizer: "PreTrainedTokenizerBase", question: str, target: str, uses_chat_template: bool = True
    ) -> "AttackTarget":
        """Return the target of a question, which the suffix follows after a space.

        Raises:
            InputError: for a chat template that does not write the question as it is.
        """
        if not uses_chat_template:
            return cls(tokenizer, question, "", target)
        turns = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        before, found, after = text.rpartition(question)
        if not found:
            raise InputError(f"the chat template does not write the question {question!r:.60} as it is")
        return cls(tokenizer, before + question, after, target)

    def parts(self) -> tuple[list[int], list[int], list[int]]:
        """Return the tokens before the suffix, after it, and of the target."""
        before, after, target = map(self._ids, (self.before, self.after, self.target))
        if not before or not target:
            raise InputError("a gradient attack needs a question and a target of at least a token each")
        return before, after, target

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def survive(self, suffixes: Sequence[Sequence[int]]) -> list[bool]:
        """Return of each suffix whether the text of question and suffix is read as the same tokens again."""
        before, after, _ = self.parts()
        texts = [self.before + text + self.after for text in self.tokenizer.batch_decode([list(s) for s in suffixes])]
        read = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [list(ids) == [*before, *suffix, *after] for ids, suffix in zip(read, suffixes, strict=True)]

    def typed_tokens(self) -> list[int]:
        """Return the tokens that can be typed after a word: printable, no special ones, and read as themselves."""
        special = {number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(self.tokenizer.all_special_ids)
        ids = [number for number in sorted(self.tokenizer.get_vocab().values()) if number not in special]
        texts = self.tokenizer.batch_decode([[number] for number in ids])
        # Each stands behind a word, as most places of a suffix do.
        base = self._ids("a")
        read = self.tokenizer([f"a{text}" for text in texts], add_special_tokens=False)["input_ids"]
        return [
            number
            for number, text, again in zip(ids, texts, read, strict=True)
            if text.strip() and text.isprintable() and "\N{REPLACEMENT CHARACTER}" not in text
            if list(again) == [*base, number]
        ]


@dataclass(frozen=True)
class Attack:
    """What a search found.

    Args:
        suffix: the text, as it is typed after the question.
        tokens: its tokens.
        loss_before: mean negative log-likelihood of the target's tokens with the first suffix, in nats.
        loss_after: the same with the best one.
        evaluations: suffixes that were tried, a gradient counted as one.
    """

    suffix: str
    tokens: list[int]
    loss_before: float
    loss_after: float
    evaluations: int


def attack(model: "PreTrainedModel", target: AttackTarget, settings: AttackSettings = AttackSettings()) -> Attack:
    """Return the suffix that a greedy coordinate gradient search finds.

    Args:
        model: any causal model whose input embeddings are a matrix in floating point.
        target: the question and the beginning of an answer.
        settings: of the search.

    Raises:
        InputError: for a model without such a matrix, a question that leaves no room, or no token that can be typed.
    """
    return _search(model, target, settings, follows_gradient=True)


def random_search(
    model: "PreTrainedModel", target: AttackTarget, settings: AttackSettings = AttackSettings()
) -> Attack:
    """Return the suffix that as many evaluations of random replacements find: the control of `attack`."""
    return _search(model, target, settings, follows_gradient=False)


def _search(
    model: "PreTrainedModel", target: AttackTarget, settings: AttackSettings, follows_gradient: bool
) -> Attack:
    import torch

    rng = random.Random(f"attack-{settings.seed}")
    parts, allowed = target.parts(), target.typed_tokens()
    _check_room(model, parts, settings)
    suffix = _first_suffix(target, allowed, settings, rng)
    with evaluating(model), pass_precision(model):
        first = best = _losses(model, parts, [suffix], settings)[0]
        evaluations = 1
        for _ in range(settings.steps):
            proposed: list[list[int]] = [allowed] * settings.num_tokens
            count = settings.num_candidates + 1
            if follows_gradient:
                with torch.enable_grad():
                    gradient = _token_gradient(model, parts, suffix)
                choices = torch.tensor(allowed, device=gradient.device)
                top = gradient[:, choices].topk(min(settings.top_k, len(allowed)), largest=False).indices
                proposed, count = choices[top].tolist(), settings.num_candidates
            candidates = _candidates(target, suffix, proposed, count, rng)
            evaluations += settings.num_candidates + 1
            if not candidates:
                continue
            losses = _losses(model, parts, candidates, settings)
            place = min(range(len(losses)), key=losses.__getitem__)
            if losses[place] < best:
                best, suffix = losses[place], candidates[place]
    return Attack(target.tokenizer.decode(suffix), suffix, first, best, evaluations)


def _check_room(model: "PreTrainedModel", parts: tuple[list[int], ...], settings: AttackSettings) -> None:
    longest, length = max_length_of(model.config), sum(map(len, parts)) + settings.num_tokens
    if longest is not None and length > longest:
        raise InputError(f"a question, a suffix and a target of {length} tokens do not fit the context of {longest}")


def _first_suffix(
    target: AttackTarget, allowed: Sequence[int], settings: AttackSettings, rng: random.Random
) -> list[int]:
    """Return a suffix of words that survives, as a beginning of the search."""
    words = [number for number in allowed if target.tokenizer.decode([number]).startswith(" ")] or list(allowed)
    for _ in range(100):
        tried = [[rng.choice(words) for _ in range(settings.num_tokens)] for _ in range(8)]
        for suffix, survives in zip(tried, target.survive(tried), strict=True):
            if survives:
                return suffix
    raise InputError("a gradient attack found no suffix that the tokenizer reads again as the same tokens")


def _candidates(
    target: AttackTarget, suffix: list[int], proposed: Sequence[Sequence[int]], count: int, rng: random.Random
) -> list[list[int]]:
    """Return up to `count` suffixes with one token replaced, those that survive being typed."""
    found: list[list[int]] = []
    # Some do not survive; a few draws more, and no end of them.
    for _ in range(4):
        tried = []
        for _ in range(count - len(found)):
            at = rng.randrange(len(suffix))
            tried.append([*suffix[:at], rng.choice(proposed[at]), *suffix[at + 1 :]])
        found += [each for each, survives in zip(tried, target.survive(tried), strict=True) if survives]
        if len(found) == count:
            break
    return found


def _losses(
    model: "PreTrainedModel",
    parts: tuple[list[int], list[int], list[int]],
    suffixes: Sequence[list[int]],
    settings: AttackSettings,
) -> list[float]:
    """Return the mean negative log-likelihood of the target's tokens after each suffix, in nats."""
    import torch

    losses: list[float] = []
    with torch.inference_mode():
        for start in range(0, len(suffixes), settings.batch_size):
            rows = suffixes[start : start + settings.batch_size]
            losses += _target_loss(model, parts, rows).tolist()
    return losses


def _target_loss(
    model: "PreTrainedModel", parts: tuple[list[int], list[int], list[int]], suffixes: Sequence[list[int]]
) -> "torch.Tensor":
    """Return the losses of suffixes (B,)."""
    import torch

    before, after, target = parts
    rows = [[*before, *suffix, *after, *target] for suffix in suffixes]
    ids = torch.tensor(rows, device=model.device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    logprobs = logits[:, -len(target) - 1 : -1].float().log_softmax(-1)
    wanted = ids[:, -len(target) :, None]
    loss = -logprobs.gather(-1, wanted)[..., 0].mean(1)
    if not bool(loss.isfinite().all()):
        raise InputError("a gradient attack: the model's logits are not numbers; its weights may be damaged")
    return loss


def _token_gradient(
    model: "PreTrainedModel", parts: tuple[list[int], list[int], list[int]], suffix: list[int]
) -> "torch.Tensor":
    """Return the gradient of the loss by the one-hot tokens of the suffix (tokens, vocabulary).

    It is that by the embeddings times the embedding matrix. The embeddings are caught as they leave their layer, so
    that a model may do with them what it does.
    """
    import torch

    layer = model.get_input_embeddings()
    matrix = getattr(layer, "weight", None)
    if matrix is None or matrix.ndim != 2 or not matrix.is_floating_point():
        raise InputError(f"a gradient attack needs an embedding matrix, and {type(model).__name__} has none")
    caught: list[torch.Tensor] = []

    def catch(module: "torch.nn.Module", inputs: tuple, output: "torch.Tensor") -> "torch.Tensor":
        caught.append(output.detach().requires_grad_(True))
        return caught[-1]

    handle = layer.register_forward_hook(catch)
    try:
        loss = _target_loss(model, parts, [suffix]).sum()
    finally:
        handle.remove()
    (gradient,) = torch.autograd.grad(loss, caught[-1:])
    begin = len(parts[0])
    with torch.no_grad():
        return (gradient[0, begin : begin + len(suffix)].to(matrix.dtype) @ matrix.T).float()
