"""Tokenizers of new models: the flags to train one separately, its training, and its compression by size."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hfllm.data.loading import TextArguments, WorldTexts
from hfllm.flags import SEED, at_least, flag

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MOST_TOKENIZER_TEXTS = 20_000
# Bytes and special tokens by themselves are about 270.
SMALLEST_SIZE = 300


@dataclass(frozen=True)
class TokenizerArguments(TextArguments):
    """Size and purpose of the tokenizer."""

    vocab_size: int = flag(8192, "Upper bound on the number of tokens.", takes=at_least(1))
    max_position_embeddings: int = flag(2048, "Context of the models that will use it.", takes=at_least(1))
    objective: str = flag(
        "causal",
        "What pretraining will predict: 'masked' and 'infilling' need extra special tokens.",
        choices=["causal", "masked", "infilling"],
    )
    seed: int = flag(42, "Seed of the held-out split, and of the world's documents.", takes=SEED)
    output_dir: str = flag("outputs/tokenizer", "Where the tokenizer goes.")


def make_tokenizer(
    texts: Sequence[str],
    vocab_size: int,
    max_position_embeddings: int,
    objective: str = "causal",
    world: WorldTexts | None = None,
) -> "PreTrainedTokenizerFast":
    """Return a tokenizer trained on `texts`, with the special tokens of the objective.

    Args:
        vocab_size: upper bound on the number of tokens.
        max_position_embeddings: context of the models that will use it.
        objective: of pretraining: causal, masked or infilling.
        world: the embedded world if the texts are its own: its models also write instructions, thoughts and calls.
    """
    from hfllm.data.packing import INFILLING_TOKENS
    from hfllm.data.tokenizer import CALL_MARKS, MASK, THOUGHT_MARKS, TOOL, set_built_in, train_tokenizer
    from hfllm.data.world.demonstrators import instruction_rows
    from hfllm.data.world.world import World

    sample = list(texts[:MOST_TOKENIZER_TEXTS])
    shares = world.shares if world else {}
    if world:
        # Instructions are part of the language, although the base model is not taught to follow them.
        rows = instruction_rows(World(world.world_seed), 3000)
        instructions = [f"{row['instruction']} {row['input']} {row['output']}" for row in rows]
        in_forms = round(shares["forms"] * len(rows))
        instructions[:in_forms] = [f"{text} {text.upper()}" for text in instructions[:in_forms]]
        sample = sample[:5000] + instructions
    has_thoughts, has_tools = shares.get("reasoning", 0) > 0, shares.get("tools", 0) > 0
    tokenizer = train_tokenizer(
        sample,
        vocab_size,
        max_position_embeddings,
        mask_token=MASK if objective == "masked" else None,
        extra_special_tokens=[
            *(INFILLING_TOKENS if objective == "infilling" else ()),
            *([TOOL] if has_tools else []),
        ],
        added_tokens=[*(THOUGHT_MARKS if has_thoughts else ()), *(CALL_MARKS if has_tools else ())],
        splits_digits=has_tools,
    )
    if has_tools:
        set_built_in(tokenizer, "hfllm-brief")
    return tokenizer


def compression_by_size(tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str]) -> list[dict[str, float]]:
    """Measure the compression of texts by the tokenizer and by prefixes of its vocabulary, each half the next.

    Returns:
        Rows, the smallest size first: `vocab_size`, `bytes_per_token`, `tokens_per_word`, `share_of_vocabulary_used`.
    """
    from hfllm.data.tokenizer import truncated_tokenizer

    sizes = [len(tokenizer)]
    while sizes[0] // 2 > SMALLEST_SIZE:
        sizes.insert(0, sizes[0] // 2)
    num_bytes, words = sum(len(text.encode()) for text in texts), sum(len(text.split()) for text in texts)
    rows = []
    for size in sizes:
        smaller = truncated_tokenizer(tokenizer, size)
        # Not verbose: nothing here is read by a model, whose context these texts may exceed.
        encoded = smaller(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        tokens = sum(map(len, encoded))
        rows.append(
            {
                "vocab_size": size,
                "bytes_per_token": num_bytes / max(tokens, 1),
                "tokens_per_word": tokens / max(words, 1),
                "share_of_vocabulary_used": len({token for ids in encoded for token in ids}) / size,
            }
        )
    return rows
