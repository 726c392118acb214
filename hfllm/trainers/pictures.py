"""Training on pictures that are drawn as they are read: tokens and pixels by the batch, without a processor's detours.

TRL's SFTTrainer calls the processor for every picture of every batch, which for a model of a few hundred thousand
weights takes as long as the model. Here the rows of a picture's questions are tokenized by their turns, which are few
and kept, and pixels go from bytes to the model in one step. Both are what the processor would have given; a test
compares them. Rows of your own, and other models, are trained by TRL: see `hfllm.stages.vision`.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer
from transformers.utils import ModelOutput

from hfllm.data.packing import IGNORE
from hfllm.data.picture_rows import PictureRow

if TYPE_CHECKING:
    from transformers import ProcessorMixin

# Turns whose tokens are kept.
KEPT_TURNS = 100_000


class TurnTokens:
    """Tokens of the turns of a conversation about one picture, which stands before the first question.

    Each turn is tokenized alone, which for the family's chat template gives what all together would: it writes marks
    around each message, and these are tokens of their own.

    Args:
        processor: with a tokenizer that has the family's chat template.
        image_token_id: of a piece of the picture.
        num_image_tokens: pieces of a picture.
    """

    def __init__(self, processor: "ProcessorMixin", image_token_id: int, num_image_tokens: int):
        self.tokenizer, self.image = processor.tokenizer, [image_token_id] * num_image_tokens
        self._mark = self.tokenizer.convert_ids_to_tokens(image_token_id)
        self.turn = lru_cache(KEPT_TURNS)(self._turn)

    def _turn(self, question: str, answer: str, is_first: bool) -> tuple[list[int], list[int]]:
        content = [{"type": "text", "text": (self._mark if is_first else "") + question}]
        asked = [{"role": "user", "content": content}]
        said = [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        template = self.tokenizer.apply_chat_template
        prompt = template(asked, tokenize=False, add_generation_prompt=True)
        whole = template(asked + said, tokenize=False)
        ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, whole)]
        before, after = ids[0], ids[1][len(ids[0]) :]
        if is_first:
            place = before.index(self.image[0])
            before = before[:place] + self.image + before[place + 1 :]
        return before, after

    def __call__(self, turns: Sequence[tuple[str, str]]) -> dict[str, list[int]]:
        """Return `input_ids`, and `labels` of the answers and the marks that end them."""
        input_ids, labels = [], []
        for number, (question, answer) in enumerate(turns):
            before, after = self.turn(question, answer, number == 0)
            input_ids += before + after
            labels += [IGNORE] * len(before) + after
        return {"input_ids": input_ids, "labels": labels}


class TokenizedPictures(Dataset):
    """Rows of pictures with their tokens: `input_ids`, `labels`, and `pixels` (H, W, 3) in bytes."""

    def __init__(self, rows: Sequence[PictureRow], tokens: TurnTokens):
        self.rows, self.tokens = rows, tokens

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self.rows[number]
        return {**self.tokens(row.turns), "pixels": numpy.asarray(row.picture)}


class PictureCollator:
    """Pads rows at their end, and scales pixels as the image processor does.

    There is no attention mask: a causal model does not look at what comes after, and runs faster without.

    Args:
        pad_token_id: of padding, which no label has.
        mean: of the three channels, from 0 to 1.
        std: likewise.
    """

    def __init__(self, pad_token_id: int, mean: Sequence[float], std: Sequence[float]):
        self.pad_token_id = pad_token_id
        self.mean, self.std = (torch.tensor(each).view(1, 3, 1, 1) for each in (mean, std))

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": self.pad_token_id, "labels": IGNORE}
        batch = {
            name: torch.tensor([[*row[name], *[value] * (longest - len(row[name]))] for row in rows])
            for name, value in fill.items()
        }
        pixels = torch.from_numpy(numpy.stack([row["pixels"] for row in rows])).permute(0, 3, 1, 2)
        batch["pixel_values"] = (pixels.float() / 255 - self.mean) / self.std
        return batch


def answer_loss(
    outputs: ModelOutput, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Return the cross entropy of the tokens of answers, in nats.

    Args:
        outputs: with logits (B, W, V) of the last W positions, of which the last predicts nothing here.
        labels: (B, S), at least W - 1 long.
        num_items_in_batch: targets of the whole optimizer step; without it the mean over these is returned.
    """
    targets = labels[:, labels.shape[1] - outputs.logits.shape[1] + 1 :]
    is_learned = targets != IGNORE
    total = cross_entropy(outputs.logits[:, :-1][is_learned].float(), targets[is_learned], reduction="sum")
    return total / (is_learned.sum() if num_items_in_batch is None else num_items_in_batch)


class PictureTrainer(Trainer):
    """`transformers.Trainer` on rows of pictures, with logits of the positions that may be learned alone.

    Args:
        rows: those to train on.
        tokens: of their turns.
        processor: the model's, which is saved with it.
        kwargs: as Trainer's.
    """

    def __init__(self, rows: Sequence[PictureRow], tokens: TurnTokens, processor: "ProcessorMixin", **kwargs: Any):
        images = processor.image_processor
        collate = PictureCollator(processor.tokenizer.pad_token_id, images.image_mean, images.image_std)
        dataset = TokenizedPictures(rows, tokens)
        kwargs |= {"train_dataset": dataset, "data_collator": collate, "processing_class": processor}
        super().__init__(compute_loss_func=answer_loss, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return Trainer's loss, by `answer_loss`: before the first answer, where the pictures are, no logits."""
        labels = inputs["labels"]
        begin = int((labels != IGNORE).any(0).nonzero()[0])
        inputs = {**inputs, "logits_to_keep": labels.shape[1] - begin + 1, "use_cache": False}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
        """Return rows in their order: each is drawn by chance already, and captions come before questions."""
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)
