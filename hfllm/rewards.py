"""Rewards behind one signature, that of TRL's reward functions: `(prompts, completions, **columns) -> list[float]`.

`prompts` and `completions` are strings, or lists of messages when the dataset is conversational; `columns` are the
dataset's other columns, one value a row.
"""

import importlib.util
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm.data.rubric import GoldAnswer
from hfllm.data.rubric import gold_reward as judge
from hfllm.data.tokenizer import tokenize_prompts
from hfllm.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RewardFunction = Callable[..., list[float]]
GOLD_COLUMNS = ("gold_kind", "gold_accepted", "gold_needed", "gold_forbidden")


def completion_text(completion: str | Sequence[dict[str, str]]) -> str:
    """The text of a completion in either format."""
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)


def gold_reward(
    prompts: Sequence,
    completions: Sequence,
    *,
    gold_kind: Sequence[str],
    gold_accepted: Sequence[Sequence[str]],
    gold_needed: Sequence[Sequence[str]],
    gold_forbidden: Sequence[Sequence[str]],
    **columns: Any,
) -> list[float]:
    """The embedded world's verifiable reward in [-1, 1], from the gold columns of its prompt rows."""
    golds = map(GoldAnswer, gold_kind, gold_accepted, gold_needed, gold_forbidden)
    return [judge(completion_text(response), gold) for response, gold in zip(completions, golds, strict=True)]


def load_reward_function(specification: str) -> RewardFunction:
    """The function that `specification` names: `gold`, or `path/to/file.py:function`.

    Raises:
        InputError: when the file or the function does not exist, or the file does not run.
    """
    if specification == "gold":
        return gold_reward
    path, _, name = specification.rpartition(":")
    if not Path(path).is_file():
        raise InputError(f"--reward_funcs {specification}: no file {path!r}; expected path/to/file.py:function")
    if Path(path).suffix != ".py":
        raise InputError(f"--reward_funcs {specification}: {path!r} is not a .py file")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"--reward_funcs {specification}: {path} does not run: {error!r}") from error
    function = getattr(module, name, None)
    if not callable(function):
        defined = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise InputError(f"--reward_funcs {specification}: no function {name!r} in {path}; it has: {defined}")
    return function


def reward_name(function: Callable) -> str:
    """The name that a reward is logged under."""
    return getattr(function, "__name__", None) or type(function).__name__


def checked_rewards(
    function: RewardFunction, prompts: Sequence, completions: Sequence, **columns: Any
) -> list[float] | list[list[float]]:
    """Call a reward function and refuse what is not one finite number a completion, or a list of them a completion.

    Raises:
        InputError: naming the function, the row and the value seen.
    """
    name = f"reward function {reward_name(function)!r}"
    try:
        rewards = function(prompts=prompts, completions=completions, **columns)
    except Exception as error:
        raise InputError(f"{name} failed with {error!r}; columns given: {', '.join(columns) or '(none)'}") from error
    if not hasattr(rewards, "__len__"):
        raise InputError(f"{name} returned {type(rewards).__name__}; expected a list of {len(completions)} numbers")
    if len(rewards) != len(completions):
        raise InputError(f"{name} returned {len(rewards)} values for {len(completions)} completions")
    is_per_token = isinstance(rewards[0], list | tuple)
    for row, reward in enumerate(rewards):
        if isinstance(reward, list | tuple) != is_per_token or not all(
            map(_is_number, reward if is_per_token else [reward])
        ):
            raise InputError(
                f"{name} returned {reward!r} for completion {row} ({completion_text(completions[row])[:80]!r}); "
                f"expected {'a list of finite numbers' if is_per_token else 'a finite number'}"
            )
    return [list(map(float, reward)) if is_per_token else float(reward) for reward in rewards]


def _is_number(value: Any) -> bool:
    try:
        return value is not None and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def length_penalty(coefficient: float, free: int = 0) -> RewardFunction:
    """A reward of `-coefficient` for each token of a completion beyond the first `free`."""

    def penalty(prompts: Sequence, completions: Sequence, *, completion_ids: Sequence, **columns: Any) -> list[float]:
        return [-coefficient * max(len(ids) - free, 0) for ids in completion_ids]

    penalty.__name__ = "length_penalty"
    return penalty


class RewardEnsemble:
    """Several rewards as one that is harder to exploit (Coste et al. 2023, arXiv:2310.02743, section 3).

    A reward model trained on comparisons is only defined up to a constant: call `calibrate` once, or the worst of
    several is but the one with the lowest constant.

    Args:
        members: reward functions or `RewardModel`s, at least two.
        aggregation: `"mean"`; `"worst"`, the least of them (worst-case optimisation, equation 2); or `"uncertainty"`,
            the mean less `coefficient` times their variance (equation 3).
        coefficient: see `aggregation`.

    Raises:
        InputError: for fewer than two members, or an unknown aggregation.
    """

    AGGREGATIONS = ("mean", "worst", "uncertainty")

    def __init__(self, members: Sequence[RewardFunction], aggregation: str = "worst", coefficient: float = 1.0):
        if aggregation not in self.AGGREGATIONS:
            raise InputError(f"aggregation {aggregation!r} is not one of {', '.join(self.AGGREGATIONS)}")
        if len(members) < 2:
            raise InputError(f"an ensemble needs at least 2 rewards, got {len(members)}")
        self.members, self.aggregation, self.coefficient = list(members), aggregation, coefficient
        self.offsets, self.scales = [0.0] * len(members), [1.0] * len(members)
        self.__name__ = f"{aggregation}_of_{len(members)}"

    def calibrate(self, prompts: Sequence, completions: Sequence, **columns: Any) -> None:
        """Bring the members to one scale: that on these responses each has mean 0 and their common spread.

        Args:
            prompts, completions, columns: as in a call; responses of the model that training starts from.

        Raises:
            InputError: for a member that gives all of them the same score.
        """
        scores = [self._scores_of(member, prompts, completions, **columns) for member in self.members]
        spreads = [statistics.pstdev(values) for values in scores]
        if 0.0 in spreads:
            member = self.members[spreads.index(0.0)]
            raise InputError(f"{reward_name(member)!r} gives all {len(prompts)} completions the same score")
        self.offsets = [statistics.fmean(values) for values in scores]
        self.scales = [statistics.fmean(spreads) / spread for spread in spreads]

    def __call__(self, prompts: Sequence, completions: Sequence, **columns: Any) -> list[float]:
        scores = [
            [(value - offset) * scale for value in self._scores_of(member, prompts, completions, **columns)]
            for member, offset, scale in zip(self.members, self.offsets, self.scales, strict=True)
        ]
        return [self._aggregate(numbers) for numbers in zip(*scores, strict=True)]

    @staticmethod
    def _scores_of(member: RewardFunction, prompts: Sequence, completions: Sequence, **columns: Any) -> list[float]:
        values = checked_rewards(member, prompts, completions, **columns)
        if isinstance(values[0], list):
            raise InputError(f"an ensemble takes one number a completion; {reward_name(member)!r} gives lists")
        return values

    def _aggregate(self, numbers: Sequence[float]) -> float:
        mean = sum(numbers) / len(numbers)
        if self.aggregation == "worst":
            return min(numbers)
        if self.aggregation == "mean":
            return mean
        return mean - self.coefficient * sum((number - mean) ** 2 for number in numbers) / len(numbers)


class RewardModel:
    """A sequence-classification model as a reward function, with its own tokenizer and chat template.

    Args:
        model: scores one sequence with one label (`num_labels=1`), read at the last token that is not padding.
        tokenizer: the reward model's own; prompt and completion reach it as text.
        batch_size: sequences in one forward pass.

    Raises:
        InputError: when the model has more than one label or a head that was never trained, or its tokenizer has no
            padding token.
    """

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", batch_size: int = 64):
        if model.config.num_labels != 1:
            raise InputError(
                f"the reward model has {model.config.num_labels} labels; expected a model trained with num_labels=1"
            )
        if getattr(model, "has_new_head", False):
            raise InputError(
                f"the reward model {model.config._name_or_path!r} has no head for scores, as a language model: train "
                "it on comparisons first (recipes/reward.py)"
            )
        if tokenizer.pad_token_id is None:
            raise InputError("the reward model's tokenizer has no padding token")
        self.model, self.tokenizer, self.batch_size = model.eval().requires_grad_(False), tokenizer, batch_size
        self.model.config.pad_token_id = tokenizer.pad_token_id
        self.__name__ = Path(model.config._name_or_path or "reward_model").name

    def __call__(self, prompts: Sequence, completions: Sequence, **columns: Any) -> list[float]:
        ids = [self._token_ids(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        scores = [0.0] * len(ids)
        for rows, logits in self._logits(ids):
            for row, score in zip(rows, logits.squeeze(-1).tolist(), strict=True):
                scores[row] = score
        return scores

    def _logits(self, ids: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], "torch.Tensor"]]:
        """Rows, and what the model says of them: (rows, 1), or (rows, positions, 1) of a model for tokens."""
        import torch

        for rows in self._batches([len(row) for row in ids]):
            batch = self.tokenizer.pad(
                {"input_ids": [ids[row] for row in rows]}, padding_side="right", return_tensors="pt"
            ).to(self.model.device)
            with torch.inference_mode():
                logits = self.model(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
                ).logits
            yield rows, logits.float().cpu()

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Rows of like length: a short pass more costs a CPU less than padding does."""
        most_padding = 8 if self.model.device.type == "cpu" else 256
        rows: list[int] = []
        for row in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
            if rows and (len(rows) == self.batch_size or lengths[rows[0]] - lengths[row] >= most_padding):
                yield rows
                rows = []
            rows.append(row)
        yield rows

    def _token_ids(self, prompt: str | list, completion: str | list) -> list[int]:
        if isinstance(prompt, str):
            # With the end token, as TRL's RewardTrainer closes the texts that it trains on.
            return self.tokenizer(prompt + completion + (self.tokenizer.eos_token or ""))["input_ids"]
        return self.tokenizer.apply_chat_template(prompt + completion, tokenize=True, return_dict=True)["input_ids"]


class TokenRewardModel(RewardModel):
    """A token-classification model as a reward for each token of a completion, such as a process reward model.

    It is read at the tokens that the policy sampled, so its tokenizer must be the policy's.

    Args:
        model, tokenizer, batch_size: as in `RewardModel`.
    """

    def __call__(self, prompts: Sequence, completions: Sequence, **columns: Any) -> list[list[float]]:
        sampled = columns["completion_ids"]
        before = tokenize_prompts(prompts, self.tokenizer)
        ids = [[*prompt, *completion] for prompt, completion in zip(before, sampled, strict=True)]
        rewards: list[list[float]] = [[] for _ in ids]
        for rows, logits in self._logits(ids):
            for row, numbers in zip(rows, logits.squeeze(-1).tolist(), strict=True):
                rewards[row] = numbers[len(before[row]) : len(ids[row])]
        return rewards


def scores_tokens(model: Any) -> bool:
    """Whether a model gives a number for each token (`...ForTokenClassification`)."""
    return type(model).__name__.endswith("ForTokenClassification")
