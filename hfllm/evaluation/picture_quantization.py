"""Evaluate a model that sees before and after quantization: what it makes of pictures, beside what it weighs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from hfllm.evaluation.pictures import Asked, is_right
from hfllm.evaluation.quantization import QuantizationEvaluation
from hfllm.outputs.report import change_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin


# Questions that are answered together: with pictures each has many tokens.
BATCH_SIZE = 8


@dataclass
class AnswerTokens:
    """A question with its right answer, as a model reads both.

    Args:
        inputs: what the model takes of them, one row.
        begin: the place of the answer's first token.
    """

    inputs: "dict[str, torch.Tensor]"
    begin: int


@dataclass
class PictureQuantization(QuantizationEvaluation):
    """Evaluation of a model that sees and its quantized forms, on questions about pictures.

    In place of the perplexity on texts it has `loss`, the nats per token of right answers, and `right`, the share of
    greedy answers that are right; the agreement is that on the tokens of right answers.

    Args:
        processor: of all of them, which is saved with the quantized form.
        questions: with their right answers.
        num_losses: of how many of the questions the loss is measured, at most.
    """

    processor: "ProcessorMixin | None" = None
    questions: Sequence[Asked] = ()
    num_losses: int = 256

    def __post_init__(self) -> None:
        self._measured: dict[str, tuple[list[float], list[float]]] = {}

    @property
    def answers(self) -> Iterator[AnswerTokens]:
        """The questions of the loss, each read when it is its turn: the pixels of all would fill much memory."""
        return (answer_tokens(self.processor, question) for question in self.questions[: self.num_losses])

    def save_reader(self, folder: str) -> None:
        self.processor.save_pretrained(folder)

    def loss(self, model: "PreTrainedModel", num_texts: int) -> float:
        """Return nats per token of the first right answers, each answer counting as much."""
        nats = [_answer_nats(model, answer) for answer in islice(self.answers, num_texts)]
        return sum(nats) / len(nats)

    def difference_after_reload(self, model: "PreTrainedModel", folder: str) -> float:
        """Return the largest difference of logits between a model and the one saved in `folder`, on one question."""
        from transformers import AutoModelForImageTextToText

        from hfllm.models.loading.saved import saved_model

        again = saved_model(AutoModelForImageTextToText, folder).eval()
        again = again if again.device == model.device else again.to(model.device)
        first = next(self.answers)
        ours, theirs = (_logits(each, first) for each in (model, again))
        return (ours - theirs).abs().max().item()

    def changes(self, name: str) -> dict[str, float]:
        """Return loss and right answers of the original and of a quantized form, with the errors of the change."""
        before, after = self._measured["original"], self._measured[name]
        return change_of("loss", before[0], after[0]) | change_of("right", before[1], after[1])

    def _greedy(self, model: "PreTrainedModel") -> "torch.Tensor":
        import torch

        return torch.cat([_logits(model, answer).argmax(-1).cpu() for answer in self.answers])

    def _quality(self, name: str, model: "PreTrainedModel") -> dict[str, float]:
        from hfllm.multimodal.answers import answer_pictures

        prompts, images = [each.prompt for each in self.questions], [each.images for each in self.questions]
        said = answer_pictures(model, self.processor, prompts, images, self.response_length, BATCH_SIZE)
        right = [float(is_right(text, each.answer)) for text, each in zip(said, self.questions, strict=True)]
        nats = [_answer_nats(model, answer) for answer in self.answers]
        self._measured[name] = nats, right
        return {"loss": sum(nats) / len(nats), "right": sum(right) / len(right)}


def answer_tokens(processor: "ProcessorMixin", asked: Asked) -> AnswerTokens:
    """Return a question and its right answer as a model reads them, with the place where the answer begins."""
    import sys

    from hfllm.data.images import read_image
    from hfllm.data.picture_batches import conversation_batch

    shown = [[read_image(each, "a question", max_pixels=sys.maxsize, min_side=1) for each in asked.images]]
    whole = [*asked.prompt, {"role": "assistant", "content": [{"type": "text", "text": asked.answer}]}]
    inputs: dict[str, Any] = dict(conversation_batch(processor, [whole], shown))
    begun = conversation_batch(processor, [asked.prompt], shown, add_generation_prompt=True)["input_ids"][0]
    ids = inputs["input_ids"][0]
    # Templates may begin an answer with what they leave out of one that is there.
    same = (ids[: len(begun)] == begun[: len(ids)]).long().cumprod(0).sum().item()
    return AnswerTokens(inputs, min(same, len(ids) - 1))


def _logits(model: "PreTrainedModel", answer: AnswerTokens) -> "torch.Tensor":
    """Return the logits (A, V) of an answer's tokens, in single precision."""
    import torch

    with torch.inference_mode():
        inputs = {name: value.to(model.device) for name, value in answer.inputs.items()}
        return model(**inputs, use_cache=False).logits[0, answer.begin - 1 : -1].float()


def _answer_nats(model: "PreTrainedModel", answer: AnswerTokens) -> float:
    """Return the mean nats per token of an answer."""
    from torch.nn import functional as F

    logits = _logits(model, answer)
    return F.cross_entropy(logits, answer.inputs["input_ids"][0, answer.begin :].to(logits.device)).item()
