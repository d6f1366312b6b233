"""Task files, and when an answer is right."""

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_opdlm.evaluation.questions import ChoiceQuestion, OpenQuestion, read_questions
from nemo_opdlm.evaluation.tasks import is_right

QUESTIONS = Path(__file__).resolve().parents[3] / "examples" / "questions"


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_examples_are_read() -> None:
    choices, sums = read_questions(QUESTIONS / "choices.jsonl"), read_questions(QUESTIONS / "sums.jsonl")
    assert len(choices) == 8 and choices[0] == ChoiceQuestion(
        "Which of these is an animal?", ("a stone", "a horse", "a spoon", "a cloud"), 1
    )
    assert [question.answer for question in sums if isinstance(question, OpenQuestion)] == [
        "7",
        "60",
        "4",
        "42",
        "2",
        "36",
    ]


def test_arcs_own_rows_are_read(tmp_path: Path) -> None:
    row = {"question": "Q?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B", "id": "Mercury_1"}
    assert read_questions(write(tmp_path / "arc.jsonl", row)) == [ChoiceQuestion("Q?", ("x", "y"), 1)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "questions.jsonl holds no questions"),
        ([["no object"]], "questions.jsonl:1: a row must be a JSON object, got list"),
        ([{"answer": "1"}], "questions.jsonl:1: 'question' must be a text that is not empty, got None"),
        ([{"question": "Q?", "answer": 3}], "'answer' must be a text"),
        ([{"question": "Q?", "choices": ["x"], "answer": 0}], "'choices' must be at least two texts"),
        ([{"question": "Q?", "choices": ["x", " "], "answer": 0}], "'choices' must be at least two texts"),
        ([{"question": "Q?", "choices": ["x", "y"], "answer": 2}], "the answer must be one of the 2 choices, got 2"),
        (
            [{"question": "Q?", "choices": ["x", "y"], "answer": True}],
            "the answer must be one of the 2 choices, got True",
        ),
        ([{"question": "Q?", "choices": "xy", "answer": 0}], "'choices' must be a list of texts"),
        ([{"question": "Q?", "choices": {"text": ["x"], "label": ["A"]}, "answerKey": "C"}], "'answerKey' 'C' must be"),
        (
            [{"question": "Q?", "choices": ["x", "y"], "answer": 0}, {"question": "Q?", "answer": "1"}],
            "1 rows have choices, 1 have none; split the file",
        ),
    ],
)
def test_malformed_files_are_refused_by_name(rows: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        read_questions(write(tmp_path / "questions.jsonl", *rows))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl is no file of questions"):
        read_questions(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize(
    ("written", "expected", "right"),
    [
        ("3 + 4 = 7, so she has 7 apples.", "7", True),
        ("7 or 8", "7", False),
        ("It costs $1,234.50", "1234.5", True),
        ("minus: -5", "-5", True),
        ("none", "7", False),
        (" Paris. ", "paris", True),
        ("Paris, in France", "Paris", False),
        ("100", "1,00", True),
    ],
)
def test_the_last_number_or_the_whole_text_is_the_answer(written: str, expected: str, right: bool) -> None:
    assert is_right(written, expected) is right
