"""The inside of the sandbox (``sandbox.py``): give up every right there is, then run the program read from standard input.

Started by its path in an isolated interpreter, so it imports the standard library alone. Its answer is one JSON object.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import types
from collections.abc import Callable
from typing import Any

_NOBODY = 65534
_MAX_DETAIL = 200  # characters of an error message

# linux/sched.h, linux/prctl.h, linux/capability.h
_CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWNET = 0x08000000, 0x10000000, 0x40000000
_PR_SET_KEEPCAPS, _PR_SET_NO_NEW_PRIVS = 8, 38
_CAPABILITY_VERSION_3, _CAP_DAC_READ_SEARCH = 0x20080522, 2
# linux/landlock.h: the system calls have these numbers on every architecture.
_LANDLOCK_CREATE_RULESET, _LANDLOCK_RESTRICT_SELF = 444, 446
_LANDLOCK_VERSION_FLAG = 1
#: First ABI -> file rights it knows: everything but to read files and folders, and to control devices.
_FILE_RIGHTS = {1: 0b1_1111_1111_0011, 2: 1 << 13, 3: 1 << 14}
_TCP_SINCE, _BIND_AND_CONNECT = 4, 0b11
_SCOPES_SINCE, _UNIX_SOCKETS_AND_SIGNALS = 6, 0b11

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
#: Audit events, by their beginnings, of what no pure function does.
_FORBIDDEN = (
    *("socket.", "subprocess.", "pty.", "ctypes.", "shutil.", "sqlite3.", "mmap.", "resource.", "signal.pthread_kill"),
    *("os.fork", "os.exec", "os.spawn", "os.posix_spawn", "os.system", "os.kill", "os.putenv", "os.unsetenv"),
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.utime"),
    *("os.chmod", "os.chown", "os.chflags", "os.lockf", "os.setxattr", "os.removexattr", "tempfile."),
)

Answer = Callable[..., None]


class _Capabilities(ctypes.Structure):
    _fields_ = [("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32)]


class _Ruleset(ctypes.Structure):
    _fields_ = [("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


def main() -> None:
    """Read ``{"program", "cpu_s", "memory_bytes", "watch"}``, confine this process, run the program and answer."""
    job = json.loads(sys.stdin.buffer.read())
    ready, answer = _only_way_out()
    layers = _confine(int(job["cpu_s"]), int(job["memory_bytes"]))
    if job["watch"]:
        _watch(answer)
        layers.append("audit hook")
    module = types.ModuleType("program")
    sys.modules["program"] = module
    ready()
    try:
        exec(compile(job["program"], "<program>", "exec"), module.__dict__)
    except BaseException as error:  # SystemExit too: a program that leaves early has not passed its tests
        answer(passed=False, reason=f"{type(error).__name__}: {_message(error)}", layers=layers)
    answer(passed=True, reason="passed", layers=layers)


def _only_way_out() -> tuple[Callable[[], None], Answer]:
    """Cut off the standard streams; what is returned says that the program begins, and sends the answer and ends the process."""
    # Bound here: the program may replace names of modules.
    write, leave, dumps, channel = os.write, os._exit, json.dumps, os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)

    def ready() -> None:
        write(channel, b" ")  # which JSON passes over

    def answer(**values: Any) -> None:
        write(channel, dumps(values).encode())
        leave(0)

    return ready, answer


def _message(error: BaseException) -> str:
    try:
        return str(error)[:_MAX_DETAIL]
    except BaseException:  # written by the program, too
        return ""


def _watch(answer: Answer) -> None:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(_FORBIDDEN) or (event == "open" and (arguments[2] or 0) & _WRITING):
            target = f" {str(arguments[0])[:_MAX_DETAIL]!r}" if event == "open" else ""
            answer(passed=False, reason=f"forbidden: {event}{target}", layers=[])

    sys.addaudithook(hook)


def _confine(cpu_s: int, memory_bytes: int) -> list[str]:
    """Everything the operating system has for this user; returns the names of what it had."""
    libc = ctypes.CDLL(None, use_errno=True)
    layers = ["namespaces"] if _leave_the_network(libc) else []
    # Needed by Landlock, and a set-user-id program would not help either.
    no_new_privileges = hasattr(libc, "prctl") and libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    if no_new_privileges:
        layers += _restrict_by_landlock(libc)
        _drop_privileges(libc)
    # Past the first CPU limit there is a signal that tells, past the second one that does not.
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 32,
        resource.RLIMIT_NPROC: 0,  # neither processes nor threads
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # die of it, where Python would only raise an error
    return [*layers, "resource limits"]


def _leave_the_network(libc: ctypes.CDLL) -> bool:
    """Into namespaces of its own, without a network device that is up."""
    if not hasattr(libc, "unshare"):
        return False
    # In a new user namespace, root would lose the right to become somebody else.
    as_user = 0 if os.getuid() == 0 else _CLONE_NEWUSER
    return bool(libc.unshare(as_user | _CLONE_NEWNET | _CLONE_NEWIPC) == 0)


def _restrict_by_landlock(libc: ctypes.CDLL) -> list[str]:
    """No file or folder may be made, changed, removed or executed; no TCP; no signals to others."""
    abi = libc.syscall(_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_VERSION_FLAG)
    if abi < 1:
        return []
    rules = _Ruleset(
        sum(rights for since, rights in _FILE_RIGHTS.items() if abi >= since),
        _BIND_AND_CONNECT * (abi >= _TCP_SINCE),
        _UNIX_SOCKETS_AND_SIGNALS * (abi >= _SCOPES_SINCE),
    )
    known_bytes = 8 * (1 + (abi >= _TCP_SINCE) + (abi >= _SCOPES_SINCE))
    ruleset = libc.syscall(_LANDLOCK_CREATE_RULESET, ctypes.byref(rules), ctypes.c_size_t(known_bytes), 0)
    if ruleset < 0:
        return []
    is_restricted = libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return ["Landlock"] if is_restricted else []


def _drop_privileges(libc: ctypes.CDLL) -> None:
    """Root becomes nobody, as no limit on processes holds for root, and keeps the right to read the standard library."""
    kept = 0
    if os.getuid() == 0:
        libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0)
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        kept = 1 << _CAP_DAC_READ_SEARCH
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    # Without that right among them, as in many containers, everything goes.
    if libc.capset(header, (_Capabilities * 2)(_Capabilities(kept, kept, 0))) != 0 and kept:
        libc.capset(header, (_Capabilities * 2)())


if __name__ == "__main__":
    main()
