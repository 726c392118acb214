"""Whether a text follows from another, by a model of transformers that was trained to say so (NLI)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hfllm.data.tokenizer import plain_text
from hfllm.errors import InputError
from hfllm.models.loading.saved import max_length_of
from hfllm.rewards.passes import batches_of_like_length, evaluating, pass_precision

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ENTAILMENT = "entailment"


class EntailmentModel:
    """A sequence-classification model with a label `entailment`, such as one that was trained on MNLI.

    It is a check of claims (`hfllm.grounding.verification`), and tells which answers mean the same
    (`hfllm.grounding.meanings`).

    Args:
        model: from `AutoModelForSequenceClassification`; `config.id2label` names its labels.
        tokenizer: its own.
        batch_size: pairs in one pass.

    Raises:
        InputError: when the model has no such label, its config does not name labels, or its tokenizer has no padding
            token or tokens that the model has no embeddings for.
    """

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", batch_size: int = 32):
        from hfllm.models.loading.saved import check_vocabulary

        labels = {number: str(label) for number, label in (model.config.id2label or {}).items()}
        found = [int(number) for number, label in labels.items() if label.strip().casefold() == ENTAILMENT]
        if len(found) != 1 or len(labels) < 2:
            named = ", ".join(labels.values()) or "none"
            raise InputError(
                f"the entailment model's labels are {named}; expected one of two or more to be {ENTAILMENT!r}: name "
                "them in config.id2label, or take a model that was trained on natural language inference"
            )
        if tokenizer.pad_token_id is None:
            raise InputError("the entailment model's tokenizer has no padding token: set tokenizer.pad_token")
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        check_vocabulary(model, tokenizer, "entailment model")
        if model.config.pad_token_id is None:
            # Decoders read the label at the last token that is not padding.
            model.config.pad_token_id = tokenizer.pad_token_id
        self.model, self.tokenizer, self.batch_size, self.label = model, tokenizer, batch_size, found[0]

    def __call__(self, claims: Sequence[str], passages: Sequence[str]) -> list[float]:
        """Return for each claim the probability that its passage entails it.

        Raises:
            InputError: naming a pair that is longer than the model's context, and for logits that are not finite.
        """
        return [float(row[self.label]) for row in self._probabilities(passages, claims)]

    def in_both_directions(self, first: Sequence[str], second: Sequence[str]) -> list[bool]:
        """Return for each pair whether each text entails the other: it is the most probable label both times.

        Raises:
            InputError: as a call.
        """
        rows = self._probabilities([*first, *second], [*second, *first])
        entails = [int(row.argmax()) == self.label for row in rows]
        return [one and other for one, other in zip(entails[: len(first)], entails[len(first) :], strict=True)]

    def _probabilities(self, premises: Sequence[str], hypotheses: Sequence[str]) -> list["torch.Tensor"]:
        """Return the probabilities of the labels, (labels,) each."""
        import torch

        if not premises:
            return []
        # What separates premise and hypothesis must not be spelled by a text.
        plain = plain_text(self.tokenizer)
        encoded = self.tokenizer(list(map(plain, premises)), list(map(plain, hypotheses)), verbose=False)
        lengths, context = [len(ids) for ids in encoded["input_ids"]], max_length_of(self.model.config)
        for number, length in enumerate(lengths, 1):
            if context is not None and length > context:
                raise InputError(
                    f"pair {number} has {length} tokens, and the entailment model reads {context}: cut passages into "
                    f"shorter ones; it begins {premises[number - 1][:40]!r}"
                )
        found: list[torch.Tensor] = [torch.empty(0)] * len(lengths)
        with evaluating(self.model), torch.inference_mode(), pass_precision(self.model):
            for rows in batches_of_like_length(self.model, lengths, self.batch_size):
                batch = self.tokenizer.pad(
                    {name: [values[row] for row in rows] for name, values in encoded.items()},
                    padding_side="right",
                    return_tensors="pt",
                ).to(self.model.device)
                probabilities = self.model(**batch).logits.float().softmax(-1).cpu()
                if bool(probabilities.isnan().any()):
                    raise InputError("the entailment model's logits are not finite: its weights may be damaged")
                for row, numbers in zip(rows, probabilities, strict=True):
                    found[row] = numbers
        return found
