"""Results of a federation: its model compared with models of pooled rows and of single organisations."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from hfllm.data.world.world import World
from hfllm.evaluation.judged import judge_tasks
from hfllm.federation.rounds import RoundRecord, identity_digest
from hfllm.federation.updates import weights_sha256
from hfllm.outputs.report import Found, Plot, mean_of, plus_minus, standard_error, write_atomically
from hfllm.runs.command_line import say
from hfllm.stages.federated.build import Local
from hfllm.stages.federated.flags import CENTRAL, EQUAL_STEPS, LOCAL, FederatedArguments, Tokenized, pooled
from hfllm.trainers.engines import schedule_of

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
    """Measures models on the world's held-out questions, and on the organisations' held-out rows."""

    def __init__(self, script_args: FederatedArguments, local: Local):
        self.local, self.is_world, self.has_pairs = local, script_args.is_world, script_args.has_pairs
        self.every, self.last = script_args.eval_rounds, script_args.rounds
        self.tasks = World(script_args.world_seed).evaluation_tasks(script_args.num_eval_prompts)
        # Rewards of the last round are requested twice.
        self._golds: dict[str, list[float]] = {}
        self._losses: dict[str, dict[str, float]] = {}
        self._accuracies: dict[str, dict[str, float]] = {}

    def golds(self, weights: Weights) -> list[float]:
        """Return the gold rewards of greedy answers; nothing for the user's rows."""
        key = weights_sha256(weights)
        if key not in self._golds:
            self._golds[key] = self._judged(weights) if self.is_world else []
        return self._golds[key]

    def _judged(self, weights: Weights) -> list[float]:
        self.local.learner.set_weights(weights)
        judged = judge_tasks(self.local.model, self.local.tokenizer, self.tasks, RESPONSE_LENGTH, do_sample=False)
        return [row["gold"] for row in judged]

    def losses(self, weights: Weights) -> dict[str, float]:
        """Return the held-out losses of the organisations with held-out rows."""
        key, learner = weights_sha256(weights), self.local.learner
        if key not in self._losses:
            self._losses[key] = {
                each.name: learner.held_out_loss(each.held_out, weights)
                for each in self.local.organisations
                if each.held_out
            }
        return self._losses[key]

    def accuracies(self, weights: Weights) -> dict[str, float]:
        """Return the pair accuracies of the organisations with held-out rows; nothing if rows are not pairs."""
        key, learner = weights_sha256(weights), self.local.learner
        if key not in self._accuracies:
            self._accuracies[key] = {
                each.name: learner.pair_accuracy(each.held_out, weights)
                for each in self.local.organisations
                if each.held_out and self.has_pairs
            }
        return self._accuracies[key]

    def measure(self, weights: Weights) -> Measured:
        """Return all figures of a model."""
        return Measured(self.golds(weights), self.losses(weights), self.accuracies(weights))

    def of_round(self, number: int, weights: Weights) -> dict[str, float]:
        """Return the recorded figures of a round."""
        if number % self.every and number != self.last:
            return {}
        if self.is_world:
            golds = self.golds(weights)
            return {"gold": sum(golds) / len(golds)}
        result = self.measure(weights)
        accuracy = {"pair_accuracy": result.accuracy} if result.accuracies else {}
        return {"held_out_loss": result.loss, **accuracy} if result.losses else {}


# ---- controls ----


class Controls:
    """The models to compare with, each trained once: figures measured by a stopped run are kept.

    Args:
        script_args: their selection, and number of steps.
        seed: of the order of the rows.
        local: their training, with the same trainer as the organisations.
        evaluator: measures them.
        begun: their common initial weights.
        folder: of their figures.
        identity: of this run, to distinguish it from others.
    """

    def __init__(
        self,
        script_args: FederatedArguments,
        seed: int,
        local: Local,
        evaluator: Evaluator,
        begun: Weights,
        folder: Path,
        identity: Mapping[str, object],
    ):
        self.script_args, self.seed, self.local, self.evaluator = script_args, seed, local, evaluator
        self.begun, self.file, self.digest = begun, folder / CONTROLS_FILE, identity_digest(identity)
        self.steps = script_args.rounds * script_args.local_steps

    def run(self) -> dict[str, Measured]:
        """Return the figures of all controls by their names, such as `central` and `local NAME`."""
        result, controls = self._kept(), {}
        plan: dict[str, Callable[[], Weights]] = {UNTRAINED: lambda: self.begun}
        for arm in self.script_args.arms:
            if arm == LOCAL:
                plan |= {f"{LOCAL} {each.name}": self._alone(each) for each in self.local.organisations}
            else:
                plan[arm] = self._central if arm == CENTRAL else self._equal_steps
        for name, train in plan.items():
            if name not in result:
                result[name] = self.evaluator.measure(train())
                self._keep(result)
                say(f"federated: control {name}: {figure_of(result[name])}")
            controls[name] = result[name]
        return controls

    def _alone(self, each: Tokenized) -> Callable[[], Weights]:
        def train() -> Weights:
            seed = f"{self.seed}-{each.name}"
            return self.local.learner.learn(each.rows, self.begun, 0, self.steps, seed).weights

        return train

    def _central(self) -> Weights:
        """Train on the pooled rows, on as many rows as all organisations together, in usual batches."""
        steps = self.steps * len(self.local.organisations)
        rate = schedule_of(self.local.learner.args, steps)
        rows = pooled(self.local.organisations)
        return self.local.learner.learn(rows, self.begun, 0, steps, f"{self.seed}-{CENTRAL}", rate=rate).weights

    def _equal_steps(self) -> Weights:
        """Train on the pooled rows, with as many sequential steps as an organisation, in batches of all."""
        learner = self.local.learner
        size = learner.batch_size * len(self.local.organisations)
        rows, seed = pooled(self.local.organisations), f"{self.seed}-{EQUAL_STEPS}"
        return learner.learn(rows, self.begun, 0, self.steps, seed, batch_size=size).weights

    def _kept(self) -> dict[str, Measured]:
        try:
            record = json.loads(self.file.read_text(encoding="utf-8"))
            if record["run"] != self.digest:
                return {}
            return {name: Measured(**each) for name, each in record["controls"].items()}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return {}

    def _keep(self, found: Mapping[str, Measured]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        record = {"run": self.digest, "controls": {name: asdict(each) for name, each in found.items()}}
        write_atomically(self.file, json.dumps(record) + "\n")


def figure_of(measured: Measured) -> str:
    """Return a model's main figure in words."""
    if measured.golds:
        return f"gold {measured.gold:.3f}"
    if measured.accuracies:
        return f"held-out loss {measured.loss:.3f} nats per pair, pair accuracy {measured.accuracy:.3f}"
    return f"held-out loss {measured.loss:.3f} nats per token"


def local_arms(controls: Mapping[str, Measured]) -> dict[str, Measured]:
    """Return the controls trained by a single organisation, by their names."""
    return {name.removeprefix(f"{LOCAL} "): each for name, each in controls.items() if name.startswith(f"{LOCAL} ")}


def best_local(controls: Mapping[str, Measured]) -> Measured | None:
    """Return the best model of a single organisation by its main figure."""
    alone: Sequence[Measured] = list(local_arms(controls).values())
    if not alone:
        return None
    return max(alone, key=lambda each: each.gold) if alone[0].golds else min(alone, key=lambda each: each.loss)


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


def report_of(
    script_args: FederatedArguments,
    local: Local,
    records: Sequence[RoundRecord],
    federated: Measured,
    controls: Mapping[str, Measured],
    private: Mapping[str, float],
) -> Found:
    """Return the figures, tables and plots of a federation: of a private one, none that reveals its participants.

    Args:
        private: the privacy spent by the run; empty without noise.
    """
    arms = {UNTRAINED: controls[UNTRAINED], FEDERATED: federated}
    arms |= {name: controls[name] for name in (CENTRAL, EQUAL_STEPS) if name in controls}
    alone, best = local_arms(controls), best_local(controls)
    metrics: dict[str, float] = {
        "organisations": len(local.organisations),
        "rounds": len(records),
        "trained_parameters": sum(value.numel() for value in local.learner.trained.values()),
        **(private or _of_all_rounds(records)),
        **({"row_epsilon": max(local.row_epsilons.values())} if local.row_epsilons else {}),
    }
    for name, each in {**arms, **({"local_best": best} if best else {})}.items():
        if each.golds:
            metrics |= mean_of(f"gold_{name}", each.golds)
        if each.losses:
            metrics[f"held_out_loss_{name}"] = each.loss
        if each.accuracies:
            metrics[f"pair_accuracy_{name}"] = each.accuracy
    metrics |= _ratios(federated, controls, best)
    return Found(
        metrics,
        _summary(metrics, federated, controls, best, unit_of(script_args)),
        {
            **_compared(arms, alone),
            **_by_organisation(local, federated, controls, alone, unit_of(script_args)),
            **_row_privacy(script_args, local),
            "Rounds": _rounds(records, bool(private)),
            **_named("Left out", "why", {record.number: record.left_out for record in records}),
            **_named("Bounded", "how", {record.number: record.bounded for record in records}),
        },
        {
            name: plot
            for name, plot in _plots(script_args, records, arms, best).items()
            if not private or name == "gold_by_round"
        },
    )


def _of_all_rounds(records: Sequence[RoundRecord]) -> dict[str, float]:
    return {
        "bytes_down": sum(record.bytes_down for record in records),
        "bytes_up": sum(record.bytes_up for record in records),
        "updates_left_out": sum(len(record.left_out) for record in records),
        "updates_bounded": sum(len(record.bounded) for record in records),
        "drift": sum(record.drift for record in records) / len(records),
    }


def _ratios(federated: Measured, controls: Mapping[str, Measured], best: Measured | None) -> dict[str, float]:
    """Return the ratios of the federation's gold reward to the controls'."""
    if not federated.golds:
        return {}
    others = {name: controls.get(name) for name in (CENTRAL, EQUAL_STEPS)} | {"local_best": best}
    return {f"gold_over_{name}": federated.gold / each.gold for name, each in others.items() if each and each.gold > 0}


def _summary(
    metrics: Mapping[str, float],
    federated: Measured,
    controls: Mapping[str, Measured],
    best: Measured | None,
    unit: str,
) -> str:
    if "epsilon" in metrics:
        sent, about = f"an epsilon of {metrics['epsilon']:.3g}", f" {NOT_PRIVATE}"
    else:
        sent, about = f"{megabytes(metrics['bytes_down'])} MB down and {megabytes(metrics['bytes_up'])} MB up", ""
    if "row_epsilon" in metrics:
        sent += f" and a row-level epsilon of at most {metrics['row_epsilon']:.3g}"
        about += f" {ROWS_NOT_PRIVATE}"
    others = {
        "before": controls[UNTRAINED],
        "with pooled rows": controls.get(CENTRAL),
        "with pooled rows in as few steps": controls.get(EQUAL_STEPS),
        "at best alone": best,
    }
    what = "Gold reward" if federated.golds else f"Held-out loss ({unit})"
    words = ", ".join(f"{value_of(each)} {name}" for name, each in others.items() if each is not None)
    count, rounds = metrics["organisations"], metrics["rounds"]
    return f"{what} {value_of(federated)} of {count} organisations after {rounds} rounds and {sent}; {words}.{about}"


def value_of(measured: Measured) -> str:
    """Return a model's main figure, with its error if there is one."""
    if measured.golds:
        return plus_minus(measured.gold, standard_error(measured.golds))
    return f"{measured.loss:.3f}" if measured.losses else "not measured"


def megabytes(count: float) -> str:
    """Return bytes in millions."""
    return f"{count / 1e6:,.1f}"


def _compared(arms: Mapping[str, Measured], alone: Mapping[str, Measured]) -> dict[str, list[Mapping[str, object]]]:
    if not arms[FEDERATED].golds:
        return {}
    named = {LABELS[name]: each for name, each in arms.items()} | {
        f"{name} alone": each for name, each in alone.items()
    }
    rows = [
        {"model": name, "gold": each.gold, "±": standard_error(each.golds) or "", "n": len(each.golds)}
        for name, each in named.items()
    ]
    return {"Gold reward of greedy answers to held-out questions": rows}


def unit_of(script_args: FederatedArguments) -> str:
    """Return the unit of losses."""
    return "nats per pair" if script_args.has_pairs else "nats per token"


def _by_organisation(
    local: Local, federated: Measured, controls: Mapping[str, Measured], alone: Mapping[str, Measured], unit: str
) -> dict[str, list[Mapping[str, object]]]:
    """Return tables of losses and, of reward models, accuracies, of each organisation on its own held-out rows."""
    columns = {"before": controls[UNTRAINED], "federated": federated}
    columns |= {LABELS[name]: controls[name] for name in (CENTRAL, EQUAL_STEPS) if name in controls}

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

    losses = {f"Held-out loss by organisation ({unit})": table(lambda measured: measured.losses)}
    if not federated.accuracies:
        return losses
    return losses | {"Accuracy on held-out pairs by organisation": table(lambda measured: measured.accuracies)}


def _row_privacy(script_args: FederatedArguments, local: Local) -> dict[str, list[Mapping[str, object]]]:
    rows = [
        {"organisation": each.name, "rows": len(each.rows), "epsilon": local.row_epsilons[each.name]}
        for each in local.organisations
        if each.name in local.row_epsilons
    ]
    return {f"What all rounds reveal of one row (delta {script_args.delta:g})": rows} if rows else {}


def _rounds(records: Sequence[RoundRecord], is_private: bool) -> list[Mapping[str, object]]:
    selected = [record for record in records if record.evaluation] or list(records)
    selected = selected[:: -(-len(selected) // SHOWN_ROUNDS)]
    return [
        {
            "round": record.number,
            **({} if is_private else {"organisations": len(record.participants) - len(record.left_out)}),
            **({} if is_private else {"MB so far": round(bytes_until(records, record.number) / 1e6, 2)}),
            "norm of the mean": record.update_norm,
            **({} if is_private else {"drift": record.drift}),
            **record.evaluation,
        }
        for record in selected
    ]


def _named(
    title: str, column: str, by_round: Mapping[int, Mapping[str, str]]
) -> dict[str, list[Mapping[str, object]]]:
    rows = [
        {"round": number, "organisation": name, column: what}
        for number, named in by_round.items()
        for name, what in named.items()
    ]
    return {title: rows} if rows else {}


def bytes_until(records: Sequence[RoundRecord], number: int) -> int:
    """Return the bytes both ways of the first rounds."""
    return sum(record.bytes_down + record.bytes_up for record in records[:number])


def _plots(
    script_args: FederatedArguments,
    records: Sequence[RoundRecord],
    arms: Mapping[str, Measured],
    best: Measured | None,
) -> dict[str, Plot]:
    name = "gold" if script_args.is_world else "held_out_loss"
    ylabel = "gold reward" if script_args.is_world else f"held-out loss ({unit_of(script_args)})"
    measured = [record for record in records if name in record.evaluation]
    values = [record.evaluation[name] for record in measured]
    numbers = [float(record.number) for record in measured]
    sent = [bytes_until(records, record.number) / 1e6 for record in measured]
    others = {LABELS[arm]: each for arm, each in arms.items() if arm != FEDERATED}
    others |= {"best alone": best} if best else {}

    def over(places: list[float], xlabel: str, title: str) -> Plot:
        ends = [min(places, default=0.0), max(places, default=1.0)]
        level = {label: each.gold if script_args.is_world else each.loss for label, each in others.items()}
        lines = {"federated": (places, values), **{label: (ends, [value] * 2) for label, value in level.items()}}
        return Plot(title=title, xlabel=xlabel, ylabel=ylabel, lines=lines, is_share=script_args.is_world)

    rounds = [float(record.number) for record in records]
    return {
        "gold_by_round": over(numbers, "rounds", "What the rounds give"),
        "gold_by_bytes": over(sent, "megabytes, both ways, all organisations", "What the bytes give"),
        "drift": Plot(
            title="How far organisations move apart",
            xlabel="rounds",
            ylabel="distance to the mean change, over its norm",
            lines={"drift": (rounds, [record.drift for record in records])},
        ),
    }
