"""The report: what it reads, what it says where something is missing, and that texts stay texts."""

import html
import json
import re
import runpy
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nemo_opdlm.report import page as page_module
from nemo_opdlm.report.page import Pictures, last_figures, render, sampled_updates, write_report
from nemo_opdlm.report.plots import calibration_error, curves, kl_by_mask_ratio, missing_curves, moving_mean
from nemo_opdlm.report.runs import Run, read_runs
from tests.unit.report.report_runs import HOSTILE, RECORDINGS, write_run

TEMPLATES = Path(page_module.__file__).with_name("templates")
SCRIPT = Path(__file__).resolve().parents[3] / "examples" / "report.py"
NO_PICTURES = Pictures((), (), ())


class Page(HTMLParser):
    """Tags of a page and their attributes, as a browser sees them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "full" / "log")


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return render(read_runs([folder]), NO_PICTURES)


def test_a_run_is_its_log_folder_or_what_holds_it(folder: Path) -> None:
    (run,) = read_runs([folder])
    assert read_runs([folder.parent]) == [run]
    assert (run.name, run.last_step, len(run.samples), list(run.recordings)) == ("full", 12, 12, RECORDINGS)


def test_what_evaluate_writes_may_lie_beside_the_log_folder(tmp_path: Path) -> None:
    log = write_run(tmp_path / "run" / "log")
    (log / "recording.json").rename(tmp_path / "run" / "recording.json")
    assert list(read_runs([tmp_path / "run"])[0].recordings) == RECORDINGS


def test_runs_are_called_by_what_tells_their_folders_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / part / "run", bare=True) for part in "ab"]
    assert [run.name for run in read_runs(folders)] == ["a/run", "b/run"]
    inner = write_run(folders[0] / "log", bare=True)
    assert [run.name for run in read_runs([folders[0], inner])] == [str(folders[0]), str(inner)]
    with pytest.raises(ValueError, match="a run is named twice"):
        read_runs([folders[0], folders[0]])


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("metrics.jsonl", "", "metrics.jsonl holds no metrics"),
        ("metrics.jsonl", '{"global_step": 1}\n{"glo', "metrics.jsonl:2: invalid JSON"),
        ("metrics.jsonl", "[1]\n", "metrics.jsonl:1: must be a JSON object"),
        ("metrics.jsonl", "{}\n", "metrics.jsonl:1: global_step=None must be a whole number"),
        ("metrics.jsonl", '{"global_step": 1, "a": "b"}\n', "metrics.jsonl:1: a='b' must be a finite number or null"),
        ("metrics.jsonl", '{"global_step": 1, "a": NaN}\n', "a=nan must be a finite number or null"),
        ("samples.jsonl", '{"global_step": 1}\n', "samples.jsonl:1: prompt=None must be a text"),
        ("evaluation.json", '{"columns": [{"model": 1}]}', "evaluation.json: columns[0]: model=1 must be a text"),
        ("recording.json", "\xff", "recording.json: invalid JSON"),
    ],
)
def test_a_malformed_file_is_one_line(tmp_path: Path, file: str, text: str, message: str) -> None:
    folder = write_run(tmp_path / "run", steps=1)
    (folder / file).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as error:
        read_runs([folder])
    assert message in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)


def test_averages_keep_a_constant_and_the_length_and_do_not_lag() -> None:
    assert moving_mean([]) == [] and moving_mean([2.0]) == [2.0]
    assert moving_mean([2.0] * 200) == pytest.approx([2.0] * 200)
    line = [float(step) for step in range(100)]
    assert moving_mean(line)[2:-2] == pytest.approx(line[2:-2])
    assert (moving_mean(line)[0], moving_mean(line)[-1]) == (1.0, 98.0)


def test_figures_are_the_last_ones_and_those_of_every_update_are_averages(folder: Path) -> None:
    figures = {row[0]: row[1] for row in last_figures(read_runs([folder])).rows}
    assert figures["Updates"] == "12" and figures["Held-out KL, nats per token"] == "1.25"
    assert figures["Loss, nats per token"] == "0.250"
    assert "Gradient norm before clipping" not in figures  # null throughout


def test_of_many_updates_first_last_and_some_between_are_shown() -> None:
    samples = [{"global_step": step} for step in range(1, 101) for _ in range(2)]
    shown = sampled_updates(Run("run", [{"global_step": 100}], samples))
    assert [update.step for update in shown] == [1, 15, 29, 43, 58, 72, 86, 100]
    assert all(len(update.samples) == 2 for update in shown)
    assert [update.step for update in sampled_updates(Run("run", [], samples[:2]))] == [1]


def test_the_calibration_error_is_the_mean_over_tokens() -> None:
    bins = RECORDINGS[0].calibration
    assert calibration_error(bins, "agreement") == pytest.approx((10 * 0.05 + 30 * 0.05) / 40)
    assert calibration_error(bins, "teacher_probability") == pytest.approx((10 * 0.05 + 30 * 0.1) / 40)


def test_texts_of_models_are_no_html(page: str) -> None:
    parsed = Page(page)
    assert page.count(html.escape(HOSTILE, quote=False).replace("'", "&#39;")) == 8  # a sample of each update shown
    assert [attributes.get("id") for tag, attributes in parsed.tags if tag == "script"] == ["recordings", None]
    assert not [attributes for tag, attributes in parsed.tags if tag == "img" or "onerror" in attributes]


def test_the_data_of_the_viewer_are_the_recordings(page: str) -> None:
    island = page.partition('id="recordings">')[2].partition("</script>")[0]
    assert "<" not in island
    first, second = json.loads(island)
    assert (first["run"], first["mode"], second["mode"]) == ("full", "dynamic", "static")
    assert first["responses"][0]["pieces"][2] == HOSTILE


def test_text_is_told_from_what_is_behind_it() -> None:
    style = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in style.partition("@media")[::2])
    for colours in (light, light | dark):
        backgrounds = ["background", "card", *(f"level-{level}" for level in range(5))]
        assert all(contrast(colours["text"], colours[name]) >= 4.5 for name in backgrounds)
        for name in ("faint", "accent"):
            assert all(contrast(colours[name], colours[behind]) >= 4.5 for behind in ("background", "card"))
        # Lines that say something.
        assert all(contrast(colours["differs"], colours[f"level-{level}"]) >= 3 for level in range(5))


def contrast(first: str, second: str) -> float:
    """Of WCAG 2."""

    def luminance(colour: str) -> float:
        shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    darker, lighter = sorted((luminance(first), luminance(second)))
    return (lighter + 0.05) / (darker + 0.05)


def test_nothing_is_loaded_from_elsewhere(page: str) -> None:
    policy = next(attributes["content"] for tag, attributes in Page(page).tags if "http-equiv" in attributes)
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy
    parsed = Page(page)
    addresses = [attributes.get(key) for _, attributes in parsed.tags for key in ("src", "href", "srcset", "action")]
    assert all(address is None or address.startswith(("#", "data:")) for address in addresses)


def test_what_is_missing_is_said_and_left_out(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / "bare", bare=True)])
    text = render(runs, NO_PICTURES)
    for sentence in ("No evaluation: ", "No run has written its KL by mask ratio", "No recording: ", "No samples: "):
        assert sentence in text
    assert "<script" not in text
    assert "Held-out KL, nats per token" in missing_curves(runs) and "Loss, nats per token" not in missing_curves(runs)


def test_several_runs_are_compared(folder: Path, tmp_path: Path) -> None:
    names = ["a $b$", "_c"]  # neither a formula nor a line without a name
    runs = read_runs([folder, *(write_run(tmp_path / name, bare=True) for name in names)])
    assert last_figures(runs).head == ["", "full", *names]
    assert [picture.name for picture in curves(runs)] == ["train_loss", "val_loss", "rollout_response_len"]
    alts = [picture.alt for picture in curves(runs)]
    assert alts[1] == "Held-out KL, nats per token: full from 1.25 at step 12 to 1.25 at step 12."
    assert all(name in alts[0] for name in names)
    assert [picture.name for picture in kl_by_mask_ratio(runs)] == ["kl_by_mask_ratio_1", "kl_at_the_ends"]


def test_the_pictures_are_in_the_page_and_beside_it(folder: Path, tmp_path: Path) -> None:
    page, *pictures = write_report(read_runs([folder]), tmp_path / "new" / "report")
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    parsed = Page(page.read_text(encoding="utf-8"))
    images = [attributes for tag, attributes in parsed.tags if tag == "img"]
    assert len(images) == len(pictures) == 6 and all(image["alt"] for image in images)


def test_the_script_writes_into_the_run_or_says_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nemo_opdlm.report.page.write_report", lambda runs, folder: [folder / "index.html"])
    monkeypatch.setattr("sys.argv", ["report.py", str(folder)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert capsys.readouterr().out == f"{folder / 'report' / 'index.html'}, and beside it 0 pictures\n"
    monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="error: .* holds no run: there is no metrics.jsonl in it"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
