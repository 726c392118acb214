"""From sampled responses to scores: rewards, weights and scale, and the table of completions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hfllm.data.formats import Message, split_beginning
from hfllm.data.thoughts import OPEN, thinking_message
from hfllm.data.tokenizer import template_errors
from hfllm.errors import InputError
from hfllm.multimodal.processors import without_pictures
from hfllm.rewards.functions import BEGINNING, checked_rewards, reward_columns, reward_name, time_limit, transcript
from hfllm.trainers.ppo.config import PPOConfig
from hfllm.trainers.ppo.formulas import RunningMoments
from hfllm.trainers.ppo.rollout import with_actions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# ---- scores ----


@dataclass
class Scores:
    """The scores of a batch of responses.

    Args:
        total: (B,), the weighted sum minus the penalty for truncated responses.
        per_token: (B, R), the weighted sum of the token-by-token rewards, or `None`.
        parts: each single reward, (B,), unweighted; per-token ones are summed.
        completions: a row per response: prompt, completion, the parts and the total.
    """

    total: torch.Tensor
    per_token: torch.Tensor | None
    parts: dict[str, torch.Tensor]
    completions: list[dict[str, Any]]

    @property
    def reward(self) -> torch.Tensor:
        """Return the whole reward (B,)."""
        return self.total if self.per_token is None else self.total + self.per_token.sum(1)


class Scorer:
    """Calls the reward functions.

    Args:
        rewards: functions `(prompts, completions, **columns)` returning a number per completion, or a list of
            numbers per completion, one per entry of its `completion_ids`.
        weights: one per function.
        tokenizer: the policy's.
    """

    def __init__(
        self,
        rewards: Sequence[Callable[..., list]],
        weights: Sequence[float],
        tokenizer: "PreTrainedTokenizerBase",
        args: PPOConfig,
    ):
        self.rewards, self.weights, self.tokenizer, self.args = rewards, weights, tokenizer, args
        self.names = unique_names([reward_name(reward) for reward in rewards])
        self.moments = RunningMoments()

    def __call__(self, rows: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]) -> Scores:
        """Score the responses of `batch` to the prompts of `rows`.

        A batch of episodes may bring its `prompts` and `completions`, and more `columns` for the functions. Of prompts
        ending with the beginning of the answer, functions get the messages before it, the whole answer as the
        completion, as from TRL's GRPOTrainer, and the beginning, else an empty text, as `completion_beginning`.
        """
        batch = with_actions(batch)
        lengths = batch["response_mask"].sum(1).tolist()
        ids = [row[:length] for row, length in zip(batch["response_ids"].tolist(), lengths, strict=True)]
        prompts = batch.get("prompts") or [row["prompt"] for row in rows]
        completions = batch.get("completions")
        if completions is None:
            before = [
                [token for token, is_real in zip(row, real, strict=True) if is_real]
                for row, real in zip(batch["prompt_ids"].tolist(), batch["prompt_mask"].tolist(), strict=True)
            ]
            completions = completions_of(self.tokenizer, prompts, before, ids)
        columns = {**reward_columns(rows), **batch.get("columns", {}), "completion_ids": ids}
        prompts, columns[BEGINNING] = map(list, zip(*map(split_beginning, prompts), strict=True))
        device = batch["response_ids"].device
        total, per_token, parts = torch.zeros(len(rows), device=device), None, {}
        for name, reward, weight in zip(self.names, self.rewards, self.weights, strict=True):
            with time_limit(reward, self.args.reward_timeout):
                values = checked_rewards(reward, prompts, completions, **columns)
            if isinstance(values[0], list):
                # Tokens of an environment earn nothing.
                spread_out = _per_token(values, batch["response_mask"], name) * batch["action_mask"]
                per_token = spread_out * weight + (0 if per_token is None else per_token)
                parts[name] = spread_out.sum(1)
            else:
                parts[name] = torch.tensor(values, device=device)
                total += weight * parts[name]
        if self.args.missing_eos_penalty is not None:
            total -= self.args.missing_eos_penalty * ~batch["is_ended"]
        if per_token is not None and (self.args.normalize_rewards or self.args.reward_clip is not None):
            raise InputError(
                "normalize_rewards and reward_clip are for rewards per response, not for per-token rewards"
            )
        scores = Scores(total, per_token, parts, [])
        table = [
            {"prompt": without_pictures(prompt), "completion": transcript(completion)}
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        for name, values in {**parts, "reward": scores.reward}.items():
            for row, value in zip(table, values.tolist(), strict=True):
                row[name] = value
        scores.completions = table
        return scores

    def rescale(self, total: torch.Tensor, sum_over_processes: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Normalize by the running moments and clip, as the arguments say."""
        if self.args.normalize_rewards:
            exact = total.double()
            sums = torch.stack((torch.ones_like(exact).sum(), exact.sum(), exact.square().sum()))
            self.moments.update(*sum_over_processes(sums).tolist())
            total = ((exact - self.moments.mean) / self.moments.std).to(total.dtype)
        if self.args.reward_clip is not None:
            total = total.clamp(-self.args.reward_clip, self.args.reward_clip)
        return total


def _per_token(values: Sequence[Sequence[float]], mask: torch.Tensor, name: str) -> torch.Tensor:
    """Return lists of per-token rewards as (B, R); refuse lists of another length than the completion."""
    result = torch.zeros(mask.shape, device=mask.device)
    for row, (numbers, length) in enumerate(zip(values, mask.sum(1).tolist(), strict=True)):
        if len(numbers) != length:
            raise InputError(
                f"reward function {name!r} returned {len(numbers)} per-token rewards for completion {row}; "
                f"expected one for each of its {length} completion_ids"
            )
        result[row, :length] = torch.tensor(numbers, device=mask.device)
    return result


def unique_names(names: list[str]) -> list[str]:
    """Return the names, with a number added to repetitions."""
    return [
        name if names.index(name) == at else f"{name}_{names[:at].count(name) + 1}" for at, name in enumerate(names)
    ]


# ---- completions ----
#
# Sampled tokens as completions for the rewards: text, or an assistant's message with its thoughts apart.


# The end of a prompt, where a chat template may open a thought: `<think>` and line breaks.
TAIL = 16


def completions_of(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | list[Message]],
    prompt_ids: Sequence[Sequence[int]],
    response_ids: Sequence[Sequence[int]],
) -> list[str | list[Message]]:
    """Return completions in the form of their prompts, without special tokens.

    Where a prompt ends with the beginning of its answer, the completion is the whole answer. A message has
    `reasoning_content` where the policy has thought: between `<think>` and `</think>`, or as the tokenizer's
    `response_template` says. Texts keep thoughts and marks.
    """
    texts = tokenizer.batch_decode(response_ids, skip_special_tokens=True)
    fields = (getattr(tokenizer, "response_template", None) or {}).get("fields", {})
    has_own_marks = "reasoning_content" in fields and OPEN not in str(fields["reasoning_content"])
    completions = []
    for prompt, before, ids, text in zip(prompts, prompt_ids, response_ids, texts, strict=True):
        if isinstance(prompt, str):
            completions.append(text)
            continue
        _, beginning = split_beginning(prompt)
        is_open = tokenizer.decode(before[-TAIL:]).rstrip().endswith(OPEN)
        if beginning:
            # Some tokenizers drop a space before the first decoded token.
            texts_of = [tokenizer.decode([*before[-TAIL:], *some], skip_special_tokens=True) for some in ([], ids)]
            text, is_open = beginning + texts_of[1].removeprefix(texts_of[0]), False
        message = thinking_message(text, is_open)
        if has_own_marks and "reasoning_content" not in message:
            message |= _parsed(tokenizer, before, ids)
        completions.append([message])
    return completions


def _parsed(tokenizer: "PreTrainedTokenizerBase", before: Sequence[int], ids: Sequence[int]) -> dict[str, Any]:
    try:
        read = tokenizer.parse_response(list(ids), prefix=list(before))
    except (ValueError, *template_errors()):
        return {}
    thoughts = read.get("reasoning_content")
    return {"content": read.get("content") or "", "reasoning_content": thoughts} if thoughts else {}
