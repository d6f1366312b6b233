"""A study compares at equal trained tokens, and draws what is there."""

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_opdlm import cli
from nemo_opdlm.config import parse, validate
from nemo_opdlm.study import figures, plan, runner, tables
from nemo_opdlm.study.results import Spread, read_results, shared_tokens

REPOSITORY = Path(__file__).resolve().parents[3]
NAMES = ("heldout_kl", "kl", "teacher_loglik", "teacher_agreement", "repeat_4gram", "tokens_per_forward")


def evaluation(step: int, num_tokens: int, value: float) -> dict[str, float]:
    return {"global_step": step, "trained_tokens": num_tokens, **dict.fromkeys(NAMES, value)}


def content(variant: str, *stages: list[dict[str, float]], model: str = "glassllm", seed: int = 1) -> dict[str, Any]:
    text = {"static": 1.0, "0.80": 3.0, "1.00": 1.0, "original": 1.0}
    decoding = {mode: {**dict.fromkeys(NAMES, -2.0), "tokens_per_forward": value} for mode, value in text.items()}
    found = [{"overrides": [], "evaluations": points, "decoding": decoding} for points in stages]
    return {"model": model, "variant": variant, "seed": seed, "stages": found}


def write(folder: Path, *results: dict[str, Any]) -> None:
    for result in results:
        name = f"{result['model']}-{result['variant']}-{result['seed']}.json"
        (folder / name).write_text(json.dumps(result), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(
        tmp_path,
        content("opdlm", [evaluation(0, 0, 4.0), evaluation(10, 100, 2.0), evaluation(20, 200, 1.0)]),
        content("sft", [evaluation(0, 0, 4.0), evaluation(10, 80, 3.0), evaluation(20, 160, 2.0)]),
        content("block_8", [evaluation(0, 0, 4.0), evaluation(20, 240, 2.0)]),
    )
    return tmp_path


@pytest.mark.parametrize("cell", plan.cells((*plan.FULL, *plan.SMOKE)), ids=lambda cell: cell.name)
def test_every_stage_of_every_cell_is_a_run(cell: plan.Cell) -> None:
    for stage in cell.stages:
        config = validate(parse(cli.compose("gpt_opdlm", cell.overrides(stage))), check_files=False)
        assert config.model.seed == cell.seed
        assert config.trainer.max_steps is not None
        # The last evaluation is that of the final student.
        assert config.trainer.max_steps % cell.subject.evaluate_every == 0
        assert config.trainer.max_steps * len(cell.stages) == cell.subject.num_updates


def test_a_study_that_is_cut_short_has_a_seed_of_every_variant() -> None:
    seeds = [cell.seed for cell in plan.cells(plan.FULL[:1])]
    assert seeds == sorted(seeds)


def test_figures_between_evaluations_and_tokens_to_a_target(folder: Path) -> None:
    opdlm, sft = (next(r for r in read_results(folder) if r.variant == name) for name in ("opdlm", "sft"))
    assert shared_tokens([opdlm, sft]) == 160
    assert opdlm.at(150, "kl") == pytest.approx(1.5)
    assert (opdlm.at(0, "kl"), opdlm.at(1000, "kl")) == (4.0, 1.0)
    assert sft.tokens_until("kl", 2.5) == pytest.approx(120)
    assert sft.tokens_until("kl", 1.0) is None
    assert sft.tokens_until("kl", 5.0) == 0


def test_a_target_that_is_left_again_is_not_reached(tmp_path: Path) -> None:
    write(tmp_path, content("sft", [evaluation(step, 10 * step, kl) for step, kl in enumerate((4.0, 1.0, 3.0, 2.0))]))
    (result,) = read_results(tmp_path)
    assert result.tokens_until("kl", 1.5) is None
    assert result.tokens_until("kl", 2.5) == pytest.approx(25)


def test_stages_go_on_counting_tokens(tmp_path: Path) -> None:
    stages = ([evaluation(0, 0, 4.0), evaluation(5, 50, 3.0)], [evaluation(0, 0, 3.5), evaluation(5, 60, 2.0)])
    write(tmp_path, content("block_4_8", *stages))
    (result,) = read_results(tmp_path)
    assert [point["trained_tokens"] for point in result.points] == [0, 50, 50, 110]
    assert result.tokens_until("kl", 2.75) == pytest.approx(80)


def test_spread() -> None:
    assert Spread.of([1.0, 2.0, 6.0]) == Spread(3.0, 1.0, 6.0)


def test_tables_stand_between_their_marks(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"above\n{tables.BEGIN}\nstale\n{tables.END}\nbelow\n", encoding="utf-8")
    tables.write(read_results(folder), page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("above\n") and text.endswith("below\n") and "stale" not in text
    assert "**glassllm, methods**, after 160 trained tokens" in text
    assert "| `opdlm` | 1 | 1.400 |" in text
    # `sft` does not get below 2 nats where the method is at 1.4.
    assert "not in 160" in text
    assert "the AR original's own greedy text: log-likelihood -2.000" in text
    assert "| `opdlm` | tokens per forward | 1.000 | 3.000 | 1.000 |" in text


def test_a_page_without_marks_is_left_alone(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("mine\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has no <!-- tables -->"):
        tables.write(read_results(folder), page)
    assert page.read_text(encoding="utf-8") == "mine\n"


def test_figures_are_drawn_of_what_is_there(folder: Path, tmp_path: Path) -> None:
    files = figures.draw(read_results(folder), tmp_path / "figures")
    assert [file.name for file in files] == [f"glassllm_{name}.png" for name in ("methods", "decoding", "block_sizes")]
    assert all(file.stat().st_size > 10_000 for file in files)


@pytest.mark.parametrize("text", ["{}", "[]", "no json", '{"stages": []}'])
def test_a_file_that_is_no_result_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "broken.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken\.json is no result of a study"):
        read_results(tmp_path)


def test_a_folder_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no results"):
        read_results(tmp_path)


def test_cells_that_are_done_are_not_run_again_and_failures_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = list(plan.cells(plan.SMOKE))[:3]
    folders = runner.Folders(tmp_path / "work", tmp_path / "results")
    folders.results.mkdir()
    folders.result(cells[0]).write_text("{}", encoding="utf-8")
    folders.original(cells[1].subject).parent.mkdir()
    folders.original(cells[1].subject).touch()
    monkeypatch.setattr(runner.sys, "executable", "/bin/false")
    told: list[str] = []
    assert runner.run_study(cells, folders, told.append) == cells[1:]
    assert [line.partition(":")[0] for line in told] == [f"2/3 {cells[1].name}", f"3/3 {cells[2].name}"]
    assert "stopped with 1, see" in told[0]


def test_the_page_of_the_study_shows_its_results() -> None:
    study = REPOSITORY / "examples" / "study"
    text = (study / "README.md").read_text(encoding="utf-8")
    shown = text.partition(tables.BEGIN)[2].partition(tables.END)[0]
    assert shown.strip() == tables.markdown(read_results(study / "cells")).strip()
