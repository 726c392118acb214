"""The sweep finds the layer that was made to hurt and leaves no trace; the measures mean what they say."""

import pytest
import torch

from hfllm.compression import schemes
from hfllm.compression.schemes import changes_by_part, group_linears, quantized_in_place, sensitivity, split_name
from hfllm.errors import InputError

IDS = torch.arange(2, 66).reshape(2, 32)
DYNAMIC = schemes.get_scheme("dynamic")


def loss_of(model):
    with torch.no_grad():
        return model(input_ids=IDS, labels=IDS).loss.item()


def test_groups():
    names = [f"model.layers.{layer}.{kind}" for layer in range(2) for kind in ("self_attn.q_proj", "mlp.up_proj")]
    assert list(group_linears(names, "linear")) == names
    assert group_linears(names, "layer") == {"model.layers.0": names[:2], "model.layers.1": names[2:]}
    assert group_linears(names, "kind") == {"self_attn.q_proj": names[::2], "mlp.up_proj": names[1::2]}
    assert split_name("encoder.proj") == ("encoder.proj", "encoder.proj")
    with pytest.raises(InputError, match="by 'block': expected one of linear, layer, kind"):
        group_linears(names, "block")


def test_the_layer_with_planted_outliers_is_the_worst(make_model):
    model = make_model(hidden_size=64)
    hurt = "model.layers.1.mlp.gate_proj"
    with torch.no_grad():
        # One huge weight a row takes all the steps; it meets a feature that is nearly 0.
        model.model.layers[1].post_attention_layernorm.weight[5] = 1e-6
        model.get_submodule(hurt).weight[:, 5] = 1e3
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    layers = dict(model.named_modules())
    for by, worst in (("linear", hurt), ("layer", "model.layers.1"), ("kind", "mlp.gate_proj")):
        rows = sensitivity(model, DYNAMIC, loss_of, by)
        largest = max(rows, key=lambda row: abs(row["loss_change"]))
        assert largest["part"] == worst
    assert dict(model.named_modules()) == layers
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert changes_by_part(rows) == {row["part"]: row["loss_change"] for row in rows}
    assert sum(row["weights"] for row in rows) == sum(
        layers[name].weight.numel() for name in schemes.linear_names(model)
    )


def test_all_layers_in_place_are_the_quantized_model(make_model, tmp_path):
    model = make_model(hidden_size=64)
    model.save_pretrained(tmp_path / "full")
    loaded = DYNAMIC.load(str(tmp_path / "full"))
    before = loss_of(model)
    with quantized_in_place(model, schemes.linear_names(model), DYNAMIC):
        assert loss_of(model) == loss_of(loaded) != before
    assert loss_of(model) == before


def test_an_error_within_leaves_the_model_whole(make_model):
    model = make_model()
    before = loss_of(model)
    with pytest.raises(RuntimeError), quantized_in_place(model, schemes.linear_names(model), DYNAMIC):
        raise RuntimeError
    assert loss_of(model) == before
    assert len(schemes.linear_names(model)) == 14


def test_agreement_counts_places(make_model, tokenizer):
    windows = schemes.token_windows(tokenizer, ["Red is a color.", "", "Blue " * 50], max_length=16)
    assert [window.shape[1] <= 16 for window in windows] == [True, True]
    assert windows[0][0, 0] == tokenizer.bos_token_id
    model = make_model()
    tokens = schemes.greedy_tokens(model, windows)
    assert len(tokens) == sum(window.shape[1] for window in windows)
    assert tokens[-1] == model(input_ids=windows[1]).logits[0, -1].argmax()
    other = schemes.greedy_tokens(make_model(seed=1), windows)
    assert schemes.agreement(tokens, tokens) == 1
    assert schemes.agreement(tokens, other) == pytest.approx(
        sum(a == b for a, b in zip(tokens.tolist(), other.tolist(), strict=True)) / len(tokens)
    )
    with pytest.raises(InputError, match=r"1 text\(s\) without a token"):
        schemes.token_windows(tokenizer, [""], 8)


def test_speeds_are_of_each_model(make_model):
    models = {"one": make_model(), "other": make_model(num_hidden_layers=1)}
    found = schemes.speeds(models, prompt_tokens=8, batch_size=2, new_tokens=3, rounds=1)
    assert set(found) == set(models)
    assert all(value > 0 for phases in found.values() for value in phases.values())
    assert set(found["one"]) == {"prefill", "decode"}
