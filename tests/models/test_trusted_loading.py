"""Nothing that a model brings along is run: neither its code nor kernels that its config names, whoever loads it."""

import ast
import importlib
import json
import re
from argparse import Namespace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from trl import ModelConfig

from hfllm import PPOConfig, PPOTrainer
from hfllm.data.curation.perplexity import CausalJudge, check_judge
from hfllm.errors import InputError
from hfllm.models.conversion.convert import from_native, read_config
from hfllm.models.loading import saved
from hfllm.models.loading.adapters import find_adapter, load_base, load_scorer
from hfllm.models.loading.weights import load_weights_of
from hfllm.outputs.files import model_files
from hfllm.runs.flags import RemoteCodeArguments, trusts_code_if_asked
from hfllm.runs.identity import run_arguments
from hfllm.runs.models import load_config, load_policy, load_reward_model, load_tokenizer, named_model
from hfllm.stages.convert import find_tokenizer
from hfllm.trainers.distillation.students import load_teacher
from hfllm.trainers.ppo.setup import scorer_from_name

ROOT = Path(__file__).parent.parent.parent
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
Path(__file__).with_name("ran").touch()
Path({ran!r}).touch()
class Config(LlamaConfig):
    model_type = "evil"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(autouse=True)
def nobody_answers(monkeypatch):
    """transformers would ask whether to run the code, and `yes |` would answer."""
    monkeypatch.setattr("builtins.input", lambda *args: "y")


def edit(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.fixture
def model(tokenizer, tmp_path):
    """A folder with a small Llama and its tokenizer."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def with_code(model, tmp_path, monkeypatch):
    """The same with code of its own, which leaves `ran` behind."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit(model / "config.json", model_type="evil", auto_map=names)
    edit(model / "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    (model / "evil.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    return model


@pytest.mark.parametrize("fields", [{"model_type": ["llama"]}, {"layer_types": [{}]}])
def test_a_field_of_another_type_is_one_line(fields, model):
    edit(model / "config.json", **fields)
    with pytest.raises(InputError, match=rf"^model '{model}'") as error:
        load_config(str(model))
    assert "\n" not in str(error.value)


@pytest.fixture
def adapter(model, tmp_path):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(LlamaForCausalLM.from_pretrained(model), LoraConfig(task_type="CAUSAL_LM"))
    adapted.peft_config["default"].base_model_name_or_path = str(model)
    adapted.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


LOADERS = {
    "policy": lambda name: load_policy(named_model(ModelConfig(model_name_or_path=name))),
    "config": load_config,
    "tokenizer": load_tokenizer,
    "reward model": lambda name: load_reward_model(name, named_model(ModelConfig())),
    "scorer": load_scorer,
    "scorer by name": lambda name: scorer_from_name(name, {}),
    "teacher": lambda name: load_teacher(name, {}),
    "weights": lambda name: load_weights_of(AutoModelForCausalLM, name),
    "conversion": from_native,
    "config to convert": read_config,
    "PPO by name": lambda name: PPOTrainer(name, len, PPOConfig("unused", use_cpu=True, bf16=False)),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_code_is_neither_run_nor_asked_for(loader, with_code, tmp_path):
    with pytest.raises(ValueError, match="trust_remote_code"):
        LOADERS[loader](str(with_code))
    assert not (tmp_path / "ran").exists()


def test_neither_is_that_of_an_adapters_base(adapter, with_code, tmp_path):
    with pytest.raises(InputError, match="--trust_remote_code"):
        load_base(find_adapter(adapter), AutoModelForCausalLM)
    with pytest.raises(InputError, match="--trust_remote_code"):
        load_config(adapter)
    assert not (tmp_path / "ran").exists()


def test_conversion_does_without_a_tokenizer_that_needs_code(with_code, tmp_path, capsys):
    assert find_tokenizer(str(with_code), {}) is None
    assert "--trust_remote_code" in capsys.readouterr().out
    assert not (tmp_path / "ran").exists()


def test_a_judge_of_curation_has_neither_code_nor_kernels(model, with_code, tmp_path):
    with pytest.raises(InputError, match="code of its own"):
        check_judge(str(with_code))
    assert not (tmp_path / "ran").exists()
    edit(model / "config.json", model_type="llama", auto_map={}, attn_implementation="evil/kernel")
    edit(model / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", auto_map={})
    assert CausalJudge(str(model)).model.config._attn_implementation == "sdpa"


def test_a_model_that_is_loaded_by_its_name_is_whole(model):
    edit(model / "config.json", num_hidden_layers=2)
    with pytest.raises(InputError, match=r"policy .* not in its files, such as model\.layers\.1\."):
        LOADERS["PPO by name"](str(model))
    with pytest.raises(InputError, match=r"--perplexity_model .* such as model\.layers\.1\."):
        CausalJudge(str(model))


def test_the_flag_trusts_it_for_one_run_and_those_inside(with_code, tmp_path):
    @trusts_code_if_asked
    def inner(arguments):
        return load_policy(named_model(ModelConfig(model_name_or_path=str(with_code))))

    @trusts_code_if_asked
    def outer(arguments):
        return inner(RemoteCodeArguments())

    with pytest.raises(InputError, match="--trust_remote_code"):
        outer(RemoteCodeArguments())
    policy, _ = outer(RemoteCodeArguments(trust_remote_code=True))
    assert type(policy).__name__ == "Model" and (tmp_path / "ran").exists()
    assert not saved.trusts_remote_code()
    assert run_arguments(RemoteCodeArguments(trust_remote_code=True)) == {}


KERNELS = [
    ({"attn_implementation": "evil/kernel"}, "attn_implementation='evil/kernel'"),
    ({"_attn_implementation": "evil/kernel@v1:run"}, "attn_implementation='evil/kernel@v1:run'"),
    ({"_attn_implementation_internal": "evil/kernel"}, "attn_implementation='evil/kernel'"),
    ({"attn_implementation": {"": "sdpa", "text_config": "paged|evil/kernel"}}, "'paged|evil/kernel'"),
    ({"text_config": {"attn_implementation": "evil/kernel"}}, "attn_implementation='evil/kernel'"),
    ({"attn_implementation": "flash_attention_3"}, "attn_implementation='flash_attention_3'"),
    ({"experts_implementation": "sonicmoe"}, "experts_implementation='sonicmoe'"),
    ({"experts_implementation": "evil/experts"}, "experts_implementation='evil/experts'"),
]


@pytest.mark.parametrize(("fields", "named"), KERNELS, ids=str)
def test_kernels_that_a_config_names_are_refused(fields, named, model, adapter, monkeypatch):
    def download(*args, **kwargs):
        raise AssertionError("a kernel was downloaded")

    # As if the library that downloads them were there.
    monkeypatch.setattr("transformers.modeling_utils.is_kernels_available", lambda: True)
    monkeypatch.setattr("transformers.integrations.hub_kernels.is_kernels_available", lambda: True)
    monkeypatch.setattr("transformers.integrations.hub_kernels.get_kernel", download)
    edit(model / "config.json", **fields)
    for name in (str(model), adapter):
        with pytest.raises(InputError) as error:
            load_policy(named_model(ModelConfig(model_name_or_path=name)))
        assert named in str(error.value) and saved.TRUST_FLAG in str(error.value)
    # A model without weights is built of this one.
    config = load_config(str(model))
    assert (config._attn_implementation or "sdpa", config._experts_implementation) == ("sdpa", None)


def test_what_the_user_names_wins_over_the_config(model):
    edit(model / "config.json", attn_implementation="evil/kernel")
    policy, _ = load_policy(named_model(ModelConfig(model_name_or_path=str(model), attn_implementation="eager")))
    assert policy.config._attn_implementation == "eager"


def test_what_is_built_in_may_be_named(model):
    for name in ("eager", "sdpa", None):
        edit(model / "config.json", attn_implementation=name)
        policy, _ = load_policy(named_model(ModelConfig(model_name_or_path=str(model))))
        assert policy.config._attn_implementation == (name or "sdpa")


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["null", "[1, 2]", "3", ""])
def test_settings_that_are_no_object_are_named(file, text, model):
    (model / file).write_text(text)
    with pytest.raises(InputError) as error:
        load_policy(named_model(ModelConfig(model_name_or_path=str(model))))
    assert str(model) in str(error.value) and "\n" not in str(error.value)
    assert f"{file} is damaged" in str(error.value)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_settings_that_go_deeper_than_the_stack_are_named(file, model):
    (model / file).write_text('{"a":' * 100_000)
    with pytest.raises(InputError, match=f"{re.escape(str(model))}.*nested too deeply"):
        load_policy(named_model(ModelConfig(model_name_or_path=str(model))))


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_hidden_layers", "two"), ("hidden_act", 3), ("num_attention_heads", -1), ("dtype", "float33")],
)
@pytest.mark.parametrize(
    "load", [lambda folder: load_policy(named_model(ModelConfig(model_name_or_path=folder))), load_config]
)
def test_fields_of_another_type_are_named(load, field, value, make_model, model):
    make_model().config.save_pretrained(model)
    edit(model / "config.json", **{field: value})
    with pytest.raises(InputError) as error:
        load(str(model))
    assert str(model) in str(error.value) and repr(value).strip("'") in str(error.value)
    assert "\n" not in str(error.value)


def test_conversion_says_which_kernel_it_refuses(model):
    edit(model / "config.json", attn_implementation="evil/kernel")
    with pytest.raises(InputError, match=r"cannot load the weights: .*names attn_implementation='evil/kernel'"):
        from_native(str(model))


OUTSIDE = [
    "../x.safetensors",
    "/etc/x.safetensors",
    "sub/../../x.safetensors",
    "..\\x.safetensors",
    "C:\\x",
    "\\\\host\\x",
]


@pytest.mark.parametrize("shard", OUTSIDE)
def test_an_index_names_no_files_elsewhere(shard, model, tmp_path):
    (model / "model.safetensors").rename(tmp_path / "x.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))
    for loader in ("policy", "conversion", "scorer", "teacher", "PPO by name"):
        with pytest.raises(InputError, match=r"index.json names .*, which is not in its folder"):
            LOADERS[loader](str(model))
    with pytest.raises(InputError, match=r"index.json names .*, which is not in its folder"):
        model_files(model)


def test_an_index_may_name_shards_and_folders(model):
    assert not any(map(saved.is_outside, ["model-00001-of-00002.safetensors", "parts/a..b.safetensors"]))


def loads_of(file):
    """The calls of a file that load something, and may run code: the line, the function and the flags of each."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            owner = ast.unparse(node.func).rpartition(".")[0]
            is_auto = name == "from_pretrained" or (name == "from_config" and "Auto" in owner) or name == "pipeline"
            if is_auto and owner not in ("PeftModel", "PeftConfig"):
                yield node.lineno, name, {keyword.arg for keyword in node.keywords}


LOADING = ROOT / "hfllm" / "models" / "loading" / "saved.py"


LOADING = ROOT / "hfllm" / "models" / "loading" / "saved.py"


LOADING = ROOT / "hfllm" / "models" / "loading" / "saved.py"


LOADING = ROOT / "hfllm" / "models" / "loading" / "saved.py"


LOADING = ROOT / "hfllm" / "models" / "loading" / "saved.py"


LOADING = ROOT / "hfllm" / "models" / "loading" / "saved.py"


LOADING = ROOT / "hfllm" / "models" / "loading" / "saved.py"


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["hfllm", "recipes", "benchmarks"])
def test_every_call_in_the_source_says_whether_code_is_trusted(folder):
    files = [file for file in (ROOT / folder).rglob("*.py") if file != LOADING]
    silent = [
        f"{file.relative_to(ROOT)}:{line}: {name} without trust_remote_code (hfllm.models.loading.saved says it)"
        for file in files
        for line, name, flags in loads_of(file)
        if "trust_remote_code" not in flags
    ]
    assert files and not silent
    # In the file that all of them use, each call takes what one function has added.
    calls = list(loads_of(LOADING))
    source = (LOADING).read_text(encoding="utf-8")
    assert len(calls) == 4 and source.count("_with_trust(kwargs)") == len(calls)


def test_benchmarks_load_as_recipes_do(model, monkeypatch):
    """By the file that refuses kernels too."""
    files = [*(ROOT / "benchmarks").glob("*.py")]
    assert files and not [(file.name, *load) for file in files for load in loads_of(file)]
    edit(model / "config.json", attn_implementation="evil/kernel")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    flags = {"random_weights": None, "model_name_or_path": str(model), "assistant_model_name_or_path": None}
    with pytest.raises(InputError, match="its config names attn_implementation='evil/kernel'"):
        importlib.import_module("generation").load(Namespace(**flags))


@pytest.mark.slow
@pytest.mark.parametrize("load", ["policy", "scorer", "teacher"])
def test_the_base_of_an_adapter_that_stays_apart_is_whole(load, model, adapter):
    pytest.importorskip("bitsandbytes")
    int8 = BitsAndBytesConfig(load_in_8bit=True)
    loaded = {
        "policy": lambda: load_policy(named_model(ModelConfig(model_name_or_path=adapter, load_in_8bit=True)))[0],
        "scorer": lambda: load_scorer(adapter, quantization_config=int8),
        "teacher": lambda: load_teacher(adapter, {"quantization_config": int8}),
    }[load]
    assert any("lora_A" in name for name in loaded().state_dict())
    edit(model / "config.json", num_hidden_layers=2)
    with pytest.raises(InputError, match=r"weights are of the .* not in its files, such as model\.layers\.1\."):
        loaded()
