"""A tool that finds passages by words."""

from collections.abc import Callable, Sequence

from hfllm.data.word_index import WordIndex, import_bm25s, words_of
from hfllm.errors import InputError


def retrieval_over(passages: Sequence[str], top_k: int = 3) -> Callable[[str], str]:
    """Return a tool `search(query)`, which gives the passages that match best by BM25, a line each.

    Words are compared without letter case; passages that share none with the query are not given. Of equal scores the
    earlier passage comes first. `hfllm.data.word_index.WordIndex` has the formula.

    Args:
        passages: texts to search.
        top_k: the most passages that a search gives.

    Raises:
        InputError: without passages, for a text in place of a list, a bad `top_k`, or when bm25s is not installed.
    """
    import_bm25s("retrieval_over", "tools")
    if isinstance(passages, str):
        raise InputError(f"retrieval_over: expected a list of passages, got the text {passages[:40]!r}")
    texts = [" ".join(str(passage).split()) for passage in passages]
    if not any(map(words_of, texts)):
        raise InputError(f"retrieval_over: none of {len(texts)} passages has a word")
    if top_k < 1:
        raise InputError(f"retrieval_over: top_k must be at least 1, got {top_k}")
    index = WordIndex()
    index.add(texts)
    # Tools may be called from several threads.
    index.finish()

    def search(query: str) -> str:
        """Search for passages.

        Args:
            query: words to find.
        """
        found = index.search(str(query), top_k)
        if not found:
            raise LookupError(f"no passage has a word of {str(query)[:80]!r}")
        return "\n".join(texts[place] for place, _ in found)

    return search
