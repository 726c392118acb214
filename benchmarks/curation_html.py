"""Text of web pages against labels: token F1, precision, recall and time per page of each extractor.

    python benchmarks/curation_html.py --labeled_pages reader.jsonl articles.jsonl --output ...

Each file of --labeled_pages has rows with `html` and `text`; the pages written for the tests are measured besides. A
token is a run of letters or digits without case, counted as often as it occurs; figures are means over pages, and MB/s
are of the HTML per CPU-second.
"""

import argparse
import json
import re
import sys
import time
from collections import Counter
from pathlib import Path

from hfllm.data.curation.options import HTML_EXTRACTORS
from hfllm.data.curation.text import html_to_text
from hfllm.outputs.report import markdown_table, write_atomically

TESTS = Path(__file__).parent.parent / "tests" / "data"


def scores(found: str, expected: str) -> tuple[float, float, float]:
    """Return F1, precision and recall of the tokens."""
    found_tokens, expected_tokens = (Counter(re.findall(r"\w+", text.lower())) for text in (found, expected))
    both = sum((found_tokens & expected_tokens).values())
    precision, recall = both / max(1, sum(found_tokens.values())), both / max(1, sum(expected_tokens.values()))
    return 2 * precision * recall / max(1e-9, precision + recall), precision, recall


def measure(name: str, pages: list[tuple[str, str]]) -> list[dict[str, object]]:
    rows = []
    for extractor in HTML_EXTRACTORS:
        html_to_text(pages[0][0], extractor)  # its imports
        began = time.process_time()
        found = [html_to_text(html, extractor) for html, _ in pages]
        seconds, texts = time.process_time() - began, [text for text, _ in found]
        each = [scores(found, expected) for found, (_, expected) in zip(texts, pages, strict=True)]
        means = [sum(column) / len(pages) for column in zip(*each, strict=True)]
        rows.append({"pages": name, "number": len(pages), "--html_extractor": extractor})
        rows[-1].update({key: f"{mean:.3f}" for key, mean in zip(("F1", "precision", "recall"), means, strict=True)})
        rows[-1].update({"lowest F1": f"{min(each)[0]:.2f}", "ms per page": f"{1000 * seconds / len(pages):.1f}"})
        rows[-1]["MB/s"] = f"{sum(len(html.encode('utf-8', 'replace')) for html, _ in pages) / 1e6 / seconds:.1f}"
        rows[-1]["pages by it"] = sum(how == extractor for _, how in found)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labeled_pages", type=Path, nargs="*", default=[])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    from html_pages import PAGES

    rows = []
    for path in arguments.labeled_pages:
        labeled = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        rows += measure(path.stem, [(row["html"], row["text"]) for row in labeled])
    rows += measure("written for the tests", list(PAGES.values()))
    lines = ["# Text of web pages", "", *markdown_table(rows), ""]
    print("\n".join(lines))
    if arguments.output:
        write_atomically(arguments.output, "\n".join(lines))


if __name__ == "__main__":
    main()
