"""Saved models load in a Python that has never heard of hfllm, by the code that travels with them."""

import sys
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from hfllm.models import configuration_hfllm

SCRIPT = Path(__file__).parent / "remote_code_run.py"


def test_loads_without_the_package_from_another_folder(make_model, tokenizer, tmp_path, bare_processes):
    model = make_model(sliding_window=8)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    parts = (
        "attention",
        "balance",
        "banded",
        "chunked",
        "configuration",
        "delta_chunks",
        "delta_rule",
        "expert_fields",
        "experts",
        "head",
        "latent",
        "latent_fields",
        "layer_types",
        "layers",
        "linear",
        "loss",
        "memory",
        "modeling",
        "router",
        "sparse",
        "sparse_blocks",
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
            {"__package__": "hfllm.models"},
        )


@pytest.mark.parametrize("version", ["5.24.0.dev0", "5.24.0", "6.0.1"])
def test_newer_releases_are_tried(monkeypatch, version):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    exec(
        compile(Path(configuration_hfllm.__file__).read_text(encoding="utf-8"), "configuration", "exec"),
        {"__package__": "hfllm.models"},
    )
