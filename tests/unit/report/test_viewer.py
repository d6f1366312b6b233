"""The page's viewer in a real browser: Chromium without a window, which prints the page as it is after its script has run."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nemo_opdlm.report.page import Pictures, render
from nemo_opdlm.report.runs import read_runs
from tests.unit.report.report_runs import RESPONSE, write_run

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium")
#: Uses the viewer as a person does, and leaves what it saw in the title.
DRIVER = """
const player = document.getElementById("player"), part = (name) => player.querySelector(`[data-part="${name}"]`);
const seen = [], look = (what) => seen.push([what, player.dataset.step, part("told").textContent]);
const press = (target, key) => target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
look("loaded");
part("start").click(); look("start");
part("back").click(); look("back at the start");
part("next").click(); look("next");
press(part("tokens"), "ArrowRight"); look("ArrowRight");
press(part("next"), "ArrowLeft"); look("ArrowLeft on a button");
press(part("step"), "ArrowRight"); look("ArrowRight is the slider's own");
press(part("tokens"), "End"); look("End");
press(part("tokens"), "Home"); look("Home");
part("step").value = 4; part("step").dispatchEvent(new Event("input")); look("slider");
part("recording").value = 1; part("recording").dispatchEvent(new Event("change")); look("recording");
part("play").click(); look("play begins anew");
setTimeout(() => { look("played to the end"); seen.push([location.hash, -1, ""]); document.title = JSON.stringify(seen); }, 8000);
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("viewer")
    page = folder / "index.html"
    page.write_text(render(read_runs([write_run(folder / "run", steps=1)]), Pictures((), (), ())), encoding="utf-8")
    return page


class Dom(HTMLParser):
    """Attributes of the elements of a page, and what is to be read in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.attributes: list[dict[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append({"tag": tag, **dict(attrs)})

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        """Elements of a class within the viewer's tokens."""
        return [
            found for found in self.attributes if found["tag"] == "li" and name in (found.get("class") or "").split()
        ]


def opened(page: Path, fragment: str = "") -> str:
    """The page as Chromium holds it some (virtual) seconds later."""
    assert CHROMIUM is not None
    options = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent}/profile")
    command = [CHROMIUM, *options, "--virtual-time-budget=10000", "--dump-dom", f"file://{page}{fragment}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def test_the_fragment_names_response_and_forward(page: Path) -> None:
    text = opened(page, "#recording=0&response=1&step=3")
    dom = Dom(text)
    (player,) = [found for found in dom.attributes if found.get("id") == "player"]
    state = {key: player[f"data-{key}"] for key in ("recording", "response", "step", "revealed", "agreed")}
    assert state == {"recording": "0", "response": "1", "step": "3", "revealed": "4", "agreed": "2"}
    assert "hidden" not in player
    levels = [
        next(name for name in ("level-4", "level-1", "unknown", "masked") if name in (found["class"] or ""))
        for found in dom.of_class("token")[:5]
    ]
    assert levels == ["level-4", "level-1", "unknown", "masked", "level-4"]
    assert len(dom.of_class("differs")) == len(dom.of_class("new")) == 2
    assert "<title>run</title>" in text  # what a model wrote has not run


def test_buttons_keys_slider_and_play_go_through_the_forwards(page: Path) -> None:
    # The page lets no script run but its own.
    driven = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    driven = driven.replace("</body>", f"<script>{DRIVER}</script></body>")
    copy = page.with_name("driven.html")
    copy.write_text(driven, encoding="utf-8")
    title = opened(copy).partition("<title>")[2].partition("</title>")[0]
    steps = {what: int(step) for what, step, _ in json.loads(html.unescape(title))}
    assert steps == {
        "loaded": RESPONSE.num_forwards,
        "start": 0,
        "back at the start": 0,
        "next": 1,
        "ArrowRight": 2,
        "ArrowLeft on a button": 1,
        "ArrowRight is the slider's own": 1,
        "End": 5,
        "Home": 0,
        "slider": 4,
        "recording": 5,
        "play begins anew": 0,
        "played to the end": 5,
        "#recording=1&response=0&step=5": -1,  # the address follows
    }
    told = {what: text for what, _, text in json.loads(html.unescape(title))}
    assert told["start"] == "Before the first forward: every token is masked."
    assert told["next"] == "Forward 1 reveals, in block 1: “lo” (confidence 31 %, the teacher's first choice)."
    assert told["End"] == "Forward 5 reveals tokens behind the response's end only."
