"""The local learner against steps written out: parts of a batch, FedProx, names as folders, kept optimizers."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from hfllm.errors import InputError
from hfllm.federation.learner import IGNORE, KeptStates, LocalLearner, row_indices
from hfllm.trainers.engines import schedule_of

# Rows whose numbers of targets differ much: the first label is never predicted.
ROWS = [
    {"input_ids": [0, *[place % 5] * (1 + 3 * (place % 4))], "labels": [0, *[place - 2] * (1 + 3 * (place % 4))]}
    for place in range(8)
]
RATE = 0.1


class Scores(torch.nn.Module):
    """A number for each token, which should be its label."""

    def __init__(self):
        super().__init__()
        self.x = torch.nn.Parameter(torch.linspace(-1, 2, 5, dtype=torch.float64))


class PretendedTrainer:
    """What `LocalLearner` asks of a Trainer; its loss takes the number of targets, or is a mean over each part."""

    loss_is_scaled_for_ga = None
    compute_loss_func = None

    def __init__(self, per_device, accumulation, takes_count, optimizer=torch.optim.SGD):
        self.model, self.model_accepts_loss_kwargs = Scores(), takes_count
        self.accelerator = SimpleNamespace(autocast=nullcontext)
        self.compute_loss_context_manager = nullcontext
        self.create_optimizer = lambda: optimizer(self.model.parameters(), lr=RATE)
        self.args = SimpleNamespace(
            **{"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation},
            **{"per_device_eval_batch_size": per_device, "learning_rate": RATE, "max_grad_norm": 0.0, "optim": "own"},
            **{"lr_scheduler_type": "constant", "lr_scheduler_kwargs": None, "get_warmup_steps": lambda steps: 0},
            device=torch.device("cpu"),
        )

    @staticmethod
    def data_collator(rows):
        pairs = [pair for row in rows for pair in zip(row["input_ids"][1:], row["labels"][1:], strict=True)]
        pairs = [pair for pair in pairs if pair[1] != IGNORE]
        return {"ids": torch.tensor([pair[0] for pair in pairs]), "labels": torch.tensor([pair[1] for pair in pairs])}

    @staticmethod
    def _prepare_inputs(inputs):
        return inputs

    def compute_loss(self, model, inputs, num_items_in_batch):
        squares = (model.x[inputs["ids"]] - inputs["labels"]).square()
        return squares.sum() / num_items_in_batch if self.model_accepts_loss_kwargs else squares.mean()


def local_learner(trainer, steps, mu=0.0):
    return LocalLearner(trainer, schedule_of(trainer.args, steps), mu)


def learned(per_device, accumulation, takes_count=True, mu=0.0, steps=3):
    learner = local_learner(PretendedTrainer(per_device, accumulation, takes_count), steps, mu)
    return learner, learner.learn(ROWS, learner.weights(), 0, steps, "seed")


def by_hand(mu, steps=3):
    """Gradient descent on the mean square over all targets of 8 rows, with mu / 2 |x - x0|^2."""
    x = begun = Scores().x.detach()
    for step in range(steps):
        pairs = [
            (row["input_ids"][1], row["labels"][1], len(row["labels"]) - 1)
            for row in (ROWS[index] for index in row_indices(8, 8, step, "seed"))
        ]
        total, gradient = sum(count for _, _, count in pairs), torch.zeros_like(x)
        for token, label, count in pairs:
            gradient[token] += 2 * count * (x[token] - label) / total
        x = x - RATE * (gradient + mu * (x - begun))
    return x


@pytest.mark.parametrize("takes_count", [True, False])
@pytest.mark.parametrize(("per_device", "accumulation"), [(8, 1), (4, 2), (1, 8)])
def test_parts_of_a_batch_count_by_their_targets(per_device, accumulation, takes_count):
    learner, found = learned(per_device, accumulation, takes_count)
    torch.testing.assert_close(found.weights["x"], by_hand(0.0), rtol=0, atol=1e-12)
    assert (found.num_tokens, found.num_rows) == (3 * sum(len(row["labels"]) - 1 for row in ROWS), 24)
    # Nor does the mean loss depend on how rows are taken.
    whole = local_learner(PretendedTrainer(8, 1, True), 3).held_out_loss(ROWS, found.weights)
    assert learner.held_out_loss(ROWS, found.weights) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize(("per_device", "accumulation"), [(8, 1), (2, 4)])
def test_the_proximal_term_holds_steps_to_the_beginning(per_device, accumulation):
    _, found = learned(per_device, accumulation, mu=3.0)
    torch.testing.assert_close(found.weights["x"], by_hand(3.0), rtol=0, atol=1e-12)
    begun = Scores().x.detach()
    # Another sign would move further than without.
    assert (by_hand(3.0) - begun).norm() < (by_hand(0.0) - begun).norm() < (by_hand(-3.0) - begun).norm()


def test_a_state_that_is_not_tensors_is_refused():
    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["steps"] = 1

    learner = local_learner(PretendedTrainer(8, 1, True, Counting), 3)
    learner.learn(ROWS, learner.weights(), 0, 1, "seed")
    with pytest.raises(InputError, match="--keep_optimizer: own has the state 'steps'"):
        learner.optimizer_state()


@pytest.mark.parametrize("name", ["..", "/etc", "a/b", "clinic ü", "."])
def test_names_of_organisations_stay_in_their_folder(tmp_path, name):
    kept = KeptStates(tmp_path / "kept")
    kept.save(name, 3, {"w": torch.ones(1)})
    kept.save("other", 3, {"w": torch.zeros(1)})
    assert kept.load(name, 4)["w"].item() == 1 and kept.load(name, 3) is None
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert len(list((tmp_path / "kept").glob("*/3.safetensors"))) == 2


def test_states_of_later_rounds_are_another_run_s(tmp_path):
    kept = KeptStates(tmp_path)
    for number in (8, 9):
        kept.save("a", number, {"w": torch.tensor([float(number)])})
    assert kept.load("a", 1) is None
    kept.save("a", 1, {"w": torch.tensor([1.0])})
    assert kept.load("a", 10)["w"].item() == 1
