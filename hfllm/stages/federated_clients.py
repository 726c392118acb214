"""What an organisation does in a round: train from the weights that it receives, and return what that changed."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hfllm.errors import InputError
from hfllm.federation.organisations import Organisation
from hfllm.federation.privacy import AnsweredRounds, RowPrivacy
from hfllm.federation.transports import Learner
from hfllm.federation.updates import ErrorFeedback, Update, changes, weights_sha256
from hfllm.runs.command_line import say
from hfllm.stages.federated import (
    NOT_OF_THE_ROUNDS,
    FederatedArguments,
    organisation_names,
    row_epsilons,
    row_privacy_of,
    terms_of,
)
from hfllm.stages.federated_data import Local, Tokenized, load_local, organisation_of_file, organisations_of
from hfllm.stages.federated_learner import KeptStates, folder_name

if TYPE_CHECKING:
    from trl import SFTConfig

# Under the output folder: what organisations keep from round to round, and never send.
KEPT = "organisations"
OPTIMIZERS, ROUNDING = f"{KEPT}/optimizers", f"{KEPT}/rounding"
# Beside it: the last private answer of each, which outlives the rounds, and what it depends on besides the flags.
ANSWERS = "answered"
ANSWERED = ("learning_rate", "optim", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length")
WORKER = "hfllm.stages.federated_clients:worker_learner"


def clients_of(script_args: FederatedArguments, seed: int, output_dir: str, local: Local) -> dict[str, Learner]:
    """Return of each organisation what trains it in this process, given the round's number and the weights."""
    kept = KeptStates(Path(output_dir, OPTIMIZERS)) if script_args.keep_optimizer else None
    rounding = KeptStates(Path(output_dir, ROUNDING)) if script_args.compression == "int8" else None
    privacy = row_privacy_of(script_args)
    clients = {
        each.name: _client(each, local, script_args.local_steps, seed, kept, rounding, privacy)
        for each in local.organisations
    }
    if not local.row_epsilons:
        return clients
    settings = {**asdict(script_args), "seed": seed, **{name: getattr(local.learner.args, name) for name in ANSWERED}}
    settings = {name: value for name, value in settings.items() if name not in NOT_OF_THE_ROUNDS}
    asked = json.dumps({**settings, "base": local.base_sha256}, sort_keys=True, default=str)
    folder, num_rows = Path(output_dir, ANSWERS), {each.name: len(each.rows) for each in local.organisations}
    return {
        name: _answering_once(
            name,
            client,
            AnsweredRounds(
                folder / f"{folder_name(name)}.safetensors",
                script_args.rounds,
                sha256(f"{asked} {num_rows[name]}".encode()).hexdigest(),
            ),
            asked,
            local.base_sha256,
        )
        for name, client in clients.items()
    }


def _client(
    each: Tokenized,
    local: Local,
    steps: int,
    seed: int,
    kept: KeptStates | None,
    rounding: KeptStates | None,
    privacy: RowPrivacy | None,
) -> Learner:
    learner = local.learner

    def train(number: int, weights: dict[str, Tensor]) -> Update:
        state = kept.load(each.name, number) if kept is not None else None
        first = (number - 1) * steps
        learned = learner.learn(each.rows, weights, first, steps, f"{seed}-{each.name}", state, privacy=privacy)
        change = changes(learned.weights, weights)
        # How many rows were drawn, and their tokens, have no noise: organisations count alike.
        counts = (learned.num_tokens, learned.num_rows) if privacy is None else (1, 1)
        update = Update(each.name, change, *counts, local.base_sha256)
        # What has diverged is not sent, and must not be what the next round begins with.
        is_whole = all(bool(torch.isfinite(value).all()) for value in change.values())
        if kept is not None and is_whole:
            kept.save(each.name, number, learner.optimizer_state())
        if rounding is not None and is_whole:
            feedback = ErrorFeedback(rounding.load(each.name, number))
            update = feedback.corrected(update)
            rounding.save(each.name, number, feedback.residual)
        return update

    return train


def _answering_once(name: str, client: Learner, answered: AnsweredRounds, asked: str, base_sha256: str) -> Learner:
    """Return what trains a round once: asked again, it sends the same update and no other noise."""

    def train(number: int, weights: dict[str, Tensor]) -> Update:
        question = sha256(f"{asked} {weights_sha256(weights)}".encode()).hexdigest()
        answer = answered.load(number, question)
        if answer is not None:
            return Update(name, answer, 1, 1, base_sha256)
        update = client(number, weights)
        answered.keep(number, question, update.tensors)
        return update

    return train


def worker_learner(organisation: str, settings: Mapping[str, Any]) -> Learner:
    """Return what trains one organisation in a process of its own.

    It reads the organisation's own file and no other. Only rows that are dealt out of one dataset, or drawn from the
    embedded world, are dealt or drawn for all before it takes its own.

    Args:
        organisation: its name.
        settings: `flags`, a file of the recipe's flags; `base`, the model that it begins from; `rows`, its file, if it
            is not one of the flags; `terms` of the server's run, which must be those of the flags.

    Raises:
        InputError: when the model cannot be loaded, or the terms are others.
    """
    from hfllm.runs.arguments import changed
    from hfllm.runs.recipes import load_recipe

    script_args, training_args, model_args = load_recipe("federated").parse(["--config", settings["flags"]])
    check_terms(script_args, training_args, settings.get("terms") or {})
    seed = training_args.seed
    try:
        own = _own_rows(script_args, organisation, settings.get("rows"), seed)
    except InputError as error:
        # Errors are sent to the server, and this one may show words of a row.
        say(f"federated: {error}")
        raise InputError(f"organisation {organisation!r}: its rows cannot be read; its own output says why") from None
    if not own or not own[0].rows:
        raise InputError(f"organisation {organisation!r} has no rows here: its settings name none by `rows`")
    row_epsilons(script_args, training_args, own)
    local = load_local(script_args, training_args, changed(model_args, model_name_or_path=settings["base"]), own)
    for name, epsilon in local.row_epsilons.items():
        say(f"federated: {name}: a row-level epsilon of {epsilon:.3g} in {script_args.rounds} rounds")
    return clients_of(script_args, seed, training_args.output_dir, local)[organisation]


def _own_rows(script_args: FederatedArguments, organisation: str, file: str | None, seed: int) -> list[Organisation]:
    names = organisation_names(script_args.organisation_files or ())
    if not file and organisation in names:
        file = script_args.organisation_files[names.index(organisation)]
    if file:
        return [organisation_of_file(script_args, organisation, file, seed)]
    return [each for each in organisations_of(script_args, seed) if each.name == organisation]


def check_terms(
    script_args: FederatedArguments, training_args: "SFTConfig", terms: Mapping[str, str | int | float]
) -> None:
    """Refuse the request of a server whose run has other terms than this organisation's flags.

    Raises:
        InputError: naming the flag and both values.
    """
    own = terms_of(script_args, training_args)
    for name, value in terms.items():
        if own.get(name) != value:
            raise InputError(f"--{name} is {own.get(name)} here and {value} at the server: both need the same flags")
