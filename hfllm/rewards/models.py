"""Models as rewards: one score per sequence, or one per token."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hfllm.data.messages import read_tools, words_of
from hfllm.data.tokenizer import tokenize_prompts
from hfllm.errors import InputError
from hfllm.rewards.functions import BEGINNING
from hfllm.rewards.passes import batches_of_like_length, pass_precision

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class RewardModel:
    """A sequence-classification model as a reward function, with its own tokenizer and chat template.

    A column `tools` goes to the template of a conversation.

    Args:
        model: scores one sequence with one label (`num_labels=1`), read at the last token that is not padding.
        tokenizer: the reward model's own; prompt and completion reach it as text.
        batch_size: sequences in one forward pass.

    Raises:
        InputError: when the model has more than one label or a head that was never trained, or its tokenizer has no
            padding token or tokens that the model has no embeddings for.
    """

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", batch_size: int = 64):
        from hfllm.models.vocabulary import check_vocabulary

        if model.config.num_labels != 1:
            raise InputError(
                f"the reward model has {model.config.num_labels} labels; expected a model trained with num_labels=1"
            )
        if getattr(model, "has_new_head", False):
            raise InputError(
                f"the reward model {model.config._name_or_path!r} has no head for scores (a language model): train "
                "it on comparisons first (hfllm reward)"
            )
        if tokenizer.pad_token_id is None:
            raise InputError("the reward model's tokenizer has no padding token")
        check_vocabulary(model, tokenizer)
        self.model, self.tokenizer, self.batch_size = model.eval().requires_grad_(False), tokenizer, batch_size
        self.model.config.pad_token_id = tokenizer.pad_token_id
        self.__name__ = Path(model.config._name_or_path or "reward_model").name

    def __call__(self, prompts: Sequence, completions: Sequence, **columns: Sequence[object]) -> list[float]:
        tools = columns.get("tools") or [None] * len(prompts)
        ids = [self._token_ids(*said) for said in zip(prompts, completions, tools, strict=True)]
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
        # Of a prompt with pictures it reads the words.
        return self.tokenizer.apply_chat_template([*map(words_of, [*prompt, *completion])], **options)["input_ids"]


class TokenRewardModel(RewardModel):
    """A token-classification model as a reward for each token of a completion, such as a process reward model.

    It is read at the tokens that the policy sampled, so its tokenizer must be the policy's.

    Args:
        model, tokenizer, batch_size: as in `RewardModel`.
    """

    def __call__(self, prompts: Sequence, completions: Sequence, **columns: Sequence[object]) -> list[list[float]]:
        sampled = columns["completion_ids"]
        begun = columns.get(BEGINNING) or [""] * len(prompts)
        asked = [
            [*prompt, {"role": "assistant", "content": beginning}] if beginning else prompt
            for prompt, beginning in zip(prompts, begun, strict=True)
        ]
        before = tokenize_prompts(asked, self.tokenizer, columns.get("tools"))
        ids = [[*prompt, *completion] for prompt, completion in zip(before, sampled, strict=True)]
        rewards: list[list[float]] = [[] for _ in ids]
        for rows, logits in self._logits(ids):
            for row, numbers in zip(rows, logits.squeeze(-1).tolist(), strict=True):
                rewards[row] = numbers[len(before[row]) : len(ids[row])]
        return rewards


def scores_tokens(model: "PreTrainedModel") -> bool:
    """Return whether a model gives one number per token (`...ForTokenClassification`)."""
    return type(model).__name__.endswith("ForTokenClassification")
