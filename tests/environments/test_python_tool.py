"""Code of a policy runs within its limits, which the kernel holds where it can; a second line is the interpreter's."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hfllm.environments import limited_python, python_tool
from hfllm.environments.built_in import python, python_within
from hfllm.environments.python_tool import CodeError
from hfllm.environments.tools import ToolBox

WITHOUT_HOOK = "import ctypes, os; libc = ctypes.CDLL(None, use_errno=True)\n"
ROOT = Path(__file__).parent.parent.parent


# Without capabilities, as a user who is not root.
PARENT = """
import ctypes, os, struct, sys
from hfllm.environments.python_tool import CodeError, python
ctypes.CDLL(None).capset(struct.pack("Ii", 0x20080522, 0), bytes(24))
before = os.getpriority(0, 0), os.sched_getaffinity(0)
for code in sys.argv[1:]:
    try:
        python("import ctypes, fcntl, os, struct; libc = ctypes.CDLL(None); parent = os.getppid()\\n" + code)
    except CodeError as error:
        assert "Operation not permitted" in str(error), error
    else:
        sys.exit(f"not refused: {code}")
assert (os.getpriority(0, 0), os.sched_getaffinity(0)) == before
print("still here")
"""
# The kernel signals the owner of a pipe that it can be read, and a process without a handler ends by that.
SIGNALS = (
    "ends = os.pipe(); fcntl.fcntl(ends[0], {owner}); fcntl.fcntl(ends[0], 4, os.O_ASYNC); os.write(ends[1], b'x')"
)
REACHES = (
    SIGNALS.format(owner="8, parent"),
    SIGNALS.format(owner="15, struct.pack('ii', 1, parent)"),
    "os.setpriority(os.PRIO_PROCESS, parent, 19)",
    "os.sched_setaffinity(parent, {min(os.sched_getaffinity(parent))})",
    "os.sched_setscheduler(parent, os.SCHED_BATCH, os.sched_param(0))",
)


def kernel_holds():
    """Whether this system has what the kernel's part of the limits needs, by a process that tries it."""
    code = "import ctypes; from hfllm.environments import limited_python as limited; libc = ctypes.CDLL(None); "
    code += "limited.drop_privileges(libc); assert limited.close_files(libc) and limited.close_system(libc)"
    return sys.platform == "linux" and not subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode


@pytest.fixture(scope="module")
def kernel():
    if not kernel_holds():
        pytest.skip("this kernel has no Landlock or no seccomp")


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        ("print(sum(range(10)))", "45\n"),
        ("x = 3", ""),
        ("import os\nprint(os.listdir())", "[]\n"),
        ("open('a', 'w').write('é'); print(open('a').read())", "é\n"),
        ("import math, random, json, re, datetime, fractions; print(math.gcd(12, 18))", "6\n"),
        ("import sys; print(__name__, sys.argv, sys.flags.isolated); sys.exit()", "__main__ [''] 1\n"),
        ("import numpy; print(numpy.ones(3) @ numpy.ones((3, 3)))", "[3. 3. 3.]\n"),
    ],
)
def test_it_returns_what_code_prints(code, printed):
    assert python(code) == printed


def test_each_call_begins_anew(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert python("kept = 1; open('kept', 'w').close()") == ""
    assert (
        python("import os; print('kept' in globals(), os.listdir(), 'HF_TOKEN' in os.environ)") == "False [] False\n"
    )


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("x =", "SyntaxError: invalid syntax"),
        ("import sys; sys.exit(3)", "it exited with 3"),
        ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded"),
        ("import os; os.kill(os.getpid(), 9)", "PermissionError: os.kill is not allowed here"),
        ("x = bytearray(10**9)", "MemoryError"),
        ("open('a', 'wb').write(b'x' * 10**7)", "OSError: .* File too large"),
        ("while True: print('x' * 1000)", "OSError: .* File too large"),
        ("import socket; socket.create_connection(('127.0.0.1', 9))", "socket.* is not allowed here"),
        ("import subprocess; subprocess.run(['ls'])", "subprocess.Popen is not allowed here"),
        ("import os; os.system('ls')", "os.system is not allowed here"),
        ("import os; os.fork()", "os.fork is not allowed here"),
        ("open('/tmp/written', 'w')", "files outside of the working folder cannot be changed here"),
        ("import os; os.symlink('/tmp', 'a'); open('a/b', 'w')", "files outside of the working folder"),
        ("import os; os.mkdir('/tmp/made')", "files outside of the working folder"),
        ("print('\\ud800')", "UnicodeEncodeError"),
    ],
)
def test_what_goes_wrong_is_told(code, reason):
    with pytest.raises(CodeError, match=reason):
        python(code)


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(1e6)"])
def test_time_is_limited(code):
    with pytest.raises(CodeError, match=r"it ran longer than 0\.5 seconds"):
        python_within(seconds=0.5)(code)


@pytest.mark.parametrize(
    "code",
    [
        "assert libc.socket(2, 1, 0) == -1 and ctypes.get_errno() == 1",
        "assert libc.socket(1, 1, 0) == -1",
        "assert libc.fork() == -1",
        "assert libc.kill(os.getppid(), 0) == -1 and ctypes.get_errno() == 1",
        "assert libc.ptrace(16, os.getppid(), 0, 0) == -1",
        "assert libc.execv(b'/bin/true', (ctypes.c_char_p * 2)(b'true', None)) == -1",
        "assert libc.open(b'/tmp/written', 65, 0o600) == -1 and libc.mkdir(b'/tmp/made', 0o700) == -1",
        "assert libc.open(f'/proc/{os.getppid()}/environ'.encode(), 0) == -1",
        "assert libc.unlink(os.fsencode(PATH)) == -1 and libc.open(os.fsencode(PATH), 0) == -1",
        # The name that it has, so that nothing is lost where this is not held.
        "name = os.uname().nodename.encode(); assert libc.sethostname(name, len(name)) == -1",
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "assert libc.truncate(os.fsencode(PATH), 0) == -1 and ctypes.get_errno() == 1",
        # What outlives the process that made it.
        "assert libc.shmget(0, 4096, 0o1600) == libc.msgget(0, 0o1600) == libc.semget(0, 1, 0o1600) == -1",
        "assert libc.unshare(0x10000000) == -1 and ctypes.get_errno() == 1",
        # Success, and nothing has changed.
        "assert libc.chmod(os.fsencode(PATH), 0o777) == libc.utimensat(-100, os.fsencode(PATH), None, 0) == 0",
        "assert libc.chown(os.fsencode(PATH), 1, 1) == libc.setxattr(os.fsencode(PATH), b'user.a', b'b', 1, 0) == 0",
    ],
)
def test_code_that_gets_around_the_interpreter_meets_the_kernel(kernel, tmp_path, code):
    (tmp_path / "mine").write_text("kept")
    os.utime(tmp_path / "mine", (1, 1))
    before = (tmp_path / "mine").stat()
    program = f"PATH = {str(tmp_path / 'mine')!r}\n{WITHOUT_HOOK}{code}\nprint('held')"
    if "setrlimit" in code:
        with pytest.raises(CodeError, match="Error"):
            python(program)
    else:
        assert python(program) == "held\n"
    after = (tmp_path / "mine").stat()
    assert all(getattr(after, name) == getattr(before, name) for name in ("st_mode", "st_uid", "st_mtime", "st_ctime"))
    assert (tmp_path / "mine").read_text() == "kept" and not Path("/tmp/written").exists()


def test_no_code_reaches_the_process_that_started_it(kernel):
    done = subprocess.run([sys.executable, "-c", PARENT, *REACHES], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "still here\n"), done.stderr[-2000:]


def test_a_project_that_is_installed_as_editable_shows_its_packages_alone(kernel, tmp_path):
    for name in ("package", "data"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "answers.txt").write_text("42")
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "module.py").write_text("found = 'found'")
    code = "import sys; sys.path.append(sys.argv[1]); from hfllm.environments import limited_python as limited\n"
    code += "import ctypes; assert limited.close_files(ctypes.CDLL(None)); import module, package, os\n"
    code += "print(module.found, open(package.__path__[0] + '/answers.txt').read(), sorted(os.listdir(sys.argv[1])))\n"
    code += "open(sys.argv[1] + '/data/answers.txt')"
    done = subprocess.run([sys.executable, "-B", "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "found 42 ['data', 'module.py', 'package']\n"
    assert "PermissionError: [Errno 13] Permission denied" in done.stderr


def test_code_that_copies_files_in_its_folder_works(kernel):
    code = "import os, pathlib, shutil; open('a', 'w').write('1'); os.chmod('a', 0o600); shutil.copy2('a', 'b')\n"
    assert python(code + "pathlib.Path('b').touch(); print(open('b').read())") == "1\n"


def test_nothing_is_left_of_its_folder(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = "os.mkdir('closed', 0); os.symlink('.', 'link')\n"
    code += "for _ in range(1200): libc.mkdir(b'a', 0o700); libc.chdir(b'a')\n"
    assert python_within(30)(WITHOUT_HOOK + code + "open('file', 'w'); print(1)") == "1\n"
    assert not list(tmp_path.iterdir())


def test_code_cannot_say_what_the_kernel_does_not_hold(kernel, recwarn):
    with pytest.raises(CodeError, match=r"^not held by the kernel: anything"):
        python("import sys; sys.stderr.write('not held by the kernel: anything\\n\\n'); sys.exit(3)")
    assert not [each for each in recwarn if "the kernel" in str(each.message)]


def test_without_the_kernel_the_interpreter_refuses_and_users_are_told(tmp_path, monkeypatch):
    source = Path(limited_python.__file__).read_text()
    child = tmp_path / "child.py"
    child.write_text(source.replace('if __name__ == "__main__"', "close_files = close_system = bool.__new__\nif True"))
    child.write_text(child.read_text().replace("bool.__new__", "lambda libc: False"))
    monkeypatch.setattr(python_tool, "CHILD", child)
    with pytest.warns(UserWarning, match="the kernel does not limit files and network and processes here"):
        assert python("print(1)") == "1\n"
    for code in ("open('/tmp/written', 'w')", "import socket; socket.socket()", "import os; os.fork()"):
        with pytest.warns(UserWarning), pytest.raises(CodeError, match="PermissionError"):
            python(code)


def alive(number):
    status = Path(f"/proc/{number}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a child of its parent's end")
def test_the_code_ends_with_the_process_that_started_it(tmp_path):
    code = "from hfllm.environments.python_tool import python_within; import sys\n"
    code += "python_within(60)('import os, time; print(os.getpid(), flush=True); time.sleep(60)')"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)})
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    give_up = time.monotonic() + 30
    while not (found := children.read_text().split()) and time.monotonic() < give_up:
        time.sleep(0.01)
    # Its interpreter sets its limits first.
    while len(Path(f"/proc/{found[0]}/cmdline").read_text()) < 9 or not is_limited(found[0]):
        assert time.monotonic() < give_up
        time.sleep(0.01)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    while alive(found[0]):
        assert time.monotonic() < give_up
        time.sleep(0.01)


def is_limited(number):
    return "NoNewPrivs:\t1" in Path(f"/proc/{number}/status").read_text()


def test_it_is_a_tool():
    tools = ToolBox([python])
    assert tools.schemas[0]["function"]["name"] == "python"
    calls = [{"function": {"name": "python", "arguments": {"code": code}}} for code in ("print(6 * 7)", "1 / 0")]
    (first, has_failed), (second, has_second_failed) = (tools.call(call) for call in calls)
    assert (first["content"], has_failed) == ("42\n", False)
    assert second["content"] == "{'error': 'CodeError: ZeroDivisionError: division by zero'}" and has_second_failed
