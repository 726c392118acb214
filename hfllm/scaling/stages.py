"""How a pipeline's stages share the layers, also when their number does not divide them."""

from functools import cache


@cache
def stage_layers(layers: int, pipeline: int, interleave: int = 1) -> tuple[int, ...]:
    """Return the layers of each stage, first to last.

    Where `pipeline * interleave` chunks cannot have equally many layers, the last one has a layer less, then the
    first, then others from the end: the last stage also has the head, the first the embeddings. BLOOM
    (arXiv:2211.05100) puts 70 layers on 12 stages in this way, Llama 3 (arXiv:2407.21783, section 3.3.2) 126 on 16.
    """
    chunks = pipeline * interleave
    most = -(-layers // chunks)
    short = chunks * most - layers
    order = [chunks - 1, 0, *range(chunks - 2, 0, -1)][:short]
    held = [interleave * most] * pipeline
    for chunk in order:
        held[chunk % pipeline] -= 1
    return tuple(held)


def is_balanced(layers: int, pipeline: int, interleave: int = 1) -> bool:
    """Return whether all stages have equally many layers, or only the two ends have one less."""
    chunks = pipeline * interleave
    return chunks * -(-layers // chunks) - layers <= min(2, chunks - 1)
