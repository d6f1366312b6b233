"""The pictures of a report: curves of one or more runs, drawn for light and for dark pages."""

import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import fsum
from typing import TYPE_CHECKING, Any

from nemo_opdlm.data.recordings import CalibrationBin, Recording
from nemo_opdlm.report.curves import Panel, series
from nemo_opdlm.report.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

PANELS = (
    Panel("Loss, nats per token", "train/loss"),
    Panel("Held-out KL, nats per token", "val_loss", every_step=False),
    Panel("KL on its own states, nats per token", "train/kl"),
    Panel("Same first choice, share of tokens", "train/agreement"),
    Panel("Tokens per forward in rollouts", "rollout/tokens_per_forward"),
    Panel("Response length, mean tokens", "rollout/response_len"),
    Panel("Responses cut by their limit, share", "rollout/truncated_frac"),
    Panel("Gradient norm before clipping", "train/grad_norm"),
    Panel("Learning rate", "train/lr"),
)
#: Steps and values.
Line = tuple[list[int], list[float]]
_MASK_RATIO = re.compile(r"train/kl_at_mask_ratio_(\d+(?:\.\d+)?)")
#: Runs differ in more than colour.
_DASHES = ("-", "--", "-.", ":")
#: Share of all values, on either side of one, that its average is over.
_NEIGHBOURS = 0.02
#: Inches, and pixels per inch: letters can be read where a picture is as wide as a phone.
_WIDTH, _DPI = 4.8, 200
#: Highest over lowest value of curves that are shown as flat.
_FLAT = 1.05
#: Share of the steps that "first" and "last" stand for.
_ENDS = 0.1


@dataclass(frozen=True)
class Theme:
    """Colours of a picture.

    Attributes:
        background: of the whole of it.
        text: of letters, axes and ticks.
        grid: of the lines behind.
        cycle: of curves.
    """

    background: str
    text: str
    grid: str
    cycle: tuple[str, ...]

    @property
    def settings(self) -> dict["RcKeyType", Any]:
        """As matplotlib's rcParams."""
        from cycler import cycler

        backgrounds: tuple[RcKeyType, ...] = (
            "figure.facecolor",
            "axes.facecolor",
            "savefig.facecolor",
            "legend.facecolor",
        )
        texts: tuple[RcKeyType, ...] = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
        return {
            **dict.fromkeys(backgrounds, self.background),
            **dict.fromkeys(texts, self.text),
            "grid.color": self.grid,
            "axes.prop_cycle": cycler(color=self.cycle),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "font.size": 12,
            "text.parse_math": False,  # names may hold dollar signs
            "legend.frameon": False,
            "legend.fontsize": 9.5,
            "figure.dpi": _DPI,
            "figure.constrained_layout.use": True,
        }


# Okabe and Ito's colours, which the colour-blind can tell apart; lighter ones where the page is dark.
LIGHT = Theme("#ffffff", "#1f2328", "#d9dee3", ("#0072b2", "#d55e00", "#007a5a", "#a3487f", "#8a6d00", "#3b6fb6"))
DARK = Theme("#161b22", "#e6edf3", "#3a424c", ("#56b4e9", "#e69f00", "#35c89b", "#e39ac4", "#f0e442", "#9db9ff"))


@dataclass(frozen=True)
class Picture:
    """A picture.

    Attributes:
        name: of its file, without the ending.
        title: above it.
        alt: what it shows, in words.
        size: width and height in pixels.
        light, dark: the PNGs.
    """

    name: str
    title: str
    alt: str
    size: tuple[int, int]
    light: bytes
    dark: bytes


def moving_mean(values: Sequence[float]) -> list[float]:
    """Mean of each value and its neighbours, ``_NEIGHBOURS`` of all values on either side, fewer at the ends.

    It does not lag behind a course that falls fast at first, as an exponential average does.
    """
    reach = round(_NEIGHBOURS * len(values))
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [fsum(window) / len(window) for window in windows]


def curves(runs: Sequence[Run]) -> Iterator[Picture]:
    """The runs over one another, a picture for each of ``PANELS`` that any of them has values of."""
    for panel in PANELS:
        lines = {run.name: found for run in runs if (found := series(run.rows, panel.key))[0]}
        if lines:
            yield _picture(
                panel.key.replace("/", "_"), panel.title, _course(lines, panel), partial(_draw, panel, lines)
            )


def missing_curves(runs: Sequence[Run]) -> list[str]:
    """Titles of ``PANELS`` that no run has values of."""
    return [panel.title for panel in PANELS if not any(series(run.rows, panel.key)[0] for run in runs)]


def kl_by_mask_ratio(runs: Sequence[Run]) -> Iterator[Picture]:
    """Of each run with such a KL its course, a line for each range of mask ratios; then first and last updates of all."""
    profiles = {}
    for number, run in enumerate(runs, start=1):
        keys = _mask_ratio_keys(run)
        if not keys:
            continue
        lines = {f"up to {ratio:.0%} masked": series(run.rows, key) for ratio, key in keys.items()}
        panel = Panel("KL by masked share of a block", "kl_by_mask_ratio")
        if len(runs) > 1:
            panel = Panel(f"{panel.title}: {run.name}", f"{panel.key}_{number}")
        yield _picture(panel.key, panel.title, _course(lines, panel), partial(_draw_from_zero, panel, lines))
        profiles[run.name] = Profile.of(lines.values(), list(keys))
    if profiles:
        title = "First (dotted) and last updates"
        yield _picture("kl_at_the_ends", title, _profile_text(profiles), partial(_draw_profiles, profiles))


def calibration(runs: Sequence[Run]) -> Iterator[Picture]:
    """Of each run with a recording what the teacher holds of tokens, over the confidence with which they were revealed."""
    for number, run in enumerate(runs, start=1):
        recordings = [recording for recording in run.recordings if recording.calibration]
        if recordings:
            name, title = "calibration", "The teacher's view, by the student's confidence"
            if len(runs) > 1:
                name, title = f"{name}_{number}", f"{title}: {run.name}"
            draw = partial(_draw_calibration, recordings)
            yield _picture(name, title, _calibration_text(recordings), draw, height=4.2)


def calibration_error(bins: Sequence[CalibrationBin], of: str) -> float:
    """Mean distance of the confidence from ``agreement`` or ``teacher_probability``, over tokens."""
    gaps: float = sum(each.num_tokens * abs(each.confidence - getattr(each, of)) for each in bins)
    return gaps / sum(each.num_tokens for each in bins)


def _mask_ratio_keys(run: Run) -> dict[float, str]:
    """Keys of the run's KL by the upper end of their range of mask ratios, in order."""
    matches = filter(None, (_MASK_RATIO.fullmatch(key) for key in {key for row in run.rows for key in row}))
    found = {float(match[1]): match[0] for match in matches if series(run.rows, match[0])[0]}
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Profile:
    """KL over upper ends of mask ratios, mean of the first and of the last updates."""

    ratios: list[float]
    first: list[float]
    last: list[float]

    @staticmethod
    def of(lines: Iterable[Line], ratios: list[float]) -> "Profile":
        """Of the whole course at each ratio."""
        ends = []
        for _, values in lines:
            count = max(1, round(_ENDS * len(values)))
            ends.append((sum(values[:count]) / count, sum(values[-count:]) / count))
        return Profile(ratios, [first for first, _ in ends], [last for _, last in ends])


def _picture(name: str, title: str, alt: str, draw: Callable[["Figure"], Any], height: float = 3.1) -> Picture:
    """A picture of a height in inches."""
    size = round(_WIDTH * _DPI), round(height * _DPI)
    return Picture(name, title, alt, size, *(_render(theme, draw, height) for theme in (LIGHT, DARK)))


def _render(theme: Theme, draw: Callable[["Figure"], Any], height: float) -> bytes:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    stream = io.BytesIO()
    with rc_context(theme.settings):
        figure = Figure(figsize=(_WIDTH, height))
        draw(figure)
        figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _draw(panel: Panel, lines: Mapping[str, Line], figure: "Figure") -> "Axes":
    ax = figure.subplots()
    for number, (name, (steps, values)) in enumerate(lines.items()):
        style = _style(number)
        if panel.every_step:
            ax.plot(steps, values, color=style["color"], alpha=0.25, linewidth=0.8)
            ax.plot(steps, moving_mean(values), label=name, **style)
        else:
            ax.plot(steps, values, label=name, marker="o", markersize=3.5, **style)
            ax.set_ylim(bottom=0)
    highest, lowest = (pick(pick(values) for _, values in lines.values()) for pick in (max, min))
    if 0 <= lowest <= highest < lowest * _FLAT:  # else noise would look like a course
        ax.set_ylim(0, 1.1 * highest)
    if len(lines) > 1:
        _legend(ax, figure)
    ax.set_xlabel("optimizer step")
    return ax


def _draw_from_zero(panel: Panel, lines: Mapping[str, Line], figure: "Figure") -> None:
    _draw(panel, lines, figure).set_ylim(bottom=0)


def _draw_profiles(profiles: Mapping[str, Profile], figure: "Figure") -> None:
    ax = figure.subplots()
    for number, (name, profile) in enumerate(profiles.items()):
        style: dict[str, Any] = {"color": f"C{number % len(LIGHT.cycle)}", "marker": "o", "markersize": 4}
        ax.plot(profile.ratios, profile.first, linestyle=":", **style)
        ax.plot(profile.ratios, profile.last, label=name, **style)
    ratios = sorted({ratio for profile in profiles.values() for ratio in profile.ratios})
    ax.set_xticks(ratios, [f"≤ {ratio:.0%}" for ratio in ratios])
    ax.set_ylim(bottom=0)
    if len(profiles) > 1:
        _legend(ax, figure)
    ax.set_xlabel("share of the block that was masked")


def _draw_calibration(recordings: Sequence[Recording], figure: "Figure") -> None:
    top, bottom = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    top.plot([0, 1], [0, 1], color="C5", linestyle=":", linewidth=1)
    for number, recording in enumerate(recordings):
        colour, bins = f"C{number % len(LIGHT.cycle)}", recording.calibration
        confidence = [each.confidence for each in bins]
        style = {"color": colour, "marker": "os^D"[number % 4], "markersize": 4}
        top.plot(confidence, [each.agreement for each in bins], label=f"{recording.mode}: agreement", **style)
        probability = [each.teacher_probability for each in bins]
        top.plot(confidence, probability, linestyle="--", label=f"{recording.mode}: probability", **style)
        width = 0.08 / len(recordings)
        places = [(each.low + each.high) / 2 + (number - (len(recordings) - 1) / 2) * width for each in bins]
        bottom.bar(places, [each.num_tokens for each in bins], width, color=colour)
    top.set_ylim(-0.03, 1.03)
    top.set_ylabel("the teacher's")
    _legend(top, figure)
    bottom.set_ylabel("tokens")
    bottom.set_xlim(0, 1)
    bottom.set_xlabel("the student's confidence")


def _calibration_text(recordings: Sequence[Recording]) -> str:
    parts = []
    for recording in recordings:
        first, last = recording.calibration[0], recording.calibration[-1]
        parts.append(
            f"{recording.mode}: of tokens revealed with a confidence of {first.confidence:.0%} {first.agreement:.0%} are the "
            f"teacher's first choice, of those with {last.confidence:.0%} {last.agreement:.0%}"
        )
    return f"{'; '.join(parts)}. All numbers are in the tables below."


def _legend(ax: "Axes", figure: "Figure") -> None:
    """Above the axes, where it hides no line."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, columnspacing=1.2, labelspacing=0.3)


def _style(number: int) -> dict[str, Any]:
    return {"color": f"C{number % len(LIGHT.cycle)}", "linestyle": _DASHES[number % len(_DASHES)], "linewidth": 1.6}


def _course(lines: Mapping[str, Line], panel: Panel) -> str:
    """First and last values in words."""
    parts = []
    for name, (steps, values) in lines.items():
        shown = moving_mean(values) if panel.every_step else values
        parts.append(f"{name} from {shown[0]:.3g} at step {steps[0]} to {shown[-1]:.3g} at step {steps[-1]}")
    return f"{panel.title}: {'; '.join(parts)}."


def _profile_text(profiles: Mapping[str, Profile]) -> str:
    parts = []
    for name, profile in profiles.items():
        pairs = zip(profile.ratios, profile.first, profile.last, strict=True)
        parts.append(
            f"{name} " + ", ".join(f"up to {ratio:.0%} from {first:.3g} to {last:.3g}" for ratio, first, last in pairs)
        )
    return f"KL by share of the block that was masked: {'; '.join(parts)}."
