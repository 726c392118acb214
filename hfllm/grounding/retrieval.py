"""Find the passages for a question: by words, by vectors, by both, and only if good enough."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

from hfllm import durable
from hfllm.data.passages import Passage
from hfllm.data.tokenizer import padding_token
from hfllm.data.word_index import FILE, WordIndex, best_indices, import_bm25s, read_arrays, words_of
from hfllm.errors import InputError, check_positive, first_line, refuse_if
from hfllm.fingerprint import fingerprint
from hfllm.grounding.passages import Passages, loaded_passages
from hfllm.models.loading.saved import max_length_of, reason_of, saved_model, saved_tokenizer
from hfllm.models.loading.weights import weights_fingerprint

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# ---- what a retriever is ----
#
# The interface of retrievers, their output, and the input refused by all of them.


@dataclass(frozen=True)
class Found:
    """A found passage.

    Args:
        place: its index among the passages.
        passage: the passage.
        score: how well it fits; the scale is the retriever's.
    """

    place: int
    passage: Passage
    score: float


class Retriever(Protocol):
    """Interface of objects for finding passages.

    Attributes:
        passages: where it searches.
    """

    passages: Passages

    def retrieve(self, queries: Sequence[str], top_k: int = 3) -> list[list[Found]]:
        """Return the `top_k` best passages per query, the best first; of equal ones the earlier comes first.

        Fewer, or none, where no more fit or are there.

        Raises:
            InputError: for a `top_k` below 1, or queries that are no list of texts.
        """
        ...


def found_of(passages: Passages, rankings: Sequence[Sequence[tuple[int, float]]]) -> list[list[Found]]:
    """Return the passages from indexes and scores, per query."""
    texts = passages.at(index for ranked in rankings for index, _ in ranked)
    return [[Found(index, texts[index], score) for index, score in ranked] for ranked in rankings]


def check_count(name: str, number: object) -> None:
    """Refuse another number than a whole one of at least 1."""
    refuse_if(not isinstance(number, Integral), f"{name} must be a whole number, got {number!r:.40}")
    check_positive(**{name: number})


def check_queries(queries: Sequence[str], top_k: int) -> None:
    """Refuse input unsupported by all retrievers.

    Raises:
        InputError: for a `top_k` below 1, or queries that are no list of texts.
    """
    check_count("top_k", top_k)
    if isinstance(queries, str):
        raise InputError(f"queries must be a list of texts, got the text {queries!r:.60}")
    # An iterator, readable only once, would be empty after this.
    if not hasattr(queries, "__len__"):
        raise InputError(f"queries must be a list of texts, got {queries!r:.60}")
    if not all(isinstance(query, str) for query in queries):
        wrong = next(query for query in queries if not isinstance(query, str))
        raise InputError(f"queries must be texts, got {wrong!r:.60}")


def refuse_empty(passages: Passages, what: str) -> None:
    """Refuse to index nothing.

    Raises:
        InputError: when there is no passage.
    """
    refuse_if(not len(passages), f"{what}: there are no passages to search")


# ---- retrieval ----


class BM25Retriever:
    """Finds passages by their shared words with a query: see `WordIndex`. Passages without shared words are not found.

    Args:
        passages: where to search. Passages added to them later are indexed by the next query.

    Raises:
        InputError: when there are none, none has a word, or bm25s is not installed.
    """

    def __init__(self, passages: Passages):
        import_bm25s("BM25Retriever")
        refuse_empty(passages, "BM25Retriever")
        self.passages, self._index = passages, WordIndex()
        refuse_if(not self._current().num_words, f"BM25Retriever: none of {len(passages):,} passages has a word")

    def retrieve(self, queries: Sequence[str], top_k: int = 3) -> list[list[Found]]:
        """Return the passages of each query: see `Retriever`; scores are above 0 and have no upper bound."""
        check_queries(queries, top_k)
        index = self._current()
        return found_of(self.passages, [index.search(query, top_k) for query in queries])

    def save(self, folder: str | Path) -> None:
        """Write passages and index to a folder; a `DenseRetriever` of these passages may be saved in it too."""
        index = self._current()
        self.passages.save(folder)
        index.save(Path(folder, FILE), self.passages.digest)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        passages: Passages | None = None,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
    ) -> Self:
        """Return the retriever saved by `save`.

        Args:
            folder: where it is.
            passages: its passages, where they are loaded already.
            tokenizer: that of the model which reads them, to be compared with the one that cut them.

        Raises:
            InputError: when a file is missing or damaged, the index is of other passages, or another tokenizer cut
                them.
        """
        import_bm25s("BM25Retriever")
        retriever = cls.__new__(cls)
        retriever.passages = loaded_passages(folder, passages, tokenizer)
        refuse_empty(retriever.passages, f"BM25Retriever of {folder}")
        retriever._index = WordIndex.load(Path(folder, FILE), retriever.passages.digest)
        retriever._index.finish()
        return retriever

    def _current(self) -> WordIndex:
        """Return the index of all passages."""
        if len(self._index) < len(self.passages):
            self._index.add(self.passages.texts(len(self._index)))
            if self._index.num_words:
                self._index.finish()
        return self._index


class FusedRetriever:
    """Joins the rankings of several retrievers: reciprocal rank fusion (Cormack, Clarke and Büttcher 2009).

    A passage's score is the sum over the retrievers with this passage of 1 / (k + its rank), ranks from 1: the
    retrievers' scores do not count, so their scales may differ.

    Args:
        retrievers: at least two, of the same passages.
        k: how little the first ranks stand out; 60 in the paper.
        depth: how many passages per retriever are joined, or `top_k` if larger.

    Raises:
        InputError: for fewer retrievers, other passages, or invalid numbers.
    """

    def __init__(self, retrievers: Sequence[Retriever], k: float = 60, depth: int = 100):
        refuse_if(len(retrievers) < 2, f"FusedRetriever: {len(retrievers)} retriever(s); at least 2 are needed")
        if not 0 <= k < math.inf or depth < 1:
            raise InputError(f"FusedRetriever: k={k}, depth={depth}; expected a number of at least 0, and at least 1")
        self.retrievers, self.k, self.depth, self.passages = list(retrievers), k, depth, retrievers[0].passages
        for number, other in enumerate(retrievers[1:], 2):
            if other.passages is not self.passages and other.passages.digest != self.passages.digest:
                raise InputError(f"FusedRetriever: retriever {number} searches other passages than the first")

    def retrieve(self, queries: Sequence[str], top_k: int = 3) -> list[list[Found]]:
        """Return the passages of each query: see `Retriever`; scores are at most the retrievers' number / (k + 1)."""
        check_queries(queries, top_k)
        rankings = [retriever.retrieve(queries, max(top_k, self.depth)) for retriever in self.retrievers]
        return found_of(self.passages, [self._joined(each)[:top_k] for each in zip(*rankings, strict=True)])

    def _joined(self, rankings: Sequence[list[Found]]) -> list[tuple[int, float]]:
        """Return index and score of all passages in a ranking, the best first."""
        scores: dict[int, float] = {}
        for ranking in rankings:
            for rank, result in enumerate(ranking, 1):
                scores[result.place] = scores.get(result.place, 0.0) + 1 / (self.k + rank)
        return sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))


class Gated:
    """Gives a retriever's passages with high enough scores; for a query without any, none: a model is then to say so.

    Args:
        retriever: finds the passages.
        min_score: the least score, on the retriever's scale.

    Raises:
        InputError: for a `min_score` other than a number.
    """

    def __init__(self, retriever: Retriever, min_score: float):
        scoring_enough([], min_score)
        self.retriever, self.min_score, self.passages = retriever, min_score, retriever.passages

    def retrieve(self, queries: Sequence[str], top_k: int = 3) -> list[list[Found]]:
        """Return the passages of each query: see `Retriever`.

        Raises:
            InputError: when a score is NaN, for which a gate is undefined.
        """
        return scoring_enough(self.retriever.retrieve(queries, top_k), self.min_score)


def scoring_enough(rankings: Sequence[Sequence[Found]], min_score: float) -> list[list[Found]]:
    """Return per query the passages with scores of at least `min_score`.

    Raises:
        InputError: when `min_score` or a score is NaN.
    """
    if isinstance(min_score, bool) or not isinstance(min_score, Real) or math.isnan(min_score):
        raise InputError(f"min_score is {min_score!r:.40}; expected a number on the scale of the retriever's scores")
    for number, ranking in enumerate(rankings, 1):
        for each in ranking:
            refuse_if(math.isnan(each.score), f"query {number}: the score of passage {each.place} is nan")
    return [[each for each in ranking if each.score >= min_score] for ranking in rankings]


def search_tool(retriever: Retriever, top_k: int = 3) -> Callable[[str], str]:
    """Return a tool `search(query)` for environments, giving the best passages, one per line.

    Args:
        retriever: finds them.
        top_k: the most passages of a search.

    Raises:
        InputError: for a `top_k` below 1 or above the number of passages.
    """
    check_queries([], top_k)
    if top_k > len(retriever.passages):
        raise InputError(f"search_tool: top_k={top_k}, and there are {len(retriever.passages)} passages")

    def search(query: str) -> str:
        """Search for passages.

        Args:
            query: words to find.
        """
        (result,) = retriever.retrieve([str(query)], top_k)
        if not result:
            raise LookupError(f"no passage fits {str(query)[:80]!r}")
        return "\n".join(" ".join(each.passage.text.split()) for each in result)

    return search


# ---- encoders ----
#
# Give texts vectors: by a sentence encoder of transformers, or as the mean of vectors of their words or tokens.


class Encoder(Protocol):
    """Interface of objects for encoding texts as vectors.

    Attributes:
        identity: distinguishes its vectors from another encoder's, in a saved index.
    """

    identity: str

    def encode(self, texts: Sequence[str]) -> "NDArray[np.float32]":
        """Return the vectors of texts (texts, size), each of length 1."""
        ...


class SentenceEncoder:
    """A model of transformers: the mean of its last hidden states, padding left out, at length 1.

    This is "mean pooling" of Sentence-BERT (Reimers and Gurevych 2019, arXiv:1908.10084), E5, GTE and others.

    Args:
        model: the model without a head (`AutoModel`), on its device.
        tokenizer: the tokenizer; its added tokens, such as `[CLS]`, are part of the mean.
        batch_size: texts of a pass.
        max_length: the most tokens of a text; by default the model's limit.
        truncation: cut longer texts, otherwise refused.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        batch_size: int = 64,
        max_length: int | None = None,
        truncation: bool = False,
    ):
        self.model, self.tokenizer, self.batch_size, self.truncation = model.eval(), tokenizer, batch_size, truncation
        limits = (max_length, max_length_of(model.config), tokenizer.model_max_length)
        self.max_length = min(limit for limit in limits if limit is not None)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = padding_token(tokenizer)
        self.identity = weights_fingerprint(model)
        self.words = fingerprint(tokenizer.get_vocab(), "vocabulary")

    @classmethod
    def load(cls, name: str, **options: int | bool) -> Self:
        """Return the encoder of a folder or a Hub id.

        Args:
            name: the folder or id.
            options: other arguments of the encoder.

        Raises:
            InputError: when there is none.
        """
        from transformers import AutoModel

        try:
            return cls(saved_model(AutoModel, name), saved_tokenizer(name), **options)
        except (OSError, ValueError) as error:
            raise InputError(f"encoder {name!r} could not be loaded: {reason_of(error)}") from None

    def encode(self, texts: Sequence[str]) -> "NDArray[np.float32]":
        """Return the vectors of texts (texts, size), each of length 1.

        Raises:
            InputError: for a text longer than `max_length`, unless it is to be cut.
        """
        import numpy as np
        import torch

        if not texts:
            return np.zeros((0, 0), np.float32)
        options = {"truncation": True, "max_length": self.max_length} if self.truncation else {}
        tokens = self.tokenizer(list(texts), **options)["input_ids"]
        longest = max(range(len(tokens)), key=lambda index: len(tokens[index]))
        if len(tokens[longest]) > self.max_length:
            raise InputError(
                f"text {longest} of {len(texts)} has {len(tokens[longest])} tokens, and the encoder reads "
                f"{self.max_length}: cut passages to fewer max_tokens, or say truncation=True ({texts[longest]!r:.40})"
            )
        # Texts of like length together.
        order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
        vectors: list[NDArray[np.float32]] = [np.zeros(0, np.float32)] * len(texts)
        with torch.inference_mode():
            for start in range(0, len(order), self.batch_size):
                indices = order[start : start + self.batch_size]
                batch = self.tokenizer.pad({"input_ids": [tokens[index] for index in indices]}, return_tensors="pt")
                batch = batch.to(self.model.device)
                states = self.model(**batch).last_hidden_state.float()
                mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
                means = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
                for index, vector in zip(indices, torch.nn.functional.normalize(means, dim=-1).cpu(), strict=True):
                    vectors[index] = vector.numpy()
        return np.stack(vectors)


class StaticVectors:
    """The mean of the vectors of a text's words or tokens, at length 1; a text without any has a vector of zeros.

    Args:
        vectors: a vector per word or token (words, size).
        vocabulary: the rows of the words, without letter case, or a tokenizer with the rows as its token ids.

    Raises:
        InputError: when a vector is not finite, or the vocabulary names absent rows.
    """

    def __init__(self, vectors: "NDArray[np.floating]", vocabulary: "Mapping[str, int] | Tokenizer"):
        import numpy as np

        self.vectors, self.vocabulary = np.ascontiguousarray(vectors, np.float32), vocabulary
        if self.vectors.ndim != 2 or not np.isfinite(self.vectors).all():
            what = f"shape {self.vectors.shape}" if self.vectors.ndim != 2 else "numbers that are not finite"
            raise InputError(f"StaticVectors: vectors of {what}; expected a row of finite numbers for each word")
        is_table = isinstance(vocabulary, Mapping)
        rows = max(vocabulary.values(), default=-1) + 1 if is_table else vocabulary.get_vocab_size()
        if rows > len(self.vectors) or (is_table and min(vocabulary.values(), default=0) < 0):
            raise InputError(f"StaticVectors: a vocabulary of {rows:,} rows, and {len(self.vectors):,} vectors")
        self.identity = hashlib.blake2b(self.vectors.tobytes(), digest_size=16).hexdigest()
        self.words = fingerprint(vocabulary if is_table else vocabulary.get_vocab(), "vocabulary")

    @classmethod
    def load(cls, vectors: str | Path, tokenizer: str | Path) -> Self:
        """Return the vectors of a safetensors file, such as WordLlama's.

        Args:
            vectors: a file with a single matrix.
            tokenizer: the `tokenizer.json` of the tokenizers library whose tokens are its rows.

        Raises:
            InputError: when a file is missing, damaged or holds something else.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        from tokenizers import Tokenizer

        for path in (vectors, tokenizer):
            refuse_if(not Path(path).is_file(), f"{path}: no such file")
        try:
            # Torch reads bf16 too, unknown to numpy.
            tensors = [tensor for tensor in load_file(vectors).values() if tensor.ndim == 2]
        except (SafetensorError, OSError) as error:
            raise InputError(f"{vectors}: not safetensors, or damaged: {first_line(error, 80)}") from None
        refuse_if(len(tensors) != 1, f"{vectors}: {len(tensors)} matrices; expected one, with a row for each token")
        try:
            vocabulary = Tokenizer.from_file(str(tokenizer))
        # The library raises this class itself.
        except Exception as error:
            raise InputError(f"{tokenizer}: no tokenizer.json: {first_line(error, 80)}") from None
        vocabulary.no_padding()
        vocabulary.no_truncation()
        return cls(tensors[0].float().numpy(), vocabulary)

    def encode(self, texts: Sequence[str]) -> "NDArray[np.float32]":
        """Return the vectors of texts (texts, size), of length 1 or, without a known word, of zeros."""
        import numpy as np

        means = np.zeros((len(texts), self.vectors.shape[1]), np.float32)
        for index, rows in enumerate(self._rows(texts)):
            if rows:
                means[index] = self.vectors[rows].mean(0)
        return means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)

    def _rows(self, texts: Sequence[str]) -> list[list[int]]:
        if isinstance(self.vocabulary, Mapping):
            return [[self.vocabulary[word] for word in words_of(text) if word in self.vocabulary] for text in texts]
        return [each.ids for each in self.vocabulary.encode_batch_fast(list(texts), add_special_tokens=False)]


# ---- dense ----
#
# Find passages by vectors, and keep these in a file.


VECTORS_FILE = "vectors.safetensors"
FORMAT = "hfllm vectors 1"
# Passages encoded together.
BATCH = 1 << 12


class DenseRetriever:
    """Finds passages by the cosine of their vectors with a query's, compared with all of them.

    Args:
        passages: where to search. Passages added to them later are encoded by the next query.
        encoder: gives texts vectors of length 1: see `Encoder`.
        query_prefix: text before every query, where an encoder was trained so, such as `query: `.
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
        query_vectors = _encoded(self.encoder, [self.query_prefix + query for query in queries], "query", 0)
        # One by one, so that the scores of all passages are held for a single query.
        for vector in query_vectors if queries else ():
            if len(vector) != vectors.shape[1]:
                raise InputError(f"the encoder gives {len(vector)} values, and the passages have {vectors.shape[1]}")
            ranked.append(_nearest(vectors, vector, top_k) if vector.any() else [])
        return found_of(self.passages, ranked)

    def save(self, folder: str | Path) -> None:
        """Write passages and vectors to a folder; a `BM25Retriever` of these passages may be saved in it too."""
        from safetensors.numpy import save_file

        vectors = self._catch_up()
        self.passages.save(folder)
        with durable.written_whole(Path(folder, VECTORS_FILE)) as unfinished:
            save_file({"vectors": vectors}, unfinished, {"format": FORMAT, **self._about()})

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
        """Return the retriever saved by `save`, without encoding its passages again.

        Args:
            folder: where it is.
            encoder: the encoder of the saved retriever.
            query_prefix: text before every query.
            passage_prefix: text before every passage.
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
        retriever._vectors = _stored(Path(folder, VECTORS_FILE), retriever._about(), len(retriever.passages))
        return retriever

    def _about(self) -> dict[str, str]:
        """Return the settings of the vectors."""
        about = {"passages": self.passages.digest, "encoder": self.encoder.identity}
        # Of an encoder of your own its identity says everything.
        about |= {"words": self.encoder.words} if hasattr(self.encoder, "words") else {}
        return about | {"passage_prefix": self.passage_prefix}

    def _catch_up(self) -> "NDArray[np.float32]":
        """Encode the passages without a vector. Return the vectors of all (passages, size)."""
        import numpy as np

        parts = [] if self._vectors is None else [self._vectors]
        num_encoded = sum(map(len, parts))
        texts = (self.passage_prefix + text for text in self.passages.texts(num_encoded))
        while batch := list(islice(texts, BATCH)):
            parts.append(_encoded(self.encoder, batch, "passage", num_encoded))
            num_encoded += len(batch)
        self._vectors = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return self._vectors


def _nearest(vectors: "NDArray[np.float32]", vector: "NDArray[np.float32]", top_k: int) -> list[tuple[int, float]]:
    """Return index and score of the vectors whose product with another is largest; of equal ones the earlier first.

    In a product with all of them equal vectors may get different last digits, so vectors near the best are multiplied
    once more, one by one.
    """
    import numpy as np

    scores = vectors @ vector
    if not np.isfinite(scores).all():
        raise InputError("products of vectors are not finite: an encoder gives vectors of length 1")
    slack = 1e-5 * max(1.0, float(np.abs(scores).max()))
    near = np.flatnonzero(scores >= scores[best_indices(scores, top_k)[-1]] - slack)
    parts = [near[start : start + BATCH] for start in range(0, len(near), BATCH)]
    exact = np.concatenate([(vectors[part] * vector.astype(np.float64)).sum(1) for part in parts])
    indices = best_indices(exact, top_k)
    return list(zip(near[indices].tolist(), exact[indices].tolist(), strict=True))


def _encoded(encoder: Encoder, texts: Sequence[str], what: str, first: int) -> "NDArray[np.float32]":
    """Return the vectors of texts, checked."""
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
    refuse_if(not path.is_file(), f"{path}: no such vectors")
    metadata, arrays = read_arrays(path, ["vectors"], "vectors of passages")
    vectors = arrays["vectors"]
    _refuse_other(path, metadata, {"format": FORMAT, **about})
    kind, shape = vectors.dtype, vectors.shape
    if kind.name != "float32" or len(shape) != 2 or shape[0] != count:
        raise InputError(f"{path}: {kind} of shape {shape}; expected float32, a row for each of {count}")
    return _finite(vectors, f"{path}: passage", 0)


def _refuse_other(path: Path, metadata: dict[str, str], expected: dict[str, str]) -> None:
    names = {"passages": "other passages", "encoder": "another encoder", "passage_prefix": "another passage_prefix"}
    names["words"] = "an encoder of another vocabulary"
    # Earlier versions did not note the vocabulary.
    before = {"words": expected.get("words"), **metadata}
    for key, value in expected.items():
        if before.get(key) != value:
            what = names.get(key, "another format")
            raise InputError(f"{path}: made with {what} ({metadata.get(key)!r:.60}, here {value!r:.60}): make it anew")
