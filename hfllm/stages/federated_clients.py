"""What an organisation does in a round: train from the weights that it receives, and return what that changed."""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from hfllm.federation.updates import Update, changes
from hfllm.stages.federated import FederatedArguments
from hfllm.stages.federated_data import Local, Tokenized
from hfllm.stages.federated_learner import KeptStates

Train = Callable[[int, Mapping[str, Tensor]], Update]
# Under the output folder.
STATES = "organisations"


def clients_of(script_args: FederatedArguments, seed: int, output_dir: str, local: Local) -> dict[str, Train]:
    """Return of each organisation what trains it in this process, given the round's number and the weights."""
    kept = KeptStates(Path(output_dir, STATES)) if script_args.keep_optimizer else None
    return {each.name: _client(each, local, script_args.local_steps, seed, kept) for each in local.organisations}


def _client(each: Tokenized, local: Local, steps: int, seed: int, kept: KeptStates | None) -> Train:
    learner = local.learner

    def train(number: int, weights: Mapping[str, Tensor]) -> Update:
        state = kept.load(each.name, number) if kept is not None else None
        first = (number - 1) * steps
        learned = learner.learn(each.rows, weights, first, steps, f"{seed}-{each.name}", state)
        if kept is not None:
            kept.save(each.name, number, learner.optimizer_state())
        change = changes(learned.weights, weights)
        return Update(each.name, change, learned.num_tokens, learned.num_rows, local.base_sha256)

    return train
