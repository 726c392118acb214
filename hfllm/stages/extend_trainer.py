"""The short training of an extended model on rows of the new length."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hfllm.runs.arguments import changed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments


def make_trainer(
    training_args: "TrainingArguments",
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Sequence[int]],
) -> "Trainer":
    """Return a trainer that learns to predict every token of the rows."""
    import torch
    from datasets import Dataset
    from transformers import Trainer

    from hfllm.stages.pretrain_trainers import loss_settings
    from hfllm.trainers.callbacks import use_plain_lines

    settings = loss_settings(model, None)

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor | int]:
        ids = torch.tensor([row["input_ids"] for row in batch])
        return {"input_ids": ids, "labels": ids.clone(), **settings}

    trainer = Trainer(
        model=model,
        args=changed(training_args, eval_strategy="no"),
        train_dataset=Dataset.from_dict({"input_ids": [list(row) for row in rows]}),
        data_collator=collate,
        processing_class=tokenizer,
    )
    use_plain_lines(trainer)
    return trainer
