"""Looking into models of any class changes nothing in them, also when something raises."""

import pytest
import torch
from interpreted_models import ANY, hooks_of
from torch import nn

from hfllm.errors import InputError
from hfllm.evaluation.interpreting.hooks import (
    COMPONENTS,
    batch_of,
    evaluated,
    hooked,
    last_logits,
    mask_of,
    parts_of,
    recorded,
)
from hfllm.evaluation.interpreting.measures import (
    attention_weights,
    decided_at,
    eager_attention,
    logit_lens,
    looked_at,
    value_ranks,
)


def hidden_states(model, ids):
    """transformers' own: the input of the first layer, and the output of each; the last one is normed."""
    return model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states


@pytest.mark.parametrize("any_model", ANY, indirect=True)
def test_the_lens_is_the_models_own_head_on_the_states_after_each_layer(any_model, prompts):
    parts = parts_of(any_model)
    ids, last = batch_of(prompts[:3])
    rows = torch.arange(3)
    with torch.no_grad():
        lens = logit_lens(parts, ids, last)
        logits = any_model(input_ids=ids, use_cache=False).logits[rows, last]
        torch.testing.assert_close(lens[-1], logits, atol=1e-5, rtol=1e-5)
        # The oracle: the last norm and the head, called by their names.
        trunk = parts.model.base_model
        norm = next(getattr(trunk, name) for name in ("norm", "ln_f", "final_layer_norm") if hasattr(trunk, name))
        states = hidden_states(any_model, ids)[2][rows, last]
        scale = getattr(any_model.config, "logit_scale", 1.0)
        torch.testing.assert_close(lens[1], any_model.get_output_embeddings()(norm(states)) * scale)
    assert lens.shape == (3, 3, any_model.config.vocab_size)


@pytest.mark.parametrize("any_model", ANY, indirect=True)
def test_attention_equals_transformers_and_the_setting_is_put_back(any_model, prompts):
    parts, (ids, last) = parts_of(any_model), batch_of(prompts[:3])
    before, hooks = any_model.config._attn_implementation, hooks_of(any_model)
    assert before != "eager"
    weights = attention_weights(parts, ids, last)
    assert any_model.config._attn_implementation == before and hooks_of(any_model) == hooks
    any_model.set_attn_implementation("eager")
    expected = any_model(input_ids=ids, output_attentions=True, use_cache=False).attentions
    for layer, each in enumerate(weights):
        torch.testing.assert_close(each, expected[layer][torch.arange(3), :, last])
        torch.testing.assert_close(looked_at(each, torch.ones_like(ids)), torch.ones(each.shape[:2]))


@pytest.mark.parametrize("any_model", ANY, indirect=True)
def test_components_are_what_a_layer_adds(any_model, prompts):
    """Of models with a residual stream: a layer's output is its input and what its two parts add."""
    if getattr(any_model.config, "norm_placement", "pre") == "post":
        pytest.skip("norms stand between")
    parts, (ids, last) = parts_of(any_model), batch_of(prompts[:2])
    modules = [parts.layers[0], parts.layers[1], *(parts.component(1, name) for name in COMPONENTS)]
    _, (before, after, *added) = recorded(parts, ids, last, modules)
    torch.testing.assert_close(after, before + sum(added), atol=1e-5, rtol=1e-5)


def test_hooks_go_when_something_raises(parts, prompts):
    model, (ids, last) = parts.model, batch_of(prompts[:1])
    model.train()
    model.model.layers[1].eval()
    modes = [each.training for each in model.modules()]

    def broken(output):
        raise RuntimeError("broken")

    for look in (logit_lens, attention_weights):
        handle = parts.layers[2].register_forward_hook(lambda *given: broken(given))
        with pytest.raises(RuntimeError, match="broken"), evaluated(model):
            look(parts, ids, last)
        handle.remove()
        assert hooks_of(model) == 0 and model.config._attn_implementation != "eager"
    with pytest.raises(RuntimeError, match="broken"), hooked([(parts.layers[0], broken)]):
        last_logits(parts, ids, last)
    assert hooks_of(model) == 0 and [each.training for each in model.modules()] == modes


def test_an_attention_setting_of_a_part_is_put_back(parts):
    """The config itself, not the property, which would hand the value on."""
    parts.model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(KeyError), eager_attention(parts.model):
        assert parts.model.config._attn_implementation == "eager"
        raise KeyError
    assert parts.model.config._attn_implementation == "flex_attention"


def test_an_adapter_and_bf16(make_model, prompts):
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    ids, last = batch_of(prompts[:2])
    model = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    model.eval()
    lens = logit_lens(parts_of(model), ids, last)
    with torch.no_grad():
        torch.testing.assert_close(lens[-1], model(input_ids=ids).logits[torch.arange(2), last], atol=1e-5, rtol=1e-5)
        with model.disable_adapter():
            assert not torch.allclose(logit_lens(parts_of(model), ids, last), lens)
    virtual = get_peft_model(make_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(InputError, match="virtual tokens"):
        parts_of(virtual)
    half = parts_of(make_model().to(torch.bfloat16))
    assert logit_lens(half, ids, last).dtype == attention_weights(half, ids, last)[0].dtype == torch.float


def test_a_model_without_known_parts_is_named(parts):
    parts.layers[0].feed = parts.layers[0].mlp
    del parts.layers[0].mlp
    with pytest.raises(InputError, match=r"has no mlp: its parts are .*feed"):
        parts.component(0, "mlp")
    parts.model.model.layers = nn.ModuleList(parts.layers[:1])
    with pytest.raises(InputError, match="no list of its 3 layers"):
        parts_of(parts.model)


def test_logits_that_are_no_numbers_are_refused(parts, prompts):
    with torch.no_grad():
        parts.model.lm_head.weight[3] = float("nan")
    for look in (lambda: value_ranks(parts, prompts[:1]), lambda: last_logits(parts, *batch_of(prompts[:1]))):
        with pytest.raises(InputError, match="HfllmForCausalLM has logits that are not numbers"):
            look()


def test_ranks_count_the_values_above_and_do_not_depend_on_batches(parts, prompts):
    some = prompts[::11]
    ranks = value_ranks(parts, some, batch_size=4)
    assert torch.equal(ranks, value_ranks(parts, some, batch_size=1))
    ids, last = batch_of(some[:1])
    with torch.no_grad():
        logits = parts.model(input_ids=ids).logits[0, last[0]]
    assert ranks[-1, 0] == sum(float(logits[each]) >= float(logits[some[0].value]) for each in some[0].others)


def test_a_value_is_decided_where_it_stays_first():
    assert decided_at([False, True, False, True, True]) == 4
    assert decided_at([True, True]) == 1
    assert decided_at([True, False]) is None


def test_places_of_the_subject(tokenizer, prompts):
    for prompt in prompts:
        words = [tokenizer.decode([prompt.ids[place] for place in mention]).strip() for mention in prompt.mentions]
        assert words == [prompt.fact.subject] * 2
        assert prompt.fact.value.startswith(tokenizer.decode([prompt.value]).strip())
        assert prompt.value not in prompt.others
    assert mask_of([[1], []], 3).tolist() == [[False, True, False], [False, False, False]]
