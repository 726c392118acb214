"""Clipping, noise, canaries and the proximal term."""

import math
import random

import pytest
import torch
from learners import BASE

from hfllm.errors import InputError
from hfllm.federation.averaging import norm
from hfllm.federation.membership import make_canaries, measure_leak
from hfllm.federation.privacy import clipped, draw_participants, private_average
from hfllm.federation.proximal import ProximalTerm
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


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_proximal_term_is_the_loss_s(accumulation, tmp_path):
    """Three steps of SGD on (x - 1)^2 + mu / 2 (x - x0)^2 by a Trainer, against the recursion."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    class Parabola(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.x = torch.nn.Parameter(torch.tensor([3.0]))
            self.unused = torch.nn.Parameter(torch.tensor([3.0]))

        def forward(self, y):
            return {"loss": ((self.x - y) ** 2).mean()}

    model = Parabola()
    arguments = TrainingArguments(
        **{"output_dir": str(tmp_path), "learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant"},
        **{"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulation, "max_steps": 3},
        **{"use_cpu": True, "report_to": "none", "save_strategy": "no", "max_grad_norm": 0.0},
    )
    rows = Dataset.from_dict({"y": [1.0] * 12})
    Trainer(model, arguments, train_dataset=rows, callbacks=[ProximalTerm(0.7)]).train()
    x = 3.0
    for _ in range(3):
        x -= 0.1 * (2 * (x - 1) + 0.7 * (x - 3.0))
    assert model.x.item() == pytest.approx(x, rel=1e-5) and model.unused.item() == 3
    with pytest.raises(InputError, match="strength of the proximal term is -1"):
        ProximalTerm(-1)
