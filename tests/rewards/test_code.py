"""The reward for code that passes its tests, and programs that would pass them by other means."""

import pytest

from hfllm.errors import InputError
from hfllm.rewards.code import code_of, code_tests, code_tests_within
from hfllm.rewards.functions import checked_rewards, load_reward_function

DOUBLE = ["assert double(2) == 4", "assert double(3) == 6"]


def score(code, tests, setup=None, function=code_tests):
    completions = [[{"role": "assistant", "content": f"It is:\n```python\n{code}\n```\nSo it is."}]]
    (result,) = function(prompts=["Write it."], completions=completions, tests=[tests], test_setup=[setup])
    return result


@pytest.mark.parametrize(
    ("code", "tests", "expected"),
    [
        ("def double(n): return 2 * n", DOUBLE, 1.0),
        ("def double(n): return n + 2", DOUBLE, 0.5),
        ("def double(n): return 2 * n", "\n".join(DOUBLE), 1.0),
        ("def double(n): return n + 2", "\n".join(DOUBLE), 0.0),
        ("double = lambda n: n + n", DOUBLE, 1.0),
        ("def f(x): x.sort()", ["a = [3, 1]\nf(a)\nassert a == [1, 3]"], 1.0),
        ("def f(x): x['b'] = {1}", ["a = {}\nf(a)\nassert a == {'b': {1}}"], 1.0),
        ("def f(*a, b=1): return a, b", ["assert f(1, 2, b=None) == ((1, 2), None)"], 1.0),
        ("def f(x): raise KeyError(x)", ["try:\n    f(1)\nexcept KeyError: pass\nelse: assert False"], 1.0),
        ("def f(x): return x + 1", ["def check(candidate):\n    assert candidate(1) == 2\ncheck(f)"], 1.0),
        ("import numpy as np\ndef f(x): return np.float64(x) / 2", ["assert f(3) == 1.5"], 1.0),
        ("def f(): return float('nan')", ["import math\nassert math.isnan(f())"], 1.0),
        ("def f(): return None", ["assert f() is None"], 1.0),
        ("def f(x): return f'{x}'", ["assert f('a\\nb') == 'a\\nb'"], 1.0),
        (
            "class Stack:\n    def __init__(self): self.a = []\n    def push(self, x): self.a.append(x)\n"
            "    def pop(self): return self.a.pop()\n    def __len__(self): return len(self.a)",
            ["s = Stack()\ns.push(4)\nassert len(s) == 1 and s.a == [4]\nassert s.pop() == 4"],
            1.0,
        ),
        ("def f(): return (x for x in 'ab')", ["assert list(f()) == ['a', 'b']", "assert 'a' in f()"], 1.0),
        (
            "def f(n): return list(range(n))",
            ["assert f(10**5) == list(range(10**5))", "assert len(f(10**5)) == 10**5"],
            1.0,
        ),
        ("def f(x): return len(x)", ["assert f(list(range(10**5))) == 10**5", "assert f('a' * 10**6) == 10**6"], 1.0),
        ("def f(g, x): return g(x)", ["assert f(len, 'ab') == 2"], 1.0),
        (
            "def f(x=0.0): return [1, x]",
            ["assert f(float('inf')) == [1, float('inf')]", "assert f(-1.5)[1] == -1.5"],
            1.0,
        ),
        (
            "from collections import Counter, OrderedDict, defaultdict\ndef f(x): return Counter(x)\n"
            "def g(): return frozenset({1}), OrderedDict(a=defaultdict(int, b=2))",
            ["assert f('aab') == {'a': 2, 'b': 1}", "assert g() == (frozenset({1}), {'a': {'b': 2}})"],
            1.0,
        ),
        (
            "class E(ValueError): pass\ndef f(): raise E('a\\nb')\ndef g(): b'\\xff'.decode()\n"
            "def h(): import json; json.loads('{')",
            [f"try:\n    {name}()\nexcept ValueError as e: assert str(e)\nelse: assert False" for name in "fgh"],
            1.0,
        ),
        (
            "class V:\n    def __init__(self, x): self.x = x\n    def __eq__(self, o): return self.x == o.x\n"
            "    def __add__(self, o): return V(self.x + o.x)\n    def __lt__(self, o): return self.x < o.x\n"
            "    def get(self): return self.x\ndef many(): return [V(1), V(2)]\ndef endless():\n"
            "    n = 0\n    while True: yield n; n += 1",
            [
                "assert V(1) == V(1) and V(1) != V(2) and V(1) + V(2) == V(3) and V(1) < V(2)",
                "v = V(1)\nv.x = 5\nassert v.get() == 5 and isinstance(v, V) and not isinstance(3, V)",
                "assert [v.x for v in many()] == [1, 2] and max(many()).x == 2",
                "import itertools\nassert list(itertools.islice(endless(), 3)) == [0, 1, 2]",
                "e = endless()\nnext(e)\nassert next(e) == 1",
            ],
            1.0,
        ),
        (
            "class Node:\n    def __init__(self, v, n=None): self.v, self.next = v, n\n"
            "def f(): return Node(1, Node(2))",
            ["h, r = f(), []\nwhile h:\n    r.append(h.v)\n    h = h.next\nassert r == [1, 2]"],
            1.0,
        ),
        ("def f(): return {'a': 1}\nclass M(dict): pass\nm = M()", ["m['a'] = 5\nassert f()['a'] == 1"], 1.0),
        ("def f(x): x.append(1)", ["a = []\nf(x=a)\nassert a == [1]"], 1.0),
        ("def f(**k): return sorted(k)", ["assert f(self=1, args=2, code=3) == ['args', 'code', 'self']"], 1.0),
        (
            "import numpy as np\ndef f(x): return np.asarray(x) * 2",
            ["import numpy as np\nassert np.array_equal(f(np.array([1, 2])), [2, 4])"],
            1.0,
        ),
        ("def f(x): return x + 1\nif __name__ == '__main__':\n    print(f(2)); input()", ["assert f(1) == 2"], 1.0),
        (
            "from contextlib import redirect_stdout\nimport os\ndef f():\n"
            "    with redirect_stdout(open(os.devnull, 'w')):\n        print('x')\n    return 1",
            ["assert f() == 1"],
            1.0,
        ),
        ("def f(x): return x", ["assert math.isclose(f(2.5), 2.5)"], 1.0),
        ("def f(n): return n", ["import os; f(1); os._exit(0)", "assert f(2) == 2"], 0.5),
        ("double = 3", DOUBLE, 0.0),
        ("def double(", DOUBLE, 0.0),
        ("", DOUBLE, 0.0),
        ("def double(n): return 2 * n", [], 0.0),
        ("def double(n): return 2 * n", None, 0.0),
    ],
)
def test_it_is_the_share_of_passed_tests(code, tests, expected):
    assert score(code, tests, function=code_tests_within(20)) == expected


EQUAL = "    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "def double(n):\n    import os; os._exit(0)",
        "def double(n): raise SystemExit(0)",
        f"class Any:\n{EQUAL}def double(n): return Any()",
        f"class Any(int):\n{EQUAL}def double(n): return Any(7)",
        "import builtins\nbuiltins.AssertionError = ValueError\ndouble = int",
        "def abs(n): return 0\ndef isinstance(*a): return True\ndef double(n): return 'no'",
        "import atexit, sys\nsys.settrace(lambda *a: None)\nsys.excepthook = print\ndef double(n): return n",
        "def double(n): return __ask__('4')",
        "class L:\n    __contains__ = lambda s, x: True\n    __len__ = lambda s: 0\ndef double(n): return L()",
        "class math:\n    isclose = staticmethod(lambda *a, **k: True)\ndef double(n): return 'no'",
        "class N:\n    def __repr__(self): return '__import__(\"os\")._exit(0)'\ndef double(n): return N()",
        "class N:\n    def __repr__(self): return '9' * 10**6\ndef double(n): return N()",
        "import gc, inspect\ndef double(n):\n"
        "    return [f.f_locals for f in gc.get_objects() if inspect.isframe(f) and 'test' in f.f_locals][0]",
    ],
)
def test_code_gains_nothing_by_other_means(code):
    tests = [*DOUBLE, "assert abs(double(2) - 4) < 0.1", "assert isinstance(double(2), int) and double(2) == 4"]
    tests += ["assert 4 in [double(2)]", "assert double(2) in {4: 1}", "assert math.isclose(double(2), 4)"]
    assert score(code, tests) == 0.0


@pytest.mark.parametrize(
    ("code", "test"), [("def abs(n): return 0", "assert abs(-3) == 3"), ("x = 1", "assert 1 + 1 == 2")]
)
def test_a_test_that_asks_nothing_of_the_code_is_passed_by_none(code, test):
    with pytest.warns(UserWarning, match="uses no name of the code, and none passes it"):
        assert score(code, [test]) == 0.0


def test_without_room_for_a_process_the_reward_says_so(monkeypatch):
    def full(*arguments, **options):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("hfllm.environments.python_session.subprocess.Popen", full)
    with pytest.raises(InputError, match="no Python could be started: Too many open files"):
        checked_rewards(code_tests, [""], ["def f(): return 1"], tests=[["assert f() == 1"]])


def test_a_test_passes_no_program_that_has_ended():
    code = "def f(x):\n    import os; os._exit(0)"
    assert score(code, ["try:\n    f(1)\nexcept Exception:\n    pass"]) == 0.0


@pytest.mark.slow
def test_a_slow_test_fails_no_later_one():
    code = "import time\ndef f(n): time.sleep(n); return n"
    assert score(code, ["for i in range(40): f(0.1)", "assert f(0) == 0"], function=code_tests_within(2)) == 0.5


def test_a_hanging_program_costs_one_limit():
    assert score("def double(n):\n    while True: pass", DOUBLE * 20, function=code_tests_within(0.5)) == 0.0


def test_all_may_be_needed_and_a_setup_runs_first():
    assert score("def double(n): return n + 2", DOUBLE, function=code_tests_within(needs_all=True)) == 0.0
    assert score("def f(x): return x", ["assert math.isclose(f(TWO), 2)"], "import math\nTWO = 2") == 1.0
    with pytest.raises(InputError, match="the test_setup 'import nothing_such' fails: ModuleNotFoundError"):
        score("def f(x): return x", ["assert f(2) == 2"], "import nothing_such")
    with pytest.raises(InputError, match=r"row 0 of the batch has tests \[3\]"):
        score("def f(x): return x", [3])


def test_rows_keep_their_order_and_equal_ones_run_once():
    codes = [f"```\ndef double(n): return {text}\n```" for text in ("2 * n", "n", "n + 2", "2 * n")]
    scores = load_reward_function("code_tests")(prompts=[""] * 4, completions=codes, tests=[DOUBLE] * 4)
    assert scores == [1.0, 0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("x = 1", "x = 1"),
        ("```\nx = 1\n```", "x = 1"),
        ("A:\n```python\nx = 1\n```\nB:\n```py\ny = 2\n\nz = 3\n```\nSo.", "y = 2\n\nz = 3"),
        ("```Python\nx = 1", "x = 1"),
    ],
)
def test_the_last_block_is_the_code(answer, code):
    assert code_of(answer) == code
