"""A tool that finds passages by words."""

import re
from collections.abc import Callable, Sequence

from hfllm.errors import InputError


def retrieval_over(passages: Sequence[str], top_k: int = 3) -> Callable[[str], str]:
    """Return a tool `search(query)`, which gives the passages that match best by BM25, a line each.

    Words are compared without letter case; passages that share none with the query are not given (Robertson and
    Zaragoza 2009; the variant of Lucene, k1 = 1.5 and b = 0.75). Of equal scores the earlier passage comes first.

    Args:
        passages: texts to search.
        top_k: the most passages that a search gives.

    Raises:
        InputError: without passages, for a text in place of a list, a bad `top_k`, or when bm25s is not installed.
    """
    try:
        import bm25s
    except ImportError:
        raise InputError("retrieval_over needs bm25s: pip install 'hfllm[tools]'") from None
    if isinstance(passages, str):
        raise InputError(f"retrieval_over: expected a list of passages, got the text {passages[:40]!r}")
    texts = [" ".join(str(passage).split()) for passage in passages]
    words = [_words(text) for text in texts]
    if not any(words):
        raise InputError(f"retrieval_over: none of {len(texts)} passages has a word")
    if top_k < 1:
        raise InputError(f"retrieval_over: top_k must be at least 1, got {top_k}")
    index = bm25s.BM25(backend="numpy")
    index.index(words, show_progress=False)
    known = {word for text in words for word in text}

    def search(query: str) -> str:
        """Search for passages.

        Args:
            query: words to find.
        """
        asked = [word for word in _words(str(query)) if word in known]
        if not asked:
            raise LookupError(f"no passage has a word of {str(query)[:80]!r}")
        scores = index.get_scores(asked)
        best = sorted(range(len(texts)), key=lambda place: (-scores[place], place))[:top_k]
        return "\n".join(texts[place] for place in best if scores[place] > 0)

    return search


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
