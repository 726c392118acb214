"""The list of faults to plant fits the code: each can be planted, and every room has some."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Rooms whose faults lie in what they call: recipes are run whole by the slow tests.
NO_FORMULAS = {"synthesis"}


@pytest.fixture(scope="module")
def faults():
    spec = importlib.util.spec_from_file_location("faults", ROOT / ".ci" / "faults.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_each_fault_can_be_planted(faults):
    listed = faults.read_faults()
    assert len(listed) >= 100
    assert len({fault.name for fault in listed}) == len(listed)
    assert not {fault.name: problem for fault in listed if (problem := fault.problem())}
    assert all(fault.old != fault.new for fault in listed)


def test_every_room_has_faults(faults):
    rooms = {path.parent.name for path in (ROOT / "hfllm").glob("*/__init__.py")} - NO_FORMULAS
    assert rooms <= {Path(fault.file).parts[1] for fault in faults.read_faults()}


def test_a_fault_that_does_not_fit_is_told(faults, tmp_path):
    (tmp_path / "code.py").write_text("a = 1\nb = 1\n")
    (tmp_path / "tests").mkdir()

    def problem(old, file="code.py", tests=("tests",)):
        return faults.Fault("name", file, old, "", list(tests)).problem(tmp_path)

    assert problem("a = 1") is None
    assert problem("= 1") == "its text occurs 2 times in code.py"
    assert problem("c") == "its text occurs 0 times in code.py"
    assert problem("a", "other.py") == "there is no file other.py"
    assert problem("a = 1", tests=()) and problem("a = 1", tests=["missing"]) == "there are no tests missing"


@pytest.mark.slow
def test_a_planted_fault_is_caught_and_taken_out_again(faults, tmp_path):
    (tmp_path / "answer.py").write_text("ANSWER = 41 + 1\n")
    (tmp_path / "test_code.py").write_text(
        "from answer import ANSWER\n\ndef test_answer():\n    assert ANSWER == 42\n"
    )
    planted = faults.Fault("sum", "answer.py", "+ 1", "+ 2", ["test_code.py"])
    is_caught, line = faults.verdict(tmp_path, planted)
    assert is_caught and "test_answer" in line
    assert (
        faults.verdict(tmp_path, faults.Fault("same", "answer.py", "41 + 1", "40 + 2", ["test_code.py"]))[0] is False
    )
    # A file that cannot be imported proves nothing.
    assert faults.verdict(tmp_path, faults.Fault("syntax", "answer.py", "+ 1", "+", ["test_code.py"]))[0] is False
    assert faults.passes(tmp_path, ["test_code.py"], slow=False)[0] == 0
