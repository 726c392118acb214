"""bf16 products on a CPU: when they are chosen, and what they change."""

import json

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

from hfllm.flags import GIVEN
from hfllm.models.family.modeling_hfllm import HfllmForSequenceClassification
from hfllm.outputs.checkpoints import RECORD, record_of, state_of
from hfllm.trainers import precision
from hfllm.trainers.mixins import train
from hfllm.trainers.precision import bf16_speedup, with_fast_products

WIDE = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}


@pytest.fixture
def speedup(monkeypatch):
    def set_to(value):
        monkeypatch.setattr(precision, "bf16_speedup", lambda: value)

    set_to(2.0)
    # What a choice registers is gone after the test.
    monkeypatch.setattr(AttentionInterface, "_global_mapping", dict(AttentionInterface._global_mapping))
    return set_to


@pytest.fixture
def arguments(tmp_path):
    def make(**more):
        given = {"use_cpu": True, "bf16": False, "max_steps": 2, "save_steps": 1, "report_to": "none"}
        return TrainingArguments(str(tmp_path / "run"), disable_tqdm=True, **{**given, **more})

    return make


def test_it_is_chosen_where_it_is_faster_and_said(make_model, arguments, speedup, capsys, monkeypatch):
    monkeypatch.setattr(precision, "say_once", print)
    args, model = arguments(), make_model(**WIDE)
    chosen = with_fast_products(args, model)
    assert (chosen.bf16, chosen.mixed_precision) == (True, "bf16") and not args.bf16
    assert "products in bf16, 2.0 times as fast as fp32 on this CPU" in capsys.readouterr().out
    speedup(1.3)
    assert with_fast_products(args, model) is args


def test_a_choice_of_the_user_and_narrow_or_rounded_models_stay(make_model, arguments, speedup):
    args, model = arguments(), make_model(**WIDE)
    assert with_fast_products(args, make_model()) is args
    assert with_fast_products(args, make_model(**WIDE).bfloat16()) is args
    object.__setattr__(args, GIVEN, ("bf16",))
    assert with_fast_products(args, model) is args
    chosen = arguments(bf16=True)
    assert with_fast_products(chosen, model) is chosen


def test_models_as_they_are_attend_in_fp32_too(arguments, speedup, monkeypatch):
    config = LlamaConfig(vocab_size=32, num_hidden_layers=1, **WIDE)
    model, ids, seen = AutoModelForCausalLM.from_config(config), torch.arange(12).view(2, 6), []
    attend, linear = torch.nn.functional.scaled_dot_product_attention, torch.nn.functional.linear

    def attention(query, *args, **kwargs):
        seen.append(query.dtype)
        return attend(query, *args, **kwargs)

    with_fast_products(arguments(), model)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    plain = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(ids, attention_mask=torch.ones_like(ids)).logits
        assert linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
    assert seen == [torch.float32] * 2
    torch.testing.assert_close(rounded.float(), plain, atol=0.02, rtol=0.05)


@pytest.mark.parametrize(("before", "now"), [(2.0, 0.5), (0.5, 2.0)])
def test_a_resumed_run_keeps_its_choice(before, now, make_model, arguments, speedup):
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 4
    speedup(before)
    model = make_model(**WIDE)
    trainer = Trainer(model=model, args=with_fast_products(arguments(max_steps=1), model), train_dataset=rows)
    train(trainer, None, {"stage": "test"})
    checkpoint = f"{trainer.args.output_dir}/checkpoint-1"
    speedup(now)
    assert with_fast_products(arguments(), model, checkpoint).bf16 is (before > 1)
    path = f"{checkpoint}/trainer_state.json"
    state = state_of(checkpoint)
    assert record_of(state)["run"]["products"] == ("bf16" if before > 1 else "fp32")
    # A checkpoint of an earlier version says nothing of it.
    del state["stateful_callbacks"][RECORD]["run"]["products"]
    with open(path, "w") as file:
        json.dump(state, file)
    assert with_fast_products(arguments(), model, checkpoint).bf16 is (now > 1)


def test_attention_is_in_fp32_and_gradients_are_near_those_of_fp32(make_model, monkeypatch):
    model, ids = make_model(**WIDE).train(), torch.randint(5, 300, (4, 12))
    dtypes, attend = set(), torch.nn.functional.scaled_dot_product_attention

    def watch(query, *given, **named):
        dtypes.add(query.dtype)
        return attend(query, *given, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    gradients = {}
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            model(input_ids=ids, labels=ids).loss.backward()
        gradients[enabled] = torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])
    assert dtypes == {torch.float32}
    assert not torch.equal(*gradients.values())
    assert torch.nn.functional.cosine_similarity(*gradients.values(), dim=0) > 0.999


def test_scores_are_not_rounded(make_model):
    """In bf16 half of the scores near 100 would be equal to another one."""
    model = make_model(model_class=HfllmForSequenceClassification, num_labels=1, **WIDE)
    with torch.no_grad():
        model.score.weight.mul_(100)
    ids = torch.randint(5, 300, (64, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        scores = model(input_ids=ids).logits
    assert scores.dtype == torch.float32 and len(scores.unique()) == 64


def test_the_measure_leaves_the_random_state():
    before = torch.get_rng_state()
    bf16_speedup.cache_clear()
    assert 0.01 < bf16_speedup() < 100
    assert torch.equal(before, torch.get_rng_state())
