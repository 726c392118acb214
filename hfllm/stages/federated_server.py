"""The server's side of a federation by its flags: transport, optimizer, what updates are added to, privacy."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hfllm.federation.privacy import ClippedSum, check_budget, epsilon_of, noise_to_signal
from hfllm.federation.rounds import (
    STATE_FILE,
    RobustSum,
    RoundRecord,
    ServerOptimizer,
    Sum,
    WeightedSum,
    expected_participants,
    num_asked,
    server_optimizer,
)
from hfllm.federation.transports import InProcess, SeveralProcesses, Transport
from hfllm.federation.updates import Expected
from hfllm.outputs.report import write_atomically
from hfllm.runs.command_line import given_names, say
from hfllm.stages.federated import MEAN, FederatedArguments, round_settings, terms_of
from hfllm.stages.federated_clients import KEPT, WORKER, clients_of
from hfllm.stages.federated_data import Local

if TYPE_CHECKING:
    from trl import ModelConfig, SFTConfig

# Under the output folder: weights, updates and logs of the processes, and the flags that they read.
PROCESSES = "processes"
Connect = Callable[[str], Transport]


def optimizer(script_args: FederatedArguments) -> ServerOptimizer:
    """Return the server's optimizer.

    Raises:
        InputError: for settings that it does not take.
    """
    return server_optimizer(
        script_args.server_optimizer, script_args.server_learning_rate, script_args.server_momentum
    )


@contextmanager
def transport(
    script_args: FederatedArguments,
    training_args: "SFTConfig",
    model_args: "ModelConfig",
    local: Local,
    connect: Connect | None = None,
) -> Iterator[Transport]:
    """Yield what carries weights and updates, until the rounds have ended.

    Args:
        connect: reaches organisations on other machines, given the base model's sha256.
    """
    if script_args.noise_multiplier > 0:
        values = sum(value.numel() for value in local.learner.trained.values())
        asked = expected_participants(len(local.organisations), script_args.participation)
        ratio = noise_to_signal(values, script_args.noise_multiplier, asked)
        say(
            f"federated: the noise on {values:,} values is {ratio:.3g} times the longest mean of {asked} organisations"
        )
    if not Path(training_args.output_dir, STATE_FILE).exists():
        # What organisations kept in a run whose rounds were removed is of no use to this one.
        shutil.rmtree(Path(training_args.output_dir, KEPT), ignore_errors=True)
    with _carrier(script_args, training_args, model_args, local, connect) as carrier:
        length = local.learner.args.max_length
        rows = script_args.local_steps * local.learner.batch_size
        carrier.max_tokens = None if length is None else rows * length
        if script_args.row_clip_norm is not None:
            # Organisations count alike.
            carrier.max_tokens = 1
        carrier.terms = terms_of(script_args, training_args)
        yield carrier


@contextmanager
def _carrier(
    script_args: FederatedArguments,
    training_args: "SFTConfig",
    model_args: "ModelConfig",
    local: Local,
    connect: Connect | None,
) -> Iterator[Transport]:
    compression = script_args.compression
    if connect is not None:
        yield connect(local.base_sha256)
        return
    if script_args.processes == 1:
        clients = clients_of(script_args, training_args.seed, training_args.output_dir, local)
        yield InProcess(clients, local.base_sha256, compression)
        return
    folder = Path(training_args.output_dir, PROCESSES)
    folder.mkdir(parents=True, exist_ok=True)
    flags = folder / "flags.yaml"
    write_atomically(flags, json.dumps(given_flags(script_args, training_args, model_args), indent=2) + "\n")
    settings = {"flags": str(flags), "base": model_args.model_name_or_path}
    every = {each.name: settings for each in local.organisations}
    kinds = {"max_parallel": script_args.processes, "compression": compression}
    with SeveralProcesses(WORKER, every, folder, local.base_sha256, script_args.round_timeout, **kinds) as processes:
        yield processes


def given_flags(*parsed: Any) -> dict[str, Any]:
    """Return the flags that the user gave as values that a file of flags may hold: the rest are defaults by them."""
    names = given_names(*parsed) or ()
    values = {name: getattr(group, name) for group in parsed for name in names if hasattr(group, name)}
    values |= {"output_dir": next(group.output_dir for group in parsed if hasattr(group, "output_dir"))}
    values = {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}
    dictionaries = {name: json.dumps(value) for name, value in values.items() if isinstance(value, dict)}
    return values | dictionaries


def new_sum(
    script_args: FederatedArguments, base_sha256: str, begun: Mapping[str, Tensor], count: int, number: int
) -> Sum:
    """Return what the updates of a round are added to.

    Args:
        begun: weights, for their names and shapes.
        count: of all organisations.
        number: of the round.
    """
    if script_args.clip_norm is None:
        expected = Expected.of(begun, base_sha256)
        if script_args.aggregation == MEAN and not script_args.max_norm_ratio:
            # Updates are added as they come, and none is held in memory.
            return WeightedSum(expected)
        return RobustSum(expected, script_args.aggregation, script_args.trim, script_args.max_norm_ratio)
    participants = num_asked(count, round_settings(script_args, 0))
    return ClippedSum(script_args.clip_norm, script_args.noise_multiplier, participants, begun, base_sha256)


def check(script_args: FederatedArguments) -> dict[str, float]:
    """Return what the run spends of privacy; refuse settings of the server, and a run that would spend too much.

    Raises:
        InputError: with the number of organisations or rounds that would spend no more than `--max_epsilon`.
    """
    optimizer(script_args)
    if script_args.noise_multiplier == 0:
        return {}
    count = script_args.count
    asked = expected_participants(count, script_args.participation)
    about = (script_args.rounds, script_args.noise_multiplier, script_args.delta)
    if script_args.max_epsilon is not None:
        return {"epsilon": check_budget(count, asked, *about, script_args.max_epsilon)}
    rounds, noise, delta = about
    return {"epsilon": epsilon_of(asked / count, noise, rounds, delta)}


def announce(num_rounds: int, record: RoundRecord) -> None:
    """Print what came of a round."""
    figures = "".join(f"  {name} {value:.3f}" for name, value in record.evaluation.items())
    left_out = "".join(f"\n  left out: {name}: {why}" for name, why in record.left_out.items())
    left_out += "".join(f"\n  bounded: {name}: {how}" for name, how in record.bounded.items())
    took_part = len(record.participants) - len(record.left_out)
    sent = (record.bytes_down + record.bytes_up) / 1e6
    # A private round tells nobody who took part.
    open_to_all = f"organisations {took_part}  drift {record.drift:.2f}  MB {sent:.2f}" if sent else "private"
    say(f"round {record.number}/{num_rounds}  {open_to_all}{figures}{left_out}")
