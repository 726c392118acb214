"""What layers of different types cost: keys that a query is scored against, and bytes that linear attention keeps.

The sizes of blocks and pieces are those of `banded_hfllm.py` and `delta_rule_hfllm.py`, which import torch; a test
holds them together.
"""

from hfllm.scaling.shapes import Shape

SMALLEST_BLOCK = 64


def banded_keys(window: int, length: int) -> int:
    """Return against how many keys a query is scored in a layer with a window, by this family's attention in blocks.

    A block of half a window reads all keys that it can reach. Texts of less than two such reaches are scored whole.
    """
    block = max(-(-window // 2), SMALLEST_BLOCK)
    reach = block * (1 + -(-(window - 1) // block))
    return reach if length > 2 * reach else length


def scored_keys(shape: Shape, length: int, attention: str = "flash") -> int:
    """Return against how many keys a token is scored, over all layers. `"eager"` attention scores what it masks."""
    keys = {"full_attention": length, "linear_attention": 0}
    # Chunks are computed as a window of their size.
    for kind, window in (
        ("sliding_attention", shape.sliding_window),
        ("chunked_attention", shape.attention_chunk_size),
    ):
        keys[kind] = length if attention == "eager" else banded_keys(window or length, length)
    return sum(keys[kind] for kind in shape.layer_types)


def chunk_and_piece(key_head_dim: int, rows: int, length: int) -> tuple[int, int]:
    """Return the tokens of a chunk and of a piece, in which this family's linear attention reads a text.

    Args:
        rows: heads times sequences of a batch.
    """
    chunk = min(32 if key_head_dim <= 64 else 64, length)
    return chunk, chunk * max(1, max(256, 4096 // rows) // chunk)


def linear_mixer_bytes(shape: Shape, size: int, sequences: int, length: int) -> float:
    """Return the bytes per token that a layer of linear attention keeps, without the input of its projections.

    These are the outputs of its projections, their decays and strengths, the input of the last projection, and the
    state before each piece, which is computed again.

    Args:
        size: bytes per value of inputs and outputs of matrix products.
        sequences: rows of a micro-batch.
    """
    heads = shape.linear_num_value_heads
    keys, values = shape.linear_num_key_heads * shape.linear_key_head_dim, heads * shape.linear_value_head_dim
    _, piece = chunk_and_piece(shape.linear_key_head_dim, heads * sequences, length)
    states = 4 * shape.state_size * -(-length // piece) / length
    # Of the decays the argument and the result of softplus and their product; strengths and their sigmoids.
    return size * (2 * keys + 3 * values) + (12 + 2 * size) * heads + states


__all__ = ["banded_keys", "chunk_and_piece", "linear_mixer_bytes", "scored_keys"]
