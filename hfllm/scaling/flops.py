"""Published arithmetic of training: FLOPs, utilization, pipeline bubbles and days.

Symbols are the papers': P or N parameters, D or T tokens, l layers, h hidden size, a heads, s sequence length,
V vocabulary, B sequences in a global batch, n devices, X achieved FLOP/s per device.
"""

from collections.abc import Sequence

from hfllm.errors import InputError

SECONDS_PER_DAY = 86400


def megatron_parameters(layers: int, hidden: int, vocab_size: int, sequence_length: int) -> float:
    """Return P = 12 l h^2 (1 + 13/(12h) + (V+s)/(12lh)) (Narayanan et al. 2021, arXiv:2104.04473, equation 2)."""
    return 12 * layers * hidden**2 * (1 + 13 / (12 * hidden) + (vocab_size + sequence_length) / (12 * layers * hidden))


def megatron_flops_per_batch(
    layers: int,
    hidden: int,
    vocab_size: int,
    sequence_length: int,
    batch_size: int,
    recompute: str = "none",
) -> float:
    """Return the FLOPs of a training step on B sequences, as in Korthikanti et al. 2022 (arXiv:2205.05198, app. A).

    Args:
        recompute: `"none"` is the model's FLOPs, 72 B l s h^2 (1 + s/(6h) + V/(12lh)). `"selective"` doubles the
            attention term, as the paper counts it: s/(3h). `"full"` is every layer's forward pass once more:
            96 B l s h^2 (1 + s/(6h) + V/(16lh)), equation 3 of Narayanan et al. 2021.

    Raises:
        InputError: for another `recompute`.
    """
    if recompute not in ("none", "selective", "full"):
        raise InputError(f"recompute={recompute!r} is not one of none, selective, full")
    layer = batch_size * layers * sequence_length * hidden**2
    attention, head = sequence_length / (6 * hidden), vocab_size / (12 * layers * hidden)
    if recompute == "full":
        return layer * (96 * (1 + attention) + 72 * head)
    return 72 * layer * (1 + attention * (2 if recompute == "selective" else 1) + head)


def palm_flops_per_token(
    num_parameters: float, layers: int, heads: int, head_dim: int, sequence_length: int, attention: bool = True
) -> float:
    """Return the matrix-multiplication FLOPs of training on one token: 6N + 12 L H Q T, without `attention` 6N.

    PaLM, Chowdhery et al. 2022, arXiv:2204.02311, appendix B.

    Args:
        num_parameters: N, those multiplied with each token: only active experts; an embedding table that is
            not also the head is looked up, not multiplied.
        sequence_length: T, tokens of a sequence, all of which attend to each other in this count.
    """
    return 6 * num_parameters + 12 * layers * heads * head_dim * sequence_length * attention


def training_flops(num_parameters: float, tokens: float) -> float:
    """Return 6ND: forward and backward pass per parameter and token (Kaplan et al. 2020, arXiv:2001.08361)."""
    return 6 * num_parameters * tokens


def utilization(tokens_per_second: float, flops_per_token: float, devices: int, peak_flops: float) -> float:
    """Return the share of the devices' peak that is reached.

    This is MFU with the model's FLOPs per token, HFU with those of the hardware, including recomputation.

    Args:
        tokens_per_second: of all devices together.
        peak_flops: of one device, in FLOP/s.
    """
    return tokens_per_second * flops_per_token / (devices * peak_flops)


def training_days(
    num_parameters: float, tokens: float, devices: int, achieved_flops: float, recompute: bool = True
) -> float:
    """Return 8TP/(nX) in days (Narayanan et al. 2021, equation 4), or 6TP/(nX) when nothing is recomputed.

    Args:
        achieved_flops: X, FLOP/s of one device, including any recomputation.
    """
    return (8 if recompute else 6) * tokens * num_parameters / (devices * achieved_flops) / SECONDS_PER_DAY


def days_at_speed(tokens: float, tokens_per_second: float) -> float:
    """Return the days to train on `tokens` at a measured speed of all devices together."""
    return tokens / tokens_per_second / SECONDS_PER_DAY


def pipeline_bubble(pipeline: int, micro_batches: int, interleave: int = 1) -> float:
    """Return idle time over useful time, (p - 1)/(v m) (Narayanan et al. 2021, section 2.2).

    Args:
        pipeline: p, stages.
        micro_batches: m, micro-batches per step.
        interleave: v, model chunks on each device.
    """
    return (pipeline - 1) / (interleave * micro_batches)


def ramp_tokens(stages: Sequence[tuple[int, int]], sequence_length: int) -> int:
    """Return the tokens of a run whose batch grows.

    Args:
        stages: sequences per batch, and the last step of the stage; PaLM's (arXiv:2204.02311, section 5) are
            `[(512, 50_000), (1024, 115_000), (2048, 255_000)]`.

    Raises:
        InputError: when the steps do not grow.
    """
    total, before = 0, 0
    for sequences, until in stages:
        if until <= before or sequences < 1:
            raise InputError(f"batch ramp: stage {sequences}:{until} must have sequences and end after step {before}")
        total += sequences * (until - before) * sequence_length
        before = until
    return total
