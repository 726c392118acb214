"""Exact and near duplicates, across all tasks, on disk.

Near duplicates: MinHash (Broder 1997) with banding: a signature of 14 bands of 8 hashes over shingles of 5 words
makes documents of Jaccard similarity s candidates with probability 1 - (1 - s^8)^14, i.e. 0.5 at s = 0.69 and 0.92
at 0.8. These are datatrove's MinHash stages: signatures are sorted on disk, bands are merged as sorted files, and only
documents that have a duplicate are ever held in memory. Two parts are ours. Signatures are computed from arrays of
word hashes, without a word tokenizer to install; and the hash of the whole text is one more band, so that exact
duplicates, short ones too, are found by the same merge and counted separately.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer

from hfllm.data.curation.options import CurationOptions
from hfllm.data.curation.text import hash_words, mix, ngram_hashes, word_hashes

# datatrove stops reading a band at this hash (its `_mersenne_prime`).
LARGEST = np.uint64((1 << 61) - 2)
ROWS = 1 << 12


def minhash_config(options: CurationOptions) -> MinhashConfig:
    """Return datatrove's settings; the last band is for exact duplicates."""
    return MinhashConfig(
        n_grams=options.minhash_ngram,
        num_buckets=options.minhash_buckets + 1,
        hashes_per_bucket=options.minhash_hashes,
        seed=options.seed,
        hash_config=HashConfig(precision=64, hash_fc="sha1"),  # unused: the hashes are ours
    )


class _NoTokenizer(WordTokenizer):
    """Placeholder for a word tokenizer, which would need an install: words are split by our regular expression."""

    def word_tokenize(self, text: str) -> list[str]:
        raise NotImplementedError

    sent_tokenize = span_tokenize = word_tokenize


class DuplicateSignature(MinhashDedupSignature):
    """Writes each document's signature, by datatrove's first MinHash stage.

    Statistics: `seconds`, the time for only the signatures; datatrove's own measure includes that of earlier steps.
    """

    name = "signatures"

    def __init__(self, output_folder: str, config: MinhashConfig):
        super().__init__(output_folder, config, language=_NoTokenizer())
        count = (config.num_buckets - 1) * config.hashes_per_bucket
        rng = np.random.default_rng(config.seed)
        self._factors = rng.integers(0, 1 << 63, count, np.uint64) * np.uint64(2) + np.uint64(1)

    def get_shingles(self, text: str) -> np.ndarray:
        """Return the hash of the whole text, then the hashes of its different shingles. (1 + shingles,).

        A text of fewer words than two shingles is compared by its single words.
        """
        self._began = time.perf_counter()
        hashes = word_hashes(text)
        whole = hash_words(hashes)
        # With one or two shingles any change would leave none in common.
        size = self.config.n_grams if len(hashes) >= 2 * self.config.n_grams else 1
        return np.concatenate([whole, np.unique(ngram_hashes(hashes, size))])

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        """Return the hashes of each band, the exact one last."""
        least = np.full(len(self._factors), np.iinfo(np.uint64).max)
        # In blocks, since a long document would need 112 hashes per word at once.
        for start in range(1, len(shingles), ROWS):
            np.minimum(least, (shingles[start : start + ROWS, None] * self._factors).min(axis=0), out=least)
        bands = np.minimum(mix(least) >> np.uint64(3), LARGEST).reshape(self.config.num_buckets - 1, -1)
        exact = [int(min(shingles[0] >> np.uint64(3), LARGEST))] * self.config.hashes_per_bucket
        self.stat_update("seconds", value=time.perf_counter() - self._began)
        return [*bands.tolist(), exact]


class MarkDuplicates(PipelineStep):
    """Groups the pairs of all bands, keeps the first document of each group and lists the others for each task.

    The first is that with the lowest task and position, so the result is deterministic; documents that repeat an
    earlier one word for word are listed separately. It takes about 200 bytes per document with a duplicate.

    Args:
        input_folder: folder of the pairs from `MinhashDedupBuckets`.
        output_folder: where `<task>.exact.npy` and `<task>.near.npy` go, sorted positions of documents.
        exact, near: which kinds to remove.
    """

    type = "🫂 - DEDUP"
    name = "duplicates"

    def __init__(self, input_folder: str, output_folder: str, config: MinhashConfig, exact: bool, near: bool):
        super().__init__()
        self.input_folder, self.output_folder, self.config = input_folder, output_folder, config
        self.exact, self.near = exact, near

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        with self.track_time():
            last = self.config.num_buckets - 1
            exact = {second for _, second in self._pairs([last])}
            roots = _first_of_group(self._pairs(range(last + 1)))
            near = {node for node, root in roots.items() if node != root} - exact
            self._write("exact", exact if self.exact else set())
            self._write("near", near | (set() if self.exact else exact) if self.near else set())
        yield from ()

    def _pairs(self, bands) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        for band in bands:
            for path in sorted(Path(self.input_folder).glob(f"{band:05d}_*.dups")):
                for task, place, other_task, other_place in np.fromfile(path, "<u4").reshape(-1, 4).tolist():
                    yield (task, place), (other_task, other_place)

    def _write(self, kind: str, nodes: set[tuple[int, int]]) -> None:
        places: dict[int, list[int]] = {}
        for task, place in sorted(nodes):
            places.setdefault(task, []).append(place)
        Path(self.output_folder).mkdir(parents=True, exist_ok=True)
        for task, found in places.items():
            np.save(Path(self.output_folder) / f"{task:05d}.{kind}.npy", np.array(found, np.int64))


def _first_of_group(pairs) -> dict:
    """Return the lowest member of each node's group, for all nodes in `pairs`."""
    parent: dict = {}

    def root(node):
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for one, other in pairs:
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    return {node: root(node) for node in list(parent)}


class DuplicateFilter(BaseFilter):
    """Drops the documents of one kind (`exact` or `near`) that `MarkDuplicates` listed.

    It reads each document's position from `metadata["place"]`.
    """

    def __init__(self, folder: str, kind: str, exclusion_writer=None):
        self.name = f"{kind}_duplicates"
        super().__init__(exclusion_writer)
        self.folder, self.kind = folder, kind
        self.places: set[int] = set()

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        self.places = marked(self.folder, self.kind, rank)
        yield from super().run(data, rank, world_size)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        return doc.metadata["place"] not in self.places or (False, f"{self.kind}_duplicate")


def marked(folder: str, kind: str, rank: int) -> set[int]:
    """Return the positions of a task's documents that are listed as duplicates of one kind."""
    path = Path(folder) / f"{rank:05d}.{kind}.npy"
    return set(np.load(path, allow_pickle=False).tolist()) if path.is_file() else set()
