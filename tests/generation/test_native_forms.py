"""A native model decodes over its own weights, in its form as a model of the family."""

import copy
import gc
import weakref

import pytest
import torch
import transformers
from torch import nn

from hfllm.compression.int8 import DynamicInt8Linear
from hfllm.errors import InputError
from hfllm.generation import fast_generate
from hfllm.generation.packed import forms
from hfllm.generation.packed.forms import family_config, family_form, learning_form
from hfllm.generation.packed.model import has_int8, packed_model, unsupported_reason
from hfllm.generation.packed.ragged_model import RaggedModel
from hfllm.generation.speculative.drafts import EarlyExitDraft, Int8Draft, PromptLookupDraft
from hfllm.models.conversion.convert import in_family
from hfllm.models.family.modeling_hfllm import HfllmForCausalLM

needs_int8 = pytest.mark.skipif(not has_int8(torch.float32, torch.device("cpu")), reason="no fbgemm here")
# The native Llama's norm computes in fp32 whatever its weights are in.
NEAR = {"atol": 1e-5, "rtol": 1e-5}


def memory(model):
    return {each.untyped_storage().data_ptr() for each in model.parameters()}


def logits(model, forward, prompts):
    """Logits (4, 1, V) behind prompts of different lengths."""
    ids, mask = prompts(4)
    runner, lengths = RaggedModel(model, 12, forward), mask.sum(1)
    right = torch.zeros_like(ids)
    for row, length in enumerate(lengths.tolist()):
        right[row, :length] = ids[row, -length:]
    with torch.no_grad():
        return runner.prefill(right, lengths, lengths + 2, lengths.tolist())


# ---- the form ----


def test_a_llama_shares_all_its_weights(make_target, prompts):
    model = make_target.native("llama")
    state, form = torch.get_rng_state(), family_form(model)
    assert memory(form) == memory(model) and torch.equal(torch.get_rng_state(), state)
    assert not form.training and not any(each.requires_grad for each in form.parameters())
    assert not any(each.is_meta for each in (*form.parameters(), *form.buffers()))
    ids, mask = prompts(3)
    with torch.no_grad():
        torch.testing.assert_close(form(ids, mask).logits[mask > 0], model(ids, mask).logits[mask > 0], **NEAR)
        model.lm_head.weight.neg_()
        torch.testing.assert_close(form(ids, mask).logits[mask > 0], model(ids, mask).logits[mask > 0], **NEAR)
    assert family_form(model) is form


def test_what_is_transposed_is_copied(make_target):
    model = make_target.native("gpt2")
    form = family_form(model)
    assert memory(form) & memory(model) and memory(form) - memory(model)
    assert form.lm_head.weight is form.model.embed_tokens.weight
    assert form.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()


def test_a_model_of_the_family_is_its_own_form(make_target):
    model = make_target()
    assert family_form(model) is model and family_config(model) is model.config


def test_angles_that_a_cast_has_rounded_are_kept(make_target, prompts):
    model = make_target.native("llama")
    exact = in_family(model).model.rotary_emb.inv_freq.double()
    model.bfloat16().double()
    rounded = in_family(model).model.rotary_emb.inv_freq.double()
    assert not torch.allclose(rounded, exact, rtol=1e-4) and torch.allclose(rounded, exact, rtol=1e-2)
    torch.testing.assert_close(logits(model, packed_model(model), prompts), logits(model, None, prompts), **NEAR)


def test_tensors_that_do_not_fit_are_named(make_target):
    model = make_target.native("llama")
    model.model.layers[0].mlp.extra_proj = nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"LlamaForCausalLM: 2 tensors have no place: .*extra_proj.bias"):
        in_family(model)
    model = make_target.native("llama")
    model.config.tie_word_embeddings = True
    with pytest.raises(InputError, match="not tied as its config says"):
        in_family(model)
    scorer = transformers.LlamaForSequenceClassification(model.config)
    with pytest.raises(InputError, match=r"1 tensors are missing: lm_head\.weight"):
        in_family(scorer)


def test_a_form_goes_with_its_model(make_target):
    for kind in ("llama", "gpt2"):
        model = make_target.native(kind).float()
        twin = copy.deepcopy(model)
        assert family_form(twin) is not family_form(model)
        seen = [weakref.ref(each) for each in (family_form(model), packed_model(model), model, model.lm_head.weight)]
        del model
        gc.collect()
        assert [each() for each in seen] == [None] * 4
        assert twin in forms._FORMS


# ---- new weights ----


def first_projection(model):
    if isinstance(model, transformers.GPT2LMHeadModel):
        return model.transformer.h[0].mlp.c_proj
    return model.model.layers[0].mlp.down_proj


def optimized(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    optimizer.step()


def loaded(model):
    model.load_state_dict({name: -tensor for name, tensor in model.state_dict().items()})


def assigned(model):
    model.load_state_dict({name: -tensor for name, tensor in model.state_dict().items()}, assign=True)
    model.tie_weights()


def changed_behind_the_back(model):
    first_projection(model).weight.data.neg_()


def replaced_behind_the_back(model):
    first_projection(model).weight.data = -first_projection(model).weight.data


def replaced(model):
    first_projection(model).weight = nn.Parameter(-first_projection(model).weight)


def cast(model):
    model.float()


CHANGES = [optimized, loaded, assigned, changed_behind_the_back, replaced_behind_the_back, replaced, cast]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("change", CHANGES)
def test_new_weights_are_followed(change, kind, make_target, prompts):
    model = make_target.native(kind)
    before, form = packed_model(model), family_form(model)
    old = logits(model, before, prompts)
    assert packed_model(model) is before and family_form(model) is form
    change(model)
    wanted = logits(model, None, prompts)
    torch.testing.assert_close(logits(model, packed_model(model), prompts), wanted, **NEAR)
    assert packed_model(model) is not before
    if change is not cast:
        assert not torch.allclose(wanted, old, atol=1e-3)
    # Where memory is shared the form has followed by itself.
    is_kept = kind == "llama" and change in (optimized, loaded, changed_behind_the_back)
    assert (family_form(model) is form) == is_kept


def test_an_edited_config_makes_another_form(make_target, prompts):
    model = make_target.native("llama")
    before = packed_model(model)
    model.config.rms_norm_eps = 0.1
    assert packed_model(model) is not before and packed_model(model).config.rms_norm_eps == 0.1
    model.config.attn_logit_softcapping, model.config.rope_parameters = None, {"rope_type": "no such type"}
    assert "LlamaForCausalLM is not of the family: llama" in unsupported_reason(model)


def test_two_schemes_have_one_form(make_target):
    if not has_int8(torch.float32, torch.device("cpu")):
        pytest.skip("no fbgemm here")
    model = make_target.native("gpt2").float()
    exact, rounded = packed_model(model), packed_model(model, "int8")
    assert exact.trunk is rounded.trunk and packed_model(model) is exact and packed_model(model, "int8") is rounded
    changed_behind_the_back(model)
    assert packed_model(model, "int8").trunk is packed_model(model).trunk is not exact.trunk


# ---- refusals ----


class OwnLlama(transformers.LlamaForCausalLM):
    """A user's class."""


def hooked(model):
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)


def hooked_before(model):
    model.model.norm.register_forward_pre_hook(lambda *_: None)


def with_a_forward(model):
    attention = model.model.layers[1].self_attn
    attention.forward = attention.forward


def quantized(model):
    model.model.layers[0].mlp.down_proj = DynamicInt8Linear(64, 32, bias=False)


def with_a_subclass(model):
    class Linear(nn.Linear):
        pass

    model.model.layers[0].mlp.down_proj = Linear(64, 32, bias=False)


def with_other_weights(model):
    class Weight(nn.Parameter):
        pass

    model.model.layers[0].mlp.down_proj.weight = Weight(torch.zeros(32, 64))


def with_one_in_half_precision(model):
    model.model.norm.bfloat16()


def in_half_precision(model):
    model.bfloat16()


def untied(model):
    model.config.tie_word_embeddings = True


def with_another_head(model):
    model.lm_head = nn.Linear(32, 50, bias=False)


def offloaded(model):
    model.model.layers[1].to("meta")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (nn.Module.train, "training mode"),
        (hooked, "model.layers.0.mlp has hooks"),
        (hooked_before, "model.norm has hooks"),
        (with_a_forward, "model.layers.1.self_attn has a forward of its own"),
        (quantized, "down_proj is a DynamicInt8Linear of hfllm, not a plain layer"),
        (with_a_subclass, "down_proj is a Linear of test_native_forms, not a plain layer"),
        (with_other_weights, "down_proj.weight is of type Weight, not a plain weight"),
        (with_one_in_half_precision, "model.norm.weight is in torch.bfloat16"),
        (in_half_precision, "is in torch.bfloat16: a native model is decoded as one of the family in float32"),
        (untied, "not tied as its config says"),
        (with_another_head, "another size than its config says"),
        (offloaded, "offloaded"),
        (lambda model: model.set_attn_implementation("eager"), "not 'sdpa'"),
    ],
)
def test_what_is_changed_is_left_to_generate(change, reason, make_target):
    model = make_target.native("llama").float()
    assert unsupported_reason(model) is None
    change(model)
    assert reason in unsupported_reason(model)
    with pytest.raises(InputError, match="cannot decode over packed weights"):
        packed_model(model)
    assert model not in forms._FORMS


def test_other_classes_are_no_models_of_the_family(make_target):
    config = make_target.native("llama").config
    assert "OwnLlama is not of the family" in unsupported_reason(OwnLlama(config).eval())
    trunk, scorer = transformers.LlamaModel(config), transformers.LlamaForSequenceClassification(config)
    for model in (trunk, scorer):
        assert "is not the causal language model" in unsupported_reason(model.eval())
    config = transformers.MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1)
    assert "model_type 'mamba' does not convert" in unsupported_reason(transformers.MambaForCausalLM(config).eval())
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=32, n_layer=1, n_head=4, scale_attn_by_inverse_layer_idx=True
    )
    reason = unsupported_reason(transformers.GPT2LMHeadModel(config).eval())
    assert "gpt2 with scale_attn_by_inverse_layer_idx=True has no place" in reason and "\n" not in reason


def test_autocast_and_adapters_are_refused(make_target):
    from peft import LoraConfig, get_peft_model

    model = make_target.native("llama").float()
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in unsupported_reason(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"])).eval()
    assert "wrapped by PEFT" in unsupported_reason(adapted)
    assert "q_proj is a Linear of peft" in unsupported_reason(adapted.get_base_model())
    assert unsupported_reason(adapted.merge_and_unload()) is None


# ---- forms that learn ----


def gradients(policy, model, ids, mask):
    """The logits and the policy's gradients of a batch with padding on the right, by this model over its weights."""
    policy.zero_grad()
    hint = {"is_read": mask > 0} if isinstance(model, HfllmForCausalLM) else {}
    logits = model(ids, attention_mask=mask, use_cache=False, **hint).logits[mask > 0]
    logits.backward(torch.linspace(-1, 1, logits.numel()).view(logits.shape))
    return logits.detach(), [parameter.grad.clone() for parameter in policy.parameters()]


def test_a_form_learns_in_the_place_of_its_model(make_target):
    model = make_target.native("llama").float().train()
    form = learning_form(model)
    assert isinstance(form, HfllmForCausalLM) and form.training and learning_form(model) is form
    assert {*map(id, form.parameters())} == {*map(id, model.parameters())}
    ids, mask = torch.arange(24).view(3, 8), (torch.arange(8) < torch.tensor([[3], [8], [5]])).long()
    for _ in range(2):
        torch.testing.assert_close(
            gradients(model, form, ids, mask), gradients(model, model, ids, mask), atol=1e-4, rtol=1e-4
        )
        torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert not learning_form(model.eval()).training and learning_form(model.train()).training
    model.requires_grad_(False)
    assert not any(each.requires_grad for each in form.parameters())


def checkpointed(model):
    model.activation_checkpointing_enable()


def with_dropout(model):
    model.model.layers[0].self_attn.attention_dropout = 0.1


@pytest.mark.parametrize(
    "change",
    [hooked, hooked_before, with_a_forward, quantized, with_one_in_half_precision, untied, checkpointed, with_dropout],
)
def test_what_is_changed_learns_itself(change, make_target):
    model = make_target.native("llama").float().train()
    change(model)
    assert learning_form(model) is model


def test_a_change_of_parts_is_noticed(make_target):
    model = make_target.native("llama").float().train()
    form = learning_form(model)
    model.model.norm.weight = nn.Parameter(model.model.norm.weight.detach() * 2)
    other = learning_form(model)
    assert other is not form and other.model.norm.weight is model.model.norm.weight
    model.model.layers[0].mlp.down_proj = DynamicInt8Linear(64, 32, bias=False)
    assert learning_form(model) is model


def test_within_autocast_it_rounds_no_more_than_the_model(make_target):
    model = make_target.native("llama").float().train()
    ids, mask = torch.arange(24).view(3, 8), (torch.arange(8) < torch.tensor([[3], [8], [5]])).long()

    def flat(form):
        return torch.cat([each.flatten() for each in gradients(model, form, ids, mask)[1]])

    exact = flat(model)
    with torch.autocast("cpu", torch.bfloat16):
        form = learning_form(model)
        assert form is not model
        errors = [float((flat(each) - exact).norm() / exact.norm()) for each in (form, model)]
    assert errors[0] < 1.5 * errors[1] < 0.1


def test_copied_weights_do_not_learn(make_target):
    """Those of GPT-2 are transposed; models of the family learn as they are."""
    model, own = make_target.native("gpt2").float().train(), make_target()
    assert learning_form(model) is model and learning_form(own) is own


# ---- drafts ----


@needs_int8
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_draft_gives_the_tokens_of_generate(kind, make_target, prompts, blurred):
    model = make_target.native(kind).float()
    model.generation_config.eos_token_id = [3, 7, 20, 31]
    for rows in (1, 6):
        ids, mask = prompts(rows)
        options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
        wanted = model.generate(ids, **options)
        drafts = [None, Int8Draft(), EarlyExitDraft(2), PromptLookupDraft(), blurred(model)]
        for draft in drafts:
            found = model.generate(ids, **options, draft=draft, num_draft_tokens=3, custom_generate=fast_generate)
            assert torch.equal(found, wanted), draft


def test_inference_mode_makes_forms_for_later(make_target, prompts):
    """A form made within it is used outside of it, also with gradients on."""
    model = make_target.native("gpt2")
    ids, mask = prompts(2)
    options = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False, "custom_generate": fast_generate}
    with torch.inference_mode():
        found = model.generate(ids, **options)
    form = family_form(model)
    assert not any(each.is_inference() for each in form.parameters())
    assert torch.equal(model.generate(ids, **options), found) and family_form(model) is form
