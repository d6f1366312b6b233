"""Files of responses: when and how surely a student revealed each of their tokens, and what its teacher holds of them."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_opdlm.data.bounded import read_json
from nemo_opdlm.data.checked import (
    COUNT,
    FLAG,
    LIST,
    NUMBER_OR_NULL,
    PROBABILITY,
    PROBABILITY_OR_NULL,
    TEXT,
    check_keys,
    list_of,
)


@dataclass(frozen=True)
class RecordedResponse:
    """A response; lists have one entry for each of its R tokens.

    Attributes:
        prompt: text it answers.
        pieces: text of each token by itself.
        blocks: the block it stands in, from 1.
        steps: the denoising forward that revealed it, from 1.
        confidences: the student's probability of it then; None where it was not finite.
        first_choices: text of the teacher's most likely token there, given all tokens before it.
        agrees: whether that is the token.
        log_probs: the teacher's log-probability of the token, in nats; None where it was not finite.
        num_forwards: denoising forwards spent.
        finish_reason: `end_of_turn` or `length`.
    """

    prompt: str
    pieces: list[str]
    blocks: list[int]
    steps: list[int]
    confidences: list[float | None]
    first_choices: list[str]
    agrees: list[bool]
    log_probs: list[float | None]
    num_forwards: int
    finish_reason: str


@dataclass(frozen=True)
class CalibrationBin:
    """Tokens revealed with a confidence of this range, over all responses; at least one.

    Attributes:
        low, high: the range; its upper end is in it only at 1.
        num_tokens: how many there are.
        confidence: their mean confidence.
        agreement: share of them that are the teacher's most likely ones.
        teacher_probability: mean of the teacher's probabilities of them.
    """

    low: float
    high: float
    num_tokens: int
    confidence: float
    agreement: float
    teacher_probability: float


@dataclass(frozen=True)
class Recording:
    """What a student wrote in one mode.

    Attributes:
        mode: of decoding.
        block_size: tokens denoised or drafted together.
        calibration: of all responses, empty ranges left out.
        responses: some of them.
    """

    mode: str
    block_size: int
    calibration: list[CalibrationBin]
    responses: list[RecordedResponse]


def write_recordings(path: str | Path, recordings: list[Recording]) -> None:
    """Write a file of recordings."""
    content = {"recordings": [asdict(recording) for recording in recordings]}
    Path(path).write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")


def read_recordings(path: Path) -> list[Recording]:
    """Undo `write_recordings`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is malformed; one line that names it and the place.
    """
    content = read_json(path)
    check_keys(str(path), content, {"recordings": LIST})
    return [_recording(f"{path}: recordings[{i}]", item) for i, item in enumerate(content["recordings"])]


_RESPONSE = {
    "prompt": TEXT,
    "pieces": list_of(TEXT),
    "blocks": list_of(COUNT),
    "steps": list_of(COUNT),
    "confidences": list_of(PROBABILITY_OR_NULL),
    "first_choices": list_of(TEXT),
    "agrees": list_of(FLAG),
    "log_probs": list_of(NUMBER_OR_NULL),
    "num_forwards": COUNT,
    "finish_reason": TEXT,
}
_BIN = {
    "low": PROBABILITY,
    "high": PROBABILITY,
    "num_tokens": COUNT,
    "confidence": PROBABILITY,
    "agreement": PROBABILITY,
    "teacher_probability": PROBABILITY,
}
_RECORDING = {"mode": TEXT, "block_size": COUNT, "calibration": LIST, "responses": LIST}


def _recording(where: str, value: Any) -> Recording:
    check_keys(where, value, _RECORDING)
    for number, item in enumerate(value["calibration"]):
        check_keys(f"{where}: calibration[{number}]", item, _BIN)
    for number, item in enumerate(value["responses"]):
        _check_response(f"{where}: responses[{number}]", item)
    return Recording(
        value["mode"],
        value["block_size"],
        [CalibrationBin(**{key: item[key] for key in _BIN}) for item in value["calibration"]],
        [RecordedResponse(**{key: item[key] for key in _RESPONSE}) for item in value["responses"]],
    )


def _check_response(where: str, value: Any) -> None:
    check_keys(where, value, _RESPONSE)
    lengths = {key: len(item) for key, item in value.items() if key in _RESPONSE and isinstance(item, list)}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{where}: lists of one length are needed, got {lengths}")
