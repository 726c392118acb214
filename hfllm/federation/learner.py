"""Local steps of an organisation: the same as `Trainer`'s, from given weights, and its states between rounds."""

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hfllm.data.packing import IGNORE
from hfllm.errors import InputError
from hfllm.federation.privacy import RowPrivacy, RowSum
from hfllm.federation.updates import replace_tensors
from hfllm.models.devices import forked_random

if TYPE_CHECKING:
    from transformers import Trainer

# Tokens of rows, by column.
Rows = Sequence[Mapping[str, Sequence[int]]]


# ---- steps ----


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
        rate: the schedule's factor of the learning rate by step, over all rounds.
        proximal_mu: weight of FedProx's term, mu / 2 times the squared distance to the initial weights (Li et
            al. 2018, arXiv:1812.06127, equation 2).
    """

    def __init__(self, trainer: "Trainer", rate: Callable[[int], float], proximal_mu: float = 0.0):
        self.trainer, self.args, self.rate, self.proximal_mu = trainer, trainer.args, rate, proximal_mu
        self.model: nn.Module = trainer.model
        for module in self.model.modules():
            # A bias adapted to the load of experts is not sent: it would differ by organisation and process, and
            # reveal the drawn rows, bypassing clipping and noise.
            if getattr(module, "update_rate", 0):
                module.update_rate = 0.0
        self.optimizer = trainer.create_optimizer()
        self.batch_size = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
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
            rate: the schedule's factor of the learning rate by step; by default the learner's own.
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
                    batch = [rows[index] for index in row_indices(len(rows), size, step, seed)]
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


def row_indices(num_rows: int, batch_size: int, step: int, seed: str) -> list[int]:
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


# ---- states between rounds ----


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
