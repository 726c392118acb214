"""Figures with their uncertainty: standard errors, changes of the same prompts, and the tables that show them.

A report's metrics are flat; these suffixes of their names belong together:
- `NAME_se`, `NAME_n`: the standard error of the mean `NAME`, and its number of prompts or rows;
- `NAME_before`, `NAME_after`, `NAME_change`, `NAME_change_se`, `NAME_n`: the same prompts before and after
  training. The error of the change is the error of the paired differences, since answers to one prompt are alike.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
