"""Saved adapters on their bases and merged into them, against PEFT by hand; what does not fit is refused by name."""

import json
import shutil

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from hfllm.errors import InputError
from hfllm.models.loading.adapters import find_adapter, load_base, load_merged, load_scorer, put_on, put_under_head

IDS = torch.tensor([[5, 9, 40, 41, 60, 17, 33]])


def llama(folder, dtype=torch.float32, **overrides):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**{**sizes, "vocab_size": 64, "initializer_range": 0.3, **overrides}, pad_token_id=0)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return str(folder)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def save_adapter(base, folder, config, model_class=AutoModelForCausalLM, **kwargs):
    """Save an adapter with weights that matter, by PEFT alone. Return the logits of what was saved."""
    torch.manual_seed(1)
    model = get_peft_model(model_class.from_pretrained(base, **kwargs), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return logits(model)


def edit(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return str(folder)


def lora(targets=("q_proj", "v_proj"), **settings):
    targets = targets if isinstance(targets, str) else list(targets)
    return LoraConfig(**{"r": 2, "task_type": "CAUSAL_LM", "target_modules": targets, **settings})


KINDS = {
    "all-linear": lora("all-linear"),
    "patterns": lora(rank_pattern={"q_proj": 4}, alpha_pattern={"v_proj": 32}, use_rslora=True),
    "dora": lora(use_dora=True),
    "no task": lora(task_type=None),
    "embeddings": lora(("q_proj", "embed_tokens")),
    "head": lora(("q_proj", "lm_head")),
    "copied head": lora(modules_to_save=["lm_head"]),
    "copied embeddings": lora(modules_to_save=["embed_tokens"]),
    "tokens": lora(trainable_token_indices=[3, 4]),
    "ia3": IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_says_what_base_and_adapter_say(tmp_path, kind, tied):
    base = llama(tmp_path / "base", tie_word_embeddings=tied)
    expected = save_adapter(base, tmp_path / "adapter", KINDS[kind])
    adapter = find_adapter(str(tmp_path / "adapter"))
    merged = load_merged(adapter, AutoModelForCausalLM)
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.05
    assert torch.allclose(logits(merged), expected, atol=1e-4)
    # The head of its own, where it has one, is saved.
    merged.save_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected, atol=1e-4)
    assert all(parameter.requires_grad for parameter in merged.parameters())
    assert not hasattr(merged, "peft_config")


def test_a_merged_model_has_the_precision_of_its_base(tmp_path):
    base = llama(tmp_path / "base", torch.bfloat16)
    save_adapter(base, tmp_path / "adapter", lora())
    adapter = find_adapter(str(tmp_path / "adapter"))
    assert {each.dtype for each in load_merged(adapter, AutoModelForCausalLM).parameters()} == {torch.bfloat16}
    # Summed in single precision, and rounded once.
    exact = load_merged(adapter, AutoModelForCausalLM, dtype="float32")
    by_hand = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter.name
    ).merge_and_unload()
    for one, other, rounded in zip(
        exact.parameters(), by_hand.parameters(), load_merged(adapter, AutoModelForCausalLM).parameters(), strict=True
    ):
        assert torch.equal(one, other) and torch.equal(one.to(torch.bfloat16), rounded)


def test_embeddings_that_grew_come_with_the_adapter(tmp_path):
    base = llama(tmp_path / "base")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(70, mean_resizing=False)
    model = get_peft_model(model, lora(init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    merged = load_merged(find_adapter(str(tmp_path / "adapter")), AutoModelForCausalLM)
    assert torch.allclose(logits(merged), logits(model), atol=1e-5) and merged.config.vocab_size == 70


@pytest.mark.slow
def test_what_does_not_fit_is_named(tmp_path):
    base, folder = llama(tmp_path / "base"), tmp_path / "adapter"
    others = {"deep": {"num_hidden_layers": 3}, "shallow": {"num_hidden_layers": 1}, "wide": {"hidden_size": 32}}
    save_adapter(base, folder, lora())

    def complaint(**settings):
        with pytest.raises(InputError) as complaint:
            load_merged(find_adapter(edit(folder, **settings)), AutoModelForCausalLM)
        return str(complaint.value)

    reasons = {"deep": "is missing", "shallow": "has no place", "wide": "size mismatch for"}
    for name, sizes in others.items():
        other = llama(tmp_path / name, **sizes)
        text = complaint(base_model_name_or_path=other)
        assert text.startswith(f"adapter {str(folder)!r} does not fit its base model {other!r}: ")
        assert reasons[name] in text
    gone = str(tmp_path / "gone")
    text = complaint(base_model_name_or_path=gone)
    assert text.startswith(f"adapter {str(folder)!r} is one of the model {gone!r}, which could not be loaded")
    assert "names no base model" in complaint(base_model_name_or_path=None)
    assert "its settings cannot be read" in complaint(base_model_name_or_path=base, peft_type="NEW")
    prompts = tmp_path / "prompts"
    save_adapter(base, prompts, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(InputError, match="is of the kind PROMPT_TUNING, which adds tokens"):
        load_merged(find_adapter(str(prompts)), AutoModelForCausalLM)
    with pytest.raises(InputError, match=r"is for the task CAUSAL_LM; expected SEQ_CLS"):
        find_adapter(edit(folder, peft_type="LORA")).check("SEQ_CLS")


def test_a_base_in_the_runs_folder_moves_with_it(tmp_path):
    run = tmp_path / "run"
    base = llama(run / "base")
    save_adapter(base, run, lora())
    save_adapter(base, run / "checkpoint-2", lora())
    shutil.move(run, tmp_path / "moved")
    # Only one that lies where a recipe writes it.
    llama(tmp_path / "base")
    for name in ("moved", "moved/checkpoint-2"):
        assert find_adapter(str(tmp_path / name)).base == str(tmp_path / "moved" / "base")
    shutil.copytree(tmp_path / "moved", tmp_path / "alone", ignore=shutil.ignore_patterns("base"))
    assert find_adapter(str(tmp_path / "alone")).base == base


@pytest.mark.parametrize("config", [lora(), lora(("q_proj", "lm_head")), lora(modules_to_save=["embed_tokens"])])
def test_a_language_models_adapter_lies_under_a_new_head(tmp_path, config):
    base = llama(tmp_path / "base")
    save_adapter(base, tmp_path / "adapter", config)
    adapter = find_adapter(str(tmp_path / "adapter"))
    model, is_new = load_base(adapter, AutoModelForSequenceClassification, num_labels=1)
    scorer = put_under_head(model, adapter)
    language = put_on(load_base(adapter, AutoModelForCausalLM)[0], adapter)
    with torch.no_grad():
        states = [each.base_model.model.model(IDS).last_hidden_state for each in (scorer.eval(), language.eval())]
    assert is_new and torch.equal(*states)
    trained = {name for name, parameter in scorer.named_parameters() if parameter.requires_grad}
    assert any("score" in name for name in trained) and any("lora_A" in name for name in trained)
    assert load_scorer(str(tmp_path / "adapter")).has_new_head


def test_a_reward_adapter_keeps_its_head(tmp_path):
    base = llama(tmp_path / "base")
    settings = lora(task_type="SEQ_CLS")
    expected = save_adapter(base, tmp_path / "adapter", settings, AutoModelForSequenceClassification, num_labels=1)
    scorer = load_scorer(str(tmp_path / "adapter"))
    assert not scorer.has_new_head and torch.allclose(logits(scorer), expected, atol=1e-5)
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert torch.equal(scorer.score.weight, weights["base_model.model.score.weight"])
