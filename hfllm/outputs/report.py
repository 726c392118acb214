"""The report of a recipe: report.json, report.md and plots, and how a run's flags are shown in them."""

import json
import os
import platform
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm import durable
from hfllm.outputs.figures import changes, figure_tables
from hfllm.outputs.verdict import Promise, Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# ---- report ----


REPORT_FILE = "report.json"
# What a run read of its data, and what not: see `hfllm.data.receipt`.
RECEIPT_FILE = "data_receipt.json"
# In the metadata of our plots, to distinguish them from another program's.
PLOTTED_BY = "hfllm, by matplotlib"
PRINTED_SAMPLES = 3
# Maximum number of columns of a heat map with readable values in its cells.
MOST_WRITTEN = 16
# Nested lists and objects in report.json.
MOST_NESTED = 50
# More figures than these are folded below their tables made by the stage.
MOST_FIGURES = 60


@dataclass
class Report:
    """The result of one stage.

    Args:
        stage: the stage's name.
        arguments: the flags of its run.
        metrics: numbers by stable names (documented in docs/). Numbers with an error or a count, see
            `hfllm.outputs.report`, become tables; without any the numbers are shown as they are.
        tables: title -> rows, each a mapping of column to value. Rows whose first column is `prompt` are samples.
        curves: plot file stem -> its `Plot`, `Bars` or `Heatmap`; `loss` is shown last.
        artifacts: saved files, name -> path relative to the output folder.
        wall_seconds: how long the stage took.
        next_steps: lines of code to load or try the result.
        summary: the result, in a sentence or two.
        given: the user's flags; `None` if unknown.
        parents: its starting model and the models it learned from, see `hfllm.outputs.card`.
        warnings: a line per absent capability among the stage's promises.
        verdict: whether it did what it is for; `None` of a stage that measures nothing.
        data: what was read of its datasets, and what not.
    """

    stage: str
    arguments: Mapping[str, Any]
    metrics: dict[str, float]
    tables: dict[str, list[Mapping[str, Any]]] = field(default_factory=dict)
    curves: dict[str, "Plot | Bars | Heatmap"] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)
    wall_seconds: float = 0.0
    next_steps: Sequence[str] = ()
    summary: str = ""
    given: Mapping[str, Any] | None = None
    parents: Sequence[Mapping[str, Any]] = ()
    warnings: Sequence[str] = ()
    verdict: Verdict | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = field(default=None, init=False)

    def write(self, output_dir: str | Path) -> None:
        """Write report.json, report.md and the plots into `output_dir`, each file atomically."""
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for stem, plot in self.curves.items():
            if plot.draw(folder / f"{stem}.png"):
                self.artifacts[stem] = f"{stem}.png"
        # A resumed run may have read nothing again.
        if self.data:
            write_atomically(folder / RECEIPT_FILE, json.dumps(self.data, indent=2) + "\n")
        write_atomically(folder / "report.md", self.markdown())
        write_atomically(folder / REPORT_FILE, json.dumps(self.as_dict(), indent=2, default=str) + "\n")
        self.folder = folder

    def as_dict(self) -> dict[str, Any]:
        from hfllm.version import __version__

        return {
            "stage": self.stage,
            "hfllm_version": __version__,
            "summary": self.summary,
            "warnings": list(self.warnings),
            "verdict": None if self.verdict is None else self.verdict.as_dict(),
            "arguments": dict(self.arguments),
            "given": None if self.given is None else dict(self.given),
            "parents": [dict(parent) for parent in self.parents],
            "metrics": self.metrics,
            "artifacts": self.artifacts,
            "wall_seconds": round(self.wall_seconds, 1),
            "environment": environment(),
        }

    def markdown(self) -> str:
        """Return report.md: the changes, the figures, curves and samples; the loss and the folded parts last."""
        sentence = "" if self.verdict is None else self.verdict.sentence
        verdict = [f"**Verdict: {sentence}.**"] if sentence else []
        parts = [f"# {self.stage}", *verdict, *([self.summary] if self.summary else [])]
        parts += warnings_markdown(self.warnings)
        parts += [f"{self.wall_seconds:.0f} seconds."]
        parts += figures_markdown(self.metrics)
        plots = {stem: f"![{plot.title}]({stem}.png)" for stem, plot in self.curves.items() if stem in self.artifacts}
        parts += [plot for stem, plot in plots.items() if stem != "loss"]
        for title, rows in self.tables.items():
            parts += [f"## {title}", "\n".join(markdown_table(sample_rows(rows) if is_samples(rows) else rows))]
        parts += [plots["loss"]] if "loss" in plots else []
        following = self.verdict.next_command if self.verdict else ""
        if self.next_steps or following:
            parts += ["## Next"]
        # Python to load it, and a command of the shell.
        parts += ["\n".join(["```", *self.next_steps, "```"])] if self.next_steps else []
        parts += [f"```bash\n{following}\n```"] if following else []
        return "\n\n".join([*parts, *flag_sections(self.arguments, self.given)]) + "\n"

    def print(self, without: Sequence[str] = ()) -> None:
        """Print the summary, the figures, the tables except the titles in `without`, and the paths of the files.

        The first `PRINTED_SAMPLES` of the samples are printed, each below its prompt.
        """
        print(f"\n{self.stage}: done in {self.wall_seconds:.0f} s")
        if self.summary:
            print(self.summary)
        for table in figure_tables(self.metrics) or [metric_rows(self.metrics)]:
            print("\n" + "\n".join(markdown_table(table)))
        for title, rows in self.tables.items():
            if title in without:
                continue
            print(f"\n{title}")
            print("\n".join(printed_samples(rows) if is_samples(rows) else markdown_table(rows)))
        self.print_files()

    def print_files(self) -> None:
        """Print the output folder with its files, and the next steps."""
        if self.folder is not None:
            names = [
                "report.md",
                REPORT_FILE,
                *([RECEIPT_FILE] if self.data else []),
                *(name for name in self.artifacts.values() if name != "."),
            ]
            names = [*(["the model", "README.md (its card)"] if self.artifacts.get("model") == "." else []), *names]
            print(f"\nIn {self.folder}: {', '.join(dict.fromkeys(names))}", flush=True)
        if self.next_steps:
            print("\n" + "\n".join(self.next_steps), flush=True)


@dataclass
class Plot:
    """A plot: `lines` maps a label to its x and y values, joined unless `points_only`.

    `points` are never joined, and have the colors of the lines, in order; `xscale` and `yscale` are `"linear"` or
    `"log"`; `xticks` names positions on the x-axis in place of numbers; `is_share` means y from 0 to 1.
    """

    title: str
    xlabel: str
    ylabel: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    points_only: bool = False
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)
    xscale: str = "linear"
    yscale: str = "linear"
    xticks: Mapping[float, str] = field(default_factory=dict)
    is_share: bool = False

    def draw(self, path: Path) -> bool:
        """Draw to a PNG; return False, and draw nothing, if no line has a point."""
        lines = {label: (x, y) for label, (x, y) in self.lines.items() if len(x)}
        points = {label: (x, y) for label, (x, y) in self.points.items() if len(x)}
        if not lines and not points:
            return False
        figure, axes = new_figure(4.2)
        for label, (x, y) in lines.items():
            marker = "o" if self.points_only or len(x) < 40 else None
            axes.plot(x, y, label=label, linewidth=0 if self.points_only else 1.6, marker=marker, markersize=3)
        axes.set_prop_cycle(None)
        for label, (x, y) in points.items():
            axes.plot(x, y, label=label, linewidth=0, marker="o", markersize=4)
        axes.set(title=self.title, xlabel=self.xlabel, ylabel=self.ylabel, xscale=self.xscale, yscale=self.yscale)
        if self.xticks:
            axes.set_xticks(list(self.xticks), list(self.xticks.values()))
        if self.is_share:
            axes.set_ylim(-0.03, 1.03)
        axes.grid(alpha=0.3)
        if len(lines) + len(points) > 1:
            axes.legend()
        save_figure(figure, path)
        return True


@dataclass(frozen=True)
class Found:
    """The report contents of a recipe for evaluating several models.

    Args:
        metrics: figures by their names in report.json.
        summary: a sentence or two.
        tables: rows by title.
        plots: by the names of their files.
        promises: requirements on the figures; else the run ends with a warning.
        claims: what the verdict is about; by default the promises.
        verdict: of a recipe that compares models.
    """

    metrics: dict[str, float]
    summary: str
    tables: Mapping[str, Sequence[Mapping[str, Any]]]
    plots: "Mapping[str, Plot | Bars | Heatmap]"
    promises: Sequence[Promise] = ()
    claims: Sequence[Promise] = ()
    verdict: Verdict | None = None


@dataclass
class Bars:
    """Horizontal bars from the top down: `values` maps a label to its length, `notes` to a text at its end."""

    title: str
    xlabel: str
    values: Mapping[str, float]
    notes: Mapping[str, str] = field(default_factory=dict)

    def draw(self, path: Path) -> bool:
        """Draw to a PNG; return False, and draw nothing, if there is no bar."""
        if not self.values:
            return False
        figure, axes = new_figure(1.2 + 0.34 * len(self.values))
        bars = axes.barh(list(self.values), list(self.values.values()), color="tab:blue")
        axes.bar_label(bars, [self.notes.get(label, "") for label in self.values], padding=4, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.25)
        axes.set(title=self.title, xlabel=self.xlabel)
        axes.grid(alpha=0.3, axis="x")
        axes.set_axisbelow(True)
        save_figure(figure, path)
        return True


@dataclass
class Heatmap:
    """A table of numbers as colors: `values` has one row per entry of `rows`, one value per entry of `columns`.

    A value that is not a number is left blank. `lowest` and `highest` are the ends of the scale, by default the
    values' range; with up to `MOST_WRITTEN` columns the values are written too.
    """

    title: str
    xlabel: str
    ylabel: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]
    lowest: float | None = None
    highest: float | None = None

    def draw(self, path: Path) -> bool:
        """Draw to a PNG; return False, and draw nothing, if there is no row or no column."""
        if not self.rows or not self.columns:
            return False
        figure, axes = new_figure(1.6 + 0.3 * len(self.rows))
        image = axes.imshow(self.values, aspect="auto", cmap="viridis", vmin=self.lowest, vmax=self.highest)
        is_long = max(map(len, self.columns)) > 3
        axes.set_xticks(range(len(self.columns)), self.columns, rotation=60 if is_long else 0, fontsize=8)
        axes.set_yticks(range(len(self.rows)), self.rows, fontsize=8)
        axes.set(title=self.title, xlabel=self.xlabel, ylabel=self.ylabel)
        if len(self.columns) <= MOST_WRITTEN:
            middle = sum(image.get_clim()) / 2
            for y, row in enumerate(self.values):
                for x, value in enumerate(row):
                    text = "" if value != value else f"{value:.2f}"
                    axes.text(x, y, text, ha="center", va="center", fontsize=7, color="wk"[int(value > middle)])
        figure.colorbar(image)
        save_figure(figure, path)
        return True


def new_figure(height: float) -> "tuple[Figure, Axes]":
    """Return a figure of 7 by `height` inches and its axes, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(7, height), dpi=120)


def save_figure(figure: "Figure", path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, metadata={"Software": PLOTTED_BY})
    pyplot.close(figure)
    os.replace(temporary, path)


def plot_history(
    history: Sequence[Mapping[str, float]], keys: Mapping[str, str], x: str = "step", **labels: str
) -> Plot:
    """Return a `Plot` of `Trainer.state.log_history` over the logged `x`; `keys` maps labels to logged names."""
    lines = {}
    for label, key in keys.items():
        # One value per step: an evaluation at the start is repeated when a run is resumed.
        points = {entry["step"]: (entry[x], entry[key]) for entry in history if key in entry}
        lines[label] = ([index for index, _ in points.values()], [value for _, value in points.values()])
    return Plot(lines=lines, **labels)


def read_report(output_dir: str | Path) -> dict[str, Any] | None:
    """Read the report.json of a finished run; `None` if there is none, or another program's."""
    try:
        report = json.loads((Path(output_dir) / REPORT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return report if _is_ours(report) and not _is_deep(report) else None


def _is_deep(value: object) -> bool:
    """Return whether JSON is nested deeper than any report: writing it again would fill Python's stack."""
    level = [value]
    for _ in range(MOST_NESTED):
        inside = (each.values() if isinstance(each, dict) else each for each in level)
        level = [item for items in inside for item in items if isinstance(item, dict | list)]
    return bool(level)


def _is_ours(report: object) -> bool:
    """Return whether a report has the parts of ours, each of its kind: a damaged one may be JSON still."""
    if not isinstance(report, dict) or not isinstance(report.get("stage"), str):
        return False
    kinds = {"arguments": dict, "metrics": dict, "artifacts": dict, "environment": dict}
    kinds |= {"parents": list, "warnings": list, "verdict": dict}
    optional = {"given": dict, "summary": str, "wall_seconds": int | float}
    needed = isinstance(report.get("arguments"), dict)
    others = {name: kind for name, kind in (kinds | optional).items() if report.get(name) is not None}
    return needed and all(isinstance(report[name], kind) for name, kind in others.items())


def environment() -> dict[str, str | int | None]:
    """Return the versions and hardware with an influence on results."""
    from importlib.metadata import version

    libraries = ("torch", "transformers", "trl", "accelerate")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        **{library: version(library) for library in libraries},
    }


def metric_rows(metrics: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return metrics as the rows of a table."""
    return [{"metric": name, "value": value} for name, value in metrics.items()]


def figures_markdown(metrics: Mapping[str, float]) -> list[str]:
    """Return metrics as Markdown: metrics with an error as tables, and all of them folded below; or just all."""
    tables = figure_tables(metrics)
    everything = "\n".join(markdown_table(metric_rows(metrics)))
    if not tables:
        is_short = len(metrics) <= MOST_FIGURES
        return [everything if is_short else folded("All figures by their names in report.json", everything)]
    sections = ["\n".join(markdown_table(table)) for table in tables]
    if changes(metrics):
        sections.append("Noise: less than two standard errors of the paired difference, on the same prompts or rows.")
    return [*sections, folded("All figures by their names in report.json", everything)]


def warnings_markdown(warnings: Sequence[object]) -> list[str]:
    """Return one paragraph per warning of a report."""
    return [f"**Warning:** {line}" for line in warnings]


def is_samples(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a table holds prompts with models' answers."""
    return bool(rows) and next(iter(rows[0])) == "prompt"


def sample_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return samples for a Markdown table: long ones shortened, and without tags interpreted by a page."""
    return [{key: _cut(value, 500).replace("<", "&lt;") for key, value in row.items()} for row in rows]


def printed_samples(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of some samples for a terminal; a column `SCORE before` stands behind the column `before`."""
    lines = []
    for row in rows[:PRINTED_SAMPLES]:
        columns = {name: name for name in row if len(name.split()) == 1}
        scores = {name.split()[-1]: value for name, value in row.items() if name not in columns}
        width = max(map(len, columns))
        for name in columns:
            score = f"  [{scores[name]}]" if name in scores else ""
            lines.append(f"  {name.ljust(width)}  {_cut(row[name], 160)}{score}")
        lines.append("")
    return lines[:-1]


def _cut(value: object, most: int) -> str:
    text = " / ".join(str(value).splitlines())
    return text if len(text) <= most else f"{text[: most - 1]}…"


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table; the first row names the columns."""
    if not rows:
        return ["(empty)"]
    cells = [[_cell(row.get(column, "")) for column in rows[0]] for row in rows]
    widths = [max(len(name), *(len(row[index]) for row in cells)) for index, name in enumerate(rows[0])]

    def line(values: Sequence[str]) -> str:
        return "| " + " | ".join(value.ljust(width) for value, width in zip(values, widths, strict=True)) + " |"

    return [line(list(rows[0])), line(["-" * width for width in widths]), *map(line, cells)]


def write_atomically(path: Path, text: str) -> None:
    """Write under a temporary name in the same folder, to the disk, then rename."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as stream:
        try:
            stream.write(text)
            stream.flush()
            os.chmod(stream.name, 0o644)
            durable.replace(stream.name, path)
        except BaseException:
            # As on a full disk: a partly written file is useless.
            os.unlink(stream.name)
            raise


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("\n", " / ").replace("|", "\\|")


# ---- flags ----
# Display of a run's flags in reports and cards: the given ones, and all others folded.


# Texts read by YAML unchanged.
_PLAIN = re.compile(r"[A-Za-z_/][\w./-]*")
_NOT_TEXT = frozenset(("true", "false", "yes", "no", "on", "off", "null", "y", "n"))
# Suffixes of the names of an argument with the write times of a flag's files, and of one with a fingerprint of their
# contents.
CHANGED, CONTENTS = " changed at", " contents"


def compared(before: Mapping[str, object], now: Mapping[str, object]) -> set[str]:
    """Return the names of the arguments for comparing two runs.

    Where both have the contents of a flag's files, their times do not count: earlier versions had no contents.
    """
    names = {*before, *now}
    shared_contents = {name for name in names if name.endswith(CONTENTS) and name in before and name in now}
    times = {f"{name.removesuffix(CONTENTS)}{CHANGED}" for name in shared_contents}
    return {name for name in names - times if name in shared_contents or not name.endswith(CONTENTS)}


def by_contents(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's arguments without the times of files if their contents are included."""
    return {name: arguments[name] for name in sorted(compared(arguments, arguments))}


def split_flags(
    arguments: Mapping[str, object], given: Mapping[str, object] | None
) -> tuple[dict[str, object], dict[str, object]]:
    """Return the given flags, and the other set flags; of earlier stages, only flags different from ours.

    Args:
        arguments: all inputs of a run's result, as in its report.
        given: the user's flags; `None` if unknown: then all are others.
    """
    others = {}
    for flag, value in arguments.items():
        own_flag = flag.partition(".")[2]
        is_repeated = bool(own_flag) and arguments.get(own_flag) == value
        if value in (None, "", [], {}) or flag.endswith((CHANGED, CONTENTS)) or is_repeated or flag in (given or {}):
            continue
        others[flag] = value
    return dict(given or {}), others


def flag_sections(arguments: Mapping[str, object], given: Mapping[str, object] | None) -> list[str]:
    """Return the Markdown sections of the flags: see `split_flags`."""
    displayed, others = split_flags(arguments, given)
    lines = ["## Arguments"]
    if given is not None:
        lines.append(f"Given:\n\n```yaml\n{_yaml(displayed)}```" if displayed else "No flag was given.")
    others_are = f"{len(others)} {'flags' if given is None else 'others, at their defaults or settings'}"
    lines.append(folded(others_are, f"```yaml\n{_yaml(others)}```"))
    return lines


def folded(title: str, text: str) -> str:
    """Return Markdown with only the title visible until it is clicked."""
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def _yaml(values: Mapping[str, object]) -> str:
    """Return flags as lines of YAML, values in JSON, readable as YAML: planning imports no library for it."""
    lines = [f"{_word(flag)}: {_value(values[flag])}\n" for flag in sorted(values)]
    return "".join(lines).replace("```", "'''")


def _word(text: str) -> str:
    is_plain = _PLAIN.fullmatch(text) and text.lower() not in _NOT_TEXT
    return text if is_plain else json.dumps(text, ensure_ascii=False)


def _value(value: object) -> str:
    if isinstance(value, str):
        return _word(value)
    text = json.dumps(value, ensure_ascii=False, default=str)
    # YAML takes 3e-06 for a text.
    return re.sub(r"^(-?\d+)e", r"\1.0e", text) if isinstance(value, float) else text


def given_flags(names: Sequence[str] | None, arguments: Mapping[str, object]) -> dict[str, object] | None:
    """Return the values of the flags named by the user, only flags with an influence on the result.

    Args:
        names: as given, such as `no_save_last`; `None` if unknown.
        arguments: all inputs of the result.
    """
    if names is None:
        return None
    flags = {name if name in arguments else name.removeprefix("no_") for name in names}
    return {name: arguments[name] for name in sorted(flags) if name in arguments}
