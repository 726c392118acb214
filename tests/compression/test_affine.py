"""The reference against naive loops, and bitsandbytes and torch against the reference."""

import pytest
import torch

from hfllm.compression import int8
from hfllm.errors import InputError


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive(rows, bits, symmetric):
    """Quantize and read back lists of floats that share a scale each, in Python's arithmetic."""
    top = 2 ** (bits - 1) - 1
    for row in rows:
        if symmetric:
            scale, zero, low = max(map(abs, row)) / top, 0, -top
        else:
            least, most, low = min(0.0, *row), max(0.0, *row), -top - 1
            scale = (most - least) / (top - low)
            zero = round(low - least / scale)
        yield [scale * (min(max(round(x / scale + zero), low), top) - zero) for x in row]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("granularity", int8.GRANULARITIES)
def test_the_reference_is_what_loops_compute(granularity, bits, symmetric):
    matrix = normal(6, 24) + 0.3
    size = 8 if granularity == "group" else None
    read_back = int8.quantize(matrix, bits, symmetric, granularity, size).dequantize()
    shared = {"tensor": matrix.reshape(1, -1), "channel": matrix, "group": matrix.reshape(-1, 8)}[granularity]
    expected = torch.tensor(list(naive(shared.tolist(), bits, symmetric))).reshape(6, 24)
    torch.testing.assert_close(read_back, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", int8.GRANULARITIES)
def test_no_entry_is_off_by_more_than_half_a_step(granularity, symmetric, seed):
    matrix = normal(8, 32, seed=seed) * 10.0 ** normal(8, 1, seed=seed + 50)
    matrix[2] = 0
    matrix[3] = matrix[3].abs()
    size = 16 if granularity == "group" else None
    stored = int8.quantize(matrix, 8, symmetric, granularity, size)
    off = (stored.dequantize() - matrix).abs()
    # A rounded zero point moves the ends of an asymmetric range by up to half a step more.
    slack = 1 if symmetric else 2
    assert (off <= slack * stored.largest_error() * (1 + 1e-4)).all()
    inside = (stored.values_OI > -128) & (stored.values_OI < 127)
    assert (off <= stored.largest_error() * (1 + 1e-4))[inside].all()
    assert (stored.dequantize()[2] == 0).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", int8.GRANULARITIES)
def test_the_bound_on_errors_is_half_a_step_and_is_reached(granularity, symmetric, bits):
    # Values close together from end to end of a range around 0, another range for each group.
    matrix = torch.linspace(-1, 1, 250).repeat(4, 2) * torch.logspace(-1, 1, 8).repeat_interleave(250).view(4, 500)
    stored = int8.quantize(matrix, bits, symmetric, granularity, 250 if granularity == "group" else None)
    parts = matrix, stored.largest_error(), (stored.dequantize() - matrix).abs(), stored.values_OI
    groups = {"tensor": 1, "channel": 4, "group": 8}[granularity]
    values, bound, off, integers = (part.reshape(groups, -1) for part in parts)
    # All integers but one span a symmetric range, all of them an asymmetric one.
    step = (values.amax(1, keepdim=True) - values.amin(1, keepdim=True)) / (2**bits - (2 if symmetric else 1))
    torch.testing.assert_close(bound, (step / 2).expand(bound.shape))
    # At the ends of an asymmetric range values may be clipped.
    is_inside = (integers > symmetric - 2 ** (bits - 1)) & (integers < 2 ** (bits - 1) - 1)
    largest = off.masked_fill(~is_inside, 0).amax(1, keepdim=True)
    assert (largest > 0.9 * step / 2).all() and (largest <= (1 + 1e-4) * step / 2).all()


def test_kept_columns_have_no_error_to_bound():
    kept = torch.tensor([1, 6])
    bound = int8.quantize(normal(4, 8), keep_columns=kept).largest_error()
    assert bound[:, kept].eq(0).all() and (bound.gt(0).sum() == 4 * 6)


def test_a_finer_scale_errs_less_and_costs_more():
    matrix = normal(32, 128) * torch.logspace(-1, 1, 32)[:, None] * torch.logspace(-0.5, 0.5, 128)
    ways = [("tensor", None), ("channel", None), ("group", 32)]
    stored = [int8.quantize(matrix, 4, True, *way) for way in ways]
    errors = [(each.dequantize() - matrix).norm().item() for each in stored]
    assert errors == sorted(errors, reverse=True)
    assert [each.nbytes for each in stored] == [2048 + 4 * scales for scales in (1, 32, 128)]


def test_one_sided_ranges_gain_a_bit_by_a_zero_point():
    matrix = normal(16, 64).abs()
    errors = [(int8.quantize(matrix, 8, way).dequantize() - matrix).norm() for way in (True, False)]
    assert errors[1] < 0.6 * errors[0]


def test_kept_columns_come_back_as_they_were():
    matrix = int8.plant_outliers(normal(16, 64), torch.tensor([5, 40]), sigmas=20)
    stored = int8.quantize(matrix, keep_columns=int8.outlier_columns(matrix, 6))
    assert stored.float_columns.tolist() == [5, 40]
    assert torch.equal(stored.dequantize()[:, [5, 40]], matrix[:, [5, 40]])
    assert (stored.dequantize() - matrix).norm() < 0.3 * (int8.quantize(matrix).dequantize() - matrix).norm()
    assert stored.nbytes == 16 * 62 + 16 * 4 + 2 * (16 * 4 + 4)


def test_the_integer_product_is_exact():
    left = torch.full((3, 4096), -127, dtype=torch.int8)
    assert torch.equal(int8.int8_matmul(left, left), torch.full((3, 3), 127 * 127 * 4096, dtype=torch.int32))
    left, right = (torch.randint(-127, 128, (5, 64), dtype=torch.int8) for _ in range(2))
    expected = [[sum(a * b for a, b in zip(x, y, strict=True)) for y in right.tolist()] for x in left.tolist()]
    assert int8.int8_matmul(left, right).tolist() == expected


def test_no_sum_of_the_integer_product_is_rounded():
    """Sums from 2^24 on, which float32 holds no longer to the unit."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(90, 128, (8, 4096), dtype=torch.int8, generator=generator) for _ in range(2))
    product = int8.int8_matmul(left, right)
    assert product.dtype == torch.int32 and product.min() > 2**24
    assert torch.equal(product.long(), (left.long().unsqueeze(1) * right.long()).sum(-1))
    # A product in float32 would have lost some of them.
    assert not torch.equal(product.float().int(), product)


def error_of(tokens, weight, **options):
    exact = tokens @ weight.T
    return ((int8.vectorwise_linear(tokens, weight, **options) - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("sigmas", [6, 12, 25, 60])
@pytest.mark.parametrize("seed", range(3))
def test_splitting_outliers_off_lowers_the_error(sigmas, seed):
    """Of what the ordinary features say; the outliers themselves would drown it in the whole product's norm."""
    columns = torch.tensor([3, 77])
    tokens = int8.plant_outliers(normal(64, 256, seed=seed), columns, sigmas * 1.01)
    weight = normal(32, 256, seed=seed + 9) * 0.05
    weight[:, columns] = 0
    split = error_of(tokens, weight, threshold=6)
    assert split < 0.02
    whole = error_of(tokens, weight, threshold=0)
    # The scale of a token grows from about 2.8 sigma to the outlier's size, and the rounding error with it.
    assert whole / split > 0.6 * sigmas / 2.8
    assert int8.outlier_columns(tokens, 6).tolist() == columns.tolist()


@pytest.mark.parametrize("sign", [1, -1])
def test_a_feature_that_just_reaches_the_threshold_is_an_outlier(sign):
    """Split off, it takes no step from the other features of its token."""
    tokens, weight = normal(4, 32).clamp(-2, 2), normal(8, 32)
    tokens[1, 5] = sign * 6.0
    tokens[2, 9] = torch.nextafter(torch.tensor(sign * 6.0), torch.tensor(0.0))
    assert int8.outlier_columns(tokens, 6).tolist() == [5]
    ordinary = tokens.clone()
    ordinary[:, 5] = 0
    weight_read = int8.quantize(weight).dequantize()
    # Column by column as the others; the ordinary entries of an outlier's column count in their tokens' scales.
    scale = tokens.abs().amax(1, keepdim=True)
    scale[1] = ordinary[1].abs().max()
    read = (ordinary * 127 / scale).round() * scale / 127
    expected = read @ weight_read.T + tokens[:, [5]] * weight_read[:, 5]
    torch.testing.assert_close(int8.vectorwise_linear(tokens, weight, threshold=6), expected, atol=1e-4, rtol=1e-5)


def test_without_outliers_splitting_changes_nothing():
    tokens, weight = normal(16, 64).clamp(-5, 5), normal(8, 64)
    assert torch.equal(
        int8.vectorwise_linear(tokens, weight, threshold=6), int8.vectorwise_linear(tokens, weight, threshold=0)
    )


def test_the_exact_weights_of_the_paper_err_less_than_those_read_back():
    tokens, weight = int8.plant_outliers(normal(64, 128), torch.tensor([7]), 60), normal(32, 128)
    assert error_of(tokens, weight, exact_outlier_weights=True) < 0.5 * error_of(tokens, weight)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"bits": 9}, "bits=9: expected 2 to 8"),
        ({"granularity": "row"}, "'row': expected one of tensor, channel, group"),
        ({"granularity": "group"}, "group_size=None: expected a divisor of the 24 columns"),
        ({"granularity": "group", "group_size": 7}, "group_size=7: expected a divisor"),
        ({"group_size": 8}, "group_size=8 is for granularity='group'"),
    ],
)
def test_settings_that_make_no_sense(options, expected):
    with pytest.raises(InputError, match=expected):
        int8.quantize(normal(4, 24), **options)
    with pytest.raises(InputError, match="a matrix is quantized, got 1"):
        int8.quantize(normal(4))


# ---- the libraries ----


def bitsandbytes_layer(weight, threshold):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(weight.shape[1], weight.shape[0], False, has_fp16_weights=False, threshold=threshold)
    layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    return layer.to("cpu").eval()


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("sigmas", [1, 8, 40])
def test_bitsandbytes_int8_is_the_reference(threshold, sigmas):
    # Halves: bitsandbytes rounds weights and inputs to float16 before it quantizes.
    tokens = int8.plant_outliers(normal(12, 64), torch.tensor([9]), sigmas).half().float()
    weight = (normal(16, 64, seed=1) * 0.1).half().float()
    layer = bitsandbytes_layer(weight, threshold)
    with torch.no_grad():
        output = layer(tokens)
    stored = int8.quantize(weight)
    assert torch.equal(layer.state.CB, stored.values_OI)
    torch.testing.assert_close(layer.state.SCB / 127, stored.scale.flatten())
    expected = int8.vectorwise_linear(tokens, weight, threshold=threshold)
    torch.testing.assert_close(output, expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-3)
    if threshold and sigmas >= 8:
        assert layer.state.idx.tolist() == int8.outlier_columns(tokens, threshold).tolist()


def test_bitsandbytes_splits_off_what_just_reaches_the_threshold():
    tokens, weight = normal(5, 64).clamp(-2, 2).half().float(), (normal(16, 64, seed=1) * 0.1).half().float()
    tokens[0, 9], tokens[3, 40], tokens[4, 41] = 6.0, -6.0, 5.996  # the last is the half below
    layer = bitsandbytes_layer(weight, 6.0)
    with torch.no_grad():
        output = layer(tokens)
    assert layer.state.idx.tolist() == int8.outlier_columns(tokens, 6).tolist() == [9, 40]
    expected = int8.vectorwise_linear(tokens, weight, threshold=6)
    torch.testing.assert_close(output, expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-3)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.filterwarnings("ignore")
def test_torch_dynamic_weights_are_the_reference(granularity):
    from torch.ao.quantization import (
        default_dynamic_qconfig,
        per_channel_dynamic_qconfig,
        quantize_dynamic,
    )

    layer = torch.nn.Linear(48, 20, bias=False)
    qconfig = {"tensor": default_dynamic_qconfig, "channel": per_channel_dynamic_qconfig}[granularity]
    stored = quantize_dynamic(torch.nn.Sequential(layer), {torch.nn.Linear: qconfig})[0].weight()
    ours = int8.quantize(layer.weight.detach(), granularity=granularity)
    # torch spreads the same magnitude over 127.5 steps to either side, so that -128 has a use.
    scale = stored.q_scale() if granularity == "tensor" else stored.q_per_channel_scales().float()
    torch.testing.assert_close(
        torch.as_tensor(scale).float().flatten(), ours.scale.flatten() * 127 / 127.5, rtol=1e-5, atol=1e-9
    )
    off = (stored.dequantize() - ours.dequantize()).abs()
    assert (off <= ours.largest_error() * 2).all()
