"""The learners and the server of a federation: answers to rounds, processes, Flower's apps."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import Enum
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hfllm.errors import InputError
from hfllm.federation.learner import KeptStates, LocalLearner, folder_name
from hfllm.federation.lora import freeze_a
from hfllm.federation.organisations import Organisation
from hfllm.federation.privacy import (
    AnsweredRounds,
    ClippedSum,
    RowPrivacy,
    check_budget,
    epsilon_of,
    noise_to_signal,
)
from hfllm.federation.rounds import (
    STATE_FILE,
    RobustSum,
    RoundRecord,
    ServerOptimizer,
    Sum,
    WeightedSum,
    server_optimizer,
)
from hfllm.federation.settings import expected_participants, num_asked
from hfllm.federation.transports import InProcess, Learner, SeveralProcesses, Transport
from hfllm.federation.updates import ErrorFeedback, Expected, Update, changes, weights_sha256
from hfllm.flags import given_names
from hfllm.outputs.report import write_atomically
from hfllm.runs.arguments import changed
from hfllm.runs.command_line import say
from hfllm.runs.models import fitting_length, load_to_train, peft_config
from hfllm.runs.recipes import load_recipe
from hfllm.stages.federated import flags as federated_flags
from hfllm.stages.federated.flags import (
    FROZEN_A,
    MEAN,
    NOT_OF_THE_ROUNDS,
    NOTHING,
    FederatedArguments,
    Tokenized,
    adapted,
    check_one_each,
    organisation_names,
    organisation_of_file,
    organisations_of,
    round_settings,
    row_epsilons,
    row_privacy_of,
    terms_of,
    tokenized,
    tokenized_pairs,
)
from hfllm.trainers.engines import schedule_of
from hfllm.trainers.trl_trainers import SFTTrainer

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import ModelConfig, SFTConfig


# ---- flower ----
#
# The recipe between machines: the functions that Flower's apps run at the server and at the organisations.
#
#     python -m hfllm.federation.flower_app app --num_organisations 3 --loop hfllm.stages.federated.build:loop \
#         --learner hfllm.stages.federated.build:worker_learner
#
# The run's `flags` name the server's file of flags, with `organisation_names` and `controls: none`; the settings of
# every node name its own: `{"flags": "federated.yaml", "base": "my-model", "rows": "rows.jsonl"}`.
# docs/guides/federation.md has all commands.


def loop(connect: Callable[[str], Transport], config: Mapping[str, object]) -> None:
    """Run the recipe at the server, over Flower's transport.

    Args:
        connect: builds the transport from the base model's sha256.
        config: of the run; `flags` is a file of the recipe's flags.
    """
    if not config.get("flags"):
        raise InputError('the run names no file of flags: expected flags="federated.yaml" in its settings')
    recipe = load_recipe("federated")
    parsed = recipe.parse(["--config", str(config["flags"])])
    if (compression := str(config.get("compression", "none"))) not in ("none", parsed[0].compression):
        raise InputError(
            f"--compression {compression} of the app, {parsed[0].compression} of {config['flags']}: expected the same"
        )
    recipe.main(*parsed, connect=connect)


# ---- what trains ----


@dataclass(frozen=True)
class Local:
    """The training in this process: the learner, and the sha256 of its initial and fixed weights.

    `row_epsilons` is the privacy loss of one row by organisation; empty without noise on rows.
    """

    learner: LocalLearner
    tokenizer: "PreTrainedTokenizerBase"
    base_sha256: str
    organisations: Sequence[Tokenized]
    row_epsilons: Mapping[str, float] = field(default_factory=dict)

    @property
    def model(self) -> "PreTrainedModel":
        """The model."""
        return self.learner.model


def load_local(
    script_args: FederatedArguments,
    training_args: "SFTConfig",
    model_args: "ModelConfig",
    organisations: Sequence[Organisation],
) -> Local:
    """Load the model, put the adapter on it, and build the trainer with the organisations' loss."""
    from datasets import Dataset
    from transformers import set_seed

    from hfllm.stages.sft import build as sft

    # Of rows of the embeddings added by a template.
    set_seed(training_args.seed)
    trained_args, has_pairs = adapted(script_args, model_args), script_args.has_pairs
    if has_pairs:
        model, tokenizer = federated_flags.load_scorer(training_args, trained_args)
    else:
        loaded = load_to_train(trained_args, training_args.output_dir)
        model, tokenizer = sft.with_template(training_args, *loaded)
    base = weights_sha256(dict(model.named_parameters()))
    args = changed(training_args, max_length=fitting_length(training_args.max_length, model))
    result = (tokenized_pairs if has_pairs else tokenized)(organisations, tokenizer, args)
    if script_args.row_clip_norm is not None:
        check_one_each(result)
    epsilons = row_epsilons(script_args, args, result)
    # Of the adapter's first weights: the same at every organisation, regardless of earlier draws.
    set_seed(training_args.seed)
    torch.manual_seed(training_args.seed)
    adapter = peft_config(trained_args, "SEQ_CLS" if has_pairs else "CAUSAL_LM")
    if has_pairs:
        trainer = federated_flags.reward_trainer(model, args, result[0].rows, tokenizer, adapter)
    else:
        trainer = SFTTrainer(
            model=model,
            args=changed(args, **sft.trained_as_they_are(args)),
            train_dataset=Dataset.from_list(list(result[0].rows[:1]) or [NOTHING]),
            processing_class=tokenizer,
            peft_config=adapter,
        )
    if script_args.average == FROZEN_A:
        freeze_a(trainer.model)
    if adapter is not None:
        base = _with_adapter(base, trainer.model, adapter)
    steps = script_args.rounds * script_args.local_steps
    learner = LocalLearner(trainer, schedule_of(trainer.args, steps), script_args.proximal_mu)
    return Local(learner, tokenizer, base, result, epsilons)


def _with_adapter(base_sha256: str, model: nn.Module, adapter: "LoraConfig") -> str:
    """Return the sha256 of the base model and the adapter's fixed parts: if these differ, the mean is wrong.

    The fixed parts are the factors with their initial drawn values, and the scale of the product.
    """
    frozen = {name: value for name, value in model.named_parameters() if "lora_" in name and not value.requires_grad}
    scale = f"{adapter.lora_alpha} {adapter.use_rslora}"
    return sha256(f"{base_sha256} {weights_sha256(frozen)} {scale}".encode()).hexdigest()


# ---- clients ----
#
# The work of an organisation in a round: train from the received weights, and return the change.


# Under the output folder: states kept by organisations from round to round, and never sent.
KEPT = "organisations"
OPTIMIZERS, ROUNDING = f"{KEPT}/optimizers", f"{KEPT}/rounding"
# Next to it: everyone's last private answer, kept beyond the rounds, and its dependencies besides the flags.
ANSWERS = "answered"
ANSWERED = ("learning_rate", "optim", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length")
WORKER = "hfllm.stages.federated.build:worker_learner"


def clients_of(script_args: FederatedArguments, seed: int, output_dir: str, local: Local) -> dict[str, Learner]:
    """Return the function by organisation that trains it here, given the round's number and the weights."""
    states = KeptStates(Path(output_dir, OPTIMIZERS)) if script_args.keep_optimizer else None
    rounding = KeptStates(Path(output_dir, ROUNDING)) if script_args.compression == "int8" else None
    privacy = row_privacy_of(script_args)
    clients = {
        each.name: _client(each, local, script_args.local_steps, seed, states, rounding, privacy)
        for each in local.organisations
    }
    if not local.row_epsilons:
        return clients
    settings = {**asdict(script_args), "seed": seed, **{name: getattr(local.learner.args, name) for name in ANSWERED}}
    settings = {name: value for name, value in settings.items() if name not in NOT_OF_THE_ROUNDS}
    description = json.dumps({**settings, "base": local.base_sha256}, sort_keys=True, default=str)
    folder, num_rows = Path(output_dir, ANSWERS), {each.name: len(each.rows) for each in local.organisations}
    return {
        name: _answering_once(
            name,
            client,
            AnsweredRounds(
                folder / f"{folder_name(name)}.safetensors",
                script_args.rounds,
                sha256(f"{description} {num_rows[name]}".encode()).hexdigest(),
            ),
            description,
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
        # The numbers of drawn rows and of their tokens have no noise: organisations have equal weight.
        counts = (learned.num_tokens, learned.num_rows) if privacy is None else (1, 1)
        update = Update(each.name, change, *counts, local.base_sha256)
        # A diverged state is not sent, and must not be the start of the next round.
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
    """Return a learner that trains a round once: asked again, it sends the same update with the same noise."""

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
    """Return the learner of one organisation in its own process.

    It reads only the organisation's own file. Only rows dealt out of one dataset, or drawn from the embedded world,
    are dealt or drawn for all before it takes its own.

    Args:
        organisation: its name.
        settings: `flags`, a file of the recipe's flags; `base`, its initial model; `rows`, its file, if not given
            by the flags; `terms` of the server's run, required to equal the terms of the flags.
    """
    script_args, training_args, model_args = load_recipe("federated").parse(["--config", settings["flags"]])
    check_terms(script_args, training_args, settings.get("terms") or {})
    seed = training_args.seed
    try:
        own = _own_rows(script_args, organisation, settings.get("rows"), seed)
    except InputError as error:
        # Errors are sent to the server, and this one may contain words of a row.
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
    """Refuse the request of a server with other terms of its run than this organisation's flags."""
    own = terms_of(script_args, training_args)
    for name, value in terms.items():
        if own.get(name) != value:
            raise InputError(f"--{name} is {own.get(name)} here and {value} at the server: both need the same flags")


# ---- server ----
#
# The server's side of a federation by its flags: transport, optimizer, sum of updates, privacy.


# Under the output folder: weights, updates and logs of the processes, and their flags.
PROCESSES = "processes"
Connect = Callable[[str], Transport]


def optimizer(script_args: FederatedArguments) -> ServerOptimizer:
    """Return the server's optimizer."""
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
    """Yield the transport of weights and updates, until the rounds have ended.

    Args:
        connect: reaches organisations on other machines, given the base model's sha256.
    """
    if script_args.noise_multiplier > 0:
        values = sum(value.numel() for value in local.learner.trained.values())
        expected = expected_participants(len(local.organisations), script_args.participation)
        ratio = noise_to_signal(values, script_args.noise_multiplier, expected)
        say(
            f"federated: the noise on {values:,} values is {ratio:.3g} times the longest mean of {expected} "
            "organisations"
        )
    if not Path(training_args.output_dir, STATE_FILE).exists():
        # The organisations' states from a run with removed rounds are of no use to this one.
        shutil.rmtree(Path(training_args.output_dir, KEPT), ignore_errors=True)
    with _carrier(script_args, training_args, model_args, local, connect) as carrier:
        length = local.learner.args.max_length
        rows = script_args.local_steps * local.learner.batch_size
        carrier.max_tokens = None if length is None else rows * length
        if script_args.row_clip_norm is not None:
            # Organisations have equal weight.
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
    """Return the user's flags as values for a file of flags: the rest are defaults derived from them."""
    names = given_names(*parsed) or ()
    values = {name: getattr(group, name) for group in parsed for name in names if hasattr(group, name)}
    values |= {"output_dir": next(group.output_dir for group in parsed if hasattr(group, "output_dir"))}
    values = {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}
    dictionaries = {name: json.dumps(value) for name, value in values.items() if isinstance(value, dict)}
    return values | dictionaries


def new_sum(
    script_args: FederatedArguments, base_sha256: str, begun: Mapping[str, Tensor], count: int, number: int
) -> Sum:
    """Return the sum to add the updates of a round to.

    Args:
        begun: weights, for their names and shapes.
        count: number of all organisations.
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
    """Return the privacy spent by the run; refuse settings of the server, and a run that would spend too much."""
    optimizer(script_args)
    if script_args.noise_multiplier == 0:
        return {}
    count = script_args.count
    expected = expected_participants(count, script_args.participation)
    about = (script_args.rounds, script_args.noise_multiplier, script_args.delta)
    if script_args.max_epsilon is not None:
        return {"epsilon": check_budget(count, expected, *about, script_args.max_epsilon)}
    rounds, noise, delta = about
    return {"epsilon": epsilon_of(expected / count, noise, rounds, delta)}


def announce(num_rounds: int, record: RoundRecord) -> None:
    """Print the results of a round."""
    figures = "".join(f"  {name} {value:.3f}" for name, value in record.evaluation.items())
    left_out = "".join(f"\n  left out: {name}: {why}" for name, why in record.left_out.items())
    left_out += "".join(f"\n  bounded: {name}: {how}" for name, how in record.bounded.items())
    took_part = len(record.participants) - len(record.left_out)
    sent = (record.bytes_down + record.bytes_up) / 1e6
    # A private round does not reveal its participants.
    open_to_all = f"organisations {took_part}  drift {record.drift:.2f}  MB {sent:.2f}" if sent else "private"
    say(f"round {record.number}/{num_rounds}  {open_to_all}{figures}{left_out}")
