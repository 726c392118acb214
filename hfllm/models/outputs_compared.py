"""Compare the outputs of models that should be the same, on random tokens."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

# What rounding may change, as a share of the largest logit: in single precision, and in half.
TOLERANCE, TOLERANCE_IN_HALF = 1e-4, 5e-2
LENGTH = 64


def random_tokens(vocab_size: int, context: int | None, seed: int) -> "torch.Tensor":
    """Return a row of random tokens, (1, `LENGTH`) or as long as a model's context."""
    import torch

    # Most vocabularies put special tokens first, and scorers skip padding.
    first, generator = min(3, vocab_size - 1), torch.Generator().manual_seed(seed)
    return torch.randint(first, vocab_size, (1, min(LENGTH, context or LENGTH)), generator=generator)


def logits_of(model: "PreTrainedModel | PeftModel", ids: "torch.Tensor") -> "torch.Tensor":
    """Return a model's logits in single precision; of a model without a head its last hidden states."""
    import torch

    with torch.no_grad():
        outputs = model.eval()(input_ids=ids)
    return outputs["logits" if "logits" in outputs else "last_hidden_state"].float()


def is_rounding(difference: float, logits: "torch.Tensor", in_half: bool) -> bool:
    """Return whether a difference of outputs is no larger than rounding explains; one that is not a number is not."""
    return difference <= (TOLERANCE_IN_HALF if in_half else TOLERANCE) * logits.abs().max().item()
