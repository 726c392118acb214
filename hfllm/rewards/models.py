"""Models as rewards: one score per sequence, or one per token, and several as an ensemble."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hfllm.data.formats import Message, read_tools, unspelled, words_of
from hfllm.data.images.rows import conversation_batch, words_of_places
from hfllm.data.tokenizer import tokenize_prompts
from hfllm.errors import InputError, check_choice, refuse_if
from hfllm.generation.scoring import batches_of_like_length, pass_precision
from hfllm.models.loading.saved import check_vocabulary, reads_pictures
from hfllm.rewards.functions import BEGINNING, RewardFunction, checked_rewards, reward_name

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin


# ---- reward models ----


class RewardModel:
    """A sequence-classification model as a reward function, with its own tokenizer and chat template.

    A column `tools` goes to the template of a conversation.

    Args:
        model: scores one sequence with one label (`num_labels=1`), read at the last token other than padding.
        tokenizer: the reward model's own; prompt and completion reach it as text.
        batch_size: sequences in one forward pass.

    Raises:
        InputError: when the model has more than one label or an untrained head, or its tokenizer has no padding token,
            or has tokens without embeddings in the model.
    """

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", batch_size: int = 64):
        labels = model.config.num_labels
        refuse_if(labels != 1, f"the reward model has {labels} labels; expected a model trained with num_labels=1")
        if getattr(model, "has_new_head", False):
            raise InputError(
                f"the reward model {model.config._name_or_path!r} has no head for scores (a language model): train "
                "it on comparisons first (hfllm reward)"
            )
        refuse_if(tokenizer.pad_token_id is None, "the reward model's tokenizer has no padding token")
        check_vocabulary(model, tokenizer)
        self.model, self.tokenizer, self.batch_size = model.eval().requires_grad_(False), tokenizer, batch_size
        self.model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        self.__name__ = Path(model.config._name_or_path or "reward_model").name

    def __call__(self, prompts: Sequence, completions: Sequence, **columns: Sequence[object]) -> list[float]:
        tools = columns.get("tools") or [None] * len(prompts)
        ids = [self._token_ids(*example) for example in zip(prompts, completions, tools, strict=True)]
        scores = [0.0] * len(ids)
        for rows, logits in self._logits(ids):
            for row, score in zip(rows, logits.squeeze(-1).tolist(), strict=True):
                scores[row] = score
        return scores

    def _logits(self, ids: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], "torch.Tensor"]]:
        """Yield rows and the model's logits for them: (rows, 1), or (rows, positions, 1) for a token model."""
        import torch

        for rows in batches_of_like_length(self.model, [len(row) for row in ids], self.batch_size):
            batch = self.tokenizer.pad(
                {"input_ids": [ids[row] for row in rows]}, padding_side="right", return_tensors="pt"
            ).to(self.model.device)
            with torch.inference_mode(), pass_precision(self.model):
                logits = self.model(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
                ).logits
            yield rows, logits.float().cpu()

    def _token_ids(self, prompt: str | list, completion: str | list, tools: object = None) -> list[int]:
        if isinstance(prompt, str):
            # With the end token, as TRL's RewardTrainer ends its training texts.
            return self.tokenizer(prompt + completion + (self.tokenizer.eos_token or ""))["input_ids"]
        options = {
            "tokenize": True,
            "return_dict": True,
            **({"tools": read_tools("a prompt", tools)} if tools else {}),
        }
        # Of a prompt with images it reads the words.
        return self.tokenizer.apply_chat_template([*map(words_of, [*prompt, *completion])], **options)["input_ids"]


class PictureRewardModel(RewardModel):
    """A vision-language reward model: it reads prompts with their images, as the policy does.

    Words spelling the placeholder token of an image are read with a space in it: a policy may write anything.

    Args:
        model: scores conversations with images; a class of transformers with `pixel_values`.
        processor: the reward model's own.
        batch_size: conversations in one forward pass.
    """

    def __init__(self, model: "PreTrainedModel", processor: "ProcessorMixin", batch_size: int = 64):
        super().__init__(model, processor.tokenizer, batch_size)
        self.processor = processor

    def __call__(self, prompts: Sequence, completions: Sequence, **columns: Sequence[object]) -> list[float]:
        if any(columns.get("tools") or ()):
            raise InputError(f"the reward model {self.__name__!r} sees, and reads no tools: leave their column out")
        conversations = [self._conversation(*example) for example in zip(prompts, completions, strict=True)]
        scores: list[float] = []
        for start in range(0, len(conversations), self.batch_size):
            batch = conversations[start : start + self.batch_size]
            scores += self.scores(conversation_batch(self.processor, batch, [()] * len(batch)))
        return scores

    def _conversation(self, prompt: str | list, completion: str | list) -> list[Message]:
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        response = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        tokens = words_of_places(self.processor)

        def plain(content: str | list) -> str | list:
            if isinstance(content, str):
                return unspelled(tokens, content)
            return [{**part, "text": unspelled(tokens, part["text"])} if "text" in part else part for part in content]

        return [{**message, "content": plain(message["content"])} for message in (*before, *response)]

    def scores(self, batch: "Mapping[str, torch.Tensor]") -> list[float]:
        """Return the score of every conversation of a batch from the processor."""
        import torch

        with torch.inference_mode(), pass_precision(self.model):
            inputs = {name: value.to(self.model.device) for name, value in batch.items()}
            return self.model(**inputs, use_cache=False).logits.squeeze(-1).float().tolist()


def reward_model(
    model: "PreTrainedModel", processing_class: "PreTrainedTokenizerBase | ProcessorMixin", batch_size: int = 64
) -> RewardModel:
    """Return a model as a reward, with its own processor if it is a vision-language model, and else its tokenizer.

    Raises:
        InputError: see `RewardModel`, and for a vision-language model without a processor.
    """
    if not reads_pictures(model):
        return RewardModel(model, getattr(processing_class, "tokenizer", processing_class), batch_size)
    if not hasattr(processing_class, "image_processor"):
        raise InputError(f"the reward model {model.config._name_or_path!r} sees: give it its processor")
    return PictureRewardModel(model, processing_class, batch_size)


class TokenRewardModel(RewardModel):
    """A token-classification model as a reward for every token of a completion, such as a process reward model.

    It is read at the policy's sampled tokens, so its tokenizer must be the policy's.

    Args:
        model, tokenizer, batch_size: as in `RewardModel`.
    """

    def __call__(self, prompts: Sequence, completions: Sequence, **columns: Sequence[object]) -> list[list[float]]:
        sampled = columns["completion_ids"]
        begun = columns.get(BEGINNING) or [""] * len(prompts)
        conversations = [
            [*prompt, {"role": "assistant", "content": beginning}] if beginning else prompt
            for prompt, beginning in zip(prompts, begun, strict=True)
        ]
        before = tokenize_prompts(conversations, self.tokenizer, columns.get("tools"))
        ids = [[*prompt, *completion] for prompt, completion in zip(before, sampled, strict=True)]
        rewards: list[list[float]] = [[] for _ in ids]
        for rows, logits in self._logits(ids):
            for row, numbers in zip(rows, logits.squeeze(-1).tolist(), strict=True):
                rewards[row] = numbers[len(before[row]) : len(ids[row])]
        return rewards


# ---- ensembles ----
#
# An ensemble of several rewards, harder to exploit than one.


class RewardEnsemble:
    """Several rewards combined into one harder to exploit (Coste et al. 2023, arXiv:2310.02743, section 3).

    A reward model trained on comparisons is only defined up to a constant: call `calibrate` once, or the worst of
    several is just the one with the lowest constant.

    Args:
        members: reward functions or `RewardModel`s, at least two.
        aggregation: `"mean"`; `"worst"`, the lowest of them (worst-case optimization, equation 2); or `"uncertainty"`,
            the mean minus `coefficient` times their variance (equation 3).
        coefficient: see `aggregation`.

    Raises:
        InputError: for fewer than two members, or an unknown aggregation.
    """

    AGGREGATIONS = ("mean", "worst", "uncertainty")

    def __init__(self, members: Sequence[RewardFunction], aggregation: str = "worst", coefficient: float = 1.0):
        check_choice(f"aggregation {aggregation!r} is not one of", aggregation, self.AGGREGATIONS)
        refuse_if(len(members) < 2, f"an ensemble needs at least 2 rewards, got {len(members)}")
        if any(isinstance(member, TokenRewardModel) for member in members):
            raise InputError("an ensemble takes one number per completion; a model of tokens or steps gives more")
        self.members, self.aggregation, self.coefficient = list(members), aggregation, coefficient
        self.offsets, self.scales = [0.0] * len(members), [1.0] * len(members)
        self.__name__ = f"{aggregation}_of_{len(members)}"

    def calibrate(self, prompts: Sequence, completions: Sequence, **columns: Sequence[object]) -> None:
        """Normalize the members: on these responses every one gets mean 0 and their common spread.

        Args:
            prompts, completions, columns: as in a call; responses of the initial model of training.

        Raises:
            InputError: for a member with the same score for all responses.
        """
        scores = [self._scores_of(member, prompts, completions, **columns) for member in self.members]
        spreads = [statistics.pstdev(values) for values in scores]
        if 0.0 in spreads:
            member = self.members[spreads.index(0.0)]
            raise InputError(f"{reward_name(member)!r} gives all {len(prompts)} completions the same score")
        self.offsets = [statistics.fmean(values) for values in scores]
        self.scales = [statistics.fmean(spreads) / spread for spread in spreads]

    def __call__(self, prompts: Sequence, completions: Sequence, **columns: Sequence[object]) -> list[float]:
        scores = [
            [(value - offset) * scale for value in self._scores_of(member, prompts, completions, **columns)]
            for member, offset, scale in zip(self.members, self.offsets, self.scales, strict=True)
        ]
        return [self._aggregate(numbers) for numbers in zip(*scores, strict=True)]

    @staticmethod
    def _scores_of(
        member: RewardFunction, prompts: Sequence, completions: Sequence, **columns: Sequence[object]
    ) -> list[float]:
        values = checked_rewards(member, prompts, completions, **columns)
        if isinstance(values[0], list):
            raise InputError(f"an ensemble takes one number per completion; {reward_name(member)!r} gives lists")
        return values

    def _aggregate(self, numbers: Sequence[float]) -> float:
        mean = sum(numbers) / len(numbers)
        if self.aggregation == "worst":
            return min(numbers)
        if self.aggregation == "mean":
            return mean
        return mean - self.coefficient * sum((number - mean) ** 2 for number in numbers) / len(numbers)
