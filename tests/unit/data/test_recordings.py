"""Files of recorded responses."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from nemo_opdlm.data.recordings import CalibrationBin, RecordedResponse, Recording, read_recordings, write_recordings

RESPONSE = RecordedResponse(
    prompt="Say it",
    pieces=[" it", "."],
    blocks=[1, 1],
    steps=[2, 1],
    confidences=[0.25, None],
    first_choices=[" it", "!"],
    agrees=[True, False],
    log_probs=[-0.5, None],
    num_forwards=2,
    finish_reason="length",
)
RECORDINGS = [Recording("dynamic", 4, [CalibrationBin(0.2, 0.3, 1, 0.25, 1.0, 0.5)], [RESPONSE])]


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    write_recordings(tmp_path / "recording.json", RECORDINGS)
    assert read_recordings(tmp_path / "recording.json") == RECORDINGS


def changed(**changes: Any) -> str:
    """A file whose only response is another one."""
    recording = {**asdict(RECORDINGS[0]), "responses": [{**asdict(RESPONSE), **changes}]}
    return json.dumps({"recordings": [recording]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", ": invalid JSON"),
        ("[]", ": must be a JSON object, got list"),
        ('{"recordings": 1}', ": recordings=1 must be a list"),
        ('{"recordings": [1]}', ": recordings[0]: must be a JSON object, got int"),
        ('{"recordings": [{"mode": "static"}]}', ": recordings[0]: block_size=None must be a whole number, at least 0"),
        (changed(steps=[1]), ": recordings[0]: responses[0]: lists of one length are needed, got {'pieces': 2,"),
        (changed(steps=[1, -1]), "responses[0]: steps=[1, -1] must be a list, each item a whole number, at least 0"),
        (
            changed(confidences=[0.5, 1.5]),
            "confidences=[0.5, 1.5] must be a list, each item a number from 0 to 1, or null",
        ),
        (
            changed(log_probs=[0.5, float("nan")]),
            "log_probs=[0.5, nan] must be a list, each item a finite number or null",
        ),
        (changed(agrees=[1, 0]), "agrees=[1, 0] must be a list, each item true or false"),
        (changed(prompt=None), "prompt=None must be a text"),
    ],
)
def test_a_malformed_file_is_refused_by_place(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "recording.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as error:
        read_recordings(file)
    assert str(error.value).startswith(str(file)) and message in str(error.value) and "\n" not in str(error.value)
