"""The house rules of DESIGN: imports point one way, the modeling file travels alone, files stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hfllm"
# What each room may import of ours. Files directly under hfllm/ are rooms of one file.
ALLOWED = {
    "models": {"errors"},
    "scaling": {"errors"},
    "errors": set(),
    "checkpoints": set(),
    "data": {"errors"},
    "rewards": {"data", "errors"},
    "reporting": set(),
    "trainers": {"models", "data", "rewards", "errors", "checkpoints"},
    "evaluation": {"models", "data", "rewards", "reporting", "generation", "errors"},
    "generation": {"models", "data", "errors"},
    "compression": {"models", "data", "errors", "evaluation"},
    "registration": {"models", "compression"},
    "flags": {"errors"},
    "parsers": {"flags"},
    "cli": {"data", "errors", "reporting", "checkpoints", "flags", "parsers"},
    "hub_files": {"errors", "reporting"},
    "model_card": {"errors", "reporting", "hub_files"},
    "hub": {"errors", "reporting", "hub_files", "model_card"},
    "stage_data": {"cli", "data", "errors"},
    "stage_models": {"data", "errors", "models"},
    "stages": {"cli", "data", "errors", "hub", "hub_files", "model_card", "reporting", "stage_data"},
    "mixtures": {"data", "errors", "stage_data"},
    "pretraining": {
        *("data", "errors", "mixtures", "models", "trainers"),
        *("stage_data", "stage_models", "stages"),
    },
    "pretraining_watch": {"errors", "evaluation", "scaling", "trainers"},
    "scaling_runs": {
        *("cli", "data", "errors", "evaluation", "pretraining", "pretraining_watch", "reporting", "trainers"),
        *("stage_data", "stage_models", "stages"),
    },
    "scaling_report": {"errors", "reporting", "scaling"},
    "alignment_checks": {"data", "errors", "rewards", "stage_models", "trainers"},
    "distillation_checks": {"models", "stage_models"},
    "teacher_answers": {"cli", "data", "errors", "evaluation", "stage_models"},
}
MAX_LINES = 450


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """Every module that a file imports, wherever in it, except for type checking only."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("hfllm.")}
    assert ours - {room(path)} <= ALLOWED[room(path)]
    assert not {name for name in imports(path) if name.split(".")[0] in ("recipes", "tests")}


def test_the_modeling_file_travels_alone():
    names = set(imports(PACKAGE / "models" / "modeling_hfllm.py"))
    assert {name for name in names if name.startswith(".")} == {".configuration_hfllm"}
    assert {name.split(".")[0] for name in names if not name.startswith(".")} == {
        "torch",
        "transformers",
    }


@pytest.mark.parametrize(
    "path", [*FILES, *sorted((ROOT / "recipes").glob("*.py"))], ids=lambda path: str(path.relative_to(ROOT))
)
def test_files_stay_small(path):
    limit = 700 if path.name == "modeling_hfllm.py" else MAX_LINES
    assert len(path.read_text().splitlines()) <= limit


def test_importing_hfllm_imports_neither_torch_nor_transformers():
    code = "import hfllm, sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    "imports",
    [
        "import hfllm, transformers",
        "import hfllm, importlib.util; importlib.util.find_spec('transformers')",
        "import transformers, hfllm",
        "import hfllm; from transformers import LlamaForCausalLM",
        "import hfllm; from transformers.modeling_layers import GradientCheckpointingLayer",
        "from hfllm.models.modeling_hfllm import HfllmModel",
        "from hfllm.models.configuration_hfllm import HfllmConfig",
        "from hfllm import PPOTrainer",
    ],
)
def test_registration_works_whatever_is_imported_first(imports):
    code = (
        f"{imports}\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "config = AutoConfig.for_model('hfllm', num_hidden_layers=1, hidden_size=16, num_attention_heads=1)\n"
        "assert type(AutoModelForCausalLM.from_config(config)).__name__ == 'HfllmForCausalLM'"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def test_public_names_exist():
    import hfllm

    for name in hfllm.__all__:
        assert getattr(hfllm, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = hfllm.nonsense
