"""The stages of curation as datatrove pipelines, and how to run them on this machine.

    filter       read | filters | decontamination | sample | write the rest | signatures         (tasks)
    bands        pairs of documents with a common band in their signatures                       (bands)
    duplicates   groups of pairs; the first of each group stays                                      (1)
    perplexity   the threshold, from the sample without its duplicates                               (1)
    write        read the rest | duplicates | perplexity | shards                                (tasks)

Between stages everything is on disk, so each runs under any of datatrove's executors: see docs/guides/curation.md.
"""

import gzip
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import multiprocess
import orjson
from datatrove.data import Document, DocumentsPipeline
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import MinhashDedupBuckets
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.writers import JsonlWriter, ParquetWriter
from datatrove.utils.typeshelper import StatHints
from fsspec.compression import register_compression
from loguru import logger

from hfllm.data.child_processes import WorkerEnded, Workers
from hfllm.data.curation.duplicates import (
    DecontaminationFilter,
    DuplicateFilter,
    DuplicateSignature,
    MarkDuplicates,
    evaluation_texts,
    minhash_config,
)
from hfllm.data.curation.filters import (
    C4QualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    LanguageFilter,
    LengthFilter,
    SpamFilter,
    SpamModel,
    ToxicityFilter,
    fit,
    read_labeled,
    read_phrases,
)
from hfllm.data.curation.inputs import NOT_A_DOCUMENT, Input, Item, find_inputs, read_documents, text_column
from hfllm.data.curation.options import CurationOptions
from hfllm.data.curation.perplexity import FitPerplexity, PerplexityFilter, Sample, check_judge
from hfllm.data.curation.text import words_of
from hfllm.data.sources import pydoc_documents
from hfllm.errors import MachineError

# ---- examples ----
#
# Examples of the documents dropped by a step, for the report.


EXCERPT = 300


class Examples:
    """Writer for the documents dropped by datatrove's filters, which keeps the first few per reason.

    Args:
        folder: where `<step>-<rank>.json` goes when the step ends.
        step: the step's name.
        most: documents per reason.
    """

    def __init__(self, folder: str, step: str, most: int):
        self.folder, self.step, self.most = folder, step, most
        self.rows: list[dict[str, str]] = []
        self.counts: Counter[str] = Counter()
        self.rank = 0

    def __enter__(self) -> "Examples":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        # After an error the task runs again; on a full disk another error would be printed here.
        if self.rows and kind is None:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            path = Path(self.folder) / f"{self.step}-{self.rank:05d}.json"
            part = path.with_suffix(".part")
            part.write_text(json.dumps(self.rows), encoding="utf-8")
            # A killed run leaves it whole or not at all.
            os.replace(part, path)

    def write(self, document: Document, rank: int = 0) -> None:
        """Record a dropped document; its reason is in `metadata["filter_reason"]`."""
        reason = document.metadata.get("filter_reason", self.step)
        self.rank = rank
        self.counts[reason] += 1
        if self.counts[reason] <= self.most:
            text = " ".join(document.text[: 2 * EXCERPT].split())[:EXCERPT]
            self.rows.append({"step": self.step, "reason": reason, "document": document.id, "text": text})


def read_examples(folder: str | Path) -> list[dict[str, str]]:
    """Return all rows written to `folder`, ordered by step name and rank."""
    return [row for path in sorted(Path(folder).glob("*.json")) for row in json.loads(path.read_text("utf-8"))]


# ---- pipeline ----


SHARDS = "data"
SAME_GZIP = "gzip without a time"


@dataclass
class Stage:
    """One pipeline, its number of tasks, and the folders in which each task writes files named by its number."""

    name: str
    pipeline: list[PipelineStep]
    tasks: int
    folders: tuple[str, ...] = ()


def document_filters(options: CurationOptions, examples: Callable[[str], Examples | None]) -> list[BaseFilter]:
    """Return the filters for single documents, in order: cheap and strict ones first.

    Args:
        examples: function from a filter's name to the writer for examples of its drops.
    """
    kinds: dict[str, Callable[[], BaseFilter]] = {
        "length": lambda: LengthFilter(options.min_words),
        "language": lambda: LanguageFilter(options.languages, options.min_language_score),
        "gopher_quality": lambda: GopherQualityFilter(
            options.min_quality_words, options.max_quality_words, options.min_stop_words
        ),
        "gopher_repetition": lambda: GopherRepetitionFilter(),
        "c4_quality": lambda: C4QualityFilter(options.min_sentences, options.min_line_words),
        "spam": lambda: SpamFilter(_spam_model(options), options.max_spam_score),
        "toxicity": lambda: ToxicityFilter(read_phrases(options.toxic_words), options.max_toxic_matches),
        "decontamination": lambda: DecontaminationFilter(
            evaluation_texts(options.decontaminate), options.contamination_ngram
        ),
    }
    filters = [make() for name, make in kinds.items() if options.uses(name)]
    for step in filters:
        step.exclusion_writer = examples(step.name)
    return filters


def _spam_model(options: CurationOptions) -> SpamModel:
    return fit(*read_labeled(options.spam_train_file)) if options.spam_train_file else SpamModel()


def curation_stages(options: CurationOptions, folder: str | Path) -> list[Stage]:
    """Return all stages, to run one after the other.

    Args:
        folder: for intermediate files, and for the shards in `data`; all tasks need access to it.

    Raises:
        InputError: when the dataset or a filter's file cannot be read.
    """
    path = {name: str(Path(folder) / name) for name in ("left", "bands", "pairs", "marked", "sample", "examples")}
    inputs, config = find_inputs(options), minhash_config(options)

    def examples(step: str) -> Examples:
        return Examples(path["examples"], step, options.examples)

    exact, near = options.uses("exact_duplicates"), options.uses("near_duplicates")
    perplexity, dedup = options.uses("perplexity"), exact or near
    first: list[PipelineStep] = [DocumentReader(inputs, options, examples("read"))]
    first += document_filters(options, examples)
    first += [Sample(path["sample"], options.seed)] if perplexity else []
    first += [ShardWriter(path["left"])]
    first += [DuplicateSignature(path["bands"], config)] if dedup else []
    last: list[PipelineStep] = [LeftReader(path["left"])]
    last += [DuplicateFilter(path["marked"], "exact", examples("exact_duplicates"))] if exact else []
    last += [DuplicateFilter(path["marked"], "near", examples("near_duplicates"))] if near else []
    if perplexity:
        check_judge(options.perplexity_model)
        last += [PerplexityFilter(path["sample"], options.perplexity_model, examples("perplexity"))]
    last += [Tally(), shard_writer(str(Path(folder) / SHARDS), options.output_format)]
    stages = [Stage("filter", first, options.tasks, ("left", "bands", "sample"))]
    if dedup:
        bands = MinhashDedupBuckets(path["bands"], path["pairs"], config=config, lines_to_buffer=4096)
        stages += [Stage("bands", [bands], config.num_buckets, ("pairs",))]
        mark = MarkDuplicates(path["pairs"], path["marked"], config, exact, near)
        stages += [Stage("duplicates", [mark], 1, ("marked",))]
    if perplexity:
        stages += [Stage("perplexity", [FitPerplexity(path["sample"], path["marked"], options)], 1)]
    return [*stages, Stage("write", last, options.tasks, (SHARDS,))]


class ShardWriter(PipelineStep):
    """Writes the remaining documents of the first stage to `<task>.jsonl.gz`, and passes them on."""

    type = "💽 - WRITER"
    name = "left"

    def __init__(self, folder: str):
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        # Level 1: it is read once and removed.
        with gzip.open(Path(self.folder) / f"{rank:05d}.jsonl.gz", "wb", compresslevel=1) as stream:
            for doc in data:
                with self.track_time():
                    row = {"text": doc.text, "id": doc.id, SOURCE: doc.metadata[SOURCE]}
                    stream.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
                try:
                    yield doc
                except GeneratorExit:
                    # A later step has failed. On a full disk closing fails too, and its traceback would be printed.
                    with suppress(OSError):
                        stream.close()
                    raise


class LeftReader(PipelineStep):
    """Reads the documents written by `ShardWriter` in the same task, with each document's position."""

    type = "📖 - READER"
    name = "left_again"

    def __init__(self, folder: str):
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        with gzip.open(Path(self.folder) / f"{rank:05d}.jsonl.gz", "rb") as stream:
            for index, line in enumerate(stream):
                with self.track_time():
                    row = orjson.loads(line)
                yield Document(row["text"], row["id"], metadata={SOURCE: row[SOURCE], "place": index})


class Tally(PipelineStep):
    """Counts the kept documents, characters, UTF-8 bytes and words, most of them per source too."""

    type = "📊 - STATS"
    name = "kept"

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for doc in data:
            with self.track_time():
                size, words, source = len(doc.text.encode()), len(words_of(doc.text)), doc.metadata[SOURCE]
                self.stat_update("documents", f"{SOURCE}:{source}")
                self.stat_update("characters", value=len(doc.text))
                self.stat_update("bytes", f"bytes:{source}", value=size)
                self.stat_update("words", f"words:{source}", value=words)
            yield doc


def _same_gzip(file: BinaryIO, mode: str, **kwargs: object) -> gzip.GzipFile:
    """Open a gzip file without the time, with which the same text would have other bytes in every run."""
    return gzip.GzipFile(fileobj=file, mode=mode, mtime=0)


register_compression(SAME_GZIP, _same_gzip, (), force=True)


class GzipWriter(JsonlWriter):
    """datatrove's writer: as a class of this file it has `SAME_GZIP` registered in every writing process."""


def shard_writer(folder: str, output_format: str) -> JsonlWriter | ParquetWriter:
    """Return datatrove's writer for rows of `text`, `id` and `source`."""

    def row(self, document: Document) -> dict[str, str]:
        return {"text": document.text, "id": document.id, SOURCE: document.metadata[SOURCE]}

    if output_format == "parquet":
        return ParquetWriter(folder, "${rank}.parquet", adapter=row, max_file_size=-1)
    return GzipWriter(folder, "${rank}.jsonl.gz", compression=SAME_GZIP, adapter=row)


def new_pool(workers: int, begin: Callable[[], object] | None = None) -> Workers:
    """Return processes for tasks, each of which calls `begin` first."""
    return Workers(workers, multiprocess.get_context("spawn"), begin)


class QuietExecutor(LocalPipelineExecutor):
    """datatrove's local executor without its log lines: the recipe prints and reports instead.

    Its workers end with this process, and a killed one is an error: datatrove's go on, and it waits for ever.
    """

    def run(self, pool: Workers | None = None) -> None:
        """Run the unfinished tasks, in the pool or, if one runs at a time, in this process.

        Raises:
            WorkerEnded: when a worker was killed.
        """
        self.save_executor_as_json()
        tasks = self.get_incomplete_ranks()
        if self.workers == 1:
            for task in tasks:
                # Steps count the documents they have seen.
                deepcopy(self)._run_for_rank(task)
            return
        with nullcontext(pool) if pool else new_pool(self.workers) as workers:
            workers.run(self._run_for_rank, tasks)

    def _run_for_rank(self, *args, **kwargs):
        logger.disable("datatrove")
        return super()._run_for_rank(*args, **kwargs)


def run_stages(
    stages: list[Stage],
    folder: str | Path,
    workers: int,
    announce: Callable[[str], None] = print,
    begin: Callable[[], object] | None = None,
) -> None:
    """Run all stages on this machine. A stage's finished tasks in `folder` are not run again.

    Args:
        begin: the first call in each worker.

    Raises:
        MachineError: when a worker was killed.
    """
    logger.disable("datatrove")
    with new_pool(workers, begin) as pool:
        for stage in stages:
            announce(f"curate: {stage.name}")
            tasks, logs = stage.tasks, str(Path(folder) / "logs" / stage.name)
            executor = QuietExecutor(stage.pipeline, tasks=tasks, workers=min(workers, tasks), logging_dir=logs)
            _remove_unfinished(stage, folder, executor)
            try:
                executor.run(pool)
            except WorkerEnded as error:
                raise MachineError(
                    f"a worker of curation's stage {stage.name!r} has ended: {error}. Where memory was short, fewer "
                    "--workers need less; what has finished is kept, and the same command resumes"
                ) from None


def _remove_unfinished(stage: Stage, folder: str | Path, executor: QuietExecutor) -> None:
    """Remove the files of tasks begun by an earlier attempt.

    Each is made new, so that no process with the old one open writes into it.
    """
    unfinished = {f"{task:05d}" for task in executor.get_incomplete_ranks()}
    for name in stage.folders if unfinished else ():
        for file in (Path(folder) / name).rglob("*"):
            # The files of a single task bear other numbers.
            if file.is_file() and (stage.tasks == 1 or file.name[:5] in unfinished):
                file.unlink()


def read_statistics(stages: list[Stage], folder: str | Path) -> Iterator[tuple[str, float, dict[str, float]]]:
    """Yield (step, seconds, totals of its statistics) in pipeline order, summed over tasks."""
    for stage in stages:
        files = [Path(folder) / "logs" / stage.name / "stats" / f"{task:05d}.json" for task in range(stage.tasks)]
        by_task = [json.loads(path.read_text("utf-8")) for path in files]
        for index, step in enumerate(stage.pipeline):
            seconds, totals = 0.0, {}
            for steps in by_task:
                seconds += _total(steps[index]["time_stats"])
                for name, value in steps[index]["stats"].items():
                    totals[name] = totals.get(name, 0) + _total(value)
            yield step.name, totals.pop("seconds", seconds), totals


def _total(value: dict | float) -> float:
    return value["total"] if isinstance(value, dict) else value


# ---- reader ----
#
# The first step of the pipeline: documents from any input, and a counted reason for each unusable one.


SOURCE = "source"
NOTE = "note_"


class DocumentReader(PipelineStep):
    """Reads this task's share of the inputs: every n-th file, or every n-th document of other inputs.

    A document has `text`, `id` (`<input>:<place>`) and the input's name in `metadata["source"]`.

    Statistics: `total`, `forwarded` and `dropped` with a reason, as for filters; `source:<name>` for each input;
    `note_<reason>` for records other than documents and for remarks on how a document was read.
    """

    type = "📖 - READER"
    name = "read"

    def __init__(self, inputs: list[Input], options: CurationOptions, exclusion_writer: Examples | None = None):
        super().__init__()
        self.inputs, self.options, self.exclusion_writer = inputs, options, exclusion_writer

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        with self.exclusion_writer or Examples("", self.name, 0) as examples:
            yield from islice(self._read(examples, rank, world_size), self.options.max_samples)

    def _read(self, examples: Examples, rank: int, world_size: int) -> Iterator[Document]:
        files = [item for item in self.inputs if item.is_file]
        shares = [(item, read_documents(item, self.options)) for item in files[rank::world_size]]
        for item in self.inputs:
            if not item.is_file:
                shares.append((item, islice(self._elsewhere(item), rank, None, world_size)))
        for item, indices in shares:
            for index, text, reason in self._timed(indices):
                if reason and (text is not None or reason.startswith(NOT_A_DOCUMENT)):
                    self.stat_update(f"{NOTE}{reason}")
                    if text is None:
                        continue
                    reason = None
                self.stat_update(StatHints.total)
                reason = reason or unusable(text)
                document = Document(text or "", f"{item.name}:{index}", metadata={SOURCE: item.name})
                if reason is None:
                    self.stat_update(StatHints.forwarded, f"{SOURCE}:{item.name}")
                    self.update_doc_stats(document)
                    yield document
                else:
                    self.stat_update(StatHints.dropped, f"dropped_{reason}")
                    document.metadata["filter_reason"] = reason
                    document.text = document.text.encode(errors="replace").decode()
                    examples.write(document, rank)

    def _timed(self, items: Iterator[Item]) -> Iterator[Item]:
        while True:
            with self.track_time():
                item = next(items, None)
            if item is None:
                return
            yield item

    def _elsewhere(self, item: Input) -> Iterator[Item]:
        if item.kind == "pydoc":
            for name, text in pydoc_documents():
                yield name, text, None
            return
        from datasets import load_dataset

        rows = load_dataset(item.path, split=self.options.dataset_train_split, streaming=True)
        for number, row in enumerate(rows, 1):
            text = row.get(text_column(row, self.options.text_column))
            yield f"row {number}", *((text, None) if isinstance(text, str) else (None, "no_text"))


def unusable(text: str) -> str | None:
    """Return why a text cannot be a document, or `None`."""
    if "\0" in text:
        return "nul_bytes"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return "invalid_utf8"  # half of a surrogate pair, from a JSON escape or a damaged cell
    return None if text.strip() else "empty"
