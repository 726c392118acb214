"""Averages of updates: equal to central training, the same in any transport, and deaf to what cannot be averaged."""

import math
from dataclasses import replace

import pytest
import torch
from learners import BASE
from torch.nn.functional import cross_entropy

from hfllm.errors import InputError
from hfllm.federation.rounds import (
    AGGREGATIONS,
    SERVER_OPTIMIZERS,
    RobustSum,
    WeightedSum,
    distances,
    norm,
    server_optimizer,
    weighted_average,
)
from hfllm.federation.updates import Expected, Update, changes, weights_sha256


def update(name="a", value=1.0, tokens=1, **overrides):
    tensors = {"w": torch.full((2, 3), value), "b": torch.full((2,), -value)}
    return Update(
        **{"organisation": name, "tensors": tensors, "num_tokens": tokens, "num_rows": 1, "base_sha256": BASE}
        | overrides
    )


@pytest.fixture
def organisations(make_model):
    """A model in float64, three organisations' rows with few or many target tokens, and the mean gradient of some."""
    model = make_model().double()
    generator = torch.Generator().manual_seed(1)
    rows = [
        torch.randint(5, 300, (count, length), generator=generator) for count, length in ((4, 6), (2, 30), (3, 15))
    ]
    received = {name: value.detach().clone() for name, value in model.named_parameters()}

    def gradient(batches):
        """Of the mean loss per target token of all rows of all batches."""
        tokens = sum(batch[:, 1:].numel() for batch in batches)
        model.zero_grad()
        for batch in batches:
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
            (cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum") / tokens).backward()
        return {name: value.grad.clone() for name, value in model.named_parameters()}

    def updates(weigh):
        for number, batch in enumerate(rows):
            trained = {name: received[name] - 0.5 * each for name, each in gradient([batch]).items()}
            yield Update(f"org{number}", changes(trained, received), weigh(batch), len(batch), BASE)

    return received, gradient(rows), updates


def by_tokens(batch):
    return batch[:, 1:].numel()


def furthest(one, other):
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_one_step_by_tokens_is_the_central_step(organisations):
    _, gradient, updates = organisations
    central = {name: -0.5 * value for name, value in gradient.items()}
    assert furthest(weighted_average(updates(by_tokens)), central) < 1e-7
    # Weighted by rows it is another step: the control.
    move = max(float(value.abs().max()) for value in central.values())
    assert furthest(weighted_average(updates(len)), central) > 0.05 * move


def step_of(optimizer, received, gradient):
    """What an optimizer's first step changes, given the gradient."""
    trained = {name: torch.nn.Parameter(value.clone()) for name, value in received.items()}
    for name, value in trained.items():
        value.grad = gradient[name].clone()
    optimizer(trained.values(), lr=0.01).step()
    return changes(trained, received)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_the_mean_of_local_steps_is_the_central_step_of_sgd_and_not_of_adamw(organisations, optimizer):
    received, gradient, updates = organisations
    local = []
    for each in updates(by_tokens):
        own = {name: value / -0.5 for name, value in each.tensors.items()}
        local.append(replace(each, tensors=step_of(optimizer, received, own)))
    mean, central = weighted_average(local), step_of(optimizer, received, gradient)
    flat, other = (torch.cat([each[name].flatten() for name in sorted(each)]) for each in (mean, central))
    if optimizer is torch.optim.SGD:
        assert furthest(mean, central) < 1e-7 and float(other.norm()) > 1e-3
    else:
        # Each step has nearly the sign of its gradient: where those differ, their mean is short.
        assert float(torch.cosine_similarity(flat, other, dim=0)) < 0.95 and flat.norm() < 0.95 * other.norm()


def test_the_first_round_of_fedadam_is_the_central_one(organisations):
    received, gradient, updates = organisations
    after = server_optimizer("fedadam", 0.01, 0.9, 0.99, 1e-3).step(received, weighted_average(updates(by_tokens)))
    for name, value in gradient.items():
        change = -0.5 * value
        expected = 0.01 * 0.1 * change / ((0.99 * 1e-6 + 0.01 * change**2).sqrt() + 1e-3)
        assert float((after[name] - received[name] - expected).abs().max()) < 1e-7
    assert furthest(after, received) > 1e-4


def test_the_sum_holds_in_low_precision():
    # 600 updates of 1 added in bfloat16 would stop at 256.
    many = (update(str(number), 1.0, tensors={"w": torch.ones(1, dtype=torch.bfloat16)}) for number in range(600))
    assert weighted_average(many)["w"].item() == 1


def test_drift_is_the_distance_to_the_mean():
    updates = [update("a", 1.0, 1), update("b", 3.0, 3)]
    total = WeightedSum()
    for each in updates:
        total.add(each)
    average = total.average()
    assert average["w"].unique().tolist() == [2.5] and total.num_tokens == 4
    apart = distances(updates, average)
    assert apart == pytest.approx({"a": 1.5 * math.sqrt(8), "b": 0.5 * math.sqrt(8)})
    assert total.drift() == pytest.approx(math.sqrt((apart["a"] ** 2 + 3 * apart["b"] ** 2) / 4))
    assert norm({"w": torch.tensor([3.0, 4.0])}) == 5


REFUSED = {
    "NaN": ({"tensors": {"w": torch.full((2, 3), math.nan), "b": torch.zeros(2)}}, "'b' sent w with NaN"),
    "infinite": ({"tensors": {"w": torch.zeros(2, 3), "b": torch.full((2,), math.inf)}}, "'b' sent b with NaN or inf"),
    "missing": ({"tensors": {"w": torch.zeros(2, 3)}}, "'b' sent no b"),
    "other": ({"tensors": {**update().tensors, "c": torch.zeros(1)}}, "'b' sent 'c'"),
    "shape": ({"tensors": {"w": torch.zeros(3, 2), "b": torch.zeros(2)}}, r"'b' sent w as float32 \[3, 2\]"),
    "dtype": ({"tensors": {"w": torch.zeros(2, 3).half(), "b": torch.zeros(2)}}, "'b' sent w as float16"),
    "base": ({"base_sha256": "f" * 64}, "'b' began from another base model: sha256 'ffffffffffff'"),
    "no tokens": ({"num_tokens": 0}, "'b': num_tokens is 0"),
    "no rows": ({"num_rows": -1}, "'b': num_rows is -1"),
    "twice": ({"organisation": "a"}, "'a' sent two"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_averaged_is_refused_and_named(case):
    fields, message = REFUSED[case]
    total = WeightedSum()
    total.add(update("a", 2.0))
    with pytest.raises(InputError, match=message):
        total.add(replace(update("b", 2.0), **fields))
    total.add(update("c", 4.0))
    assert total.organisations == ["a", "c"] and total.average()["w"].unique().tolist() == [3.0]


def test_no_update_is_refused():
    with pytest.raises(InputError, match="at least 1"):
        weighted_average([])
    with pytest.raises(InputError, match="sent no b"):
        weighted_average([update(tensors={"w": torch.zeros(2, 3)})], Expected.of(update().tensors, BASE))


def test_the_hash_of_a_base_sees_each_value_and_name():
    weights = {"a": torch.zeros(3), "b": torch.ones(2, dtype=torch.bfloat16)}
    digest = weights_sha256(weights)
    assert digest == weights_sha256(dict(reversed(weights.items()))) and len(digest) == 64
    for other in ({"a": torch.tensor([0, 0, 1e-30])}, {"a": torch.zeros(1, 3)}, {"a": torch.zeros(3).int()}):
        assert weights_sha256({**weights, **other}) != digest
    assert weights_sha256({"a": weights["a"], "c": weights["b"]}) != digest


def by_hand(name, changes, rate, b1=0.9, b2=0.99, tau=1e-3):
    """A weight that begins at 1, in plain numbers, from the algorithms' text."""
    weight, first, second = 1.0, 0.0, tau**2
    for change in changes:
        if name == "fedavg":
            weight += rate * change
            continue
        first = b1 * first + (1 if name == "momentum" else 1 - b1) * change
        if name == "momentum":
            weight += rate * first
            continue
        square = change * change
        second = {
            "fedadagrad": second + square,
            "fedadam": b2 * second + (1 - b2) * square,
            "fedyogi": second - (1 - b2) * square * math.copysign(1, second - square),
        }[name]
        weight += rate * first / (math.sqrt(second) + tau)
    return weight


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_server_optimizers_follow_the_paper_and_resume(name):
    moves = [0.3, -0.2, 0.001, 0.5]
    optimizer = server_optimizer(name)
    weights = {"w": torch.ones(1, dtype=torch.float64)}
    for number, move in enumerate(moves):
        if number == 2:
            resumed = server_optimizer(name)
            resumed.load_state_dict(optimizer.state_dict())
            optimizer = resumed
        weights = optimizer.step(weights, {"w": torch.tensor([move], dtype=torch.float64)})
    assert weights["w"].item() == pytest.approx(by_hand(name, moves, optimizer.learning_rate), rel=1e-12)
    assert optimizer.round == 4


def test_adagrad_is_torch_s():
    weight = torch.nn.Parameter(torch.ones(3).double())
    theirs = torch.optim.Adagrad([weight], lr=0.1, initial_accumulator_value=1e-6, eps=1e-3)
    ours, weights = server_optimizer("fedadagrad", 0.1, momentum=0.0), {"w": torch.ones(3).double()}
    for seed in range(3):
        change = torch.randn(3, generator=torch.Generator().manual_seed(seed)).double()
        weight.grad = -change
        theirs.step()
        weights = ours.step(weights, {"w": change})
    torch.testing.assert_close(weights["w"], weight.data, rtol=1e-12, atol=0)


def test_a_step_leaves_precision_and_what_it_was_given():
    weights, average = {"w": torch.ones(2, dtype=torch.bfloat16)}, {"w": torch.full((2,), 0.5, dtype=torch.float64)}
    after = server_optimizer("momentum").step(weights, average)
    assert after["w"].dtype == torch.bfloat16 and after["w"].tolist() == [1.5, 1.5]
    assert weights["w"].tolist() == [1, 1] and average["w"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adam"}, "expected one of fedavg, momentum"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"momentum": 1.0}, "momentum"),
        ({"tau": -1.0}, "tau"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        server_optimizer(**settings)


def test_states_and_weights_of_others_are_refused():
    adam = server_optimizer("fedadam")
    adam.step({"w": torch.ones(1)}, {"w": torch.ones(1)})
    with pytest.raises(InputError, match="not one of 'momentum'"):
        server_optimizer("momentum").load_state_dict(adam.state_dict())
    with pytest.raises(InputError, match="differ in 'w'"):
        server_optimizer().step({"w": torch.ones(1)}, {})


# ---- one hostile organisation ----

HOSTILE = {
    "1e30": lambda honest: {name: torch.full_like(value, 1e30) for name, value in honest.items()},
    "flipped": lambda honest: {name: -100 * value for name, value in honest.items()},
    "zeros": lambda honest: {name: torch.zeros_like(value) for name, value in honest.items()},
}


def six(hostile=None, tokens=(30, 50, 20, 40, 60, 50)):
    """Updates of six organisations: a common direction and a part of each one's own; the third may be hostile."""
    found = []
    for place, count in enumerate(tokens):
        generator = torch.Generator().manual_seed(place)
        tensors = {"w": 1 + torch.randn(40, 3, generator=generator), "b": 1 + torch.randn(7, generator=generator)}
        tensors = HOSTILE[hostile](tensors) if hostile and place == 2 else tensors
        found.append(update(f"org{place}", tokens=count, tensors=tensors))
    return found


def robust(updates, earlier=0.0, **settings):
    total = RobustSum(**settings)
    total.earlier_norm = earlier
    for each in updates:
        total.add(each)
    return total, total.average()


def apart(one, other):
    return norm({name: one[name] - other[name] for name in one})


@pytest.mark.parametrize("hostile", HOSTILE)
def test_one_hostile_of_six_moves_a_bounded_mean_little(hostile):
    updates = six(hostile)
    honest = [each for each in updates if each.organisation != "org2"]
    mean, total = weighted_average(honest), sum(each.num_tokens for each in updates)
    found, average = robust(updates)
    typical = sorted(norm(each.tensors) for each in updates)[2]
    # It has its share of the tokens, and a length of at most twice the median.
    furthest_away = 20 / total * (2 * typical + norm(mean))
    assert apart(average, mean) < 1.001 * furthest_away < 0.3 * norm(mean)
    assert list(found.bounded) == ([] if hostile == "zeros" else ["org2"])
    assert found.typical_norm == pytest.approx(typical, rel=1e-5)
    # Without a bound: the control.
    assert hostile == "zeros" or apart(weighted_average(updates), mean) > 5 * norm(mean)


@pytest.mark.parametrize("ratio", [0.0, 2.0])
@pytest.mark.parametrize("aggregation", ["median", "trimmed_mean"])
@pytest.mark.parametrize("hostile", HOSTILE)
def test_one_hostile_of_six_leaves_median_and_trimmed_mean_among_the_honest(hostile, aggregation, ratio):
    updates = six(hostile)
    _, average = robust(updates, aggregation=aggregation, max_norm_ratio=ratio)
    honest = [each.tensors for each in updates if each.organisation != "org2"]
    for name, value in average.items():
        values = torch.stack([each[name].double() for each in honest])
        assert (values.min(0).values <= value).all() and (value <= values.max(0).values).all()
    mean = {name: torch.stack([each[name].double() for each in honest]).mean(0) for name in average}
    assert apart(average, mean) < 0.5 * norm(mean)


def test_without_a_long_update_the_bits_are_those_of_the_mean():
    updates = six()
    total = WeightedSum()
    for each in updates:
        total.add(each)
    for settings in ({}, {"max_norm_ratio": 0.0}):
        found, average = robust(updates, **settings)
        assert all(torch.equal(average[name], value) for name, value in total.average().items())
        assert found.drift() == total.drift() and not found.bounded


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 10])
def test_median_and_trimmed_mean_are_numpy_s_and_scipy_s(count):
    import numpy
    from scipy.stats import trim_mean

    updates = [update(str(place), tensors={"w": torch.randn(5, 2)}, tokens=1 + place) for place in range(count)]
    values = numpy.stack([each.tensors["w"].double().numpy() for each in updates])
    found, average = robust(updates, aggregation="median", max_norm_ratio=0.0)
    numpy.testing.assert_allclose(average["w"].numpy(), numpy.median(values, 0), rtol=1e-12)
    expected = numpy.sqrt(((values - average["w"].numpy()) ** 2).sum((1, 2)).mean())
    assert found.drift() == pytest.approx(expected, rel=1e-12)
    _, average = robust(updates, aggregation="trimmed_mean", max_norm_ratio=0.0)
    # Of three and four organisations one is left out at each end, though a fifth of them is less than one.
    share = max(0.2, 1 / count + 1e-9) if count > 2 else 0.2
    numpy.testing.assert_allclose(average["w"].numpy(), trim_mean(values, share, 0), rtol=1e-12)


FEW = {
    "one, the first round": ([9.0], 0.0, {}),
    "one, later": ([9.0], 1.0, {"0": 2.0}),
    "two alike": ([1.0, 1.5], 0.0, {}),
    "two, one of zeros": ([0.0, 5.0], 0.0, {}),
    "two, one of them long": ([1.0, 1e30], 0.0, {"1": 2.0}),
    "two, one of them short": ([1e-9, 1.0], 1.0, {}),
    "two that grow": ([3.0, 3.5], 1.0, {}),
    "two, both below the round before": ([0.1, 50.0], 6.0, {"1": 12.0}),
    "two, both below it and nearer": ([0.1, 5.0], 6.0, {}),
    "half do not move": ([0.0, 0.0, 1.0, 1.1], 0.0, {}),
    "half do not move, one is long": ([0.0, 0.0, 1.0, 50.0], 0.0, {"3": 2.0}),
    "most do not move": ([0.0, 0.0, 0.0, 1.0, 1e30], 0.0, {"4": 2.0}),
    "most do not move, later": ([0.0, 0.0, 0.0, 0.0, 1e30], 1.0, {"4": 2.0}),
    "most do not move, and nothing tells": ([0.0, 0.0, 0.0, 0.0, 5.0], 0.0, {}),
    "none moves": ([0.0, 0.0, 0.0], 0.0, {}),
    "half of four": ([1.0, 1.0, 50.0, 50.0], 0.0, {"2": 2.0, "3": 2.0}),
}


@pytest.mark.parametrize("case", FEW)
def test_rounds_of_few_are_bounded_by_what_is_known(case):
    lengths, earlier, cut = FEW[case]
    updates = [update(str(place), tensors={"w": torch.tensor([length, 0.0])}) for place, length in enumerate(lengths)]
    found, average = robust(updates, earlier)
    kept = [cut.get(str(place), length) for place, length in enumerate(lengths)]
    assert found.bounded.keys() == cut.keys()
    assert average["w"][0].item() == pytest.approx(sum(kept) / len(kept), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"aggregation": "mode"}, "--aggregation 'mode': expected one of mean, median, trimmed_mean"),
        ({"trim": 0.5}, "--trim 0.5: expected a share of at least 0, below 0.5"),
        ({"trim": math.nan}, "--trim nan"),
        ({"max_norm_ratio": 0.5}, "--max_norm_ratio 0.5: expected a number of at least 1, or 0"),
        ({"max_norm_ratio": math.inf}, "--max_norm_ratio inf"),
    ],
)
def test_settings_of_a_robust_average_that_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        RobustSum(**settings)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_robust_average_refuses_what_a_sum_refuses(aggregation):
    with pytest.raises(InputError, match="at least 1"):
        RobustSum(aggregation=aggregation).average()
    for fields, message in REFUSED.values():
        total = RobustSum(aggregation=aggregation)
        total.add(update("a", 2.0))
        with pytest.raises(InputError, match=message):
            total.add(replace(update("b", 2.0), **fields))
        assert total.average()["w"].unique().tolist() == [2.0]
