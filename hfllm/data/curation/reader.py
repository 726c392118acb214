"""The first step of the pipeline: documents from any input, and a counted reason for each unusable one."""

from collections.abc import Iterator
from itertools import islice

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.typeshelper import StatHints

from hfllm.data.curation.examples import Examples
from hfllm.data.curation.files import Item, read_documents
from hfllm.data.curation.inputs import Input, text_column
from hfllm.data.curation.options import CurationOptions
from hfllm.data.curation.warc import NOT_A_DOCUMENT
from hfllm.data.pydoc_corpus import pydoc_documents

SOURCE = "source"
NOTE = "note_"


class DocumentReader(PipelineStep):
    """Reads this task's share of the inputs: every n-th file, or every n-th document of other inputs.

    A document has `text`, `id` (`<input>:<place>`) and the input's name in `metadata["source"]`.

    Statistics: `total`, `forwarded` and `dropped` with a reason, as for filters; `source:<name>` for each input;
    `note_<reason>` for records that are no documents and for remarks on how a document was read.
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
        for item, places in shares:
            for place, text, reason in self._timed(places):
                if reason and (text is not None or reason.startswith(NOT_A_DOCUMENT)):
                    self.stat_update(f"{NOTE}{reason}")
                    if text is None:
                        continue
                    reason = None
                self.stat_update(StatHints.total)
                reason = reason or unusable(text)
                document = Document(text or "", f"{item.name}:{place}", metadata={SOURCE: item.name})
                if reason is None:
                    self.stat_update(StatHints.forwarded, f"{SOURCE}:{item.name}")
                    self.update_doc_stats(document)
                    yield document
                else:
                    self.stat_update(StatHints.dropped, f"dropped_{reason}")
                    document.metadata["filter_reason"] = reason
                    document.text = document.text.encode(errors="replace").decode()
                    examples.write(document, rank)

    def _timed(self, places: Iterator[Item]) -> Iterator[Item]:
        while True:
            with self.track_time():
                item = next(places, None)
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
