"""Row-level differential privacy at an organisation: DP-SGD (Abadi et al. 2016, arXiv:1607.00133) in any `Trainer`.

It is meant for rows where organisations are too few for client-level privacy (`privacy`), and acts before the server
sees anything. Each row's gradient is scaled to norm C, whatever it was (automatic clipping: Bu et al. 2023,
arXiv:2206.07136); the sum over a batch gets Gaussian noise of standard deviation z C. With rows scaled rather than
clipped, it does not matter that the loss of a row is divided by the tokens of a whole batch, in which other rows show.

Gradients by row come from micro-batches of one row: as slow as batches of one, right for every model. `epsilon_of`
(rows per batch / rows, z, steps, delta) is what the weights reveal of one row if each batch takes each row with the
same probability, independently (Poisson batches). A `Trainer` shuffles and takes batches of one size instead, so that
the figure is an estimate and no bound. An update names its exact numbers of tokens and rows besides, which have no
noise. No learner of `hfllm federated` uses this: it is for programs of your own.
"""

import math

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hfllm.errors import InputError
from hfllm.federation.privacy import normal


class RowPrivacy(TrainerCallback):
    """Callback that makes each optimizer step of a `Trainer` one of DP-SGD.

    Set per_device_train_batch_size=1 and gradient_accumulation_steps to the rows per batch. A batch at the end of an
    epoch that is shorter is divided by the full number too.

    Args:
        clip_norm: C, the norm of every row's gradient; with AdamW it changes nothing but the size of epsilon.
        noise_multiplier: z.
        generator: of tests; by default the operating system draws.
    """

    def __init__(self, clip_norm: float, noise_multiplier: float, generator: torch.Generator | None = None):
        for name, value, is_right in (
            ("clip_norm", clip_norm, clip_norm > 0),
            ("noise_multiplier", noise_multiplier, noise_multiplier >= 0),
        ):
            if not (math.isfinite(value) and is_right):
                raise InputError(
                    f"{name} is {value}; expected a number {'above' if name == 'clip_norm' else 'from'} 0"
                )
        self.clip_norm, self.noise_multiplier = clip_norm, noise_multiplier
        self.generator = generator
        self._sums: dict[str, Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if args.per_device_train_batch_size != 1 or args.world_size != 1:
            raise InputError(
                f"row-level privacy takes one row at a time in one process: per_device_train_batch_size is "
                f"{args.per_device_train_batch_size}, processes {args.world_size}; expected 1 of each"
            )
        self._sums = {}

    def on_substep_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        self._take(model)

    @torch.no_grad()
    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        self._take(model)
        for name, value in model.named_parameters():
            if value.requires_grad:
                noise = normal(value.shape, self.generator).to(value) * self.noise_multiplier
                total = self._sums.get(name, torch.zeros_like(value))
                value.grad = (total + noise * self.clip_norm) / args.gradient_accumulation_steps
        self._sums = {}

    @torch.no_grad()
    def _take(self, model: nn.Module) -> None:
        """Add the gradient of one row, scaled, and clear it."""
        gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        length = torch.linalg.vector_norm(torch.stack([value.norm() for value in gradients.values()])).item()
        # A row without gradient adds nothing; one that is not finite must not reach the others.
        scale = self.clip_norm / length if length > 0 and math.isfinite(length) else None
        for name, gradient in gradients.items():
            if scale is not None:
                self._sums[name] = self._sums.get(name, torch.zeros_like(gradient)) + gradient * scale
            gradient.zero_()
