"""The report of a recipe, report.json, report.md and plots: figures with uncertainty, a writer, and a run's flags."""

import json
import math
import os
import platform
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm import durable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# ---- figures with their uncertainty ----
#
# A report's metrics are flat; these suffixes of their names belong together:
# - `NAME_se`, `NAME_n`: the standard error of the mean `NAME`, and its number of prompts or rows;
# - `NAME_before`, `NAME_after`, `NAME_change`, `NAME_change_se`, `NAME_n`: the same prompts before and after
#   training. The error of the change is the error of the paired differences, since answers to one prompt are alike.

# A change of fewer standard errors is called noise.
NOISE = 2.0
# Names for readers. Missing ones are shown as in report.json.
LABELS = {
    "gold_reward": "gold reward (sampled answers)",
    "gold_reward_greedy": "gold reward (greedy answers)",
    "gold_reward_new_phrasings": "gold reward (new phrasings)",
    "gold_reward_greedy_helpful": "gold reward (greedy, to be helped)",
    "gold_reward_greedy_honest": "gold reward (greedy, what nobody knows)",
    "gold_reward_greedy_harmless": "gold reward (greedy, requests for harm)",
    "over_refusal": "harmless questions refused (greedy)",
    "over_refusal_jailbreak": "harmless questions refused after a jailbreak (greedy)",
    "fact_accuracy": "facts answered right (greedy)",
    "proxy_reward": "reward (trained on)",
    "response_length": "response length (tokens)",
    "unfinished": "share of responses cut off",
    "kl_to_reference": "KL to the reference (nats per response)",
    "reward_model_accuracy": "reward model accuracy",
    "calls_needed": "calls where a tool is needed",
    "calls_not_needed": "calls where none is needed",
    "right_needed": "right where a tool is needed",
    "known_facts_lost": "known facts lost to a model without tools",
    "learning_rate": "learning rate",
    "value_learning_rate": "learning rate of the critic",
    "train_loss": "training loss",
    "eval_loss": "held-out loss",
    "held_out_loss": "held-out loss (nats per token)",
    "perplexity": "perplexity of held-out text (per token)",
    "bits_per_byte": "held-out text (bits per byte)",
    "bits_per_byte_short": "up to the trained length (bits per byte)",
    "bits_per_byte_long": "beyond the trained length (bits per byte)",
    "bits_per_byte_short_untrained": "up to the trained length, extended but not trained",
    "bits_per_byte_long_untrained": "beyond the trained length, extended but not trained",
    "bits_per_byte_long_cut": "beyond it, the model as it was, reading no more than it was trained on",
    "needle": "needles found in texts of the world",
    "needle_text": "needles found in your text",
    "needle_chance": "needles found by chance",
    "needle_text_chance": "needles found by chance in your text",
    "agreement": "share of tokens on which both models agree",
    "train_prompts": "prompts trained on",
    "eval_prompts": "held-out prompts",
    "examples": "rows trained on",
    "train_rows": "rows trained on",
    "entity_f1": "F1 of entities",
    "macro_f1": "macro F1",
    "eval_examples": "held-out rows",
    "train_comparisons": "comparisons trained on",
    "eval_comparisons": "held-out comparisons",
}
# The owner of a figure, by the suffix of its name.
ROLES = ("student_alone", "student", "teacher")
# The better direction: more (1), less (-1); others are neither.
BETTER = {
    **dict.fromkeys(("gold_reward", "gold_reward_greedy", "gold_reward_new_phrasings", "fact_accuracy"), 1),
    **dict.fromkeys((f"gold_reward_greedy_{kind}" for kind in ("helpful", "honest", "harmless")), 1),
    **dict.fromkeys(("over_refusal", "over_refusal_jailbreak"), -1),
    **dict.fromkeys(("proxy_reward", "reward_model_accuracy"), 1),
    **dict.fromkeys(("right_needed", "sampled_right_needed", "calls_needed", "sampled_calls_needed"), 1),
    **dict.fromkeys(("calls_not_needed", "sampled_calls_not_needed"), -1),
    **dict.fromkeys(("needle", "needle_text"), 1),
    **dict.fromkeys(("bits_per_byte_short", "bits_per_byte_long"), -1),
    **dict.fromkeys(("unfinished", "held_out_loss", "eval_loss", "perplexity", "bits_per_byte"), -1),
}


@dataclass(frozen=True)
class Promise:
    """A capability promised by a stage, and the control to be surpassed by its figure.

    Args:
        what: the figure in words.
        metric: its name in report.json.
        control: the name of the control's figure, or a level such as the level of guessing.
        beside: the control in words.
        is_less: the figure must be below its control.
    """

    what: str
    metric: str
    control: str | float
    beside: str
    is_less: bool = False

    def warning(self, metrics: Mapping[str, float]) -> str | None:
        """Return the line about a broken promise; `None` if it is kept, or a figure was not measured.

        It is kept where the figure is better by more than `NOISE` standard errors of the difference, with the errors
        of both taken for independent.
        """
        level = metrics.get(self.control) if isinstance(self.control, str) else self.control
        if level is None or self.metric not in metrics:
            return None
        value, error = metrics[self.metric], metrics.get(f"{self.metric}_se", 0.0)
        other = metrics.get(f"{self.control}_se", 0.0) if isinstance(self.control, str) else 0.0
        gain = level - value if self.is_less else value - level
        if gain > NOISE * math.hypot(error, other):
            return None
        side = "below" if self.is_less else "above"
        return f"{self.what}: {plus_minus(value, error)}, not {side} {self.beside} ({plus_minus(level, other)})"


def broken_promises(promises: Sequence[Promise], metrics: Mapping[str, float]) -> list[str]:
    """Return a line per absent capability, only the first of several about the same figure."""
    result: dict[str, str] = {}
    for promise in promises:
        if (line := promise.warning(metrics)) is not None:
            result.setdefault(promise.metric, line)
    return list(result.values())


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean of independent values; `None` for fewer than two."""
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def share_error(share: float, n: int) -> float | None:
    """Return the standard error of a share of `n` independent trials (binomial); `None` for none."""
    return math.sqrt(max(share * (1 - share), 0.0) / n) if n else None


def ratio_error(sums: Sequence[float], counts: Sequence[float]) -> float | None:
    """Return the standard error of `sum(sums) / sum(counts)` over independent rows, such as nats over tokens.

    By linearization (the delta method): rows differ in both. `None` for fewer than two rows.
    """
    if len(sums) < 2 or not sum(counts):
        return None
    ratio, n = sum(sums) / sum(counts), len(sums)
    squares = sum((total - ratio * count) ** 2 for total, count in zip(sums, counts, strict=True))
    return math.sqrt(squares * n / (n - 1)) / sum(counts)


def averaged(values: Sequence[float], samples: int) -> list[float]:
    """Return each prompt's mean, of its `samples` consecutive values: samples of one prompt are not independent."""
    return [sum(values[first : first + samples]) / samples for first in range(0, len(values), samples)]


def mean_of(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return the metrics `name`, `name_se` and `name_n` of one value per prompt; an error only where there is one."""
    return {name: sum(values) / max(len(values), 1), **with_error(name, standard_error(values), len(values))}


def with_error(name: str, error: float | None, n: int) -> dict[str, float]:
    """Return the metrics accompanying the figure `name`."""
    return {**({} if error is None else {f"{name}_se": error}), f"{name}_n": n}


def change_of(name: str, before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """Return the metrics of a figure before and after, from one value per prompt, the same prompts in the same order.

    Raises:
        ValueError: when the two are of different lengths.
    """
    differences = [second - first for first, second in zip(before, after, strict=True)]
    result = {**mean_of(f"{name}_before", before), **mean_of(f"{name}_after", after)}
    n = result.pop(f"{name}_before_n")
    del result[f"{name}_after_n"]
    result[f"{name}_change"] = result[f"{name}_after"] - result[f"{name}_before"]
    error = standard_error(differences)
    return {**result, **({} if error is None else {f"{name}_change_se": error}), f"{name}_n": n}


def is_noise(change: float, error: float | None) -> bool:
    """Return whether a change is smaller than changes likely by chance: `NOISE` standard errors."""
    return error is None or change == 0 or abs(change) < NOISE * error


def changes(metrics: Mapping[str, float]) -> list[str]:
    """Return the names of the figures with values before and after in the metrics, in order."""
    return [name.removesuffix("_change") for name in metrics if name.endswith("_change")]


def figure_tables(metrics: Mapping[str, float]) -> list[list[dict[str, str]]]:
    """Return the tables of figures: changed ones, and ones measured once; none where no figure has an error."""
    if not any(name.endswith("_se") for name in metrics):
        return []
    changed = [_change_row(name, metrics) for name in changes(metrics)]
    # Metrics with a row of their own or in another figure's row.
    parts = {f"{name}{side}" for name in changes(metrics) for side in ("", "_before", "_after", "_change")}
    parts |= {f"{name}{ending}" for name in (*metrics, *parts) for ending in ("_se", "_n")}
    single = [
        {
            "figure": label_of(name),
            "value": readable(metrics[name]),
            "± (standard error)": readable(metrics[f"{name}_se"], 2) if f"{name}_se" in metrics else "",
            "n": _count(metrics, name),
        }
        for name in metrics
        if name not in parts
    ]
    return [table for table in (changed, single) if table]


def _change_row(name: str, metrics: Mapping[str, float]) -> dict[str, str]:
    change, error = metrics[f"{name}_change"], metrics.get(f"{name}_change_se")
    return {
        "figure": label_of(name),
        "before": readable(metrics[f"{name}_before"]),
        "after": readable(metrics[f"{name}_after"]),
        "change": f"{'+' if change > 0 else ''}{readable(change)}",
        "± (of the change)": "" if error is None else readable(error, 2),
        "n": _count(metrics, name),
        "": verdict(name, change, error),
    }


def _count(metrics: Mapping[str, float], name: str) -> str:
    return readable(metrics[f"{name}_n"]) if f"{name}_n" in metrics else ""


def verdict(name: str, change: float, error: float | None) -> str:
    """Return `better`, `worse`, `noise`, or the direction of change of a figure neither good nor bad in itself."""
    if is_noise(change, error):
        return "too few" if error is None else "unchanged" if change == 0 else "noise"
    direction = BETTER.get(name, 0)
    if not direction:
        return "more" if change > 0 else "less"
    return "better" if change * direction > 0 else "worse"


def label_of(name: str) -> str:
    """Return a metric's name for readers."""
    for role in ROLES:
        whole = name.removesuffix(f"_{role}")
        if whole != name and whole in LABELS:
            return f"{LABELS[whole]}, {role.replace('_', ' ')}"
    return LABELS.get(name, name)


def readable(value: object, digits: int = 3) -> str:
    """Return a number with few digits, and with commas from a thousand on, where others write powers of ten."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if math.isfinite(value) and (isinstance(value, int) or abs(value) >= 10**digits):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def plus_minus(value: float, error: float | None) -> str:
    """Return a value with its error, both to the error's second digit: `0.763 ± 0.021`."""
    if not error:
        return readable(value)
    indices = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{indices}f} ± {error:.{indices}f}"


def side_by_side(metrics: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows of a table: one per figure in `names`, with one column per model."""
    return [
        {
            "figure": name.replace("_", " "),
            **{model: plus_minus(values[name], values.get(f"{name}_se")) for model, values in metrics.items()},
            "n": f"{next(iter(metrics.values()))[f'{name}_n']:,}",
        }
        for name in names
    ]


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
        parts = [f"# {self.stage}", *([self.summary] if self.summary else []), *warnings_markdown(self.warnings)]
        parts += [f"{self.wall_seconds:.0f} seconds."]
        parts += figures_markdown(self.metrics)
        plots = {stem: f"![{plot.title}]({stem}.png)" for stem, plot in self.curves.items() if stem in self.artifacts}
        parts += [plot for stem, plot in plots.items() if stem != "loss"]
        for title, rows in self.tables.items():
            parts += [f"## {title}", "\n".join(markdown_table(sample_rows(rows) if is_samples(rows) else rows))]
        parts += [plots["loss"]] if "loss" in plots else []
        if self.next_steps:
            parts += ["## Next", "\n".join(["```", *self.next_steps, "```"])]
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
    """

    metrics: dict[str, float]
    summary: str
    tables: Mapping[str, Sequence[Mapping[str, Any]]]
    plots: "Mapping[str, Plot | Bars | Heatmap]"
    promises: Sequence[Promise] = ()


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
    kinds |= {"parents": list, "warnings": list}
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
