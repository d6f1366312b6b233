"""Folders that runs have left, as a report reads them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hypothesis.strategies import SearchStrategy

from nemo_opdlm.data.recordings import CalibrationBin, RecordedResponse, Recording, write_recordings
from nemo_opdlm.report import plots
from nemo_opdlm.report.page import Pictures, render
from nemo_opdlm.report.runs import read_runs
from tests.fuzz import mutations, tokens
from tests.fuzz.checkpoints import Folder, json_file

_METRICS = (
    {"global_step": 0, "val_loss": 2.5, "val/teacher_loglik": None},
    {"global_step": 1, "reduced_train_loss": 1.5, "lr": 1e-4, "train/kl_at_mask_ratio_0.5": 2.0},
)
_SAMPLE = {
    "global_step": 1,
    "prompt": "w4",
    "response": "w5 w6",
    "finish_reason": "length",
    "response_len": 2,
    "num_forwards": 2,
}
_EVALUATION = {
    "columns": [
        {
            "model": "student",
            "mode": "static",
            "figures": {"kl": 0.5, "heldout_kl": None},
            "tasks": {"sums": {"metric": "exact_match", "value": 0.5, "standard_error": None, "num_questions": 4}},
        }
    ]
}
_RESPONSE = RecordedResponse(
    "w4", ["w5", " w6"], [1, 1], [2, 1], [0.5, None], ["w5", " w7"], [True, False], [-0.5, None], 2, "length"
)
_RECORDING = Recording("static", 4, [CalibrationBin(0.5, 0.6, 1, 0.5, 1.0, 0.7)], [_RESPONSE])


def run(folder: Path) -> Folder:
    """A folder of every file that a report reads, made into a page."""
    path = folder / "run"
    path.mkdir()
    (path / "metrics.jsonl").write_bytes(_lines(*_METRICS))
    (path / "samples.jsonl").write_bytes(_lines(_SAMPLE))
    (path / "evaluation.json").write_text(json.dumps(_EVALUATION))
    write_recordings(path / "recording.json", [_RECORDING])
    edits = {
        "metrics.jsonl": _edited_lines(*_METRICS),
        "samples.jsonl": _edited_lines(_SAMPLE),
        "evaluation.json": json_file(path / "evaluation.json"),
        "recording.json": json_file(path / "recording.json"),
    }
    return Folder(path, edits, read_run)


def read_run(path: Path) -> None:
    """Make a page of it; pictures, which take a hundred times as long, of a few."""
    runs = read_runs([path])
    pictures = Pictures([], [], [])
    if sum(file.stat().st_size for file in path.iterdir()) % 64 == 0:
        pictures = Pictures(list(plots.curves(runs)), list(plots.kl_by_mask_ratio(runs)), list(plots.calibration(runs)))
    render(runs, pictures)


def _lines(*rows: Mapping[str, Any]) -> bytes:
    return b"".join(mutations.dump(row) + b"\n" for row in rows)


def _edited_lines(*rows: Mapping[str, Any]) -> SearchStrategy[bytes]:
    whole = _lines(*rows)
    return mutations.edited_json(*rows).map(lambda row: whole + row) | mutations.edited_bytes(whole, tokens=tokens.JSON)
