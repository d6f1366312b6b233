"""Questions from local jsonl files: with choices as in ARC, or with a final answer as in GSM8K."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_opdlm.data.rows import read_jsonl

_FINAL_ANSWER = "####"  # GSM8K: the solution, then this, then the answer


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question whose answer is one of several texts.

    Attributes:
        text: the question.
        choices: the texts.
        answer: number of the right one, from 0.
    """

    text: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class OpenQuestion:
    """A question whose answer is written.

    Attributes:
        text: the question.
        answer: the final answer, a number or a short text.
    """

    text: str
    answer: str


def read_questions(path: str | Path) -> list[ChoiceQuestion] | list[OpenQuestion]:
    """Read a file of questions, all of one kind.

    Rows are `{"question", "choices": [...], "answer": number}`, ARC's `{"question", "choices": {"text", "label"},
    "answerKey"}`, or `{"question", "answer"}` with the answer behind `####` where a solution stands before it.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: it holds no question, or a row is malformed; one line naming file and row.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is no file of questions")
    rows = [_question(where, row) for where, _, row in read_jsonl(Path(path))]
    choices = [row for row in rows if isinstance(row, ChoiceQuestion)]
    open_questions = [row for row in rows if isinstance(row, OpenQuestion)]
    if not rows:
        raise ValueError(f"{path} holds no questions")
    if choices and open_questions:
        raise ValueError(f"{path}: {len(choices)} rows have choices, {len(open_questions)} have none; split the file")
    return choices or open_questions


def _question(where: str, row: Any) -> ChoiceQuestion | OpenQuestion:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: a row must be a JSON object, got {type(row).__name__}")
    text = _text(where, row, "question")
    if "choices" not in row:
        return OpenQuestion(text, _text(where, row, "answer").rpartition(_FINAL_ANSWER)[2].strip())
    choices, answer = _choices(where, row)
    if len(choices) < 2 or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise ValueError(f"{where}: 'choices' must be at least two texts, got {choices!r}")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"{where}: the answer must be one of the {len(choices)} choices, got {answer!r}")
    return ChoiceQuestion(text, tuple(choices), answer)


def _choices(where: str, row: Mapping[str, Any]) -> tuple[list[Any], Any]:
    """The texts and the number of the answer, of either form."""
    choices = row["choices"]
    if isinstance(choices, list):
        return choices, row.get("answer")
    if not isinstance(choices, Mapping) or not all(isinstance(choices.get(key), list) for key in ("text", "label")):
        raise ValueError(f"{where}: 'choices' must be a list of texts, or lists 'text' and 'label', got {choices!r}")
    labels, key = choices["label"], row.get("answerKey")
    if key not in labels or len(labels) != len(choices["text"]):
        raise ValueError(f"{where}: 'answerKey' {key!r} must be one of the labels {labels}, one for each text")
    return choices["text"], labels.index(key)


def _text(where: str, row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {key!r} must be a text that is not empty, got {value!r}")
    return value
