"""Classifiers of texts and words, and models without a head, convert exactly and come back to the same bits."""

import pytest
import torch
import transformers
from natives import NATIVES, ONE_OF_EACH, build

import hfllm
from hfllm.errors import InputError
from hfllm.models.conversion.convert import config_to_native
from hfllm.models.conversion.families import FAMILIES, MISSING

HEADS = {
    "ForSequenceClassification": transformers.AutoModelForSequenceClassification,
    "ForTokenClassification": transformers.AutoModelForTokenClassification,
    "Model": transformers.AutoModel,
}
# Configs of these need an end for each row; GPT-1's and GPT-2's have no padding by default.
FIELDS = {"pad_token_id": 0, "num_labels": 3, "problem_type": "single_label_classification"}


def has_head(name, head):
    config = transformers.AutoConfig.for_model(NATIVES[name][0])
    return type(config) in HEADS[head]._model_mapping


# Heads of these differ by more than their names.
WITH_EVERY_HEAD = {"gpt2", "gpt_neox", "falcon", "gpt_bigcode", "llama", "qwen3_moe"}
PAIRS = [(name, head) for name in ONE_OF_EACH for head in HEADS if has_head(name, head)]


def test_there_is_a_model_of_each_row():
    assert {NATIVES[name][0] for name in ONE_OF_EACH} == FAMILIES.keys()
    assert {NATIVES[name][0] for name, head in PAIRS if head == "ForTokenClassification"} >= WITH_EVERY_HEAD


MARKED = [pytest.param(*pair, marks=[] if pair[0] in ("gpt2", "llama") else [pytest.mark.slow]) for pair in PAIRS]


@pytest.mark.parametrize(("name", "head"), MARKED)
def test_a_model_with_this_head_converts_and_comes_back(name, head, tmp_path):
    fields = {key: value for key, value in FIELDS.items() if key not in NATIVES[name][1]}
    native = build(name, HEADS[head], **fields, **({"classifier_dropout": 0.25} if "Token" in head else {}))
    native.save_pretrained(tmp_path / "native")
    ours = hfllm.from_native(tmp_path / "native")
    assert type(ours).__name__ == f"Hfllm{head}"
    ids = torch.randint(10, 320, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, 9:], mask[1, 9:] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    labels = {
        "ForSequenceClassification": torch.tensor([2, 0]),
        "ForTokenClassification": torch.where(mask.bool(), ids % 3, -100),
    }
    if head in labels:
        inputs["labels"] = labels[head]
        torch.testing.assert_close(ours(**inputs).loss, native(**inputs).loss, atol=1e-5, rtol=0)
    got, expected = ours(**inputs)[head in labels], native(**inputs)[head in labels]
    if head != "ForSequenceClassification":
        got, expected = got[mask.bool()], expected[mask.bool()]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    hfllm.to_native(ours, tmp_path / "back", NATIVES[name][0])
    back, report = HEADS[head].from_pretrained(tmp_path / "back", output_loading_info=True)
    assert type(back) is type(native) and not report["missing_keys"] and not report["unexpected_keys"]
    for key, tensor in native.state_dict().items():
        assert torch.equal(back.state_dict()[key], tensor), key
    if "Token" in head:
        assert native.dropout.p == ours.dropout.p == back.dropout.p == 0.25
    if head != "Model":
        assert back.config.problem_type == ours.config.problem_type == "single_label_classification"


def test_dropout_before_the_head_is_what_it_was(tmp_path):
    """GPT-2's default is 0.1 whatever its other dropout, and ours is `hidden_dropout`."""
    native = build("gpt2", HEADS["ForTokenClassification"], resid_pdrop=0.0)
    native.save_pretrained(tmp_path / "native")
    ours = hfllm.from_native(tmp_path / "native")
    assert native.dropout.p == ours.dropout.p == 0.1
    ours.save_pretrained(tmp_path / "ours")
    assert hfllm.HfllmForTokenClassification.from_pretrained(tmp_path / "ours").dropout.p == 0.1


def test_other_heads_are_refused(tmp_path):
    transformers.GPT2DoubleHeadsModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2)).save_pretrained(
        tmp_path
    )
    with pytest.raises(InputError, match="GPT2DoubleHeadsModel has no counterpart"):
        hfllm.from_native(tmp_path)


def test_a_family_without_the_head_is_no_place_for_it(make_config):
    gpt1 = {"norm_type": "layernorm", "norm_placement": "post", "mlp_type": "plain", "hidden_act": "gelu_new"}
    gpt1 |= {"position_embedding_type": "learned", "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}
    assert config_to_native(make_config(**gpt1)).model_type == "openai-gpt"
    with pytest.raises(InputError, match="openai-gpt has no place for the head of AutoModelForTokenClassification"):
        config_to_native(make_config(**gpt1), "openai-gpt", "AutoModelForTokenClassification")


def test_what_is_called_missing_is_of_architectures_that_exist():
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES.keys()
    named = [name for types in MISSING.values() for name in types]
    assert len(named) == len(set(named))
    assert set(named) <= known
    assert not set(named) & FAMILIES.keys()
