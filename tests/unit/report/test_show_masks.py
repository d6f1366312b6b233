"""The printed masks."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from nemo_opdlm.diffusion.layout import BlockLayout
from nemo_opdlm.diffusion.masks import AttentionRule, dense

SCRIPT = Path(__file__).resolve().parents[3] / "examples" / "show_masks.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("show_masks", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("sizes", [(6, 5, 4, 1), (4, 4, 4, 2), (1, 3, 2, 3), (2, 3, 1, 1), (5, 2, 8, 1)])
@pytest.mark.parametrize("rule", list(AttentionRule))
def test_the_printed_cells_are_those_of_the_dense_mask(
    script: ModuleType, sizes: tuple[int, int, int, int], rule: AttentionRule
) -> None:
    prompt_len, response_len, block_size, num_states = sizes
    layout = BlockLayout(*(torch.tensor([n]) for n in (prompt_len, response_len, num_states)), block_size)
    attributes = layout.attributes()
    lines = script.render(rule, attributes, prompt_len, response_len).splitlines()
    rows = [[cell == "■" for cell in line if cell in "■·"] for line in lines if set(line) & set("■·")]
    assert rows == dense(rule, attributes, attributes)[0, 0].tolist()


def test_a_state_copy_is_labelled_by_its_positions_and_number(script: ModuleType) -> None:
    layout = BlockLayout(torch.tensor([3]), torch.tensor([2]), torch.tensor([2]), 4)
    lines = script.render(AttentionRule.BLOCK_DIFFUSION, layout.attributes(), 3, 2).splitlines()
    labels = [line.split()[0] for line in lines if set(line) & set("■·")]
    clean = ["p0", "p1", "p2", "x3", "x4", ".5", ".6", ".7"]
    copy = ["s0", "s1", "s2", "s3", "s4", ".5", ".6", ".7"]
    assert labels == clean + copy + [label + "'" for label in copy]


def test_both_masks_are_printed(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["show_masks.py", "--prompt_len", "2", "--response_len", "2", "--block_size", "2"])
    script.main()
    shown = capsys.readouterr().out
    assert "Student: block diffusion" in shown and "Teacher: causal" in shown


@pytest.mark.parametrize("arguments", [["--block_size", "0"], ["--prompt_len", "x"], ["--response_len", "500"]])
def test_sizes_out_of_range_are_one_line(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["show_masks.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err.splitlines()[-1]
