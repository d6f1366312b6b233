"""A study's figures as tables in Markdown."""

from collections.abc import Sequence
from pathlib import Path

from nemo_opdlm.study.plan import BLOCK_SIZES, DIVERGENCES, METHODS
from nemo_opdlm.study.results import Result, Spread, models, of, shared_tokens

BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"
_BASE, _ORIGINAL = "opdlm", "original"
_DIGITS = 3
_SPEED = "tokens_per_forward"
#: Figure -> heading; what they are stands in the page.
_QUALITY = {
    "heldout_kl": "held-out KL",
    "kl": "own KL",
    "teacher_loglik": "log-likelihood",
    "teacher_agreement": "agreement",
    "repeat_4gram": "repeats",
}
_TEXT_FIGURES = {"teacher_loglik": "log-likelihood", "repeat_4gram": "repeats", _SPEED: "tokens per forward"}
#: Of a variant, the tokens are given that it takes to be as good as the method.
_TARGETS = ("kl", "heldout_kl")


def write(results: Sequence[Result], path: Path) -> list[Path]:
    """Put the tables into a page, in the place of those between its two marks; a page that is not there is begun."""
    page = path.read_text(encoding="utf-8") if path.is_file() else f"{BEGIN}\n{END}\n"
    before, mark, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ValueError(f"{path} has no {BEGIN} and {END}")
    path.write_text(f"{before}{BEGIN}\n\n{markdown(results)}\n{END}{after}", encoding="utf-8")
    return [path]


def markdown(results: Sequence[Result]) -> str:
    """All tables."""
    parts = []
    for model in models(results):
        mine = [result for result in results if result.model == model]
        for title, variants in (
            ("methods", METHODS),
            ("block sizes", {_BASE: (), **BLOCK_SIZES}),
            ("divergences", {_BASE: (), **DIVERGENCES}),
        ):
            present = [variant for variant in variants if of(mine, model, variant)]
            if len(present) > 1:
                parts.append(_quality(mine, model, title, present))
        if methods := [variant for variant in METHODS if of(mine, model, variant)]:
            parts.append(_decoding(mine, model, methods))
    return "\n".join(parts)


def _quality(results: Sequence[Result], model: str, title: str, variants: Sequence[str]) -> str:
    """Variants at equal trained tokens, and the tokens after which each is as good as the method is there."""
    num_tokens = shared_tokens(result for variant in variants for result in of(results, model, variant))
    base = of(results, model, _BASE)
    targets = {name: Spread.of([result.at(num_tokens, name) for result in base]).mean for name in _TARGETS if base}
    rows = []
    for variant in variants:
        seeds = of(results, model, variant)
        cells = [_shown([result.at(num_tokens, name) for result in seeds]) for name in _QUALITY]
        needed = [_needed(seeds, name, target) for name, target in targets.items()]
        rows.append([f"`{variant}`", str(len(seeds)), *cells, *needed])
    needed_titles = [f"tokens to `{_BASE}`'s {_QUALITY[name]}" for name in targets]
    head = ["variant", "seeds", *_QUALITY.values(), *needed_titles]
    return f"**{model}, {title}**, after {num_tokens:,.0f} trained tokens\n\n{_table(head, rows)}"


def _needed(seeds: Sequence[Result], figure: str, target: float) -> str:
    reached = [result.tokens_until(figure, target) for result in seeds]
    found = [tokens for tokens in reached if tokens is not None]
    if not found:
        return f"not in {min(result.num_tokens for result in seeds):,.0f}"
    text = f"{Spread.of(found).mean:,.0f}"
    return text if len(found) == len(reached) else f"{text} ({len(found)} of {len(reached)} seeds)"


def _decoding(results: Sequence[Result], model: str, variants: Sequence[str]) -> str:
    """The final students' greedy text by decoding mode: a line of log-likelihoods and one of what a forward reveals."""
    modes = [mode for mode in of(results, model, variants[0])[0].decoding if mode != _ORIGINAL]
    rows = [
        [f"`{variant}`", title, *(_mean(of(results, model, variant), mode, name) for mode in modes)]
        for variant in variants
        for name, title in _TEXT_FIGURES.items()
    ]
    original = of(results, model, variants[0])[0].decoding[_ORIGINAL]
    said = ", ".join(f"{title} {original[name]:.{_DIGITS}f}" for name, title in _TEXT_FIGURES.items() if name != _SPEED)
    head = ["student", "", *(mode if mode == "static" else f"γ {mode}" for mode in modes)]
    return (
        f"**{model}, decoding**, greedy, static and dynamic by threshold, at the end of the training; the AR original's own "
        f"greedy text: {said}\n\n{_table(head, rows)}"
    )


def _mean(seeds: Sequence[Result], mode: str, figure: str) -> str:
    return f"{Spread.of([result.decoding[mode][figure] for result in seeds]).mean:.{_DIGITS}f}"


def _shown(values: Sequence[float]) -> str:
    """Mean over seeds, and their range where there are several."""
    spread = Spread.of(values)
    text = f"{spread.mean:.{_DIGITS}f}"
    return text if len(values) == 1 else f"{text} ({spread.low:.{_DIGITS}f}–{spread.high:.{_DIGITS}f})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
