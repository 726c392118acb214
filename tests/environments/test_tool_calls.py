"""Whatever a tool does, the policy gets a message that it can read, and the run goes on."""

import asyncio
import random
import subprocess
import sys
import threading
import time

import pytest

from hfllm.environments.tools import ToolBox, calculator, lookup_in
from hfllm.errors import InputError


def call_of(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def box_of(result, **limits):
    """A box with one tool `act` that returns, raises or calls `result`."""

    def act(word: str = "") -> str:
        """Do something.

        Args:
            word: anything.
        """
        if isinstance(result, BaseException):
            raise result
        return result() if callable(result) else result

    return ToolBox([act], **limits)


def test_a_result_is_the_tools_message():
    message, has_failed = ToolBox([calculator]).call(call_of("calculator", expression="6 * 7"))
    assert message == {"role": "tool", "name": "calculator", "content": "42"} and not has_failed


@pytest.mark.parametrize(
    ("result", "content"),
    [
        (None, "None"),
        ("", ""),
        (7, "7"),
        (float("nan"), "nan"),
        (b"caf\xc3\xa9 \xff", "café \ufffd"),
        (bytearray(b"ab"), "ab"),
        ({"a": [1, 2]}, "{'a': [1, 2]}"),
        ("half \ud800 of a character", "half ? of a character"),
        ("nul \x00 byte", "nul \x00 byte"),
    ],
)
def test_any_result_is_text(result, content):
    message, has_failed = box_of(result).call(call_of("act"))
    assert message["content"] == content and not has_failed
    message["content"].encode("utf-8")


def test_ten_megabytes_are_cut():
    message, has_failed = box_of("ab" * 5_000_000, max_length=100).call(call_of("act"))
    assert message["content"] == "ab" * 50 + "... (cut, of 10000000 characters)" and not has_failed


class Wordless(Exception):
    def __str__(self):
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    ("error", "content"),
    [
        (ValueError("bad luck"), "{'error': 'ValueError: bad luck'}"),
        (KeyError("owl"), "{'error': \"KeyError: 'owl'\"}"),
        (SystemExit(3), "{'error': 'SystemExit: 3'}"),
        (KeyboardInterrupt(), "{'error': 'KeyboardInterrupt: '}"),
        (MemoryError("full"), "{'error': 'MemoryError: full'}"),
        (Wordless(), "{'error': 'Wordless'}"),
    ],
)
def test_a_tool_that_raises_is_a_message(error, content):
    message, has_failed = box_of(error).call(call_of("act"))
    assert message["content"] == content and has_failed


class Unprintable:
    def __str__(self):
        raise ValueError("cannot be shown")


def test_a_result_that_cannot_be_shown_is_an_error():
    message, has_failed = box_of(Unprintable()).call(call_of("act"))
    assert message["content"] == "{'error': 'ValueError: cannot be shown'}" and has_failed


class Leaving(Exception):
    def __str__(self):
        sys.exit(3)


def test_an_error_that_cannot_be_shown_is_told_at_once():
    message, has_failed = box_of(Leaving(), timeout=30).call(call_of("act"))
    assert message["content"] == "{'error': 'Leaving'}" and has_failed


@pytest.mark.parametrize("timeout", [float("inf"), 1e12])
def test_a_tool_may_take_all_the_time_there_is(timeout):
    message, has_failed = box_of("done", timeout=timeout).call(call_of("act"))
    assert message["content"] == "done" and not has_failed


def test_what_a_tool_does_to_its_arguments_is_not_what_was_called():
    def sort(numbers: list[int], options: dict) -> str:
        """Sort numbers.

        Args:
            numbers: what to sort.
            options: how.
        """
        numbers.sort()
        options["by"] = "size"
        return str(numbers)

    call = call_of("sort", numbers=[3, 1, 2], options={})
    assert ToolBox([sort]).call(call)[0]["content"] == "[1, 2, 3]"
    assert call == call_of("sort", numbers=[3, 1, 2], options={})


def test_a_tool_that_hangs_is_given_up():
    free = threading.Event()
    message, has_failed = box_of(free.wait, timeout=0.05).call(call_of("act"))
    assert message["content"] == "{'error': 'act did not answer within 0.05 seconds'}" and has_failed
    free.set()


def test_a_coroutine_that_hangs_is_cancelled_and_its_own_time_limits_are_errors():
    ends = []

    async def wait(seconds: float) -> str:
        """Wait.

        Args:
            seconds: how long.
        """
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            ends.append("cancelled")
            raise
        raise TimeoutError("of its own")

    tools = ToolBox([wait], timeout=0.2)
    message, has_failed = tools.call(call_of("wait", seconds=1e6))
    assert message["content"] == "{'error': 'wait did not answer within 0.2 seconds'}" and has_failed
    message, has_failed = tools.call(call_of("wait", seconds=0))
    assert message["content"] == "{'error': 'TimeoutError: of its own'}" and has_failed
    give_up = time.monotonic() + 10
    while any(thread.name == "tool-wait" for thread in threading.enumerate()) and time.monotonic() < give_up:
        time.sleep(0.01)
    assert ends == ["cancelled"] and time.monotonic() < give_up


def test_a_system_without_room_for_a_thread_is_an_error(monkeypatch):
    def start(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    message, has_failed = box_of("never").call(call_of("act"))
    assert message["content"] == "{'error': \"act was not called: can't start new thread\"}" and has_failed


HANGING = '''
import asyncio, sys, threading, time, types
from concurrent.futures import ThreadPoolExecutor
from hfllm.environments.tools import ToolBox

# Its import takes seconds; what the schemas are does not matter here.
sys.modules["transformers"] = sys.modules["transformers.utils"] = types.ModuleType("transformers")
sys.modules["transformers"].get_json_schema = lambda tool: {}

def sleep():
    """Hang."""
    time.sleep(1e6)

def work():
    """Hang."""
    while True:
        pass

async def wait():
    """Hang."""
    await asyncio.sleep(1e6)

async def in_thread():
    """Hang."""
    await asyncio.to_thread(time.sleep, 1e6)

def in_pool():
    """Hang."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(time.sleep, 1e6).result()

def in_own_thread():
    """Hang."""
    thread = threading.Thread(target=time.sleep, args=(1e6,))
    thread.start()
    thread.join()

def answer():
    """Answer."""
    return "still here"

often = [sleep, wait, in_thread, in_pool, in_own_thread]
tools = ToolBox([*often, work, answer], timeout=0.01)
calls = [{"function": {"name": tool.__name__, "arguments": {}}} for tool in [*often * 20, work]]
told = [tools.call(call)[0]["content"] for call in calls]
assert all("did not answer" in content for content in told), told
tools.timeout = 30
print(tools.call({"function": {"name": "answer"}})[0]["content"])
'''


@pytest.mark.slow
def test_a_hundred_tools_that_hang_neither_stop_the_next_nor_keep_the_process():
    done = subprocess.run([sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "still here\n"), done.stderr[-2000:]


def test_a_tool_that_never_stops_recursing_is_an_error():
    def deeper():
        return deeper()

    message, has_failed = box_of(deeper).call(call_of("act"))
    assert "RecursionError" in message["content"] and has_failed


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (call_of("fly", to="Mars"), "Tool fly not found. There are: act."),
        (call_of("act", words="x"), "wrong arguments for act: got an unexpected keyword argument 'words'"),
        ({"function": {"name": "act", "arguments": "{broken"}}, "the arguments are no JSON: {broken"),
        ({"function": {"name": "act", "arguments": "[" * 100_000}}, "the arguments are no JSON"),
        ({"function": {"name": "act", "arguments": [1]}}, "must be an object of names and values, got [1]"),
        ({"function": {"name": None, "arguments": {}}}, "Tool None not found"),
        ({"name": "fly"}, "Tool fly not found"),
        ({}, "Tool None not found"),
    ],
)
def test_a_wrong_call_is_told_what_is_wrong(call, part):
    message, has_failed = box_of("never").call(call)
    assert part in message["content"] and has_failed


def test_a_missing_argument_is_named():
    message, _ = ToolBox([calculator]).call(call_of("calculator"))
    assert message["content"].startswith("{'error': \"wrong arguments for calculator: missing a required argument")


def test_arguments_may_be_json_text_or_absent():
    assert (
        ToolBox([calculator]).call({"function": {"name": "calculator", "arguments": '{"expression": "1+1"}'}})[0][
            "content"
        ]
        == "2"
    )
    assert box_of("here").call({"function": {"name": "act", "arguments": None}})[0]["content"] == "here"


def test_coroutines_and_methods_are_tools():
    async def later(word: str) -> str:
        """Say it later.

        Args:
            word: what to say.
        """
        return word * 2

    class Place:
        def visit(self, place: str) -> str:
            """Go there.

            Args:
                place: where to.
            """
            return f"at {place}"

    tools = ToolBox([later, Place().visit])
    assert tools.call(call_of("later", word="ab"))[0]["content"] == "abab"
    assert tools.call(call_of("visit", place="sea"))[0]["content"] == "at sea"
    assert [schema["function"]["name"] for schema in tools.schemas] == ["later", "visit"]


def undescribed(word: str) -> str:
    """Say it."""
    return word


def unannotated(word):
    """Say it.

    Args:
        word: what to say.
    """
    return word


def by_place(word: str, /) -> str:
    """Say it.

    Args:
        word: what to say.
    """
    return word


def by_places(*words: str) -> str:
    """Say it.

    Args:
        words: what to say.
    """
    return " ".join(words)


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([by_place], "tools: 'by_place' takes 'word' by its place; calls give arguments by their names"),
        ([by_places], r"tools: 'by_places' takes '\*words' by its place"),
        ([undescribed], "tools: 'undescribed' has no schema"),
        ([unannotated], "tools: 'unannotated' has no schema"),
        ([calculator, calculator], "tools: two are named 'calculator'"),
        (["calculator"], "tools: 'calculator' is no function"),
    ],
)
def test_what_is_no_tool_is_refused(tools, message):
    with pytest.raises(InputError, match=message):
        ToolBox(tools)


# ---- built in ----


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12 * (3 + 4)", "84"),
        ("6 / 2", "3"),
        ("0.1 + 0.2", "0.3"),
        ("123456789012.75", "123456789012.75"),
        ("2500000000000 + 0.5", "2500000000000.5"),
        (" -7 // 2 ", "-4"),
        ("2 ** 10 % 7", "2"),
        ("1e300 * 10", "1e+301"),
        ("2 ** -1", "0.5"),
        ("2 ** 2000", str(2**2000)),
        (5, "5"),
    ],
)
def test_the_calculator_calculates(expression, value):
    assert calculator(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        *("__import__('os').system('true')", "(1).__class__", "[1 for _ in (1,)]", "lambda: 1", "a", "1 if 1 else 2"),
        *("'a' * 9", "True + 1", "1 < 2", "1; 2", "x = 1", "", " ", "1 +", "f'{1}'", "1 << 9", "0x\x00", "...", "1j"),
        *("1 / 0", "0 ** -1", "(-8) ** 0.5", "1e308 * 10", "10.0 ** 400", "9 ** 9 ** 9", "2 ** 5000", "1" * 201),
        *("9" * 199 + " * 1e200", "2 ** 4000 * 2 ** 4000", "nan", "1_0_"),
    ],
)
def test_the_calculator_reads_sums_alone(expression):
    with pytest.raises((ArithmeticError, ValueError)):
        calculator(expression)


@pytest.mark.parametrize(("expression", "value"), [("(" * 99 + "1" + ")" * 99, "1"), ("-" * 199 + "1", "-1")])
def test_the_calculator_reads_deep_sums(expression, value):
    assert calculator(expression) == value


def test_the_calculator_agrees_with_python():
    rng = random.Random(0)
    for _ in range(200):
        terms = [str(rng.choice([rng.randrange(100), round(rng.uniform(0, 9), 2)])) for _ in range(rng.randint(1, 5))]
        expression = terms[0] + "".join(f" {rng.choice('+-*')} {'-' * rng.randint(0, 1)}{term}" for term in terms[1:])
        assert float(calculator(expression)) == pytest.approx(float(eval(expression)), abs=1e-6, rel=1e-9)


def test_a_table_says_what_it_knows_and_what_it_does_not():
    lookup = lookup_in({"Owl": {"Color": "gray", "legs": 2}})
    assert lookup(" owl", "COLOR ") == "gray" and lookup("OWL", "legs") == "2"
    tools = ToolBox([lookup])
    for arguments, part in (
        ({"key": "fox", "attribute": "color"}, "nothing is known of 'fox'"),
        ({"key": "owl", "attribute": "wings"}, "'wings' is not known; there are: color, legs"),
    ):
        message, has_failed = tools.call(call_of("lookup", **arguments))
        assert part in message["content"] and has_failed


@pytest.mark.parametrize("table", [["owl"], {"owl": "gray"}, {"owl": None}, "owl"])
def test_what_is_no_table_is_refused(table):
    with pytest.raises(InputError, match="lookup_in: expected a table such as"):
        lookup_in(table)


def test_threads_of_tools_end():
    before = threading.active_count()
    tools = ToolBox([calculator])
    for _ in range(20):
        tools.call(call_of("calculator", expression="1"))
    assert threading.active_count() <= before + 1


@pytest.mark.parametrize(
    ("table", "word"),
    [({"Owl": {}, "owl ": {}}, "'owl '"), ({"owl": {"color": "gray", "COLOR": "red"}}, "'COLOR'")],
)
def test_a_table_whose_words_differ_in_case_alone_is_refused(table, word):
    with pytest.raises(InputError, match=f"lookup_in: {word} comes twice"):
        lookup_in(table)
