"""Training on pictures that are drawn as they are read: tokens and pixels by the batch, without a processor's detours.

TRL's SFTTrainer calls the processor for every picture of every batch, which for a model of a few hundred thousand
weights takes as long as the model. Here questions are tokenized one by one, which are few and kept, and pixels go from
bytes to the model in one step. Both are what the processor would have given; a test compares them.

All questions about a picture stand behind it in one row, but none sees another: each is answered as if it were the
only one. What one answer has said, the next would read off there and not from the picture. The picture is computed
once for all of them. Rows of your own, and other models, are trained by TRL: see `hfllm.stages.vision`.
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
from hfllm.data.world.pictures import PictureRow

if TYPE_CHECKING:
    from transformers import ProcessorMixin

# Turns whose tokens are kept.
KEPT_TURNS = 100_000
# What stands for a question and an answer while the template's own marks are read.
QUESTION, ANSWER = "\x01", "\x02"


class TurnTokens:
    """Tokens of a picture and of several questions about it, each with its answer as in a conversation of its own.

    Args:
        processor: with a tokenizer that has the family's chat template, which puts the picture before the question.
        image_token_id: of a piece of the picture.
        num_image_tokens: pieces of a picture.
        max_length: tokens of a row; from the first turn on that does not fit, all are left out. One always stays.
    """

    def __init__(
        self, processor: "ProcessorMixin", image_token_id: int, num_image_tokens: int, max_length: int | None = None
    ):
        self.tokenizer, self.max_length = processor.tokenizer, max_length
        mark = self.tokenizer.convert_ids_to_tokens(image_token_id)
        asked = [{"role": "user", "content": [{"type": "text", "text": mark + QUESTION}]}]
        said = [{"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}]
        text = self.tokenizer.apply_chat_template(asked + said, tokenize=False)
        # Around what is asked and said are marks of the template, which no token of the words can cross.
        begin, _, rest = text.partition(mark + QUESTION)
        between, _, end = rest.partition(ANSWER)
        self.picture = self._ids(begin) + [image_token_id] * num_image_tokens
        self._between, self._end = self._ids(between), self._ids(end)
        self.turn = lru_cache(KEPT_TURNS)(self._turn)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def _turn(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Return the tokens of the question after the picture, and those of the answer and its end."""
        return self._ids(question) + self._between, self._ids(answer) + self._end

    def __call__(self, turns: Sequence[tuple[str, str]]) -> dict[str, list[int]]:
        """Return `input_ids`, `labels` of the answers and the marks that end them, `position_ids`, and `branches`.

        Branch 0 is the picture, branch N the Nth question with its answer. Positions of each begin where those of the
        picture end.
        """
        start = len(self.picture)
        input_ids, labels = [*self.picture], [IGNORE] * start
        positions, branches = [*range(start)], [0] * start
        for number, (question, answer) in enumerate(turns, 1):
            asked, said = self.turn(question, answer)
            size = len(asked) + len(said)
            if self.max_length is not None and number > 1 and len(input_ids) + size > self.max_length:
                break
            input_ids += asked + said
            labels += [IGNORE] * len(asked) + said
            positions += range(start, start + size)
            branches += [number] * size
        return {"input_ids": input_ids, "labels": labels, "position_ids": positions, "branches": branches}


class TokenizedPictures(Dataset):
    """Rows of pictures with what `TurnTokens` returns of them, and `pixels` (H, W, 3) in bytes."""

    def __init__(self, rows: Sequence[PictureRow], tokens: TurnTokens):
        self.rows, self.tokens = rows, tokens

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self.rows[number]
        return {**self.tokens(row.turns), "pixels": numpy.asarray(row.picture)}


class PictureCollator:
    """Pads rows at their end, scales pixels as the image processor does, and keeps questions apart by a mask.

    The mask (B, 1, S, S) is true where a token looks: at what comes before it of its own branch and of the picture.

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
        # Padding is a branch of its own: a token that looked nowhere would have no softmax.
        fill = {"input_ids": self.pad_token_id, "labels": IGNORE, "position_ids": 0, "branches": -1}
        batch = {
            name: torch.tensor([[*row[name], *[value] * (longest - len(row[name]))] for row in rows])
            for name, value in fill.items()
        }
        branches = batch.pop("branches")
        is_seen = (branches[:, None] == 0) | (branches[:, None] == branches[:, :, None])
        batch["attention_mask"] = is_seen.tril()[:, None]
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
