"""The local learner of a federation: some steps of a trainer's loss from given weights, on one organisation's rows.

The trainer is built once; what it brings is its model on its device, collator, loss and optimizer. A trainer for each
organisation and round would cost more than the few steps that it takes. It fits trainers whose loss is a mean over
`labels`, such as TRL's SFTTrainer, or over rows without labels, such as the pairs of RewardTrainer.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from hfllm.errors import InputError
from hfllm.federation.privacy import RowPrivacy, RowSum
from hfllm.federation.updates import replace_tensors
from hfllm.models.devices import forked_random

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

IGNORE = -100
Rows = Sequence[Mapping[str, Sequence[int]]]


@dataclass(frozen=True)
class Learned:
    """What some steps came to.

    Args:
        weights: copies of the trained tensors.
        num_tokens, num_rows: how many targets and rows were learned, each time that they were seen. A pair is one
            target.
        loss: mean over the targets, before each step.
    """

    weights: dict[str, Tensor]
    num_tokens: int
    num_rows: int
    loss: float


class LocalLearner:
    """Takes optimizer steps as `Trainer` would, from weights that it is given.

    Args:
        trainer: with the model, the collator, the loss, and arguments for optimizer and schedule. It trains nothing.
        num_steps: steps of all rounds together, over which the learning rate goes.
        proximal_mu: weight of FedProx's term, mu / 2 times the squared distance to the weights of the beginning (Li et
            al. 2018, arXiv:1812.06127, equation 2).

    Raises:
        InputError: for a schedule that is no function of the step.
    """

    def __init__(self, trainer: "Trainer", num_steps: int, proximal_mu: float = 0.0):
        self.trainer, self.args, self.proximal_mu = trainer, trainer.args, proximal_mu
        self.model: nn.Module = trainer.model
        for module in self.model.modules():
            # A bias that follows the load of experts does not travel: it would differ by organisation and process, and
            # carry what rows were drawn past clipping and noise.
            if getattr(module, "update_rate", 0):
                module.update_rate = 0.0
        self.optimizer = trainer.create_optimizer()
        self.batch_size = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        self.rate = schedule_of(trainer.args, num_steps)
        # As `Trainer.training_step` tells: does the loss take the number of targets, or is it a mean over each part?
        takes_count = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
        said = trainer.loss_is_scaled_for_ga
        self._takes_count = takes_count if said is None else said

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The tensors that are trained, by name: what travels."""
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
            first_step: the number of the first step, from 0, which places it in the rows and in the schedule.
            seed: of the order of the rows, and with the step's number of dropout.
            state: the optimizer's, from `optimizer_state`; by default a new one.
            batch_size: rows of a step; by default the trainer's.
            rate: the schedule's factor of the learning rate by step; by default that of all rounds.
            privacy: of single rows: their draws, clipping and noise, which have no seed. A row's loss is then the mean
                over its own targets, and a step's the sum over rows divided by the number that is expected.
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
                    batch = [rows[place] for place in places_of(len(rows), size, step, seed)]
                    summed = self._gradient(batch)
                else:
                    batch = [rows[place] for place in privacy.draw(len(rows), size)]
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
        # What TRL divides the load-balancing loss of experts by.
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
            # Masks of its own, which nobody knows: from one stream, a row would shift those of all rows after it.
            torch.manual_seed(random.SystemRandom().getrandbits(63))
            targets = _targets(row)
            # The mean over its own tokens: those of other rows would show in it.
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
        """Return the share of pairs whose chosen answer has the higher score at these weights."""
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
        """Set the optimizer's state, by default that of a new one."""
        self.optimizer.state = defaultdict(dict)
        parameters = [value for group in self.optimizer.param_groups for value in group["params"]]
        for key, value in (state or {}).items():
            place, _, name = key.partition(".")
            parameter = parameters[int(place)]
            # Adam counts its steps on the CPU.
            device = parameter.device if value.ndim else value.device
            self.optimizer.state[parameter][name] = value.to(device, copy=True)

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return copies of the optimizer's state, as tensors by the parameter's place and their name.

        Raises:
            InputError: for an optimizer whose state is not tensors alone.
        """
        parameters = [value for group in self.optimizer.param_groups for value in group["params"]]
        for state in self.optimizer.state.values():
            for name, value in state.items():
                if not (value is None or isinstance(value, Tensor)):
                    raise InputError(f"--keep_optimizer: {self.args.optim} has the state {name!r}, which is no tensor")
        return {
            f"{place}.{name}": value.detach().cpu().clone()
            for place, parameter in enumerate(parameters)
            for name, value in self.optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }


class KeptStates:
    """Optimizer states of organisations between rounds, in files by round, so that a round can be done again.

    Args:
        folder: where they are.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def load(self, organisation: str, number: int) -> dict[str, Tensor] | None:
        """Return the state after the last round before `number` in which the organisation trained.

        States of later rounds, which another run has left, are removed.
        """
        from safetensors.torch import load_file

        for each in self._rounds(organisation):
            if each > number:
                self._path(organisation, each).unlink(missing_ok=True)
        before = [each for each in self._rounds(organisation) if each < number]
        return load_file(self._path(organisation, max(before))) if before else None

    def save(self, organisation: str, number: int, state: Mapping[str, Tensor]) -> None:
        """Keep the state after a round, and that before it; remove older ones."""
        self._path(organisation, number).parent.mkdir(parents=True, exist_ok=True)
        replace_tensors(self._path(organisation, number), state)
        before = sorted(each for each in self._rounds(organisation) if each < number)
        for each in before[:-1]:
            self._path(organisation, each).unlink(missing_ok=True)

    def _rounds(self, organisation: str) -> list[int]:
        places = self._path(organisation, 0).parent.glob("*.safetensors")
        return [int(path.stem) for path in places if path.stem.isdecimal()]

    def _path(self, organisation: str, number: int) -> Path:
        return self.folder / folder_name(organisation) / f"{number}.safetensors"


def folder_name(organisation: str) -> str:
    """Return an organisation's name as one of a folder or file: it may hold a slash, or be `..`."""
    return quote(organisation, safe="").replace(".", "%2E")


# ---- rows and schedule ----


def places_of(num_rows: int, batch_size: int, step: int, seed: str) -> list[int]:
    """Return which rows a step learns: passes over all rows, each in an order of its own, without a gap."""
    orders: dict[int, list[int]] = {}
    found = []
    for place in range(step * batch_size, (step + 1) * batch_size):
        number, within = divmod(place, num_rows)
        if number not in orders:
            orders[number] = random.Random(f"{seed}-pass-{number}").sample(range(num_rows), num_rows)
        found.append(orders[number][within])
    return found


def schedule_of(args: "TrainingArguments", num_steps: int) -> Callable[[int], float]:
    """Return the learning rate's factor by step.

    Raises:
        InputError: for a schedule that is no function of the step.
    """
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.get_warmup_steps(num_steps),
        num_training_steps=num_steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    if not isinstance(scheduler, LambdaLR):
        raise InputError(f"--lr_scheduler_type {args.lr_scheduler_type}: expected one that goes by the step alone")
    return scheduler.lr_lambdas[0]


def chunks(rows: Rows, size: int) -> Iterator[Rows]:
    """Yield rows in parts of at most `size`."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _targets(row: Mapping[str, Sequence[int]]) -> int:
    """Return how many tokens of a row are predicted: the first one never is. A pair is one."""
    if "labels" not in row:
        return 1
    return sum(label != IGNORE for label in row["labels"][1:])
