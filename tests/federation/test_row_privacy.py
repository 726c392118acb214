"""DP-SGD by single rows, against gradients written out: clipping, noise, draws, and rounds that are answered once."""

import math
import random

import pytest
import torch
from test_local_learner import RATE, ROWS, PretendedTrainer, Scores, local_learner

from hfllm.errors import InputError
from hfllm.federation.organisations import hold_out
from hfllm.federation.privacy import AnsweredRounds, RowPrivacy, RowSum, check_row_budget, epsilon_of


class Chosen(random.Random):
    """Draws the rows of a list, in each step the next list."""

    def __init__(self, steps, num_rows):
        super().__init__(0)
        self.numbers = iter([0.0 if place in step else 0.999 for step in steps for place in range(num_rows)])

    def random(self):
        return next(self.numbers)


def row_gradient(x, row):
    """Gradient of the mean square over the targets of one row, in closed form."""
    token, label, gradient = row["input_ids"][1], row["labels"][1], torch.zeros_like(x)
    gradient[token] = 2 * (x[token] - label)
    return gradient


def by_hand(steps, clip, size, noises=None):
    x = Scores().x.detach()
    for number, places in enumerate(steps):
        total = torch.zeros_like(x) if noises is None else noises[number]
        for place in places:
            gradient = row_gradient(x, ROWS[place])
            total = total + gradient * min(1.0, clip / float(gradient.norm())) if gradient.any() else total
        x = x - RATE * total / size
    return x


def learned(privacy, steps, per_device=4, accumulation=1):
    learner = local_learner(PretendedTrainer(per_device, accumulation, True), steps)
    return learner.learn(ROWS, learner.weights(), 0, steps, "seed", privacy=privacy)


@pytest.mark.parametrize("clip", [0.5, 3.0, 1e6])
@pytest.mark.parametrize("parts", [(4, 1), (1, 4)])
def test_steps_are_sums_of_cut_rows_over_the_number_that_is_expected(clip, parts):
    steps = [[0, 3, 5, 6, 7], [], [2], list(range(8))]
    found = learned(RowPrivacy(clip, 0.0, rng=Chosen(steps, 8)), 4, *parts)
    torch.testing.assert_close(found.weights["x"], by_hand(steps, clip, 4), rtol=0, atol=1e-12)
    assert found.num_rows == 14


def test_noise_is_on_the_sum_also_of_no_rows():
    steps, drawn = [[1, 2], []], torch.Generator().manual_seed(5)
    noises = [0.5 * 3.0 * torch.randn(5, generator=drawn, dtype=torch.float64) for _ in steps]
    found = learned(RowPrivacy(3.0, 0.5, torch.Generator().manual_seed(5), Chosen(steps, 8)), 2)
    torch.testing.assert_close(found.weights["x"], by_hand(steps, 3.0, 4, noises), rtol=0, atol=1e-12)


def test_fewer_rows_than_a_batch_are_all_taken_and_are_what_is_expected():
    found = learned(RowPrivacy(1e6, 0.0), 1, per_device=64)
    torch.testing.assert_close(found.weights["x"], by_hand([range(8)], 1e6, 8), rtol=0, atol=1e-12)


def test_one_row_moves_the_sum_by_the_norm_at_most():
    """Over all tensors together, and whatever it holds: also what is infinite."""
    layers = torch.nn.Linear(6, 3).double()
    rows = (
        torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).double()
        * torch.tensor([1, 9, 0.01, 1e200])[:, None]
    )

    def total(rows):
        summed = RowSum(list(layers.parameters()), RowPrivacy(0.7, 0.0))
        for row in rows:
            layers(row).square().sum().backward()
            summed.take()
        summed.set_gradient(1.0)
        return torch.cat([each.grad.flatten() for each in layers.parameters()])

    def cut(row):
        values = torch.autograd.grad(layers(row).square().sum(), list(layers.parameters()))
        flat = torch.cat([value.flatten() for value in values])
        return flat * min(1.0, 0.7 / float(flat.norm()))

    assert cut(rows[0]).norm() == pytest.approx(0.7)
    torch.testing.assert_close(total(rows[:3]), sum(cut(row) for row in rows[:3]), rtol=1e-12, atol=0)
    torch.testing.assert_close(total(rows), total(rows[:3]), rtol=0, atol=0)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_row_whose_gradient_is_not_finite_adds_nothing(value):
    """A share of 0 of what is infinite would be NaN, in all rows' sum."""
    parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))]
    summed = RowSum(parameters, RowPrivacy(1.0, 0.0))
    for gradients in (([3.0, 0.0, 0.0], [0.0, 4.0]), ([1.0, value, 0.0], [1.0, 1.0]), ([0.0, 0.5, 0.0], [0.0, 0.0])):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = torch.tensor(gradient)
        summed.take()
    summed.set_gradient(1.0)
    torch.testing.assert_close(parameters[0].grad, torch.tensor([0.6, 0.5, 0.0]))
    torch.testing.assert_close(parameters[1].grad, torch.tensor([0.0, 0.8]))


def test_a_row_has_dropout_of_its_own():
    """From one stream of masks a row would shift those of all rows after it: more than the norm would move."""
    learner, masks = local_learner(PretendedTrainer(4, 1, True), 1), []
    loss = learner._loss
    learner._loss = lambda rows, targets: (masks.append(float(torch.rand(()))), loss(rows, targets))[1]
    for chosen in ([[0, 3]], [[3]]):
        learner.learn(
            ROWS, learner.weights(), 0, 1, "seed", privacy=RowPrivacy(1.0, 0.0, rng=Chosen(chosen, len(ROWS)))
        )
    # Neither from the run's seed, which is known to all, nor the same for two rows.
    assert len(set(masks)) == 3


def test_a_bias_that_follows_the_load_stays():
    class Trainer(PretendedTrainer):
        def __init__(self):
            super().__init__(4, 1, True)
            self.model.update_rate = 0.001

    assert local_learner(Trainer(), 1).model.update_rate == 0


def test_the_sum_is_opacus_s():
    opacus = pytest.importorskip("opacus.grad_sample", reason="opacus is not installed")
    torch.manual_seed(0)
    layers, rows = (
        torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)),
        torch.randn(5, 6),
    )
    summed = RowSum(list(layers.parameters()), RowPrivacy(0.3, 0.0))
    for row in rows:
        layers(row[None]).square().mean().backward()
        summed.take()
    summed.set_gradient(1.0)
    ours = [each.grad.clone() for each in layers.parameters()]
    module = opacus.GradSampleModule(layers)
    module.zero_grad()
    module(rows).square().sum().backward()
    samples = [each.grad_sample for each in module.parameters()]
    norms = torch.stack([sample.flatten(1).norm(dim=1) for sample in samples]).norm(dim=0)
    factors = (0.3 / norms).clamp(max=1.0)
    assert factors.min() < 1
    for one, sample in zip(ours, samples, strict=True):
        torch.testing.assert_close(one, torch.einsum("i,i...", factors, sample))


def test_rows_are_drawn_each_by_its_own_chance():
    draws = [RowPrivacy(1.0, 1.0).draw(50, 10) for _ in range(1000)]
    sizes = torch.tensor([len(each) for each in draws]).double()
    # Binomial: 10 expected with a variance of 8; standard errors of 1,000 draws .09 and .36.
    assert sizes.mean().item() == pytest.approx(10, abs=0.4) and sizes.var().item() == pytest.approx(8, abs=1.8)
    counts = torch.bincount(torch.tensor([place for each in draws for place in each]), minlength=50)
    # Each 200 times, with a standard error of 12.6.
    assert counts.min() > 130 and counts.max() < 270


def test_epsilon_is_of_the_smallest_organisation_and_what_would_meet_a_budget_does():
    rows = {"clinic": 400, "school": 50}
    found = check_row_budget(rows, 5, 10, 4, 1.0, 1e-3)
    assert found == {name: epsilon_of(5 / count, 1.0, 40, 1e-3) for name, count in rows.items()}
    assert found["school"] > 2 * found["clinic"]
    with pytest.raises(InputError) as raised:
        check_row_budget(rows, 5, 10, 4, 1.0, 1e-3, 2.0)
    said = str(raised.value)
    assert f"epsilon of organisation 'school' would be {found['school']:.3g}" in said and "\n" not in said
    words = said.split("each of these would meet it: ")[1].replace(",", "").split()
    count, rounds, noise = int(words[0]), int(words[words.index("rounds") - 1]), float(words[-1])
    assert epsilon_of(5 / count, 1.0, 40, 1e-3) <= 2 < epsilon_of(5 / (count - 1), 1.0, 40, 1e-3)
    assert epsilon_of(0.1, 1.0, 4 * rounds, 1e-3) <= 2 < epsilon_of(0.1, 1.0, 4 * rounds + 4, 1e-3)
    assert epsilon_of(0.1, noise, 40, 1e-3) <= 2 < epsilon_of(0.1, noise - 0.01, 40, 1e-3)


def test_a_round_is_answered_once(tmp_path):
    answered = AnsweredRounds(tmp_path / "kept" / "a.safetensors", 3)
    assert answered.load(2, "q") is None
    answered.keep(2, "q", {"w": torch.tensor([1.5])})
    assert answered.load(2, "q")["w"].item() == 1.5 and answered.load(3, "q") is None
    for number, question, message in (
        (2, "other", "round 2 was answered to other weights"),
        (1, "q", "round 1: round 2 was answered"),
        (4, "q", "the privacy of 3 rounds was counted"),
        (0, "q", "the privacy of 3 rounds was counted"),
    ):
        with pytest.raises(InputError, match=message):
            answered.load(number, question)
    answered.path.write_bytes(b"{}")
    with pytest.raises(InputError, match="is damaged"):
        answered.load(3, "q")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RowPrivacy(0, 1.0), "row_clip_norm is 0"),
        (lambda: RowPrivacy(1.0, -1), "row_noise_multiplier is -1"),
        (lambda: RowPrivacy(1.0, math.nan), "row_noise_multiplier is nan"),
        (lambda: check_row_budget({"a": 200}, 2, 1, 1, 1.0, 0.005), "'a' has 200 rows; expected below 1 / rows"),
        (lambda: check_row_budget({"a": 20}, 2, 1, 1, 1.0, 0.001, 0.0), "max_epsilon is 0.0"),
    ],
)
def test_numbers_out_of_range_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_rounds_under_other_settings_are_refused(tmp_path):
    """Epsilon is counted over all rounds as if the settings had always been those of now."""
    AnsweredRounds(tmp_path / "a.safetensors", 3, "16 of 200 rows").keep(1, "one", {"x": torch.ones(1)})
    assert AnsweredRounds(tmp_path / "a.safetensors", 3, "16 of 200 rows").load(2, "two") is None
    with pytest.raises(InputError, match="answered to other weights or settings"):
        AnsweredRounds(tmp_path / "a.safetensors", 3, "8 of 5000 rows").load(2, "two")


def test_one_row_does_not_move_the_others_between_learned_and_held_out():
    rows = [{"prompt": f"question {number}", "completion": "yes"} for number in range(400)]
    whole, fewer = (hold_out("a", each, 1, is_private=True) for each in (rows, rows[:7] + rows[8:]))
    lost = [row for row in whole.rows + whole.held_out if row not in fewer.rows + fewer.held_out]
    assert lost == [rows[7]] and [row for row in whole.rows if row != rows[7]] == fewer.rows
    assert 20 < len(whole.held_out) < 64 and len(whole.rows) + len(whole.held_out) == 400
