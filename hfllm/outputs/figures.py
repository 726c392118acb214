"""Figures with their uncertainty: means, changes, and how they are shown."""

import math
from collections.abc import Mapping, Sequence

from hfllm.outputs.intervals import newcombe, share_error, standard_error, student, wilson

# A report's metrics are flat; these suffixes of their names belong together:
# - `NAME_se`, `NAME_n`: the standard error of the mean `NAME`, and its number of prompts or rows;
# - `NAME_low`, `NAME_high`: the 95% interval of a share, since the error of 9 of 9 is 0 and says nothing;
# - `NAME_before`, `NAME_after`, `NAME_change`, `NAME_change_se`, `NAME_n`: the same prompts before and after
#   training. The error of the change is the error of the paired differences, since answers to one prompt are alike.

# A difference of fewer standard errors is called noise where an interval is not known.
NOISE = 2.0
# Of intervals, and the chance of finding a difference between equal models.
LEVEL, ALPHA = 0.95, 0.05
# Fewer items cannot show a difference at that level: five that all change alike do so by chance in 1 of 16 cases.
FEWEST = 6
# Degrees of freedom of an error whose number of items is not known.
LARGE = 10**9
SIDES, ENDINGS = ("_before", "_after", "_change"), ("_se", "_n", "_low", "_high")
INTERVAL = "95% interval"
# Names for readers. Missing ones are shown as in report.json.
LABELS = {
    "gold_reward": "gold reward (sampled answers)",
    "gold_reward_greedy": "gold reward (greedy answers)",
    "gold_reward_new_phrasings": "gold reward (new phrasings)",
    "gold_reward_greedy_helpful": "gold reward (greedy, to be helped)",
    "gold_reward_greedy_honest": "gold reward (greedy, what nobody knows)",
    "gold_reward_greedy_harmless": "gold reward (greedy, requests for harm)",
    "over_refusal": "harmless questions refused (greedy)",
    "over_refusal_look_alike": "harmless questions that look harmful, refused",
    "over_refusal_jailbreak": "harmless questions refused after a jailbreak (greedy)",
    "fact_accuracy": "facts answered right (greedy)",
    "proxy_reward": "reward (trained on)",
    "response_length": "response length (tokens)",
    "unfinished": "share of responses cut off",
    "kl_to_reference": "KL to the reference (nats per response)",
    "reward_model_accuracy": "reward model accuracy",
    "calls_needed": "calls where a tool is needed",
    "calls_not_needed": "calls where none is needed",
    "right": "right answers",
    "solutions_right": "right answers, of answers alone to solutions",
    "shuffled_right": "right answers, the shuffled control",
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
    "gold_reward_against_alone": "gold reward, alone and with a teacher",
    "gold_against_local_best": "gold reward, best alone and federated",
    "held_out_loss_against_local_best": "held-out loss, best alone and federated",
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
    **dict.fromkeys(("over_refusal", "over_refusal_jailbreak", "over_refusal_look_alike"), -1),
    **dict.fromkeys(("proxy_reward", "reward_model_accuracy"), 1),
    **dict.fromkeys(("right_needed", "sampled_right_needed", "calls_needed", "sampled_calls_needed"), 1),
    **dict.fromkeys(("calls_not_needed", "sampled_calls_not_needed"), -1),
    **dict.fromkeys(("needle", "needle_text"), 1),
    **dict.fromkeys(("bits_per_byte_short", "bits_per_byte_long"), -1),
    **dict.fromkeys(("unfinished", "held_out_loss", "eval_loss", "perplexity", "bits_per_byte"), -1),
}


def averaged(values: Sequence[float], samples: int) -> list[float]:
    """Return each prompt's mean, of its `samples` consecutive values: samples of one prompt are not independent."""
    return [sum(values[first : first + samples]) / samples for first in range(0, len(values), samples)]


def mean_of(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return the metrics `name` and `name_n` of one value per prompt, with its error, and the bounds of a share."""
    mean, n = sum(values) / max(len(values), 1), len(values)
    bounds = share_bounds(name, mean, n) if n and all(value in (0, 1) for value in values) else {}
    return {name: mean, **with_error(name, standard_error(values), n), **bounds}


def with_error(name: str, error: float | None, n: int) -> dict[str, float]:
    """Return the metrics accompanying the figure `name`."""
    return {**({} if error is None else {f"{name}_se": error}), f"{name}_n": n}


def share_of(name: str, share: float, n: int) -> dict[str, float]:
    """Return the metrics of a share of `n` independent trials, where only the share is known."""
    bounds = share_bounds(name, share, n) if n else {}
    return {name: share, **with_error(name, share_error(share, n), n), **bounds}


def share_bounds(name: str, share: float, n: int) -> dict[str, float]:
    """Return the bounds of the share `name` of `n` items: Wilson's, which have a width at 0 and 1 too."""
    low, high = wilson(share * n, n, LEVEL)
    return {f"{name}_low": min(low, share), f"{name}_high": max(high, share)}


def change_of(name: str, before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """Return the metrics of a figure before and after, from one value per prompt, the same prompts in the same order.

    Raises:
        ValueError: when the two are of different lengths.
    """
    differences = [second - first for first, second in zip(before, after, strict=True)]
    result = {**mean_of(f"{name}_before", before), **mean_of(f"{name}_after", after)}
    n = result.pop(f"{name}_before_n")
    del result[f"{name}_after_n"]
    result[f"{name}_change"] = change = result[f"{name}_after"] - result[f"{name}_before"]
    error = standard_error(differences)
    result |= {} if error is None else {f"{name}_change_se": error}
    if f"{name}_before_low" in result and f"{name}_after_low" in result:
        low, high = newcombe(before, after, LEVEL)
        result |= {f"{name}_change_low": min(low, change), f"{name}_change_high": max(high, change)}
    return {**result, f"{name}_n": n}


def items_of(name: str, metrics: Mapping[str, float]) -> int | None:
    """Return the number of items of a figure, or of one of its sides or its change; `None` if it is not known."""
    whole = next((name.removesuffix(side) for side in SIDES if name.endswith(side)), name)
    n = metrics.get(f"{name}_n", metrics.get(f"{whole}_n"))
    return None if n is None else int(n)


def bounds_of(name: str, metrics: Mapping[str, float]) -> tuple[float, float] | None:
    """Return the 95% interval of a figure: its own, or Student's from its error; `None` where there is no error."""
    if not math.isfinite(metrics.get(name, math.nan)):
        return None
    if f"{name}_low" in metrics and f"{name}_high" in metrics:
        return metrics[f"{name}_low"], metrics[f"{name}_high"]
    error, n = metrics.get(f"{name}_se"), items_of(name, metrics)
    if error is None or name not in metrics or (n is not None and n < 2):
        return None
    half = error * student((1 + LEVEL) / 2, LARGE if n is None else n - 1)
    return metrics[name] - half, metrics[name] + half


def changes(metrics: Mapping[str, float]) -> list[str]:
    """Return the names of the figures with values before and after in the metrics, in order."""
    return [name.removesuffix("_change") for name in metrics if name.endswith("_change")]


def figure_tables(metrics: Mapping[str, float]) -> list[list[dict[str, str]]]:
    """Return the tables of figures: changed ones, and ones measured once; none where no figure has an error."""
    if not any(name.endswith("_se") for name in metrics):
        return []
    changed = [_change_row(name, metrics) for name in changes(metrics)]
    # Metrics with a row of their own or in another figure's row.
    parts = {f"{name}{side}" for name in changes(metrics) for side in ("", *SIDES)}
    parts |= {f"{name}{ending}" for name in (*metrics, *parts) for ending in ENDINGS if name in {*metrics, *parts}}
    single = [
        {
            "figure": label_of(name),
            "value": readable(metrics[name]),
            INTERVAL: shown_bounds(bounds_of(name, metrics)),
            "n": _count(metrics, name),
        }
        for name in metrics
        if name not in parts
    ]
    return [table for table in (changed, single) if table]


def _change_row(name: str, metrics: Mapping[str, float]) -> dict[str, str]:
    change = metrics[f"{name}_change"]
    return {
        "figure": label_of(name),
        "before": readable(metrics[f"{name}_before"]),
        "after": readable(metrics[f"{name}_after"]),
        "change": f"{'+' if change > 0 else ''}{readable(change)}",
        INTERVAL: shown_bounds(bounds_of(f"{name}_change", metrics)),
        "n": _count(metrics, name),
        "": word_of(name, metrics),
    }


def _count(metrics: Mapping[str, float], name: str) -> str:
    return readable(metrics[f"{name}_n"]) if f"{name}_n" in metrics else ""


def shown_bounds(bounds: tuple[float, float] | None) -> str:
    """Return an interval as a table shows it; nothing without one, or where all items are equal."""
    if bounds is None or bounds[0] == bounds[1] or not all(map(math.isfinite, bounds)):
        return ""
    digits = max(0, 1 - math.floor(math.log10(bounds[1] - bounds[0])))
    low, high = (f"{each:,.{digits}f}" for each in bounds)
    return f"[{low}, {high}]"


def word_of(name: str, metrics: Mapping[str, float]) -> str:
    """Return the word for a figure's change.

    Returns:
        `too few` items for any difference to be seen, `unchanged`, `noise` within the interval, `better`, `worse`, or
        the direction of a figure neither good nor bad in itself.
    """
    change, bounds, n = metrics[f"{name}_change"], bounds_of(f"{name}_change", metrics), items_of(name, metrics)
    if bounds is None or (n is not None and n < FEWEST):
        return "too few"
    if change == 0:
        return "unchanged"
    if bounds[0] <= 0 <= bounds[1]:
        return "noise"
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


def shown(metrics: Mapping[str, float], name: str) -> str:
    """Return a figure with its error, as `plus_minus`, or with its bounds where the error is 0: `1 [0.94, 1.00]`."""
    value, error = metrics[name], metrics.get(f"{name}_se")
    bounds = None if error else shown_bounds(bounds_of(name, metrics))
    return f"{readable(value)} {bounds}" if bounds else plus_minus(value, error)


def side_by_side(metrics: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows of a table: one per figure in `names`, with one column per model."""
    return [
        {
            "figure": name.replace("_", " "),
            **{model: shown(values, name) for model, values in metrics.items()},
            "n": f"{next(iter(metrics.values()))[f'{name}_n']:,}",
        }
        for name in names
    ]
