"""When a layer saves less for the backward pass than autograd does, and computes the rest again.

This file imports only torch, and is uploaded to the Hub with modeling_hfllm.py.
"""

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as every_module

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)


def saves_memory() -> bool:
    """Return whether to save less for the backward pass than autograd does; a compiler decides that itself."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling() and not needs_autograd()


def needs_autograd() -> bool:
    """Return whether `torch.func` or forward-mode derivatives are at work, which need the formulas of autograd."""
    if torch.compiler.is_compiling():
        return False
    # There is no public question for either. Where a release of torch lacks these names, the formulas of autograd are
    # right in any case; they only take more memory.
    are_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", None)
    level = getattr(forward_ad, "_current_level", None)
    return are_transforms_active is None or level is None or are_transforms_active() or level >= 0


def is_unobserved(*modules: nn.Module) -> bool:
    """Return whether nobody notices when these modules run twice, or what becomes of their outputs.

    Hooks would: they count calls and keep outputs. So may a replaced `forward` (offloading, kernels) or weights that
    are gathered for each call (ZeRO-3).
    """
    # Where torch has another place for its hooks, there may be some.
    if any(getattr(every_module, name, True) for name in _GLOBAL_HOOKS):
        return False
    return not any(
        "forward" in vars(module)
        or any(getattr(module, name, True) for name in _HOOKS)
        or any(hasattr(parameter, "ds_id") for parameter in module._parameters.values())
        for module in modules
    )
