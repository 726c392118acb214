"""Kill recipes at random moments, give the same command again at once, and compare with runs that nothing interrupted.

    python .ci/kills.py --kills 60 --seed 1 --folder /tmp/kills curate pretrain_launched

Each case is a recipe with tiny settings: of `kills.yaml`, or, where that has none of a recipe, what its own tests say
(`tests/recipes/killed.py`). Per kill one process is killed by SIGKILL at a moment that is drawn between the run's
begin and its usual end: the `main` one, a `worker` (any process that it has started) or the `launcher`. The command
that follows at once must end, with the bits of models and rows and the figures of the whole run, and leave no process.
The exit code is 1 if a kill made a difference that no message told of, a run hung, or a process was left.
"""

import argparse
import gzip
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), *(str(ROOT / folder) for folder in ("recipes", "tests", "tests/recipes"))]

import yaml  # noqa: E402
from killed import Files, Killed, killed_recipe  # noqa: E402
from processes import forget_the_tests, fork, import_what_runs_need  # noqa: E402
from tiny_stages import TINY, write_settings  # noqa: E402

from hfllm.runs.recipes import recipe_names  # noqa: E402

# A run's own variable, by which its processes are known.
MARK = "KILLED_RUN"
# What changes from run to run: times, and what is derived from them.
TIMES = re.compile(r"second|speedup|per_s\b|_ms\b|minutes|runtime|memory|_flos")
# Seconds: of a run that takes no time, and until what has lost its parent has ended.
LIMIT, GRACE = 60.0, 10.0


@dataclass(frozen=True)
class Case:
    """A recipe with tiny settings.

    Args:
        flags: without the output folder.
        kinds: which of its processes are killed.
        is_launched: whether `hfllm` launches several processes of it.
        told_by: the metric of report.json that counts lost workers, without which the run has gone on.
    """

    recipe: str
    flags: tuple[str, ...]
    kinds: tuple[str, ...] = ("main",)
    is_launched: bool = False
    told_by: str | None = None


def words(values: Mapping[str, object]) -> tuple[str, ...]:
    """The words of a command line for flags by name; those with several values are lists."""
    found: list[str] = []
    for name, value in values.items():
        found += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return tuple(found)


def listed(inputs: Path = Path("IN")) -> dict[str, dict]:
    """The entries of `kills.yaml` by their names, with the folder of what `make_inputs` makes in place of `IN`."""
    text = Path(__file__).with_suffix(".yaml").read_text().replace("IN/", f"{inputs}/")
    entries = yaml.safe_load(text)
    return {name: entry for name, entry in entries.items() if name != "shared"}


def described_by_tests() -> dict[str, Killed]:
    """The recipes without an entry of their own, by what their tests say."""
    others = {entry.get("recipe", name) for name, entry in listed().items()}
    described = {name: killed_recipe(name) for name in recipe_names() if name not in others}
    return {name: how for name, how in described.items() if isinstance(how, Killed)}


def cases(inputs: Path, described: Mapping[str, Killed]) -> dict[str, Case]:
    """Every case by its name.

    Args:
        inputs: folder of what `make_inputs` makes, where files that flags name are written too.
        described: by the recipes' own tests.
    """
    found = {}
    for name, entry in listed(inputs).items():
        flags = dict(entry["flags"])
        for stage, values in entry.get("configs", {}).items():
            path = inputs / f"{name}-{stage}.yaml"
            path.write_text(yaml.safe_dump(values))
            flags[f"{stage}_config"] = path
        kinds = tuple(entry.get("kinds", ("main",)))
        more = {each: entry[each] for each in ("is_launched", "told_by") if each in entry}
        found[name] = Case(entry.get("recipe", name), words(flags), kinds, **more)
    for name, how in described.items():
        folder = inputs / name
        folder.mkdir(exist_ok=True)
        found[name] = Case(name, tuple(how.flags(Files(write_settings(folder), inputs / "base", folder))))
    return found


# ---- what runs start from ----


def make_inputs(folder: Path) -> None:
    """Write the data, and make the models that recipes start from."""
    rng = random.Random(2)
    vocabulary = [f"w{number}" for number in range(900)]
    (folder / "crawl").mkdir(parents=True)
    texts = [" ".join(rng.choices(vocabulary, k=120)) for _ in range(900)]
    # Every eighth repeats an earlier one, half of them with a word more.
    texts = [
        text if number % 8 else texts[number // 2] + " more" * (number % 16 > 0) for number, text in enumerate(texts)
    ]
    for part in range(2):
        with gzip.open(folder / "crawl" / f"{part}.jsonl.gz", "wt", compresslevel=1) as stream:
            stream.writelines(json.dumps({"text": text}) + "\n" for text in texts[part::2])
    (folder / "book.txt").write_text("\n\n\n".join(texts[:80]))
    colors = ["red", "blue", "green", "black", "white", "brown", "pink", "one", "two", "three", "four", "five"]
    said = [{"text": f"Say {one} and {other}.", "words": (one, other)} for one in colors for other in colors[:6]]
    chats = [
        [
            {"role": "user", "content": row["text"]},
            {"role": "assistant", "content": " ".join(row["words"])},
        ]
        for row in said
    ]
    write_rows(folder / "rows.jsonl", [{"messages": chat} for chat in chats])
    for place, name in enumerate(("shop", "school", "farm")):
        write_rows(folder / f"{name}.jsonl", [{"messages": chat} for chat in chats[place : 24 + place : 3]])
    write_rows(folder / "prompts.jsonl", [{"prompt": row["text"]} for row in said[:12]])
    (folder / "mine.py").write_text(
        "def even(prompts, completions, **columns):\n"
        "    return [float(len(each[0]['content']) % 2 == 0) for each in completions]\n"
    )
    lines = ["N,D,loss"]
    for compute in (1e18, 1e19, 1e20, 1e21):
        for factor in (0.3, 0.5, 0.8, 1.2, 2.0, 3.3):
            size = 0.1 * compute**0.5 * factor
            tokens = compute / 6 / size
            lines.append(f"{size},{tokens},{1.8 + 480 / size**0.35 + 2000 / tokens**0.37 + rng.gauss(0, 1e-3)}")
    (folder / "runs.csv").write_text("\n".join(lines) + "\n")
    base = {**TINY["pretrain"], "world_tools": 0.1}
    tuned = {"num_examples": 60, "max_steps": 3, "save_strategy": "no", "learning_rate": 0.001}
    tuned |= {"model_name_or_path": folder / "base", "per_device_train_batch_size": 8}
    adapter = {**tuned, "lora_r": 4, "use_peft": "true"}
    for name, recipe, values in (("base", "pretrain", base), ("tuned", "sft", tuned), ("adapter", "sft", adapter)):
        run = Run(Case(recipe, words(values)), folder / name)
        assert run.wait(600) == 0, run.printed()[-2000:]


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- one run ----


class Run:
    """A run that has been started.

    Recipes run in forks of this process, which has imported what they need; what is launched starts as it would.
    """

    def __init__(self, case: Case, output_dir: Path):
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        self.mark = f"{time.monotonic_ns()}"
        self.log = output_dir.parent / f"{output_dir.name}-{self.mark}.log"
        self.log.touch()
        flags = [*case.flags, "--output_dir", str(output_dir)]
        environment = {MARK: self.mark, "COLUMNS": "80", "HF_HUB_OFFLINE": "1"}
        if case.is_launched:
            code = "import sys; from hfllm.runs.launcher import main; sys.exit(main())"
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(
                    [sys.executable, "-c", code, case.recipe, *flags],
                    env={**os.environ, **environment},
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                ).pid
        else:
            script = ROOT / "tests" / "recipes" / "kill_run.py"
            self.process = fork([str(script), "none", "0", case.recipe, *flags], environment, str(self.log))
            with suppress(OSError):
                os.setpgid(self.process, self.process)
        self.began, self.code = time.monotonic(), None

    def wait(self, seconds: float) -> int | None:
        """Its exit code, negative for a signal, or `None` if it still runs by then."""
        until = time.monotonic() + seconds
        while self.code is None and time.monotonic() < until:
            ended, status = os.waitpid(self.process, os.WNOHANG)
            if ended:
                self.code = os.waitstatus_to_exitcode(status)
            else:
                time.sleep(0.01)
        return self.code

    def printed(self) -> str:
        return self.log.read_text(errors="replace")

    def started(self) -> list[int]:
        """The other processes of this run that still run."""
        found = []
        for path in Path("/proc").iterdir():
            with suppress(OSError, ValueError, IndexError):
                state, _, group = (path / "stat").read_text().rpartition(")")[2].split()[:3]
                is_own = int(group) == self.process
                is_own |= f"{MARK}={self.mark}".encode() in (path / "environ").read_bytes().split(b"\0")
                if is_own and state not in "ZX" and int(path.name) != self.process:
                    found.append(int(path.name))
        return sorted(found)

    def left(self) -> list[int]:
        """The other processes of this run that still run some seconds after its end."""
        until = time.monotonic() + GRACE
        while (found := self.started()) and time.monotonic() < until:
            time.sleep(0.05)
        return found

    def kill(self) -> None:
        """Kill what is left of it."""
        for process in (*self.started(), *([self.process] if self.code is None else [])):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.wait(10)


def results(folder: Path) -> dict[str, object]:
    """What a run leaves that may not depend on its interruptions: bits of weights and rows, figures without times."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or any(part.startswith("checkpoint-") for part in path.parts):
            continue
        content = path.read_bytes()
        if path.name == "report.json":
            metrics = json.loads(content)["metrics"]
            found |= {f"{name}: {key}": value for key, value in metrics.items() if not TIMES.search(key)}
        elif path.suffix in (".safetensors", ".jsonl", ".gz", ".parquet", ".npy") or path.name == "tokenizer.json":
            content = gzip.decompress(content) if path.suffix == ".gz" else content
            found[name] = hashlib.sha256(content.replace(str(folder).encode(), b"OUT")).hexdigest()[:16]
    return found


def differences(ours: Mapping[str, object], theirs: Mapping[str, object]) -> list[str]:
    """The names of what differs."""
    return sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))


# ---- kills ----


@dataclass
class Judged:
    """A case, the results of a run that nothing interrupted, those of them that count for nothing, and its seconds."""

    case: Case
    whole: dict[str, object]
    random: frozenset[str]
    seconds: float
    folder: Path

    def kill(self, kind: str, rng: random.Random) -> tuple[str, str]:
        """Kill one process of a run and start it again; return what came of it, and more about that."""
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        limit = LIMIT + 15 * self.seconds
        run = Run(self.case, out)
        moment = rng.uniform(0, self.seconds)
        run.wait(moment)
        victim = run.process
        if kind == "worker":
            while run.wait(0.02) is None and not (workers := run.started()):
                pass
            victim = rng.choice(workers) if run.code is None else None
        if victim is None or run.code is not None:
            return "ended before", f"{moment:.1f} s"
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        about = f"{kind} at {moment:.1f} of {self.seconds:.1f} s"
        code = run.wait(limit)
        if code is None:
            run.kill()
            return "HANG", f"{about}: the run went on for {limit:.0f} s: {last_line(run)}"
        if kind == "worker" and code != 0 and "Traceback" in run.printed():
            about += ", with a traceback"
        if code != 0 or kind != "worker":
            outcome, more = self.again(out, limit)
        else:
            outcome, more = ("told", "") if self.is_told(out) else self.compare(out, "went on")
        if left := run.left():
            run.kill()
            return "ORPHANS", f"{about}: {len(left)} processes left; then {outcome}: {more}"
        return outcome, f"{about}, exit code {code}: {more}"

    def again(self, out: Path, limit: float) -> tuple[str, str]:
        run = Run(self.case, out)
        code = run.wait(limit)
        if code is None:
            run.kill()
            return "HANG", f"the same command again ran for {limit:.0f} s: {last_line(run)}"
        if left := run.left():
            run.kill()
            return "ORPHANS", f"of the command again: {len(left)}"
        return self.compare(out, "same") if code == 0 else ("refused", f"exit code {code}: {last_line(run)}")

    def is_told(self, out: Path) -> bool:
        """Return whether the report counts a lost worker, so that another result is no silent one."""
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        return bool(self.case.told_by and report["metrics"][self.case.told_by] > 0)

    def compare(self, out: Path, said: str) -> tuple[str, str]:
        names = [name for name in differences(results(out), self.whole) if name not in self.random]
        return ("DIFFERENCE", f"{len(names)} of {len(self.whole)}: {', '.join(names[:6])}") if names else (said, "")


def last_line(run: Run) -> str:
    """The last line that a run has printed, its error if it has one."""
    lines = [line for line in run.printed().splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"error: |\w*Error\b", line)]
    return (errors or lines or [""])[-1][:300]


def judged(name: str, case: Case, folder: Path, say: Callable[[str], None]) -> Judged | None:
    """Run a case twice without interruption; `None` if it fails. What differs between the two counts for nothing."""
    found, seconds = [], 0.0
    for place in ("whole", "twice"):
        run = Run(case, folder / place)
        if run.wait(1200) != 0:
            run.kill()
            say(f"{name}: fails without kills: {last_line(run)}")
            return None
        seconds = time.monotonic() - run.began
        found.append(results(folder / place))
    random_ones = frozenset(differences(*found))
    if random_ones:
        say(f"{name}: differ without kills, and are not compared: {', '.join(sorted(random_ones))}")
    assert found[0].keys() - random_ones, name
    return Judged(case, found[0], random_ones, seconds, folder)


def main() -> int:
    """Run the cases that are named, or all, and print what came of each kill."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="by default all")
    parser.add_argument("--kills", type=int, default=60, help="of each kind of process of each case")
    parser.add_argument("--kinds", nargs="*", help="main, worker, launcher: by default all that a case has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where runs go; by default a temporary folder, removed at the end")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = (arguments.folder or Path(tempfile.mkdtemp(prefix="kills-"))).resolve()
    import_what_runs_need()
    with suppress(ImportError):
        import datatrove.executor.local
        import datatrove.pipeline.dedup.minhash
        import datatrove.pipeline.writers  # noqa: F401
    described = described_by_tests()
    forget_the_tests()
    if not (folder / "inputs" / "adapter" / "report.json").exists():
        shutil.rmtree(folder / "inputs", ignore_errors=True)
        make_inputs(folder / "inputs")
    every = cases(folder / "inputs", described)
    unknown = set(arguments.cases) - every.keys()
    if unknown:
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(every)}")
    counts: Counter[tuple[str, str, str]] = Counter()
    for name in arguments.cases or every:
        shutil.rmtree(folder / name, ignore_errors=True)
        judge = judged(name, every[name], folder / name, lambda line: print(line, flush=True))
        if judge is None:
            counts[name, "", "FAILS"] += 1
            continue
        for kind in every[name].kinds:
            if arguments.kinds and kind not in arguments.kinds:
                continue
            for number in range(arguments.kills):
                outcome, more = judge.kill(kind, random.Random(f"{arguments.seed} {name} {kind} {number}"))
                counts[name, kind, outcome] += 1
                if outcome not in ("same", "ended before", "went on", "told"):
                    print(f"{name} {kind} {number}: {outcome}: {more}", flush=True)
            of_kind = {
                outcome: count for (case, each, outcome), count in counts.items() if (case, each) == (name, kind)
            }
            print(f"{name} {kind}: {of_kind}", flush=True)
    if not arguments.folder:
        shutil.rmtree(folder, ignore_errors=True)
    return int(any(outcome.isupper() for _, _, outcome in counts))


if __name__ == "__main__":
    sys.exit(main())
