"""Find passages by vectors, and keep these in a file."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Self
from uuid import uuid4

from hfllm import durable
from hfllm.data.word_index import best_places
from hfllm.errors import InputError
from hfllm.grounding.encoders import Encoder
from hfllm.grounding.found import Found, check_queries, found_of, refuse_empty
from hfllm.grounding.passages import Passages, loaded_passages

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

FILE = "vectors.safetensors"
FORMAT = "hfllm vectors 1"
# Passages that are encoded together.
BATCH = 1 << 12


class DenseRetriever:
    """Finds passages by the cosine of their vectors with that of a query, compared with all of them.

    Args:
        passages: where to search. What is added to them later is encoded by the next query.
        encoder: gives texts vectors of length 1: see `hfllm.grounding.encoders`.
        query_prefix: what stands before each query, where an encoder was trained so, such as `query: `.
        passage_prefix: the same for passages.

    Raises:
        InputError: when there are no passages, or a vector is not finite.
    """

    def __init__(self, passages: Passages, encoder: Encoder, query_prefix: str = "", passage_prefix: str = ""):
        refuse_empty(passages, "DenseRetriever")
        self.passages, self.encoder = passages, encoder
        self.query_prefix, self.passage_prefix = query_prefix, passage_prefix
        self._vectors: NDArray[np.float32] | None = None
        self._catch_up()

    def retrieve(self, queries: Sequence[str], top_k: int = 3) -> list[list[Found]]:
        """Return the passages of each query: see `Retriever`; scores are from -1 to 1.

        A query whose vector is of zeros, such as one without a known word, finds nothing.
        """
        check_queries(queries, top_k)
        vectors, ranked = self._catch_up(), []
        asked = _encoded(self.encoder, [self.query_prefix + query for query in queries], "query", 0)
        # One by one, so that the scores of all passages are held for a single query.
        for vector in asked if queries else ():
            if len(vector) != vectors.shape[1]:
                raise InputError(f"the encoder gives {len(vector)} values, and the passages have {vectors.shape[1]}")
            ranked.append(_nearest(vectors, vector, top_k) if vector.any() else [])
        return found_of(self.passages, ranked)

    def save(self, folder: str | Path) -> None:
        """Write passages and vectors to a folder, beside which a `BM25Retriever` of these passages may be saved."""
        from safetensors.numpy import save_file

        vectors = self._catch_up()
        self.passages.save(folder)
        path = Path(folder, FILE)
        # Of its own, since another process may save into the same folder.
        unfinished = path.with_name(f"{path.name}.{uuid4().hex}")
        try:
            save_file({"vectors": vectors}, unfinished, {"format": FORMAT, **self._about()})
            durable.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        encoder: Encoder,
        query_prefix: str = "",
        passage_prefix: str = "",
        passages: Passages | None = None,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
    ) -> Self:
        """Return the retriever that `save` has written, without encoding its passages again.

        Args:
            folder: where it is.
            encoder: the one that it was made with.
            query_prefix: what stands before each query.
            passage_prefix: what stood before each passage.
            passages: its passages, where they are loaded already.
            tokenizer: that of the model which reads them, to be compared with the one that cut them.

        Raises:
            InputError: when a file is missing or damaged, the vectors are another encoder's or of other passages, or
                another tokenizer cut these.
        """
        retriever = cls.__new__(cls)
        retriever.passages = loaded_passages(folder, passages, tokenizer)
        refuse_empty(retriever.passages, f"DenseRetriever of {folder}")
        retriever.encoder, retriever.query_prefix, retriever.passage_prefix = encoder, query_prefix, passage_prefix
        retriever._vectors = _stored(Path(folder, FILE), retriever._about(), len(retriever.passages))
        return retriever

    def _about(self) -> dict[str, str]:
        """Return what the vectors depend on."""
        about = {"passages": self.passages.digest, "encoder": self.encoder.identity}
        # Of an encoder of your own its identity says everything.
        about |= {"words": self.encoder.words} if hasattr(self.encoder, "words") else {}
        return about | {"passage_prefix": self.passage_prefix}

    def _catch_up(self) -> "NDArray[np.float32]":
        """Encode the passages that have no vector yet. Return the vectors of all (passages, size)."""
        import numpy as np

        parts = [] if self._vectors is None else [self._vectors]
        known = sum(map(len, parts))
        texts = (self.passage_prefix + text for text in self.passages.texts(known))
        while batch := list(islice(texts, BATCH)):
            parts.append(_encoded(self.encoder, batch, "passage", known))
            known += len(batch)
        self._vectors = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return self._vectors


def _nearest(vectors: "NDArray[np.float32]", vector: "NDArray[np.float32]", top_k: int) -> list[tuple[int, float]]:
    """Return place and score of the vectors whose product with another is largest; of equal ones the earlier first.

    In a product with all of them equal vectors may get different last digits, so that those near the best are
    multiplied once more, each by itself.

    Raises:
        InputError: for vectors so long that their products are not finite.
    """
    import numpy as np

    scores = vectors @ vector
    if not np.isfinite(scores).all():
        raise InputError("products of vectors are not finite: an encoder gives vectors of length 1")
    slack = 1e-5 * max(1.0, float(np.abs(scores).max()))
    near = np.flatnonzero(scores >= scores[best_places(scores, top_k)[-1]] - slack)
    parts = [near[start : start + BATCH] for start in range(0, len(near), BATCH)]
    exact = np.concatenate([(vectors[part] * vector.astype(np.float64)).sum(1) for part in parts])
    places = best_places(exact, top_k)
    return list(zip(near[places].tolist(), exact[places].tolist(), strict=True))


def _encoded(encoder: Encoder, texts: Sequence[str], what: str, first: int) -> "NDArray[np.float32]":
    """Return the vectors of texts, checked.

    Raises:
        InputError: when they are not a row of finite numbers each.
    """
    import numpy as np

    vectors = np.ascontiguousarray(encoder.encode(texts), np.float32)
    if texts and (vectors.ndim != 2 or len(vectors) != len(texts)):
        raise InputError(f"the encoder gives an array of shape {vectors.shape} for {len(texts)} texts")
    return _finite(vectors, what, first)


def _finite(vectors: "NDArray[np.float32]", what: str, first: int) -> "NDArray[np.float32]":
    import numpy as np

    is_bad = ~np.isfinite(vectors).all(-1)
    if is_bad.any():
        raise InputError(f"the vector of {what} {first + int(is_bad.argmax())} is not finite (NaN or infinity)")
    return vectors


def _stored(path: Path, about: dict[str, str], count: int) -> "NDArray[np.float32]":
    """Return the vectors of a file of `count` passages."""
    from safetensors import SafetensorError
    from safetensors.numpy import safe_open

    if not path.is_file():
        raise InputError(f"{path}: no such vectors")
    try:
        with safe_open(path, "numpy") as stored:
            metadata, vectors = stored.metadata() or {}, stored.get_tensor("vectors")
    # Of the last two for types that numpy lacks.
    except (SafetensorError, OSError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: no vectors of passages, or damaged: {str(error).splitlines()[0][:80]}") from None
    _refuse_other(path, metadata, {"format": FORMAT, **about})
    if vectors.dtype.name != "float32" or vectors.ndim != 2 or len(vectors) != count:
        raise InputError(
            f"{path}: {vectors.dtype} of shape {vectors.shape}; expected float32, a row for each of {count}"
        )
    return _finite(vectors, f"{path}: passage", 0)


def _refuse_other(path: Path, found: dict[str, str], expected: dict[str, str]) -> None:
    names = {"passages": "other passages", "encoder": "another encoder", "passage_prefix": "another passage_prefix"}
    names["words"] = "an encoder of another vocabulary"
    # Earlier versions did not note the vocabulary.
    before = {"words": expected.get("words"), **found}
    for key, value in expected.items():
        if before.get(key) != value:
            what = names.get(key, "another format")
            raise InputError(f"{path}: made with {what} ({found.get(key)!r:.60}, here {value!r:.60}): make it anew")
