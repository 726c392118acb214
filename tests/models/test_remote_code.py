"""Saved models load in a Python that has never heard of hfllm, by the code that travels with them."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from hfllm.models import configuration_hfllm

CODE = """
import sys
sys.modules["hfllm"] = None  # not installed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
# transformers replaces itself by a second copy.
transformers = sys.modules["transformers"]
installed, transformers.__version__ = transformers.__version__, "5.23.0"
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
    raise SystemExit("loaded by a release that is too old")
except ImportError as error:
    assert "need transformers 5.24.0 or newer, and this is 5.23.0: pip install" in str(error), error
transformers.__version__ = installed
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
assistant = pipeline("text-generation", model=sys.argv[1], trust_remote_code=True)
chat = assistant([{"role": "user", "content": "Say red."}], max_new_tokens=3)[0]["generated_text"]
assert chat[-1]["role"] == "assistant", chat
model.set_attn_implementation("banded")
with torch.no_grad():
    assert model.model.layers[0].self_attn.sliding_window == 8
    print("BANDED", model(torch.arange(300)[None]).logits.sum().item())
model.set_attn_implementation("sdpa")
print("LOGITS", model(**tokenizer("Say red.", return_tensors="pt")).logits.sum().item())
"""


def test_loads_without_the_package_from_another_folder(make_model, tokenizer, tmp_path):
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
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "model")],
        cwd=tmp_path,
        env={name: value for name, value in environment.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    expected = model(**tokenizer("Say red.", return_tensors="pt")).logits.sum().item()
    assert abs(float(result.stdout.split("LOGITS")[1]) - expected) < 1e-3
    model.set_attn_implementation("eager")
    expected = model(torch.arange(300)[None]).logits.sum().item()
    assert abs(float(result.stdout.split("BANDED")[1].split()[0]) - expected) < 1e-2


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
