"""Learning rates of PPO for a model of any size, where the user gives none.

The highest rate at which PPO improves the reward steadily falls with the size of a model. It is higher for an adapter
than for all weights, and a new value head, which begins at zero, needs a high one whatever the size of its trunk. The
numbers were measured by `benchmarks/learning_rates.py` on models of 0.26M to 135M parameters
(benchmarks/results/learning_rates.md). Beyond that the rule extrapolates, to 3.6e-6 for all weights of a 7B model.
"""

from transformers import PreTrainedModel

from hfllm.runs.arguments import changed
from hfllm.trainers.ppo.config import PPOConfig

# The rate of models of BASE_SIZE parameters and smaller ones. Above, it falls with the square root of the size; that
# of an adapter, whose own size hardly grows, with the fourth root.
BASE_SIZE, FULL_RATE, ADAPTER_RATE = 1e6, 3e-4, 3e-3
HEAD_RATE = 3e-3


def default_learning_rate(num_parameters: int, has_adapter: bool = False) -> float:
    """Return the policy's learning rate, rounded to two digits.

    Args:
        num_parameters: of the whole model, with those that are not trained.
        has_adapter: whether an adapter is trained in place of all weights.
    """
    shrinks = min(1.0, BASE_SIZE / max(num_parameters, 1))
    return float(f"{ADAPTER_RATE * shrinks**0.25 if has_adapter else FULL_RATE * shrinks**0.5:.1e}")


def with_default_rates(args: PPOConfig, policy: PreTrainedModel, value_model: PreTrainedModel | None) -> PPOConfig:
    """Return the arguments with the rates that the user left open, for the policy and for the critic's own weights.

    Args:
        value_model: the critic, if it is a model of its own: its rate is that of all weights of its size.
    """
    rate, value_rate = args.learning_rate, args.value_learning_rate
    if rate is None:
        rate = default_learning_rate(size_of(policy), hasattr(policy, "peft_config"))
    if value_rate is None:
        value_rate = HEAD_RATE if value_model is None else default_learning_rate(size_of(value_model))
    return changed(args, learning_rate=rate, value_learning_rate=value_rate)


def size_of(model: PreTrainedModel) -> int:
    """Return the number of a model's parameters, also where they are quantized or split over processes."""
    # bitsandbytes stores two weights of 4 bits in a byte; ZeRO-3 leaves an empty tensor and the number of elements.
    packed = {id(each): 2 for each in model.parameters() if type(each).__name__ == "Params4bit"}
    return sum(getattr(each, "ds_numel", each.numel()) * packed.get(id(each), 1) for each in model.parameters())
