"""What an organisation does in a round: train from the weights that it receives, and return what that changed."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hfllm.errors import InputError
from hfllm.federation.compression import ErrorFeedback
from hfllm.federation.transports import Learner
from hfllm.federation.updates import Update, changes
from hfllm.stages.federated import FederatedArguments, organisation_names, terms_of
from hfllm.stages.federated_data import Local, Tokenized, load_local, organisation_of_file, organisations_of
from hfllm.stages.federated_learner import KeptStates

if TYPE_CHECKING:
    from trl import SFTConfig

# Under the output folder: what organisations keep from round to round, and never send.
KEPT = "organisations"
OPTIMIZERS, ROUNDING = f"{KEPT}/optimizers", f"{KEPT}/rounding"
WORKER = "hfllm.stages.federated_clients:worker_learner"


def clients_of(script_args: FederatedArguments, seed: int, output_dir: str, local: Local) -> dict[str, Learner]:
    """Return of each organisation what trains it in this process, given the round's number and the weights."""
    kept = KeptStates(Path(output_dir, OPTIMIZERS)) if script_args.keep_optimizer else None
    rounding = KeptStates(Path(output_dir, ROUNDING)) if script_args.compression == "int8" else None
    return {
        each.name: _client(each, local, script_args.local_steps, seed, kept, rounding) for each in local.organisations
    }


def _client(
    each: Tokenized, local: Local, steps: int, seed: int, kept: KeptStates | None, rounding: KeptStates | None
) -> Learner:
    learner = local.learner

    def train(number: int, weights: dict[str, Tensor]) -> Update:
        state = kept.load(each.name, number) if kept is not None else None
        first = (number - 1) * steps
        learned = learner.learn(each.rows, weights, first, steps, f"{seed}-{each.name}", state)
        change = changes(learned.weights, weights)
        update = Update(each.name, change, learned.num_tokens, learned.num_rows, local.base_sha256)
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
    seed, names = training_args.seed, organisation_names(script_args.organisation_files or ())
    if settings.get("rows"):
        own = [organisation_of_file(script_args, organisation, settings["rows"], seed)]
    elif organisation in names:
        file = script_args.organisation_files[names.index(organisation)]
        own = [organisation_of_file(script_args, organisation, file, seed)]
    else:
        own = [each for each in organisations_of(script_args, seed) if each.name == organisation]
    if not own or not own[0].rows:
        raise InputError(f"organisation {organisation!r} has no rows here: its settings name none by `rows`")
    local = load_local(script_args, training_args, changed(model_args, model_name_or_path=settings["base"]), own)
    return clients_of(script_args, seed, training_args.output_dir, local)[organisation]


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
