"""Exact and near duplicates, across all tasks, on disk, and copies of evaluation texts.

Near duplicates: MinHash (Broder 1997) with banding: a signature of 14 bands of 8 hashes over shingles of 5 words
makes documents of Jaccard similarity s candidates with probability 1 - (1 - s^8)^14, i.e. 0.5 at s = 0.69 and 0.92
at 0.8. These are datatrove's MinHash stages: signatures are sorted on disk, bands are merged as sorted files, and only
documents with a duplicate are ever held in memory. Two parts are ours. Signatures are computed from arrays of word
hashes, without a word tokenizer to install; and the hash of the whole text is one more band, so that exact duplicates,
short ones too, are found by the same merge and counted separately.
"""

import re
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
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
from hfllm.data.sources import load_source
from hfllm.errors import InputError

# ---- duplicates ----


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
    """Placeholder for a word tokenizer, to avoid an install: words are split by our regular expression."""

    def word_tokenize(self, text: str) -> list[str]:
        raise NotImplementedError

    sent_tokenize = span_tokenize = word_tokenize


class DuplicateSignature(MinhashDedupSignature):
    """Writes each document's signature, by datatrove's first MinHash stage.

    Statistics: `seconds`, the time for only the signatures; datatrove's own measure includes the time of earlier
    steps.
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

    The first is the one with the lowest task and position, so the result is deterministic; word-for-word repetitions
    of an earlier document are listed separately. It takes about 200 bytes per document with a duplicate.

    Args:
        input_folder: folder of the pairs from `MinhashDedupBuckets`.
        output_folder: where `<task>.exact.npy` and `<task>.near.npy` go, sorted positions of documents.
        exact, near: the kinds to remove.
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
                for task, index, other_task, other_place in np.fromfile(path, "<u4").reshape(-1, 4).tolist():
                    yield (task, index), (other_task, other_place)

    def _write(self, kind: str, nodes: set[tuple[int, int]]) -> None:
        indices: dict[int, list[int]] = {}
        for task, index in sorted(nodes):
            indices.setdefault(task, []).append(index)
        Path(self.output_folder).mkdir(parents=True, exist_ok=True)
        for task, result in indices.items():
            np.save(Path(self.output_folder) / f"{task:05d}.{kind}.npy", np.array(result, np.int64))


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
    """Return the positions of a task's documents listed as duplicates of one kind."""
    path = Path(folder) / f"{rank:05d}.{kind}.npy"
    return set(np.load(path, allow_pickle=False).tolist()) if path.is_file() else set()


# ---- decontamination ----
#
# Overlap with evaluation sets: a training document must not contain test data.
#
# As GPT-3 did (Brown et al. 2020, arXiv:2005.14165, appendix C): a document is contaminated when it shares a run of 13
# words with an evaluation text, without case and punctuation; `normalized` lists other ignored differences. Evaluation
# texts of 8 to 12 words count as one run of their own length; shorter ones are too common, and are left out.
#
# A copy with some changed words has no such run. So a document is contaminated too when it holds, close together and
# in their order, four of five words of a passage of 26 (`Passages` has the rules).


SHORTEST = 8
# Characters without a shape: soft hyphens, joiners, marks of direction, variants of the character before, tags.
_UNSEEN = re.compile(
    "[\u00ad\u034f\u061c\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\U000e0000-\U000e0fff]"
)
_MARKS = "\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f"
_MARK = re.compile(f"[{_MARKS}]")
# Letters of other alphabets drawn as Latin ones, in the lower case to which both texts are brought.
_LOOK_ALIKE = str.maketrans(
    "авгеһікмноԛрсѕтухьԁјԝѵүαβεηικνορτυχωɑɡıօսոհցϲ",
    "abrehikmhoqpcstyxbdjwvyabenikvoptuxwagiounhgc",
)
_FOLDED = re.compile(f"[\u00c0-\u052f\u0561-\u0587\u1e00-\u1fff{_MARKS}]")
_CALCULATION = re.compile(r"<<[^<>\n]{0,200}>>")
_FINAL_ANSWER = re.compile(r"####\s{0,9}[-$\d.,]{1,30}[ \t]{0,9}(?=\n|$)")
_SPLIT_NUMBER = re.compile(r"(?<=\d) ?@([.,])@ ?(?=\d)")
_SPLIT_PARTS = (" '", " ’", " n'", " n’", " N'", " N’")
_SPLIT_WORD = re.compile(r"(?<=\w) ((?:n['’]t|['’](?:s|t|re|ve|ll|d|m))\b)", re.IGNORECASE)


def normalized(text: str) -> str:
    """Return a text without parts that copies of evaluation sets often lack, or have in addition.

    Letters in Unicode's compatible form (NFKC, so that `ﬁ` is `fi`) and without case and accents, letters of other
    alphabets that look like Latin ones as these, no invisible characters, no calculator marks
    (`<<48/2=24>>`) and final answers (`#### 72`) of gsm8k, and words split by tokenizers joined again: `Jason 's`,
    `do n't`, `1 @,@ 000`. Spaces and punctuation do not count anyway. Evaluation texts and documents are both changed
    in this way, so that a Russian text remains equal to its copy.
    """
    if not text.isascii():
        text = _UNSEEN.sub("", unicodedata.normalize("NFKC", text)).casefold()
        if _FOLDED.search(text):
            text = _MARK.sub("", unicodedata.normalize("NFD", text)).translate(_LOOK_ALIKE)
            text = unicodedata.normalize("NFC", text)
    if "<<" in text:
        text = _CALCULATION.sub("", text)
    if "####" in text:
        text = _FINAL_ANSWER.sub("", text)
    if "@" in text:
        text = _SPLIT_NUMBER.sub(r"\1", text)
    return _SPLIT_WORD.sub(r"\1", text) if any(part in text for part in _SPLIT_PARTS) else text


class DecontaminationFilter(BaseFilter):
    """Drops documents that share an n-gram with one of `texts`, or a passage of 2n words with few of them changed.

    It takes 20 bytes per word of the evaluation texts and 8 MB per length: gsm8k's training set takes 90 MB.

    Args:
        texts: texts of the evaluation sets.
        n: words per n-gram.
    """

    name = "decontamination"

    def __init__(self, texts: Iterable[str], n: int = 13, exclusion_writer=None):
        super().__init__(exclusion_writer)
        grams: dict[int, list[np.ndarray]] = {}
        hashed = [word_hashes(normalized(text)) for text in texts]
        for hashes in hashed:
            size = min(n, len(hashes))
            if size >= min(n, SHORTEST):
                grams.setdefault(size, []).append(ngram_hashes(hashes, size))
        self.known = {size: _HashSet(np.concatenate(parts)) for size, parts in sorted(grams.items())}
        self.passages = Passages(hashed, n)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        hashes = word_hashes(normalized(doc.text))
        if any(eval_ngrams.has_any(ngram_hashes(hashes, size)) for size, eval_ngrams in self.known.items()):
            return False, "contaminated"
        return not self.passages.are_in(hashes) or (False, "contaminated")


class Passages:
    """Finds passages of evaluation texts with some words changed, left out or added.

    As programs for gene alignment do (Altschul et al. 1990, doi:10.1016/S0022-2836(05)80360-2), it looks for seeds,
    runs of `SEED` words, and where a document holds `SEEDS` of one text close together, it compares the words around
    them: the longest common subsequence must lack few words of a passage (`PASSAGES`), or a fifth of a whole text that
    is shorter than that.

    Args:
        texts: hashes of the words of each text; texts of fewer than `n` words are left out.
        n: the scale of a passage, in words.
    """

    SEED, SEEDS = 4, 3
    # Lengths in n, and one word in how many may be missing: of n = 13 words 5 of 26, 3 of 19, 1 of 16.
    PASSAGES = ((2.0, 5), (1.5, 6), (1.25, 16))
    MOST_TEXTS = 16  # of one seed; a seed of more texts says little about where it is from
    MOST_COMPARED = 64  # passages per document

    def __init__(self, texts: Sequence[np.ndarray], n: int = 13):
        self.passages = [(int(factor * n), share) for factor, share in self.PASSAGES]
        unique_texts = {hash_words(hashes).tobytes(): hashes for hashes in texts if len(hashes) >= n}
        self.words = np.concatenate([np.zeros(0, np.uint32), *map(_short, unique_texts.values())])
        self.starts = np.cumsum([0, *map(len, unique_texts.values())])
        seeds, indices = [np.zeros(0, np.uint32)], [np.zeros(0, np.int32)]
        for hashes, start in zip(unique_texts.values(), self.starts.tolist(), strict=False):
            seeds.append(_short(ngram_hashes(hashes, self.SEED)))
            indices.append(np.arange(start, start + len(seeds[-1]), dtype=np.int32))
        joined = np.concatenate(seeds)
        order = np.argsort(joined, kind="stable")
        joined = joined[order]
        is_kept = np.arange(len(joined)) - np.searchsorted(joined, joined) < self.MOST_TEXTS
        self.seeds, self.places = joined[is_kept], np.concatenate(indices)[order][is_kept]
        self.table = _table(self.seeds)

    def are_in(self, hashes: np.ndarray) -> bool:
        """Return whether a document holds such a passage, by the hashes of its words: (words,), uint64."""
        at, text, index = self._found(_short(ngram_hashes(hashes, self.SEED)))
        behind = self.SEEDS - 1
        if len(at) <= behind:
            return False
        is_close = (text[behind:] == text[:-behind]) & (at[behind:] - at[:-behind] < self.passages[0][0])
        close = np.flatnonzero(is_close) + behind // 2
        # Texts with many seeds first.
        _, which, often = np.unique(text[close], return_inverse=True, return_counts=True)
        close = close[np.argsort(-often[which], kind="stable")]
        words, compared = _short(hashes), set()
        for found_at, found_text, found_place in zip(
            *(each[close].tolist() for each in (at, text, index)), strict=True
        ):
            # Neighbors on the same alignment would compare almost the same words.
            alignment = found_text, found_at // 8, (found_place - found_at) // 4
            if alignment not in compared:
                if self._is_alike(words, found_at, found_text, found_place):
                    return True
                compared.add(alignment)
                if len(compared) == self.MOST_COMPARED:
                    break
        return False

    def _found(self, seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return where a document's seeds are known: index in it, text, and index in all words. (found,) each."""
        at = np.flatnonzero(self.table[seeds & _MASK])
        first = np.searchsorted(self.seeds, seeds[at])
        count = np.searchsorted(self.seeds, seeds[at], "right") - first
        at = np.repeat(at, count)
        index = self.places[np.arange(len(at)) + np.repeat(first - np.cumsum(count) + count, count)].astype(np.int64)
        text = np.searchsorted(self.starts, index, "right") - 1
        order = np.lexsort((at, text))
        return at[order], text[order], index[order]

    def _is_alike(self, words: np.ndarray, at: int, text: int, position: int) -> bool:
        """Return whether the words around a seed at `at`, and at `position` in the text, belong to a passage."""
        start, end = self.starts[text : text + 2].tolist()
        for length, share in self.passages:
            is_whole = end - start < length
            length = min(length, end - start)
            missing = -(-length // 5) if is_whole else length // share
            begin = min(max(start, position + self.SEED // 2 - length // 2), end - length)
            first, slack = at - (position - begin), length // 8
            around = words[max(0, first - slack) : max(0, first + length + slack)]
            if common_words(self.words[begin : begin + length], around) >= length - missing:
                return True
            if is_whole:
                break
        return False


def common_words(one: np.ndarray, other: np.ndarray) -> int:
    """Return the length of the longest common subsequence, by the bits of one number.

    The algorithm is from Hyyrö (2004), "Bit-parallel LCS-length computation revisited".
    """
    masks: dict[int, int] = {}
    for index, word in enumerate(one.tolist()):
        masks[word] = masks.get(word, 0) | 1 << index
    every = left = (1 << len(one)) - 1
    for word in other.tolist():
        matched = left & masks.get(word, 0)
        left = (left + matched | left - matched) & every
    return len(one) - left.bit_count()


def _short(hashes: np.ndarray) -> np.ndarray:
    """Return the upper half of hashes, which is enough where several must agree. uint64 -> uint32."""
    return (hashes >> np.uint64(32)).astype(np.uint32)


class _HashSet:
    """Set of uint64 values as a sorted array, with a table that answers most look-ups at once."""

    def __init__(self, values: np.ndarray):
        self.values = np.unique(values)
        self.table = _table(self.values)

    def has_any(self, values: np.ndarray) -> bool:
        values = values[self.table[values & _MASK]]
        indices = np.searchsorted(self.values, values)
        indices[indices == len(self.values)] = 0
        return bool((self.values[indices] == values).any())


_MASK = np.uint32((1 << 23) - 1)


def _table(values: np.ndarray) -> np.ndarray:
    """Return the low bits present among hashes. (2 ** 23,), bool."""
    table = np.zeros(int(_MASK) + 1, bool)
    table[values & _MASK] = True
    return table


def evaluation_texts(names: Sequence[str]) -> list[str]:
    """Return the texts of evaluation sets: the strings of each row, one by one and joined in column order.

    Joining also finds a run of words across a question and its answer.

    Args:
        names: files (jsonl, json, csv, tsv, parquet, txt, or jsonl.gz), folders or Hub ids.

    Raises:
        InputError: when one cannot be read, or holds no text of 8 words or more.
    """
    texts: list[str] = []
    for name in names:
        result: list[str] = []
        for row in load_source(name).rows:
            strings = list(_strings(row))
            result += [*strings, " ".join(strings)]
        if not any(len(word_hashes(text)) >= SHORTEST for text in result):
            raise InputError(f"--decontaminate {name}: holds no text of {SHORTEST} words or more")
        texts += result
    return texts


def _strings(value: object) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)
