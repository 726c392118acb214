"""Give texts vectors: by a sentence encoder of transformers, or as the mean of vectors of their words or tokens."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

from hfllm.data.word_index import words_of
from hfllm.errors import InputError
from hfllm.fingerprint import fingerprint

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Encoder(Protocol):
    """What gives texts vectors.

    Attributes:
        identity: what tells its vectors from those of another, in a saved index.
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
        tokenizer: the tokenizer; what it adds to a text, such as `[CLS]`, is part of the mean.
        batch_size: texts of a pass.
        max_length: the most tokens of a text; by default what the model is made for.
        truncation: cut longer texts, which are otherwise refused.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        batch_size: int = 64,
        max_length: int | None = None,
        truncation: bool = False,
    ):
        from hfllm.data.tokenizer import padding_token
        from hfllm.models.loading.saved import max_length_of
        from hfllm.models.loading.weights import weights_fingerprint

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

        from hfllm.models.loading.saved import reason_of, saved_model, saved_tokenizer

        try:
            return cls(saved_model(AutoModel, name), saved_tokenizer(name), **options)
        except (OSError, ValueError) as error:
            raise InputError(f"encoder {name!r} could not be loaded: {reason_of(error)}") from None

    def encode(self, texts: Sequence[str]) -> "NDArray[np.float32]":
        """Return the vectors of texts (texts, size), each of length 1.

        Raises:
            InputError: for a text that is longer than `max_length`, unless it is to be cut.
        """
        import numpy as np
        import torch

        if not texts:
            return np.zeros((0, 0), np.float32)
        options = {"truncation": True, "max_length": self.max_length} if self.truncation else {}
        tokens = self.tokenizer(list(texts), **options)["input_ids"]
        longest = max(range(len(tokens)), key=lambda place: len(tokens[place]))
        if len(tokens[longest]) > self.max_length:
            raise InputError(
                f"text {longest} of {len(texts)} has {len(tokens[longest])} tokens, and the encoder reads "
                f"{self.max_length}: cut passages to fewer max_tokens, or say truncation=True ({texts[longest]!r:.40})"
            )
        # Texts of like length together.
        order = sorted(range(len(tokens)), key=lambda place: len(tokens[place]))
        vectors: list[NDArray[np.float32]] = [np.zeros(0, np.float32)] * len(texts)
        with torch.inference_mode():
            for start in range(0, len(order), self.batch_size):
                places = order[start : start + self.batch_size]
                batch = self.tokenizer.pad({"input_ids": [tokens[place] for place in places]}, return_tensors="pt")
                batch = batch.to(self.model.device)
                states = self.model(**batch).last_hidden_state.float()
                mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
                means = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
                for place, vector in zip(places, torch.nn.functional.normalize(means, dim=-1).cpu(), strict=True):
                    vectors[place] = vector.numpy()
        return np.stack(vectors)


class StaticVectors:
    """The mean of the vectors of a text's words or tokens, at length 1; a text without any has a vector of zeros.

    Args:
        vectors: a vector for each word or token (words, size).
        vocabulary: the row of each word, without letter case, or the tokenizer whose token ids are the rows.

    Raises:
        InputError: when a vector is not finite, or the vocabulary names rows that are not there.
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
            if not Path(path).is_file():
                raise InputError(f"{path}: no such file")
        try:
            # Torch reads bf16 too, which numpy does not know.
            tensors = [tensor for tensor in load_file(vectors).values() if tensor.ndim == 2]
        except (SafetensorError, OSError) as error:
            raise InputError(f"{vectors}: not safetensors, or damaged: {str(error).splitlines()[0][:80]}") from None
        if len(tensors) != 1:
            raise InputError(f"{vectors}: {len(tensors)} matrices; expected one, with a row for each token")
        try:
            vocabulary = Tokenizer.from_file(str(tokenizer))
        # The library raises this class itself.
        except Exception as error:
            raise InputError(f"{tokenizer}: no tokenizer.json: {str(error).splitlines()[0][:80]}") from None
        vocabulary.no_padding()
        vocabulary.no_truncation()
        return cls(tensors[0].float().numpy(), vocabulary)

    def encode(self, texts: Sequence[str]) -> "NDArray[np.float32]":
        """Return the vectors of texts (texts, size), each of length 1 or, without a known word, of zeros."""
        import numpy as np

        means = np.zeros((len(texts), self.vectors.shape[1]), np.float32)
        for place, rows in enumerate(self._rows(texts)):
            if rows:
                means[place] = self.vectors[rows].mean(0)
        return means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)

    def _rows(self, texts: Sequence[str]) -> list[list[int]]:
        if isinstance(self.vocabulary, Mapping):
            return [[self.vocabulary[word] for word in words_of(text) if word in self.vocabulary] for text in texts]
        return [each.ids for each in self.vocabulary.encode_batch_fast(list(texts), add_special_tokens=False)]
