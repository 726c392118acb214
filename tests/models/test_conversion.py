"""Conversion refuses what it cannot say, names it, and leaves nothing half-written."""

import contextlib
import copy
import json
import logging
import os
import shutil

import pytest
import torch
import transformers
from families import FAMILIES
from safetensors.torch import load_file, save_file

import hfllm
from hfllm.errors import InputError
from hfllm.models.conversion.convert import config_from_native, config_to_native

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_native(folder):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, intermediate_size=24, num_key_value_heads=1)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture
def native_folder(tmp_path):
    save_native(tmp_path / "native")
    return tmp_path / "native"


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", "llama"),
        ("llama-tied", "llama"),
        ("mistral", "mistral"),
        ("mixtral", "mixtral"),
        ("qwen2", "qwen2"),
        ("qwen3", "qwen3"),
        ("gemma", "gemma"),
        ("gemma3", "gemma3_text"),
        ("palm", "cohere"),
        ("cohere", "cohere"),
        ("gpt2", "gpt2"),
        ("gpt1", "openai-gpt"),
        ("neox", "gpt_neox"),
    ],
)
def test_the_first_family_that_can_say_it_is_taken(make_model, tmp_path, family, expected):
    model = make_model(**FAMILIES[family])
    hfllm.to_native(model, tmp_path / "native")
    native = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert native.config.model_type == expected
    ids = torch.arange(10, 22).unsqueeze(0)
    torch.testing.assert_close(native(ids).logits, model(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("values", "native_type", "fields"),
    [
        ({"num_local_experts": 2, "parallel_block": True}, None, ["parallel_block=True"]),
        ({"position_embedding_type": "none"}, "llama", ["position_embedding_type='none'"]),
        ({"norm_type": "layernorm"}, "mistral", ["norm_type='layernorm'"]),
        ({"sliding_window": 5}, "llama", ["sliding_window=5"]),
        ({"embedding_multiplier": 2.0}, "gemma", ["embedding_multiplier=2.0", "norm_unit_offset=False"]),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "llama",
            ["rope_parameters", "partial_rotary_factor"],
        ),
        (
            {**FAMILIES["gpt1"], "hidden_act": "tanh"},
            "openai-gpt",
            ["hidden_act='tanh'"],
        ),
    ],
)
def test_what_no_native_class_can_say_is_refused(make_model, tmp_path, values, native_type, fields):
    with pytest.raises(InputError) as error:
        hfllm.to_native(make_model(**values), tmp_path / "out", native_type)
    for field in fields:
        assert field in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.GPT2Config(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
        (transformers.GPT2Config(add_cross_attention=True), "add_cross_attention=True"),
        (transformers.FalconConfig(alibi=True), "alibi=True"),
        (transformers.CohereConfig(use_qk_norm=True), "use_qk_norm=True"),
        (transformers.Gemma3TextConfig(attn_logit_softcapping=30.0), "attn_logit_softcapping=30.0"),
        (transformers.Gemma2Config(use_bidirectional_attention=True), "use_bidirectional_attention=True"),
        (transformers.GemmaConfig(use_bidirectional_attention=True), "use_bidirectional_attention=True"),
        (transformers.T5Config(), "model_type 't5'"),
        (
            transformers.LlamaConfig(
                rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
            ),
            "rope_parameters",
        ),
    ],
)
def test_what_our_axes_cannot_say_is_refused(config, message):
    with pytest.raises(InputError) as error:
        config_from_native(config)
    assert message in str(error.value)


def test_layers_of_linear_attention_are_no_others():
    """Configs of native classes take the names of types that their models have not."""
    values = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    values |= {"layer_types": ["linear_attention", "full_attention"]}
    olmo = {"norm_placement": "output", "qk_norm": True, "qk_norm_scope": "all_heads"}
    for positions in ("rope", "none"):
        config = hfllm.HfllmConfig(**values, **olmo, position_embedding_type=positions)
        assert config_to_native(config).model_type == "olmo_hybrid"
    with pytest.raises(InputError, match="no native class can express this model"):
        config_to_native(hfllm.HfllmConfig(**values))
    with pytest.raises(
        InputError, match="qwen2 refuses this model: layer_types with 'linear_attention' have no place"
    ):
        config_to_native(hfllm.HfllmConfig(**values), "qwen2")


@pytest.mark.parametrize(
    ("model_type", "concept"),
    [
        ("olmo", "a norm without weights has no place in HfllmConfig"),
        ("codegen", "queries, keys and values in shuffled parts of one tensor"),
        ("gpt_oss", "attention sinks"),
        ("llama4", "an encoder of images"),
        ("gemma3", "an encoder of images"),
        ("bloom", "ALiBi"),
        ("deepseek_v32", "an index of which tokens"),
        ("t5", "an encoder beside the decoder"),
        ("bert", "token types"),
        ("opt", "positions that begin at 2"),
    ],
)
def test_an_architecture_that_has_more_is_refused_by_what_it_has(model_type, concept):
    with pytest.raises(InputError) as error:
        config_from_native(transformers.AutoConfig.for_model(model_type))
    assert concept in str(error.value) and f"model_type {model_type!r}" in str(error.value)


def test_another_architecture_is_refused_by_what_converts():
    with pytest.raises(InputError, match=r"'clip' cannot be converted; these can: llama, mistral, .*qwen3_moe"):
        config_from_native(transformers.CLIPConfig())


def test_without_experts_a_mixture_is_refused():
    values = {**SIZES, "num_key_value_heads": 1, "num_experts": 0, "num_experts_per_tok": 2}
    with pytest.raises(InputError, match="num_experts=0: without experts a model is a qwen3"):
        config_from_native(transformers.Qwen3MoeConfig(**values))


@pytest.mark.parametrize(
    ("values", "native_type", "message"),
    [
        (
            {"num_local_experts": 4, "qk_norm": True, "norm_type": "layernorm"},
            None,
            "no native class can express this model; the nearest, qwen3_moe, has no place for "
            "norm_type='layernorm' (it has 'rmsnorm')",
        ),
        ({"qk_norm": True}, "qwen3_moe", "qwen3_moe refuses this model: num_experts=0: without experts"),
        ({"sliding_window": 5}, "llama", "llama has no place for sliding_window=5 (it has None)"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "llama",
            "llama has no place for rope_parameters.partial_rotary_factor=0.5 (it has None)",
        ),
        (
            {"hidden_size": 36, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 16},
            "llama",
            "llama refuses this model: Class validation error",
        ),
    ],
)
def test_a_refusal_is_one_line_of_fields_and_what_is_there_instead(make_config, values, native_type, message):
    with pytest.raises(InputError) as error:
        config_to_native(make_config(**values), native_type)
    assert str(error.value).startswith(message)
    assert "plan" not in str(error.value) and len(str(error.value)) < 300


def test_looking_for_a_family_says_nothing_of_others(make_config, monkeypatch, caplog):
    """Starcoder2's own defaults warn of themselves: its end token lies outside of its vocabulary."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level("WARNING", logger="transformers")
    with pytest.raises(InputError):
        config_to_native(make_config(norm_placement="post"))
    assert not caplog.records


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_attention_is_as_asked(native_folder, attention):
    model = hfllm.from_native(native_folder, attn_implementation=attention)
    assert model.config._attn_implementation == attention


def test_a_field_that_is_changed_while_loading_is_changed_in_ours(native_folder):
    model = hfllm.from_native(native_folder, rms_norm_eps=0.5)
    expected = transformers.AutoModelForCausalLM.from_pretrained(native_folder, rms_norm_eps=0.5)
    ids = torch.arange(10, 22).unsqueeze(0)
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("native_type", [None, "gpt_neox"])
def test_a_conversion_leaves_the_config_alone(make_model, tmp_path, native_type):
    for family in ("neox", "llama", "mixtral-parallel-window"):
        model = make_model(**FAMILIES[family])
        before = copy.deepcopy(model.config.to_dict())
        with contextlib.suppress(InputError):
            hfllm.to_native(model, tmp_path / family, native_type)
        assert model.config.to_dict() == before


def test_a_width_that_one_family_refuses_goes_to_the_next(make_model, tmp_path):
    model = make_model(hidden_size=36, num_attention_heads=8, num_key_value_heads=8, head_dim=16)
    hfllm.to_native(model, tmp_path / "out")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").model_type == "mistral"


def test_both_readings_of_a_checkpoint_know_where_it_lies(native_folder, monkeypatch):
    seen = []
    read = transformers.AutoConfig.from_pretrained

    def spy(name, **kwargs):
        seen.append(kwargs.get("token"))
        return read(name, **kwargs)

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", spy)
    hfllm.from_native(native_folder, token="hf_reader")
    assert set(seen[:2]) == {"hf_reader"}


def test_an_unknown_native_type_is_refused(make_config):
    with pytest.raises(InputError, match="'lama' is not one of llama"):
        config_to_native(make_config(), "lama")


def test_sharded_checkpoints_convert_both_ways(native_folder, tmp_path):
    expected = transformers.AutoModelForCausalLM.from_pretrained(native_folder)
    expected.save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    model = hfllm.from_native(tmp_path / "shards")
    hfllm.to_native(model, tmp_path / "back", max_shard_size="5KB")
    assert (tmp_path / "back" / "model.safetensors.index.json").is_file()
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)


def test_precision_and_generation_settings_are_kept(native_folder, tmp_path):
    native = transformers.AutoModelForCausalLM.from_pretrained(native_folder, dtype=torch.bfloat16)
    native.generation_config.temperature = 0.7
    native.generation_config.do_sample = True
    native.save_pretrained(tmp_path / "bf16")
    model = hfllm.from_native(tmp_path / "bf16")
    assert model.dtype == torch.bfloat16
    assert model.generation_config.temperature == 0.7
    hfllm.to_native(model, tmp_path / "back")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    assert (back.dtype, back.generation_config.temperature) == (torch.bfloat16, 0.7)


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification"])
def test_classifiers_convert_with_their_labels(tmp_path, head):
    labels = {0: "bad", 1: "good", 2: "fair"}
    config = transformers.LlamaConfig(**SIZES, intermediate_size=24, pad_token_id=0, id2label=labels)
    native = getattr(transformers, f"LlamaFor{head}")(config).eval()
    native.save_pretrained(tmp_path / "native")
    model = hfllm.from_native(tmp_path / "native")
    assert type(model).__name__ == f"HfllmFor{head}"
    assert model.config.id2label == labels
    ids = torch.arange(10, 22).unsqueeze(0)
    torch.testing.assert_close(model(ids).logits, native(ids).logits, atol=1e-5, rtol=0)
    hfllm.to_native(model, tmp_path / "back")
    back = getattr(transformers, f"AutoModelFor{head}").from_pretrained(tmp_path / "back")
    assert torch.equal(back.score.weight, native.score.weight)


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def set_field(folder, name, value):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))


NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """What each direction converts, in a folder of its name."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save_native(folder / "from_native")
    hfllm.from_native(folder / "from_native").save_pretrained(folder / "to_native")
    return folder


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: edit(folder, lambda tensors: tensors.pop(NORM)), f"1 tensors are missing: {NORM}"),
        (lambda folder: edit(folder, lambda tensors: tensors.update(odd=torch.ones(2))), "have no place: odd"),
        (lambda folder: edit(folder, lambda tensors: tensors.update({NORM: torch.ones(3)})), NORM),
        (truncate, "cannot load the weights"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: set_field(folder, "hidden_act", "softmaxish"), "hidden_act='softmaxish'"),
    ],
    ids=["missing", "extra", "shape", "truncated", "no-weights", "config", "config-value"],
)
@pytest.mark.parametrize("direction", ["from_native", "to_native"])
def test_broken_checkpoints_give_one_clear_error(checkpoints, tmp_path, damage, message, direction):
    folder = shutil.copytree(checkpoints / direction, tmp_path / "broken")
    damage(folder)
    with pytest.raises(InputError) as error:
        hfllm.from_native(folder) if direction == "from_native" else hfllm.to_native(folder, tmp_path / "out")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_left_alone(make_model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="not empty"):
        hfllm.to_native(make_model(), tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["mine.txt"]


def test_a_failure_while_writing_leaves_no_folder(make_model, tmp_path, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space"):
        hfllm.to_native(make_model(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_bert_layers_are_our_bidirectional_layers(make_model):
    """BERT adds token types and a norm to its embeddings, which we have not: its layers are compared from there on."""
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, layer_norm_eps=1e-5
    )
    torch.manual_seed(0)
    bert = transformers.BertModel(config, add_pooling_layer=False).eval()
    ours = hfllm.HfllmModel(
        hfllm.HfllmConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            norm_type="layernorm",
            norm_placement="post",
            mlp_type="plain",
            hidden_act="gelu",
            position_embedding_type="none",
            attention_bias=True,
            mlp_bias=True,
            is_causal=False,
        )
    ).eval()
    names = {
        "self_attn.q_proj": "attention.self.query",
        "self_attn.k_proj": "attention.self.key",
        "self_attn.v_proj": "attention.self.value",
        "self_attn.o_proj": "attention.output.dense",
        "input_layernorm": "attention.output.LayerNorm",
        "mlp.up_proj": "intermediate.dense",
        "mlp.down_proj": "output.dense",
        "post_attention_layernorm": "output.LayerNorm",
    }
    for index, layer in enumerate(ours.layers):
        for our_name, their_name in names.items():
            theirs = bert.encoder.layer[index].get_submodule(their_name)
            layer.get_submodule(our_name).load_state_dict(theirs.state_dict())
    ids = torch.randint(0, 1000, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    embedded = bert.embeddings(ids)
    got = ours(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
    expected = bert(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=0)


def test_a_config_is_json_and_comes_back(make_config):
    for axes in FAMILIES.values():
        config = make_config(**axes)
        assert hfllm.HfllmConfig(**json.loads(config.to_json_string(use_diff=False))).to_dict() == config.to_dict()


def test_a_lock_in_the_target_stays(saved, tmp_path):
    target = tmp_path / "native"
    target.mkdir()
    (target / ".lock").write_text("held")
    inode = (target / ".lock").stat().st_ino
    hfllm.to_native(str(saved), target)
    assert (target / "config.json").exists() and (target / ".lock").stat().st_ino == inode
    (target / "mine.txt").write_text("")
    with pytest.raises(InputError, match="is not empty"):
        hfllm.to_native(str(saved), target)


def test_the_tokenizer_of_an_export_has_a_class_that_transformers_4_knows(saved, tokenizer, tmp_path):
    """There is no `TokenizersBackend` before release 5, and converters of other engines use release 4."""
    hfllm.to_native(str(saved), tmp_path / "native", tokenizer=tokenizer)
    settings = json.loads((tmp_path / "native" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "native")
    assert type(loaded) is type(tokenizer) and loaded.chat_template == tokenizer.chat_template
    for text in ("The fox is red.", "<|user|>naïve 漢字<|end|>"):
        assert loaded(text) == tokenizer(text)
    # All else is what the tokenizer itself saves.
    tokenizer.save_pretrained(tmp_path / "alone")
    alone = json.loads((tmp_path / "alone" / "tokenizer_config.json").read_text())
    assert {**settings, "tokenizer_class": alone["tokenizer_class"]} == alone


WINDOWLESS = {
    "ministral": {},
    "cohere2": {**FAMILIES["cohere"], "no_rope_layers": [0, 0]},
    "gemma2": {
        key: value for key, value in FAMILIES["gemma3"].items() if not key.startswith(("layer", "slid", "rope"))
    }
    | {"qk_norm": False},
    "gemma3_text": {
        key: value for key, value in FAMILIES["gemma3"].items() if not key.startswith(("layer", "slid", "rope"))
    },
    "olmo3": {"norm_placement": "output", "qk_norm": True, "qk_norm_scope": "all_heads"},
}


@pytest.mark.parametrize("native_type", WINDOWLESS)
def test_without_a_window_an_export_runs(make_model, tmp_path, native_type):
    """These classes make the mask of a window even if no layer has one."""
    model = make_model(
        **{"hidden_act": "gelu_pytorch_tanh"} if "gemma" in native_type else {}, **WINDOWLESS[native_type]
    )
    hfllm.to_native(model, tmp_path / "native", native_type)
    native = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    ids = torch.arange(10, 40).unsqueeze(0)
    torch.testing.assert_close(native(ids).logits, model(ids).logits, atol=1e-5, rtol=0)
    assert hfllm.from_native(tmp_path / "native").config.sliding_window is None


LONGROPE = {
    **{"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16, "factor": 4.0},
    **{"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]},
}


def test_a_rotation_that_changes_goes_to_the_class_that_reads_again(make_model, tmp_path):
    """Others would generate with cached keys of the short factors."""
    model = make_model(rope_parameters=LONGROPE)
    assert config_to_native(model.config).model_type == "phi3"
    with pytest.raises(InputError, match="llama refuses this model: rope_type='longrope' has no place there"):
        hfllm.to_native(model, tmp_path / "out", "llama")
    with pytest.raises(InputError, match="qwen2: rope_type='longrope' has no place there"):
        config_from_native(transformers.Qwen2Config(**SIZES, num_key_value_heads=1, rope_parameters=LONGROPE))


@pytest.mark.slow
def test_an_export_that_is_pushed_is_the_whole_folder(make_model, tokenizer, tmp_path, hub):
    """The native class's names and the tokenizer, in a repository of the folder's name, and nothing hidden."""
    model = make_model(**FAMILIES["mixtral"])
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / ".lock").write_text("")
    hfllm.to_native(model, tmp_path / "named", tokenizer=tokenizer, push_to_hub=True, private=True)
    hfllm.to_native(model, tmp_path / "other", push_to_hub=True, repo_id="me/chosen", commit_message="Export")
    assert hub.repos.keys() == {"me/named", "me/chosen"} and hub.repos["me/named"].private
    assert hub.repos["me/chosen"].messages[-1] == "Export"
    for folder, repo in (("named", "me/named"), ("other", "me/chosen")):
        files = {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir() if path.name != ".lock"}
        pushed = {name: file.content for name, file in hub.repos[repo].files().items()}
        del pushed[".gitattributes"]
        assert pushed == files
    assert "tokenizer.json" in hub.repos["me/named"].files()
    names = load_file(tmp_path / "named" / "model.safetensors").keys()
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in names
