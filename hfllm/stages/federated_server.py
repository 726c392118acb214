"""The server's side of a federation by its flags: transport, optimizer, what updates are added to, privacy."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from hfllm.federation.averaging import WeightedSum
from hfllm.federation.rounds import RoundRecord, Rounds, Sum
from hfllm.federation.server_optimizers import ServerOptimizer, server_optimizer
from hfllm.federation.updates import Expected, Failure, Update
from hfllm.runs.command_line import say
from hfllm.stages.federated import FederatedArguments
from hfllm.stages.federated_clients import Train, clients_of
from hfllm.stages.federated_data import Local

if TYPE_CHECKING:
    from trl import ModelConfig, SFTConfig


def optimizer(script_args: FederatedArguments) -> ServerOptimizer:
    """Return the server's optimizer.

    Raises:
        InputError: for settings that it does not take.
    """
    return server_optimizer(
        script_args.server_optimizer, script_args.server_learning_rate, script_args.server_momentum
    )


class InProcess:
    """Trains the participants one after another in this process."""

    def __init__(self, clients: Mapping[str, Train]):
        self.clients = clients

    def run_round(
        self, number: int, weights: Mapping[str, Tensor], participants: Sequence[str]
    ) -> Iterator[Update | Failure]:
        for name in participants:
            yield self.clients[name](number, weights)


@contextmanager
def transport(
    script_args: FederatedArguments,
    training_args: "SFTConfig",
    model_args: "ModelConfig",
    local: Local,
    begun: Mapping[str, Tensor],
) -> Iterator[Rounds]:
    """Yield what carries weights and updates, until the rounds have ended."""
    yield InProcess(clients_of(script_args, training_args.seed, training_args.output_dir, local))


def new_sum(
    script_args: FederatedArguments, seed: int, base_sha256: str, begun: Mapping[str, Tensor], number: int
) -> Sum:
    """Return what the updates of a round are added to."""
    return WeightedSum(Expected.of(begun, base_sha256))


def privacy(script_args: FederatedArguments) -> dict[str, float]:
    """Return what the run spends of privacy, and refuse one that would spend too much.

    Raises:
        InputError: with the number of organisations or rounds that would spend no more than `--max_epsilon`.
    """
    return {}


def announce(num_rounds: int, record: RoundRecord) -> None:
    """Print what came of a round."""
    figures = "".join(f"  {name} {value:.3f}" for name, value in record.evaluation.items())
    left_out = "".join(f"\n  left out: {name}: {why}" for name, why in record.left_out.items())
    took_part = len(record.participants) - len(record.left_out)
    say(
        f"round {record.number}/{num_rounds}  organisations {took_part}  drift {record.drift:.2f}  "
        f"MB {(record.bytes_down + record.bytes_up) / 1e6:.2f}{figures}{left_out}"
    )
