"""A study's figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_opdlm.report.figures import FIGURES
from nemo_opdlm.study.plan import BLOCK_SIZES, DIVERGENCES, METHODS
from nemo_opdlm.study.results import TOKENS, Result, Spread, models, of, shared_tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TITLES = {figure.name: figure.title for figure in FIGURES}
_CURVES = ("kl", "heldout_kl", "teacher_loglik", "repeat_4gram")
_BASE = "opdlm"
#: Tokens per forward between two thresholds that are both named.
_APART = 0.01


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Write the PNG files of all models; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for model in models(results):
        mine = [result for result in results if result.model == model]
        drawings = {
            "methods": _curves(mine, list(METHODS)),
            "decoding": _decoding(mine, list(METHODS)),
            "block_sizes": _curves(mine, [_BASE, *BLOCK_SIZES]),
            "divergences": _bars(mine, [_BASE, *DIVERGENCES]),
        }
        for name, figure in drawings.items():
            if figure is None:
                continue
            figure.suptitle(f"{model}: {name.replace('_', ' ')}")
            files.append(folder / f"{model}_{name}.png")
            figure.savefig(files[-1], dpi=100)
            pyplot.close(figure)
    return files


def _present(results: Sequence[Result], variants: Sequence[str]) -> dict[str, list[Result]]:
    """Seeds by variant, of those that have results; empty where there is nothing to compare."""
    found = {variant: of(results, results[0].model, variant) for variant in variants}
    found = {variant: seeds for variant, seeds in found.items() if seeds}
    return found if len(found) > 1 else {}


def _curves(results: Sequence[Result], variants: Sequence[str]) -> "Figure | None":
    """Quality against trained tokens: the mean over the seeds, and their range."""
    from matplotlib import pyplot

    present = _present(results, variants)
    if not present:
        return None
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for name, ax in zip(_CURVES, axes.flat, strict=True):
        for number, (variant, seeds) in enumerate(present.items()):
            _curve(ax, name, variant, seeds, f"C{number}")
        ax.set_title(_TITLES[name], fontsize=10)
        ax.set_xlabel("trained tokens")
        ax.grid(alpha=0.3)
    if "original" in results[0].decoding:
        # Beside what the AR model itself repeats in its greedy text.
        level = results[0].decoding["original"]["repeat_4gram"]
        axes.flat[3].axhline(level, color="black", linestyle=":", label="AR original")
    axes.flat[3].legend()
    return figure


def _curve(ax: "Axes", name: str, variant: str, seeds: Sequence[Result], color: str) -> None:
    numbers = range(min(len(result.points) for result in seeds))
    tokens = [Spread.of([result.points[i][TOKENS] for result in seeds]).mean for i in numbers]
    spreads = [Spread.of([result.points[i][name] for result in seeds]) for i in numbers]
    ax.plot(tokens, [spread.mean for spread in spreads], color=color, marker="o", markersize=3, label=variant)
    ax.fill_between(tokens, [s.low for s in spreads], [s.high for s in spreads], color=color, alpha=0.2, linewidth=0)


def _decoding(results: Sequence[Result], variants: Sequence[str]) -> "Figure | None":
    """What the final students' greedy text loses as forwards reveal more tokens."""
    from matplotlib import pyplot

    present = _present(results, variants)
    if not present:
        return None
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for ax, name in zip(axes, ("teacher_loglik", "teacher_agreement"), strict=True):
        for number, (variant, seeds) in enumerate(present.items()):
            thresholds = sorted((mode for mode in seeds[0].decoding if mode[0].isdigit()), reverse=True)
            x, y = ([_mean(seeds, mode, key) for mode in thresholds] for key in ("tokens_per_forward", name))
            ax.plot(x, y, color=f"C{number}", marker="o", markersize=4, label=variant)
            for i, mode in enumerate(thresholds):
                # Thresholds that no token reaches all stand at the same place.
                if i == 0 or x[i] - x[i - 1] > _APART:
                    ax.annotate(mode, (x[i], y[i]), fontsize=7, xytext=(3, 3), textcoords="offset points")
        ax.set_title(_TITLES[name], fontsize=10)
        ax.set_xlabel("tokens per forward pass; labels: threshold γ of dynamic decoding")
        ax.grid(alpha=0.3)
    axes[0].legend()
    return figure


def _mean(seeds: Sequence[Result], mode: str, figure: str) -> float:
    return Spread.of([result.decoding[mode][figure] for result in seeds]).mean


def _bars(results: Sequence[Result], variants: Sequence[str]) -> "Figure | None":
    """Variants at equal trained tokens."""
    from matplotlib import pyplot

    present = _present(results, variants)
    if not present:
        return None
    num_tokens = shared_tokens(result for seeds in present.values() for result in seeds)
    figure, axes = pyplot.subplots(1, len(_CURVES), figsize=(13, 4), layout="constrained")
    for ax, name in zip(axes, _CURVES, strict=True):
        spreads = [Spread.of([result.at(num_tokens, name) for result in seeds]) for seeds in present.values()]
        means = [spread.mean for spread in spreads]
        errors = [[s.mean - s.low for s in spreads], [s.high - s.mean for s in spreads]]
        ax.barh(list(present), means, xerr=errors, color=[f"C{i}" for i in range(len(present))], capsize=3)
        ax.invert_yaxis()
        ax.set_title(_TITLES[name], fontsize=9)
        ax.grid(alpha=0.3, axis="x")
    for ax in axes[1:]:
        ax.set_yticklabels([])
    return figure
