"""Trainers for fine-tuning and reward models, from TRL, and for heads and images, with exact metrics.

Importing this file imports TRL, which takes seconds.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache, wraps
from types import MethodType
from typing import Any

import numpy
import torch
import trl
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, pad
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, Trainer
from transformers.utils import ModelOutput
from trl.trainer.utils import FusedCausalLMOutput

from hfllm.data.images.rows import conversation_batch
from hfllm.data.packing import IGNORE
from hfllm.data.world.pictures import HELD_OUT, PATCH_WORDS, PictureRow, Scene, patch_names
from hfllm.flags import changed
from hfllm.generation.scoring import evaluating
from hfllm.models.family.layers_hfllm import missing_rows
from hfllm.models.family.modeling_hfllm import HfllmModel
from hfllm.trainers.mixins import ROW_LENGTHS, EachRowOnce, TokenMeanEvaluation

# ---- TRL's trainers ----


class SFTTrainer(TokenMeanEvaluation, trl.SFTTrainer):
    """TRL's SFTTrainer; `eval_loss`, `eval_entropy` and `eval_mean_token_accuracy` are means over all targets."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        score_targets_only(self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return TRL's loss; in evaluation without the load-balancing loss of experts, logged separately by TRL."""
        weight = self.router_aux_loss_coef
        if self._kept is not None:
            self.router_aux_loss_coef = 0.0
        try:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self.router_aux_loss_coef = weight

    def _measured(self, row_metrics: torch.Tensor) -> dict[str, float]:
        counts, logged = row_metrics[..., 1].sum(0), self._metrics["eval"]
        for name in ("entropy", "mean_token_accuracy"):
            # TRL's own are of all processes, one per batch; `log` averages these values.
            values = torch.tensor(logged[name], dtype=torch.double)
            if len(values) == len(counts):
                logged[name] = [((values * counts).sum() / counts.sum().clamp(min=1)).item()]
        return super()._measured(row_metrics)


class RewardTrainer(EachRowOnce, trl.RewardTrainer):
    """TRL's RewardTrainer; `eval_loss`, `eval_accuracy` and the other metrics of rewards cover all pairs."""

    loss_label = "loss (nats per comparison)"

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """Return TRL's results for a batch, and keep the rewards of its pairs."""
        inputs = {name: value for name, value in inputs.items() if name != ROW_LENGTHS}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return TRL's loss; in evaluation also keep both rewards of all pairs and the requested margin."""
        if self._kept is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        chosen, rejected = outputs.logits.detach().squeeze(-1).float().chunk(2)
        margin = inputs["margin"].float() if "margin" in inputs else torch.zeros_like(chosen)
        is_new = torch.arange(len(chosen), device=chosen.device) < self._num_new_rows(len(chosen))
        self._kept.append(torch.stack((chosen, rejected, margin, is_new.float()), 1))
        return (loss, outputs) if return_outputs else loss

    def _measured(self, row_metrics: torch.Tensor) -> dict[str, float]:
        chosen, rejected, margin, is_new = row_metrics.flatten(0, 1).unbind(1)
        chosen, rejected, margin = (values[is_new > 0] for values in (chosen, rejected, margin))
        rewards = torch.cat((chosen, rejected))
        figures = {
            "accuracy": (chosen > rejected).double().mean(),
            "margin": (chosen - rejected).mean(),
            **{"min_reward": rewards.min(), "mean_reward": rewards.mean(), "max_reward": rewards.max()},
        }
        # TRL has one value per batch; `log` averages these values.
        self._metrics["eval"].update({name: [value.item()] for name, value in figures.items()})
        loss = -nn.functional.logsigmoid(chosen - rejected - margin).mean()
        if self.args.center_rewards_coefficient is not None:
            loss += self.args.center_rewards_coefficient * (chosen + rejected).square().mean()
        return {"loss": loss.item()}


# ---- scores of targets ----
#
# On a CPU TRL's head computes all positions of a batch, in some forty passes over their logits, and again in the
# backward pass. Here it computes the targets alone, a third of the tokens of questions with answers, in few passes.
#
# Shapes: B rows, S sequence, N targets, E hidden size, V vocabulary.


# The most logits to keep until the backward pass, 64 MB in fp32; TRL's head computes larger ones in parts.
MOST_LOGITS = 2**24
LOSS_ARGUMENTS = ("fused_lm_head", "labels", "shift_labels", "num_items_in_batch", "use_cache")
# Fields of configs of transformers for logits other than the plain product, or a loss besides theirs.
LOGIT_SCALES = (
    *("final_logit_softcapping", "logit_scale", "logits_scaling"),
    *("output_multiplier", "lm_head_multiplier", "output_router_logits"),
)


class _TargetScores(torch.autograd.Function):
    """Log-probabilities of targets from the states before the head, and entropies and hits without a gradient."""

    @staticmethod
    def forward(ctx, states, weight, targets):
        logits = nn.functional.linear(states, weight).float()
        highest, best = logits.max(-1)
        probabilities = logits.softmax(-1)
        # The highest probability is one over the sum of exp(logit - highest): faster on a CPU than `logsumexp`.
        normalizer = highest - probabilities.amax(-1).log()
        scores = logits.gather(1, targets.unsqueeze(1)).squeeze(1) - normalizer
        entropy, is_best = normalizer - logits.mul_(probabilities).sum(-1), best == targets
        ctx.save_for_backward(states, weight, targets, probabilities)
        ctx.mark_non_differentiable(entropy, is_best)
        return scores, entropy, is_best

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        states, weight, targets, probabilities = ctx.saved_tensors
        # d log p(target) / d logits = onehot - p
        grad = grad.unsqueeze(1)
        grad_logits = (probabilities * -grad).scatter_add_(1, targets.unsqueeze(1), grad).to(states.dtype)
        trains_states, trains_head, _ = ctx.needs_input_grad
        return grad_logits @ weight if trains_states else None, grad_logits.t() @ states if trains_head else None, None


def score_targets_only(model: PreTrainedModel) -> None:
    """Let a model with TRL's head compute only positions with targets, where this is the same and takes less time.

    Args:
        model: with `add_fused_lm_head`, and without an adapter around it.
    """
    whole, config = model.forward, model.config.get_text_config()
    is_plain = all(getattr(config, name, None) in (None, False, 1) for name in LOGIT_SCALES)

    @wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> ModelOutput:
        head, labels = self.get_output_embeddings(), kwargs.get("labels")
        has_more = kwargs.get("shift_labels") is not None or kwargs.get("output_router_logits")
        if has_more or not (kwargs.get("fused_lm_head") and is_plain and _is_plain_head(head, labels)):
            return whole(*args, **kwargs)
        others = {name: value for name, value in kwargs.items() if name not in LOSS_ARGUMENTS}
        targets = labels[:, 1:]
        mask = targets != IGNORE
        if isinstance(self.base_model, HfllmModel):
            others["is_read"] = pad(mask, (0, 1))
        states = self.base_model(*args, **others, use_cache=False).last_hidden_state[:, :-1]
        states, weight = states[mask], head.weight
        if torch.is_autocast_enabled("cpu"):
            # Outside of the function, whose backward pass is without autocast.
            states, weight = (each.to(torch.get_autocast_dtype("cpu")) for each in (states, weight))
        missing = missing_rows(len(states), states.device)
        found = _TargetScores.apply(pad(states, (0, 0, 0, missing)), weight, pad(targets[mask], (0, missing)))
        scores, entropy, is_best = (each.new_zeros(mask.shape).masked_scatter(mask, each) for each in found)
        count = mask.sum().clamp(min=1) if (given := kwargs.get("num_items_in_batch")) is None else given
        fields = {"log_probs": scores, "entropy": entropy, "is_top1": is_best, "label_mask": mask}
        return FusedCausalLMOutput(loss=-scores.sum() / count, **fields)

    model.forward = MethodType(forward, model)


def _is_plain_head(head: nn.Module, labels: torch.Tensor) -> bool:
    """Return whether a head is a product with a whole matrix in fp32, with few enough logits for these labels."""
    weight = head.weight
    if getattr(head, "bias", None) is not None or type(weight) not in (torch.Tensor, nn.Parameter):
        return False
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        return False
    return not hasattr(weight, "ds_id") and (labels[:, 1:] != IGNORE).sum() * len(weight) <= MOST_LOGITS


class PictureCompared:
    """Collator of comparisons of answers about images: the chosen conversations, then the rejected ones.

    Args:
        processor: of the model.
    """

    def __init__(self, processor: ProcessorMixin):
        self.processor = processor

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        conversations = [[*row["prompt"], *row[side]] for side in ("chosen", "rejected") for row in rows]
        return dict(conversation_batch(self.processor, conversations, [row["images"] for row in rows] * 2))


class PictureRewardTrainer(RewardTrainer):
    """RewardTrainer on comparisons of answers about images, unsupported by TRL's.

    Args:
        processor: the model's, saved with it.
        kwargs: as RewardTrainer's; datasets have `prompt`, `chosen` and `rejected` messages with parts, and `images`.
    """

    def __init__(self, processor: ProcessorMixin, **kwargs: Any):
        # TRL asks a tokenizer for its padding.
        super().__init__(processing_class=processor.tokenizer, data_collator=PictureCompared(processor), **kwargs)
        self.processing_class = self.callback_handler.processing_class = processor

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt", "chosen", "rejected", "images"]

    def is_right(self, dataset: Dataset) -> list[float]:
        """Return for each comparison whether the chosen answer has the higher score, only in this process."""
        model, result = self.model, []
        with evaluating(model), torch.no_grad(), self.accelerator.autocast():
            for batch in DataLoader(dataset, self.args.per_device_eval_batch_size, collate_fn=self.data_collator):
                inputs = {name: value.to(model.device) for name, value in batch.items()}
                chosen, rejected = model(**inputs, use_cache=False).logits.squeeze(-1).float().chunk(2)
                result += (chosen > rejected).float().tolist()
        return result


# ---- heads ----
#
# Training of heads for labels: of sequences, of tokens, and of the two ends of a span.
#
# The loss is the sum over all targets of an optimizer step, divided by their number, however they are divided into
# batches and processes; targets of -100 have none.


# Parts of an output other than scores.
NO_SCORES = ["loss", "cache", "past_key_values", "hidden_states", "attentions", "router_logits"]


def scores_of(outputs: ModelOutput) -> torch.Tensor:
    """Return scores (..., classes): the logits, or for spans (B, 2, S), of each token to be the first and the last."""
    if "start_logits" in outputs:
        return torch.stack((outputs["start_logits"], outputs["end_logits"]), 1)
    return outputs["logits"]


def head_loss(
    outputs: ModelOutput,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the cross entropy of labels, in nats.

    Args:
        outputs: of a model with a head.
        labels: (B) of sequences, (B, S) of tokens, (B, 2) of spans.
        num_items_in_batch: targets of the whole optimizer step; without it the mean over these is returned.
        attention_mask: (B, S). No span begins or ends in padding, so its length changes nothing.
    """
    scores = scores_of(outputs).float()
    if attention_mask is not None and "start_logits" in outputs:
        is_padding = attention_mask.eq(0).unsqueeze(1).to(scores.device)
        scores = scores.masked_fill(is_padding, torch.finfo(scores.dtype).min)
    total = cross_entropy(scores.flatten(0, -2), labels.flatten().to(scores.device), reduction="sum")
    return total / (labels.ne(IGNORE).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


class HeadTrainer(Trainer):
    """`transformers.Trainer` with that loss, and batches padded at their end.

    Args:
        kwargs: as Trainer's. Rows have `input_ids` and `labels`.
    """

    loss_label = "loss (nats per label)"

    def __init__(self, **kwargs: Any):
        kwargs["args"] = changed(kwargs["args"], label_names=["labels"])
        collate = HeadCollator(kwargs["processing_class"].pad_token_id)
        super().__init__(compute_loss_func=self._loss, data_collator=collate, **kwargs)

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return Trainer's loss, by `head_loss`."""
        self._mask = inputs["attention_mask"]
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _loss(self, outputs: ModelOutput, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return head_loss(outputs, labels, num_items_in_batch, self._mask)

    def _get_eval_sampler(self, eval_dataset: Any) -> SequentialSampler | None:
        """Return rows in their order: Trainer's grouping by length, for training, would reach held-out rows too."""
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """Return Trainer's results; only scores are kept of an output."""
        return super().prediction_step(model, inputs, prediction_loss_only, NO_SCORES)


class StepTrainer(HeadTrainer):
    """The same for one score of a token, the logit of its label being 1: labels lie in [0, 1], and -100 is none."""

    loss_label = "loss (nats per step)"

    def _loss(self, outputs: ModelOutput, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        scores, labels = scores_of(outputs).float().squeeze(-1), labels.to(torch.float32)
        known = labels.ne(IGNORE)
        total = binary_cross_entropy_with_logits(scores[known], labels[known].to(scores.device), reduction="sum")
        return total / (known.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


class HeadCollator:
    """Pads rows at their end: ids with `pad_token_id`, labels of tokens with -100."""

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        missing = [longest - len(row["input_ids"]) for row in rows]
        pairs = list(zip(rows, missing, strict=True))
        batch = {
            "input_ids": [[*row["input_ids"], *[self.pad_token_id] * more] for row, more in pairs],
            "attention_mask": [[1] * len(row["input_ids"]) + [0] * more for row, more in pairs],
        }
        labels = [row["labels"] for row in rows]
        if not isinstance(labels[0], int) and len(labels[0]) == len(rows[0]["input_ids"]):
            labels = [[*row["labels"], *[IGNORE] * more] for row, more in pairs]
        return {name: torch.tensor(values) for name, values in {**batch, "labels": labels}.items()}


# ---- pictures ----
#
# Training on images drawn while reading them: tokens and pixels by the batch, without a processor's detours.
#
# TRL's SFTTrainer calls the processor for every image of every batch. For a model of a few hundred thousand
# weights this takes as long as the model. Here questions, few and kept, are tokenized one by one, and pixels go
# from bytes to the model in one step. Both are the same as the processor's; a test compares them.
#
# All questions about an image stand behind it in one row, but none sees another: each is answered as if it were the
# only one. Otherwise a question could be answered from an earlier answer and not from the image. The image is computed
# once for all of them. Rows of your own, and other models, are trained by TRL: see `hfllm.stages.vision.flags`.


# Turns whose tokens are kept.
KEPT_TURNS = 100_000
# Placeholders of a question and an answer while the template's own marks are read.
QUESTION, ANSWER = "\x01", "\x02"


class TurnTokens:
    """Tokens of an image and of several questions about it, each with its answer as in a conversation of its own.

    Args:
        processor: with a tokenizer with the family's chat template, which puts the image before the question.
        image_token_id: of a piece of the image.
        num_image_tokens: pieces of an image.
        max_length: tokens of a row; all turns from the first too long one on are left out. One always stays.
    """

    def __init__(
        self, processor: ProcessorMixin, image_token_id: int, num_image_tokens: int, max_length: int | None = None
    ):
        self.tokenizer, self.max_length = processor.tokenizer, max_length
        mark = self.tokenizer.convert_ids_to_tokens(image_token_id)
        question = [{"role": "user", "content": [{"type": "text", "text": mark + QUESTION}]}]
        answer = [{"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}]
        text = self.tokenizer.apply_chat_template(question + answer, tokenize=False)
        # Around the question and the answer are marks of the template, never crossed by a token of the words.
        begin, _, rest = text.partition(mark + QUESTION)
        between, _, end = rest.partition(ANSWER)
        self.picture = self._ids(begin) + [image_token_id] * num_image_tokens
        self._between, self._end = self._ids(between), self._ids(end)
        self.turn = lru_cache(KEPT_TURNS)(self._turn)

    def __getstate__(self) -> dict[str, Any]:
        # A process that draws rows ahead has a cache of its own.
        return {name: value for name, value in self.__dict__.items() if name != "turn"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, turn=lru_cache(KEPT_TURNS)(self._turn))

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def _turn(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Return the tokens of the question after the image, and the tokens of the answer and its end."""
        return self._ids(question) + self._between, self._ids(answer) + self._end

    def __call__(self, turns: Sequence[tuple[str, str]]) -> dict[str, list[int]]:
        """Return `input_ids`, `labels` of the answers and their end marks, `position_ids`, and `branches`.

        Branch 0 is the image, branch N the Nth question with its answer. Positions of each begin where the positions
        of the image end.
        """
        start = len(self.picture)
        input_ids, labels = [*self.picture], [IGNORE] * start
        positions, branches = [*range(start)], [0] * start
        for number, (question, answer) in enumerate(turns, 1):
            question_ids, answer_ids = self.turn(question, answer)
            size = len(question_ids) + len(answer_ids)
            if self.max_length is not None and number > 1 and len(input_ids) + size > self.max_length:
                break
            input_ids += question_ids + answer_ids
            labels += [IGNORE] * len(question_ids) + answer_ids
            positions += range(start, start + size)
            branches += [number] * size
        return {"input_ids": input_ids, "labels": labels, "position_ids": positions, "branches": branches}


class PatchNames:
    """The names of what is in each patch of a drawn scene, and the loss of naming them by the patch's vector.

    A name's score is the product of the patch's vector, as the decoder gets it, with the embedding of the name's last
    token; nothing has the score 0. Learned so, a tower sees in a twentieth of the steps that answers alone take, since
    each patch is a target and the decoder is not computed; and the decoder finds in an image the words that it reads.

    Each patch with a part of a shape names its color and shape, the one with its center its corner too: so a color is
    named whatever part of whatever shape it is in. A pair of color and shape that no training image shows is no wrong
    answer either: else it is learned that there is none.

    Args:
        tokenizer: of the decoder.
        patch_size: in pixels.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, patch_size: int):
        self.patch_size = patch_size
        encode = tokenizer.backend_tokenizer.encode
        # As they are in answers, which begin with the first word of a corner.
        self.ids = [
            [encode(space + name, add_special_tokens=False).ids[-1] for name in names]
            for space, names in zip((" ", " ", "", " "), PATCH_WORDS, strict=True)
        ]
        colors, shapes = (list(names) for names in PATCH_WORDS[:2])
        unseen = torch.zeros(len(colors) + 1, len(shapes) + 1, dtype=torch.bool)
        for color, shape in HELD_OUT:
            unseen[colors.index(color) + 1, shapes.index(shape) + 1] = True
        # Of each shape the colors that it never has in training, and of each color the shapes.
        self._unseen = (unseen.T, unseen)
        # What a scene has no name for is no target.
        self._numbers = [
            {"": IGNORE} | {name: number for number, name in enumerate(names, 1)} for names in PATCH_WORDS
        ]

    def __call__(self, scene: Scene) -> list[tuple[int, ...]]:
        """Return for each patch the numbers of its words, from 1; 0 where nothing is, -100 for what has no name."""
        result = []
        for names in patch_names(scene, self.patch_size):
            found = [numbers[name] for numbers, name in zip(self._numbers, names or (), strict=False)]
            result.append((*found, *[0] * (len(PATCH_WORDS) - len(found))))
        return result

    def loss(self, vectors: torch.Tensor, embeddings: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the cross entropy of the names, in nats per patch.

        Args:
            vectors: of the patches (B * N, E).
            embeddings: of all tokens (V, E).
            targets: (B, N, 4), as this returns them.
        """
        total = vectors.new_zeros(())
        colors, shapes, *places = targets.flatten(0, 1).unbind(-1)
        others = (shapes, colors)
        for kind, (ids, numbers) in enumerate(zip(self.ids, (colors, shapes, *places), strict=True)):
            scores = pad(vectors @ embeddings[ids].T, (1, 0)).float()
            if kind < len(others):
                unseen = self._unseen[kind].to(scores.device)[others[kind].clamp(min=0)]
                unseen.scatter_(1, numbers.clamp(min=0).unsqueeze(1), value=False)
                scores = scores.masked_fill(unseen, -torch.inf)
            total = total + cross_entropy(scores, numbers, reduction="sum") / (numbers != IGNORE).sum().clamp(1)
        return total


class TokenizedPictures(Dataset):
    """Rows of images with the results of `TurnTokens` for them, and `pixels` (H, W, 3) in bytes.

    With `names` each has `patches` (N, 4), the results of `PatchNames`.
    """

    def __init__(self, rows: Sequence[PictureRow], tokens: TurnTokens, names: PatchNames | None = None):
        self.rows, self.tokens, self.names = rows, tokens, names

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self.rows[number]
        patches = {} if self.names is None else {"patches": self.names(row.scene)}
        return {**self.tokens(row.turns), "pixels": numpy.asarray(row.picture), **patches}


class PictureCollator:
    """Pads rows at their end, scales pixels as the image processor does, and keeps questions apart by a mask.

    The mask (B, 1, S, S) is true where a token attends: to earlier tokens of its own branch and of the image.

    Args:
        pad_token_id: of padding, absent from labels.
        mean: of the three channels, from 0 to 1.
        std: likewise.
    """

    def __init__(self, pad_token_id: int, mean: Sequence[float], std: Sequence[float]):
        self.pad_token_id = pad_token_id
        self.mean, self.std = (torch.tensor(each).view(1, 3, 1, 1) for each in (mean, std))

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        # Padding is a branch of its own: a token without attention would have no softmax.
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
        if "patches" in rows[0]:
            batch["patches"] = torch.tensor([row["patches"] for row in rows])
        return batch


def answer_loss(
    outputs: ModelOutput, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Return the cross entropy of the tokens of answers, in nats.

    Args:
        outputs: with logits (B, W, V) of the last W positions; the last predicts nothing here.
        labels: (B, S), at least W - 1 long.
        num_items_in_batch: targets of the whole optimizer step; without it the mean over these is returned.
    """
    targets = labels[:, labels.shape[1] - outputs.logits.shape[1] + 1 :]
    is_learned = targets != IGNORE
    total = cross_entropy(outputs.logits[:, :-1][is_learned].float(), targets[is_learned], reduction="sum")
    return total / (is_learned.sum() if num_items_in_batch is None else num_items_in_batch)


class PictureTrainer(Trainer):
    """`transformers.Trainer` on rows of images, with logits of only the positions with targets.

    Args:
        rows: the training rows.
        tokens: of their turns.
        processor: the model's, saved with it.
        names: to be learned beside the answers, by rows that all have scenes; batches without any turn learn only
            these.
        kwargs: as Trainer's.
    """

    def __init__(
        self,
        rows: Sequence[PictureRow],
        tokens: TurnTokens,
        processor: ProcessorMixin,
        names: PatchNames | None = None,
        **kwargs: Any,
    ):
        images, self.names = processor.image_processor, names
        collate = PictureCollator(processor.tokenizer.pad_token_id, images.image_mean, images.image_std)
        dataset = TokenizedPictures(rows, tokens, names)
        kwargs |= {"train_dataset": dataset, "data_collator": collate, "processing_class": processor}
        super().__init__(compute_loss_func=answer_loss, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Return Trainer's loss, by `answer_loss`: before the first answer, where the images are, no logits.

        With `names` their loss is added.
        """
        labels, targets = inputs["labels"], inputs.get("patches")
        inputs = {name: value for name, value in inputs.items() if name != "patches"}
        is_learned = (labels != IGNORE).any(0)
        if targets is not None and not is_learned.any():
            loss = self._loss_of_names(self._vectors(model, inputs), targets)
            return (loss, {}) if return_outputs else loss
        begin = int(is_learned.nonzero()[0])
        inputs = {**inputs, "logits_to_keep": labels.shape[1] - begin + 1, "use_cache": False}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if targets is not None:
            loss = loss + self._loss_of_names(outputs.image_outputs.pooler_output, targets)
        return (loss, outputs) if return_outputs else loss

    def _vectors(self, model: nn.Module, inputs: Mapping[str, Any]) -> Sequence[torch.Tensor]:
        """Return the vectors of the images, without the decoder where no wrapper of several processes needs it."""
        if model is self.model:
            return model.model.get_image_features(inputs["pixel_values"]).pooler_output
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        return model(**inputs, logits_to_keep=1, use_cache=False).image_outputs.pooler_output

    def _loss_of_names(self, vectors: Sequence[torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
        embeddings = self.model.get_input_embeddings().weight
        loss = self.names.loss(torch.cat(tuple(vectors)), embeddings, targets)
        return loss / self.args.gradient_accumulation_steps

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
        """Return rows in their order: each is drawn by chance already, and captions come before questions."""
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)
