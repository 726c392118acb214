"""One GPU in ten minutes: speed, memory, exactness, and a model from nothing to PPO. No network, no files needed.

    python benchmarks/gpu.py --output_dir gpu                             # every section, about ten minutes
    python benchmarks/gpu.py --output_dir gpu --sections training decoding
    python benchmarks/gpu.py --output_dir gpu --device cpu --tiny         # whether all of it runs, in half a minute

Each section stands alone. Its figures are printed as they come and written at once to `results.json` and `results.md`,
so a run that is cut off leaves what it had. A section that fails is reported, the others go on, and the exit code is
then 1; sections that `--minutes` leaves no time to begin are listed. The sections are in gpu_sections.py and
gpu_chain.py; what is compared in one section alternates in the same process.
"""

import argparse
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path


class Results:
    """Figures, printed as they come and kept on disk: a JSON list, and a Markdown table.

    Args:
        folder: where `results.json` and `results.md` go; earlier ones are overwritten.
    """

    def __init__(self, folder: Path):
        self.folder, self.rows, self.section = folder, [], ""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.md").write_text("| section | what | value | unit |\n| - | - | - | - |\n", encoding="utf-8")

    def add(self, what: str, value: float | str, unit: str = "") -> None:
        """Add a figure of the current section.

        Raises:
            ValueError: for a number that is not finite.
        """
        if not isinstance(value, str) and not math.isfinite(value):
            raise ValueError(f"{what} is {value}")
        self.rows.append({"section": self.section, "what": what, "value": value, "unit": unit})
        draft = self.folder / "results.json.draft"
        draft.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")
        draft.replace(self.folder / "results.json")
        shown = value if isinstance(value, str) else f"{value:.4g}"
        with (self.folder / "results.md").open("a", encoding="utf-8") as file:
            file.write(f"| {self.section} | {what} | {shown} | {unit} |\n")
        print(f"{self.section}: {what}: {shown} {unit}".rstrip(), flush=True)


def run_sections(
    sections: Sequence[tuple[str, Callable[[], None]]], results: Results, minutes: float
) -> tuple[list[str], list[str]]:
    """Run sections one after the other.

    Returns:
        The names of those that failed, and of those that there was no time to begin.
    """
    began, failed, skipped = time.perf_counter(), [], []
    for name, section in sections:
        results.section, started = name, time.perf_counter()
        if started - began > minutes * 60:
            skipped.append(name)
            results.add("not run", f"{minutes:g} minutes are over")
            continue
        try:
            section()
        except (Exception, SystemExit) as error:
            failed.append(name)
            traceback.print_exc()
            results.add("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        results.add("time", time.perf_counter() - started, "s")
    return failed, skipped


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections. Returns the exit code: 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="Such as cuda or cpu; by default the accelerator, else the CPU.")
    parser.add_argument("--tiny", action="store_true", help="Sizes that show only whether everything runs.")
    parser.add_argument("--sections", nargs="+", help="Only these.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/gpu"))
    parser.add_argument("--minutes", type=float, default=10, help="Begin no section after this time.")
    args = parser.parse_args(argv)

    from gpu_parts import Bench
    from gpu_sections import SECTIONS

    names = args.sections or list(SECTIONS)
    if unknown := sorted(set(names) - set(SECTIONS)):
        parser.error(f"--sections {unknown[0]!r} is not one of {', '.join(SECTIONS)}")
    results = Results(args.output_dir)
    bench = Bench(args.device, args.tiny, args.output_dir, results.add)
    chosen = [(name, lambda section=SECTIONS[name]: section(bench)) for name in names]
    failed, skipped = run_sections(chosen, results, args.minutes)
    print(f"\n{args.output_dir}/results.md and results.json: {len(results.rows)} figures of {len(names)} sections")
    for kind, which in (("failed", failed), ("not run", skipped)):
        if which:
            print(f"{kind}: {', '.join(which)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
