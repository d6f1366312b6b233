"""Tasks with answers: questions with choices, questions with a final answer, and programs."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nemo_opdlm.data.encoding import resolve_chat_template
from nemo_opdlm.data.rows import PromptRow
from nemo_opdlm.diffusion.trajectory import FinishReason, Trajectory
from nemo_opdlm.evaluation.human_eval import OPENING, Problem
from nemo_opdlm.evaluation.likelihood import Text
from nemo_opdlm.evaluation.questions import ChoiceQuestion, OpenQuestion
from nemo_opdlm.evaluation.sandbox import Sandbox
from nemo_opdlm.evaluation.scorer import OnProgress, Scorer

_ASK = "Question: {question}\nAnswer:"
_NEXT_QUESTION = "\nQuestion:"
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class TaskResult:
    """How a model did.

    Attributes:
        metric: what `value` is.
        value: share of questions, from 0 to 1.
        standard_error: of `value`, as a sample of questions like these; None of a single one.
        num_questions: how many there were.
        tokens_per_forward: of what was written; None where nothing was.
        details: further figures by name.
    """

    metric: str
    value: float
    standard_error: float | None
    num_questions: int
    tokens_per_forward: float | None
    details: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def choose(scorer: Scorer, questions: Sequence[ChoiceQuestion]) -> TaskResult:
    """Take the choice with the highest log-likelihood behind the question, as raw text; `accuracy_norm`: per character."""
    asked = [_ASK.format(question=question.text) for question in questions for _ in question.choices]
    answers = [choice for question in questions for choice in question.choices]
    given = scorer.generator.encode([_row(text) for text in asked], False)
    whole = scorer.generator.encode(
        [_row(f"{text} {choice}") for text, choice in zip(asked, answers, strict=True)], False
    )
    texts = [Text(start, ids[len(start) :], i) for i, (start, ids) in enumerate(zip(given, whole, strict=True))]
    likelihood = scorer.log_likelihood(texts)
    totals = likelihood.total.split([len(question.choices) for question in questions])
    right = [int(total.argmax()) == question.answer for total, question in zip(totals, questions, strict=True)]
    right_norm = [
        int((total / total.new_tensor([len(choice) for choice in question.choices])).argmax()) == question.answer
        for total, question in zip(totals, questions, strict=True)
    ]
    details = {"accuracy_norm": sum(right_norm) / len(right_norm)}
    if bool((likelihood.standard_error > 0).any()):
        details["log_likelihood_standard_error"] = float(likelihood.standard_error.mean())
    return _result("accuracy", right, None, details)


def answer(scorer: Scorer, questions: Sequence[OpenQuestion], on_progress: OnProgress | None = None) -> TaskResult:
    """Write an answer; right where its last number, or without numbers all of it, is the expected one."""
    generator, chat_template = scorer.generator, scorer.config.chat_template
    templated = resolve_chat_template(chat_template, generator.tokenizer)
    texts = [question.text if templated else _ASK.format(question=question.text) for question in questions]
    trajectory = scorer.write(generator.encode([_row(text) for text in texts], templated), on_progress=on_progress)
    written = [text.partition(_NEXT_QUESTION)[0] for text in generator.continuations(trajectory)]
    right = [is_right(text, question.answer) for text, question in zip(written, questions, strict=True)]
    return _result("exact match", right, trajectory, {})


def is_right(written: str, expected: str) -> bool:
    """Whether a written answer ends in the expected number, or is the expected text."""
    wanted = _NUMBER.fullmatch(expected.strip().lstrip("$"))
    if wanted is None:
        return _plain(written) == _plain(expected)
    found = _NUMBER.findall(written)
    return bool(found) and _number(found[-1]) == _number(wanted[0])


def complete(
    scorer: Scorer, problems: Sequence[Problem], sandbox: Sandbox, on_progress: OnProgress | None = None
) -> TaskResult:
    """Complete each function, a chat model by an answer, and run its tests in the sandbox; `pass@1` of one greedy try."""
    generator = scorer.generator
    templated = resolve_chat_template(scorer.config.chat_template, generator.tokenizer)
    rows = [_row(problem.request if templated else problem.prompt) for problem in problems]
    openings = [OPENING] * len(problems) if templated else None
    trajectory = scorer.write(generator.encode(rows, templated, openings), on_progress=on_progress)
    texts = generator.continuations(trajectory)
    programs = [problem.program(text, is_answer=templated) for problem, text in zip(problems, texts, strict=True)]
    outcomes = sandbox.run_all(programs)
    details = {
        name: sum(outcome.reason.startswith(reason) for outcome in outcomes) / len(outcomes)
        for name, reason in (("timed_out", "timed out"), ("forbidden", "forbidden"))
    }
    return _result("pass@1", [outcome.passed for outcome in outcomes], trajectory, details)


def _row(text: str) -> PromptRow:
    where = f"question {text[:40]!r}"
    return PromptRow(where=where, row_id="", text=text, messages=None, domain=None)


def _result(metric: str, right: list[bool], trajectory: Trajectory | None, details: dict[str, float]) -> TaskResult:
    share, count = sum(right) / len(right), len(right)
    error = (share * (1 - share) / (count - 1)) ** 0.5 if count > 1 else None
    if trajectory is None:
        return TaskResult(metric, share, error, count, None, details)
    cut = float((trajectory.finish_reason == FinishReason.LENGTH).float().mean())
    speed = int(trajectory.response_len.sum()) / int(trajectory.num_forwards.sum())
    return TaskResult(metric, share, error, count, speed, {**details, "cut_by_length": cut})


def _plain(text: str) -> str:
    return text.strip().rstrip(".").casefold()


def _number(text: str) -> float:
    return float(text.replace(",", ""))
