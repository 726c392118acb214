"""Muon for the matrices of a model's layers, AdamW for everything else."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hfllm.errors import InputError


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) and AdamW as one optimizer, with one state and one list of parameter groups.

    Muon's step is scaled to the size of AdamW's, 0.2 times the square root of the longer side (Liu et al. 2025,
    arXiv:2502.16982, equation 4), so one learning rate and weight decay serve both.

    Args:
        matrices: parameters of two dimensions for Muon.
        others: groups of parameters for AdamW, as `torch.optim.AdamW` takes them.
        lr: learning rate of both.
        weight_decay: of the matrices, and of groups that do not set their own.
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
        muon = torch.optim.Muon(
            list(matrices), lr=lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw"
        )
        adamw = torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps)
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._parts = muon, adamw
        self._share()

    def _share(self) -> None:
        """Share this optimizer's groups, which schedulers change, and its state, which is saved, with both parts."""
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
    matrices = [parameter for parameter in trained if parameter.ndim == 2 and id(parameter) not in ends]
    if not matrices:
        raise InputError(f"--use_muon: {type(model).__name__} has no matrix to train besides its embeddings")
    taken = set(map(id, matrices))
    rest = [parameter for parameter in trained if id(parameter) not in taken]
    others = [
        {"params": [parameter for parameter in rest if parameter.ndim > 1]},
        {"params": [parameter for parameter in rest if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return MuonWithAdamW(matrices, [group for group in others if group["params"]], **settings)


def muon_factory() -> Any:
    """Return a class for `Trainer`'s `optimizer_cls_and_kwargs` that makes the optimizer once the model is there."""
    return muon_of
