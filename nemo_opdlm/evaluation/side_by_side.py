"""AR original and student on the same measures and tasks, one column for each mode."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from nemo_opdlm.config.evaluate import HUMAN_EVAL, EvaluateConfig, task_name
from nemo_opdlm.evaluation import tasks
from nemo_opdlm.evaluation.generation import Generator
from nemo_opdlm.evaluation.human_eval import Problem, problems
from nemo_opdlm.evaluation.intrinsic import NUM_ROLLOUTS, HeldoutPrompts, OnWritten
from nemo_opdlm.evaluation.questions import ChoiceQuestion, OpenQuestion, read_questions
from nemo_opdlm.evaluation.sandbox import Sandbox
from nemo_opdlm.evaluation.scorer import OnProgress, Scorer
from nemo_opdlm.evaluation.tasks import TaskResult

#: A progress bar by its title and the most tokens that can come.
Bar = Callable[[str, int], AbstractContextManager[OnProgress]]
Questions = list[ChoiceQuestion] | list[OpenQuestion] | list[Problem]


@dataclass(frozen=True)
class Column:
    """A model in one mode.

    Attributes:
        model: `original` or `student`.
        mode: of decoding.
        likelihood: what its log-likelihoods are.
        figures: intrinsic ones by name (``report.figures.FIGURES``).
        tasks: results by task.
    """

    model: str
    mode: str
    likelihood: str
    figures: dict[str, float]
    tasks: dict[str, TaskResult]

    @property
    def title(self) -> str:
        """Its heading."""
        return f"{self.model}, {self.mode}"


@dataclass(frozen=True)
class SideBySide:
    """Everything that was measured.

    Attributes:
        columns: the original first.
        sandbox: what contained programs; empty where none ran.
        heldout_checksum: equal where two `heldout_kl` may be compared.
    """

    columns: list[Column]
    sandbox: list[str] = field(default_factory=list)
    heldout_checksum: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def evaluate(config: EvaluateConfig, bar: Bar, on_written: OnWritten | None = None) -> SideBySide:
    """Measure all columns.

    Args:
        config: models, prompts and tasks.
        bar: makes progress bars.
        on_written: gets the student's greedy answers to the held-out prompts, in each mode.

    Raises:
        ValueError, OSError: a model, a prompt or a task is refused, before anything is measured where possible; one line.
    """
    questions = {task_name(task): _questions(task, config.num_questions) for task in config.tasks}
    sandbox = Sandbox(config.sandbox.timeout_s, config.sandbox.memory_mib)
    layers = sandbox.layers() if HUMAN_EVAL in config.tasks else []
    student = Generator.load(str(config.model.restore_from_path))
    original = _original(config, student)
    heldout = None
    if config.validation_ds.file_path is not None:
        assert original is not None
        heldout = HeldoutPrompts.build(original, student, config.validation_ds, config.decoding(config.modes[0]))
    columns = [
        _column(name, scorer, heldout, questions, sandbox, bar, on_written)
        for name, scorer in _scorers(config, original, student)
    ]
    return SideBySide(columns, layers, heldout.heldout.checksum if heldout else None)


def _questions(task: str, limit: int | None) -> Questions:
    return problems()[:limit] if task == HUMAN_EVAL else read_questions(task)[:limit]


def _original(config: EvaluateConfig, student: Generator) -> Generator | None:
    path = config.model.kd_teacher_restore_from_path
    if path is None:
        return None
    # Both decode with one set of special tokens, those of the student: an unused token that is its mask stays unwritten.
    original = Generator.load(path)
    if original.network.arch.vocab_size == student.network.arch.vocab_size:
        return replace(original, tokens=student.tokens)
    return original


def _scorers(config: EvaluateConfig, original: Generator | None, student: Generator) -> Iterator[tuple[str, Scorer]]:
    if original is not None:
        yield "original", Scorer(original, config.decoding("autoregressive"), config.num_samples)
    for mode in config.modes:
        yield "student", Scorer(student, config.decoding(mode), config.num_samples)


def _column(
    model: str,
    scorer: Scorer,
    heldout: HeldoutPrompts | None,
    questions: dict[str, Questions],
    sandbox: Sandbox,
    bar: Bar,
    on_written: OnWritten | None,
) -> Column:
    mode, figures = scorer.config.mode, {}
    if heldout is not None:
        num_tokens = NUM_ROLLOUTS * len(heldout.prompts) * heldout.response_length
        measure = heldout.of_original if model == "original" else partial(heldout.of_student, on_written=on_written)
        with bar(f"{model}, {mode}: held-out prompts", num_tokens) as on_progress:
            figures = measure(scorer, on_progress)
    results = {}
    for name, asked in questions.items():
        with bar(f"{model}, {mode}: {name}", len(asked) * scorer.config.max_new_tokens) as on_progress:
            results[name] = _task(scorer, asked, sandbox, on_progress)
    return Column(model, mode, scorer.likelihood, figures, results)


def _task(scorer: Scorer, questions: Questions, sandbox: Sandbox, on_progress: OnProgress) -> TaskResult:
    # A file of questions is of one kind.
    if choices := [question for question in questions if isinstance(question, ChoiceQuestion)]:
        return tasks.choose(scorer, choices)
    if programs := [question for question in questions if isinstance(question, Problem)]:
        return tasks.complete(scorer, programs, sandbox, on_progress)
    return tasks.answer(scorer, [question for question in questions if isinstance(question, OpenQuestion)], on_progress)
