"""DP-SGD in a Trainer, against the gradients of single rows."""

import pytest
import torch

from hfllm.errors import InputError
from hfllm.federation.row_privacy import RowPrivacy

ROWS = [[1.0, 0.0], [0.0, 2.0], [300.0, 400.0], [-1.0, 1.0]]


class Sloped(torch.nn.Module):
    """Its gradient is the row itself, in two parameters."""

    def __init__(self):
        super().__init__()
        self.one, self.other = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
        self.idle = torch.nn.Parameter(torch.zeros(3000))

    def forward(self, x):
        return {"loss": (x[:, 0] * self.one + x[:, 1] * self.other).mean()}


def trained(tmp_path, callback, **overrides):
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    settings = {
        **{"output_dir": str(tmp_path), "learning_rate": 1.0, "optim": "sgd", "lr_scheduler_type": "constant"},
        **{"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 1, "max_grad_norm": 0.0},
        **{"use_cpu": True, "report_to": "none", "save_strategy": "no"},
    }
    model = Sloped()
    arguments = TrainingArguments(**{**settings, **overrides})
    Trainer(model, arguments, train_dataset=Dataset.from_dict({"x": ROWS}), callbacks=[callback]).train()
    return model


def test_a_step_is_the_mean_of_scaled_rows(tmp_path):
    model = trained(tmp_path, RowPrivacy(clip_norm=0.5, noise_multiplier=0.0))
    unit = torch.tensor(ROWS) / torch.tensor(ROWS).norm(dim=1, keepdim=True)
    expected = -0.5 * unit.mean(0)
    torch.testing.assert_close(torch.cat([model.one, model.other]).detach(), expected)
    assert model.idle.abs().max() == 0


def test_noise_is_on_the_sum_of_all_that_is_trained(tmp_path):
    model = trained(tmp_path, RowPrivacy(0.5, 3.0, torch.Generator().manual_seed(0)))
    # 3,000 draws: the standard error of a deviation is its 77th part.
    assert model.idle.std().item() == pytest.approx(3.0 * 0.5 / 4, rel=0.06)


def test_batches_of_several_rows_and_odd_numbers_are_refused(tmp_path):
    with pytest.raises(InputError, match="per_device_train_batch_size is 2"):
        trained(tmp_path, RowPrivacy(1.0, 1.0), per_device_train_batch_size=2)
    with pytest.raises(InputError, match="clip_norm is 0"):
        RowPrivacy(0, 1.0)
    with pytest.raises(InputError, match="noise_multiplier is -1"):
        RowPrivacy(1.0, -1)
