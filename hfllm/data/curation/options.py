"""Every setting of curation. Importing this module needs no extra packages."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from hfllm.data.sources import PYDOC
from hfllm.errors import refuse_if
from hfllm.flags import SEED, at_least, flag

FILTERS = (
    *("length", "language", "gopher_quality", "gopher_repetition", "c4_quality", "spam", "toxicity"),
    *("decontamination", "exact_duplicates", "near_duplicates", "perplexity"),
)
TXT_DOCUMENTS = ("passage", "line", "file")
HTML_EXTRACTORS = ("resiliparse", "trafilatura", "plain")
OUTPUT_FORMATS = ("jsonl", "parquet")


def _html_extractor() -> str:
    # By name, so that the report tells which one it was and a run is not resumed with the other.
    return "resiliparse" if find_spec("resiliparse") else "trafilatura"


@dataclass(frozen=True)
class CurationOptions:
    """Settings of what is read, what is dropped, and how the work is divided. The defaults suit English web text.

    Raises:
        InputError: for a value out of range.
    """

    dataset_name: str = flag(
        PYDOC, "'pydoc' (this Python's own documentation), a file, a folder, or a dataset id on the Hub."
    )
    dataset_train_split: str = flag("train", "Split of a Hub dataset to read.")
    text_column: str | None = flag(None, "Column of the text; by default 'text', else 'content'.")
    txt_documents: str = flag("passage", "Unit of a document in a .txt file: passage, line or file.")
    passage_bytes: int = flag(4000, "Paragraphs of a .txt file are joined to passages of this many bytes or more.")
    html_extractor: str = flag(
        _html_extractor,
        "Text of web pages: their main content by resiliparse where that surely lacks little and else by trafilatura "
        "(the default where resiliparse is installed), by trafilatura, or plain, all visible text.",
    )
    max_document_bytes: int = flag(
        5_000_000, "Longer lines, passages, cells and web pages are dropped without reading them."
    )
    max_samples: int | None = flag(None, "Read at most this many documents in each task.", takes=at_least(1))

    filters: list[str] = flag(FILTERS, f"Which filters run, in their own order: {', '.join(FILTERS)}.")
    min_words: int = flag(10, "length: minimum words of a document.")
    languages: list[str] = flag(("en",), "language: ISO 639 codes to keep.")
    min_language_score: float = flag(0.65, "language: minimum probability of the language.")
    min_quality_words: int = flag(50, "gopher_quality: fewest words.")
    max_quality_words: int = flag(100_000, "gopher_quality: most words.")
    min_stop_words: int = flag(2, "gopher_quality: minimum number of different English stop words.")
    min_sentences: int = flag(3, "c4_quality: minimum number of sentences in the remaining lines.")
    min_line_words: int = flag(5, "c4_quality: minimum words of a remaining line.")
    max_spam_score: float = flag(0.5, "spam: maximum probability of spam.")
    spam_train_file: str | None = flag(
        None, "spam: refit the weights on this file (columns label, spam or ham, and text)."
    )
    toxic_words: list[str] = flag((), "toxicity: files of words and phrases, one per line; off without any.")
    max_toxic_matches: int = flag(0, "toxicity: maximum matches of the list in a document.")
    decontaminate: list[str] = flag((), "decontamination: files, folders or Hub ids of evaluation sets.")
    contamination_ngram: int = flag(13, "decontamination: length in words of a matching run.")
    minhash_ngram: int = flag(5, "near_duplicates: words in a shingle.")
    minhash_buckets: int = flag(14, "near_duplicates: bands of the signature.")
    minhash_hashes: int = flag(8, "near_duplicates: hashes in a band.")
    max_perplexity_quantile: float = flag(0.98, "perplexity: share of documents to keep, lowest perplexity first.")
    perplexity_model: str = flag(
        "corpus", "perplexity: 'corpus' (byte 5-grams of a sample), 'pydoc' (of that corpus) or a causal LM."
    )

    output_format: str = flag("jsonl", "Shards as jsonl (gzipped) or parquet.")
    tasks: int = flag(1, "Number of parts of the input files, and of output shards.")
    workers: int = flag(1, "Tasks that run at once on this machine.")
    examples: int = flag(3, "Dropped documents to show per reason and task.")
    seed: int = flag(42, "Seed of the samples and the hashes.", takes=SEED)

    def __post_init__(self) -> None:
        _one_of("--txt_documents", self.txt_documents, TXT_DOCUMENTS)
        _one_of("--html_extractor", self.html_extractor, HTML_EXTRACTORS)
        _one_of("--output_format", self.output_format, OUTPUT_FORMATS)
        for name in self.filters:
            _one_of("--filters", name, FILTERS)
        for name in ("tasks", "workers", "minhash_ngram", "minhash_buckets", "minhash_hashes", "contamination_ngram"):
            _at_least(name, getattr(self, name), 1)
        _at_least("max_document_bytes", self.max_document_bytes, 1000)
        _at_least("passage_bytes", self.passage_bytes, 1)
        for name in ("min_language_score", "max_spam_score", "max_perplexity_quantile"):
            refuse_if(not 0 <= getattr(self, name) <= 1, f"--{name} must lie in [0, 1], got {getattr(self, name)}")

    def uses(self, name: str) -> bool:
        """Return whether the filter `name` runs; filters by a list need one."""
        needs: dict[str, Sequence[str]] = {"toxicity": self.toxic_words, "decontamination": self.decontaminate}
        return name in self.filters and bool(needs.get(name, (True,)))


def _one_of(flag: str, value: str, accepted: Sequence[str]) -> None:
    refuse_if(value not in accepted, f"{flag} {value!r}; accepted: {', '.join(accepted)}")


def _at_least(name: str, value: int, least: int) -> None:
    refuse_if(value < least, f"--{name} must be at least {least}, got {value}")
