"""Feeds readers with strange inputs: what a reader does not read it refuses in one line of its own, and leaves nothing behind."""

import base64
import hashlib
import json
import linecache
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

import nemo_opdlm

_PACKAGE = Path(nemo_opdlm.__file__).parent
_INPUTS_PER_ROUND = 50
#: CPU seconds that one input may take.
_PATIENCE = 20
_LONGEST_MESSAGE = 2000
_FRAMES = 10
SETTINGS = settings(
    max_examples=_INPUTS_PER_ROUND,
    database=None,
    deadline=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)


@dataclass(frozen=True)
class Case:
    """One input: a file of whatever a reader reads, by its name there, with this content."""

    file: str
    content: bytes

    def __repr__(self) -> str:
        return f"Case({self.file!r}, {self.content[:300]!r}{'...' if len(self.content) > 300 else ''})"


@dataclass(frozen=True)
class Reader:
    """What is fuzzed.

    Attributes:
        name: of the reader.
        cases: strategy of its inputs.
        read: reads one; returns the line of a refusal that is no exception.
        names: what a refusal has to name.
        share: of all inputs of a whole run.
    """

    name: str
    cases: SearchStrategy[Case]
    read: Callable[[Case], str | None]
    names: Callable[[Case], str]
    share: float


class Foreign(AssertionError):
    """A reader let an exception out that is not its own.

    Args:
        error: the exception.
        what: is wrong with it.
    """

    def __init__(self, error: BaseException, what: str) -> None:
        trace = traceback.extract_tb(error.__traceback__)
        #: Where the package was left, or the error raised: one bug has one place.
        self.place = next(
            (f"{f.filename}:{f.lineno}" for f in reversed(trace) if _PACKAGE in Path(f.filename).parents), "?"
        )
        shown = "".join(traceback.format_exception(error, chain=False)[-_FRAMES:])
        super().__init__(f"{what}\n{shown[-_LONGEST_MESSAGE:]}")


class _TookTooLong(BaseException):
    """Beyond `except Exception` of what it interrupts."""


@dataclass
class Tally:
    """What became of the inputs.

    Attributes:
        outcomes: `read` and `refused` -> how many.
        messages: first words of refusals -> how many.
        seconds: of wall clock.
        failures: place of a bug -> the smallest input that was seen to lead there, and what happened.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    failures: dict[str, tuple[Case, Foreign]] = field(default_factory=dict)


def attempt(reader: Reader, case: Case) -> tuple[str, str]:
    """Whether a reader reads or refuses an input, and how it puts it.

    Raises:
        Foreign: neither, or not in one line that names the file.
    """
    previous = signal.signal(signal.SIGVTALRM, _stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, _PATIENCE)
    try:
        refusal = reader.read(case)
    except (ValueError, OSError) as error:
        return "refused", _message(error, reader.names(case))
    except _TookTooLong as error:
        raise Foreign(error, f"more than {_PATIENCE} s") from None
    except Exception as error:
        raise Foreign(error, "a foreign exception") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of the Rust libraries, and beyond `except Exception`
            raise
        raise Foreign(error, "a panic") from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)
    return ("read", "") if refusal is None else ("refused", refusal)


def _stop(number: int, frame: FrameType | None) -> None:
    raise _TookTooLong


def _message(error: Exception, names: str) -> str:
    """The message of a refusal, as long as the command line would print it as one line rather than a traceback."""
    trace = error.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    text, file = str(error), trace.tb_frame.f_code.co_filename
    # A function written in C has no frame: there, what raises is the line that calls it.
    if _PACKAGE not in Path(file).parents or not linecache.getline(file, trace.tb_lineno).lstrip().startswith("raise"):
        raise Foreign(error, "raised elsewhere")
    if len(text.splitlines()) != 1 or len(text) > _LONGEST_MESSAGE or names not in text:
        raise Foreign(error, f"not one line of at most {_LONGEST_MESSAGE} characters that names {names!r}")
    return text


def fuzz(reader: Reader, seed: int, inputs: int, seconds: float) -> Tally:
    """Feed a reader until it has had so many inputs, or the time is up.

    Args:
        reader: what is fuzzed.
        seed: of the first of the rounds that inputs are drawn in.
        inputs: how many at least; a round is finished.
        seconds: how long at most; a round is finished.
    """
    tally, start = Tally(), time.monotonic()

    def one(case: Case) -> None:
        try:
            outcome, message = attempt(reader, case)
        except Foreign as failure:
            tally.outcomes["failed"] += 1
            known = tally.failures.get(failure.place)
            if known is None or len(case.content) < len(known[0].content):
                tally.failures[failure.place] = case, failure
            return
        tally.outcomes[outcome] += 1
        if message:
            tally.messages[message.replace(reader.names(case), "").strip(": ")[:40]] += 1

    while tally.outcomes.total() < inputs and time.monotonic() - start < seconds:
        hypothesis.seed(seed)(SETTINGS(given(reader.cases)(one)))()
        seed += 1
    tally.seconds = time.monotonic() - start
    return tally


def save(reader: Reader, case: Case, folder: Path) -> Path:
    """Keep an input so that `load` finds it again."""
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(case.file.encode() + case.content).hexdigest()[:12]
    path = folder / f"{reader.name}-{digest}.json"
    content = base64.b64encode(case.content).decode()
    path.write_text(json.dumps({"reader": reader.name, "file": case.file, "content": content}, indent=1))
    return path


def load(path: Path) -> tuple[str, Case]:
    """The reader's name and the input that were kept in a file."""
    kept = json.loads(path.read_text())
    return kept["reader"], Case(kept["file"], base64.b64decode(kept["content"]))
