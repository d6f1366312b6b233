"""Programs that a model wrote, run where they can do little harm; nothing runs unless the user has said so.

What holds everywhere: a fresh isolated interpreter without site-packages, in an empty folder that is removed afterwards; no
inherited environment or open file; no output; a session of its own, killed as a group at the time limit; limits on CPU
time, memory, open files, and of zero on processes, threads and written bytes; and an audit hook that ends the program, as a
failure, at the first attempt to write a file, to reach the network, to start or signal a process or to load foreign code,
whether or not the program would have hidden the error.

What holds where Linux has it for this user (`Sandbox.layers` says): Landlock, by which the kernel refuses to change, remove
or execute any file, and TCP connections (Linux 6.7); namespaces without a network; started by root, the program runs as nobody.

What does not hold: the program may *read* what the user may read (root: everything), though it has no way to send it
anywhere. Without Landlock the audit hook alone keeps files from being removed or emptied, and without namespaces it alone
closes the network to UDP; a program that means to can get around a hook. So can one that means to report a success it has
not had. A hole in Python or in the kernel is a hole here. For programs that are hostile rather than wrong, use a virtual
machine.
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_opdlm.config.evaluate import SandboxConfig

_INSIDE = Path(__file__).with_name("sandboxed.py")
_MAX_ANSWER = 1 << 16
_STARTUP_S = 30.0  # of the interpreter, on a busy machine; the program's own time starts behind it
_SILENT = {"passed": False, "reason": "ended without an answer", "layers": []}


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        passed: it ran to its end, within the limits and without an exception.
        reason: `passed`, or what went wrong.
    """

    passed: bool
    reason: str


@dataclass(frozen=True)
class Sandbox:
    """Runs programs; see the module for what it contains.

    Attributes:
        timeout_s: wall-clock and CPU seconds a program may take.
        memory_mib: address space it may use.
        watch: end it at the first forbidden act; only tests of the layers beneath do without.
    """

    timeout_s: float = SandboxConfig.timeout_s
    memory_mib: int = SandboxConfig.memory_mib
    watch: bool = True

    def run(self, program: str) -> Outcome:
        """Run one program; never raises for what the program does."""
        answer = self._answer(program)
        return Outcome(answer["passed"] is True, str(answer["reason"]))

    def run_all(self, programs: Sequence[str], num_workers: int | None = None) -> list[Outcome]:
        """Run programs side by side, by default one for each core this process may use."""
        with ThreadPoolExecutor(num_workers or len(os.sched_getaffinity(0))) as pool:
            return list(pool.map(self.run, programs))

    def layers(self) -> list[str]:
        """What contains a program here.

        Raises:
            OSError: not even an empty program runs.
        """
        answer = self._answer("import math, typing, collections")
        if answer["passed"] is not True:
            raise OSError(f"the sandbox cannot run a program here: {answer['reason']}")
        return list(answer["layers"])

    def _answer(self, program: str) -> dict[str, Any]:
        job = {
            "program": program,
            "cpu_s": int(self.timeout_s) + 1,
            "memory_bytes": self.memory_mib << 20,
            "watch": self.watch,
        }
        with tempfile.TemporaryDirectory(prefix="nemo_opdlm_sandbox_") as folder:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(_INSIDE)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={},
                start_new_session=True,
            )
            try:
                return self._talk(process, json.dumps(job).encode())
            finally:
                # Before it is reaped, so that the number of its group is still its own.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                for stream in (process.stdin, process.stdout):
                    assert stream is not None
                    stream.close()

    def _talk(self, process: "subprocess.Popen[bytes]", job: bytes) -> dict[str, Any]:
        assert process.stdin is not None and process.stdout is not None
        deadline = time.monotonic() + _STARTUP_S
        with suppress(BrokenPipeError):
            process.stdin.write(job)
            process.stdin.close()
        text = b""
        while len(text) < _MAX_ANSWER:
            if not select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return {**_SILENT, "reason": "timed out"}
            part = os.read(process.stdout.fileno(), _MAX_ANSWER)
            if not part:
                break
            if not text:
                deadline = time.monotonic() + self.timeout_s
            text += part
        return _parse(text) or {**_SILENT, "reason": _death(process)}


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        answer = json.loads(text)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) and answer.keys() == _SILENT.keys() else None


def _death(process: "subprocess.Popen[bytes]") -> str:
    with suppress(subprocess.TimeoutExpired):
        code = process.wait(timeout=1)
        if code == -signal.SIGXCPU:
            return "timed out"
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
    return str(_SILENT["reason"])
