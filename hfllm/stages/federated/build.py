"""The parts of a federation: its organisations' rows, the training here, the way to it, and the server's sums."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import set_seed
from trl import RewardConfig

from hfllm.data import formats
from hfllm.data.conversations import Conversations
from hfllm.data.formats import Row, flaw_of
from hfllm.data.images.rows import refuse_images
from hfllm.data.world.world import World
from hfllm.errors import InputError, refuse_if
from hfllm.federation.learner import KeptStates, LocalLearner, Rows, folder_name
from hfllm.federation.lora import freeze_a
from hfllm.federation.organisations import (
    MOST_HELD_OUT,
    Organisation,
    check_organisations,
    dirichlet_shares,
    family_shares,
    hold_out,
    split_evenly,
    without_shared_prompts,
    world_organisations,
)
from hfllm.federation.privacy import AnsweredRounds, ClippedSum, check_budget, check_row_budget, noise_to_signal
from hfllm.federation.rounds import (
    STATE_FILE,
    FederationState,
    RobustSum,
    RoundRecord,
    ServerOptimizer,
    Sum,
    WeightedSum,
    run_rounds,
)
from hfllm.federation.settings import MEAN, Averaging, RoundSettings, expected_participants, num_asked
from hfllm.federation.transports import InProcess, Learner, SeveralProcesses, Transport
from hfllm.federation.updates import ErrorFeedback, Expected, Update, changes, weights_sha256
from hfllm.flags import Flags, changed, given_names
from hfllm.outputs.report import write_atomically
from hfllm.runs.command_line import say
from hfllm.runs.models import (
    fitting_length,
    load_scorer_to_train,
    load_to_train,
    load_tokenizer,
    named_model,
    peft_config,
)
from hfllm.runs.recipes import load_recipe
from hfllm.stages.federated.flags import FROZEN_A, FULL, REWARD, FederatedArguments, Terms
from hfllm.stages.sft.build import as_tokenized, examples, tokenization_of, with_template
from hfllm.stages.shared import kept_rows
from hfllm.trainers.engines import schedule_of
from hfllm.trainers.trl_trainers import RewardTrainer, SFTTrainer

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import ModelConfig, SFTConfig


# ---- organisations and their rows ----


def organisations_of(
    script_args: FederatedArguments, seed: int, own_file: tuple[str, str] | None = None
) -> list[Organisation]:
    """Return the organisations selected by the flags, with their rows.

    Args:
        seed: of shares, of dealing out and of holding out.
        own_file: the name and the file of the only organisation to read; by default all are read.
    """

    def mapper(origin: str, row: Row) -> Row:
        refuse_images(origin, row, "hfllm federated")
        if script_args.learner == REWARD:
            return formats.to_preference(origin, row)
        row = formats.to_sft(origin, row)
        return formats.to_be_learned(origin, formats.last_turn(row)) if script_args.loss_on == "last" else row

    def read(dataset: str) -> list[Row]:
        return kept_rows(replace(script_args.row_source, name=dataset), mapper, flaw_of)

    is_private = script_args.row_clip_norm is not None
    if own_file is not None:
        return [hold_out(own_file[0], read(own_file[1]), seed, is_private)]
    if script_args.organisation_names:
        return [Organisation(name, [], []) for name in script_args.organisation_names]
    count, alpha = script_args.num_organisations, script_args.dirichlet_alpha
    if script_args.is_world:
        world, is_even = World(script_args.world_seed), alpha is None
        shares = family_shares(count, script_args.main_share) if is_even else dirichlet_shares(count, alpha, seed)
        result = world_organisations(world, shares, script_args.num_examples, MOST_HELD_OUT, seed)
    elif script_args.organisation_files:
        result = [hold_out(name, read(file), seed, is_private) for name, file in script_args.named_files]
    else:
        parts = enumerate(split_evenly(read(script_args.dataset_name), count, alpha, seed), 1)
        result = [hold_out(f"organisation-{number}", rows, seed, is_private) for number, rows in parts]
        result = without_shared_prompts(result)
    check_organisations(result)
    return result


@dataclass(frozen=True)
class Tokenized:
    """An organisation's rows as tokens.

    Args:
        name: of the organisation.
        rows, held_out: with `input_ids` and `labels`, or `chosen_ids` and `rejected_ids`.
        num_sources: the number of source rows of the organisation's rows: one may become several, or none.
    """

    name: str
    rows: Rows
    held_out: Rows
    num_sources: int


def row_epsilons(
    terms: Terms,
    organisations: Iterable[Organisation | Tokenized],
    batch_size: int,
    delta: float,
    max_epsilon: float | None,
) -> dict[str, float]:
    """Return the privacy loss of one row by organisation with rows here; nothing without noise on rows.

    Args:
        batch_size: expected rows of a local step.
        delta: of the guarantee (epsilon, delta).
        max_epsilon: the user's maximum.
    """
    num_rows = {each.name: len(each.rows) for each in organisations if each.rows}
    if terms.row_noise_multiplier == 0 or not num_rows:
        return {}
    steps = (terms.rounds, terms.local_steps)
    return check_row_budget(num_rows, batch_size, *steps, terms.row_noise_multiplier, delta, max_epsilon)


# ---- training here ----


SIDES = ("chosen", "rejected")
# The trainer's settings behind an answer.
ANSWERED = ("learning_rate", "optim", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length")
# Flags of a run that may differ between its rounds.
NOT_OF_THE_ROUNDS = ("processes", "round_timeout", "controls")


@dataclass(frozen=True)
class Local:
    """The training in this process.

    Args:
        terms: of the run.
        learner: trains at each of the organisations.
        tokenizer: the model's.
        base_sha256: of the learner's initial and fixed weights.
        organisations: with their rows.
        row_epsilons: the privacy loss of one row by organisation; empty without noise on rows.
        folder: for the states of organisations between rounds.
        keeps_optimizer: whether an optimizer's state is one of them.
        description: all settings behind an answer, as text: privacy is counted for answers under these only.
    """

    terms: Terms
    learner: LocalLearner
    tokenizer: "PreTrainedTokenizerBase"
    base_sha256: str
    organisations: Sequence[Tokenized]
    row_epsilons: Mapping[str, float]
    folder: Path
    keeps_optimizer: bool
    description: str


def load_local(
    script_args: FederatedArguments,
    training_args: "SFTConfig",
    model_args: "ModelConfig",
    organisations: Sequence[Organisation],
) -> Local:
    """Load the model, put the adapter on it, and build the trainer with the organisations' loss."""
    terms, output_dir = script_args.terms(training_args.seed), training_args.output_dir
    # Of rows of the embeddings added by a template.
    set_seed(terms.seed)
    trained_args = changed(model_args, use_peft=terms.average != FULL)
    if terms.has_pairs:
        tokenizer = load_tokenizer(model_args.model_name_or_path, model_args.model_revision)
        # A new head is drawn, the same by one seed.
        model = load_scorer_to_train(named_model(trained_args), output_dir)
        model.config.pad_token_id = tokenizer.pad_token_id
    else:
        template = (training_args.chat_template_path, training_args.eos_token)
        model, tokenizer = with_template(*load_to_train(named_model(trained_args), output_dir), *template)
    base = weights_sha256(dict(model.named_parameters()))
    args = changed(training_args, max_length=fitting_length(training_args.max_length, model))

    def tokens(rows: Sequence[Row], what: str) -> tuple[Rows, int]:
        if not rows:
            return [], 0
        if terms.has_pairs:
            pairs = tokens_of_pairs(rows, tokenizer, args.max_length, what)
            return pairs, len(pairs)
        result, num_left_out = examples(list(rows), tokenizer, tokenization_of(args), what)
        return result.to_list(), len(rows) - num_left_out

    tokenized = []
    for each in organisations:
        own, num_sources = tokens(each.rows, each.name)
        tokenized.append(Tokenized(each.name, own, tokens(each.held_out, f"{each.name}, held out")[0], num_sources))
    if terms.row_clip_norm is not None:
        check_one_each(tokenized)
    batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    epsilons = row_epsilons(terms, tokenized, batch_size, script_args.delta, script_args.max_epsilon)
    # Of the adapter's first weights: the same at every organisation, regardless of earlier draws.
    set_seed(terms.seed)
    torch.manual_seed(terms.seed)
    adapter = peft_config(trained_args, "SEQ_CLS" if terms.has_pairs else "CAUSAL_LM")
    trainer = _trainer(model, args, tokenized[0].rows, tokenizer, adapter, terms.has_pairs)
    if terms.average == FROZEN_A:
        freeze_a(trainer.model)
    if adapter is not None:
        base = _with_adapter(base, trainer.model, adapter)
    learner = LocalLearner(trainer, schedule_of(trainer.args, terms.num_steps), script_args.proximal_mu)
    settings = {**asdict(script_args), "seed": terms.seed, **{name: getattr(trainer.args, name) for name in ANSWERED}}
    settings = {name: value for name, value in settings.items() if name not in NOT_OF_THE_ROUNDS} | {"base": base}
    description = json.dumps(settings, sort_keys=True, default=str)
    states = (Path(output_dir), script_args.keep_optimizer, description)
    return Local(terms, learner, tokenizer, base, tokenized, epsilons, *states)


def tokens_of_pairs(
    rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", longest: int | None, what: str
) -> list[Mapping[str, Sequence[int]]]:
    """Return comparisons as tokens; too long pairs are left out and reported.

    Args:
        rows: with `prompt`, `chosen` and `rejected` messages.
        tokenizer: with the chat template.
        longest: most tokens of one side; `None` for any number.
        what: name of the rows, in the printed lines.
    """
    conversations = Conversations(tokenizer)
    sides = [conversations.wholes(rows, side) for side in SIDES]
    pairs = [{f"{side}_ids": ids for side, ids in zip(SIDES, pair, strict=True)} for pair in zip(*sides, strict=True)]
    result = [pair for pair in pairs if longest is None or max(map(len, pair.values())) <= longest]
    if len(result) < len(rows):
        say(f"{what}: {len(rows) - len(result):,} of {len(rows):,} pairs are longer than --max_length {longest}")
    refuse_if(not result, f"no pair of {what} fits into --max_length {longest} tokens")
    return result


def check_one_each(organisations: Sequence[Tokenized]) -> None:
    """Refuse organisations with a row split into several: privacy is of drawn, clipped and counted rows."""
    for each in organisations:
        if len(each.rows) > each.num_sources:
            raise InputError(
                f"--row_clip_norm: {each.num_sources} rows of organisation {each.name!r} become {len(each.rows)} "
                "examples, and the privacy of one of these is not that of a row; expected one each, such as by "
                "--loss_on last"
            )


def _trainer(
    model: "PreTrainedModel",
    args: "SFTConfig",
    rows: Rows,
    tokenizer: "PreTrainedTokenizerBase",
    adapter: "LoraConfig | None",
    has_pairs: bool,
) -> SFTTrainer | RewardTrainer:
    """Return TRL's trainer of answers, or of reward models with all settings shared with it, for its loss."""
    if has_pairs:
        trainer_class, no_row = RewardTrainer, {f"{side}_ids": [0, 0] for side in SIDES}
        own = {name: getattr(args, name) for name in ("output_dir", "use_cpu", "bf16")}
        config = RewardConfig(**own, gradient_checkpointing=False, report_to="none")
        names = {each.name for each in fields(args)} & {each.name for each in fields(config)}
        args = changed(config, **{name: getattr(args, name) for name in names} | {"chat_template_path": None})
    else:
        trainer_class, no_row = SFTTrainer, {"input_ids": [0, 0], "labels": [0, 0]}
        args = as_tokenized(args)
    return trainer_class(
        model=model,
        args=args,
        # It takes no step by itself, but needs a row, which a server has not.
        train_dataset=Dataset.from_list(list(rows[:1]) or [no_row]),
        processing_class=tokenizer,
        peft_config=adapter,
    )


def _with_adapter(base_sha256: str, model: nn.Module, adapter: "LoraConfig") -> str:
    """Return the sha256 of the base model and the adapter's fixed parts: if these differ, the mean is wrong.

    The fixed parts are the factors with their initial drawn values, and the scale of the product.
    """
    frozen = {name: value for name, value in model.named_parameters() if "lora_" in name and not value.requires_grad}
    scale = f"{adapter.lora_alpha} {adapter.use_rslora}"
    return sha256(f"{base_sha256} {weights_sha256(frozen)} {scale}".encode()).hexdigest()


def identity_of(arguments: Mapping[str, Any], base_sha256: str) -> dict[str, Any]:
    """Return the identity of a run's rounds: its flags, without the place of training and the comparisons."""
    named = {name: value for name, value in arguments.items() if name not in NOT_OF_THE_ROUNDS}
    return {**named, "base_sha256": base_sha256}


# ---- the way to organisations ----


# Under the output folder: states kept by organisations from round to round, and never sent.
KEPT = "organisations"
OPTIMIZERS, ROUNDING = f"{KEPT}/optimizers", f"{KEPT}/rounding"
# Next to it: everyone's last private answer, kept beyond the rounds.
ANSWERS = "answered"
# Weights, updates and logs of the processes, and their flags.
PROCESSES = "processes"
WORKER = "hfllm.stages.federated.build:worker_learner"
Connect = Callable[[str], Transport]


@contextmanager
def transport(
    local: Local,
    connect: Connect | None,
    workers: Callable[[], Mapping[str, str]],
    max_parallel: int,
    timeout: float | None,
) -> Iterator[Transport]:
    """Yield the transport of weights and updates, until the rounds have ended.

    Args:
        connect: reaches organisations on other machines, given the base model's sha256.
        workers: returns the settings of every organisation's process.
        max_parallel: processes that train at a time; 1: all organisations train in this one.
        timeout: seconds of a process for a round.
    """
    if not (local.folder / STATE_FILE).exists():
        # The organisations' states from a run with removed rounds are of no use to this one.
        shutil.rmtree(local.folder / KEPT, ignore_errors=True)
    base, terms = local.base_sha256, local.terms
    if connect is not None:
        opened = nullcontext(connect(base))
    elif max_parallel == 1:
        opened = nullcontext(InProcess(clients_of(local), base, terms.compression))
    else:
        settings, folder = workers(), local.folder / PROCESSES
        every = {each.name: settings for each in local.organisations}
        opened = SeveralProcesses(WORKER, every, folder, base, timeout, max_parallel, terms.compression)
    with opened as carrier:
        length = local.learner.args.max_length
        carrier.max_tokens = None if length is None else terms.local_steps * local.learner.batch_size * length
        if terms.row_clip_norm is not None:
            # Organisations have equal weight.
            carrier.max_tokens = 1
        carrier.terms = asdict(terms)
        yield carrier


def clients_of(local: Local) -> dict[str, Learner]:
    """Return the function by organisation that trains it here, given the round's number and the weights."""
    clients = {each.name: _client(each, local) for each in local.organisations}
    if not local.row_epsilons:
        return clients
    return {each.name: _answering_once(each, local, clients[each.name]) for each in local.organisations}


def _client(each: Tokenized, local: Local) -> Learner:
    """Return a learner that trains from the received weights, and returns the change."""
    learner, terms, privacy = local.learner, local.terms, local.terms.row_privacy
    optimizers = KeptStates(local.folder / OPTIMIZERS) if local.keeps_optimizer else None
    rounding = KeptStates(local.folder / ROUNDING) if terms.compression == "int8" else None

    def train(number: int, weights: dict[str, Tensor]) -> Update:
        state = optimizers.load(each.name, number) if optimizers is not None else None
        first, seed = (number - 1) * terms.local_steps, f"{terms.seed}-{each.name}"
        learned = learner.learn(each.rows, weights, first, terms.local_steps, seed, state, privacy=privacy)
        change = changes(learned.weights, weights)
        # The numbers of drawn rows and of their tokens have no noise: organisations have equal weight.
        counts = (learned.num_tokens, learned.num_rows) if privacy is None else (1, 1)
        update = Update(each.name, change, *counts, local.base_sha256)
        # A diverged state is not sent, and must not be the start of the next round.
        is_whole = all(bool(torch.isfinite(value).all()) for value in change.values())
        if optimizers is not None and is_whole:
            optimizers.save(each.name, number, learner.optimizer_state())
        if rounding is not None and is_whole:
            feedback = ErrorFeedback(rounding.load(each.name, number))
            update = feedback.corrected(update)
            rounding.save(each.name, number, feedback.residual)
        return update

    return train


def _answering_once(each: Tokenized, local: Local, client: Learner) -> Learner:
    """Return a learner that trains a round once: asked again, it sends the same update with the same noise."""
    settings = sha256(f"{local.description} {len(each.rows)}".encode()).hexdigest()
    file = local.folder / ANSWERS / f"{folder_name(each.name)}.safetensors"
    answers = AnsweredRounds(file, local.terms.rounds, settings)

    def train(number: int, weights: dict[str, Tensor]) -> Update:
        question = sha256(f"{local.description} {weights_sha256(weights)}".encode()).hexdigest()
        answer = answers.load(number, question)
        if answer is not None:
            return Update(each.name, answer, 1, 1, local.base_sha256)
        update = client(number, weights)
        answers.keep(number, question, update.tensors)
        return update

    return train


# ---- the server ----


@dataclass(frozen=True)
class Server:
    """What the server does with the updates of a round.

    Args:
        optimizer: moves the common weights by the average of changes.
        settings: of the rounds.
        averaging: of their updates.
    """

    optimizer: ServerOptimizer
    settings: RoundSettings
    averaging: Averaging

    def spent_epsilon(self, num_organisations: int, delta: float, max_epsilon: float | None) -> float | None:
        """Return the privacy spent by all rounds, `None` without noise, or refuse a run that would spend too much.

        Args:
            num_organisations: of the federation.
            delta: of the guarantee (epsilon, delta).
            max_epsilon: the user's maximum; `None` for none.
        """
        if self.averaging.noise_multiplier == 0:
            return None
        participants = expected_participants(num_organisations, self.settings.participation)
        noise = (self.settings.num_rounds, self.averaging.noise_multiplier)
        return check_budget(num_organisations, participants, *noise, delta, max_epsilon)

    def announce_noise(self, local: Local) -> None:
        """Print the size of the noise on the average, if there is one."""
        if self.averaging.noise_multiplier > 0:
            values = sum(value.numel() for value in local.learner.trained.values())
            expected = expected_participants(len(local.organisations), self.settings.participation)
            ratio = noise_to_signal(values, self.averaging.noise_multiplier, expected)
            say(
                f"federated: the noise on {values:,} values is {ratio:.3g} times the longest mean of {expected} "
                "organisations"
            )

    def run_rounds(
        self,
        local: Local,
        transport: Transport,
        weights: Mapping[str, Tensor],
        identity: Mapping[str, Any],
        evaluate: Callable[[int, Mapping[str, Tensor]], dict[str, float]],
    ) -> FederationState:
        """Run the missing rounds, and return the state after the last one; see `rounds.run_rounds`."""
        names = [each.name for each in local.organisations]
        return run_rounds(
            transport,
            names,
            weights,
            self.optimizer,
            self.settings,
            local.folder,
            identity,
            evaluate=evaluate,
            new_sum=lambda number: self.new_sum(weights, local.base_sha256, len(names)),
            announce=partial(announce, self.settings.num_rounds),
        )

    def new_sum(self, weights: Mapping[str, Tensor], base_sha256: str, num_organisations: int) -> Sum:
        """Return the sum to add the updates of a round to.

        Args:
            weights: at the beginning, for their names and shapes.
            base_sha256: of the base model.
            num_organisations: of the federation.
        """
        how, expected = self.averaging, Expected.of(weights, base_sha256)
        if how.clip_norm is not None:
            participants = num_asked(num_organisations, self.settings)
            return ClippedSum(how.clip_norm, how.noise_multiplier, participants, weights, base_sha256)
        if how.aggregation == MEAN and not how.max_norm_ratio:
            # Updates are added as they come, and none is held in memory.
            return WeightedSum(expected)
        return RobustSum(expected, how.aggregation, how.trim, how.max_norm_ratio)


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


# ---- processes and machines ----
#
# An organisation in its own process, on this machine or, by Flower, on another one; and the server between machines.
#
#     python -m hfllm.federation.flower_app app --num_organisations 3 --loop hfllm.stages.federated.build:loop \
#         --learner hfllm.stages.federated.build:worker_learner
#
# The run's `flags` name the server's file of flags, with `organisation_names` and `controls: none`; the settings of
# every node name its own: `{"flags": "federated.yaml", "base": "my-model", "rows": "rows.jsonl"}`.
# docs/guides/federation.md has all commands.


def worker_settings(*parsed: "DataclassInstance") -> dict[str, str]:
    """Write the user's flags into a file, and return the settings of the processes that read it.

    Args:
        parsed: all flags; those that the user did not name are defaults derived from the others.
    """
    names, flags = given_names(*parsed) or (), Flags(*parsed)
    values = {name: getattr(group, name) for group in parsed for name in names if hasattr(group, name)}
    values["output_dir"] = flags.output_dir
    values = {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}
    values |= {name: json.dumps(value) for name, value in values.items() if isinstance(value, dict)}
    file = Path(flags.output_dir, PROCESSES, "flags.yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(values, indent=2) + "\n")
    return {"flags": str(file), "base": flags.model_name_or_path}


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
    terms = script_args.terms(training_args.seed)
    check_terms(terms, settings.get("terms") or {})
    files = [file for name, file in script_args.named_files if name == organisation]
    file = settings.get("rows") or next(iter(files), None)
    try:
        organisations = organisations_of(script_args, terms.seed, (organisation, file) if file else None)
    except InputError as error:
        # Errors are sent to the server, and this one may contain words of a row.
        say(f"federated: {error}")
        raise InputError(f"organisation {organisation!r}: its rows cannot be read; its own output says why") from None
    own = [each for each in organisations if each.name == organisation]
    if not own or not own[0].rows:
        raise InputError(f"organisation {organisation!r} has no rows here: its settings name none by `rows`")
    batch_size = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    row_epsilons(terms, own, batch_size, script_args.delta, script_args.max_epsilon)
    local = load_local(script_args, training_args, changed(model_args, model_name_or_path=settings["base"]), own)
    for name, epsilon in local.row_epsilons.items():
        say(f"federated: {name}: a row-level epsilon of {epsilon:.3g} in {terms.rounds} rounds")
    return clients_of(local)[organisation]


def check_terms(own: Terms, terms: Mapping[str, str | int | float]) -> None:
    """Refuse the request of a server with other terms of its run than this organisation's flags."""
    ours = asdict(own)
    for name, value in terms.items():
        if ours.get(name) != value:
            raise InputError(f"--{name} is {ours.get(name)} here and {value} at the server: both need the same flags")


def loop(connect: Connect, config: Mapping[str, object]) -> None:
    """Run the recipe at the server, over Flower's transport.

    Args:
        connect: builds the transport from the base model's sha256.
        config: of the run; `flags` is a file of the recipe's flags.
    """
    if not config.get("flags"):
        raise InputError('the run names no file of flags: expected flags="federated.yaml" in its settings')
    recipe = load_recipe("federated")
    parsed = recipe.parse(["--config", str(config["flags"])])
    theirs, ours = str(config.get("compression", "none")), parsed[0].compression
    if theirs not in ("none", ours):
        raise InputError(f"--compression {theirs} of the app, {ours} of {config['flags']}: expected the same")
    recipe.main(*parsed, connect=connect)
