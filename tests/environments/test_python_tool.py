"""Code of a policy runs within its limits, which the kernel holds where it can; a second line is the interpreter's."""

import contextlib
import ctypes
import os
import platform
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hfllm.environments import limited_python, python_tool
from hfllm.environments.python_tool import CodeError, python, python_within
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "printed"),
    [
        ("print(sum(range(10)))", "45\n"),
        ("x = 3", ""),
        ("import os\nprint(os.listdir())", "[]\n"),
        ("open('a', 'w').write('é'); print(open('a').read())", "é\n"),
        ("import math, random, json, re, datetime, fractions; print(math.gcd(12, 18))", "6\n"),
        ("import sys; print(__name__, sys.argv, sys.flags.no_user_site); sys.exit()", "__main__ [''] 1\n"),
        ("import numpy; print(numpy.ones(3) @ numpy.ones((3, 3)))", "[3. 3. 3.]\n"),
    ],
)
def test_it_returns_what_code_prints(code, printed):
    assert python(code) == printed


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(1e6)"])
def test_time_is_limited(code):
    with pytest.raises(CodeError, match=r"it ran longer than 0\.5 seconds"):
        python_within(seconds=0.5)(code)


# What the kernel refuses, or does without any effect.
HELD = [
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
    "assert libc.truncate(os.fsencode(PATH), 0) == -1 and ctypes.get_errno() == 1",
    # What outlives the process that made it.
    "assert libc.shmget(0, 4096, 0o1600) == libc.msgget(0, 0o1600) == libc.semget(0, 1, 0o1600) == -1",
    "assert libc.unshare(0x10000000) == -1 and ctypes.get_errno() == 1",
    # What watches, holds up or marks the files of others.
    "assert libc.inotify_init() == libc.inotify_init1(0) == libc.inotify_add_watch(0, b'/', 256) == -1",
    "assert libc.inotify_init1(0) == -1 and ctypes.get_errno() == 1",
    "assert libc.fcntl(os.open(os.__file__, 0), 1024, 1) == -1 and ctypes.get_errno() == 1",
    "assert libc.fcntl(os.open(os.path.dirname(os.__file__), 0), 1026, 1) == -1 and ctypes.get_errno() == 1",
    # FS_IOC_SETFLAGS, FIOASYNC and FIOSETOWN; then with bits that the kernel does not read.
    "call = lambda command: libc.ioctl(os.open(os.__file__, 0), ctypes.c_ulong(command), bytes(8))\n"
    "for command in (0x40086602, 0x5452, 0x8901, 0x140086602, 0xFFFFFFFF40086602):\n"
    "    assert call(command) == -1 and ctypes.get_errno() == 1, command",
    # PR_SET_PDEATHSIG, the same, and PR_SET_DUMPABLE.
    "for option in (1, 1 << 32 | 1, 4):\n"
    "    assert libc.syscall(PRCTL, ctypes.c_ulong(option), 0, 0, 0, 0) == -1 and ctypes.get_errno() == 1",
    # Success, and nothing has changed.
    "assert libc.chmod(os.fsencode(PATH), 0o777) == libc.utimensat(-100, os.fsencode(PATH), None, 0) == 0",
    "assert libc.chown(os.fsencode(PATH), 1, 1) == libc.setxattr(os.fsencode(PATH), b'user.a', b'b', 1, 0) == 0",
]


def test_code_that_gets_around_the_interpreter_meets_the_kernel(kernel, tmp_path):
    (tmp_path / "mine").write_text("kept")
    os.utime(tmp_path / "mine", (1, 1))
    before = (tmp_path / "mine").stat()
    names = f"PATH, PRCTL = {str(tmp_path / 'mine')!r}, {limited_python.PRCTL[platform.machine()]}\n"
    # In one process, since starting it takes most of the time; it prints what is not held.
    each = "for code in CODES:\n    try: exec(code)\n    except BaseException as error: print(code, repr(error))\n"
    assert python(f"{names}{WITHOUT_HOOK}CODES = {HELD!r}\n{each}print('ended')") == "ended\n"
    after = (tmp_path / "mine").stat()
    assert all(getattr(after, name) == getattr(before, name) for name in ("st_mode", "st_uid", "st_mtime", "st_ctime"))
    assert (tmp_path / "mine").read_text() == "kept" and not Path("/tmp/written").exists()


def test_code_cannot_raise_its_limits(kernel):
    with pytest.raises(CodeError, match="Error"):
        python("import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))")


@pytest.mark.slow
def test_no_code_reaches_the_process_that_started_it(kernel):
    done = subprocess.run([sys.executable, "-c", PARENT, *REACHES], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "still here\n"), done.stderr[-2000:]


@pytest.mark.slow
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


@pytest.mark.slow
def test_nothing_is_left_of_its_folder(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = "os.mkdir('closed', 0); os.symlink('.', 'link')\n"
    code += "for _ in range(1200): libc.mkdir(b'a', 0o700); libc.chdir(b'a')\n"
    assert python_within(30)(WITHOUT_HOOK + code + "open('file', 'w'); print(1)") == "1\n"
    assert not list(tmp_path.iterdir())


# As the kernel has them (asm/unistd_64.h and asm-generic/unistd.h): numbers on x86-64 and on arm64.
CALLS = {
    **{"msgget": (68, 186), "msgctl": (71, 187), "msgrcv": (70, 188), "msgsnd": (69, 189)},
    **{"semget": (64, 190), "semctl": (66, 191), "semtimedop": (220, 192), "semop": (65, 193)},
    **{"shmget": (29, 194), "shmctl": (31, 195), "shmat": (30, 196)},
    **{"mq_open": (240, 180), "mq_unlink": (241, 181), "mq_timedsend": (242, 182), "mq_timedreceive": (243, 183)},
    **{"mq_notify": (244, 184), "mq_getsetattr": (245, 185), "io_setup": (206, 0)},
    **{"inotify_init": (253, None), "inotify_init1": (294, 26), "inotify_add_watch": (254, 27)},
    **{"fanotify_init": (300, 262), "fanotify_mark": (301, 263)},
    **{"socket": (41, 198), "execve": (59, 221), "kill": (62, 129), "clone3": (435, 435)},
}
READ, FCNTL, FLOCK, IOCTL, PRCTL = (0, 63), (72, 25), (73, 32), (16, 29), (157, 167)
ALLOW, REFUSE, IGNORE, KILL, UNKNOWN = 0x7FFF0000, 0x00050001, 0x00050000, 0x80000000, 0x00050026


PROGRAMS = {machine: limited_python.system_filter(machine) for machine in limited_python.ARCHITECTURES}


def verdict(machine, number, *arguments, architecture=None):
    """What a filter says of a call, by an interpreter of the few instructions that it has."""
    named = architecture or limited_python.ARCHITECTURES[machine]
    data = struct.pack("<IIQ6Q", number, named, 0, *arguments, *[0] * (6 - len(arguments)))
    program, place, value = PROGRAMS[machine], 0, None
    while True:
        code, if_so, if_not, operand = program[place]
        if code == 0x06:
            return operand
        if code == 0x20:
            value = struct.unpack_from("<I", data, operand)[0]
            place += 1
        else:
            place += 1 + (if_so if {0x15: value == operand, 0x35: value >= operand}[code] else if_not)


@pytest.mark.parametrize(("column", "machine"), enumerate(("x86_64", "aarch64")))
def test_the_filter_refuses_the_same_on_both_architectures(column, machine):
    for name, numbers in CALLS.items():
        if numbers[column] is not None:
            assert verdict(machine, numbers[column]) == REFUSE, name
    assert verdict(machine, READ[column]) == ALLOW and verdict(machine, FLOCK[column]) == IGNORE
    # Through the entry for 32 bits (i386, arm), where the numbers mean other calls, and by x86-64's second table.
    assert verdict(machine, READ[column], architecture=(0x40000003, 0x40000028)[column]) == KILL
    assert verdict(machine, 0x40000000 + READ[column]) != ALLOW or machine == "aarch64"
    for high in (0, 1 << 32, 0xFFFFFFFF << 32):
        commands = [(command, verdict(machine, IOCTL[column], 3, high | command)) for command in range(0x5400, 0x5460)]
        # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
        assert [command for command, answer in commands if answer == ALLOW] == [
            *(0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
        ]
        assert {answer for _, answer in commands} == {ALLOW, REFUSE}
        options = [(option, verdict(machine, PRCTL[column], high | option)) for option in range(80)]
        assert [option for option, answer in options if answer != REFUSE] == [15, 16]
        asked = {command: verdict(machine, FCNTL[column], 3, high | command) for command in range(1050)}
        assert [each for each, answer in asked.items() if answer == ALLOW] == [*range(6), 36, *range(1030, 1035)]
        assert [each for each, answer in asked.items() if answer == IGNORE] == [6, 7, 37, 38]
    assert len(PROGRAMS[machine]) < 4096


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_what_is_not_listed_is_refused(machine):
    answers = [verdict(machine, number) for number in range(700)]
    listed = limited_python.ALLOWED if machine == "x86_64" else limited_python.ALLOWED.values()
    old = limited_python.OLD_ALLOWED if machine == "x86_64" else ()
    # Of `fcntl` some commands, of which the first is asked here.
    allowed = sorted([*listed, *old, limited_python.FCNTL[machine]])
    assert [number for number, answer in enumerate(answers) if answer == ALLOW] == allowed
    assert set(answers[: limited_python.NEWER]) == {ALLOW, REFUSE, IGNORE}
    # A C library that tries a newer call learns that there is none, and takes an older one.
    assert set(answers[limited_python.NEWER :]) == {UNKNOWN}


@contextlib.contextmanager
def queues():
    """A message, a semaphore of 5 and a POSIX queue of this process, as a program beside a run has them."""
    libc = ctypes.CDLL(None, use_errno=True)
    messages, semaphores = libc.msgget(0, 0o1600), libc.semget(0, 1, 0o1600)
    name = f"/hfllm-test-{os.getpid()}".encode()
    queue = libc.mq_open(name, os.O_CREAT | os.O_RDWR, 0o600, None) if hasattr(libc, "mq_open") else -1
    try:
        if messages < 0 or semaphores < 0:
            pytest.skip("this kernel has no System V queues")
        libc.msgsnd(messages, struct.pack("l", 1) + b"secret", 6, 0)
        libc.semctl(semaphores, 0, 16, 5)
        yield libc, messages, semaphores, name if queue >= 0 else None
    finally:
        libc.msgctl(messages, 0, None)
        libc.semctl(semaphores, 0, 0)
        if queue >= 0:
            os.close(queue)
            libc.mq_unlink(name)


def test_code_reaches_no_queue_or_semaphore_of_another_process(kernel):
    with queues() as (libc, messages, semaphores, name):
        code = f"{WITHOUT_HOOK}import struct; buffer = ctypes.create_string_buffer(64)\n"
        code += "change = struct.pack('Hhh', 0, -1, 2048)\n"
        attempts = [
            f"libc.msgrcv({messages}, buffer, 40, 0, 2048)",
            f"libc.msgsnd({messages}, struct.pack('l', 1) + b'x', 1, 2048)",
            f"libc.semop({semaphores}, change, 1)",
            f"libc.semtimedop({semaphores}, change, 1, None)",
            *[f"libc.semctl({semaphores}, 0, {command}, 0)" for command in (12, 16, 0)],
            *[f"libc.msgctl({messages}, {command}, buffer)" for command in (2, 0)],
            *([f"libc.mq_open({name!r}, 2)", f"libc.mq_unlink({name!r})"] if name else []),
        ]
        for attempt in attempts:
            code += f"print({attempt}, ctypes.get_errno(), buffer.raw.strip(bytes(1)))\n"
        # The C library says of a queue that access is denied, whatever the kernel said.
        assert python(code).replace("-1 13 ", "-1 1 ").splitlines() == ["-1 1 b''"] * len(attempts)
        received = ctypes.create_string_buffer(64)
        assert libc.semctl(semaphores, 0, 12, 0) == 5 and libc.msgrcv(messages, received, 40, 0, 0o4000) == 6
        assert received.raw[8:14] == b"secret"
        if name:
            os.close(libc.mq_open(name, os.O_RDWR))


def test_code_that_asks_its_files_and_pipes_works(kernel):
    code = "import array, fcntl, os, sqlite3, sys; ends = os.pipe(); os.write(ends[1], b'four')\n"
    code += "size = array.array('i', [0])\n"
    code += "fcntl.ioctl(ends[0], 0x541B, size); os.set_blocking(ends[0], False); os.set_inheritable(ends[0], True)\n"
    code += "file = open('a', 'w'); fcntl.flock(file, fcntl.LOCK_EX); fcntl.lockf(file, fcntl.LOCK_EX)\n"
    code += "table = sqlite3.connect('b'); table.execute('create table t(a)'); table.commit()\n"
    assert python(code + "print(size[0], sys.stdout.isatty(), os.path.exists('b'))") == "4 False True\n"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the other entries of x86-64")
@pytest.mark.parametrize(
    "code",
    [
        # getpid of x86-64's second table, and of i386's by its own instruction.
        "libc.syscall(0x40000027)",
        "import mmap; page = mmap.mmap(-1, 4096, prot=7); page.write(bytes.fromhex('b814000000cd80c3'))\n"
        "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()",
    ],
)
def test_calls_by_another_entry_end_the_code(kernel, code):
    with pytest.raises(CodeError, match=r"it was ended by SIG(SYS|SEGV)"):
        python(WITHOUT_HOOK + code)


@pytest.mark.slow
@pytest.mark.parametrize("move", ["", "os.lseek(2, 0, 0); ", "os.ftruncate(2, 0); os.lseek(2, 0, 0); "])
def test_the_words_of_code_are_never_those_of_the_tool(kernel, recwarn, move):
    forged = "not held by the kernel: anything"
    code = f"import os, sys; {move}[os.write(2, b'{forged}\\n') for _ in range(2)]; sys.exit(3)"
    with pytest.raises(CodeError, match=f"^{forged}$"):
        python(code)
    every = f"import os\nfor file in range(64):\n    try: os.lseek(file, 0, 0); os.write(file, b'{forged}\\n')\n"
    assert forged in python(every + "    except OSError: pass")
    assert not [each for each in recwarn if "the kernel" in str(each.message)]


@pytest.mark.slow
def test_files_and_signals_that_code_makes_unusual_are_read(kernel):
    # Only whole pages can be read by such a descriptor, which is the tool's too; some file systems do not have it.
    unusual = "import fcntl, os, sys; print(1, flush=True); sys.stderr.write('why'); sys.stderr.flush()\n"
    unusual += (
        "for file in (1, 2):\n    try: fcntl.fcntl(file, fcntl.F_SETFL, os.O_DIRECT)\n    except OSError: pass\n"
    )
    assert python(unusual) == "1\n"
    with pytest.raises(CodeError, match=r"^why$"):
        python(unusual + "sys.exit(3)")
    assert python_tool.reason_of(-40, "", 1) == "it was ended by signal 40"


def test_code_whose_parent_has_ended_does_not_run(tmp_path):
    command = [sys.executable, "-P", python_tool.CHILD, "5", "512", "1", "0", str(os.getppid())]
    done = subprocess.run(command, input="print('ran')", capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "") and "has ended" in done.stderr


@pytest.mark.slow
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


@pytest.mark.slow
def test_it_is_a_tool():
    tools = ToolBox([python])
    assert tools.schemas[0]["function"]["name"] == "python"
    calls = [{"function": {"name": "python", "arguments": {"code": code}}} for code in ("print(6 * 7)", "1 / 0")]
    (first, has_failed), (second, has_second_failed) = (tools.call(call) for call in calls)
    assert (first["content"], has_failed) == ("42\n", False)
    assert second["content"] == "{'error': 'CodeError: ZeroDivisionError: division by zero'}" and has_second_failed
