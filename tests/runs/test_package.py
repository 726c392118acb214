"""What `pip install hfllm` brings: every recipe and config, and the command. And what `make` installs it with."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
BESIDE = ("recipes", "accelerate_configs", "ds_configs")
CACHES = shutil.ignore_patterns("__pycache__", "*.egg-info")


def build(what, folder, out):
    """Build a wheel or an sdist as pip does, without a network."""
    code = f"from setuptools import build_meta; print(build_meta.build_{what}({str(out)!r}))"
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return out / run.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that is built from the sdist."""
    folder = tmp_path_factory.mktemp("package")
    for name in ("hfllm", *BESIDE):
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=CACHES)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "tree" / name)
    with tarfile.open(build("sdist", folder / "tree", folder)) as archive:
        archive.extractall(folder / "sdist", filter="data")
    (unpacked,) = (folder / "sdist").iterdir()
    return build("wheel", unpacked, folder)


@pytest.mark.slow
def test_the_wheel_holds_every_file(wheel):
    sources = [ROOT / "hfllm", *(ROOT / name for name in BESIDE)]
    files = [path for source in sources for path in source.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert {".py", ".yaml", ".json", ".jinja"} <= {path.suffix for path in files}
    with zipfile.ZipFile(wheel) as archive:
        for path in files:
            inside = path.relative_to(ROOT)
            inside = inside if inside.parts[0] == "hfllm" else Path("hfllm", inside)
            assert archive.read(inside.as_posix()) == path.read_bytes(), inside
        installed = [name for name in archive.namelist() if ".dist-info/" not in name]
        assert len(installed) == len(files)


@pytest.mark.slow
def test_the_main_job_needs_no_extra(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        needs = message_from_bytes(archive.read(name)).get_all("Requires-Dist")
    base = {re.split("[<>=]", need)[0] for need in needs if "extra ==" not in need}
    assert {"torch", "transformers", "trl", "accelerate", "datasets"} <= base
    assert not base & {"deepspeed", "bitsandbytes", "lm-eval", "datatrove", "pytest", "ruff", "setuptools"}


@pytest.mark.slow
def test_it_runs_without_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        (name,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "hfllm = hfllm.runs.launcher:main" in archive.read(name).decode()
    (tmp_path / "empty").mkdir()
    code = """
import sys
from hfllm.runs.launcher import main
from hfllm.runs.recipes import installed
assert main(["list"]) == 0
for folder in ("recipes", "accelerate_configs", "ds_configs"):
    assert str(installed(folder)).startswith(sys.argv[1]), installed(folder)
try:
    main(["rlhf", "--help"])
except SystemExit as stop:
    assert stop.code == 0
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "site")],
        cwd=tmp_path / "empty",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "curate/books" in run.stdout and "zero3_offload_nvme" in run.stdout and "--reward_funcs" in run.stdout


@pytest.fixture
def make(tmp_path):
    """What `make rlhf` would do where Pythons of these names are on the path, by whether torch runs on them."""
    if shutil.which("make") is None:
        pytest.skip("needs make")

    def run(pythons, *words):
        for name, is_suitable in pythons.items():
            (tmp_path / name).write_text(f"#!/bin/sh\nexit {0 if is_suitable else 1}\n")
            (tmp_path / name).chmod(0o755)
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            ["make", f"VENV={tmp_path / 'venv'}", f"PYTHONS={' '.join(pythons)}", *words, "rlhf"],
            cwd=ROOT,
            env={**{name: value for name, value in os.environ.items() if name != "PYTHON"}, "PATH": path},
            capture_output=True,
            text=True,
        )

    return run


def test_make_takes_the_first_python_that_torch_runs_on(make):
    plan = make({"python-a": False, "python-b": True, "python-c": True}, "-n").stdout
    assert "python-b -m venv" in plan
    assert "python-a -m venv" not in plan and "python-c -m venv" not in plan
    assert "--editable ." in plan and "[dev]" not in plan
    assert "python-c -m venv" in make({"python-b": True, "python-c": True}, "-n", "PYTHON=python-c").stdout


@pytest.mark.parametrize(
    ("words", "expected"), [((), "none of python-a is"), (("PYTHON=python-a",), "python-a is not")]
)
def test_make_says_that_there_is_no_such_python(make, words, expected, tmp_path):
    run = make({"python-a": False}, *words)
    assert run.returncode != 0
    assert f"error: {expected} a 64-bit Python from 3.11 on" in run.stderr
    assert not (tmp_path / "venv").exists()
