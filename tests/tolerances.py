"""How far two runs may differ that add the same numbers in another order."""

import math

import torch

# Adam's step is lr * m / (sqrt(v) + eps): rounding changes it by the gradient's relative error times lr. In fp32 that
# error is some 1e-7 for most weights, but where a gradient nearly cancels out it may reach half a percent.
LARGEST_ERROR, USUAL_ERROR, UNUSUAL = 5e-3, 2e-4, 1e-3


def assert_same_learning(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], learning_rate: float, steps: int
) -> None:
    """Weights of two runs of Adam in fp32 that differ by rounding alone, whose errors add up as a random walk does.

    No weight may be further apart than `LARGEST_ERROR`, and no more than the share `UNUSUAL` than `USUAL_ERROR`, each
    times the learning rate and the square root of the number of steps. Another batch, or a mean over other rows,
    changes every weight by a good part of the learning rate.
    """
    assert actual.keys() == expected.keys()
    unit, apart = learning_rate * math.sqrt(steps), []
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, atol=LARGEST_ERROR * unit, rtol=0, msg=name)
        apart.append((actual[name] - value).abs().flatten())
    share = (torch.cat(apart) > USUAL_ERROR * unit).float().mean().item()
    assert share <= UNUSUAL, f"{share:.2%} of the weights are further apart than rounding usually takes them"
