"""What a run has left in its folder, read for a report; every fault is one line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_opdlm.data.bounded import parse_json, read_bounded, read_json
from nemo_opdlm.data.checked import COUNT, LIST, NUMBER, NUMBER_OR_NULL, OBJECT, TEXT, check_keys
from nemo_opdlm.data.recordings import Recording, read_recordings
from nemo_opdlm.data.shown import plain

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
EVALUATION, RECORDING = "evaluation.json", "recording.json"
#: Of a file with a line per update: those of a million.
_MAX_LINES_BYTES = 2**30
_SAMPLE = {
    "global_step": COUNT,
    "prompt": TEXT,
    "response": TEXT,
    "finish_reason": TEXT,
    "response_len": COUNT,
    "num_forwards": COUNT,
}
_COLUMN = {"model": TEXT, "mode": TEXT, "figures": OBJECT, "tasks": OBJECT}
_TASK = {"metric": TEXT, "value": NUMBER, "standard_error": NUMBER_OR_NULL, "num_questions": COUNT}


@dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
        name: what it is called in the report.
        rows: of `metrics.jsonl`.
        samples: of `samples.jsonl`; empty where it was not written.
        evaluation: of `evaluation.json`, what `examples/evaluate.py` writes; None where there is none.
        recordings: of `recording.json`, which it writes, too; empty where there is none.
    """

    name: str
    rows: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]] = ()
    evaluation: Mapping[str, Any] | None = None
    recordings: Sequence[Recording] = ()

    @property
    def last_step(self) -> int:
        """Updates so far."""
        return max(int(row["global_step"]) for row in self.rows)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs of these folders, each exp_manager's log folder or the one that holds it as `log`.

    Raises:
        FileNotFoundError: there is no run in a folder.
        ValueError: a file is malformed, or a folder is named twice.
    """
    logs = [_log_folder(folder) for folder in folders]
    if len({log.resolve() for log in logs}) < len(logs):
        raise ValueError(f"a run is named twice: {', '.join(map(str, folders))}")
    return [_read(name, folder, log) for name, folder, log in zip(_names(logs), folders, logs, strict=True)]


def _log_folder(folder: Path) -> Path:
    for log in (folder, folder / "log"):
        if (log / METRICS).is_file():
            return log
    raise FileNotFoundError(f"{folder} holds no run: there is no {METRICS} in it, nor in {folder / 'log'}")


def _names(logs: Sequence[Path]) -> list[str]:
    """The last parts of the folders' paths, as few as tell them apart; `log` says nothing."""
    paths = [path.parent if path.name == "log" else path for path in (log.resolve() for log in logs)]
    for count in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(log) for log in logs]


def _read(name: str, folder: Path, log: Path) -> Run:
    evaluation, recording = _find(EVALUATION, log, folder), _find(RECORDING, log, folder)
    return Run(
        name,
        _read_metrics(log / METRICS),
        _read_samples(log / SAMPLES),
        None if evaluation is None else _read_evaluation(evaluation),
        () if recording is None else read_recordings(recording),
    )


def _find(name: str, *folders: Path) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _read_metrics(path: Path) -> list[Mapping[str, Any]]:
    rows = _read_lines(path)
    for where, row in rows.items():
        check_keys(where, row, dict.fromkeys(row, NUMBER_OR_NULL) | {"global_step": COUNT})
    if not rows:
        raise ValueError(f"{path} holds no metrics")
    return list(rows.values())


def _read_samples(path: Path) -> list[Mapping[str, Any]]:
    samples = _read_lines(path) if path.is_file() else {}
    for where, sample in samples.items():
        check_keys(where, sample, _SAMPLE)
    return list(samples.values())


def _read_lines(path: Path) -> dict[str, Mapping[str, Any]]:
    """The JSON objects of a file by their places, one on each line that is not empty."""
    rows = {}
    for number, line in enumerate(read_bounded(path, _MAX_LINES_BYTES).split(b"\n"), start=1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                rows[where] = parse_json(line)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            check_keys(where, rows[where], {})
    return rows


def _read_evaluation(path: Path) -> Mapping[str, Any]:
    evaluation = read_json(path)
    check_keys(str(path), evaluation, {"columns": LIST})
    for number, column in enumerate(evaluation["columns"]):
        where = f"{path}: columns[{number}]"
        check_keys(where, column, _COLUMN)
        check_keys(f"{where}: figures", column["figures"], dict.fromkeys(column["figures"], NUMBER_OR_NULL))
        for name, task in column["tasks"].items():
            check_keys(f"{where}: tasks: {plain(name)}", task, _TASK)
    return evaluation  # type: ignore[no-any-return]
