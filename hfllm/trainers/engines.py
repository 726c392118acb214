"""Models inside of engines: partitioned by DeepSpeed's ZeRO-3, and without dropout."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def gather_parameters(model: nn.Module) -> Iterator[None]:
    """Gather a model partitioned by ZeRO-3 within this context; every process has to enter."""
    spread = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    if not spread:
        yield
        return
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    if all(parameter.ds_status == ZeroParamStatus.AVAILABLE for parameter in spread):
        # An outer context would find it partitioned again.
        yield
        return
    with deepspeed.zero.GatheredParameters(spread):
        yield


def unshard(model: nn.Module) -> nn.Module:
    """Undo in place ZeRO-3's partitioning of every loaded model, for one that its engine does not train.

    Returns:
        The model, whole on each process; every process has to call this.
    """
    whole: dict[int, nn.Parameter] = {}
    with gather_parameters(model):
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if hasattr(parameter, "ds_id"):
                    # Tied weights stay tied.
                    copy = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                    module._parameters[name] = whole.setdefault(parameter.ds_id, copy)
    return model


# ---- dropout ----
#
# Switch dropout off permanently.


def disable_dropout(*models: nn.Module | None) -> None:
    """Set every dropout probability of the models to zero."""
    for model in models:
        if model is None:
            continue
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            # Attention modules store the probability as a number, or read it from the config.
            for holder in (module, getattr(module, "config", None)):
                for name, value in vars(holder).items() if holder is not None else ():
                    if isinstance(value, float) and (name.endswith("dropout") or name.endswith("pdrop")):
                        setattr(holder, name, 0.0)
