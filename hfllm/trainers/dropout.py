"""Switch dropout off permanently."""

from torch import nn


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
