"""The head that scores the first and the last token of an answer: like transformers' own, under all that loads it."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForQuestionAnswering, LlamaConfig, LlamaForQuestionAnswering

import hfllm
from hfllm.models.loading.adapters import find_adapter
from hfllm.outputs.card import model_card

STARTS, ENDS = torch.tensor([3, 0]), torch.tensor([5, 99])


@pytest.fixture
def ids():
    return torch.randint(10, 300, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(make_model):
    return make_model(model_class=hfllm.HfllmForQuestionAnswering)


def test_it_is_what_llama_has(model, ids):
    """The same weights in transformers' own class give the same scores and loss."""
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    sizes = {name: getattr(model.config, name) for name in (*names, "intermediate_size", "head_dim", "pad_token_id")}
    config = LlamaConfig(**sizes, rms_norm_eps=model.config.norm_eps, rope_parameters=model.config.rope_parameters)
    native = LlamaForQuestionAnswering(config).eval()
    prefix = native.base_model_prefix
    state = {name.replace("model.", f"{prefix}.", 1): value for name, value in model.state_dict().items()}
    native.load_state_dict(state)
    got = model(ids, start_positions=STARTS, end_positions=ENDS)
    expected = native(ids, start_positions=STARTS, end_positions=ENDS)
    assert got.keys() == expected.keys() and got.start_logits.shape == (2, 12)
    for name in got:
        torch.testing.assert_close(got[name], expected[name], atol=1e-5, rtol=0)
    assert torch.isfinite(got.loss)


def test_the_loss_is_the_mean_of_both_ends(model, ids):
    output = model(ids, start_positions=STARTS, end_positions=STARTS + 1)
    starts = output.start_logits.log_softmax(-1).gather(1, STARTS[:, None]).mean()
    ends = output.end_logits.log_softmax(-1).gather(1, STARTS[:, None] + 1).mean()
    torch.testing.assert_close(output.loss, -(starts + ends) / 2)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_config_decides_whether_it_looks_ahead(make_model, ids, is_causal):
    model = make_model(model_class=hfllm.HfllmForQuestionAnswering, is_causal=is_causal)
    changed = ids.clone()
    changed[:, -1] = 5
    same = torch.allclose(model(ids).start_logits[:, 0], model(changed).start_logits[:, 0], atol=1e-6)
    assert same == is_causal


def test_auto_class_and_card(model, tokenizer, ids, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path)
    assert type(loaded) is hfllm.HfllmForQuestionAnswering
    assert torch.equal(loaded(ids).end_logits, model(ids).end_logits)
    card = model_card(tmp_path)
    assert "pipeline_tag: question-answering" in card and "AutoModelForQuestionAnswering" in card
    # transformers 5 has no pipeline of this name.
    assert 'pipeline("question-answering"' not in card


@pytest.mark.slow
@pytest.mark.turn(7)
def test_it_travels(model, ids, tmp_path):
    model.save_pretrained(tmp_path / "model")
    torch.save(ids, tmp_path / "ids.pt")
    code = (
        "import sys, torch; sys.modules['hfllm'] = None\n"
        "from transformers import AutoModelForQuestionAnswering as Auto\n"
        "model = Auto.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "assert type(model).__module__.startswith('transformers_modules')\n"
        "print('SUM', model(torch.load(sys.argv[2])).start_logits.sum().item())"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-c", code, str(tmp_path / "model"), str(tmp_path / "ids.pt")]
    result = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert abs(float(result.stdout.split("SUM")[1]) - model(ids).start_logits.sum().item()) < 1e-3


def test_an_adapter_keeps_the_head(model, tokenizer, ids, tmp_path):
    from peft import LoraConfig, get_peft_model

    from hfllm.models.loading.adapters import load_merged

    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(task_type="QUESTION_ANS", init_lora_weights=False))
    torch.nn.init.normal_(adapted.base_model.model.qa_outputs.modules_to_save["default"].weight)
    adapted.save_pretrained(tmp_path / "adapter")
    adapter = find_adapter(str(tmp_path / "adapter"))
    assert adapter.brings_head
    merged = load_merged(adapter, AutoModelForQuestionAnswering)
    torch.testing.assert_close(merged(ids).start_logits, adapted.eval()(ids).start_logits, atol=1e-4, rtol=0)
