"""Results of a federation: its model compared with models of pooled rows and of single organisations."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

from torch import Tensor

from hfllm.data.formats import counted
from hfllm.data.world.world import Task
from hfllm.evaluation.suites.world_suites import judge_tasks
from hfllm.federation.learner import Rows
from hfllm.federation.rounds import RoundRecord, identity_digest
from hfllm.federation.updates import weights_sha256
from hfllm.outputs.figures import change_of, mean_of, plus_minus
from hfllm.outputs.intervals import standard_error
from hfllm.outputs.report import Found, Plot, write_atomically
from hfllm.outputs.verdict import Promise
from hfllm.runs.command_line import say
from hfllm.stages.federated.build import Local, Tokenized
from hfllm.stages.federated.flags import CENTRAL, EQUAL_STEPS, LOCAL
from hfllm.trainers.engines import schedule_of

# Learning together must be better than the best of the organisations could do apart.
CLAIMS = [
    Promise("gold reward beyond the best alone", "gold_against_local_best_change", 0.0, "no change"),
    Promise(
        "held-out loss below the best alone", "held_out_loss_against_local_best_change", 0.0, "no change", is_less=True
    ),
]


# ---- measured models ----


CONTROLS_FILE = "controls.json"
# The longest answer to a question of the world, in tokens.
RESPONSE_LENGTH = 40
UNTRAINED, FEDERATED = "untrained", "federated"

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Measured:
    """Figures of one model.

    Args:
        golds: gold rewards of its greedy answers to the world's held-out questions; none for the user's rows.
        losses: held-out losses of the organisations with held-out rows, in nats per token or pair.
        accuracies: of reward models, the shares of their held-out pairs in the right order.
    """

    golds: list[float]
    losses: dict[str, float]
    accuracies: dict[str, float] = field(default_factory=dict)

    @property
    def gold(self) -> float:
        """The mean gold reward."""
        return sum(self.golds) / max(len(self.golds), 1)

    @property
    def loss(self) -> float:
        """The mean over organisations of their held-out loss."""
        return sum(self.losses.values()) / max(len(self.losses), 1)

    @property
    def accuracy(self) -> float:
        """The mean over organisations of their pair accuracy."""
        return sum(self.accuracies.values()) / max(len(self.accuracies), 1)


class Evaluator:
    """Measures models on the world's held-out questions, and on the organisations' held-out rows.

    Args:
        local: the model, and the organisations.
        tasks: the world's questions; none for the user's rows.
        every: number of rounds between two measurements; the last round is always measured.
    """

    def __init__(self, local: Local, tasks: Sequence[Task], every: int):
        self.local, self.tasks, self.every = local, tasks, every
        # The last round's figures are requested twice.
        self._golds: dict[str, list[float]] = {}
        self._losses: dict[str, dict[str, float]] = {}
        self._accuracies: dict[str, dict[str, float]] = {}

    def of_round(self, number: int, weights: Weights) -> dict[str, float]:
        """Return the recorded figures of a round."""
        if number % self.every and number != self.local.terms.rounds:
            return {}
        if self.tasks:
            golds = self.golds(weights)
            return {"gold": sum(golds) / len(golds)}
        result = self.measure(weights)
        accuracy = {"pair_accuracy": result.accuracy} if result.accuracies else {}
        return {"held_out_loss": result.loss, **accuracy} if result.losses else {}

    def measure(self, weights: Weights) -> Measured:
        """Return all figures of a model."""
        return Measured(self.golds(weights), self.losses(weights), self.accuracies(weights))

    def golds(self, weights: Weights) -> list[float]:
        """Return the gold rewards of greedy answers; nothing for the user's rows."""
        if not self.tasks:
            return []
        key, learner = weights_sha256(weights), self.local.learner
        if key not in self._golds:
            learner.set_weights(weights)
            judged = judge_tasks(learner.model, self.local.tokenizer, self.tasks, RESPONSE_LENGTH, do_sample=False)
            self._golds[key] = [row["gold"] for row in judged]
        return self._golds[key]

    def losses(self, weights: Weights) -> dict[str, float]:
        """Return the held-out losses of the organisations with held-out rows."""
        return self._by_organisation(self._losses, self.local.learner.held_out_loss, weights)

    def accuracies(self, weights: Weights) -> dict[str, float]:
        """Return the pair accuracies of the organisations with held-out rows; nothing if rows are not pairs."""
        if not self.local.terms.has_pairs:
            return {}
        return self._by_organisation(self._accuracies, self.local.learner.pair_accuracy, weights)

    def _by_organisation(
        self, cache: dict[str, dict[str, float]], figure: Callable[[Rows, Weights], float], weights: Weights
    ) -> dict[str, float]:
        key, organisations = weights_sha256(weights), self.local.organisations
        if key not in cache:
            cache[key] = {each.name: figure(each.held_out, weights) for each in organisations if each.held_out}
        return cache[key]


# ---- controls ----


class Controls:
    """The models to compare with, each trained once: figures measured by a stopped run are kept.

    Args:
        local: their training, with the same trainer as the organisations.
        evaluator: measures them.
        weights: their common initial weights.
        identity: of this run, to distinguish it from others.
    """

    def __init__(self, local: Local, evaluator: Evaluator, weights: Weights, identity: Mapping[str, object]):
        self.learner, self.organisations, self.terms = local.learner, local.organisations, local.terms
        self.evaluator, self.weights = evaluator, weights
        self.file, self.digest = local.folder / CONTROLS_FILE, identity_digest(identity)

    def run(self, arms: Sequence[str]) -> dict[str, Measured]:
        """Return the figures of the untrained model and of all controls by their names.

        Args:
            arms: some of central, equal_steps and local, which is a control by organisation, such as `local NAME`.
        """
        plan: dict[str, Callable[[], Weights]] = {UNTRAINED: lambda: self.weights}
        for arm in arms:
            if arm == LOCAL:
                plan |= {f"{LOCAL} {each.name}": partial(self._alone, each) for each in self.organisations}
            else:
                plan[arm] = self._central if arm == CENTRAL else self._equal_steps
        result, controls = self._load(), {}
        for name, train in plan.items():
            if name not in result:
                result[name] = self.evaluator.measure(train())
                self._save(result)
                say(f"federated: control {name}: {figure_of(result[name])}")
            controls[name] = result[name]
        return controls

    def _alone(self, each: Tokenized) -> Weights:
        """Train on the rows of one organisation, in as many steps as all rounds have."""
        steps, seed = self.terms.num_steps, f"{self.terms.seed}-{each.name}"
        return self.learner.learn(each.rows, self.weights, 0, steps, seed).weights

    def _central(self) -> Weights:
        """Train on the pooled rows, on as many rows as all organisations together, in usual batches."""
        steps, seed = self.terms.num_steps * len(self.organisations), f"{self.terms.seed}-{CENTRAL}"
        rate = schedule_of(self.learner.args, steps)
        return self.learner.learn(self._pooled, self.weights, 0, steps, seed, rate=rate).weights

    def _equal_steps(self) -> Weights:
        """Train on the pooled rows, with as many sequential steps as an organisation, in batches of all."""
        steps, seed = self.terms.num_steps, f"{self.terms.seed}-{EQUAL_STEPS}"
        size = self.learner.batch_size * len(self.organisations)
        return self.learner.learn(self._pooled, self.weights, 0, steps, seed, batch_size=size).weights

    @property
    def _pooled(self) -> Rows:
        """The rows of all organisations, as the rows of a single one."""
        return [row for each in self.organisations for row in each.rows]

    def _load(self) -> dict[str, Measured]:
        try:
            record = json.loads(self.file.read_text(encoding="utf-8"))
            if record["run"] != self.digest:
                return {}
            return {name: Measured(**each) for name, each in record["controls"].items()}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return {}

    def _save(self, controls: Mapping[str, Measured]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        record = {"run": self.digest, "controls": {name: asdict(each) for name, each in controls.items()}}
        write_atomically(self.file, json.dumps(record) + "\n")


def figure_of(measured: Measured) -> str:
    """Return a model's main figure in words."""
    if measured.golds:
        return f"gold {measured.gold:.3f}"
    if measured.accuracies:
        return f"held-out loss {measured.loss:.3f} nats per pair, pair accuracy {measured.accuracy:.3f}"
    return f"held-out loss {measured.loss:.3f} nats per token"


# ---- report ----
#
# The report of a federation: figures by round and by bytes, next to their controls.


LABELS = {
    UNTRAINED: "before",
    FEDERATED: "federated",
    CENTRAL: "pooled rows, as many rows",
    EQUAL_STEPS: "pooled rows, as many steps",
}
NOT_PRIVATE = (
    "Epsilon is of the model alone: controls, held-out losses and numbers of rows are taken from rows without noise, "
    "and the controls' figures are not private."
)
ROWS_NOT_PRIVATE = (
    "A row-level epsilon is of the updates that an organisation sends; numbers of rows are taken as known. Controls "
    "and held-out losses are taken from rows without noise, and are not private."
)
# Number of rounds in the table, evenly spaced.
SHOWN_ROUNDS = 20
Tables = dict[str, list[Mapping[str, object]]]


@dataclass(frozen=True)
class Comparison:
    """The model of a federation among its controls.

    Args:
        federated: its figures.
        controls: theirs, by name.
        unit: of losses.
    """

    federated: Measured
    controls: Mapping[str, Measured]
    unit: str

    @property
    def is_world(self) -> bool:
        """Whether answers have gold rewards."""
        return bool(self.federated.golds)

    @property
    def arms(self) -> dict[str, Measured]:
        """The models of all organisations, the untrained one first."""
        arms = {UNTRAINED: self.controls[UNTRAINED], FEDERATED: self.federated}
        return arms | {name: self.controls[name] for name in (CENTRAL, EQUAL_STEPS) if name in self.controls}

    @property
    def alone(self) -> dict[str, Measured]:
        """The models of single organisations, by their names."""
        names = [name for name in self.controls if name.startswith(f"{LOCAL} ")]
        return {name.removeprefix(f"{LOCAL} "): self.controls[name] for name in names}

    @property
    def best_alone(self) -> Measured | None:
        """The best model of a single organisation by its main figure."""
        alone = self.alone.values()
        if self.is_world:
            return max(alone, key=lambda each: each.gold, default=None)
        return min(alone, key=lambda each: each.loss, default=None)


def report_of(
    local: Local,
    records: Sequence[RoundRecord],
    federated: Measured,
    controls: Mapping[str, Measured],
    epsilon: float | None,
    delta: float,
) -> Found:
    """Return the figures, tables and plots of a federation: of a private one, none that reveals its participants.

    Args:
        local: the organisations, and the number of trained values.
        records: of all rounds.
        federated: figures of the last weights.
        controls: figures of the models to compare with.
        epsilon: the privacy spent by the run; `None` without noise.
        delta: of the privacy of rows.
    """
    is_private = epsilon is not None
    comparison = Comparison(federated, controls, "nats per pair" if local.terms.has_pairs else "nats per token")
    metrics, plots = _metrics(local, records, comparison, epsilon), _plots(records, comparison)
    tables = {
        **_golds(comparison),
        **_by_organisation(local, comparison),
        **_row_privacy(local, delta),
        "Rounds": _rounds(records, is_private),
        **_reasons("Left out", "why", {record.number: record.left_out for record in records}),
        **_reasons("Bounded", "how", {record.number: record.bounded for record in records}),
    }
    if is_private:
        plots = {name: plot for name, plot in plots.items() if name.endswith("_by_round")}
    return Found(metrics, _summary(metrics, comparison), tables, plots)


def _metrics(
    local: Local, records: Sequence[RoundRecord], comparison: Comparison, epsilon: float | None
) -> dict[str, float]:
    metrics: dict[str, float] = {
        "organisations": len(local.organisations),
        "rounds": len(records),
        "trained_parameters": sum(value.numel() for value in local.learner.trained.values()),
    }
    if epsilon is not None:
        metrics["epsilon"] = epsilon
    else:
        metrics |= {
            "bytes_down": sum(record.bytes_down for record in records),
            "bytes_up": sum(record.bytes_up for record in records),
            "updates_left_out": sum(len(record.left_out) for record in records),
            "updates_bounded": sum(len(record.bounded) for record in records),
            "drift": sum(record.drift for record in records) / len(records),
        }
    if local.row_epsilons:
        metrics["row_epsilon"] = max(local.row_epsilons.values())
    models, best = comparison.arms, comparison.best_alone
    if best is not None:
        models["local_best"] = best
    for name, each in models.items():
        if each.golds:
            metrics |= mean_of(f"gold_{name}", each.golds)
        if each.losses:
            metrics |= mean_of(f"held_out_loss_{name}", [*each.losses.values()])
        if each.accuracies:
            metrics[f"pair_accuracy_{name}"] = each.accuracy
    metrics |= _against_best(comparison.federated, best) if best is not None else {}
    for name in (CENTRAL, EQUAL_STEPS, "local_best"):
        if comparison.is_world and name in models and models[name].gold > 0:
            metrics[f"gold_over_{name}"] = comparison.federated.gold / models[name].gold
    return metrics


def _against_best(federated: Measured, best: Measured) -> dict[str, float]:
    """Return the federated model against the best one alone: on the same questions, or the same organisations."""
    metrics = change_of("gold_against_local_best", best.golds, federated.golds) if best.golds else {}
    shared = [name for name in federated.losses if name in best.losses]
    if shared:
        losses = ([each.losses[name] for name in shared] for each in (best, federated))
        metrics |= change_of("held_out_loss_against_local_best", *losses)
    return metrics


def _golds(comparison: Comparison) -> Tables:
    if not comparison.is_world:
        return {}
    models = {LABELS[name]: each for name, each in comparison.arms.items()}
    models |= {f"{name} alone": each for name, each in comparison.alone.items()}
    rows = [
        {"model": name, "gold": each.gold, "±": standard_error(each.golds) or "", "n": len(each.golds)}
        for name, each in models.items()
    ]
    return {"Gold reward of greedy answers to held-out questions": rows}


def _by_organisation(local: Local, comparison: Comparison) -> Tables:
    """Return tables of losses and, of reward models, accuracies, of each organisation on its own held-out rows."""
    columns, alone = {LABELS[name]: each for name, each in comparison.arms.items()}, comparison.alone

    def table(figures: Callable[[Measured], Mapping[str, float]]) -> list[Mapping[str, object]]:
        rows = []
        for each in local.organisations:
            row: dict[str, object] = {
                "organisation": each.name,
                "rows": len(each.rows),
                "held out": len(each.held_out),
            }
            row |= {title: figures(measured).get(each.name, "") for title, measured in columns.items()}
            if each.name in alone:
                row["alone"] = figures(alone[each.name]).get(each.name, "")
            rows.append(row)
        return rows

    tables = {f"Held-out loss by organisation ({comparison.unit})": table(lambda measured: measured.losses)}
    if comparison.federated.accuracies:
        tables["Accuracy on held-out pairs by organisation"] = table(lambda measured: measured.accuracies)
    return tables


def _row_privacy(local: Local, delta: float) -> Tables:
    rows = [
        {"organisation": each.name, "rows": len(each.rows), "epsilon": local.row_epsilons[each.name]}
        for each in local.organisations
        if each.name in local.row_epsilons
    ]
    return {f"What all rounds reveal of one row (delta {delta:g})": rows} if rows else {}


def _rounds(records: Sequence[RoundRecord], is_private: bool) -> list[Mapping[str, object]]:
    measured = [record for record in records if record.evaluation] or list(records)
    rows: list[Mapping[str, object]] = []
    for record in measured[:: -(-len(measured) // SHOWN_ROUNDS)]:
        row: dict[str, object] = {"round": record.number}
        if not is_private:
            row["organisations"] = len(record.participants) - len(record.left_out)
            row["MB so far"] = round(_bytes_until(records, record.number) / 1e6, 2)
        row["norm of the mean"] = record.update_norm
        if not is_private:
            row["drift"] = record.drift
        rows.append({**row, **record.evaluation})
    return rows


def _bytes_until(records: Sequence[RoundRecord], number: int) -> int:
    """Return the bytes both ways of the first rounds."""
    return sum(record.bytes_down + record.bytes_up for record in records[:number])


def _reasons(title: str, column: str, by_round: Mapping[int, Mapping[str, str]]) -> Tables:
    """Return the table of a reason for each organisation of each round; nothing without any."""
    rows = [
        {"round": number, "organisation": name, column: reason}
        for number, reasons in by_round.items()
        for name, reason in reasons.items()
    ]
    return {title: rows} if rows else {}


def _plots(records: Sequence[RoundRecord], comparison: Comparison) -> dict[str, Plot]:
    is_world, best = comparison.is_world, comparison.best_alone
    name, ylabel = ("gold", "gold reward") if is_world else ("held_out_loss", f"held-out loss ({comparison.unit})")
    measured = [record for record in records if name in record.evaluation]
    values = [record.evaluation[name] for record in measured]
    others = {LABELS[arm]: each for arm, each in comparison.arms.items() if arm != FEDERATED}
    if best is not None:
        others["best alone"] = best

    def over(x: list[float], xlabel: str, title: str) -> Plot:
        ends = [min(x, default=0.0), max(x, default=1.0)]
        level = {label: each.gold if is_world else each.loss for label, each in others.items()}
        lines = {"federated": (x, values), **{label: (ends, [value] * 2) for label, value in level.items()}}
        return Plot(title=title, xlabel=xlabel, ylabel=ylabel, lines=lines, is_share=is_world)

    numbers = [float(record.number) for record in measured]
    sent = [_bytes_until(records, record.number) / 1e6 for record in measured]
    rounds = [float(record.number) for record in records]
    return {
        f"{name}_by_round": over(numbers, "rounds", "What the rounds give"),
        f"{name}_by_bytes": over(sent, "megabytes, both ways, all organisations", "What the bytes give"),
        "drift": Plot(
            title="How far organisations move apart",
            xlabel="rounds",
            ylabel="distance to the mean change, over its norm",
            lines={"drift": (rounds, [record.drift for record in records])},
        ),
    }


def _summary(metrics: Mapping[str, float], comparison: Comparison) -> str:
    if "epsilon" in metrics:
        sent, about = f"an epsilon of {metrics['epsilon']:.3g}", f" {NOT_PRIVATE}"
    else:
        down, up = (f"{metrics[name] / 1e6:,.1f} MB" for name in ("bytes_down", "bytes_up"))
        sent, about = f"{down} down and {up} up", ""
    if "row_epsilon" in metrics:
        sent += f" and a row-level epsilon of at most {metrics['row_epsilon']:.3g}"
        about += f" {ROWS_NOT_PRIVATE}"
    others = {
        "before": comparison.controls[UNTRAINED],
        "with pooled rows": comparison.controls.get(CENTRAL),
        "with pooled rows in as few steps": comparison.controls.get(EQUAL_STEPS),
        "at best alone": comparison.best_alone,
    }
    what = "Gold reward" if comparison.is_world else f"Held-out loss ({comparison.unit})"
    words = ", ".join(f"{_main_figure(each)} {name}" for name, each in others.items() if each is not None)
    count, rounds, result = metrics["organisations"], metrics["rounds"], _main_figure(comparison.federated)
    return f"{what} {result} of {count} organisations after {counted(rounds, 'round')} and {sent}; {words}.{about}"


def _main_figure(measured: Measured) -> str:
    """Return a model's main figure, with its error if there is one."""
    if measured.golds:
        return plus_minus(measured.gold, standard_error(measured.golds))
    return f"{measured.loss:.3f}" if measured.losses else "not measured"
