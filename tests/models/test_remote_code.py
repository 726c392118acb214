"""Saved models load in a Python that has never heard of hfllm, by the code that travels with them."""

import sys
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from torch.distributed.fsdp import FSDPModule

import hfllm
from hfllm.models.family import configuration_hfllm, configuration_hfllm_vision, modeling_hfllm, modeling_hfllm_vision

SCRIPT = Path(__file__).parent / "remote_code_run.py"
SHARDS = Path(__file__).parent / "fsdp2_run.py"


@pytest.mark.slow
def test_loads_without_the_package_from_another_folder(make_model, tokenizer, tmp_path, bare_processes):
    model = make_model(sliding_window=8)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    parts = (
        "attention",
        "attention_masks",
        "configuration",
        "configuration_fields",
        "delta_rule",
        "experts",
        "layers",
        "linear_attention",
        "modeling",
        "real_tokens",
    )
    code = {*(f"{part}_hfllm.py" for part in parts), "presets.py"}
    assert set(path.name for path in (tmp_path / "model").glob("*.py")) == code
    printed = bare_processes.run(SCRIPT, tmp_path, environment={"HF_HOME": tmp_path / "cache"})
    expected = model(**tokenizer("Say red.", return_tensors="pt")).logits.sum().item()
    assert abs(float(printed.split("LOGITS")[1]) - expected) < 1e-3
    model.set_attn_implementation("eager")
    expected = model(torch.arange(300)[None]).logits.sum().item()
    assert abs(float(printed.split("BANDED")[1].split()[0]) - expected) < 1e-2


def test_the_code_asks_for_the_release_that_the_package_asks_for():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = {each.name: each.specifier for each in map(Requirement, project["dependencies"])}
    oldest = [each.version for each in needs["transformers"] if each.operator == ">="]
    assert [each.split(".") for each in oldest] == [configuration_hfllm.OLDEST_TRANSFORMERS.split(".")[:2]]


@pytest.mark.parametrize("version", ["4.57.6", "5.23.0", "5.23.1.dev0"])
def test_the_package_too_names_a_release_that_is_too_old(monkeypatch, version):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    with pytest.raises(ImportError, match=f"need transformers 5.24.0 or newer, and this is {version}"):
        exec(
            compile(Path(configuration_hfllm.__file__).read_text(encoding="utf-8"), "configuration", "exec"),
            {"__package__": "hfllm.models.family"},
        )


@pytest.mark.parametrize("version", ["5.24.0.dev0", "5.24.0", "6.0.1"])
def test_newer_releases_are_tried(monkeypatch, version):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    exec(
        compile(Path(configuration_hfllm.__file__).read_text(encoding="utf-8"), "configuration", "exec"),
        {"__package__": "hfllm.models.family"},
    )


def classes():
    """Return the classes of models that travel with their code."""
    texts, sights = configuration_hfllm.AUTO_MAP, configuration_hfllm_vision.AUTO_MAP
    found = [getattr(modeling_hfllm, path.partition(".")[2], None) for path in texts.values()]
    found += [getattr(modeling_hfllm_vision, path.partition(".")[2], None) for path in sights.values()]
    return [each for each in dict.fromkeys(found) if each and issubclass(each, transformers.PreTrainedModel)]


def save(model_class, make_model, folder):
    """Save a small model of a class, and return it."""
    if model_class.__module__ == modeling_hfllm.__name__:
        model = make_model(model_class=model_class, is_causal="MaskedLM" not in model_class.__name__)
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        tower = transformers.SiglipVisionConfig(**sizes, image_size=16, patch_size=8)
        model = model_class(hfllm.with_vision(make_model(), tower, image_token_id=30).config).eval()
    model.save_pretrained(folder)
    return model


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def derived(cls):
    """Return what `fully_shard` makes of a class, in the words of torch's own file."""
    given = {"__name__": f"{FSDPModule.__module__}._fsdp_init", "FSDPModule": FSDPModule, "cls": cls}
    return eval("type('FSDP' + cls.__name__, (FSDPModule, cls), {})", given)


def test_a_class_that_torch_derives_is_saved_with_its_own_code(make_model, tmp_path):
    assert len(classes()) == 9
    for each in classes():
        assert derived(each).__module__ == each.__module__ != derived(torch.nn.Linear).__module__
    for each in (modeling_hfllm.HfllmForCausalLM, modeling_hfllm_vision.HfllmForConditionalGeneration):
        model = save(each, make_model, tmp_path / each.__name__)
        model.__class__ = derived(each)
        model.save_pretrained(tmp_path / "derived" / each.__name__)
        assert contents(tmp_path / "derived" / each.__name__) == contents(tmp_path / each.__name__)


@pytest.mark.slow
def test_what_two_processes_have_sharded_is_saved_as_it_was(processes, make_model, tmp_path):
    """By FSDP2, as accelerate prepares it: weights, settings and code, file for file."""
    folders = [tmp_path / each.__name__ for each in classes()]
    for each, folder in zip(classes(), folders, strict=True):
        save(each, make_model, folder)
    processes.torchrun(SHARDS, *folders)
    for folder in folders:
        assert contents(tmp_path / f"{folder.name}-sharded") == contents(folder), folder.name
