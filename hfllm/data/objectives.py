"""Training objectives as functions of the data: fill-in-the-middle and masked language modeling.

Random draws depend only on `(seed, index)`, never on earlier draws: a run that resumes, or that has another
number of workers, sees exactly the same examples.
"""

import random
from collections.abc import Collection
from typing import TYPE_CHECKING

from hfllm.data.formats import infilling_prompt
from hfllm.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

# Tokens that begin a prefix, a suffix and a middle, and the one that ends the middle.
INFILLING_TOKENS = ("<PRE>", "<SUF>", "<MID>", "<EOT>")
IGNORED = -100


def fill_in_the_middle(text: str, index: int, seed: int = 0, rate: float = 0.9, spm_rate: float = 0.5) -> str:
    """Return a document in Code Llama's infilling format, or unchanged (arXiv:2308.12950, section 2.3; 2207.14255).

    It is cut at two positions drawn uniformly, and written as `infilling_prompt` writes prefix and suffix,
    followed by the middle and ` <EOT>`. No character is lost. The paper transforms only documents that fit into one
    context: cut to length first, and encode the result unchanged, with `INFILLING_TOKENS` as special tokens.

    Args:
        text: the document. One that is empty or holds an infilling token is returned unchanged.
        index: the document's number in the data.
        seed: determines all random draws, together with `index`.
        rate: the probability that a document is transformed; 0.9 in the paper.
        spm_rate: the share of those with the suffix first; a half in the paper.

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
    """Check that a tokenizer encodes each of `INFILLING_TOKENS` as a single token, also inside a text.

    Raises:
        InputError: when it does not, with the call that adds the missing tokens.
    """
    missing = []
    for token in INFILLING_TOKENS:
        # The token's ids are those that a text has only with it; Code Llama's token includes the space.
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
    """Return a random generator on the CPU that depends only on `(seed, index)`, to mask batch `index` with."""
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

    Of the tokens to predict, 80% become the mask token, 10% a token drawn uniformly from the
    vocabulary, 10% stay. A row with any ordinary token has at least one to predict, as in BERT's own code, so that no
    short batch has an undefined loss.

    Args:
        input_ids: (B, S), on the CPU; not changed.
        special_ids: ids that are never masked or drawn: padding and the like. The mask token is one of them.
        mask_token_id: the id of the mask token.
        vocab_size: upper bound (exclusive) of random token ids.
        generator: for example `seeded_generator(seed, index)`.
        probability: the probability that a token is one to predict.

    Returns:
        The masked ids, (B, S), and the labels, (B, S): the original id at tokens to predict, -100 elsewhere.

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
