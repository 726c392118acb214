"""The bias of routers follows the load: counted once, moved once a step, in all processes, kept in checkpoints."""

import copy
from pathlib import Path

import pytest
import torch
from families import FAMILIES

AXES = {**FAMILIES["glm4-moe"], "first_k_dense_replace": 0, "router_bias_update_rate": 0.01}


@pytest.fixture
def ids():
    return torch.randint(10, 300, (4, 12), generator=torch.Generator().manual_seed(0))


def routers_of(model):
    return [layer.mlp.gate for layer in model.model.layers]


def loads_by_hand(model, ids, mask):
    """Tokens of each expert, by layer, without those that are padding."""
    chosen = []
    hooks = [
        router.register_forward_hook(lambda module, inputs, outputs: chosen.append(outputs[2]))
        for router in routers_of(model)
    ]
    with torch.no_grad():
        model(ids, attention_mask=mask, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.bincount(experts[mask.flatten() == 1].flatten(), minlength=8) for experts in chosen]


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_each_token_counts_once_and_padding_does_not(make_model, ids, reentrant):
    model = make_model(**AXES).train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    mask = torch.ones_like(ids)
    mask[0, 5:] = mask[1, :4] = 0
    loads = loads_by_hand(model, ids, mask)
    # Passes without a backward pass are none of training.
    model(ids, labels=ids, attention_mask=mask, use_cache=False)
    assert all(router.load is None for router in routers_of(model))
    # Two micro-batches, and then one step.
    for rows in (slice(0, 2), slice(2, 4)):
        model(ids[rows], labels=ids[rows], attention_mask=mask[rows], use_cache=False).loss.backward()
    for router, load in zip(routers_of(model), loads, strict=True):
        assert torch.equal(router.load, load)
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    for router, load in zip(routers_of(model), loads, strict=True):
        assert router.load is None
        expected = 0.01 * (load.float().mean() - load).sign()
        torch.testing.assert_close(router.e_score_correction_bias, expected)


def test_only_the_optimizer_that_trains_a_router_moves_its_bias(make_model, ids):
    model = make_model(**AXES).train()
    other = copy.deepcopy(model)
    model(ids, labels=ids).loss.backward()
    torch.optim.AdamW(other.parameters()).step()
    torch.optim.AdamW([model.lm_head.weight]).step()
    for each in (model, other):
        assert not any(router.e_score_correction_bias.any() for router in routers_of(each))
    # A copy counts for itself.
    other(ids, labels=ids).loss.backward()
    torch.optim.AdamW(other.parameters()).step()
    assert all(router.e_score_correction_bias.any() for router in routers_of(other))
    assert not any(router.e_score_correction_bias.any() for router in routers_of(model))


def test_copies_of_weights_are_known_by_the_mark_of_deepspeed(make_model, ids):
    """Its optimizers hold flat copies, and the weights an attribute that leads to them."""
    model = make_model(**AXES).train()
    routers_of(model)[0].weight._hp_mapping = None
    flat = torch.nn.Parameter(torch.zeros(3))
    flat.grad = torch.ones(3)
    model(ids, labels=ids).loss.backward()
    torch.optim.AdamW([flat]).step()
    assert [bool(router.e_score_correction_bias.any()) for router in routers_of(model)] == [True, False]


def test_a_frozen_router_and_evaluation_keep_the_bias(make_model, ids):
    model = make_model(**AXES).train()
    for router in routers_of(model):
        router.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    for router in routers_of(model):
        router.weight.requires_grad_(True)
    model.eval()(ids, labels=ids).loss.backward()
    optimizer.step()
    assert not any(router.e_score_correction_bias.any() for router in routers_of(model))


def overload(model, ids):
    """The largest load over the mean, minus 1 (MaxVio of arXiv:2408.15664, section 2), averaged over layers."""
    mask = torch.ones_like(ids)
    return sum(((load.max() * 8 / load.sum()) - 1).item() for load in loads_by_hand(model, ids, mask)) / 2


@pytest.mark.slow
def test_the_load_evens_out(make_model):
    batches = torch.randint(10, 300, (100, 4, 16), generator=torch.Generator().manual_seed(1))
    held_out = torch.randint(10, 300, (32, 16), generator=torch.Generator().manual_seed(2))
    over = {}
    for rate in (0.0, 0.002):
        model = make_model(**{**AXES, "router_bias_update_rate": rate, "n_group": 1, "topk_group": 1}).train()
        with torch.no_grad():
            for router in routers_of(model):
                # Two experts that all tokens like, as when routing collapses.
                router.weight[:2] += 0.05
                router.weight[2:] *= 0.2
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        for batch in batches:
            model(batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        over[rate] = overload(model.eval(), held_out)
    assert over[0.0] > 0.7 and over[0.002] < 0.5 * over[0.0], over


@pytest.mark.slow
def test_two_processes_add_up_their_loads(processes, tmp_path):
    processes.torchrun(Path(__file__).parent / "expert_load_run.py", tmp_path)
    first, second, whole = (torch.load(tmp_path / f"{name}.pt") for name in ("rank0", "rank1", "whole"))
    assert torch.equal(first, second) and torch.equal(first, whole) and first.any()


def test_a_resumed_run_has_the_same_bits(make_model, tmp_path):
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in torch.randint(10, 300, (16, 8)).tolist()]

    def train(folder, resume=None, **more):
        arguments = TrainingArguments(
            *(str(tmp_path / folder),),
            **{"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
            **{"use_cpu": True, "report_to": "none", "learning_rate": 1e-2, "disable_tqdm": True, **more},
        )
        model = make_model(**AXES)
        Trainer(model, arguments, train_dataset=rows).train(resume_from_checkpoint=resume)
        return model.state_dict()

    whole = train("whole")
    resumed = train("resumed", resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert whole["model.layers.1.mlp.gate.e_score_correction_bias"].any()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
