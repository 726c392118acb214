"""Speed and memory of curation: documents per second and core, each step's share, peak memory from 1 MB to 1 GB.

    OMP_NUM_THREADS=1 python benchmarks/curation.py --megabytes 1 10 100 --output benchmarks/results/curation.md

Input is generated from a seed: documents of about 1.5 kB from sentences of this Python's documentation, in a new order
each, mixed with too short ones, advertisements, other languages, exact and near copies. All filters run, with a
word list and gsm8k-sized evaluation texts. Each size runs in a fresh process with one worker; memory is its largest
resident size, speed is documents read over the CPU-seconds of all steps.
"""

import argparse
import json
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hfllm.data.curation.options import FILTERS, CurationOptions
from hfllm.data.curation.pipeline import curation_stages, read_statistics, run_stages
from hfllm.data.sources import pydoc_documents
from hfllm.outputs.report import markdown_table, write_atomically

FOREIGN = (
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren. ",
    "Tous les êtres humains naissent libres et égaux en dignité et en droits. ",
    "Todos los seres humanos nacen libres e iguales en dignidad y derechos. ",
)
SPAM = "WINNER!! You have won a free prize, call 08001234567 now to claim. Text STOP to 80086. "


def sentences() -> list[str]:
    found = set()
    for _, text in pydoc_documents():
        for sentence in re.split(r"(?<=[.?!])\s+", " ".join(text.split())):
            if re.fullmatch(r"[A-Z][\w ,;'()-]+[.?!]", sentence) and 6 <= len(sentence.split()) <= 40:
                found.add(sentence)
    return sorted(found)


def generate(path: Path, megabytes: float, seed: int = 0) -> int:
    """Write jsonl of about this size. Return the number of documents."""
    pool, rng, size, count, recent = sentences(), random.Random(seed), 0, 0, []
    with path.open("w", encoding="utf-8") as stream:
        while size < megabytes * 1e6:
            kind = rng.random()
            if kind < 0.05:
                text = rng.choice(pool)[:40]
            elif kind < 0.10:
                text = SPAM * rng.randint(1, 3)
            elif kind < 0.15:
                text = rng.choice(FOREIGN) * 8
            elif kind < 0.25 and recent:
                text = rng.choice(recent)
                text += " " + rng.choice(pool) if kind < 0.20 else ""
            else:
                lines = [" ".join(rng.choices(pool, k=3)) for _ in range(rng.randint(3, 9))]
                text = "\n".join(lines)
                recent = [*recent[-50:], text]
            line = json.dumps({"text": text}) + "\n"
            size, count = size + len(line), count + 1
            stream.write(line)
    return count


def measure(path: str, filters: list[str]) -> dict:
    """Curate one file in this process."""
    with tempfile.TemporaryDirectory() as folder:
        words, tests = Path(folder) / "words.txt", Path(folder) / "tests.jsonl"
        words.write_text("\n".join(f"badword{index}" for index in range(400)))
        rng = random.Random(1)
        with tests.open("w") as stream:
            for _ in range(7500):
                stream.write(json.dumps({"text": " ".join(f"w{rng.randrange(9999)}" for _ in range(100))}) + "\n")
        lists = {"toxic_words": [str(words)], "decontaminate": [str(tests)]}
        options = CurationOptions(dataset_name=path, filters=filters, **lists)
        began, cpu = time.perf_counter(), time.process_time()
        stages = curation_stages(options, folder)
        set_up = time.process_time() - cpu
        run_stages(stages, folder, 1, lambda line: None)
        return {
            "wall": time.perf_counter() - began,
            "cpu": time.process_time() - cpu - set_up,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "steps": [[step, seconds, totals] for step, seconds, totals in read_statistics(stages, folder)],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[1, 10, 100])
    parser.add_argument("--filters", nargs="+", default=list(FILTERS))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--measure", help="(used by the script itself) curate this file and print figures as JSON")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.filters)))
        return
    sizes, shares = [], []
    for megabytes in arguments.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "input.jsonl"
            count = generate(path, megabytes)
            command = [sys.executable, __file__, "--measure", str(path), "--filters", *arguments.filters]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        kept = next(totals["documents"] for step, _, totals in found["steps"] if step == "kept")
        sizes.append(
            {
                "input, MB": f"{megabytes:g}",
                "documents": count,
                "kept": int(kept),
                "CPU-seconds": f"{found['cpu']:.1f}",
                "documents/s a core": f"{count / found['cpu']:.0f}",
                "MB/s a core": f"{megabytes / found['cpu']:.2f}",
                "peak memory, MB": f"{found['peak_mb']:.0f}",
            }
        )
        print(sizes[-1], flush=True)
        work = sum(seconds for _, seconds, _ in found["steps"])
        shares = [
            {
                "step": step.split(" ", 1)[-1],
                "documents in": int(totals.get("total", totals.get("documents", 0))) or "",
                "dropped": int(totals.get("dropped", 0)) or "",
                "seconds": f"{seconds:.2f}",
                "share": f"{seconds / work:.1%}",
            }
            for step, seconds, totals in found["steps"]
        ]
    given = " ".join(f"{megabytes:g}" for megabytes in arguments.megabytes)
    lines = [
        "# Speed and memory of curation",
        "",
        f"`OMP_NUM_THREADS=1 python benchmarks/curation.py --megabytes {given} "
        "--output ...`: one worker on a machine of two cores that other work shared, Python 3.11, datatrove 0.10. "
        "Generated input, all filters; 75% of the documents are ordinary, the rest meant to be dropped.",
        "",
        *markdown_table(sizes),
        "",
        f"Where the time goes at {arguments.megabytes[-1]:g} MB (`seconds` are those inside each step):",
        "",
        *markdown_table(shares),
        "",
    ]
    print("\n".join(lines))
    if arguments.output:
        write_atomically(arguments.output, "\n".join(lines))


if __name__ == "__main__":
    main()
