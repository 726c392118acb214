"""Compare a model before and after fine-tuning: its loss on the same held-out rows, its answers to some prompts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from hfllm.data.rows import content_text
from hfllm.evaluation.distillation import row_losses
from hfllm.generation.responses import sample_responses
from hfllm.outputs.report import change_of, is_noise, plus_minus, ratio_error

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

    Row = Mapping[str, Any]
    Collate = Callable[[Sequence[Row]], Row]
    Answer = Callable[[PreTrainedModel, Sequence[Row]], list[str]]

# Held-out rows and prompts that are read, so that it takes a small part of the training.
MOST_ROWS, MOST_PROMPTS, ANSWER_LENGTH = 64, 8, 48
SAMPLES = "The same prompts before and after"


@dataclass(frozen=True)
class TunedEvaluation:
    """Results of one model.

    Args:
        rows: nats and number of targets of each held-out row.
        prompts: held-out prompts, the first ones.
        answers: its greedy answers to them.
    """

    rows: Sequence[tuple[float, int]]
    prompts: Sequence[Any]
    answers: Sequence[str]


def evaluate_tuned(
    trainer: "Trainer",
    held_out: Sequence[Mapping[str, Any]],
    tokenized: "Dataset | None" = None,
    collate: "Collate | None" = None,
    answer: "Answer | None" = None,
) -> TunedEvaluation | None:
    """Evaluate the trainer's current model, and leave the random state as it is.

    `None` where rows or weights are spread over processes or devices, and for data that is streamed.

    Args:
        held_out: the rows of the trainer's evaluation dataset before they were tokenized.
        tokenized: the same as `input_ids` and `labels`, for a trainer that joins several rows to one: they are read
            one by one, cut to its `max_length`. By default its own dataset and collator are used.
        collate: makes batches of these in place of that.
        answer: returns a model's answers to rows, in place of `sample_responses` on their prompts.
    """
    from torch.utils.data import DataLoader

    from hfllm.models.devices import forked_random

    model, dataset = trainer.model, trainer.eval_dataset if tokenized is None else tokenized
    longest = getattr(trainer.args, "max_length", None)
    if collate is None:
        collate = trainer.data_collator if tokenized is None else partial(_padded, longest=longest)
    is_spread = trainer.args.world_size > 1 or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    if is_spread or not hasattr(dataset, "select"):
        return None
    dataset = dataset.select(range(min(MOST_ROWS, len(dataset))))
    asked = [row for row in held_out[:MOST_PROMPTS] if row.get("prompt")]
    prompts = [row["prompt"] for row in asked]
    with forked_random(model.device), trainer.accelerator.autocast():
        loader = DataLoader(dataset, trainer.args.per_device_eval_batch_size, collate_fn=collate)
        rows = row_losses(model, filter(None, map(_with_targets, loader)))
        answers = (answer or partial(_answers, tokenizer=trainer.processing_class))(model, asked)
    return TunedEvaluation([row for row in rows if row[1]], prompts, answers)


def _answers(
    model: "PreTrainedModel", rows: Sequence[Mapping[str, Any]], tokenizer: "PreTrainedTokenizerBase"
) -> list[str]:
    if not rows:
        return []
    # A processor has it.
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    settings = {"max_new_tokens": ANSWER_LENGTH, "do_sample": False, "tools": [row.get("tools") for row in rows]}
    return [said for (said,) in sample_responses(model, tokenizer, [row["prompt"] for row in rows], **settings)]


def _padded(rows: Sequence[Mapping[str, Any]], longest: int | None) -> dict[str, Any]:
    """Return the first `longest` tokens of rows as a batch, padded on the right without targets or attention."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    names = ("input_ids", "labels")
    columns = {name: [torch.tensor(row[name][:longest], dtype=torch.long) for row in rows] for name in names}
    columns["attention_mask"] = [torch.ones_like(ids) for ids in columns["input_ids"]]
    fillers = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {name: pad_sequence(parts, True, fillers[name]) for name, parts in columns.items()}


def _with_targets(batch: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a batch with each position's next token as its target; `None` where rows are joined to one."""
    if "attention_mask" not in batch:
        return None
    targets = batch["labels"].roll(-1, 1)
    targets[:, -1] = -100
    return {**{name: value for name, value in batch.items() if name != "labels"}, "shift_labels": targets}


def tuning_metrics(before: TunedEvaluation | None, after: TunedEvaluation | None) -> dict[str, float]:
    """Return the held-out loss per token before and after, with the errors of its mean over rows and of the change."""
    if before is None or after is None or not after.rows:
        return {}
    counts = [count for _, count in after.rows]
    nats = [[nats for nats, _ in each.rows] for each in (before, after)]
    found = change_of("held_out_loss", *([total / sum(counts) for total in each] for each in nats))
    differences = [late - early for early, late in zip(*nats, strict=True)]
    errors = {"before_se": nats[0], "after_se": nats[1], "change_se": differences}
    # The loss is a mean over tokens: rows count by their length.
    exact = {f"held_out_loss_{name}": ratio_error(sums, counts) for name, sums in errors.items()}
    means = {
        f"held_out_loss_{side}": sum(each) / sum(counts) for side, each in zip(("before", "after"), nats, strict=True)
    }
    found |= means | {name: error for name, error in exact.items() if error is not None}
    return found | {"held_out_loss_change": means["held_out_loss_after"] - means["held_out_loss_before"]}


def tuning_summary(metrics: Mapping[str, float]) -> str:
    """Return how the held-out loss has changed, in words; nothing where it was not measured."""
    if "held_out_loss_change" not in metrics:
        return ""
    before, after = (
        plus_minus(metrics[f"held_out_loss_{side}"], metrics.get(f"held_out_loss_{side}_se"))
        for side in ("before", "after")
    )
    change, error, n = (metrics.get(f"held_out_loss_{part}") for part in ("change", "change_se", "n"))
    rows = f"{n} held-out row{'' if n == 1 else 's'}"
    if error is None:
        return f"held-out loss {before} before and {after} nats per token after on {rows}: too few to tell"
    if is_noise(change, error):
        return f"held-out loss not changed beyond noise, {before} before and {after} nats per token after on {rows}"
    return f"held-out loss {'fell' if change < 0 else 'rose'} from {before} to {after} nats per token on {rows}"


def tuning_tables(before: TunedEvaluation | None, after: TunedEvaluation | None) -> dict[str, list[dict[str, str]]]:
    """Return the table of greedy answers to the first held-out prompts, before and after."""
    if before is None or after is None or not after.prompts:
        return {}
    return {
        SAMPLES: [
            {"prompt": prompt_text(prompt), "before": first, "after": second}
            for prompt, first, second in zip(after.prompts, before.answers, after.answers, strict=True)
        ]
    }


def prompt_text(prompt: str | Sequence[Mapping[str, str]]) -> str:
    """Return a prompt as one text: messages one after another."""
    return prompt if isinstance(prompt, str) else " / ".join(content_text(message["content"]) for message in prompt)
