"""Muon with AdamW: each parameter is learned by its own rule, and a saved state goes on as if nothing had happened."""

import copy

import pytest
import reward
import sft
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import get_linear_schedule_with_warmup

from hfllm.errors import InputError
from hfllm.models.family.modeling_hfllm import HfllmForSequenceClassification
from hfllm.runs.parser import read_yaml
from hfllm.runs.pipeline import chain_settings
from hfllm.runs.recipes import settings_for_the_world
from hfllm.trainers.pretraining.muon import BatchedMuon, MuonWithAdamW, muon_of


def orthogonal(matrix):
    """The nearest semi-orthogonal matrix, by singular values."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def step(model, optimizer, seed):
    ids = torch.randint(5, 50, (2, 8), generator=torch.Generator().manual_seed(seed))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_each_parameter_is_in_the_room_of_its_rule(make_model):
    model = make_model()
    optimizer = muon_of(model, lr=1e-2)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [{names[id(parameter)] for parameter in group["params"]} for group in optimizer.param_groups]
    assert sum(map(len, groups)) == len(names)
    assert all("layers" in name and "norm" not in name and "proj" in name for name in groups[0])
    assert any("embed" in name for name in groups[1])
    assert all("norm" in name for name in groups[2]) and optimizer.param_groups[2]["weight_decay"] == 0


def test_a_first_step_is_the_nearest_orthogonal_matrix_at_adamws_size():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(24, 48))
    # Singular values of like size: five Newton-Schulz steps bring them to between 0.7 and 1.2.
    gradient = orthogonal(torch.randn(24, 48)) * torch.linspace(0.6, 1.0, 24)[:, None]
    optimizer = MuonWithAdamW([weight], [{"params": [nn.Parameter(torch.zeros(3))]}], lr=0.1, weight_decay=0.0)
    weight.grad = gradient.clone()
    optimizer.step()
    expected = -0.1 * 0.2 * 48**0.5 * orthogonal(gradient)
    assert torch.nn.functional.cosine_similarity(weight.flatten(), expected.flatten(), dim=0) > 0.98
    assert 0.7 < weight.norm() / expected.norm() < 1.2


class Precisions(TorchDispatchMode):
    """The precisions of all products of matrices."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm, torch.ops.aten.mm):
            self.found.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_fast", [True, False])
def test_small_matrices_together_learn_as_each_alone(is_fast, monkeypatch):
    """`torch.optim.Muon`, one matrix at a time, is the reference; a matrix without a gradient is left alone.

    Where bf16 is emulated, no matrix is multiplied in it; the reference rounds to it, and we do not.
    """
    monkeypatch.setattr("hfllm.trainers.pretraining.muon.multiplies_in_bf16", lambda device: is_fast)
    torch.manual_seed(0)
    shapes = [(8, 8), (8, 24), (24, 8), (8, 8), (8, 24), (300, 300)]
    first = [torch.randn(shape) for shape in shapes]
    ours, theirs = ([nn.Parameter(each.clone()) for each in first] for _ in range(2))
    settings = {"lr": 0.1, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    batched, reference = BatchedMuon(ours, **settings), torch.optim.Muon(theirs, **settings)
    for number in range(3):
        for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            if place or number:
                one.grad = torch.randn_like(one)
                other.grad = one.grad.clone()
        gradients = [each.grad for each in ours]
        with Precisions() as precisions:
            batched.step()
        assert precisions.found == {torch.bfloat16 if is_fast else torch.float32}
        reference.step()
        assert all(one.grad is gradient for one, gradient in zip(ours, gradients, strict=True))
    for one, other, begin in zip(ours, theirs, first, strict=True):
        assert (one - other).norm() < (0.01 if is_fast else 0.03) * (other - begin).norm()
        assert torch.equal(batched.state[one]["momentum_buffer"], reference.state[other]["momentum_buffer"])
    assert torch.equal(ours[-1], theirs[-1]) == is_fast


def test_the_rest_is_adamws_to_the_bit(make_model):
    ours, theirs = make_model(), make_model()
    theirs.load_state_dict(ours.state_dict())
    optimizer = muon_of(ours, lr=1e-2, weight_decay=0.1)
    for _, parameter in theirs.named_parameters():
        parameter.requires_grad_(False)
    pairs = dict(zip(ours.parameters(), theirs.parameters(), strict=True))
    groups = [{**group, "params": [pairs[each] for each in group["params"]]} for group in optimizer.param_groups[1:]]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for seed in range(3):
        ids = torch.randint(5, 50, (2, 8), generator=torch.Generator().manual_seed(seed))
        ours(input_ids=ids, labels=ids).loss.backward()
        for group in optimizer.param_groups[1:]:
            for parameter in group["params"]:
                pairs[parameter].grad = parameter.grad.clone()
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
    for group in optimizer.param_groups[1:]:
        assert all(torch.equal(parameter, pairs[parameter]) for parameter in group["params"])


def test_a_schedule_reaches_both_parts_and_a_saved_state_goes_on(make_model):
    model = make_model()
    optimizer = muon_of(model, lr=1e-2)
    schedule = get_linear_schedule_with_warmup(optimizer, 2, 10)
    for seed in range(3):
        step(model, optimizer, seed)
        schedule.step()
    assert {group["lr"] for part in optimizer._parts for group in part.param_groups} == {schedule.get_last_lr()[0]}
    other = copy.deepcopy(model)
    resumed = muon_of(other, lr=1e-2)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(other, resumed, seed)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), other.parameters(), strict=True))


def test_a_model_of_embeddings_alone_is_refused(make_model):
    model = make_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embed" in name)
    with pytest.raises(InputError, match="--use_muon"):
        muon_of(model)


def test_a_flat_shard_is_refused_in_words():
    """As `torch.optim.Muon` does it alone."""
    weight = nn.Parameter(torch.zeros(4, 4))
    optimizer = BatchedMuon([weight], lr=0.1)
    weight.data = torch.zeros(8)
    weight.grad = torch.ones(8)
    with pytest.raises(ValueError, match="2D matrix"):
        optimizer.step()


def test_a_head_with_one_score_is_learned_by_adamw(make_model):
    model = make_model(model_class=HfllmForSequenceClassification, num_labels=1)
    optimizer = muon_of(model, lr=0.1)
    matrices, others = ({id(each) for each in group["params"]} for group in optimizer.param_groups[:2])
    assert id(model.score.weight) in others - matrices


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward"])
@pytest.mark.parametrize(
    ("provided", "engine", "by_muon"),
    [({}, None, True), ({"optim": "sgd"}, None, False), ({"use_peft": True}, None, False), ({}, "FSDP", False)],
)
def test_on_the_world_adamw_learns_where_muon_cannot(stage, provided, engine, by_muon, monkeypatch):
    if engine:
        monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    values = {}
    for file in settings_for_the_world(stage, provided):
        values |= read_yaml(file)
    assert values["use_muon"] is by_muon
    if engine:
        # In the stages before another one, too.
        assert [file.name for file in chain_settings(f"{stage}/world.yaml")] == ["world.yaml", "world_adamw.yaml"]


@pytest.mark.parametrize("recipe", [sft, reward])
def test_an_adapter_is_not_learned_by_muon(recipe, tmp_path):
    flags = ["--model_name_or_path", str(tmp_path), "--use_peft", "--use_muon", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(InputError, match="--use_muon cannot be used here: it is for whole matrices"):
        recipe.main(*recipe.parse(flags))
