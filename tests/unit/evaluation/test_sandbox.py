"""What a program cannot do in the sandbox: each attempt is contained, and counted as a failure."""

import contextlib
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from nemo_opdlm.evaluation.sandbox import Outcome, Sandbox

SANDBOX = Sandbox()
#: The layers of the operating system by themselves.
UNWATCHED = Sandbox(watch=False)
HIDDEN = "try:\n    {}\nexcept BaseException:\n    pass"
FORK_BOMB = "import os\nwhile True:\n    os.fork()"


@pytest.fixture(scope="module")
def layers() -> list[str]:
    return UNWATCHED.layers()


def test_a_program_that_ends_has_passed() -> None:
    program = (
        "import dataclasses, hashlib, math, typing\n@dataclasses.dataclass\nclass A:\n    x: int = 1\nassert A().x == 1"
    )
    assert SANDBOX.run(program) == Outcome(True, "passed")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2, 'unequal'", "AssertionError: unequal"),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("import os; os._exit(0)", "ended without an answer"),
        ("input()", "EOFError"),
        ("class E(Exception):\n    def __str__(self):\n        raise E\nraise E", "E: "),
        ("print('x' * 10**7); 1 / 0", "ZeroDivisionError"),
        ("import os; os.abort()", "killed by SIGABRT"),
        ("import nemo_opdlm", "ModuleNotFoundError"),
    ],
)
def test_a_program_that_does_not_reach_its_end_has_failed(program: str, reason: str) -> None:
    outcome = SANDBOX.run(program)
    assert not outcome.passed and outcome.reason.startswith(reason)


def test_loops_and_sleeps_end_at_the_time_limit() -> None:
    start = time.monotonic()
    programs = ["while True: pass", "import time; time.sleep(60)", HIDDEN.format("while True: pass")]
    outcomes = Sandbox(timeout_s=0.5).run_all(programs, num_workers=3)
    assert outcomes == [Outcome(False, "timed out")] * 3
    assert time.monotonic() - start < 10


def test_a_memory_bomb_meets_its_limit() -> None:
    outcome = Sandbox(timeout_s=10).run("x = []\nwhile True: x.append(bytearray(10**8))")
    assert outcome == Outcome(False, "MemoryError: ")


@pytest.mark.parametrize("program", [FORK_BOMB, HIDDEN.format("import subprocess; subprocess.run(['true'])")])
def test_no_process_is_started_even_where_the_error_is_hidden(program: str) -> None:
    assert SANDBOX.run(program).reason.startswith("forbidden: ")


def test_the_limit_on_processes_holds_by_itself() -> None:
    for program in (FORK_BOMB, "import threading; threading.Thread(target=print).start()"):
        outcome = UNWATCHED.run(program)
        assert not outcome.passed and outcome.reason.startswith(
            ("BlockingIOError", "RuntimeError: can't start new thread")
        )


def _destructive(victim: Path) -> list[str]:
    new = victim.with_name("new")
    return [
        f"open({str(victim)!r}, 'w')",
        f"open({str(victim)!r}, 'a').write('x')",
        f"import os; os.remove({str(victim)!r})",
        f"import os; os.mkdir({str(new)!r})",
        f"import os; os.rename({str(victim)!r}, {str(new)!r})",
        "open('in_its_own_folder', 'w').write('x')",
    ]


def test_no_file_is_written_or_removed(tmp_path: Path) -> None:
    victim = _open_to_everybody(tmp_path)
    for program in _destructive(victim):
        for attempt in (program, HIDDEN.format(program)):
            assert SANDBOX.run(attempt).reason.startswith("forbidden: "), attempt
    assert victim.read_text() == "precious" and list(victim.parent.iterdir()) == [victim]


def test_the_kernel_keeps_files_by_itself(tmp_path: Path, layers: list[str]) -> None:
    if "Landlock" not in layers:
        pytest.skip("this kernel, or container, has no Landlock")
    victim = _open_to_everybody(tmp_path)
    for program in _destructive(victim):
        assert UNWATCHED.run(program).reason.startswith("PermissionError"), program
    assert victim.read_text() == "precious" and list(victim.parent.iterdir()) == [victim]


def _open_to_everybody(folder: Path) -> Path:
    """A file that only the sandbox keeps from being changed."""
    victim = folder / "open" / "victim"
    victim.parent.mkdir()
    victim.write_text("precious")
    victim.chmod(0o777)
    victim.parent.chmod(0o777)
    for above in victim.parents:
        if above.stat().st_uid == os.getuid():
            above.chmod(above.stat().st_mode | 0o011)
    return victim


def test_the_network_is_out_of_reach(layers: list[str]) -> None:
    calls: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)

        def accept() -> None:
            with contextlib.suppress(TimeoutError):
                calls.append(server.accept())

        listener = threading.Thread(target=accept)
        listener.start()
        call = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)"
        assert SANDBOX.run(HIDDEN.format(call)).reason.startswith("forbidden: socket.")
        if {"namespaces", "Landlock"} & set(layers):
            assert not UNWATCHED.run(call).passed
        listener.join()
    assert calls == []


def test_udp_has_no_way_out_either(layers: list[str]) -> None:
    send = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))"
    assert SANDBOX.run(send).reason.startswith("forbidden: socket.")
    if "namespaces" in layers:
        assert UNWATCHED.run(send).reason.startswith("OSError")


def test_the_program_inherits_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "42")
    assert SANDBOX.run("import os; assert 'SECRET' not in os.environ and os.listdir('.') == []").passed


def test_the_harness_cannot_be_signalled() -> None:
    assert SANDBOX.run(HIDDEN.format("import os; os.kill(os.getppid(), 9)")).reason == "forbidden: os.kill"


def test_limits_cannot_be_raised_again() -> None:
    program = "import resource; resource.setrlimit(resource.RLIMIT_NPROC, (9, 9))"
    assert UNWATCHED.run(program).reason.startswith("ValueError")
