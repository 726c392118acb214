"""A Python that runs the code of its standard input within limits, started by `python_tool`. Standard library only.

Usage: python -I limited_python.py SECONDS MEGABYTES FILE_MEGABYTES VERDICT PARENT, in the only folder writable for the
code. VERDICT is the number of an open file: its first line lists the limits not held by the kernel, if any, and it is
closed before the code runs, so the code cannot write it. PARENT is a process: this one ends together with it.

On Linux the kernel holds the limits: resource limits, Landlock for files, a seccomp filter for network, processes and
signals. Elsewhere, and on kernels without one of these, only the interpreter's audit hook is left; it stops code that
does not try to get around it.
"""

import ctypes
import math
import os
import platform
import resource
import struct
import sys

MEGABYTE = 2**20
# From the kernel's headers; unlisted calls have the same number everywhere.
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# Refused: network, processes and signals; changes to the priority or the cores of other processes, things they share
# or leave behind (shared memory, semaphores, queues, keys), and watching their files; cutting files by name, allowed
# by Landlock before Linux 6.2.
REFUSED = {
    "x86_64": (
        # socket, socketpair, clone, fork, vfork, execve, kill, ptrace, rt_sigqueueinfo, tkill, tgkill,
        *(41, 53, 56, 57, 58, 59, 62, 101, 129, 200, 234),
        # rt_tgsigqueueinfo, prlimit64, setns, unshare, process_vm_readv and _writev, kcmp, execveat
        *(297, 302, 308, 272, 310, 311, 312, 322),
        # setpriority, sched_setparam, _setscheduler, _setaffinity and _setattr, ioprio_set, migrate_pages, move_pages
        *(141, 142, 144, 203, 314, 251, 256, 279),
        # shmget, shmat, shmctl, semget, msgget, mq_open, add_key, request_key, keyctl
        *(29, 30, 31, 64, 68, 240, 248, 249, 250),
        # semop, semctl, semtimedop, msgsnd, msgrcv, msgctl
        *(65, 66, 220, 69, 70, 71),
        # mq_unlink, mq_timedsend, mq_timedreceive, mq_notify, mq_getsetattr
        *(241, 242, 243, 244, 245),
        # inotify_init1, inotify_add_watch, fanotify_init, fanotify_mark; io_setup, from the share of all processes
        *(294, 254, 300, 301, 206),
        # truncate, syslog, perf_event_open, bpf, userfaultfd
        *(76, 103, 298, 321, 323),
        # inotify_init
        253,
    ),
    # The same, without fork, vfork and inotify_init, absent on arm64.
    "aarch64": (
        *(198, 199, 220, 221, 129, 117, 138, 130, 131, 240, 261, 268, 97, 270, 271, 272, 281),
        *(140, 118, 119, 122, 274, 30, 238, 239, 194, 196, 195, 190, 186, 180, 217, 218, 219),
        *(193, 191, 192, 189, 188, 187, 181, 182, 183, 184, 185, 26, 27, 262, 263, 0, 45, 116, 241, 280, 282),
    ),
}
# pidfd_send_signal, io_uring_setup, pidfd_open, clone3, pidfd_getfd, process_madvise, process_mrelease
NEW_REFUSED = (424, 425, 434, 435, 438, 440, 448)
# Without effect: rights, owners, times and attributes of files, which Landlock lets anyone change, and locks, which
# hold up others. Code copying or unpacking files in its folder sets them too, so the calls report success.
IGNORED = {
    # chmod, fchmod, chown, fchown, lchown, utime, setxattr, l-, f-, removexattr, l-, f-, utimes, fchownat, futimesat,
    # fchmodat, utimensat, flock
    "x86_64": (90, 91, 92, 93, 94, 132, 188, 189, 190, 197, 198, 199, 235, 260, 261, 268, 280, 73),
    "aarch64": (52, 53, 54, 55, 88, 5, 6, 7, 14, 15, 16, 32),
}
# fchmodat2, setxattrat, removexattrat, file_setattr
NEW_IGNORED = (452, 463, 466, 469)
# Calls with an operation given by one argument, of 32 bits.
FCNTL, IOCTL, PRCTL = {"x86_64": 72, "aarch64": 25}, {"x86_64": 16, "aarch64": 29}, {"x86_64": 157, "aarch64": 167}
# F_SETOWN and F_SETOWN_EX (the kernel signals to the named process); F_SETLEASE, F_NOTIFY, F_SETDELEG (who
# opens or changes a file is held up or told of); F_SET_RW_HINT (an attribute of the file)
FCNTL_REFUSED = (8, 15, 1024, 1026, 1040, 1036)
# F_SETLK, F_SETLKW, F_OFD_SETLK, F_OFD_SETLKW
FCNTL_IGNORED = (6, 7, 37, 38)
# Nothing else: TCGETS and TCGETS2 (`isatty`), TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
IOCTL_ALLOWED = (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
# Nothing else: PR_SET_NAME, PR_GET_NAME
PRCTL_ALLOWED = (15, 16)
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
# execute, read file, read folder; for a file without the last; for a folder with only its names needed
READ, READ_FILE, READ_NAMES = 0b1101, 0b101, 0b1000
SET_PARENT_DEATH_SIGNAL, SET_SECCOMP, SET_NO_NEW_PRIVILEGES = 1, 22, 38

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("remove", "rename", "rmdir", "mkdir", "link", "symlink", "chmod", "chown", "truncate", "utime")
FORBIDDEN = ("fork", "forkpty", "exec", "posix_spawn", "spawn", "system", "startfile", "kill", "killpg")


def limit_resources(seconds: float, megabytes: int, file_megabytes: int) -> None:
    """Limit CPU-seconds, memory, the size of every file, and the numbers of open files and of processes."""
    for name, value in (
        ("CPU", math.ceil(seconds) + 1),
        ("AS", megabytes * MEGABYTE),
        ("FSIZE", file_megabytes * MEGABYTE),
        ("NOFILE", 64),
        ("NPROC", 0),
        ("CORE", 0),
    ):
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is not None:
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))


def drop_privileges(libc: ctypes.CDLL) -> None:
    """Give up the rights of root, and end with the parent process."""
    libc.prctl(SET_PARENT_DEATH_SIGNAL, 9, 0, 0, 0)
    libc.prctl(SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    libc.capset(header, nothing)


def readable_places() -> list[tuple[str, int]]:
    """Return the readable places of Python, with the rights: its own folders, and of others on its path only packages.

    Such another folder belongs to a project installed as editable, where data and keys may lie too.
    """
    own = [sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64"]
    places = [(path, READ) for path in (*own, "/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/urandom")]
    for path in map(os.path.realpath, sys.path):
        if any(os.path.commonpath([path, os.path.realpath(each)]) == os.path.realpath(each) for each in own):
            continue
        if not os.path.isdir(path) or os.path.basename(path) in ("site-packages", "dist-packages"):
            places.append((path, READ))
            continue
        places.append((path, READ_NAMES))
        for entry in os.scandir(path):
            is_package = entry.is_dir() and os.path.exists(os.path.join(entry.path, "__init__.py"))
            if is_package or entry.name.endswith((".py", ".so", "-info")):
                places.append((entry.path, READ))
    return places


def close_files(libc: ctypes.CDLL) -> bool:
    """Leave Python's own files to read, and the working folder to write to (Landlock, from Linux 5.13 on).

    Returns whether the kernel does so.
    """
    version = libc.syscall(LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return False
    everything = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    rules = libc.syscall(LANDLOCK_CREATE, struct.pack("Q", everything), 8, 0)
    for path, access in [*readable_places(), (os.getcwd(), everything)]:
        if os.path.exists(path):
            access = access if os.path.isdir(path) else READ_FILE
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            libc.syscall(LANDLOCK_ADD, rules, 1, struct.pack("=Qi", access, descriptor), 0)
            os.close(descriptor)
    has_closed = libc.syscall(LANDLOCK_RESTRICT, rules, 0) == 0
    os.close(rules)
    return has_closed


def system_filter(machine: str) -> list[tuple[int, int, int, int]]:
    """Return the filter of system calls for a key of `ARCHITECTURES`, as classic BPF: rows of (code, jt, jf, k)."""
    load, equal, at_least, give, allow, refuse, kill = 0x20, 0x15, 0x35, 0x06, 0x7FFF0000, 0x00050001, 0x80000000
    # An error of number 0 is success.
    ignore = 0x00050000
    program = [(load, 0, 0, 4), (equal, 1, 0, ARCHITECTURES[machine]), (give, 0, 0, kill), (load, 0, 0, 0)]
    # The calls of x86-64's second table.
    program += [(at_least, 0, 1, 0x40000000), (give, 0, 0, kill)] if machine == "x86_64" else []

    def answers(*pairs: tuple[tuple[int, ...], int]) -> list[tuple[int, int, int, int]]:
        each = [(value, answer) for values, answer in pairs for value in values]
        return [step for value, answer in each for step in ((equal, 0, 1, value), (give, 0, 0, answer))]

    program += answers(((*REFUSED[machine], *NEW_REFUSED), refuse), ((*IGNORED[machine], *NEW_IGNORED), ignore))
    for number, argument, pairs, otherwise in (
        (FCNTL[machine], 1, ((FCNTL_REFUSED, refuse), (FCNTL_IGNORED, ignore)), allow),
        (IOCTL[machine], 1, ((IOCTL_ALLOWED, allow),), refuse),
        (PRCTL[machine], 0, ((PRCTL_ALLOWED, allow),), refuse),
    ):
        # Arguments are 64 bits from byte 16 on. The kernel ignores the high half of these, so the filter does too.
        steps = [(load, 0, 0, 16 + 8 * argument), *answers(*pairs), (give, 0, 0, otherwise)]
        program += [(equal, 0, len(steps), number), *steps]
    return [*program, (give, 0, 0, allow)]


def close_system(libc: ctypes.CDLL) -> bool:
    """Refuse network, processes, other programs, and all else with effect on other processes (seccomp).

    Returns whether the kernel does so.
    """
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        return False
    program = system_filter(machine)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in program))
    return libc.prctl(SET_SECCOMP, 2, struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)), 0, 0) == 0


def forbid() -> None:
    """Let the interpreter refuse the same, with words about the refused action."""
    folder = os.path.realpath(os.getcwd())

    def is_outside(path: object) -> bool:
        if not isinstance(path, str | bytes):
            return False
        return os.path.commonpath([folder, os.path.realpath(os.fsdecode(path))]) != folder

    def hook(event: str, args: tuple) -> None:
        room, _, name = event.partition(".")
        if room in ("socket", "subprocess") or (room == "os" and name in FORBIDDEN):
            raise PermissionError(f"{event} is not allowed here")
        is_writing = event == "open" and isinstance(args[2], int) and args[2] & WRITING
        paths = args[:1] if is_writing else args if room == "os" and name in CHANGES else ()
        if any(map(is_outside, paths)):
            raise PermissionError("files outside of the working folder cannot be changed here")

    sys.addaudithook(hook)


def main(seconds: str, megabytes: str, file_megabytes: str, verdict: str, parent: str) -> None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc:
        drop_privileges(libc)
    # A parent that ended earlier could not be noticed any more, and may have left half of the code.
    if os.getppid() != int(parent):
        sys.exit("the process that started this one has ended")
    code = sys.stdin.read()
    limit_resources(float(seconds), int(megabytes), int(file_megabytes))
    missing = ["files", "network and processes"]
    if libc:
        missing = [name for name, close in zip(missing, (close_files, close_system), strict=True) if not close(libc)]
    with open(int(verdict), "w") as file:
        print(" and ".join(missing), file=file)
    forbid()
    sys.argv = [""]
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main(*sys.argv[1:])
