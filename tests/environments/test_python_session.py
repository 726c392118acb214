"""A Python whose names last: over the calls of an episode, and no longer."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_run_episodes import asking, call

from hfllm.environments.episodes import ToolEnvironment, run_episodes
from hfllm.environments.python_session import PythonSession, SessionEnded
from hfllm.environments.python_tool import CodeError
from hfllm.environments.tools import ToolBox, answers_of

EACH = "import os\nfor n in range(3, 64):\n    try: {}\n    except OSError: pass"


@pytest.fixture
def session():
    session = PythonSession(seconds=20)
    yield session
    session.reset()


def state_of(number):
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


def test_names_and_files_last_from_call_to_call(session):
    assert session.python("import math\ndef f(x):\n    return x + y\ny = 3") == ""
    assert session.python("print(f(1)); f(2)") == "4\n5"
    assert session.python("open('kept', 'w').write('é')") == "1"
    assert session.python("open('kept').read()") == "'é'"
    with pytest.raises(CodeError, match=r"^ZeroDivisionError: division by zero$"):
        session.python("y = 1 / 0")
    assert session.python("y, math.pi > 3") == "(3, True)"
    session.reset(prompt="Again.")
    with pytest.raises(CodeError, match="name 'y' is not defined"):
        session.python("y")


@pytest.mark.parametrize(
    ("code", "reason", "type_of_it"),
    [
        ("def f(:", "SyntaxError: invalid syntax", CodeError),
        ("import sys; sys.exit(3)", "it exited with 3", CodeError),
        ("import sys; sys.exit('why')", "why", CodeError),
        ("raise KeyboardInterrupt", "KeyboardInterrupt", CodeError),
        ("input()", "EOFError", CodeError),
        ("print('x' * 2**21)", "File too large", CodeError),
        ("x = bytearray(10**9)", "MemoryError", CodeError),
        ("import socket; socket.socket()", "is not allowed here", CodeError),
        ("open('/tmp/written', 'w')", "files outside of the working folder", CodeError),
        ("import os; os._exit(4)", "it exited with 4; what it knew is lost", SessionEnded),
        ("import os; os._exit(0)", "it exited; what it knew is lost", SessionEnded),
        ("import ctypes; ctypes.string_at(0)", "it was ended by SIGSEGV; what", SessionEnded),
        ("__ask__('who?')", "it wrote to the pipe of the tool; what", SessionEnded),
        (
            "import os\nfor n in range(3, 64):\n    try: os.write(n, bytes(9))\n    except OSError: pass",
            "the pipe",
            SessionEnded,
        ),
        (
            "import os\nfor n in range(3, 64):\n    try: os.close(n)\n    except OSError: pass",
            "what it knew",
            SessionEnded,
        ),
    ],
)
def test_what_goes_wrong_is_told_and_the_next_call_works(session, code, reason, type_of_it):
    session.python("kept = 7")
    with pytest.raises(CodeError, match=reason) as error:
        session.python(code)
    assert type(error.value) is type_of_it and "\n" not in str(error.value)
    assert session.python("'kept' in globals()") == str(type_of_it is CodeError)


def test_each_call_has_its_limit_of_time(session):
    session._session.seconds = 0.5
    with pytest.raises(SessionEnded, match=r"^it ran longer than 0\.5 seconds; what it knew is lost$"):
        session.python("while True: pass")
    for _ in range(3):
        assert session.python("import time; time.sleep(.3)") == ""


def test_long_code_and_long_values_are_read(session):
    assert session.python("#" + "z" * 300_000 + "\n'a' * 200_000") == repr("a" * 200_000)
    with pytest.raises(CodeError, match="the value of the last line is longer than"):
        session.python("'a' * 10**7")


def test_what_did_not_fit_is_not_read_in_the_next_call(session):
    with pytest.raises(CodeError, match="File too large"):
        session.python("print('x' * (2**20 + 5))")
    assert session.python("print('short'); 7") == "short\n7"
    assert session.python("import sys; sys.stdout = None") == ""
    assert session.python("print(1)") == "1\n"


def test_an_interrupted_run_has_no_reply_for_the_next(session, monkeypatch):
    from hfllm.environments import python_session

    def interrupted(*arguments):
        raise KeyboardInterrupt

    session.python("x = 1")
    with monkeypatch.context() as patch:
        patch.setattr(python_session._Child, "_read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.python("print('first'); 'FIRST'")
    assert session.python("print('next'); 'NEXT'") == "next\n'NEXT'"


def test_many_files_may_be_open(session):
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        assert session.python("1 + 1") == "2"
    finally:
        for file in files:
            os.close(file)


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_process_leaves_the_session_as_it_is(session):
    session.python("open('kept', 'w').close()")
    child = os.fork()
    if not child:
        session.reset()
        os._exit(0)
    os.waitpid(child, 0)
    assert session.python("import os; os.listdir()") == "['kept']"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_between_calls_the_process_stands_still(session):
    number = int(session.python("import os, signal; os.getpid()"))
    assert wait_for(lambda: state_of(number) == "T")
    # A timer whose handler would compute from then on.
    session.python("def spin(*_):\n    while True: pass")
    session.python("signal.signal(signal.SIGALRM, spin); signal.setitimer(signal.ITIMER_REAL, .05)\n1")
    time.sleep(0.2)
    assert state_of(number) == "T"
    session.reset()
    assert wait_for(lambda: state_of(number) == "Z")


def wait_for(condition):
    for _ in range(200):
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_its_folder_is_removed(session, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    session.python("open('a', 'w').close()")
    assert [each.name for each in next(tmp_path.glob("python-tool-*")).iterdir()] == ["a"]
    session.reset()
    assert not list(tmp_path.iterdir())


def test_it_outlives_the_thread_that_began_it(session):
    thread = threading.Thread(target=session.python, args=("x = 5",))
    thread.start()
    thread.join()
    assert session.python("x") == "5"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("last", ["", "session.python('while True: pass')"])
def test_a_killed_process_leaves_none(last):
    script = "from hfllm.environments.python_session import PythonSession\nsession = PythonSession(100)\n"
    script += f"print(session.python('import os; os.getpid()'), flush=True)\n{last}\nimport time; time.sleep(100)"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    number = int(process.stdout.readline())
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert wait_for(lambda: state_of(number) == "Z")


def test_each_episode_has_its_own(tool_tokenizer):
    ends = [tool_tokenizer.eos_token_id]
    environment = ToolEnvironment([], tool_tokenizer, ends, factory=PythonSession, timeout=30)
    assert [schema["function"]["name"] for schema in environment.schemas] == ["python"]
    rows = [{"prompt": [{"role": "user", "content": "Count."}]} for _ in range(3)]
    for _ in range(2):
        environment.begin(rows)
        texts = [call("python", f'{{"code": "{code}"}}') for code in ("x = [1]", "x.append(2); x")]
        policy = asking(tool_tokenizer, *texts, "Done.<|end|>")
        episodes = run_episodes([[5]] * 3, policy, environment, 400)
        results = [[each["content"] for each in episode.messages if each["role"] == "tool"] for episode in episodes]
        assert results == [["", "[1, 2]"]] * 3
    environment.states.begin([])


def test_sessions_run_side_by_side():
    sessions = [PythonSession(seconds=20) for _ in range(4)]
    boxes = [ToolBox([session.python], 60) for session in sessions]
    for number, expected in ((0, ["0", "1", "2", "3"]), (1, ["0", "2", "4", "6"])):
        calls = [f"x = {index}\nx" if number == 0 else "x * 2" for index in range(4)]
        turns = [
            (box, 60.0, [{"function": {"name": "python", "arguments": {"code": code}}}])
            for box, code in zip(boxes, calls, strict=True)
        ]
        assert [answer.messages[0]["content"] for answer in answers_of(turns)] == expected
    for session in sessions:
        session.reset()
