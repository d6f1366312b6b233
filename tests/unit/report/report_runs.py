"""A small run's folder, to be reported."""

import json
from pathlib import Path

from nemo_opdlm.data.recordings import CalibrationBin, RecordedResponse, Recording, write_recordings

#: What a model may write: it must come out as text.
HOSTILE = "</script><script>document.title = 'taken'</script><!-- <img src=x onerror=alert(1)> &amp;"
RESPONSE = RecordedResponse(
    prompt="Say hello.",
    pieces=["Hel", "lo", HOSTILE, "\n", "."],
    blocks=[1, 1, 2, 2, 2],
    steps=[2, 1, 3, 4, 3],
    confidences=[0.95, 0.31, None, 0.5, 0.99],
    first_choices=["Hel", "lo", "x", "\n", "!"],
    agrees=[True, True, False, True, False],
    log_probs=[-0.1, -1.2, None, -0.7, -3.0],
    num_forwards=5,
    finish_reason="end_of_turn",
)
RECORDINGS = [
    Recording(
        "dynamic",
        4,
        [CalibrationBin(0.3, 0.4, 10, 0.35, 0.4, 0.3), CalibrationBin(0.9, 1.0, 30, 0.95, 0.9, 0.85)],
        [RESPONSE, RESPONSE],
    ),
    Recording("static", 4, [], [RESPONSE]),
]


def write_run(folder: Path, steps: int = 12, bare: bool = False) -> Path:
    """A run with all its files, or with bare metrics."""
    folder.mkdir(parents=True)
    rows = [{"global_step": step, "train/loss": 3.0 / step, "train/grad_norm": None} for step in range(1, steps + 1)]
    if not bare:
        for row in rows:
            row |= {"train/kl_at_mask_ratio_0.5": 2.0 / row["global_step"], "train/kl_at_mask_ratio_1.0": 3.0}
        rows[-1] |= {"val_loss": 1.25, "rollout/response_len": 32.0}
        samples = [
            {
                "global_step": step,
                "prompt": "Say hello.",
                "response": f"{HOSTILE} {step}",
                "finish_reason": "length",
                "response_len": 4,
                "num_forwards": 3,
            }
            for step in range(1, steps + 1)
        ]
        write_lines(folder / "samples.jsonl", samples)
        write_recordings(folder / "recording.json", RECORDINGS)
        task = {"metric": "accuracy", "value": 0.5, "standard_error": None, "num_questions": 2}
        column = {"model": "student", "mode": "dynamic", "figures": {"heldout_kl": 1.25}, "tasks": {"arc": task}}
        (folder / "evaluation.json").write_text(json.dumps({"columns": [column]}), encoding="utf-8")
    write_lines(folder / "metrics.jsonl", rows)
    return folder


def write_lines(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
