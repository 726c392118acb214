"""Plant known faults, one at a time, and say which of them no test catches. Usage: faults.py [NAME ...] [--jobs 2]

`faults.yaml` beside this file lists them: each replaces one piece of text in one file, in a copy of the checkout, and
names the test files that should notice. A fault is caught when a test fails; a file that cannot be imported, or whose
tests fail without any fault, proves nothing and counts as missed. Takes about half an hour on two cores.
"""

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import yaml

ROOT = Path(__file__).resolve().parent.parent
LIST = Path(__file__).with_suffix(".yaml")
# Seconds that the tests of one fault may take: some faults make a loop endless.
LIMIT = 900
TESTS_FAILED = 1
SECONDS = itertools.count(1)


@dataclass(frozen=True)
class Fault:
    """A text of one file that is replaced.

    Args:
        name: what goes wrong, in a few words.
        file: from the root of the repository.
        old: occurs exactly once in the file.
        new: replaces it.
        tests: files or folders of tests, one of which should fail.
        slow: whether those that are marked slow run too.
    """

    name: str
    file: str
    old: str
    new: str
    tests: list[str]
    slow: bool = False

    def problem(self, root: Path = ROOT) -> str | None:
        """Return why it cannot be planted, `None` if it can."""
        path = root / self.file
        if not path.is_file():
            return f"there is no file {self.file}"
        count = path.read_text(encoding="utf-8").count(self.old)
        if count != 1:
            return f"its text occurs {count} times in {self.file}"
        missing = [test for test in self.tests if not (root / test).exists()]
        return f"there are no tests {', '.join(missing)}" if missing or not self.tests else None


def read_faults(path: Path = LIST) -> list[Fault]:
    """Return all faults of the list."""
    return [Fault(**row) for row in yaml.safe_load(path.read_text(encoding="utf-8"))]


def passes(tree: Path, tests: list[str], slow: bool) -> tuple[int, str]:
    """Run tests in a copy of the checkout; return pytest's exit status, -1 at the limit of time, and its last line."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    settings = {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    try:
        run = subprocess.run(
            [*command, *(["-m", "slow or not slow"] if slow else [])],
            cwd=tree,
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired:
        return -1, f"no end within {LIMIT} seconds"
    lines = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return run.returncode, (lines or run.stdout.splitlines() or [""])[-1]


def verdict(tree: Path, fault: Fault) -> tuple[bool, str]:
    """Plant a fault in a copy of the checkout and run its tests. Return whether a test failed, and which."""
    path = tree / fault.file
    text, times = path.read_text(encoding="utf-8"), path.stat()
    path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    # Python knows what it compiled by a file's size and second: each fault has a second of its own.
    os.utime(path, (times.st_atime, times.st_mtime + next(SECONDS)))
    try:
        status, line = passes(tree, fault.tests, fault.slow)
    finally:
        path.write_text(text, encoding="utf-8")
        os.utime(path, (times.st_atime, times.st_mtime))
    return status == TESTS_FAILED, line


def copies(folder: str, count: int) -> "SimpleQueue[Path]":
    """Return copies of all files that git tracks, as they are now."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True)
    queue: SimpleQueue[Path] = SimpleQueue()
    for index in range(count):
        tree = Path(folder, f"copy{index}")
        for name in listed.stdout.splitlines():
            if (ROOT / name).is_file():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, tree / name)
        queue.put(tree)
    return queue


def main() -> int:
    """Run the faults that the command line names, by default all; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="faults whose names contain one of these; by default all")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time")
    arguments = parser.parse_args()
    faults = [
        fault for fault in read_faults() if not arguments.names or any(name in fault.name for name in arguments.names)
    ]
    if problems := [f"{fault.name}: {problem}" for fault in faults if (problem := fault.problem())]:
        print("\n".join(problems), file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        trees = copies(folder, arguments.jobs)

        def in_a_copy(work, *given):
            tree = trees.get()
            try:
                return work(tree, *given)
            finally:
                trees.put(tree)

        sound = sorted({(tuple(fault.tests), fault.slow) for fault in faults})
        results = pool.map(lambda each: in_a_copy(passes, list(each[0]), each[1]), sound)
        broken = {each: line for each, (status, line) in zip(sound, results, strict=True) if status}
        for (tests, _), line in broken.items():
            print(f"fails without a fault: {' '.join(tests)}: {line}")
        caught = 0
        verdicts = pool.map(lambda each: in_a_copy(verdict, each), faults)
        for fault, (is_caught, line) in zip(faults, verdicts, strict=True):
            is_caught = is_caught and (tuple(fault.tests), fault.slow) not in broken
            caught += is_caught
            print(f"{'caught' if is_caught else 'MISSED'}  {fault.name}: {line}", flush=True)
    print(f"{caught} passed, {len(faults) - caught} failed")
    return 0 if caught == len(faults) else 1


if __name__ == "__main__":
    sys.exit(main())
