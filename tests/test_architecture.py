"""The house rules: imports point down the floors, no circles, small files, a light import, registration."""

import importlib
import importlib.util
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hfllm"
# From the ground up. A room imports from itself and from floors below its own, never from its neighbors.
FLOORS = (
    {"errors", "version"},
    {"fingerprint", "durable", "flags"},
    {"models", "data", "outputs"},
    {"generation", "multimodal"},
    {"scaling", "environments", "compression", "runs"},
    {"synthesis"},
    {"rewards"},
    {"trainers", "evaluation", "grounding", "federation"},
    {"stages", "registration"},
    {"__init__"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
AT_THE_ROOT = {"__init__", "errors", "version", "fingerprint", "durable", "flags", "registration"}
MAX_LINES = 800
MAX_RECIPE_LINES = 150
# At a room's own level, and of a stage that has a folder.
MOST_FILES, MOST_FILES_OF_A_STAGE = 15, 3


@cache
def house():
    """What `.ci/house.py` measures of this checkout."""
    spec = importlib.util.spec_from_file_location("house", ROOT / ".ci" / "house.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.House(ROOT)


def modules() -> dict[str, Path]:
    return house().modules


def imports(path: Path) -> set[str]:
    return house().imports(path)


@cache
def arrows() -> dict[str, set[str]]:
    """What each module imports of the package, also for type checking only."""
    return house().arrows(typing=True)


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def test_the_root_holds_the_face_and_the_ground_alone():
    assert {path.stem for path in PACKAGE.glob("*.py")} == AT_THE_ROOT
    assert {room(name) for name in modules()} == FLOOR.keys()


def test_imports_point_down_the_floors():
    wrong = [
        f"{source} imports {target}"
        for source, targets in arrows().items()
        for target in targets
        if room(source) != room(target) and FLOOR[room(source)] <= FLOOR[room(target)]
    ]
    assert not wrong


def test_no_files_import_each_other():
    try:
        [*TopologicalSorter(arrows()).static_order()]
    except CycleError as error:
        pytest.fail(" imports ".join(error.args[1]))


def test_the_library_imports_neither_recipes_nor_tests():
    outside = {path.stem for folder in ("recipes", "tests", "benchmarks") for path in (ROOT / folder).glob("*.py")}
    for path in modules().values():
        assert not {name.split(".")[0] for name in imports(path)} & {"recipes", "tests", *outside}, path


def test_planning_imports_neither_torch_nor_transformers():
    heavy = {"torch", "transformers", "trl", "datasets"}
    for name, path in modules().items():
        if room(name) == "scaling":
            assert not {each.split(".")[0] for each in imports(path)} & heavy, path


@pytest.mark.slow
def test_no_recipe_imports_another():
    recipes = {path.stem: path for path in (ROOT / "recipes").glob("*.py")}
    for path in recipes.values():
        assert not {name.split(".")[0] for name in imports(path)} & recipes.keys(), path


def test_no_two_test_files_have_one_name():
    """pytest imports them by their names alone, and takes one for the other."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert not {name for name in names if names.count(name) > 1}


def test_files_stay_small():
    files = {*modules().values(), *(ROOT / "recipes").glob("*.py")}
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    limit = {path: MAX_RECIPE_LINES if path.parent.name == "recipes" else MAX_LINES for path in files}
    assert not {str(path): count for path, count in lines.items() if count > limit[path]}


def test_rooms_have_few_files():
    folders = {path.parent for path in modules().values()} - {PACKAGE}
    counts = {folder: len([*folder.glob("*.py")]) - (folder / "__init__.py").exists() for folder in folders}
    limit = {folder: MOST_FILES_OF_A_STAGE if folder.parent.name == "stages" else MOST_FILES for folder in folders}
    assert not {str(folder): count for folder, count in counts.items() if count > limit[folder]}


def test_the_files_of_a_model_travel_together():
    """What lies beside the weights on the Hub imports nothing of hfllm that does not lie there too."""
    beside = {
        "attention_hfllm": {
            "torch",
            "transformers",
            "collections",
            "copy",
            "functools",
            "itertools",
            "math",
            "typing",
        },
        "attention_masks_hfllm": {"torch", "transformers", "collections", "copy", "dataclasses", "typing"},
        "configuration_fields_hfllm": {"dataclasses", "difflib", "typing"},
        "configuration_hfllm": {"transformers", "huggingface_hub", "packaging", "os"},
        "configuration_hfllm_vision": {"transformers", "huggingface_hub", "os"},
        "delta_rule_hfllm": {"torch", "transformers", "collections", "contextlib"},
        "experts_hfllm": {"torch", "transformers", "collections", "itertools", "weakref"},
        "layers_hfllm": {"torch", "transformers", "contextlib"},
        "linear_attention_hfllm": {"torch", "transformers", "collections", "math", "typing"},
        "modeling_hfllm": {"torch", "transformers", "functools", "typing"},
        "modeling_hfllm_vision": {"torch", "transformers", "dataclasses", "functools"},
        "real_tokens_hfllm": {"torch", "collections", "itertools", "math", "typing"},
        "presets": {"collections", "copy", "difflib", "typing"},
    }
    for name, libraries in beside.items():
        names = imports(PACKAGE / "models" / "family" / f"{name}.py")
        ours = {each for each in names if each.startswith("hfllm")}
        assert ours <= {f"hfllm.models.family.{each}" for each in beside}, name
        assert {each.split(".")[0] for each in names - ours} <= libraries, name


def test_importing_hfllm_imports_neither_torch_nor_transformers():
    code = "import hfllm, sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


ORDERS = (
    "import hfllm, transformers",
    "from hfllm.models.family.modeling_hfllm import HfllmModel",
    "from hfllm import PPOTrainer",
)
RARE_ORDERS = (
    # That of every other test.
    "import transformers, hfllm",
    "import hfllm, importlib.util; importlib.util.find_spec('transformers')",
    "import hfllm; from transformers import LlamaForCausalLM",
    "import hfllm; from transformers.modeling_layers import GradientCheckpointingLayer",
    "from hfllm.models.family.configuration_hfllm import HfllmConfig",
)


@pytest.mark.slow
@pytest.mark.parametrize("orders", [ORDERS, RARE_ORDERS], ids=["usual", "rare"])
def test_registration_works_whatever_is_imported_first(orders, bare_processes):
    for imports in orders:
        bare_processes.run("tests/registration_run.py", imports)


def test_public_names_exist():
    import hfllm

    for name in hfllm.__all__:
        assert getattr(hfllm, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = hfllm.nonsense


def test_every_module_is_imported_and_has_the_names_that_it_promises():
    """Those of Flower's apps only where Flower is installed, which no other part needs."""
    missing = []
    for name in sorted(modules()):
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            assert error.name == "flwr" and name in ("hfllm.federation.client_app", "hfllm.federation.server_app"), (
                name
            )
            continue
        missing += [f"{name}.{each}" for each in getattr(module, "__all__", ()) if not hasattr(module, each)]
    assert not missing
