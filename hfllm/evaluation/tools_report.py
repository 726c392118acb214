"""The report of learning to use tools: what PPO changed, what is left without tools, and what the controls did."""

from collections.abc import Mapping, Sequence

from hfllm.data.world.tasks import CHANGED_FACT, NEED, NO_NEED, SUM, UNKNOWN
from hfllm.evaluation.constitution import side_by_side
from hfllm.evaluation.tools import KNOWN, Answered, figures, values_of
from hfllm.outputs.report import Found, Plot, Promise, change_of, mean_of, plus_minus
from hfllm.rewards.functions import transcript

SHOWN, RL, SHUFFLED, PLAIN, OFF = "shown", "rl", "shuffled", "plain", "off"
# How the report calls the models.
TITLES = {
    **{SHOWN: "demonstrations", RL: "PPO", SHUFFLED: "PPO, shuffled rewards", PLAIN: "never saw tools"},
    OFF: "PPO, tools switched off",
}
LABELS = {
    **{UNKNOWN: "unknown animals", CHANGED_FACT: "changed facts", SUM: "large sums", KNOWN: "known facts"},
    **{"fact": "new questions of facts", "reading": "reading", "list": "lists", "addition": "small sums"},
}
SAMPLES_EACH = 2
PROMISES = (
    *(
        Promise(f"{LABELS[family]} right after PPO", f"right_{family}_after", f"off_right_{family}", "without tools")
        for family in NEED
    ),
    Promise("change of right sampled answers by PPO", "sampled_right_needed_change", 0.0, "no change"),
)

Answers = Mapping[str, Sequence[Answered]]


def report(answers: Answers) -> Found:
    """Return the report of the world's models.

    Args:
        answers: of each model, by the names of `hfllm.stages.tools_steps.Steps.answers`.

    Returns:
        Metrics with `_before` (demonstrations) and `_after` (PPO), greedy, and `sampled_...` for sampled answers;
        `off_right_...` (PPO's model without its tools), `shuffled_...` (PPO by shuffled rewards, sampled, with the
        change over demonstrations), `known_facts_lost` (right answers of known facts that the model without tools has
        more than PPO's).
    """
    metrics: dict[str, float] = {}
    for prefix, ending in (("", ""), ("sampled_", " sampled")):
        before, after = (values_of(answers[f"{name}{ending}"]) for name in (SHOWN, RL))
        for name, values in before.items():
            metrics |= change_of(f"{prefix}{name}", values, after[name])
    off = figures(answers[OFF])
    metrics |= {f"off_{name}": value for name, value in off.items() if name.startswith("right")}
    if SHUFFLED in answers:
        before, after = (values_of(answers[f"{name} sampled"]) for name in (SHOWN, SHUFFLED))
        for name in ("calls_needed", "right_needed"):
            metrics |= change_of(f"shuffled_{name}", before[name], after[name])
    if PLAIN in answers:
        plain, after = (values_of(answers[name])[f"right_{KNOWN}"] for name in (PLAIN, RL))
        metrics |= mean_of("plain_right_known", plain)
        metrics |= mean_of("known_facts_lost", [one - other for one, other in zip(plain, after, strict=True)])
    return Found(metrics, _summary(metrics), _tables(answers), {"right": _plot(answers)}, PROMISES)


def _summary(metrics: Mapping[str, float]) -> str:
    def told(name: str) -> str:
        return plus_minus(metrics[name], metrics.get(f"{name}_se"))

    families = ", ".join(f"{LABELS[family]} {told(f'right_{family}_after')}" for family in (*NEED, KNOWN))
    parts = [
        f"calls where needed {told('calls_needed_after')}, where not {told('calls_not_needed_after')}",
        f"right: {families}",
        f"sampled answers where a tool is needed from {told('sampled_right_needed_before')} to "
        f"{told('sampled_right_needed_after')} by PPO",
    ]
    if "shuffled_right_needed_after" in metrics:
        parts[-1] += f", to {told('shuffled_right_needed_after')} by shuffled rewards"
    if "known_facts_lost" in metrics:
        parts.append(f"known facts of a model without tools {told('plain_right_known')}")
    return "; ".join(parts)


def _tables(answers: Answers) -> dict[str, list[dict[str, str]]]:
    names = ["calls_needed", "calls_not_needed", "right_needed"]
    names += [f"right_{family}" for family in (*NEED, *NO_NEED, KNOWN)]
    found = {name: figures(said) for name, said in answers.items()}

    def columns(*models: str) -> dict[str, dict[str, float]]:
        return {f"{TITLES[each.split()[0]]}": found[each] for each in models if each in found}

    tables = {
        "Greedy answers": side_by_side(columns(SHOWN, RL, OFF), names),
        "Sampled answers": side_by_side(
            columns(f"{SHOWN} sampled", f"{RL} sampled", f"{SHUFFLED} sampled"),
            names,
        ),
    }
    if PLAIN in found:
        kept = [f"right_{family}" for family in (*NO_NEED, KNOWN)]
        tables["Where no tool is needed"] = side_by_side(columns(RL, PLAIN), kept)
    return tables | {"Conversations": _samples(answers)}


def _samples(answers: Answers) -> list[dict[str, str]]:
    """Return the first conversations of each family, before and after PPO."""
    rows = []
    for family in (*NEED, *NO_NEED):
        places = [place for place, each in enumerate(answers[RL]) if each.asked.group == family]
        for place in places[:SAMPLES_EACH]:
            said = {TITLES[name]: transcript(answers[name][place].episode.messages) for name in (SHOWN, RL, OFF)}
            rows.append({"question": answers[RL][place].asked.task.task.question, **said})
    return rows


def _plot(answers: Answers) -> Plot:
    """Return the plot of right answers by family, a line for each model."""
    families = (*NEED, *NO_NEED, KNOWN)
    places = list(range(len(families)))
    lines = {}
    for name in (SHOWN, RL, OFF):
        values = figures(answers[name])
        lines[TITLES[name]] = (places, [values[f"right_{family}"] for family in families])
    ticks = {place: LABELS[family].replace(" ", "\n", 1) for place, family in enumerate(families)}
    return Plot("Right answers", "", "share of questions", lines, xticks=ticks, points_only=True)
