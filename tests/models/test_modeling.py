"""The invariants of a decoder, for every axis of the family."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.cache_utils import StaticCache

import hfllm

AXES = {
    "llama": {},
    "llama-mha-tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "multi-query": {"num_key_value_heads": 1},
    "gpt1": {
        "norm_type": "layernorm",
        "norm_placement": "post",
        "mlp_type": "plain",
        "hidden_act": "gelu",
        "position_embedding_type": "learned",
        "num_key_value_heads": 4,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "gpt2": {
        "norm_type": "layernorm",
        "mlp_type": "plain",
        "hidden_act": "gelu_new",
        "position_embedding_type": "learned",
        "attention_bias": True,
        "mlp_bias": True,
    },
    "geglu-no-positions": {"hidden_act": "gelu", "position_embedding_type": "none"},
    "wide-heads": {"head_dim": 16},
}


@pytest.fixture(params=AXES, ids=list(AXES))
def axes(request):
    return AXES[request.param]


@pytest.fixture
def ids():
    return torch.randint(10, 300, (2, 12), generator=torch.Generator().manual_seed(0))


def test_logits_equal_llamas(make_model, ids):
    ours = make_model()
    config = ours.config
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            rms_norm_eps=config.norm_eps,
            max_position_embeddings=config.max_position_embeddings,
            pad_token_id=config.pad_token_id,
        )
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for inputs in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
        torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits, atol=1e-5, rtol=0)
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **settings), theirs.generate(ids, **settings))


def test_cache_equals_no_cache(make_model, axes, ids):
    model = make_model(**axes)
    whole = model(ids, use_cache=False).logits
    first = model(ids[:, :5], use_cache=True)
    second = model(ids[:, 5:], cache=first.cache, use_cache=True)
    torch.testing.assert_close(torch.cat((first.logits, second.logits), 1), whole, atol=1e-5, rtol=1e-5)


def test_static_cache_equals_dynamic(make_model, axes, ids):
    model = make_model(**axes)
    dynamic = model.generate(ids, max_new_tokens=8, do_sample=False)
    static = model.generate(ids, max_new_tokens=8, do_sample=False, cache_implementation="static")
    assert torch.equal(dynamic, static)
    cache = StaticCache(config=model.config, max_cache_len=16)
    torch.testing.assert_close(model(ids, cache=cache).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_left_padding_changes_nothing(make_model, axes, ids):
    model = make_model(**axes)
    padded = torch.cat((torch.zeros(2, 5, dtype=torch.long), ids), 1)
    mask = (torch.arange(17) >= 5).long().expand(2, -1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
    torch.testing.assert_close(logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_batch_of_one_equals_its_row(make_model, axes, ids):
    model = make_model(**axes)
    torch.testing.assert_close(model(ids).logits[1:], model(ids[1:]).logits, atol=1e-5, rtol=1e-5)


def test_sdpa_equals_eager(make_model, axes, ids):
    model = make_model(**axes)
    fused = model(ids).logits
    model.set_attn_implementation("eager")
    output = model(ids, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(output.logits, fused, atol=1e-5, rtol=1e-5)
    assert len(output.attentions) == 2
    assert output.attentions[0].shape == (2, 4, 12, 12)
    assert len(output.hidden_states) == 3


def test_the_future_is_not_seen(make_model, axes, ids):
    model = make_model(**axes)
    changed = ids.clone()
    changed[:, 8:] = 5
    torch.testing.assert_close(model(ids).logits[:, :8], model(changed).logits[:, :8], atol=1e-6, rtol=1e-6)


def test_activation_checkpointing_changes_neither_loss_nor_gradient(make_model, axes, ids):
    def gradients(model):
        model.train()
        loss = model(ids, labels=ids).loss
        loss.backward()
        return loss.detach(), [parameter.grad for parameter in model.parameters()]

    checkpointed = make_model(**axes)
    checkpointed.activation_checkpointing_enable()
    torch.testing.assert_close(gradients(checkpointed), gradients(make_model(**axes)))


def test_every_parameter_receives_a_gradient(make_model, axes, ids):
    model = make_model(**axes)
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_loss_is_the_mean_or_the_sum_over_num_items(make_model, ids):
    model = make_model()
    labels = ids.clone()
    labels[0, :6] = -100
    output = model(ids, labels=labels)
    logits, targets = output.logits[:, :-1].reshape(-1, output.logits.shape[-1]), labels[:, 1:].reshape(-1)
    expected = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100)
    torch.testing.assert_close(output.loss, expected)
    count = (targets != -100).sum()
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=2 * count).loss, expected / 2)


def test_logits_to_keep_and_inputs_embeds(make_model, axes, ids):
    model = make_model(**axes)
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, model(ids).logits[:, -3:], atol=1e-5, rtol=1e-5)
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(ids).logits)
    with pytest.raises(ValueError, match="exactly one"):
        model(ids, inputs_embeds=embeds)


def test_save_and_load_are_equal_and_tied_weights_stay_tied(make_model, axes, ids, tmp_path):
    model = make_model(**axes)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is hfllm.HfllmForCausalLM
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    tied = loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert tied == bool(axes.get("tie_word_embeddings"))
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()


def test_training_overfits_one_batch(make_model, axes, ids):
    model = make_model(**axes, initializer_range=0.05).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1


def test_embeddings_resize(make_model, axes, ids):
    model = make_model(**axes)
    size = model.config.vocab_size
    model.resize_token_embeddings(size + 7)
    assert model(ids).logits.shape[-1] == size + 7 == model.config.vocab_size


def test_the_score_is_read_at_the_last_token_that_is_not_padding(make_model, axes, ids):
    model = make_model(model_class=hfllm.HfllmForSequenceClassification, num_labels=1, **axes)
    alone = model(ids[:1, :7]).logits
    padded = ids[:1].clone()
    padded[:, 7:] = model.config.pad_token_id
    mask = (padded != model.config.pad_token_id).long()
    torch.testing.assert_close(model(padded, attention_mask=mask).logits, alone, atol=1e-5, rtol=1e-5)


def test_a_language_model_becomes_a_scorer_with_its_trunk(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    assert type(scorer) is hfllm.HfllmForSequenceClassification
    for name, value in model.model.state_dict().items():
        assert torch.equal(scorer.model.state_dict()[name], value)


def test_auto_classes_know_the_family(make_config):
    assert type(AutoConfig.for_model("hfllm")) is hfllm.HfllmConfig
    assert type(AutoModel.from_config(make_config())) is hfllm.HfllmModel


def test_compiled_equals_eager(make_model, ids):
    model = make_model()
    expected = model(ids, use_cache=False).logits
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)
