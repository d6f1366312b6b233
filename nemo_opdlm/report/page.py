"""A report as one HTML page that loads nothing, and the PNGs of its pictures beside it."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_opdlm.data.recordings import Recording
from nemo_opdlm.report import plots
from nemo_opdlm.report.curves import series
from nemo_opdlm.report.figures import FIGURES
from nemo_opdlm.report.runs import Run

PAGE = "index.html"
_FOLDER = Path(__file__).with_name("templates")
#: Updates whose samples are shown, of a run that logged more.
_SAMPLED_UPDATES = 8


@dataclass(frozen=True)
class Table:
    """A table of the page: head and cells of each row, the first of which heads the row."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class SampledUpdate:
    """What was written around an update."""

    step: int
    samples: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Pictures:
    """The pictures of the page's sections."""

    curves: Sequence[plots.Picture]
    by_mask_ratio: Sequence[plots.Picture]
    calibration: Sequence[plots.Picture]


def write_report(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write the page and its pictures; returns the files, the page first.

    Raises:
        OSError: the folder cannot be written.
    """
    pictures = Pictures(list(plots.curves(runs)), list(plots.kl_by_mask_ratio(runs)), list(plots.calibration(runs)))
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / PAGE]
    files[0].write_text(render(runs, pictures), encoding="utf-8")
    for picture in (*pictures.curves, *pictures.by_mask_ratio, *pictures.calibration):
        files.append(folder / f"{picture.name}.png")
        files[-1].write_bytes(picture.light)
    return files


def render(runs: Sequence[Run], pictures: Pictures) -> str:
    """The page. What runs and models have written is escaped: it is text, whatever it looks like."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    style, script = ((_FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "viewer.js"))
    return environment.get_template("page.html").render(
        title=", ".join(run.name for run in runs),
        runs=runs,
        style=Markup(style),
        script=Markup(script),
        policy=_policy(style, script),
        last=last_figures(runs),
        evaluations=[evaluation_table(run.name, run.evaluation) for run in runs if run.evaluation is not None],
        curves=pictures.curves,
        missing_curves=plots.missing_curves(runs),
        by_mask_ratio=pictures.by_mask_ratio,
        calibration=pictures.calibration,
        calibration_tables=[
            calibration_table(run.name, each) for run in runs for each in run.recordings if each.calibration
        ],
        recordings=[{"run": run.name, **asdict(each)} for run in runs for each in run.recordings if each.responses],
        sampled={run.name: sampled_updates(run) for run in runs if run.samples},
    )


def _policy(style: str, script: str) -> str:
    """The page's Content-Security-Policy: what is in it, by its hash, and nothing from elsewhere."""
    return (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; "
        "form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def last_figures(runs: Sequence[Run]) -> Table:
    """One column per run, the last value of each metric that any run has; noisy ones averaged, as in the curves."""
    rows = [["Updates", *(f"{run.last_step:,}" for run in runs)]]
    for title, key in (("Response tokens written", "generated_tokens"), ("Tokens trained on", "trained_tokens")):
        rows.append([title, *(_number(_last(run, key), ",.0f") for run in runs)])
    for panel in plots.PANELS:
        rows.append([panel.title, *(_number(_last(run, panel.key, panel.every_step), "#.3g") for run in runs)])
    rows.append(["Time of an update, seconds", *(_number(_last(run, "time/step_s", True), "#.3g") for run in runs)])
    rows.append(["Device hours", *(_number(_last(run, "device_hours"), "#.3g") for run in runs)])
    caption = "Last figures; those of every update are averages, as in the curves"
    return Table(caption, ["", *(run.name for run in runs)], [row for row in rows if any(row[1:])])


def evaluation_table(name: str, evaluation: Mapping[str, Any]) -> Table:
    """One column for each model and mode that was evaluated, as `examples/evaluate.py` prints it."""
    columns = evaluation["columns"]
    rows = []
    for figure in FIGURES:
        values = [_number(column["figures"].get(figure.name), f".{figure.digits}f") for column in columns]
        if any(values):
            rows.append([figure.title, *values, figure.better or "like teacher"])
    for task in dict.fromkeys(task for column in columns for task in column["tasks"]):
        results = [column["tasks"].get(task) for column in columns]
        first = next(filter(None, results))
        title = f"{task}: {first['metric']}, {first['num_questions']} questions"
        rows.append([title, *("" if result is None else _with_error(result) for result in results), "higher"])
    head = ["", *(f"{column['model']}, {column['mode']}" for column in columns), "better"]
    checksum = evaluation.get("heldout_checksum")
    heldout = f", held-out set {str(checksum)[:8]}" if checksum else ""
    return Table(f"{name}: AR original and student{heldout}", head, rows)


def calibration_table(name: str, recording: Recording) -> Table:
    """What the teacher holds of tokens, one row for each range of confidence."""
    bins = recording.calibration
    gaps = [plots.calibration_error(bins, of) for of in ("agreement", "teacher_probability")]
    caption = f"{name}, {recording.mode}: mean gap to agreement {gaps[0]:.3f}, to probability {gaps[1]:.3f}"
    head = ["Confidence", "Tokens", "Mean", "Agreement", "Probability"]
    rows = [
        [
            f"{each.low:.0%}–{each.high:.0%}",
            f"{each.num_tokens:,}",
            *(f"{share:.3f}" for share in (each.confidence, each.agreement, each.teacher_probability)),
        ]
        for each in bins
    ]
    return Table(caption, head, rows)


def sampled_updates(run: Run) -> list[SampledUpdate]:
    """Samples of a run by update; of many updates first, last, and evenly some between."""
    updates: dict[int, list[Mapping[str, Any]]] = {}
    for sample in run.samples:
        updates.setdefault(sample["global_step"], []).append(sample)
    steps, count = sorted(updates), min(_SAMPLED_UPDATES, len(updates))
    chosen = [steps[round(place * (len(steps) - 1) / max(count - 1, 1))] for place in range(count)]
    return [SampledUpdate(step, updates[step]) for step in chosen]


def _last(run: Run, key: str, is_noisy: bool = False) -> float | None:
    values = series(run.rows, key)[1]
    return (plots.moving_mean(values) if is_noisy else values)[-1] if values else None


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _with_error(result: Mapping[str, Any]) -> str:
    error = result.get("standard_error")
    return f"{result['value']:.3f}" + ("" if error is None else f" ± {error:.3f}")
