"""The prompt files shipped in the repository keep the promises of their README."""

import re
from pathlib import Path

import pytest

from nemo_opdlm.data.rows import read_rows

PROMPTS = Path(__file__).parents[3] / "examples" / "prompts"
# name -> (rows at least, characters per row: least and most)
FILES = {
    "passages_train": (420, 250, 450),
    "passages_heldout": (48, 250, 450),
    "instructions_train": (320, 12, 400),
    "instructions_heldout": (48, 12, 400),
}


def texts(name):
    return [row.text for row in read_rows(PROMPTS / f"{name}.jsonl")]


@pytest.mark.parametrize("name", FILES)
def test_files_are_large_enough_and_rows_have_the_promised_length(name):
    least_rows, shortest, longest = FILES[name]
    rows = texts(name)
    assert len(rows) >= least_rows
    assert [row for row in rows if not shortest <= len(row) <= longest or row != row.strip()] == []


@pytest.mark.parametrize("kind", ["passages", "instructions"])
def test_no_row_repeats_within_or_across_train_and_heldout(kind):
    rows = [re.sub(r"\W+", " ", text).lower() for text in texts(f"{kind}_train") + texts(f"{kind}_heldout")]
    assert len(set(rows)) == len(rows)


def test_no_two_passages_open_alike():
    rows = texts("passages_train") + texts("passages_heldout")
    openings = [" ".join(re.findall(r"[\w’]+", text.lower())[:4]) for text in rows]
    assert len(set(openings)) == len(openings)


def test_passages_use_only_characters_the_tiny_model_knows():
    # glassllm's alphabet has curly quotation marks and no straight one, no capital X, no ellipsis character.
    known = set("ABCDEFGHIJKLMNOPQRSTUVWYZabcdefghijklmnopqrstuvwxyz0123456789 !,-.:;?()“”‘’")
    assert {c for text in texts("passages_train") + texts("passages_heldout") for c in text} <= known


def test_passages_open_and_close_their_quotation_marks_in_turn():
    for text in texts("passages_train") + texts("passages_heldout"):
        assert re.fullmatch("(“”)*", "".join(re.findall("[“”]", text))), text


def test_instructions_are_plain_ascii_and_name_their_domain():
    for name in ("instructions_train", "instructions_heldout"):
        rows = read_rows(PROMPTS / f"{name}.jsonl")
        assert {row.domain for row in rows} == {"chat"}
        assert all(row.text.isascii() for row in rows)
