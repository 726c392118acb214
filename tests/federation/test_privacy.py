"""Clipping, noise and canaries."""

import gc
import math
import os
import random
import weakref

import pytest
import torch
from learners import BASE

from hfllm.errors import InputError
from hfllm.federation.privacy import ClippedSum, clipped, make_canaries, measure_leak, normal, private_average
from hfllm.federation.rounds import draw_participants, norm
from hfllm.federation.updates import Update

WEIGHTS = {"w": torch.zeros(20, 50), "b": torch.zeros(2)}


def update(name, size, tokens=1):
    generator = torch.Generator().manual_seed(len(name))
    tensors = {key: torch.randn(value.shape, generator=generator) for key, value in WEIGHTS.items()}
    length = norm(tensors)
    return Update(name, {key: size / length * value for key, value in tensors.items()}, tokens, 1, BASE)


def average(updates, clip=1.0, noise=0.0, expected=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return private_average(updates, clip, noise, expected, WEIGHTS, BASE, generator)


def test_clipping_bounds_the_norm_of_all_tensors_together():
    large, length = clipped(update("a", 50.0), 2.0)
    assert length == pytest.approx(50, rel=1e-6) and norm(large.tensors) <= 2.0 + 1e-12
    small = update("a", 1.5)
    assert clipped(small, 2.0)[0] is small
    with pytest.raises(InputError, match="clip_norm is 0"):
        clipped(small, 0)


def test_one_organisation_moves_the_mean_by_its_bound_at_most():
    """With or without it, however large its change and however many its tokens."""
    others = [update("aa", 0.5, 10), update("bbb", 9.0, 1)]
    without = average(others)
    for size, tokens in ((0.1, 1), (1e6, 10**9)):
        with_it = average([*others, update("cccc", size, tokens)])
        moved = norm({name: with_it[name] - without[name] for name in without})
        assert moved == pytest.approx(min(size, 1.0) / 4, rel=1e-6)


def test_noise_has_the_accountant_s_deviation_whoever_came():
    for updates in ([], [update("a", 3.0)], [update("a", 3.0), update("bb", 3.0)]):
        quiet, loud = average(updates, clip=0.5), average(updates, clip=0.5, noise=2.0)
        noise = torch.cat([(loud[name] - quiet[name]).flatten() for name in loud])
        # 1,002 draws: the standard error of a deviation is its 45th part.
        assert noise.std().item() == pytest.approx(2.0 * 0.5 / 4, rel=0.1)
    one, other = (private_average([], 1.0, 1.0, 4, WEIGHTS, BASE)["w"] for _ in range(2))
    assert not torch.equal(one, other)


def test_noise_is_the_operating_system_s_and_has_no_seed(monkeypatch):
    """torch's generator on the CPU keeps 32 bits of a seed: all of them can be tried."""

    def seeded(*args):
        raise AssertionError("a generator was seeded")

    monkeypatch.setattr(torch, "Generator", seeded)
    monkeypatch.setattr(torch, "manual_seed", seeded)
    monkeypatch.setattr(torch, "randn", seeded)
    drawn, read = [], os.urandom
    monkeypatch.setattr(os, "urandom", lambda count: drawn.append(count) or read(count))
    found = private_average([], 1.0, 1.0, 4, WEIGHTS, BASE)
    assert sum(drawn) == 16 * 501 and found["w"].std() > 0.2
    assert normal(()).shape == () and normal((3,)).shape == (3,) and normal((0, 4)).shape == (0, 4)


def test_noise_is_normal():
    draws = normal((200, 1000))
    assert draws.dtype == torch.float64 and draws.unique().numel() == 200_000
    # Standard errors of 200,000 draws: .0022 of the mean, .0016 of the deviation, .011 of the fourth moment (3).
    assert draws.mean().item() == pytest.approx(0, abs=0.012)
    assert draws.std().item() == pytest.approx(1, abs=0.009)
    assert draws.pow(4).mean().item() == pytest.approx(3, abs=0.2)
    # Both numbers of a pair, which come from the same bits, are independent.
    assert (draws.flatten()[:100_000] * draws.flatten()[100_000:]).mean().item() == pytest.approx(0, abs=0.02)
    for place in (-1.6449, 0.0, 1.6449):
        share = 0.5 * (1 + math.erf(place / math.sqrt(2)))
        assert (draws < place).double().mean().item() == pytest.approx(share, abs=0.006)


def test_the_bits_become_numbers_as_box_and_muller_say(monkeypatch):
    bits = [3 << 50, 1 << 51, 2**53 - 1, 0]
    monkeypatch.setattr(os, "urandom", lambda count: b"".join(each.to_bytes(8, "little") for each in bits))
    radius, angle = math.sqrt(-2 * math.log((bits[0] + 1) / 2**53)), 2 * math.pi * 0.25
    expected = [radius * math.cos(angle), 0.0, radius * math.sin(angle), 0.0]
    assert normal((4,)).tolist() == pytest.approx(expected, abs=1e-12)


def test_a_sum_keeps_no_update():
    total = ClippedSum(1.0, 0.0, 2, WEIGHTS, BASE)
    references = []
    for name in ("a", "bb"):
        each = update(name, 3.0)
        references += [weakref.ref(tensor) for tensor in each.tensors.values()]
        total.add(each)
        del each
    gc.collect()
    assert not any(reference() is not None for reference in references)
    assert norm(total.average()) <= 1 + 1e-9
    with pytest.raises(InputError, match="'a' sent two"):
        total.add(update("a", 1.0))


def test_a_private_average_refuses_what_an_average_does():
    bad = update("aa", 1.0)
    bad.tensors["w"][0, 0] = math.nan
    with pytest.raises(InputError, match="'aa' sent w with NaN"):
        average([bad])
    for options, message in (({"noise": -1.0}, "noise_multiplier"), ({"expected": 0}, "expected_participants")):
        with pytest.raises(InputError, match=message):
            average([], **options)


def test_participation_is_independent():
    rng, names = random.Random(0), [str(number) for number in range(10)]
    counts = [len(draw_participants(names, 0.3, rng)) for _ in range(4000)]
    mean = sum(counts) / 4000
    # Binomial: the mean is 3, the variance 2.1; a fixed number would have none.
    assert mean == pytest.approx(3, abs=0.1)
    assert sum((count - mean) ** 2 for count in counts) / 4000 == pytest.approx(2.1, rel=0.1)


def test_canaries_are_distinct_and_the_seed_s():
    drawn = make_canaries(20, 30, seed=1)
    assert drawn == make_canaries(20, 30, seed=1) != make_canaries(20, 30, seed=2)
    assert len({*drawn.trained, *drawn.held_out}) == 50 and all(len(text) == 14 for text in drawn.trained)
    with pytest.raises(InputError, match="long enough"):
        make_canaries(20, 30, seed=1, length=1)


def test_leaks_are_measured_from_none_to_all():
    rng = random.Random(3)
    held_out = [rng.random() for _ in range(255)]
    all_of_it = measure_leak([-1.0] * 9, held_out)
    assert all_of_it.auroc.value == 1 and all_of_it.auroc.low > 0.85
    assert all_of_it.exposure == all_of_it.most_exposure == 8
    none_of_it = measure_leak([rng.random() for _ in range(400)], held_out)
    assert none_of_it.auroc.low < 0.5 < none_of_it.auroc.high
    # Uniform ranks have 1 / ln 2 bits on average, less what finitely many lose.
    assert none_of_it.no_exposure == pytest.approx(1 / math.log(2), abs=0.03)
    assert none_of_it.exposure == pytest.approx(none_of_it.no_exposure, abs=0.25)
    with pytest.raises(InputError, match="NaN"):
        measure_leak([math.nan], [1.0])
