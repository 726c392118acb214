"""Drop the documents with the highest perplexity under a reference model, a causal one or a byte n-gram model.

The threshold is a quantile of bits per byte in a sample of the corpus. By default the model is trained on that sample
too: the sample is split in two by a hash of the text, and each document is scored by the model that did not see its
half, so that a small corpus, where the sample is everything, is not scored by its own training data.
"""

import heapq
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter

from hfllm.data.curation.duplicates import marked
from hfllm.data.curation.options import CurationOptions
from hfllm.data.curation.text import hash_text, mix
from hfllm.data.packing import start_of
from hfllm.data.sources import PYDOC, pydoc_documents
from hfllm.errors import InputError, one_line

# ---- judges and the filter ----


SAMPLE = 2048  # documents of all tasks
EXCERPT = 2000  # characters of each
JUDGED = 1000  # characters of a document for the n-gram model
FEWEST = 100  # a quantile of fewer documents is not meaningful
CONTEXT = 512  # tokens for a causal model


class Sample(PipelineStep):
    """Passes all documents on, and writes the ones with the lowest hashes of `seed` and id to `<task>.json`."""

    type = "🎲 - SAMPLE"
    name = "sample"

    def __init__(self, folder: str, seed: int = 42):
        super().__init__()
        self.folder, self.seed = folder, seed

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        size = max(64, SAMPLE // world_size)
        lowest: list[tuple[int, int, str]] = []
        for index, doc in enumerate(data):
            with self.track_time():
                item = (-hash_text(doc.id, self.seed), index, doc.text[:EXCERPT])
                if len(lowest) < size:
                    heapq.heappush(lowest, item)
                elif item > lowest[0]:
                    heapq.heapreplace(lowest, item)
            yield doc
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        rows = sorted((index, text) for _, index, text in lowest)
        (Path(self.folder) / f"{rank:05d}.json").write_text(json.dumps(rows), encoding="utf-8")


class CorpusJudge:
    """Two byte n-gram models, each trained on one half of the sample."""

    def __init__(self, texts: Iterable[str]):
        halves: tuple[list[str], list[str]] = ([], [])
        for text in texts:
            halves[_half(text)].append(text)
        self.models = [ByteNgramModel(half) for half in halves]

    def __call__(self, text: str) -> float:
        return self.models[1 - _half(text)].bits_per_byte(text[:JUDGED])


class CausalJudge:
    """A causal language model of transformers; scores the first 512 tokens, in bits per byte.

    Raises:
        InputError: when the files lack weights of the model.
    """

    def __init__(self, name: str):
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        # A judge's own code is never run, nor kernels of the Hub named by its config.
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        config._attn_implementation = config._experts_implementation = None
        self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, report = AutoModelForCausalLM.from_pretrained(
            name, config=config, output_loading_info=True, trust_remote_code=False
        )
        if missing := sorted(report["missing_keys"]):
            raise InputError(
                f"--perplexity_model {name!r}: {len(missing)} weights are not in its files, such as {missing[0]}, and "
                "would be random: does its config.json name more layers, or is it another model's?"
            )
        self.model = model.eval()
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or CONTEXT
        self.length = min(CONTEXT, context)

    def __call__(self, text: str) -> float:
        import torch

        text = text[:EXCERPT]
        ids = start_of(self.tokenizer) + self.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([ids[: self.length]])
        if ids.shape[1] < 2:
            return 0.0
        with torch.no_grad():
            loss = self.model(input_ids=ids, labels=ids).loss.item()
        scored = self.tokenizer.decode(ids[0, 1:], skip_special_tokens=True)
        return loss * (ids.shape[1] - 1) / math.log(2) / max(1, len(scored.encode()))


def _half(text: str) -> int:
    return hash_text(text[:EXCERPT]) & 1


class FitPerplexity(PipelineStep):
    """Reads the sample, without its duplicates, and writes the threshold to `threshold.json`.

    Each task that uses the models trains them again from the sample, which takes seconds, so that no model file has
    to be trusted.
    """

    type = "🎲 - SAMPLE"
    name = "perplexity_threshold"

    def __init__(self, folder: str, duplicates: str, options: CurationOptions):
        super().__init__()
        self.folder, self.duplicates, self.options = folder, duplicates, options

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        with self.track_time():
            texts = []
            for path in sorted(Path(self.folder).glob("[0-9]*.json")):
                task = int(path.stem)
                dropped = marked(self.duplicates, "exact", task) | marked(self.duplicates, "near", task)
                rows = json.loads(path.read_text("utf-8"))
                texts += [text for index, text in rows if index not in dropped]
            threshold = None
            if len(texts) >= FEWEST:
                judge = make_judge(self.options.perplexity_model, texts)
                threshold = float(np.quantile([judge(text) for text in texts], self.options.max_perplexity_quantile))
            result = {"threshold": threshold, "texts": texts}
            (Path(self.folder) / "threshold.json").write_text(json.dumps(result), encoding="utf-8")
        yield from ()


def check_judge(model: str) -> None:
    """Check that the model's config and tokenizer load, before hours are spent on earlier stages."""
    if model in ("corpus", PYDOC):
        return
    from transformers import AutoConfig, AutoTokenizer

    try:
        AutoConfig.from_pretrained(model, trust_remote_code=False)
        AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = one_line(error, None)
        reason = "it needs code of its own, which is not run" if "trust_remote_code" in reason else reason[:200]
        raise InputError(f"--perplexity_model {model!r} could not be loaded: {reason}") from None


def make_judge(model: str, texts: list[str]) -> Callable[[str], float]:
    """Return a function from a text to bits per byte; `model` as `CurationOptions.perplexity_model` says."""
    if model == "corpus":
        return CorpusJudge(texts)
    if model == PYDOC:
        return CorpusJudge(text for _, text in pydoc_documents())
    return CausalJudge(model)


class PerplexityFilter(BaseFilter):
    """Drops documents above the threshold written by `FitPerplexity`; none if the sample was too small."""

    name = "perplexity"

    def __init__(self, folder: str, model: str, exclusion_writer=None):
        super().__init__(exclusion_writer)
        self.folder, self.model = folder, model
        self._threshold, self._judge = None, None

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        fitted = json.loads((Path(self.folder) / "threshold.json").read_text("utf-8"))
        self._threshold = fitted["threshold"]
        if self._threshold is not None:
            with self.track_time("task"):
                self._judge = make_judge(self.model, fitted["texts"])
        yield from super().run(data, rank, world_size)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if self._judge is None:
            return True
        return self._judge(doc.text) <= self._threshold or (False, "surprising")


# ---- ngram model ----
#
# A byte n-gram model in a few numpy tables: a small, fast measure of how ordinary a text is, for any language.


ORDER = 5
TABLE_BITS = 20
LONGEST = 20_000  # bytes of a document to score; more would hardly change the mean


class ByteNgramModel:
    """Byte 1- to 5-grams with interpolated Witten-Bell smoothing (Witten and Bell 1991).

    An n-gram's count is stored by hash in a table of 2**20 entries. Distinct n-grams may share one, so the values are
    scores rather than exact probabilities, and training takes seconds for a few megabytes. 12 MB per order.

    Args:
        texts: to count, held in memory while counting.
    """

    def __init__(self, texts: Iterable[str] = ()):
        data = np.frombuffer(b"\0".join(text.encode()[:LONGEST] for text in texts), np.uint8)
        codes = _codes(data)
        self.counts: list[np.ndarray] = []  # of n-grams of each order
        self.contexts: list[np.ndarray] = []  # of each context: its count, and in how many n-grams
        for order in range(1, ORDER + 1):
            grams, before = codes[order], _places(codes[order - 1][: len(codes[order])])
            _, first = np.unique(grams, return_index=True)
            totals, kinds = (np.bincount(indices, minlength=1 << TABLE_BITS) for indices in (before, before[first]))
            self.counts.append(np.bincount(_places(grams), minlength=1 << TABLE_BITS).astype(np.float32))
            self.contexts.append(np.stack([totals, kinds], axis=1).astype(np.float32))

    def bits_per_byte(self, text: str) -> float:
        """Return the mean bits per byte of a text; 2 to this power is the perplexity per byte."""
        data = np.frombuffer(text.encode()[:LONGEST], np.uint8)
        if not len(data):
            return 0.0
        chances, codes = np.full(len(data), 1 / 256), _codes(data)
        before = _places(codes[0])
        for order in range(1, ORDER + 1):
            indices = _places(codes[order])
            total, kinds = self.contexts[order - 1][before[: len(indices)]].T
            # An order's n-grams begin after its own length; before that, the lower order's probabilities are kept.
            tail = chances[len(chances) - len(indices) :]
            mixed = (self.counts[order - 1][indices] + kinds * tail) / np.maximum(total + kinds, 1)
            np.copyto(tail, mixed, where=total > 0)
            before = indices
        return float(-np.log2(np.maximum(chances, 1e-12)).mean())


def _codes(data: np.ndarray) -> list[np.ndarray]:
    """Return the n-grams of orders 0 to `ORDER` as numbers; order n has shape (bytes - n + 1,), uint64."""
    codes = [np.zeros(len(data) + 1, np.uint64)]
    for order in range(1, ORDER + 1):
        count = max(0, len(data) - order + 1)
        codes.append((codes[-1][:count] << np.uint64(8)) | data[order - 1 : order - 1 + count])
    # Orders do not share entries: a byte with the order's number is put in front.
    return [code | np.uint64((order + 1) << 48) for order, code in enumerate(codes)]


def _places(codes: np.ndarray) -> np.ndarray:
    return (mix(codes * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - TABLE_BITS)).astype(np.int64)
