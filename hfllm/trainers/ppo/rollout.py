"""Rollouts, the training data of PPO: sampled responses, the values computed for them at that time, and their scores.

A response holds the policy's chosen tokens, its actions, and tokens of an environment between them, such as the
results of tools. Shapes: N episodes, P prompt positions (left-padded), R response positions (right-padded).
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hfllm.data.formats import Message, split_beginning
from hfllm.data.thoughts import OPEN, thinking_message
from hfllm.data.tokenizer import template_errors
from hfllm.errors import InputError
from hfllm.multimodal.processors import Pictures, without_pictures
from hfllm.rewards.calls import RewardCalls, RewardLog
from hfllm.rewards.functions import BEGINNING, reward_columns, reward_name, transcript
from hfllm.trainers.ppo.config import PPOConfig
from hfllm.trainers.ppo.formulas import RunningMoments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerState

# The models' inputs from a batch, besides images.
MODEL_INPUTS = ("prompt_ids", "prompt_mask", "response_ids", "response_mask", "action_mask")
# Numbers of a whole mini-batch, by which its sums are divided.
COUNTS = ("mini_batch_tokens", "mini_batch_positive_tokens")
Batch = dict[str, torch.Tensor | Pictures]


@dataclass
class Rollout:
    """Episodes of one process. Prompt and response masks are 1 on real tokens.

    Computed values of tokens, each (N, R), are 0 where the policy chose none.

    Args:
        prompt_ids, prompt_mask: (N, P).
        response_ids, response_mask: (N, R); the end token, where sampled, is the last real token.
        action_mask: (N, R), 1 on the tokens chosen by the policy.
        logprobs, ref_logprobs: (N, R), of the actions under their sampling policy and the reference.
        values, advantages, returns: (N, R).
        order: (epochs, N), the shuffled order of the episodes per PPO epoch.
        mini_batch_tokens: (epochs, mini-batches), actions per mini-batch over *all* processes.
        is_positive: (N,), 1 for responses whose likelihood is learned, and `None` where none is.
        mini_batch_positive_tokens: as `mini_batch_tokens`, of these responses alone.
        pictures: the images of the prompts, `None` where no prompt has any.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    response_ids: torch.Tensor
    response_mask: torch.Tensor
    action_mask: torch.Tensor
    logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    order: torch.Tensor
    mini_batch_tokens: torch.Tensor
    is_positive: torch.Tensor | None = None
    mini_batch_positive_tokens: torch.Tensor | None = None
    pictures: Pictures | None = None

    PER_EPISODE = (*MODEL_INPUTS, "logprobs", "ref_logprobs", "values", "advantages", "returns")

    def micro_batch(self, step: int, micro_step: int, micro_batch_size: int) -> Batch:
        """Return the tensors of one backward pass.

        Args:
            step: optimizer step within the rollout, over epochs and their mini-batches.
            micro_step: backward pass within the optimizer step.
            micro_batch_size: episodes in a backward pass.
        """
        mini_batches = self.mini_batch_tokens.shape[1]
        epoch, mini_batch = divmod(step, mini_batches)
        start = mini_batch * (self.order.shape[1] // mini_batches) + micro_step * micro_batch_size
        rows = self.order[epoch, start : start + micro_batch_size]
        names = (*self.PER_EPISODE, "is_positive", "pictures")
        batch = trim({name: getattr(self, name)[rows] for name in names if getattr(self, name) is not None})
        counts = {name: getattr(self, name) for name in COUNTS if getattr(self, name) is not None}
        return {**batch, **{name: count[epoch, mini_batch] for name, count in counts.items()}}

    def save(self, path: str | Path) -> None:
        """Write the rollout as safetensors."""
        from safetensors.torch import save_file

        # Copies, since the masks are one tensor where all tokens are the policy's.
        tensors = {name: value for name, value in vars(self).items() if torch.is_tensor(value)}
        tensors = {name: value.contiguous().clone() for name, value in tensors.items()}
        save_file({**tensors, **({} if self.pictures is None else self.pictures.tensors())}, path)

    @classmethod
    def load(cls, path: str | Path, device: torch.device) -> "Rollout":
        """Read the file of `save`."""
        from safetensors.torch import load_file

        saved = {name: tensor.to(device) for name, tensor in load_file(path).items()}
        # Rollouts once had no environment.
        saved.setdefault("action_mask", saved["response_mask"])
        pictures = Pictures.split_off(saved)
        return cls(**saved, pictures=pictures)


def model_inputs(batch: dict[str, Any]) -> Batch:
    """Return the models' inputs from a batch, with its images if it has any."""
    return {name: batch[name] for name in (*MODEL_INPUTS, "pictures") if batch.get(name) is not None}


def trim(batch: Batch) -> Batch:
    """Remove the columns with padding in every row: prompts on the left, responses on the right."""
    longest_prompt = int(batch["prompt_mask"].sum(1).max())
    longest_response = max(int(batch["response_mask"].sum(1).max()), 1)

    def cut(name: str, tensor: torch.Tensor | Pictures) -> torch.Tensor | Pictures:
        if isinstance(tensor, Pictures) or tensor.ndim == 1:
            return tensor
        return (
            tensor[:, tensor.shape[1] - longest_prompt :]
            if name.startswith("prompt_")
            else tensor[:, :longest_response]
        )

    return {name: cut(name, tensor) for name, tensor in batch.items()}


def with_actions(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a sampled batch with its `action_mask`: without one, the policy chose the whole response."""
    return batch if "action_mask" in batch else {**batch, "action_mask": batch["response_mask"]}


def with_replaced(
    batch: Mapping[str, Any], other: Mapping[str, Any], places: torch.Tensor, pad_token_id: int
) -> dict[str, Any]:
    """Return what models read of a sampled batch, with the episodes of another one at these places (M,).

    Of log-probabilities recorded by the trainer's own sampling nothing is left: a second pass finds them.
    """
    merged: dict[str, Any] = {}
    if ("sampling_logprobs" in batch) != ("sampling_logprobs" in other):
        raise InputError("rollout_func returned logprobs for some prompts of a rollout and not for those drawn again")
    for name, own in batch.items():
        if torch.is_tensor(own):
            fill = pad_token_id if name.endswith("_ids") else 0
            merged[name] = _with_rows(own, other[name], places, fill, name.startswith("prompt_"))
    pictures = [each.get("pictures") for each in (batch, other)]
    if any(each is not None for each in pictures):
        own, new = (
            [{}] * len(each["is_ended"]) if shown is None else list(shown.episodes)
            for each, shown in zip((batch, other), pictures, strict=True)
        )
        for place, episode in zip(places.tolist(), new, strict=True):
            own[place] = episode
        merged["pictures"] = Pictures(own)
    return merged


def _with_rows(
    own: torch.Tensor, new: torch.Tensor, places: torch.Tensor, fill: float, pads_left: bool = False
) -> torch.Tensor:
    """Return a tensor with new rows at these places, both padded to the wider one."""
    if own.ndim > 1:
        width = max(own.shape[1], new.shape[1])
        missing = [width - each.shape[1] for each in (own, new)]
        sides = [(some, 0) if pads_left else (0, some) for some in missing]
        own, new = (
            torch.nn.functional.pad(each, side, value=fill) for each, side in zip((own, new), sides, strict=True)
        )
    return own.index_copy(0, places, new.to(own.dtype))


def pad_prompts(
    prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-pad token ids to (N, P) and return them with their mask."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_token_id, dtype=torch.long)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        if prompt:
            ids[row, -len(prompt) :] = torch.tensor(prompt)
            mask[row, -len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def sampling_logprobs(
    logprobs: Sequence[Sequence[float | Sequence[float] | None]],
    masks: Sequence[Sequence[int]],
    shape: tuple[int, int],
    origin: str,
    may_lack: bool = False,
) -> torch.Tensor:
    """Return log-probabilities (N, R) of the policy's tokens as they were sampled, 0 for others.

    Args:
        logprobs: a number for each token of a response, or a list that begins with it, as from vLLM.
        masks: 1 for the tokens that the policy chose; those of others may have `None`.
        origin: whose they are, for errors.
        may_lack: whether a token may have `None`, which becomes not a number.

    Raises:
        InputError: for another count, or what is no log-probability.
    """
    result = torch.zeros(shape)
    for row, (values, mask) in enumerate(zip(logprobs, masks, strict=True)):
        values = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(values, (list, tuple)):
            raise InputError(f"{origin}, prompt {row}: logprobs is {values!r}; expected a list of numbers")
        if len(values) != len(mask):
            raise InputError(f"{origin}, prompt {row}: {len(values)} logprobs for {len(mask)} completion_ids")
        for at, (value, is_chosen) in enumerate(zip(values, mask, strict=True)):
            if not is_chosen:
                continue
            value = value[0] if isinstance(value, (list, tuple)) and value else value
            # A number of numpy or torch.
            value = value.item() if hasattr(value, "item") else value
            if value is None and may_lack:
                result[row, at] = math.nan
                continue
            # Rounding may bring a probability a little above 1.
            if not isinstance(value, (int, float)) or not -math.inf < value < 0.01:
                raise InputError(
                    f"{origin}, prompt {row}: logprobs has {value!r} for token {at}, which the policy chose; expected "
                    "a finite number of at most 0"
                )
            result[row, at] = value
    return result


def length_groups(
    batch: Batch,
    bucket: int | None,
    most_tokens: int | None = None,
    most_rows: int | None = None,
    most_responses: int | None = None,
) -> Iterator[tuple[torch.Tensor, Batch]]:
    """Yield the rows of `batch` in groups of similar length, trimmed, with their indices.

    Args:
        bucket: rows of a group differ in length by fewer tokens than this; `None` allows any length.
        most_tokens: limit per group, padding included, unless a single row has more.
        most_rows: limit per group.
        most_responses: limit of the actions per group, whose logits are made, unless a single row has more.
    """
    lengths = batch["prompt_mask"].sum(1) + batch["response_mask"].sum(1)
    by_length = lengths.argsort(descending=True, stable=True)
    ordered = lengths[by_length].tolist()
    # Actions up to each row, without the row's own.
    actions = batch.get("action_mask", batch["response_mask"])
    cumulative = [0, *(actions.sum(1)[by_length].cumsum(0).tolist() if most_responses is not None else [])]
    start = 0
    while start < len(ordered):
        end = start + 1
        while (
            end < len(ordered)
            and (bucket is None or ordered[start] - ordered[end] < bucket)
            and (most_tokens is None or (end - start + 1) * ordered[start] <= most_tokens)
            and (most_rows is None or end - start < most_rows)
            and (most_responses is None or cumulative[end + 1] - cumulative[start] <= most_responses)
        ):
            end += 1
        rows = by_length[start:end]
        yield rows, trim({name: tensor[rows] for name, tensor in batch.items()})
        start = end


# ---- scores ----


@dataclass
class Scores:
    """The scores of a batch of responses.

    Args:
        total: (B,), the weighted sum minus the penalty for truncated responses.
        per_token: (B, R), the weighted sum of the token-by-token rewards, or `None`.
        parts: each single reward, (B,), unweighted; per-token ones are summed. Not a number where a function does not
            judge the response.
        completions: a row per response: prompt, completion, the parts, the total and what functions have logged.
        metrics: numbers logged by functions.
    """

    total: torch.Tensor
    per_token: torch.Tensor | None
    parts: dict[str, torch.Tensor]
    completions: list[dict[str, Any]]
    metrics: dict[str, list[float]]

    @property
    def reward(self) -> torch.Tensor:
        """Return the whole reward (B,)."""
        return self.total if self.per_token is None else self.total + self.per_token.sum(1)

    def with_replaced(self, other: "Scores", places: torch.Tensor) -> "Scores":
        """Return scores with those of other responses at these places (M,); what was logged stays."""
        if self.per_token is None and other.per_token is None:
            per_token = None
        else:
            # A function may have paid each response once, and its tokens another time.
            own, new = (
                each.total.new_zeros(len(each.total), 1) if each.per_token is None else each.per_token
                for each in (self, other)
            )
            per_token = _with_rows(own, new, places, 0)
        return replace(self, total=self.total.index_copy(0, places, other.total), per_token=per_token)


class Scorer:
    """Calls the reward functions.

    Args:
        rewards: functions `(prompts, completions, **columns)` returning a number per completion, or a list of
            numbers per completion, one per entry of its `completion_ids`; `None` for a completion not judged. They may
            be async, and take TRL's `trainer_state`, `log_metric` and `log_extra` (`hfllm.rewards.calls`).
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

    def begin(
        self, rows: Sequence[Mapping[str, Any]], batch: Mapping[str, Any], state: "TrainerState | None" = None
    ) -> Callable[[], Scores]:
        """Begin to score the responses of `batch` to the prompts of `rows`; return a function that ends it.

        In between async functions go on.

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
        log = RewardLog()
        calls = RewardCalls(
            *(self.rewards, prompts, completions, columns, log.arguments(state), self.args.reward_timeout)
        )
        return partial(self._end, calls, log, prompts, completions, batch)

    def _end(
        self, calls: RewardCalls, log: RewardLog, prompts: Sequence, completions: Sequence, batch: Mapping[str, Any]
    ) -> Scores:
        device = batch["response_ids"].device
        total, per_token, parts = torch.zeros(len(prompts), device=device), None, {}
        is_unjudged = torch.ones_like(total, dtype=torch.bool)
        for name, weight, values in zip(self.names, self.weights, calls.results(), strict=True):
            abstains = torch.tensor([value is None for value in values], device=device)
            if any(isinstance(value, list) for value in values):
                # Tokens of an environment earn nothing.
                spread_out = _per_token(values, batch["response_mask"], name) * batch["action_mask"]
                per_token = spread_out * weight + (0 if per_token is None else per_token)
                parts[name] = spread_out.sum(1)
            else:
                parts[name] = torch.tensor([value or 0.0 for value in values], device=device)
                total += weight * parts[name]
            is_unjudged &= abstains
            if abstains.any():
                parts[name] = parts[name].masked_fill(abstains, torch.nan)
                log.log_metric(f"judged/{name}", 1 - abstains.float().mean().item())
        if is_unjudged.any():
            row = int(is_unjudged.nonzero()[0])
            warnings.warn(
                f"no reward function judges completion {row} ({transcript(completions[row])[:80]!r}): it earns 0",
                stacklevel=2,
            )
        if self.args.missing_eos_penalty is not None:
            total -= self.args.missing_eos_penalty * ~batch["is_ended"]
        if per_token is not None and (self.args.normalize_rewards or self.args.reward_clip is not None):
            raise InputError(
                "normalize_rewards and reward_clip are for rewards per response, not for per-token rewards"
            )
        log.check(len(prompts))
        scores = Scores(total, per_token, parts, [], log.metrics)
        table = [
            {"prompt": without_pictures(prompt), "completion": transcript(completion)}
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        for name, values in {**parts, "reward": scores.reward}.items():
            for row, value in zip(table, values.tolist(), strict=True):
                row[name] = None if math.isnan(value) else value
        for name, values in log.columns.items():
            for row, value in zip(table, values, strict=True):
                row.setdefault(name, value)
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


def _per_token(values: Sequence[Sequence[float] | None], mask: torch.Tensor, name: str) -> torch.Tensor:
    """Return lists of per-token rewards as (B, R); refuse lists of another length than the completion."""
    result = torch.zeros(mask.shape, device=mask.device)
    for row, (numbers, length) in enumerate(zip(values, mask.sum(1).tolist(), strict=True)):
        if numbers is None:
            continue
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
