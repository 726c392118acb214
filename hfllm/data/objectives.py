"""Training objectives as functions of the data: fill-in-the-middle and masked language modeling.

What is drawn depends on `(seed, index)` alone, never on what was drawn before: a run that resumes, or that another
number of workers feeds, sees exactly the examples that it would have seen.
"""

import random
from collections.abc import Collection
from typing import TYPE_CHECKING

from hfllm.data.formats import infilling_prompt
from hfllm.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

# Where a prefix, a suffix and a middle begin, and where the middle ends.
INFILLING_TOKENS = ("<PRE>", "<SUF>", "<MID>", "<EOT>")
IGNORED = -100


def fill_in_the_middle(text: str, index: int, seed: int = 0, rate: float = 0.9, spm_rate: float = 0.5) -> str:
    """A document in Code Llama's infilling format, or as it is (arXiv:2308.12950, section 2.3; arXiv:2207.14255).

    It is cut at two characters, each drawn uniformly, and written as `infilling_prompt` writes prefix and suffix,
    followed by the middle and ` <EOT>`. No character is lost. The paper transforms only documents that fit into one
    context: cut to length first, and encode what this returns as it is, with the tokens of `INFILLING_TOKENS` special.

    Args:
        text: the document. One that is empty or holds an infilling token stays as it is: it could not be read back.
        index: the document's number in the data.
        seed: with `index`, what decides all that is drawn.
        rate: the probability that a document is transformed; the paper's is 0.9.
        spm_rate: the share of those that has the suffix first; the paper's is a half.

    Raises:
        InputError: when a probability is outside 0 to 1.
    """
    _check_probability("rate", rate)
    _check_probability("spm_rate", spm_rate)
    # Seeding by a string hashes it (SHA-512): neighboring seeds and indices give unrelated draws, on every machine.
    rng = random.Random(f"fill-in-the-middle {seed} {index}")
    if rng.random() >= rate or not text or any(token in text for token in INFILLING_TOKENS):
        return text
    suffix_first = rng.random() < spm_rate
    first, second = sorted(rng.randint(0, len(text)) for _ in range(2))
    return f"{infilling_prompt(text[:first], text[second:], suffix_first)}{text[first:second]} <EOT>"


def check_infilling_tokens(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Make sure that a tokenizer reads each of `INFILLING_TOKENS` as one token of its own, inside a text too.

    Raises:
        InputError: when it does not, with the call that adds what it lacks.
    """
    missing = []
    for token in INFILLING_TOKENS:
        # What belongs to the token is what a text has with it and not without it; Code Llama's takes the space along.
        inside = tokenizer(f"a {token}b", add_special_tokens=False)["input_ids"]
        found = [each for each in inside if token in tokenizer.convert_ids_to_tokens(each)]
        if len(found) != 1 or found[0] == tokenizer.unk_token_id:
            missing.append(token)
    if missing:
        raise InputError(
            f"the tokenizer {tokenizer.name_or_path!r} has no token for {', '.join(missing)}; fill-in-the-middle "
            f"needs all of {', '.join(INFILLING_TOKENS)}. Add them before the model is made, for example "
            f"tokenizer.add_special_tokens({{'extra_special_tokens': {missing}}}, replace_extra_special_tokens=False)"
        )


def seeded_generator(seed: int, index: int) -> "torch.Generator":
    """A random generator on the CPU whose draws depend on `(seed, index)` alone, to mask the batch `index` with."""
    import torch

    return torch.Generator().manual_seed(random.Random(f"masking {seed} {index}").getrandbits(63))


def masked_tokens(
    input_ids: "torch.Tensor",
    special_ids: Collection[int],
    mask_token_id: int,
    vocab_size: int,
    generator: "torch.Generator",
    probability: float = 0.15,
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Mask a batch as BERT does (Devlin et al. 2018, arXiv:1810.04805, section 3.1).

    Of the tokens that are to be predicted, 80% become the mask token, 10% another one drawn uniformly from the
    vocabulary, 10% stay. A row with any ordinary token has at least one to predict, as in BERT's own code, so that no
    short batch has an undefined loss.

    Args:
        input_ids: (B, S), on the CPU; left as it is.
        special_ids: ids that are never masked nor put in at random: padding and the like. The mask token is one.
        mask_token_id: the id of the mask token.
        vocab_size: random tokens are below this.
        generator: for example `seeded_generator(seed, index)`.
        probability: the probability that a token is to be predicted.

    Returns:
        The masked ids, (B, S), and the labels, (B, S): the original id where one is to be predicted, -100 elsewhere.

    Raises:
        InputError: when `probability` is outside 0 to 1, an id is outside the vocabulary, or it has special ids only.
    """
    import torch

    _check_probability("probability", probability)
    special = torch.tensor(sorted({mask_token_id, *special_ids}))
    for name, ids in (("input_ids", input_ids), ("special_ids and mask_token_id", special)):
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise InputError(f"{name} from {int(ids.min())} to {int(ids.max())}; vocab_size={vocab_size}")
    ordinary = torch.ones(vocab_size, dtype=torch.bool)
    ordinary[special] = False
    ordinary_ids = ordinary.nonzero().squeeze(1)
    if not len(ordinary_ids):
        raise InputError(f"all {vocab_size} ids of the vocabulary are special: nothing is left to predict")
    maskable = ordinary[input_ids]
    draws = torch.rand(input_ids.shape, generator=generator).masked_fill(~maskable, 2.0)
    chosen = draws < probability
    if probability > 0 and input_ids.numel():
        lowest = draws.argmin(dim=1, keepdim=True)
        chosen = chosen.scatter(1, lowest, maskable.gather(1, lowest))
    fate = torch.rand(input_ids.shape, generator=generator)
    others = ordinary_ids[torch.randint(len(ordinary_ids), input_ids.shape, generator=generator)]
    masked = torch.where(chosen & (fate < 0.8), mask_token_id, input_ids)
    masked = torch.where(chosen & (fate >= 0.9), others, masked)
    return masked, torch.where(chosen, input_ids, IGNORED)


def _check_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise InputError(f"{name} is {value}; expected a probability from 0 to 1")
