"""The learners and the server of a federation: local steps, answers to rounds, processes, Flower's apps."""

import json
import random
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import Enum
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import torch
from torch import Tensor, nn

from hfllm.errors import InputError
from hfllm.federation.lora import freeze_a
from hfllm.federation.organisations import Organisation
from hfllm.federation.privacy import (
    AnsweredRounds,
    ClippedSum,
    RowPrivacy,
    RowSum,
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
    expected_participants,
    num_asked,
    server_optimizer,
)
from hfllm.federation.transports import InProcess, Learner, SeveralProcesses, Transport
from hfllm.federation.updates import ErrorFeedback, Expected, Update, changes, replace_tensors, weights_sha256
from hfllm.flags import given_names
from hfllm.models.devices import forked_random
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
    Rows,
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
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
    from trl import ModelConfig, SFTConfig


# ---- the learner ----


IGNORE = -100


@dataclass(frozen=True)
class Learned:
    """Results of some steps.

    Args:
        weights: copies of the trained tensors.
        num_tokens, num_rows: number of learned targets and rows, counted at each use. A pair is one target.
        loss: mean over the targets, before each step.
    """

    weights: dict[str, Tensor]
    num_tokens: int
    num_rows: int
    loss: float


class LocalLearner:
    """Takes the same optimizer steps as `Trainer`, from given weights.

    The trainer is built once; it provides its model on its device, collator, loss and optimizer. A new trainer for
    every organisation and round would cost more than its few steps. Its loss has to be a mean over `labels`, as in
    TRL's SFTTrainer, or over rows without labels, such as the pairs of RewardTrainer.

    Args:
        trainer: with the model, the collator, the loss, and arguments for optimizer and schedule. It does no
            training itself.
        num_steps: total steps of all rounds, the length of the learning rate schedule.
        proximal_mu: weight of FedProx's term, mu / 2 times the squared distance to the initial weights (Li et
            al. 2018, arXiv:1812.06127, equation 2).
    """

    def __init__(self, trainer: "Trainer", num_steps: int, proximal_mu: float = 0.0):
        self.trainer, self.args, self.proximal_mu = trainer, trainer.args, proximal_mu
        self.model: nn.Module = trainer.model
        for module in self.model.modules():
            # A bias adapted to the load of experts is not sent: it would differ by organisation and process, and
            # reveal the drawn rows, bypassing clipping and noise.
            if getattr(module, "update_rate", 0):
                module.update_rate = 0.0
        self.optimizer = trainer.create_optimizer()
        self.batch_size = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        self.rate = schedule_of(trainer.args, num_steps)
        # As in `Trainer.training_step`: does the loss take the number of targets, or is it a mean over every part?
        takes_count = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
        is_scaled = trainer.loss_is_scaled_for_ga
        self._takes_count = takes_count if is_scaled is None else is_scaled

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The trained tensors by name: the content of updates."""
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def weights(self) -> dict[str, Tensor]:
        """Return copies of the trained tensors, on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self.trained.items()}

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Set the trained tensors."""
        with torch.no_grad():
            for name, value in self.trained.items():
                value.copy_(weights[name])

    def learn(
        self,
        rows: Rows,
        weights: Mapping[str, Tensor],
        first_step: int,
        count: int,
        seed: str,
        state: Mapping[str, Tensor] | None = None,
        batch_size: int | None = None,
        rate: Callable[[int], float] | None = None,
        privacy: RowPrivacy | None = None,
    ) -> Learned:
        """Train `count` steps from `weights`; without privacy the same arguments give the same bits.

        Args:
            rows: tokenized rows of one organisation.
            first_step: the number of the first step, from 0, its position in the rows and in the schedule.
            seed: of the order of the rows, and, together with the number of the step, of dropout.
            state: the optimizer's, from `optimizer_state`; by default a new one.
            batch_size: rows of a step; by default the trainer's.
            rate: the schedule's factor of the learning rate by step; by default the schedule of all rounds.
            privacy: of single rows: their draws, clipping and noise, all without a seed. A row's loss is then the mean
                over its own targets, and a step's the sum over rows divided by their expected number.
        """
        self.set_weights(weights)
        self.set_optimizer_state(state)
        size, trained = batch_size or self.batch_size, list(self.trained.values())
        begun = [value.detach().clone() for value in trained] if self.proximal_mu else []
        nats, num_tokens, num_rows = 0.0, 0, 0
        self.model.train()
        with forked_random(self.args.device):
            for step in range(first_step, first_step + count):
                torch.manual_seed(random.Random(f"{seed}-{step}").getrandbits(63))
                for group in self.optimizer.param_groups:
                    group["lr"] = self.args.learning_rate * (rate or self.rate)(step)
                if privacy is None:
                    batch = [rows[index] for index in places_of(len(rows), size, step, seed)]
                    summed = self._gradient(batch)
                else:
                    batch = [rows[index] for index in privacy.draw(len(rows), size)]
                    summed = self._private_gradient(batch, min(size, len(rows)), privacy)
                for value, beginning in zip(trained, begun, strict=False):
                    value.grad.add_(value.detach() - beginning, alpha=self.proximal_mu)
                if self.args.max_grad_norm > 0:
                    nn.utils.clip_grad_norm_(trained, self.args.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
                nats, num_rows = nats + summed, num_rows + len(batch)
                num_tokens += sum(map(_targets, batch))
        self.model.eval()
        return Learned(self.weights(), num_tokens, num_rows, nats / max(num_tokens, 1))

    def _gradient(self, batch: Rows) -> float:
        """Accumulate the gradient of the mean over all targets of a batch, and return the sum over them."""
        mean, parts = 0.0, list(chunks(batch, self.args.per_device_train_batch_size))
        targets = sum(map(_targets, batch))
        # TRL divides the load-balancing loss of experts by this.
        self.trainer.current_gradient_accumulation_steps = len(parts)
        for part in parts:
            loss = self._loss(part, targets)
            loss.backward()
            mean += float(loss.detach())
        return mean * targets

    def _private_gradient(self, batch: Rows, expected: int, privacy: RowPrivacy) -> float:
        """Set the noisy sum of the gradients of single rows over `expected`; return the sum of their summed losses."""
        total, nats = RowSum(list(self.trained.values()), privacy), 0.0
        self.trainer.current_gradient_accumulation_steps = 1
        for row in batch:
            # Its own unpredictable masks: with one stream, a row would shift the masks of all rows after it.
            torch.manual_seed(random.SystemRandom().getrandbits(63))
            targets = _targets(row)
            # The mean over its own tokens: else it would reveal tokens of other rows.
            loss = self._loss([row], targets)
            loss.backward()
            total.take()
            nats += float(loss.detach()) * targets
        total.set_gradient(expected)
        return nats

    def _loss(self, rows: Rows, targets: int) -> Tensor:
        """Return the trainer's loss of rows, divided by `targets`."""
        inputs = self.trainer._prepare_inputs(self.trainer.data_collator(list(rows)))
        with self.trainer.compute_loss_context_manager(), self.trainer.accelerator.autocast():
            loss = self.trainer.compute_loss(
                self.model, inputs, num_items_in_batch=torch.tensor(targets, device=self.args.device)
            )
        return loss if self._takes_count else loss * (sum(map(_targets, rows)) / max(targets, 1))

    def held_out_loss(self, rows: Rows, weights: Mapping[str, Tensor]) -> float:
        """Return the mean loss over all targets of rows, in nats per token, at these weights."""
        self.set_weights(weights)
        self.model.eval()
        nats, num_tokens = 0.0, 0
        self.trainer.current_gradient_accumulation_steps = 1
        with torch.no_grad():
            for part in chunks(rows, self.args.per_device_eval_batch_size):
                targets = sum(map(_targets, part))
                nats, num_tokens = nats + float(self._loss(part, targets)) * targets, num_tokens + targets
        return nats / max(num_tokens, 1)

    def pair_accuracy(self, pairs: Rows, weights: Mapping[str, Tensor]) -> float:
        """Return the share of pairs with a higher score of the chosen answer at these weights."""
        self.set_weights(weights)
        self.model.eval()
        right = 0
        with torch.no_grad():
            for part in chunks(pairs, self.args.per_device_eval_batch_size):
                inputs = self.trainer._prepare_inputs(self.trainer.data_collator(list(part)))
                with self.trainer.accelerator.autocast():
                    scores = self.model(**inputs, use_cache=False).logits.squeeze(-1)
                chosen, rejected = scores.chunk(2)
                right += int((chosen > rejected).sum())
        return right / max(len(pairs), 1)

    # ---- the optimizer's state ----

    def set_optimizer_state(self, state: Mapping[str, Tensor] | None) -> None:
        """Set the optimizer's state, by default the state of a new one."""
        self.optimizer.state = defaultdict(dict)
        parameters = [value for group in self.optimizer.param_groups for value in group["params"]]
        for key, value in (state or {}).items():
            index, _, name = key.partition(".")
            parameter = parameters[int(index)]
            # Adam counts its steps on the CPU.
            device = parameter.device if value.ndim else value.device
            self.optimizer.state[parameter][name] = value.to(device, copy=True)

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return copies of the optimizer's state, as tensors by the parameter's index and their name."""
        parameters = [value for group in self.optimizer.param_groups for value in group["params"]]
        for state in self.optimizer.state.values():
            for name, value in state.items():
                if not (value is None or isinstance(value, Tensor)):
                    raise InputError(f"--keep_optimizer: {self.args.optim} has the state {name!r}, which is no tensor")
        return {
            f"{index}.{name}": value.detach().cpu().clone()
            for index, parameter in enumerate(parameters)
            for name, value in self.optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }


class KeptStates:
    """Optimizer states of organisations between rounds, in files by round, to allow repeating a round.

    Args:
        folder: of these files.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def load(self, organisation: str, number: int) -> dict[str, Tensor] | None:
        """Return the state after the organisation's last training round before `number`.

        States of later rounds, left by another run, are removed.
        """
        from safetensors.torch import load_file

        for each in self._rounds(organisation):
            if each > number:
                self._path(organisation, each).unlink(missing_ok=True)
        before = [each for each in self._rounds(organisation) if each < number]
        return load_file(self._path(organisation, max(before))) if before else None

    def save(self, organisation: str, number: int, state: Mapping[str, Tensor]) -> None:
        """Keep the state after a round, and the one before it; remove older ones."""
        self._path(organisation, number).parent.mkdir(parents=True, exist_ok=True)
        replace_tensors(self._path(organisation, number), state)
        before = sorted(each for each in self._rounds(organisation) if each < number)
        for each in before[:-1]:
            self._path(organisation, each).unlink(missing_ok=True)

    def _rounds(self, organisation: str) -> list[int]:
        indices = self._path(organisation, 0).parent.glob("*.safetensors")
        return [int(path.stem) for path in indices if path.stem.isdecimal()]

    def _path(self, organisation: str, number: int) -> Path:
        return self.folder / folder_name(organisation) / f"{number}.safetensors"


def folder_name(organisation: str) -> str:
    """Return an organisation's name as a name of a folder or file: it may contain a slash, or be `..`."""
    return quote(organisation, safe="").replace(".", "%2E")


# ---- rows and schedule ----


def places_of(num_rows: int, batch_size: int, step: int, seed: str) -> list[int]:
    """Return the indices of a step's rows: passes over all rows, every pass in its own order, without a gap."""
    orders: dict[int, list[int]] = {}
    result = []
    for index in range(step * batch_size, (step + 1) * batch_size):
        number, within = divmod(index, num_rows)
        if number not in orders:
            orders[number] = random.Random(f"{seed}-pass-{number}").sample(range(num_rows), num_rows)
        result.append(orders[number][within])
    return result


def chunks(rows: Rows, size: int) -> Iterator[Rows]:
    """Yield rows in parts of at most `size`."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _targets(row: Mapping[str, Sequence[int]]) -> int:
    """Return the number of predicted tokens of a row: all but the first. A pair counts as one."""
    if "labels" not in row:
        return 1
    return sum(label != IGNORE for label in row["labels"][1:])


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
        template = (training_args.chat_template_path, training_args.eos_token)
        model, tokenizer = sft.with_template(*loaded, *template)
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
            args=sft.as_tokenized(args),
            train_dataset=Dataset.from_list(list(result[0].rows[:1]) or [NOTHING]),
            processing_class=tokenizer,
            peft_config=adapter,
        )
    if script_args.average == FROZEN_A:
        freeze_a(trainer.model)
    if adapter is not None:
        base = _with_adapter(base, trainer.model, adapter)
    steps = script_args.rounds * script_args.local_steps
    return Local(LocalLearner(trainer, steps, script_args.proximal_mu), tokenizer, base, result, epsilons)


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
