"""Muon for the matrices of a model's layers, AdamW for everything else."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hfllm.errors import refuse, refuse_if
from hfllm.trainers.engines import shards_parameters
from hfllm.trainers.precision import multiplies_in_bf16

if TYPE_CHECKING:
    from transformers import TrainingArguments


# Matrices of at most so many numbers are orthogonalized together, so many at once: calls cost more than work.
SMALL, TOGETHER = 2**16, 2**22


class BatchedMuon(torch.optim.Muon):
    """`torch.optim.Muon` with one Newton-Schulz iteration for all small matrices of a shape; larger ones as there.

    The arithmetic is the same, in bfloat16 too; a product of several matrices may round differently from a product of
    one. A CPU that only emulates bfloat16, where a step would take a second, iterates in float32, larger matrices too.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step; `closure` as for every optimizer."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        muon_parameters = []
        for group in self.param_groups:
            for parameters in _alike(group["params"]):
                self._step_together(parameters, group)
                muon_parameters += parameters
        gradients = [parameter.grad for parameter in muon_parameters]
        for parameter in muon_parameters:
            parameter.grad = None
        super().step()
        for parameter, gradient in zip(muon_parameters, gradients, strict=True):
            parameter.grad = gradient
        return loss

    def _step_together(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        gradients = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.grad)
        averages = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, averages, group["momentum"]) if group["nesterov"] else averages
        coefficients, steps, eps = group["ns_coefficients"], group["ns_steps"], group["eps"]
        stacked = torch.stack(updates).to(_iteration_dtype(parameters[0].device))
        updates = orthogonalized(stacked, coefficients, steps, eps).to(gradients[0].dtype)
        size = 0.2 * max(parameters[0].shape) ** 0.5
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, list(updates), alpha=-group["lr"] * size)


def _iteration_dtype(device: torch.device) -> torch.dtype:
    """Return the precision of the Newton-Schulz iteration, which needs no more than bfloat16."""
    return torch.bfloat16 if multiplies_in_bf16(device) else torch.float32


def _alike(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return the matrices with a gradient that are stepped here, matrices of one shape together.

    These are the small ones, and all where `torch.optim.Muon` would emulate bfloat16; a shard of a matrix is none.

    A parameter flattened by FSDP is none either, and is left to `torch.optim.Muon`, to be refused there with a
    message.
    """
    result: dict[tuple[object, ...], list[nn.Parameter]] = {}
    for parameter in parameters:
        is_plain = type(parameter.data) is torch.Tensor and type(parameter.grad) is torch.Tensor
        is_small = parameter.numel() <= SMALL
        if is_plain and parameter.ndim == 2 and (is_small or not multiplies_in_bf16(parameter.device)):
            result.setdefault((parameter.shape, parameter.dtype, parameter.device), []).append(parameter)
    batches = []
    for alike in result.values():
        most = max(1, TOGETHER // max(alike[0].numel(), 1))
        batches += [alike[first : first + most] for first in range(0, len(alike), most)]
    return batches


def orthogonalized(
    matrices: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """Return matrices (N, rows, columns) with their singular values near one (Jordan et al. 2024), in their dtype.

    Args:
        coefficients: of the quintic Newton-Schulz iteration.
        steps: of it.
        eps: the least norm as divisor of a matrix.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) and AdamW as one optimizer, with one state and one list of parameter groups.

    Muon's step is scaled to the size of AdamW's, 0.2 times the square root of the longer side (Liu et al. 2025,
    arXiv:2502.16982, equation 4), so one learning rate and weight decay serve both.

    Args:
        matrices: parameters of two dimensions for Muon.
        others: groups of parameters for AdamW, as `torch.optim.AdamW` takes them.
        lr: learning rate of both.
        weight_decay: of the matrices, and of groups without their own.
        betas: of AdamW.
        eps: of AdamW.
        momentum: of Muon.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: list[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        momentum: float = 0.95,
    ):
        muon = BatchedMuon(
            list(matrices), lr=lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw"
        )
        # One kernel for a parameter, as Trainer's own choice has it; by default it is ten of them on a CPU.
        adamw = torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, fused=True)
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._parts = muon, adamw
        self._share()

    def _share(self) -> None:
        """Share this optimizer's groups, changed by schedulers, and its saved state with both parts."""
        for part, groups in zip(self._parts, (self.param_groups[:1], self.param_groups[1:]), strict=True):
            part.param_groups, part.state = groups, self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state, as for every optimizer."""
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Any = None) -> Any:
        """Take one step with both parts."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss


def muon_of(model: nn.Module, **settings: Any) -> MuonWithAdamW:
    """Return the optimizer of a model; embeddings, the head, norms, biases and stacked experts go to AdamW.

    Args:
        model: a transformers model. Norms and biases, of one dimension, are not decayed.
        settings: arguments of `MuonWithAdamW`.

    Raises:
        InputError: for a model without a matrix for Muon.
    """
    ends = {
        id(module.weight)
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        if module is not None
    }
    ends |= {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Of a head with one score, too, nothing is left that could be orthogonal.
    matrices = [each for each in trained if each.ndim == 2 and min(each.shape) > 1 and id(each) not in ends]
    refuse_if(not matrices, f"--use_muon: {type(model).__name__} has no matrix to train besides its embeddings")
    matrix_ids = set(map(id, matrices))
    rest = [parameter for parameter in trained if id(parameter) not in matrix_ids]
    others = [
        {"params": [parameter for parameter in rest if parameter.ndim > 1]},
        {"params": [parameter for parameter in rest if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return MuonWithAdamW(matrices, [group for group in others if group["params"]], **settings)


def muon_factory() -> Any:
    """Return a class for `Trainer`'s `optimizer_cls_and_kwargs` for making the optimizer once the model exists."""
    return muon_of


# ---- what Muon refuses ----


def check_muon(uses_muon: bool, training_args: "TrainingArguments", trains_adapter: bool = False) -> None:
    """Refuse Muon where it cannot be used."""
    if not uses_muon:
        return
    optimizer, default_optimizer = training_args.optim, type(training_args).__dataclass_fields__["optim"].default
    refuse(shards_parameters(training_args), "--use_muon", "DeepSpeed and FSDP split the matrices that it needs whole")
    refuse(optimizer != default_optimizer, "--use_muon", f"--optim {optimizer.value} is asked for too")
    refuse(trains_adapter, "--use_muon", "it is for whole matrices, and an adapter's are thin")
