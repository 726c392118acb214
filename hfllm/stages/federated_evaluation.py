"""What a federation gave: its model beside those of pooled rows and of each organisation alone."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from hfllm.data.world.world import World
from hfllm.evaluation.judged import judge_tasks
from hfllm.federation.rounds import identity_digest
from hfllm.federation.updates import weights_sha256
from hfllm.outputs.report import write_atomically
from hfllm.runs.command_line import say
from hfllm.stages.federated import CENTRAL, EQUAL_STEPS, LOCAL, FederatedArguments
from hfllm.stages.federated_data import Local, Tokenized, pooled

CONTROLS_FILE = "controls.json"
# The longest answer to a question of the world, in tokens.
RESPONSE_LENGTH = 40
UNTRAINED, FEDERATED = "untrained", "federated"

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Measured:
    """Figures of one model.

    Args:
        golds: gold reward of its greedy answer to each held-out question of the world; none for rows of the user.
        losses: held-out loss of each organisation that holds rows out, in nats per token or pair.
        accuracies: of reward models, the share of its held-out pairs that have the right order.
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
    """Measures models on the world's held-out questions, and on the rows that organisations hold out."""

    def __init__(self, script_args: FederatedArguments, local: Local):
        self.local, self.is_world, self.has_pairs = local, script_args.is_world, script_args.has_pairs
        self.every, self.last = script_args.eval_rounds, script_args.rounds
        self.tasks = World(script_args.world_seed).evaluation_tasks(script_args.num_eval_prompts)
        # Those of the last round are asked for twice.
        self._golds: dict[str, list[float]] = {}
        self._losses: dict[str, dict[str, float]] = {}
        self._accuracies: dict[str, dict[str, float]] = {}

    def golds(self, weights: Weights) -> list[float]:
        """Return the gold reward of each greedy answer; nothing for rows of the user."""
        key = weights_sha256(weights)
        if key not in self._golds:
            self._golds[key] = self._judged(weights) if self.is_world else []
        return self._golds[key]

    def _judged(self, weights: Weights) -> list[float]:
        self.local.learner.set_weights(weights)
        judged = judge_tasks(self.local.model, self.local.tokenizer, self.tasks, RESPONSE_LENGTH, do_sample=False)
        return [row["gold"] for row in judged]

    def losses(self, weights: Weights) -> dict[str, float]:
        """Return the held-out loss of each organisation that holds rows out."""
        key, learner = weights_sha256(weights), self.local.learner
        if key not in self._losses:
            self._losses[key] = {
                each.name: learner.held_out_loss(each.held_out, weights)
                for each in self.local.organisations
                if each.held_out
            }
        return self._losses[key]

    def accuracies(self, weights: Weights) -> dict[str, float]:
        """Return the pair accuracy of each organisation that holds rows out; nothing where rows are no pairs."""
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
        """Return the figures that are kept of a round."""
        if number % self.every and number != self.last:
            return {}
        if self.is_world:
            golds = self.golds(weights)
            return {"gold": sum(golds) / len(golds)}
        found = self.measure(weights)
        accuracy = {"pair_accuracy": found.accuracy} if found.accuracies else {}
        return {"held_out_loss": found.loss, **accuracy} if found.losses else {}


# ---- controls ----


class Controls:
    """The models to compare with, each trained once: what a run that was stopped has measured is kept.

    Args:
        script_args: which of them, and how many steps.
        seed: of the order of the rows.
        local: what trains them, with the same trainer as the organisations.
        evaluator: measures them.
        begun: the weights that all of them begin from.
        folder: where their figures are kept.
        identity: what tells this run from others.
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
        found, made = self._kept(), {}
        plan: dict[str, Callable[[], Weights]] = {UNTRAINED: lambda: self.begun}
        for arm in self.script_args.arms:
            if arm == LOCAL:
                plan |= {f"{LOCAL} {each.name}": self._alone(each) for each in self.local.organisations}
            else:
                plan[arm] = self._central if arm == CENTRAL else self._equal_steps
        for name, train in plan.items():
            if name not in found:
                found[name] = self.evaluator.measure(train())
                self._keep(found)
                say(f"federated: control {name}: {figure_of(found[name])}")
            made[name] = found[name]
        return made

    def _alone(self, each: Tokenized) -> Callable[[], Weights]:
        def train() -> Weights:
            seed = f"{self.seed}-{each.name}"
            return self.local.learner.learn(each.rows, self.begun, 0, self.steps, seed).weights

        return train

    def _central(self) -> Weights:
        """Train on the pooled rows, as many rows as all organisations together have learned, in usual batches."""
        from hfllm.stages.federated_learner import schedule_of

        steps = self.steps * len(self.local.organisations)
        rate = schedule_of(self.local.learner.args, steps)
        rows = pooled(self.local.organisations)
        return self.local.learner.learn(rows, self.begun, 0, steps, f"{self.seed}-{CENTRAL}", rate=rate).weights

    def _equal_steps(self) -> Weights:
        """Train on the pooled rows, as many steps one after another as an organisation takes, in batches of all."""
        learner = self.local.learner
        size = learner.batch_size * len(self.local.organisations)
        rows, seed = pooled(self.local.organisations), f"{self.seed}-{EQUAL_STEPS}"
        return learner.learn(rows, self.begun, 0, self.steps, seed, batch_size=size).weights

    def _kept(self) -> dict[str, Measured]:
        try:
            kept = json.loads(self.file.read_text(encoding="utf-8"))
            if kept["run"] != self.digest:
                return {}
            return {name: Measured(**each) for name, each in kept["controls"].items()}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return {}

    def _keep(self, found: Mapping[str, Measured]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        kept = {"run": self.digest, "controls": {name: asdict(each) for name, each in found.items()}}
        write_atomically(self.file, json.dumps(kept) + "\n")


def figure_of(measured: Measured) -> str:
    """Return a model's main figure in words."""
    if measured.golds:
        return f"gold {measured.gold:.3f}"
    if measured.accuracies:
        return f"held-out loss {measured.loss:.3f} nats per pair, pair accuracy {measured.accuracy:.3f}"
    return f"held-out loss {measured.loss:.3f} nats per token"


def local_arms(controls: Mapping[str, Measured]) -> dict[str, Measured]:
    """Return the controls that are organisations alone, by their names."""
    return {name.removeprefix(f"{LOCAL} "): each for name, each in controls.items() if name.startswith(f"{LOCAL} ")}


def best_local(controls: Mapping[str, Measured]) -> Measured | None:
    """Return the organisation alone whose model is best by its main figure."""
    alone: Sequence[Measured] = list(local_arms(controls).values())
    if not alone:
        return None
    return max(alone, key=lambda each: each.gold) if alone[0].golds else min(alone, key=lambda each: each.loss)
